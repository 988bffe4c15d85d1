"""A corpus written for the tests of its preparation, and the recipe.

Documents of random English words, copies of them, other languages, junk, empty rows.
"""

import json
import random
from pathlib import Path

import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from datasets import Dataset
from datatrove.data import Document

from training.corpus_recipe import CorpusRecipe, Executor, Language, Minhash, Quality
from training.recipe import Source

RECIPES = REPOSITORY / "training" / "recipes"
WORDS = (
    "the of and to that with have be river mountain house garden people water light paper morning evening winter "
    "summer teacher student question answer village market bridge window table kitchen forest island engine machine "
    "letter story history music colour number science measure travel carry build open close follow remember believe "
    "small large early quiet heavy simple bright narrow ancient modern careful between under across before after "
    "during without however because although several another every"
).split()
GERMAN = (
    "Der Fluss trat nach dem langen Regen über die Ufer, und die Bewohner des Dorfes mussten ihre Häuser verlassen. "
    "Am nächsten Morgen kamen die Helfer mit Booten und brachten Brot, Decken und sauberes Wasser. Niemand wurde "
    "verletzt, aber viele Felder waren zerstört, und die Ernte des Jahres war verloren. "
)
FRENCH = (
    "La rivière est sortie de son lit après de longues pluies, et les habitants du village ont dû quitter leurs "
    "maisons. Le lendemain matin, les secours sont arrivés avec des bateaux et ont apporté du pain et de l'eau. "
)


def english(seed: int, words: int = 120) -> str:
    """Random sentences that share no five words in a row with those of another seed."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=12)).capitalize() + "." for _ in range(words // 12)]
    return "\n".join(sentences)


GOOD = {"letters": [english(seed) for seed in range(14)], "notes": [english(seed) for seed in range(100, 110)]}
NEAR = GOOD["letters"][3].replace("\n", " ").replace(".", ",", 1)  # MinHash sees neither line ends nor punctuation
WIDE = GOOD["notes"][2].replace(" ", "  ")
COPIES = {"letters": [GOOD["letters"][0]] * 2, "notes": [GOOD["letters"][1], NEAR, WIDE]}
FOREIGN = {"letters": [GERMAN * 3], "notes": [GERMAN * 2, FRENCH * 3]}
REPEATED = {"letters": ["\n".join([english(500)] * 4)], "notes": []}
JUNK = {"letters": [english(502, words=36)], "notes": [" # ".join(english(501).split())]}
EMPTY = {"letters": ["", None, " \n\t"], "notes": [None]}
GROUPS = (GOOD, COPIES, FOREIGN, REPEATED, JUNK, EMPTY)


@pytest.fixture(name="data", scope="module")
def written_corpus(tmp_path_factory) -> Path:
    """letters.jsonl.zst, one file; notes/0.parquet and notes/1.parquet."""
    root = tmp_path_factory.mktemp("data")
    rows = {name: [text for group in GROUPS for text in group[name]] for name in ("letters", "notes")}
    for texts in rows.values():
        random.Random(1).shuffle(texts)
    lines = "".join(json.dumps({"body": text, "source": "x"}) + "\n" for text in rows["letters"])
    (root / "letters.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "notes").mkdir()
    for part in range(2):
        Dataset.from_dict({"text": rows["notes"][part::2]}).to_parquet(str(root / "notes" / f"{part}.parquet"))
    return root


def recipe(data: Path, output: Path, **changes) -> CorpusRecipe:
    return CorpusRecipe(
        **{
            "output_dir": str(output),
            "tokenizer": str(SHIPPED),
            "data_dir": str(data),
            "sources": [
                Source(name="letters", path="letters.jsonl.zst", text="body"),
                Source(name="notes", path="notes/*.parquet"),
            ],
            "language": Language(),
            "quality": [Quality("gopher_repetition"), Quality("gopher_quality")],
            "minhash": Minhash(),
            "heldout_share": 0.3,
            "executor": Executor(tasks=3),
            **changes,
        }
    )


def document(text: str, source: str = "mine") -> Document:
    return Document(text=text, id="0", metadata={"source": source})
