"""Engines that come from npm: llama.cpp (node-llama-cpp, prebuilt) and transformers.js.

    npm install --ignore-scripts node-llama-cpp @huggingface/transformers   # in a folder of its own

Law: they get the token ids that torch gets, so that a difference is the engine's; llama.cpp's own tokenizer is
compared by itself. A process for each call: nothing of node stays behind.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TIME_LIMIT = 1800  # seconds

_LLAMA = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
import {readFileSync} from "node:fs";
const {file, sequences, texts, rounds, threads} = JSON.parse(readFileSync(0, "utf-8"));
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
const tokens = texts.map((text) => Array.from(model.tokenize(text)));
process.stdout.write("RESULT" + JSON.stringify({vectors, seconds, tokens}) + "\\n", () => process.exit(0));
"""

_TRANSFORMERS_JS = """
import {env, AutoModel, Tensor} from "@huggingface/transformers";
import {readFileSync} from "node:fs";
import {dirname, basename} from "node:path";
const {file, sequences, dtype, rounds, threads} = JSON.parse(readFileSync(0, "utf-8"));
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


def _run(node_folder: Path, program: str, request: dict, sequences, *, rounds: int, threads: int) -> NodeResult:
    ids = [[int(x) for x in sequence] for sequence in sequences]
    try:
        # A file beside node_modules, for imports are resolved from there; llama.cpp's loader starts node again and
        # would hand a program given with -e to that process, too.
        with tempfile.NamedTemporaryFile("w", dir=node_folder, suffix=".mjs") as file:
            file.write(program)
            file.flush()
            process = subprocess.run(
                ["node", file.name],
                input=json.dumps({**request, "sequences": ids, "rounds": rounds, "threads": threads}),
                capture_output=True,
                text=True,
                cwd=node_folder,
                timeout=_TIME_LIMIT,
            )
    except FileNotFoundError:
        raise RuntimeError(f"node is not installed, or {node_folder} is not a folder.") from None
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT")]
    if process.returncode or not lines:
        raise RuntimeError(f"the node engine failed in {node_folder}:\n{process.stderr[-2000:]}")
    answer = json.loads(lines[-1].removeprefix("RESULT"))
    vectors = np.array(answer["vectors"], dtype=np.float32).reshape(len(ids), -1 if ids else 0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return NodeResult(vectors, answer["seconds"], answer["tokens"])
