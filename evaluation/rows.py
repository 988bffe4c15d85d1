"""Rows of JSON lines files, plain or compressed (.zst, .gz).

Laws: every row of a file comes out, or an `EvaluationError` names file and line; a file that was cut off is never
taken for a shorter one. Blank lines are no rows. COST: one compressed block and one line in memory.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hub_repo.embedding.zstd_reader import ZstdReader

from .set_types import EvaluationError

SUFFIXES = (".zst", ".gz", "")  # of a file as it may be compressed
_BLOCK = 2**16  # bytes
_SURROGATE = "\\ud"  # how JSON may write half of a pair, which is no character


def stored(path: Path) -> Path | None:
    """The file of that name, compressed or not; None if there is none.

    Raises:
        EvaluationError: There are several, which may differ.
    """
    found = [file for suffix in SUFFIXES if (file := path.with_name(path.name + suffix)).is_file()]
    if len(found) > 1:
        raise EvaluationError(f"{found[0]}: {found[1].name} lies beside it; keep one of them.")
    return found[0] if found else None


def read_rows(path: Path, fields: dict[str, tuple[type, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", row) of each line of a file, the named fields present and of their type.

    Args:
        path: The file, plain, .zst or .gz.
        fields: Name -> types.

    Raises:
        EvaluationError: The file cannot be read, was cut off or holds no row; a row is malformed, or holds half of a
            surrogate pair, which no tokenizer takes.
    """
    place = None
    for place, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{place}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{place}: not a JSON object.")
        for field, kinds in fields.items():
            value = row.get(field)
            is_stray_bool = isinstance(value, bool) and bool not in kinds  # Python takes a bool for an int
            if not isinstance(value, kinds) or is_stray_bool:
                raise EvaluationError(f"{place}: no field {field!r}, or it has the wrong type.")
        if _SURROGATE in line.lower():
            _refuse_surrogates(place, row)
        yield place, row
    if place is None:
        raise EvaluationError(f"{path}: is empty.")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("path:line", text) of each line that is not blank, without its end. Only a line feed ends a line.

    Raises:
        EvaluationError: The file cannot be read or was cut off.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_split(_blocks(file, path.suffix)), start=1):
                text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode().removesuffix("\r")
                if text.strip():
                    yield f"{path}:{number}", text
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}:{number}: not UTF-8 ({error}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error


def _blocks(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """The content, decompressed."""
    content: Any = ZstdReader(file) if suffix == ".zst" else gzip.open(file) if suffix == ".gz" else file
    while block := content.read(_BLOCK):
        yield block


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines; the last need not have an end."""
    begun: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield b"".join(begun)


def _refuse_surrogates(place: str, row: dict[str, Any]):
    for field, value in row.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise EvaluationError(f"{place}: {field!r} holds {half}, half of a surrogate pair.") from error
