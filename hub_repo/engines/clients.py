"""Libraries that embed texts with a folder of ours: fastembed, LangChain and LlamaIndex, each in its own environment.

Law: they get texts, as their users give them, so that a difference may be the tokenizer's, the truncation's, a
prompt's or the engine's; their vectors are compared with those of torch for the token ids of our tokenizer.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import numpy as np

from ..folders.checkpoint_files import WEIGHTS
from ..formats.onnx_export import FILES, TOLERANCES
from ..formats.parity import Tolerance
from . import client_program
from .environments import FASTEMBED, LANGCHAIN, LLAMA_INDEX, Environment, prepared, python_of
from .measure import NO_ENVIRONMENT, Settings, Subject, pace, timed_texts
from .rows import Check, Missing, Row, check_texts, first_of_each, reach, tokenized, whole_words

_TIME_LIMIT = 1800  # seconds; of all that one client computes


@dataclass(frozen=True)
class Client:
    """A library and the file it is given.

    Attributes:
        name: As the table has it.
        program: Its name in client_program.py.
        environment: Where it is installed.
        package: Whose version is reported.
        file: Of the folder; what it reads.
        tolerance: How far its vectors may be off.
    """

    name: str
    program: str
    environment: Environment
    package: str
    file: str
    tolerance: Tolerance


CLIENTS = (
    *(
        Client(f"fastembed, {x}", "fastembed", FASTEMBED, "fastembed", FILES[x], TOLERANCES[x])
        for x in ("fp32", "int8")
    ),
    Client("LangChain, float32", "langchain", LANGCHAIN, "langchain-huggingface", WEIGHTS, TOLERANCES["fp32"]),
    Client(
        "LlamaIndex, float32",
        "llama-index",
        LLAMA_INDEX,
        "llama-index-embeddings-huggingface",
        WEIGHTS,
        TOLERANCES["fp32"],
    ),
)


@dataclass(frozen=True)
class ClientResult:
    """What a client returned.

    Attributes:
        vectors: One entry a batch: `(texts, hidden) float32`, or the error as text.
        queries: Of the texts of the first batch, embedded as queries; `(texts, hidden) float32`.
        seconds: One list a timed batch, one entry a round.
    """

    vectors: list[np.ndarray | str]
    queries: np.ndarray
    seconds: list[list[float]]


def run_client(
    client: Client,
    environment: Path,
    folder: Path,
    batches: Sequence[Sequence[str]],
    *,
    hidden_size: int,
    timed: Sequence[Sequence[str]] = (),
    rounds: int = 0,
    threads: int = 1,
) -> ClientResult:
    """Embeds texts with a client, in one process that loads the model once.

    Args:
        client: Which.
        environment: Folder of its environment.
        folder: A model folder of ours; its code is executed by the clients that use torch.
        batches: Texts; those of the first batch are embedded as queries, too.
        hidden_size: Of the model.
        timed: Texts of each timed call, which follow one call that warms up.
        rounds: Timed calls of each.
        threads: Of the client.

    Raises:
        RuntimeError: It does not load, or fails for a timed batch or a query.
    """
    request = {
        "client": client.program,
        "folder": str(folder.resolve()),
        "options": {"file": client.file, "hidden_size": hidden_size},
        "batches": [list(texts) for texts in batches],
        "timed": [list(texts) for texts in timed],
        "rounds": rounds,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "request.json", Path(scratch) / "result.npz"
        source.write_text(json.dumps(request), encoding="utf-8")
        _call(client, [str(python_of(environment)), "-I", client_program.__file__, str(source), str(target)], scratch)
        with np.load(target) as found:
            report = json.loads(str(found["report"]))
            vectors = [found[f"batch-{i}"] if not error else error for i, error in enumerate(report["errors"])]
            return ClientResult(vectors, found["queries"] if batches else np.empty((0, 0)), report["seconds"])


def _call(client: Client, command: list[str], scratch: str):
    # Caches in the scratch folder: what the user has cached must not decide whether a client works, and nothing stays.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        process = subprocess.run(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIME_LIMIT,
        )  # fmt: skip
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not there: remove its folder, and it is installed anew.") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{client.name} did not finish in {_TIME_LIMIT} seconds.") from None
    if process.returncode:
        raise RuntimeError(f"{client.name} failed: {process.stderr.strip()[-2000:]}")


def package_version(environment: Path, package: str) -> str:
    """Of a package that is installed in a virtual environment."""
    folders = [str(path) for path in environment.glob("**/site-packages")]
    return next(iter(distributions(name=package, path=folders))).version


def client_rows(subject: Subject, settings: Settings, known: Container[str] = ()) -> Iterator[Row | Missing]:
    """The row of each client, or why there is none.

    Args:
        subject: The exported model.
        settings: Lengths, rounds, threads, environments.
        known: Names of clients that are left out.
    """
    words = whole_words(subject.model)
    texts = check_texts(words)
    check = Check.of(subject.model, subject.twin, [tokenized(subject.model, x) for x in (*texts, texts[0])])
    for client in CLIENTS:
        if client.name in known:
            continue
        try:
            if settings.environments is None:
                raise RuntimeError(NO_ENVIRONMENT)
            yield _client_row(client, texts, check, subject, settings)
        except (RuntimeError, OSError) as error:
            yield Missing(client.name, str(error))


def _client_row(client: Client, texts: list[list[str]], check: Check, subject: Subject, settings: Settings) -> Row:
    words = whole_words(subject.model)
    timed = [timed_texts(length, words) for length in settings.lengths]
    environment = prepared(client.environment, settings.environments)
    rungs = [[text] for text in subject.texts] if client.name in first_of_each([x.name for x in CLIENTS]) else []
    result = run_client(
        client, environment, subject.folder, [*texts, *rungs],
        hidden_size=subject.model.config.hidden_size, timed=timed, rounds=settings.rounds, threads=settings.threads,
    )  # fmt: skip
    found = [*result.vectors[: len(texts)], result.queries]  # as documents, and the first batch as queries
    if errors := [x for x in found if isinstance(x, str)]:
        raise RuntimeError(errors[0])
    package = package_version(environment, client.package)
    size = (subject.folder / client.file).stat().st_size
    row = check.row(client.name, package, size, found, client.tolerance)
    if rungs:
        row.reach = reach(result.vectors[len(texts) :], subject.whole, client.tolerance)
    for length, batch, seconds in zip(settings.lengths, timed, result.seconds, strict=True):
        pace(row, length, seconds, len(batch) * length, subject, settings.rounds)
    return row
