"""Hub data sets over real HTTP: streamed, no further than asked for, trained on, named when they cannot be had.

Each test runs a fresh process against a server on the loopback interface; huggingface_hub reads its endpoint once.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, SHIPPED
from hub_server import serve
from safetensors.torch import load_file

ROWS = [{"question": f"What is number {i}?", "answer": f"The number {i}, {i * i} squared."} for i in range(200)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TEXTS = {
    f"data/train-{part}.jsonl": lines([{"text": f"The number {i} is {i % 7} more."} for i in range(part, 200, 2)])
    for part in range(2)
}


@pytest.fixture
def hub(tmp_path):
    """The endpoint's environment, and the requests it has seen."""
    datasets = {
        "me/pairs": {f"data/train-{part}.jsonl": lines(ROWS[100 * part : 100 * part + 100]) for part in range(2)},
        "me/texts": TEXTS,
        "me/empty-answers": {"train.jsonl": lines([{"question": "a", "answer": ""}] * 3)},
    }
    with serve(datasets) as (endpoint, requests):
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        yield environment, requests


def python(arguments: list[str], environment: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )


def test_only_the_rows_asked_for_are_fetched(hub):
    environment, requests = hub
    program = """
from training.contrastive import load_sources
from training.recipe import ContrastiveRecipe, Source
from training.source_files import open_source
source = Source(name="numbers", hub="me/pairs", anchor="question", positive="answer")
stream = open_source(source, ".", streaming=True)
print(next(iter(stream)))
rows = load_sources(ContrastiveRecipe(sources=[source], max_rows=20))["numbers"]
print(sorted(rows.column_names), len(rows), rows[19]["anchor"], len(rows.cache_files) == 1)
"""
    process = python(["-c", program], environment)
    assert process.returncode == 0, process.stderr
    assert str(ROWS[0]) in process.stdout
    assert "['anchor', 'positive'] 20 What is number 19? True" in process.stdout
    fetched = [request for request in requests if request.startswith("GET") and "/resolve/" in request]
    assert any("train-0.jsonl" in request for request in fetched)
    assert not any("train-1.jsonl" in request for request in fetched)


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_another_process_finds_the_rows_in_the_cache(hub, num_negatives):
    """A second rank, or a run that is resumed: no data are fetched again, and what was made of them is the same."""
    environment, requests = hub
    program = f"""
from training.pair_sources import load_sources
from training.recipe import ContrastiveRecipe, Source
source = Source(name="numbers", hub="me/pairs", anchor="question", positive="answer", negatives=None)
recipe = ContrastiveRecipe(
    sources=[source], max_rows=MAX_ROWS, num_negatives={num_negatives}, fill_negatives="random"
)
rows = load_sources(recipe)["numbers"]
print(len(rows), rows.cache_files[0]["filename"], rows._fingerprint, rows[77 % len(rows)])
"""
    outputs, fetched = [], []
    for max_rows in ("None", "None", "50"):
        requests.clear()
        process = python(["-c", program.replace("MAX_ROWS", max_rows)], environment)
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
        fetched.append(sum(request.startswith("GET") and "/resolve/" in request for request in requests))
    assert fetched[0] >= 2
    assert fetched[1] == 0
    assert outputs[1] == outputs[0]
    assert outputs[0].startswith("200 ")
    assert fetched[2] > 0  # other rows are asked for
    assert outputs[2].startswith("50 ")


def test_training_on_a_hub_data_set(hub, tmp_path):
    environment, _ = hub
    source = "{name: numbers, hub: me/pairs, anchor: question, positive: answer}"
    process = python(
        [
            "-m", "training.pairs", "--config", "training/recipes/tiny-pairs.yaml", f"sources=[{source}]",
            f"model={SHIPPED}", f"output_dir={tmp_path / 'run'}", "max_length=16", "training.max_steps=2",
            "training.per_device_train_batch_size=4", "training.logging_steps=1",
        ],
        environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]


STAGE_ONE = """
import sys
from training import mlm
from training.recipe import MLMRecipe, load_recipe

def trained(output, resume, *overrides):
    recipe = load_recipe(MLMRecipe, "training/recipes/tiny-mlm.yaml", [f"output_dir={output}", *overrides])
    return mlm.train(recipe, resume=resume)

if __name__ == "__main__":
    folder, *overrides = sys.argv[1:]
    trained(f"{folder}/whole", None, *overrides)
    trained(f"{folder}/half", f"{folder}/whole/checkpoint-2", *overrides)
    trained(f"{folder}/local", None, *overrides, "sources=[{name: web, path: 'train-*.jsonl', heldout_share: 0.2}]")
"""


def test_stage_one_resumes_on_a_stream_with_a_held_out_share(hub, tmp_path):
    """Two workers, bit for bit; and the stream trains as the same files on disk do."""
    environment, requests = hub
    for part in range(2):
        (tmp_path / f"train-{part}.jsonl").write_bytes(TEXTS[f"data/train-{part}.jsonl"])
    (tmp_path / "program.py").write_text(STAGE_ONE)
    process = python(
        [
            str(tmp_path / "program.py"), str(tmp_path), f"tokenizer={SHIPPED}", f"data_dir={tmp_path}",
            "sources=[{name: web, hub: me/texts, heldout_share: 0.2}]", "heldout=[]", "heldout_sequences=16",
            "model={vocab_size: 30528, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
            "intermediate_size: 24, hidden_dropout_prob: 0.1}", "max_length=16", "shuffle_buffer=10",
            "training.max_steps=4", "training.save_steps=2", "training.per_device_train_batch_size=8",
            "training.logging_steps=1", "training.warmup_steps=1", "training.learning_rate=0.01",
            "training.dataloader_num_workers=2", "training.disable_tqdm=true", "training.use_cpu=true",
        ],
        {**environment, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    whole, half, local = (load_file(tmp_path / run / "final/model.safetensors") for run in ("whole", "half", "local"))
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, rtol=0, atol=0, msg=name)
        torch.testing.assert_close(local[name], tensor, rtol=0, atol=0, msg=name)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "half", "local")
    ]
    assert [[entry["step"] for entry in log if "loss" in entry] for log in logs] == [
        [1, 2, 3, 4],
        [3, 4],
        [1, 2, 3, 4],
    ]
    assert len({next(e["eval_loss"] for e in log if "eval_loss" in e) for log in logs}) == 1
    assert next(e["eval_masked_tokens"] for e in logs[0] if "eval_masked_tokens" in e) > 16
    assert all(any(f"train-{part}.jsonl" in request for request in requests) for part in range(2))


def test_the_anchors_of_a_hub_data_set_are_held_out_as_those_of_the_file(hub, tmp_path):
    environment, _ = hub
    (tmp_path / "numbers.jsonl").write_bytes(lines(ROWS))
    program = """
import sys
from training.pair_sources import load_sources, split_heldout
from training.recipe import ContrastiveRecipe, Source
sides = []
for place in ({"hub": "me/pairs"}, {"path": "numbers.jsonl"}):
    source = Source(name="numbers", anchor="question", positive="answer", heldout_share=0.2, **place)
    recipe = ContrastiveRecipe(sources=[source], data_dir=sys.argv[1])
    sides.append([side["numbers"].to_list() for side in split_heldout(load_sources(recipe), recipe)])
assert sides[0] == sides[1]
training, heldout = ({row["anchor"] for row in side} for side in sides[0])
print(len(training), len(heldout), len(training | heldout))
"""
    process = python(["-c", program, str(tmp_path)], environment)
    assert process.returncode == 0, process.stderr[-2000:]
    training, heldout, both = map(int, process.stdout.split()[-3:])
    assert training + heldout == both == 200
    assert 20 < heldout < 60


WRONG = {
    "hub='me/nothing'": "Repository Not Found",
    "hub='me/pairs', hub_config='german'": "BuilderConfig 'german' not found",
    "hub='me/pairs', split='validation'": "Bad split: validation",
    "hub='me/pairs', anchor='query'": "no column 'query'; it has question, answer",
    "hub='me/empty-answers', anchor='question', positive='answer'": "all pairs are empty",
}


def test_what_cannot_be_read_is_named(hub):
    environment, _ = hub
    program = f"""
from training.contrastive import load_sources
from training.recipe import ContrastiveRecipe, RecipeError, Source
for source in [{", ".join(f"dict({arguments})" for arguments in WRONG)}]:
    try:
        load_sources(ContrastiveRecipe(sources=[Source(name="numbers", **source)]))
    except RecipeError as error:
        print(" ".join(str(error).split()))
"""
    process = python(["-c", program], environment)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == len(WRONG)
    for line, message in zip(lines, WRONG.values(), strict=True):
        assert line.startswith("source numbers: ")
        assert message in line


def test_the_command_says_it_in_one_line(hub, tmp_path):
    environment, _ = hub
    process = python(
        [
            "-m", "training.pairs", "--config", "training/recipes/tiny-pairs.yaml",
            "sources=[{name: numbers, hub: me/pairs, anchor: query}]", f"model={SHIPPED}",
            f"output_dir={tmp_path / 'run'}",
        ],
        environment,
    )  # fmt: skip
    assert process.returncode == 2
    assert "error: source numbers: no column 'query'" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
