# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Processes that share the tests, file by file, each with one thread.
WORKERS ?= 2
# Pinned: where the index has a CPU build of this release it is found, and a range would pull gigabytes of CUDA. PyPI has
# the CUDA build alone for Linux; TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" takes PyTorch's
# own index. An already installed torch is kept.
TORCH ?= torch==2.13.0

.PHONY: demo test test-slow lint benchmark clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv failed; on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.demo
	$(BIN)/pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(VENV)/.demo  ## embed and search the shipped library with the shipped model
	$(BIN)/python -m evaluation.demo

test: $(VENV)/.test  ## the test suite: CPU only, offline
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.test  ## what takes more than a minute a test: full sizes, kill drills, FSDP, Ray and peft where installed
	$(BIN)/python -m pytest -m slow

$(VENV)/.benchmarks: pyproject.toml | $(VENV)/.demo
	$(BIN)/pip install -q --disable-pip-version-check -e ".[benchmarks]"
	touch $@

benchmark: $(VENV)/.benchmarks  ## speed and memory beside onnxruntime, OpenVINO and plain BERT (tens of minutes)
	$(BIN)/python -m benchmarks.speed --shape small --output benchmark_output --resume

lint: $(VENV)/.test  ## linters and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo_output benchmark_output build *.egg-info
