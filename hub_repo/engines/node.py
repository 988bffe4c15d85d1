"""Engines that come from npm: llama.cpp (node-llama-cpp, prebuilt) and transformers.js.

They are installed by environments.py, or with `npm install --ignore-scripts node-llama-cpp
@huggingface/transformers` in a folder of its own.

Law: they get the token ids that torch gets, so that a difference is the engine's; llama.cpp's own tokenizer is
compared by itself, and one row is transformers.js as its users call it: texts into a pipeline. A process for each
call: nothing of node stays behind.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..formats.gguf_export import gguf_name
from ..formats.onnx_export import FILES, TOLERANCES
from ..formats.parity import LENGTHS, Batch, Tolerance, check_batches
from .environments import NODE, prepared
from .measure import NO_ENVIRONMENT, Settings, Subject, or_error, pace, timed_batch, timed_texts
from .rows import TEXTS, Check, Missing, Row, check_texts, first_of_each, reach, tokenized, whole_words

_TIME_LIMIT = 1800  # seconds
_LLAMA_PACKAGE, _JS_PACKAGE = "node-llama-cpp", "@huggingface/transformers"
_LLAMA_TOLERANCES = {"f16": Tolerance(5e-3, 0.9998), "q8_0": Tolerance(3e-2, 0.999)}
"""GGUF type -> how far llama.cpp may be off: its GELU comes from a float16 table, and it rounds products.

Measured: 8e-5 and a cosine of 0.9999999 on the shipped model; 4.4e-3 and 0.99988 on the random golden model of the
second layout at 8,192 tokens, from a file in float32 as from one in float16.
"""
GGUF_KINDS = tuple(_LLAMA_TOLERANCES)
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # precision -> what transformers.js calls it

_LLAMA = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
import {text} from "node:stream/consumers";
const {file, sequences, texts, rounds, threads} = JSON.parse(await text(process.stdin));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false});
const model = await llama.loadModel({modelPath: file});
const size = Math.max(...sequences.map((x) => x.length), 8) + 8;
const context = await model.createEmbeddingContext({contextSize: size, batchSize: size, threads});
const vectors = [], seconds = [];
for (const ids of sequences) vectors.push((await context.getEmbeddingFor([...ids])).vector);
for (let round = 0; round < rounds; round++) {
  const start = performance.now();
  for (const ids of sequences) await context.getEmbeddingFor([...ids]);
  seconds.push((performance.now() - start) / 1000);
}
const tokens = texts.map((x) => Array.from(model.tokenize(x)));
process.stdout.write("RESULT" + JSON.stringify({vectors, seconds, tokens}) + "\\n", () => process.exit(0));
"""

_TRANSFORMERS_JS = """
import {env, AutoModel, Tensor} from "@huggingface/transformers";
import {text} from "node:stream/consumers";
import {dirname, basename} from "node:path";
const {file, sequences, dtype, rounds, threads} = JSON.parse(await text(process.stdin));
env.allowRemoteModels = false;
env.localModelPath = dirname(file);
const model = await AutoModel.from_pretrained(basename(file), {
  dtype, device: "cpu", session_options: {intraOpNumThreads: threads, logSeverityLevel: 3},
});
async function embed(ids) {
  const make = (x) => new Tensor("int64", BigInt64Array.from(x.map(BigInt)), [1, x.length]);
  const [ones, zeros] = [make(ids.map(() => 1)), make(ids.map(() => 0))];
  const output = await model({input_ids: make(ids), attention_mask: ones, token_type_ids: zeros});
  return Array.from(output.last_hidden_state.mean(1).data);
}
const vectors = [], seconds = [];
for (const ids of sequences) vectors.push(await embed(ids));
for (let round = 0; round < rounds; round++) {
  const start = performance.now();
  for (const ids of sequences) await embed(ids);
  seconds.push((performance.now() - start) / 1000);
}
process.stdout.write("RESULT" + JSON.stringify({vectors, seconds, tokens: []}) + "\\n", () => process.exit(0));
"""

_PIPELINE = """
import {env, pipeline} from "@huggingface/transformers";
import {text} from "node:stream/consumers";
import {dirname, basename} from "node:path";
const {file, batches, timed, dtype, rounds, threads} = JSON.parse(await text(process.stdin));
env.allowRemoteModels = false;
env.localModelPath = dirname(file);
const extract = await pipeline("feature-extraction", basename(file), {
  dtype, device: "cpu", session_options: {intraOpNumThreads: threads, logSeverityLevel: 3},
});
const embed = (texts) => extract(texts, {pooling: "mean", normalize: true});
const vectors = [], seconds = [];
for (const texts of batches) vectors.push((await embed(texts)).tolist());
for (const texts of timed) {
  const of_batch = [];
  for (let round = 0; round <= rounds; round++) {
    const start = performance.now();
    await embed(texts);
    if (round) of_batch.push((performance.now() - start) / 1000);
  }
  seconds.push(of_batch);
}
process.stdout.write("RESULT" + JSON.stringify({vectors, seconds}) + "\\n", () => process.exit(0));
"""
_PIPELINE_NAME = "transformers.js pipeline, fp32"


@dataclass(frozen=True)
class NodeResult:
    """What a node engine returned.

    Attributes:
        vectors: Embeddings of length 1, `(sequences, hidden) float32`.
        seconds: Of all sequences together, one entry a round.
        tokens: Token ids of the texts, by llama.cpp's tokenizer, without special tokens.
    """

    vectors: np.ndarray
    seconds: list[float]
    tokens: list[list[int]]


def run_llama_cpp(
    node_folder: Path, file: Path, sequences: Sequence[Sequence[int]], *, texts=(), rounds: int = 0, threads: int = 1
) -> NodeResult:
    """Embeds token ids with llama.cpp, one sequence after the other.

    Args:
        node_folder: Folder with `node_modules`.
        file: A GGUF file.
        sequences: Token ids, special tokens included.
        texts: Texts to tokenize.
        rounds: Timed repetitions.
        threads: Of llama.cpp.

    Raises:
        RuntimeError: node or the package is missing, or the engine failed.
    """
    request = {"file": str(file.resolve()), "texts": list(texts)}
    return _run(node_folder, _LLAMA, request, sequences, rounds=rounds, threads=threads)


def run_transformers_js(
    node_folder: Path,
    folder: Path,
    sequences: Sequence[Sequence[int]],
    *,
    dtype: str,
    rounds: int = 0,
    threads: int = 1,
) -> NodeResult:
    """Embeds token ids with transformers.js.

    Args:
        node_folder: Folder with `node_modules`.
        folder: A model folder with ONNX files.
        sequences: Token ids, special tokens included.
        dtype: Which file, in its words: "fp32", "fp16", "q8".
        rounds: Timed repetitions.
        threads: Of onnxruntime.

    Raises:
        RuntimeError: node or the package is missing, or the engine failed.
    """
    request = {"file": str(folder.resolve()), "dtype": dtype}
    return _run(node_folder, _TRANSFORMERS_JS, request, sequences, rounds=rounds, threads=threads)


@dataclass(frozen=True)
class NodeEngine:
    """An engine and the file it is given.

    Attributes:
        name: As the table has it.
        package: Of npm, whose version is reported.
        file: What it reads.
        tolerance: How far its vectors may be off.
        run: `(node_folder, sequences, *, rounds, threads)` -> `NodeResult`.
    """

    name: str
    package: str
    file: Path
    tolerance: Tolerance
    run: Callable[..., NodeResult]


def engines(folder: Path) -> list[NodeEngine]:
    """The engines of npm on the files of an export."""
    found = []
    for kind, tolerance in _LLAMA_TOLERANCES.items():
        file = folder / gguf_name(folder, kind)
        found.append(
            NodeEngine(f"llama.cpp, {kind}", _LLAMA_PACKAGE, file, tolerance, _with_file(run_llama_cpp, file))
        )
    for precision, dtype in _DTYPES.items():
        run = _with_file(run_transformers_js, folder, dtype=dtype)
        file, tolerance = folder / FILES[precision], TOLERANCES[precision]
        found.append(NodeEngine(f"transformers.js, {precision}", _JS_PACKAGE, file, tolerance, run))
    return found


def _with_file(run: Callable[..., NodeResult], file: Path, **options) -> Callable[..., NodeResult]:
    return lambda node, sequences, **more: run(node, file, sequences, **options, **more)


def package_version(node: Path, package: str) -> str:
    """Of a package in `node_modules`.

    Raises:
        RuntimeError: It is not there.
    """
    path = node / "node_modules" / package / "package.json"
    if not path.is_file():
        raise RuntimeError(f"{node} has no node_modules/{package}: npm install --ignore-scripts {package}")
    return json.loads(path.read_text(encoding="utf-8"))["version"]


def node_rows(subject: Subject, settings: Settings, known: Container[str] = ()) -> Iterator[Row | Missing]:
    """The row of each engine of npm, or why there is none.

    Args:
        subject: The exported model.
        settings: Lengths, rounds, threads, environments.
        known: Names of engines that are left out.
    """
    wanted = [engine for engine in engines(subject.folder) if engine.name not in known]
    piped = [_PIPELINE_NAME] if _PIPELINE_NAME not in known else []
    try:
        node = _node_folder(settings)
    except (RuntimeError, OSError) as error:
        yield from (Missing(name, str(error)) for name in (*(engine.name for engine in wanted), *piped))
        return
    # A sequence a call: neither engine is given padding.
    batches = [_between(x, subject.special) for x in check_batches(subject.model.config.vocab_size, LENGTHS)[1:]]
    check = Check.of(subject.model, subject.twin, batches)
    for engine in wanted:
        try:
            yield _row(engine, node, check, subject, settings)
        except RuntimeError as error:  # the other engines were measured, and that took minutes
            yield Missing(engine.name, str(error))
    for name in piped:
        try:
            yield _pipeline_row(name, node, subject, settings)
        except RuntimeError as error:
            yield Missing(name, str(error))


def _node_folder(settings: Settings) -> Path:
    """The folder with `node_modules`, installed if need be.

    Raises:
        RuntimeError: None is named, or it cannot be installed.
    """
    if settings.node is None and settings.environments is None:
        raise RuntimeError(NO_ENVIRONMENT)
    return settings.node or prepared(NODE, settings.environments)


def _row(engine: NodeEngine, node: Path, check: Check, subject: Subject, settings: Settings) -> Row:
    def embed(batch: Batch) -> np.ndarray:
        return engine.run(node, batch["input_ids"], threads=settings.threads).vectors

    version = package_version(node, engine.package)
    found = [embed(batch) for batch in check.batches]
    row = check.row(engine.name, version, engine.file.stat().st_size, found, engine.tolerance)
    if engine.name in first_of_each([x.name for x in engines(subject.folder)]):
        row.reach = reach([or_error(embed, batch) for batch in subject.rungs], subject.whole, engine.tolerance)
    for length in settings.lengths:
        batch = _between(timed_batch(length, subject.model.config.vocab_size), subject.special)
        result = engine.run(node, batch["input_ids"], rounds=settings.rounds, threads=settings.threads)
        pace(row, length, result.seconds, batch["input_ids"].size, subject, settings.rounds)
    return row


def _pipeline_row(name: str, node: Path, subject: Subject, settings: Settings) -> Row:
    """Texts through the tokenizer and the pipeline of transformers.js, with its own padding and truncation."""
    version, words = package_version(node, _JS_PACKAGE), whole_words(subject.model)
    texts, timed = check_texts(words), [timed_texts(length, words) for length in settings.lengths]
    check = Check.of(subject.model, subject.twin, [tokenized(subject.model, x) for x in texts])
    answer = _answer(
        node,
        _PIPELINE,
        file=str(subject.folder.resolve()),
        batches=[*texts, *([text] for text in subject.texts)],
        timed=timed,
        dtype=_DTYPES["fp32"],
        rounds=settings.rounds,
        threads=settings.threads,
    )
    vectors = [np.array(x, dtype=np.float32) for x in answer["vectors"]]
    file, tolerance = subject.folder / FILES["fp32"], TOLERANCES["fp32"]
    row = check.row(name, version, file.stat().st_size, vectors[: len(texts)], tolerance)
    row.reach = reach(vectors[len(texts) :], subject.whole, tolerance)
    for length, batch, seconds in zip(settings.lengths, timed, answer["seconds"], strict=True):
        pace(row, length, seconds, len(batch) * length, subject, settings.rounds)
    return row


def _between(batch: Batch, special: tuple[int, int]) -> Batch:
    """The batch with the first and the last token of every sequence special, as llama.cpp wants them."""
    ids = batch["input_ids"].copy()
    ids[:, 0], ids[:, -1] = special
    return {**batch, "input_ids": ids}


def tokenizer_remark(subject: Subject, settings: Settings) -> str:
    """Whether llama.cpp splits texts as our tokenizer does, as a sentence."""
    path = subject.folder / gguf_name(subject.folder, GGUF_KINDS[0])
    try:
        result = run_llama_cpp(_node_folder(settings), path, [], texts=TEXTS)
    except (RuntimeError, OSError) as error:
        return f"llama.cpp's tokenizer was not compared: {' '.join(str(error).split())}"
    ours = [subject.model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    other = [text for text, found, own in zip(TEXTS, result.tokens, ours, strict=True) if found != own]
    if other:
        return f"llama.cpp splits {len(other)} of {len(TEXTS)} texts otherwise: {other}."
    return f"llama.cpp splits {len(TEXTS)} texts of several scripts as our tokenizer does."


def _run(node_folder: Path, program: str, request: dict, sequences, *, rounds: int, threads: int) -> NodeResult:
    ids = [[int(x) for x in sequence] for sequence in sequences]
    answer = _answer(node_folder, program, **request, sequences=ids, rounds=rounds, threads=threads)
    vectors = np.array(answer["vectors"], dtype=np.float32).reshape(len(ids), -1 if ids else 0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return NodeResult(vectors, answer["seconds"], answer["tokens"])


def _answer(node_folder: Path, program: str, **request) -> dict:
    """What a program says to a request.

    Raises:
        RuntimeError: node or a package is missing, or the program failed.
    """
    try:
        # A file beside node_modules, for imports are resolved from there; llama.cpp's loader starts node again and
        # would hand a program given with -e to that process, too.
        with tempfile.NamedTemporaryFile("w", dir=node_folder, suffix=".mjs") as file:
            file.write(program)
            file.flush()
            process = subprocess.run(
                ["node", file.name],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                cwd=node_folder,
                timeout=_TIME_LIMIT,
            )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the node engine did not finish in {_TIME_LIMIT} seconds.") from None
    except FileNotFoundError:
        raise RuntimeError(f"node is not installed, or {node_folder} is not a folder.") from None
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT")]
    if process.returncode or not lines:
        raise RuntimeError(f"the node engine failed in {node_folder}:\n{process.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT"))
