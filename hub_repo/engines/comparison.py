"""Every engine and client library beside torch on one model: vectors, tokens per second, longest text, file.

    python -m hub_repo.engines --model hub_repo/tiny --output DIR --environments CACHE [--lengths 128 2048]

Law: every engine is held against torch, with a control that must fail, and what cannot be run stands in the table with
the reason. onnxruntime, OpenVINO and torch compute the same token ids in turns; the others, each in an environment of
its own that is installed once, are processes of their own. Without --environments those are not run.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch

from modeling_jina_bert import JinaBertModel

from ..embedding.model_folder import Encoding, ModelFolder
from ..export import Formats, export_formats
from ..folders.checkpoint_files import WEIGHTS
from ..folders.loading import quiet_transformers
from ..folders.staging import holds_jina_bert
from ..formats.gguf_export import TOLERANCES as GGUF_TOLERANCES
from ..formats.gguf_export import gguf_name, read_gguf
from ..formats.onnx_export import FILES, onnxruntime_engine
from ..formats.onnx_export import TOLERANCES as ONNX_TOLERANCES
from ..formats.openvino_export import FILE as OPENVINO
from ..formats.openvino_export import TOLERANCES as OPENVINO_TOLERANCES
from ..formats.openvino_export import openvino_engine
from ..formats.parity import LENGTHS, Run, Tolerance, check_batches, disturbed, torch_embeddings
from ..formats.tei import tanh_agreement
from .clients import client_rows
from .measure import TOKENS_PER_CALL, TORCH, Settings, Subject, or_error, speeds, timed_batch, torch_engine
from .node import GGUF_KINDS, node_rows, tokenizer_remark
from .rows import (
    RUNGS,
    Check,
    Missing,
    Row,
    first_of_each,
    reach,
    row_of,
    rung_texts,
    table,
    tokenized,
    whole_words,
)

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "onnxruntime", "openvino", "gguf")
"""Of the engines beside torch in this environment."""
_LEGEND = """\
Error: largest difference of a component of the embeddings (length 1) from torch's; cosine: the smallest to torch's.
Agrees: both are within the tolerance of the precision on short, odd, long and padded input, and the same model with
disturbed weights is outside it. Reads (asked once an engine): the longest of texts of {rungs} tokens that
is read whole.
Tokens/s: calls of {tokens:,} tokens, the median of {rounds}; in brackets the ratio to torch measured next to it.
fastembed, LangChain and LlamaIndex get texts, as documents and as queries, and tokenise them with their own defaults;
the pipeline of transformers.js gets them, too. The others get token ids, llama.cpp and transformers.js one sequence a
call."""


@dataclass
class Report:
    """What was measured so far; the fields of engines.json.

    Attributes:
        command: That measured it.
        machine: On which.
        settings: Model and its hash, lengths, rounds, threads, processor and versions: what `--resume` compares.
        rows: Torch first.
        missing: Engines that were not run.
        remarks: Sentences below the table.
    """

    command: str
    machine: str
    settings: dict
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def save(self, output: Path):
        """Writes engines.json whole or not at all."""
        part = output / ".engines.json.partial"
        part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(part, output / "engines.json")

    def resume(self, output: Path):
        """Takes over the rows that were measured with the same settings; what was missing is tried again."""
        path = output / "engines.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("settings") == self.settings:
            self.rows = [row_of(fields) for fields in found["rows"]]

    def markdown(self) -> str:
        """The table with what it takes to read it."""
        rungs = f"{', '.join(f'{x:,}' for x in RUNGS[:-1])} and {RUNGS[-1]:,}"
        legend = _LEGEND.format(rungs=rungs, tokens=TOKENS_PER_CALL, rounds=self.settings["rounds"])
        remarks = "\n".join(self.remarks)
        lines = table(self.rows, self.missing, self.settings["lengths"])
        return f"{lines}\n\n{legend}\n\n{remarks}\n\n`{self.command}`\n({self.machine})\n"


def measure(model_path: str, output: Path, settings: Settings, report: Report):
    """Exports a model in every format and measures the engines; the report is saved after each.

    Args:
        model_path: A checkpoint, as `hub_repo.export` takes it.
        output: Folder to write; the export goes to `output/NAME`, that for text-embeddings-inference to `NAME-tei`.
        settings: Lengths, rounds, threads, and where other engines are.
        report: Filled; engines that it has are not measured again, and if it has any, nothing is exported again.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: The model cannot be exported.
    """
    torch.set_num_threads(settings.threads)
    name = Path(model_path).resolve().name
    if not report.rows:
        formats = Formats(onnx=tuple(FILES), openvino=True, gguf=GGUF_KINDS, tei=output / f"{name}-tei")
        export_formats(model_path, output / name, dtype="float32", formats=formats)
    model = JinaBertModel.from_pretrained(output / name, dtype=torch.float32).eval()
    texts = rung_texts(whole_words(model))
    whole = [torch_embeddings(model, tokenized(model, [text])) for text in texts]
    subject = Subject(output / name, model, disturbed(model), texts, whole)
    if not report.rows:
        report.rows = local_rows(subject, settings)
        report.save(output)
    known = {row.engine for row in report.rows}
    for found in chain(node_rows(subject, settings, known), client_rows(subject, settings, known)):
        (report.rows if isinstance(found, Row) else report.missing).append(found)
        report.save(output)
        logger.info("%s: %s", found.engine, "measured" if isinstance(found, Row) else found.reason)
    tanh = f"GELU by its tanh approximation, as in llama.cpp and text-embeddings-inference: {tanh_agreement(model)}."
    report.remarks = [tanh, tokenizer_remark(subject, settings)]
    report.save(output)


def _remove_earlier(folder: Path):
    """Removes what an interrupted run has exported for text-embeddings-inference, whose folder has to be a new one."""
    if holds_jina_bert(folder):
        shutil.rmtree(folder)


def local_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Torch and the engines whose packages are installed beside it; then torch with the tensors of the GGUF files."""
    folder, model = subject.folder, subject.model
    runs: dict[str, tuple[Run, Path, str, Tolerance]] = {
        TORCH: (torch_engine(subject), folder / WEIGHTS, "torch", Tolerance(1e-6, 1 - 1e-6))
    }
    for precision, file in FILES.items():
        engine = onnxruntime_engine(folder / file, settings.threads)
        runs[f"onnxruntime, {precision}"] = engine, folder / file, "onnxruntime", ONNX_TOLERANCES[precision]
    engine, weights = openvino_engine(folder / OPENVINO, settings.threads), (folder / OPENVINO).with_suffix(".bin")
    runs["OpenVINO, fp32"] = engine, weights, "openvino", OPENVINO_TOLERANCES[False]
    check = Check.of(model, subject.twin, check_batches(model.config.vocab_size, LENGTHS))
    rows = []
    for name, (run, path, package, tolerance) in runs.items():
        found = [run(batch) for batch in check.batches]
        row = check.row(name, version(package), path.stat().st_size, found, tolerance)
        if name in first_of_each(list(runs)):
            read = subject.whole if name == TORCH else [or_error(run, batch) for batch in subject.rungs]
            row.reach = reach(read, subject.whole, tolerance)
        rows.append(row)
        logger.info("%s: measured", name)
    rows[0].control = None  # torch is what all are held against
    for length in settings.lengths:
        found = speeds(
            {name: x[0] for name, x in runs.items()}, timed_batch(length, model.config.vocab_size), settings.rounds
        )
        for row in rows:
            row.speed[length], row.relative[length] = found[row.engine], found[row.engine] / found[TORCH]
    return rows + _gguf_rows(subject, check)


def _gguf_rows(subject: Subject, check: Check) -> list[Row]:
    """Torch with what the GGUF files hold: the part of llama.cpp's error that comes from the file."""
    rows = []
    for kind in GGUF_KINDS:
        path = subject.folder / gguf_name(subject.folder, kind)
        twin = read_gguf(path, subject.model)
        found = [torch_embeddings(twin, batch) for batch in check.batches]
        name = f"torch with the tensors of GGUF {kind}"
        rows.append(check.row(name, version("gguf"), path.stat().st_size, found, GGUF_TOLERANCES[kind]))
    return rows


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine(threads: int) -> str:
    """The processor, its cores, versions and the day."""
    day = datetime.datetime.now(datetime.UTC).date()
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{_processor()}, {os.cpu_count()} cores, {threads} used by each engine; {software}; {day}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table, and writes it to `output/engines.md` and `.json`; 1 if an engine disagrees."""
    parser = argparse.ArgumentParser(prog="hub_repo.engines", description="Every engine beside torch.")
    parser.add_argument("--model", required=True, help="checkpoint, or a folder of ours")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 2048], metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--environments", type=Path, metavar="FOLDER",
        help="where fastembed, LangChain, LlamaIndex, llama.cpp and transformers.js are installed, once (4.4 GB)",
    )  # fmt: skip
    parser.add_argument(
        "--node", type=Path, metavar="FOLDER", help="one with node-llama-cpp and @huggingface/transformers"
    )
    parser.add_argument("--resume", action="store_true", help="keep what engines.json of the same settings has")
    arguments = parser.parse_args(argv)
    if min(arguments.lengths) < 2 or arguments.rounds < 1 or arguments.threads < 1:
        parser.error("lengths are at least 2, rounds and threads at least 1")
    quiet_transformers()
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    settings = Settings(arguments.lengths, arguments.rounds, arguments.threads, arguments.environments, arguments.node)
    command = shlex.join(["python", "-m", "hub_repo.engines", *(sys.argv[1:] if argv is None else argv)])
    try:
        same = {name: getattr(arguments, name) for name in ("model", "lengths", "rounds", "threads")}
        same |= {"model_sha256": ModelFolder(arguments.model, Encoding(device="cpu")).sha256}
        same |= {"processor": _processor(), "versions": {name: version(name) for name in _PACKAGES}}
        report = Report(command, _machine(arguments.threads), same)
        if arguments.resume:
            report.resume(arguments.output)
            if not report.rows:
                _remove_earlier(arguments.output / f"{Path(arguments.model).resolve().name}-tei")
        measure(arguments.model, arguments.output, settings, report)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = report.markdown()
    (arguments.output / "engines.md").write_text(text, encoding="utf-8")
    print(text, end="")
    if wrong := [row.engine for row in report.rows if not row.agrees]:
        print(f"error: other vectors than torch's: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0
