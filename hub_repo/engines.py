"""Every engine beside torch on one model: size of the file, how far its vectors are off, tokens per second.

    python -m hub_repo.engines --model hub_repo/tiny --output DIR [--lengths 128 2048] [--threads 1] [--node FOLDER]

Law: every engine computes the same token ids on the same number of threads, in turns, so that what else the machine
does falls on all of them; the median of the rounds is reported, with the command and the machine.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel

from . import node_engines
from .export import Formats, export_formats
from .gguf_export import gguf_name, read_gguf
from .loading import quiet_transformers
from .onnx_export import FILES, onnxruntime_engine
from .openvino_export import FILE as OPENVINO
from .openvino_export import openvino_engine
from .parity import LENGTHS, Batch, agreement, check_batches, torch_embeddings
from .tei import tanh_agreement

TOKENS_PER_CALL = 4096
"""Tokens of the batch that is timed, at every length."""
_NODE_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # precision -> what transformers.js calls it
_TEXTS = ("How is the weather today?", "Ünïcödé, it's 12.5 % (of naïve café-goers)!", "日本語 and 中文 mixed", "don't")


@dataclass
class Row:
    """An engine's line of the table.

    Attributes:
        engine: Its name and precision.
        megabytes: Of its file or files.
        error: Largest difference of a component of the embeddings (length 1) from torch's; not a number for torch.
        cosine: Smallest cosine to torch's.
        speed: Length in tokens -> tokens per second.
    """

    engine: str
    megabytes: float
    error: float = float("nan")
    cosine: float = float("nan")
    speed: dict[int, float] = field(default_factory=dict)


def timed_batch(length: int, vocab_size: int) -> Batch:
    """`TOKENS_PER_CALL` tokens in sequences of one length, no padding.

    Args:
        length: In tokens.
        vocab_size: Token ids are drawn from 1 ... `vocab_size` - 1.
    """
    shape = (max(1, TOKENS_PER_CALL // length), length)
    ids = np.random.default_rng(1).integers(1, vocab_size, shape)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def speeds(runs: dict[str, Callable[[Batch], np.ndarray]], batch: Batch, rounds: int) -> dict[str, float]:
    """Tokens per second of each engine: the median of `rounds`, the engines taking turns, after a call that warms up.

    Args:
        runs: Name -> engine.
        batch: What is computed.
        rounds: At least 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(batch)
            if round:
                seconds[name].append(time.perf_counter() - start)
    return {name: batch["input_ids"].size / statistics.median(found) for name, found in seconds.items()}


def measure(model_path: str, output: Path, *, lengths: Sequence[int], rounds: int, threads: int, node: Path | None):
    """Exports a model in every format and measures the engines.

    Args:
        model_path: A checkpoint, as `hub_repo.export` takes it.
        output: Folder to write; the export goes to `output/NAME`, that for text-embeddings-inference to `NAME-tei`.
        lengths: In tokens, of the timed batches.
        rounds: Of each engine at each length.
        threads: Of each engine.
        node: Folder with `node_modules`, for llama.cpp and transformers.js; None leaves them out.

    Returns:
        The rows, torch first, and remarks.
    """
    torch.set_num_threads(threads)
    name = Path(model_path).resolve().name
    folder, kinds = output / name, ("f16", "q8_0")
    formats = Formats(onnx=tuple(FILES), openvino=True, gguf=kinds, tei=output / f"{name}-tei")
    export_formats(model_path, folder, dtype="float32", formats=formats)
    model = JinaBertModel.from_pretrained(folder, dtype=torch.float32).eval()

    runs = {"torch, float32": lambda batch: torch_embeddings(model, batch)}
    paths = {"torch, float32": folder / "model.safetensors"}
    for precision, file in FILES.items():
        paths[f"onnxruntime, {precision}"] = folder / file
        runs[f"onnxruntime, {precision}"] = onnxruntime_engine(folder / file, threads)
    paths["OpenVINO, fp32"] = (folder / OPENVINO).with_suffix(".bin")
    runs["OpenVINO, fp32"] = openvino_engine(folder / OPENVINO, threads)
    batches = check_batches(model.config.vocab_size, LENGTHS)
    expected = [runs["torch, float32"](batch) for batch in batches]
    rows = [_row(engine, paths[engine], [run(batch) for batch in batches], expected) for engine, run in runs.items()]
    for length in lengths:
        for row, speed in zip(
            rows, speeds(runs, timed_batch(length, model.config.vocab_size), rounds).values(), strict=True
        ):
            row.speed[length] = speed
    remarks = [
        f"GELU by its tanh approximation, as in llama.cpp and text-embeddings-inference: {tanh_agreement(model)}."
    ]
    for kind in kinds:
        path = folder / gguf_name(folder, kind)
        twin = read_gguf(path, model)
        found = [torch_embeddings(twin, batch) for batch in batches]
        rows.append(_row(f"torch with the tensors of GGUF {kind}", path, found, expected))
    if node is not None:
        try:
            more, remark = _node_rows(folder, model, node, kinds, lengths, rounds, threads)
        except RuntimeError as error:  # the engines above were measured, and that took minutes
            more, remark = [], f"llama.cpp and transformers.js are missing: {' '.join(str(error).split())}"
        rows, remarks = rows + more, [*remarks, remark]
    return rows, remarks


def _row(engine: str, path: Path, found, expected) -> Row:
    result = agreement(found, expected)
    return Row(engine, path.stat().st_size / 1e6, result.error, result.cosine)


def _node_rows(folder: Path, model: JinaBertModel, node: Path, kinds, lengths, rounds: int, threads: int):
    """llama.cpp and transformers.js; each length is a process of its own, so they take no turns with the others."""
    special = model.tokenizer.cls_token_id, model.tokenizer.sep_token_id
    batches = [_between(batch, special) for batch in check_batches(model.config.vocab_size, LENGTHS)[1:]]
    sequences = [batch["input_ids"][0] for batch in batches]
    expected = [torch_embeddings(model, batch) for batch in batches]
    engines = {
        f"llama.cpp, {kind}": (folder / gguf_name(folder, kind), node_engines.run_llama_cpp, {}) for kind in kinds
    }
    for precision, dtype in _NODE_DTYPES.items():
        options = {"dtype": dtype}
        engines[f"transformers.js, {precision}"] = (folder, node_engines.run_transformers_js, options)
    rows = []
    for engine, (path, run, options) in engines.items():
        result = run(node, path, sequences, threads=threads, **options)
        file = path if path.is_file() else folder / FILES[engine.split(", ")[1]]
        row = _row(engine, file, [vector[None] for vector in result.vectors], expected)
        for length in lengths:
            batch = _between(timed_batch(length, model.config.vocab_size), special)
            seconds = run(node, path, batch["input_ids"], rounds=rounds, threads=threads, **options).seconds
            row.speed[length] = batch["input_ids"].size / statistics.median(seconds)
        rows.append(row)
    return rows, _tokenizer_remark(folder, model, node, kinds[0])


def _between(batch: Batch, special: tuple[int, int]) -> Batch:
    """The batch with the first and the last token of every sequence special, as llama.cpp wants them."""
    ids = batch["input_ids"].copy()
    ids[:, 0], ids[:, -1] = special
    return {**batch, "input_ids": ids}


def _tokenizer_remark(folder: Path, model: JinaBertModel, node: Path, kind: str) -> str:
    result = node_engines.run_llama_cpp(node, folder / gguf_name(folder, kind), [], texts=_TEXTS)
    ours = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
    other = [text for text, found, own in zip(_TEXTS, result.tokens, ours, strict=True) if found != own]
    if other:
        return f"llama.cpp splits {len(other)} of {len(_TEXTS)} texts otherwise: {other}."
    return f"llama.cpp splits {len(_TEXTS)} texts of several scripts as our tokenizer does."


def table(rows: Sequence[Row], lengths: Sequence[int]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| engine | file, MB | largest error | cosine | " + " | ".join(f"tokens/s at {x:,}" for x in lengths) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(lengths),
    ]
    for index, row in enumerate(rows):
        agrees = ["-", "-"] if index == 0 else [f"{row.error:.1e}", f"{row.cosine:.7f}"]
        cells = [f"{row.speed[x]:,.0f}" if x in row.speed else "-" for x in lengths]
        lines.append("| " + " | ".join([row.engine, f"{row.megabytes:.1f}", *agrees, *cells]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the table, and writes it with the machine to `output/engines.md` and `engines.json`."""
    parser = argparse.ArgumentParser(prog="hub_repo.engines", description="Every engine beside torch.")
    parser.add_argument("--model", required=True, help="checkpoint, or a folder of ours")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 2048], metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--node", type=Path, metavar="FOLDER", help="with node-llama-cpp and @huggingface/transformers"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.lengths) < 1 or arguments.rounds < 1 or arguments.threads < 1:
        parser.error("lengths, rounds and threads are at least 1")
    quiet_transformers()
    try:
        rows, remarks = measure(
            arguments.model, arguments.output, lengths=arguments.lengths, rounds=arguments.rounds,
            threads=arguments.threads, node=arguments.node,
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "hub_repo.engines", *(sys.argv[1:] if argv is None else argv)])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} used; torch {torch.__version__}"
    text = "\n".join([table(rows, arguments.lengths), "", *remarks, f"`{command}` ({machine})", ""])
    (arguments.output / "engines.md").write_text(text, encoding="utf-8")
    report = {"command": command, "machine": machine, "remarks": remarks, "rows": [asdict(row) for row in rows]}
    (arguments.output / "engines.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
