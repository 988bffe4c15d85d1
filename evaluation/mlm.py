"""Masked-language-model accuracy by length (the paper's figure 2): flat beyond the trained length with ALiBi.

    python -m evaluation.mlm --model JinaBERT=runs/tiny512-mlm/final --model BERT=runs/tiny512-bert-mlm/final \\
      --data DATA/pretrain/heldout_long_books.jsonl.zst --output results.json --plot figure.png --markdown table.md

A JinaBERT takes any length as it is. A BERT takes lengths within its table of positions as it is; beyond, it is two
systems: the table interpolated to the length, and the table repeated. Two references say what flat accuracy is worth:
the best answer that ignores the context, and every model at the trained length on words in random order.

Laws: everything wrong with names and files is reported before the first text is scored; every length and system
predicts the same masked tokens (see `mlm_texts`); a record already in the output, of the same weights, data and
settings, is not computed again. COST: documents x lengths x tokens of the longest length; memory is linear in it.
"""

import argparse
import hashlib
import importlib.metadata
import logging
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from modeling_jina_bert.masking import CORRUPTION, WordPieces

from .length_plot import (
    SHUFFLED,
    TRAINED_LENGTH,
    caption,
    markdown,
    matplotlib_figure,
    points,
    table_rows,
    write_plot,
)
from .loading import weights_sha256
from .mlm_models import MaskedLM, Score, load_masked_lm, score_text
from .mlm_texts import SPECIAL_TOKENS, MaskedText, context_free_scores, fingerprint, masked_texts, shuffled
from .records import read_records, write_records
from .sets import EvaluationError

try:
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("evaluation.mlm needs: pip install -e '.[evaluate]'") from error

logger = logging.getLogger(__name__)

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DOCUMENTS = 5
CONTEXT_FREE = "without context"
"""The name of the best answer that ignores the context."""
_FIELDS = {"model", "positions", "position_table", "length", "settings", "metrics", "documents"}
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and device, for the records."""
    return {
        "versions": {"python": platform.python_version()} | {x: importlib.metadata.version(x) for x in _PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }


def score_documents(masked_lm: MaskedLM, texts: Sequence[MaskedText], length: int, positions: str) -> dict[str, Any]:
    """Accuracy and mean loss over all targets, and the counts of each document."""
    bar = tqdm(texts, desc=f"{masked_lm.name} {positions} {length}", unit="document", leave=False, disable=None)
    if positions == SHUFFLED:
        positions = masked_lm.positions_for(length)[0]
        bar = (shuffled(text, length - SPECIAL_TOKENS) for text in bar)
    scores = [score_text(masked_lm, text, length=length, positions=positions) for text in bar]
    return _summary(texts, scores)


def _summary(texts: Sequence[MaskedText], scores: Sequence[Score]) -> dict[str, Any]:
    targets = sum(score.targets for score in scores)
    return {
        "metrics": {
            "accuracy": sum(score.correct for score in scores) / targets,
            "loss": sum(score.loss for score in scores) / targets,
            "targets": targets,
        },
        "documents": [{"place": text.place, **asdict(score)} for text, score in zip(texts, scores, strict=True)],
    }


def evaluate(
    masked_lm: MaskedLM,
    texts: Sequence[MaskedText],
    lengths: Sequence[int],
    output: Path,
    *,
    trained_length: int,
    settings: dict[str, Any],
    provenance: dict[str, Any],
) -> list[dict[str, Any]]:
    """Scores one model at every length, at one on words in random order as well, and writes `output` after each.

    Args:
        masked_lm: The model.
        texts: What it predicts; each at least as long as the longest length without [CLS] and [SEP].
        lengths: Tokens of the windows, ascending.
        output: JSON file; other records in it are kept.
        trained_length: That one; a length.
        settings: What decides the figures; equal settings, equal figures.
        provenance: Command and environment, for new records.

    Returns:
        The records of the model by length, those already in `output` under its present name.

    Raises:
        EvaluationError: A loss is not finite; `output` holds something else.
    """
    table = masked_lm.position_table
    results = []
    for length in lengths:
        shuffles = (SHUFFLED,) if length == trained_length else ()
        for positions in (*masked_lm.positions_for(length), *shuffles):
            records = read_records(output, _FIELDS)
            key = {"positions": positions, "length": length, "settings": settings}
            known = next((record for record in records if key.items() <= record.items()), None)
            if known is not None:
                logger.info("%s %s %d: already scored", masked_lm.name, positions, length)
                results.append({**known, "model": masked_lm.name})
                continue
            started = time.monotonic()
            record = {
                "model": masked_lm.name,
                "source": masked_lm.source,
                **key,
                "position_table": None if table is None else len(table),
                **score_documents(masked_lm, texts, length, positions),
                **provenance,
            }
            write_records(output, [*records, record])
            results.append(record)
            metrics, seconds = record["metrics"], time.monotonic() - started
            logger.info(
                "%s %s %d: accuracy %.4f, loss %.3f (%.0f s)",
                masked_lm.name, positions, length, metrics["accuracy"], metrics["loss"], seconds,
            )  # fmt: skip
    return results


def context_free_record(
    texts: Sequence[MaskedText],
    pieces: WordPieces,
    length: int,
    *,
    settings: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The record of `context_free_scores`, at the trained length."""
    return {
        "model": CONTEXT_FREE,
        "source": None,
        "positions": None,
        "length": length,
        "settings": {name: value for name, value in settings.items() if name not in ("weights_sha256", "dtype")}
        | {"answer": "Bayes"},  # earlier versions took every token that is shown for the original
        "position_table": None,
        **_summary(texts, [Score(*score) for score in context_free_scores(texts, pieces)]),
        **provenance,
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with status 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog="evaluation.mlm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]FOLDER", help="or a Hub repository; repeatable"
    )
    parser.add_argument("--data", nargs="+", required=True, type=Path, help='.jsonl.zst with a field "text"')
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens, [CLS] and [SEP] included"
    )
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="the first that are long enough (%(default)s)"
    )
    parser.add_argument("--mlm-probability", type=float, default=0.3, help="share of the words (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the masks (%(default)s)")
    parser.add_argument(
        "--trained-length", type=int, default=TRAINED_LENGTH, help="tokens; the reference length (%(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ... (default: a GPU if there is one)",
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file; a run goes on from what it holds")
    parser.add_argument("--markdown", type=Path, help="file for the table in Markdown")
    parser.add_argument("--plot", type=Path, help="file for the figure (.png, .svg or .pdf)")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace):
    """Raises EvaluationError for a value that cannot be, ImportError for a plot without matplotlib."""
    if min(arguments.lengths) <= SPECIAL_TOKENS:
        raise EvaluationError(
            f"--lengths {min(arguments.lengths)}: the least is 3 tokens ([CLS], one of the text, [SEP])."
        )
    if arguments.trained_length not in arguments.lengths:
        raise EvaluationError(f"--trained-length {arguments.trained_length}: is not among --lengths, add it there.")
    if arguments.documents < 1:
        raise EvaluationError(f"--documents {arguments.documents}: at least one.")
    if not 0 < arguments.mlm_probability <= 1:
        raise EvaluationError(f"--mlm-probability {arguments.mlm_probability}: above 0, at most 1.")
    if not 0 <= arguments.seed < 2**32:
        raise EvaluationError(f"--seed {arguments.seed}: from 0 to {2**32 - 1}.")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"--device {arguments.device}: torch sees no CUDA device.")
    for path in arguments.data:
        if not path.is_file():
            raise EvaluationError(f"--data {path}: no such file.")
    for path in filter(None, (arguments.output, arguments.markdown, arguments.plot)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise EvaluationError(f"{path}: is a folder, or lies in none.")
    if arguments.plot and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        raise EvaluationError(f"--plot {arguments.plot}: is none of .png, .svg, .pdf.")
    if arguments.plot:
        matplotlib_figure()
    read_records(arguments.output, _FIELDS)


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Name -> folder or repository, from "NAME=FOLDER" or "FOLDER".

    Raises:
        EvaluationError: Two models of one name.
    """
    models: dict[str, str] = {}
    for item in given:
        name, equals, source = item.partition("=")
        if not (name and equals) or Path(item).exists():
            name = source = item
        if models.setdefault(name, source) != source:
            raise EvaluationError(f"--model {item}: the name {name} is taken by {models[name]}.")
    return models


def settings_of(masked_lm: MaskedLM, texts: Sequence[MaskedText], arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the figures of a model, beside the length and the positions."""
    return {
        "weights_sha256": weights_sha256(masked_lm.model),
        "dtype": str(masked_lm.model.dtype).removeprefix("torch."),
        "data_sha256": [file_sha256(path) for path in arguments.data],
        "mlm_probability": arguments.mlm_probability,
        "seed": arguments.seed,
        "corruption": CORRUPTION,
        "tokens": len(texts[0].original),
        "masks_sha256": fingerprint(texts),
    }


def run(arguments: argparse.Namespace, *, command: str) -> list[dict[str, Any]]:
    """Loads what the command line names and scores it.

    Raises:
        EvaluationError: Something it names is missing or malformed.
    """
    check_arguments(arguments)
    lengths = sorted(set(arguments.lengths))
    named = named_models(arguments.model)
    models = [load_masked_lm(name, source, device=arguments.device) for name, source in named.items()]
    for masked_lm in models:
        table = masked_lm.position_table
        if table is not None and len(table) < arguments.trained_length:
            raise EvaluationError(
                f"--trained-length {arguments.trained_length}: {masked_lm.name} has {len(table)} positions."
            )
    texts = [
        masked_texts(
            arguments.data,
            masked_lm.tokenizer,
            vocabulary=masked_lm.vocabulary,
            tokens=lengths[-1] - SPECIAL_TOKENS,
            documents=arguments.documents,
            probability=arguments.mlm_probability,
            seed=arguments.seed,
        )
        for masked_lm in models
    ]
    provenance = {"command": command, "environment": environment(arguments.device)}
    results, context_free = [], {}
    for masked_lm, its_texts in zip(models, texts, strict=True):
        options = {"settings": settings_of(masked_lm, its_texts, arguments), "provenance": provenance}
        trained = arguments.trained_length
        results += evaluate(masked_lm, its_texts, lengths, arguments.output, trained_length=trained, **options)
        pieces = masked_lm.vocabulary.pieces
        context_free[fingerprint(its_texts)] = context_free_record(its_texts, pieces, trained, **options)
    return [*results, *_written(list(context_free.values()), arguments.output)]


def _written(found: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """The records, those in the file in place of equal ones."""
    records = read_records(output, _FIELDS)
    for number, record in enumerate(found):
        key = {name: record[name] for name in ("model", "length", "settings")}
        known = next((other for other in records if key.items() <= other.items()), None)
        if known is None:
            records.append(record)
        else:
            found[number] = known
    write_records(output, records)
    return found


def main(argv: Sequence[str] | None = None):
    """Entry point; a wrong input ends it with one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    arguments = parse_arguments(argv)
    command = shlex.join(["python", "-m", "evaluation.mlm", *argv])
    try:
        records = run(arguments, command=command)
        if arguments.plot:
            write_plot(arguments.plot, records, arguments.trained_length)
    except (EvaluationError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.markdown:
        text = markdown(records, arguments.trained_length, command=command)
        arguments.markdown.write_text(text, encoding="utf-8")
    header, rows = table_rows(points(records, arguments.trained_length), arguments.trained_length)
    table = Table(title=caption(records), title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left", no_wrap=position == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"wrote {', '.join(str(x) for x in (arguments.output, arguments.markdown, arguments.plot) if x)}")


if __name__ == "__main__":
    main()
