"""The metadata of model cards: what the Hub would refuse is named, results become a model-index, the text stays."""

import itertools
import json

import pytest
from conftest import REPOSITORY, SHIPPED

from hub_repo.model_card import check_card, evaluation_results, fill_card, main

CARD = """---
language: en
license: apache-2.0
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
  - jina_bert
---

# Small

A random model.
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("apache-2.0", "apache2", "license: 'apache2' is not a licence of the Hub"),
        ("license: apache-2.0\n", "", "license: None"),
        ("apache-2.0", "other", "license: other needs license_name"),
        ("language: en", "language: [en, no]", "language: False is not an ISO 639 code"),
        ("  - jina_bert", "  - 1", "tags: 1 is not a word"),
        ("sentence-similarity", "object-detection", "pipeline_tag: 'object-detection' is not one of"),
        ("library_name: sentence-transformers", "library_name: st", "library_name: 'st' is not one of"),
        ("language: en", "language: en\ndatasets: [a b]", "datasets: 'a b' is not a repository"),
        ("language: en", "language: en\nmodel-index: [{name: a}]", "unreadable metadata: Invalid `model_index`"),
        ("language: en", "language: [en", "unreadable metadata"),
    ],
)
def test_card_metadata(old, new, message):
    assert check_card(CARD) == check_card((SHIPPED / "README.md").read_text()) == []
    problems = check_card(CARD.replace(old, new, 1))
    assert len(problems) == 1
    assert message in problems[0]


def test_card_filled_from_results(tmp_path):
    records = [
        {"model": "ours", "set": "STSB", "metrics": {"spearman": 0.67816}},
        {"model": "bm25", "set": "STSB", "metrics": {"spearman": None}},
        {"model": "ours", "set": "ir/A set", "metrics": {"ndcg_at_10": 0.4, "mrr_at_10": 0.5}},
    ]
    filled = fill_card(CARD, tags=["jina_bert", "alibi"], results=evaluation_results(records, "ours"))
    assert filled.endswith(CARD.split("---\n")[2])
    assert check_card(filled) == []
    (tmp_path / "results.json").write_text(json.dumps({"records": records}))
    card = tmp_path / "README.md"
    card.write_text(CARD)
    arguments = [str(card), "--results", str(tmp_path / "results.json"), "--tags", "alibi", "--model"]
    assert main([*arguments, "bm25"]) == 2
    assert card.read_text() == CARD
    assert [main([*arguments, "ours"]) for _ in range(2)] == [0, 0]
    assert card.read_text() == filled
    assert all(part in filled for part in ("value: 0.6782", "type: cosine_ndcg@10", "type: ir-a-set", "- alibi"))
    assert "is not a number" in check_card(filled.replace("0.6782", ".nan"))[0]


@pytest.mark.parametrize("document", [SHIPPED / "README.md", REPOSITORY / "README.md"], ids=["card", "readme"])
def test_the_table_of_results_is_that_of_the_committed_scores(document):
    """Row by row, the best score of each in bold; rows of one order in both."""
    records = json.loads((REPOSITORY / "evaluation/results/tiny.json").read_text())["records"]
    found = {(r["set"], r["model"]): r["metrics"] for r in records}
    lines = document.read_text(encoding="utf-8").splitlines()
    table = itertools.dropwhile(lambda line: "| all-MiniLM-L6-v2 | BM25 |" not in line, lines)
    rows = list(itertools.takewhile(str.strip, table))
    assert len(rows) == 2 + len({r["set"] for r in records})
    for row in rows[2:]:
        name, _, measure, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        key = {"nDCG@10": "ndcg_at_10", "Spearman": "spearman"}[measure]
        scores = [found[name, model][key] for model in ("hub_repo/tiny", "all-MiniLM-L6-v2", "bm25")]
        assert cells == [f"**{x:.3f}**" if x == max(scores) else f"{x:.3f}" for x in scores]


def test_the_shipped_cards_model_index_is_that_of_the_committed_scores(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((SHIPPED / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    main([str(copy), "--results", str(REPOSITORY / "evaluation/results/tiny.json"), "--model", "hub_repo/tiny"])
    assert copy.read_text(encoding="utf-8") == (SHIPPED / "README.md").read_text(encoding="utf-8")
