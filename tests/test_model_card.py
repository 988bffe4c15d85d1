"""The metadata of model cards: what the Hub would refuse is named, results become a model-index, the text stays."""

import itertools
import json
import re
import shlex

import pytest
from cards import CARD
from conftest import REPOSITORY, SHIPPED

from hub_repo.model_card import TABLE_BEGIN, TABLE_END, check_card, evaluation_results, fill_card, main, results_table


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
        {"model": "ours", "set": "STSB", "sizes": {"pairs": 9}, "metrics": {"spearman": 0.67816}},
        {"model": "bm25", "set": "STSB", "sizes": {"pairs": 9}, "metrics": {"spearman": None}},
        {"model": "ours", "set": "ir/A set", "sizes": {}, "metrics": {"ndcg_at_10": 0.4, "mrr_at_10": 0.5}},
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


def record(model, name, value, *, data="a", cut=False, metric="spearman"):
    protocol = {"cut_from": {"pairs": 1234}} if cut else {}
    return {
        "model": model, "set": name, "data_sha256": data, "protocol": protocol, "sizes": {"pairs": 9 if cut else 1234},
        "metrics": {metric: value},
    }  # fmt: skip


def test_the_table_sets_side_by_side_what_is_of_the_same_data():
    records = [
        record("ours", "STSB", 0.5), record("theirs", "STSB", 0.7004), record("bm25", "STSB", None),
        record("ours", "SICK", 0.25), record("theirs", "SICK", 0.9, data="b"), record("bm25", "SICK", 0.2),
        record("ours", "pairs", 0.3, cut=True, metric="ap"), record("theirs", "pairs", 0.9, metric="ap"),
        record("ours", "STSB", 0.9, cut=True), record("theirs", "STSB", 0.1, cut=True), record("bm25", "only", 0.1),
    ]  # fmt: skip
    assert results_table(records, "ours", "Ours").splitlines() == [
        "| set | size | measure | Ours | theirs | bm25 |",
        "|---|---|---|---:|---:|---:|",
        "| SICK | 1,234 pairs | Spearman | **0.250** | - | 0.200 |",
        "| STSB | 1,234 pairs | Spearman | 0.500 | **0.700** | - |",
        "| pairs | 9 pairs (cut) | Average precision | **0.300** | - | - |",
    ]
    index = [(result.dataset_name, result.metric_value) for result in evaluation_results(records, "ours")]
    assert index == [("STSB", 0.5), ("SICK", 0.25), ("pairs (cut)", 0.3)]


def test_scores_of_other_weights_are_not_mixed_in():
    """A file of results keeps those of the weights that a folder had before."""
    old, new = (record("ours", name, 0.5) | {"settings": {"weights_sha256": name}} for name in ("STSB", "SICK"))
    with pytest.raises(ValueError, match="of 2 different weights"):
        evaluation_results([old, new], "ours")


def test_the_table_stands_between_its_lines(tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"records": [record("ours", "STSB", 0.5)]}))
    card = tmp_path / "README.md"
    arguments = [str(card), "--model", "ours", "--results", str(results)]
    text = f"{CARD}Before.\n\n{TABLE_BEGIN}\n| old |\n{TABLE_END}\n\nAfter.\n"
    card.write_text(text)
    assert [main(arguments) for _ in range(2)] == [0, 0]
    filled = card.read_text()
    assert "Before.\n\n" + TABLE_BEGIN + "\n\n| set | size | measure | Small |\n" in filled
    assert filled.endswith(f"| STSB | 1,234 pairs | Spearman | **0.500** |\n\n{TABLE_END}\n\nAfter.\n")
    for wrong in (text.replace(TABLE_END, ""), text + TABLE_BEGIN, f"{CARD}{TABLE_END}{TABLE_BEGIN}"):
        card.write_text(wrong)
        assert main(arguments) == 2
        assert card.read_text() == wrong
        assert "are not there once each, in this order" in capsys.readouterr().err
    results.write_text('{"records": [{"model": "ours"}]}')
    assert main(arguments) == 2
    assert f"{results}: holds no results of evaluation.local" in capsys.readouterr().err


def test_the_readmes_table_of_results_is_that_of_the_committed_scores():
    """Row by row, the best score of each in bold."""
    records = json.loads((REPOSITORY / "evaluation/results/tiny.json").read_text())["records"]
    found = {(r["set"], r["model"]): r["metrics"] for r in records}
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    table = itertools.dropwhile(lambda line: "| all-MiniLM-L6-v2 | BM25 |" not in line, lines)
    rows = list(itertools.takewhile(str.strip, table))
    assert len(rows) == 2 + len({r["set"] for r in records})
    for row in rows[2:]:
        name, _, measure, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        key = {"nDCG@10": "ndcg_at_10", "Spearman": "spearman"}[measure]
        scores = [found[name, model][key] for model in ("hub_repo/tiny", "all-MiniLM-L6-v2", "bm25")]
        assert cells == [f"**{x:.3f}**" if x == max(scores) else f"{x:.3f}" for x in scores]


def test_the_shipped_card_is_what_its_command_writes(tmp_path, monkeypatch):
    shipped = (SHIPPED / "README.md").read_text(encoding="utf-8")
    _, _, command = shipped.partition("python -m hub_repo.model_card ")
    arguments = shlex.split(command.partition("```")[0].replace("\\\n", ""), comments=True)
    copy = tmp_path / "README.md"
    begin, _, rest = re.sub(r"value: .*", "value: 0.0", shipped).partition(TABLE_BEGIN)
    copy.write_text(f"{begin}{TABLE_BEGIN}{TABLE_END}{rest.partition(TABLE_END)[2]}", encoding="utf-8")
    monkeypatch.chdir(REPOSITORY)
    assert main([str(copy), *arguments[1:]]) == 0
    assert copy.read_text(encoding="utf-8") == shipped
    for kind in ("ir/", "long/", "STS", "pair-classification/", "clustering/", "classification/"):
        assert f"| {kind}" in shipped, "the sets on which it is weak are there too"
