"""Rows and folders of a small GLUE, for the tests of its evaluation: whether a text is good is in its words."""

import json
from pathlib import Path

import zstandard

GOOD, BAD = "a good and pleasant film", "a dull and awful film"


def sentence(label: int, number: int) -> dict:
    return {"sentence": f"{GOOD if label else BAD} {number}", "label": label, "idx": number}


def pair(label: object, number: int, **names: str) -> dict:
    first, second = names.get("first", "sentence1"), names.get("second", "sentence2")
    return {
        first: f"It rains in town {number}.",
        second: f"Town {number} is {'wet' if label else 'dry'}.",
        "label": label,
    }


def write(path: Path, rows: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)


def write_tasks(root: Path):
    """CoLA with the Hub's columns, RTE with generic ones and no test split, STS-B, MNLI, AX; QNLI cannot be used."""
    nli = {"first": "premise", "second": "hypothesis"}
    for split, size in (("train", 8), ("dev", 6), ("test", 3)):
        write(root / f"CoLA/{split}.jsonl.zst", [sentence(i % 2 if split != "test" else -1, i) for i in range(size)])
        rows = [{"sentence1": GOOD, "sentence2": f"{GOOD} {i}", "score": 5.0 * i / size} for i in range(size)]
        write(root / f"STS-B/{split}.jsonl.zst", rows)
        if split != "test":
            write(root / f"RTE/{split}.jsonl", [pair(i % 2, i) for i in range(size)])
    write(root / "MNLI/train.jsonl.zst", [pair(i % 3, i, **nli) for i in range(9)])
    for name in ("matched", "mismatched"):
        write(root / f"MNLI/dev_{name}.jsonl.zst", [pair(i % 3, i, **nli) for i in range(6)])
        write(root / f"MNLI/test_{name}.jsonl.zst", [pair(-1, i, **nli) for i in range(4)])
    write(root / "AX/test.jsonl.zst", [pair(-1, i, **nli) for i in range(5)])
    write(root / "QNLI/dev.jsonl.zst", [pair(0, 0)])
    (root / "AdvGLUE").mkdir()
