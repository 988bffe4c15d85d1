"""Two sets of pairs written for the tests of their preparation, and the recipe.

Short facts, copies of them in other case and spacing, pairs that are one text, empty ones, other languages, positives
of other queries. The teacher is the shipped model.
"""

import json
import random
from pathlib import Path

import pytest
import zstandard
from conftest import REPOSITORY, SHIPPED
from datasets import Dataset
from datatrove.data import Document

from training.corpus_recipe import Executor
from training.pair_filters import pair_document
from training.pair_recipe import Consistency, PairLanguage, PairRecipe
from training.recipe import Source

RECIPES = REPOSITORY / "training" / "recipes"
AMONG = ["en", "de", "fr", "es"]  # all spoken languages take 13 s to load
FACTS = {
    "letters": [
        ("What is a volcano?", "A volcano is a mountain from which lava and ash erupt."),
        ("What does a bakery sell?", "A bakery sells bread, rolls and cakes that it bakes in the night."),
        ("How do whales breathe?", "Whales breathe air through a blowhole on the top of the head."),
        ("What is a violin?", "A violin is an instrument with four strings and is played with a bow."),
        ("When did the railway reach the town?", "The railway reached the town in 1862, with a station by the river."),
        ("What is photosynthesis?", "Photosynthesis is how plants make sugar from light, water and carbon dioxide."),
        ("How is cheese made?", "Cheese is made from milk that is curdled with rennet and left to ripen."),
        ("What is a telescope for?", "A telescope is for the observation of distant stars and planets."),
        ("Who repairs shoes?", "A cobbler is a person who repairs shoes and boots."),
    ],
    "notes": [
        ("What is a glacier?", "A glacier is a slow river of ice in the high mountains."),
        ("What is a compiler?", "A compiler is a program that translates source code to machine code."),
        ("How do bees make honey?", "Bees make honey from the nectar of flowers, and store it in the hive."),
        ("What is insulin?", "Insulin is a hormone of the pancreas that lowers the sugar in the blood."),
        ("What is an earthquake?", "An earthquake is a shaking of the ground, and is caused by faults."),
        ("What is a sonnet?", "A sonnet is a poem of fourteen lines with a fixed rhyme."),
        ("How does a magnet work?", "A magnet attracts iron by the field that its poles make."),
    ],
}
COPIES = {  # of pairs of either source; the first is a copy as it stands
    "letters": [FACTS["letters"][0], ("what is a  VIOLIN?", FACTS["letters"][3][1].upper())],
    "notes": [FACTS["letters"][1], (" What is\ta glacier?\n", FACTS["notes"][0][1].replace(" ", "\n", 2))],
}
IDENTICAL = {
    "letters": [("The same text.", "the  SAME text. ")],
    "notes": [("One", "One"), ("Two words", "two words")],
}
EMPTY = {"letters": [("", "No query."), (None, "Null.")], "notes": [("No positive?", " \n"), (None, None)]}
FOREIGN = {
    "letters": [("Was ist ein Gletscher?", "Ein Gletscher ist ein langsamer Strom aus Eis im hohen Gebirge.")],
    "notes": [("Qu'est-ce qu'un sonnet ?", "Un sonnet est un poème de quatorze vers avec des rimes fixes.")],
}
_TEXTS = [pair for pairs in FACTS.values() for pair in pairs]
SWAPPED = {  # a query and the answer to another one
    "letters": [(_TEXTS[0][0], _TEXTS[11][1]), (_TEXTS[6][0], _TEXTS[10][1])],
    "notes": [(_TEXTS[12][0], _TEXTS[4][1]), (_TEXTS[9][0], _TEXTS[8][1]), (_TEXTS[11][0], _TEXTS[7][1])],
}
GROUPS = (FACTS, COPIES, IDENTICAL, EMPTY, FOREIGN, SWAPPED)
ROWS = {name: [pair for group in GROUPS for pair in group[name]] for name in ("letters", "notes")}


def write(root: Path, rows: dict[str, list], *, parts: int = 2, seed: int = 1) -> Path:
    """letters.jsonl.zst, columns question and answer; notes/*.parquet, columns query and positive."""
    root.mkdir(exist_ok=True)
    rows = {name: random.Random(seed).sample(pairs, len(pairs)) for name, pairs in rows.items()}
    lines = "".join(json.dumps({"answer": p, "question": q, "id": 1}) + "\n" for q, p in rows["letters"])
    (root / "letters.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "notes").mkdir()
    for part in range(parts):
        queries, positives = zip(*rows["notes"][part::parts], strict=True)
        table = Dataset.from_dict({"query": list(queries), "positive": list(positives)})
        table.to_parquet(str(root / "notes" / f"{part}.parquet"))
    return root


@pytest.fixture(name="data", scope="module")
def written_sets(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "sets", ROWS)


def recipe(data: Path, output: Path, **changes) -> PairRecipe:
    return PairRecipe(
        **{
            "output_dir": str(output),
            "data_dir": str(data),
            "sources": [
                Source(name="letters", path="letters.jsonl.zst", anchor="question", positive="answer"),
                Source(name="notes", path="notes/*.parquet"),
            ],
            "buckets": 2,
            "language": PairLanguage(among=AMONG),
            "consistency": Consistency(teacher=str(SHIPPED), pool=1000),
            "executor": Executor(tasks=3),
            **changes,
        }
    )


def document(query: str, positive: str) -> Document:
    return pair_document("mine", "0", query, positive)
