"""The report shows what the result files hold, says what is missing, and opens without a network."""

import copy
import json
import re
import shutil

import pytest
from conftest import REPOSITORY
from test_evaluation_local import hand_made
from toy_evaluation import written_sets  # noqa: F401  pytest finds the fixture by name

from evaluation.local import evaluate
from evaluation.records import of_last_weights
from evaluation.report import SECTIONS, found_files, main
from evaluation.scoring import Protocol
from evaluation.sets import load_set

RESULTS = REPOSITORY / "evaluation" / "results"
ROBUSTNESS = {
    "model": "a <script>alert(1)</script> model",
    "set": "ir/mine",
    "sizes": {"queries": 1234, "documents": 5},
    "command": "python -m evaluation.robustness",
    "settings": {"weights_sha256": "0123456789abcdef"},
    "versions": {"torch": "9.8.7", "processor": "a processor", "threads": 3},
    "records": [
        {"variation": "bfloat16", "cosine_min": 0.9871234, "cosine_mean": 0.99, "top_1": 0.5, "top_k_overlap": 0.25,
         "ndcg_at_10": 0.123},
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Late chunking and robustness; nothing else."""
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(RESULTS / "late-chunking.json", folder)
    (folder / "robustness.json").write_text(json.dumps(ROBUSTNESS))
    return folder


def run(results, tmp_path):
    page, text = tmp_path / "out" / "index.html", tmp_path / "out" / "report.md"
    main(["--results", str(results), "--output", str(page), "--markdown", str(text)])
    return page.read_text(), text.read_text()


def test_the_page_holds_the_scores_and_nothing_from_elsewhere(results, tmp_path, capsys):
    page, text = run(results, tmp_path)
    record = json.loads((RESULTS / "late-chunking.json").read_text())["records"][0]
    for content in (page, text):
        assert "0.987123" in content
        assert "1,234 queries" in content
        assert f"{record['metrics']['late_ndcg_at_10']:.3f}" in content
        assert record["set"] in content
    assert "<script" not in page, "text of a result is never markup"
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert page.count("<section") == len(SECTIONS)
    assert page.count("<table>") == page.count('<div class="wide"><table>') >= 2
    assert "not measured: Local sets" in capsys.readouterr().out


def test_masked_words_are_compared_at_the_length_that_was_trained_at(results, tmp_path):
    """And those of the last run alone: of its seed, its documents, its weights."""
    name = "mlm-length-tiny.json"
    records = json.loads((RESULTS / name).read_text())["records"]
    other = copy.deepcopy(records)
    for record in other:  # an earlier run: fewer documents, another seed, other weights
        record["documents"] = record["documents"][:2]
        record["settings"] |= {"seed": 7} | ({"weights_sha256": "0"} if "weights_sha256" in record["settings"] else {})
    (results / name).write_text(json.dumps({"records": [*other, *records]}))
    _, text = run(results, tmp_path)
    section = text.partition("## Masked words by length")[2].partition("\n## ")[0]
    assert "ratio to 128" in section
    table = (RESULTS / name).with_suffix(".md").read_text().partition("| system")[2]
    assert set(table.splitlines()[1:]) <= set(section.splitlines())
    kept = [record for record in records if record["length"] > 128]
    (results / name).write_text(json.dumps({"records": kept}))
    with pytest.raises(SystemExit) as exit_status:
        run(results, tmp_path)
    assert exit_status.value.code == 2


def test_a_section_without_its_file_says_how_it_is_made(results, tmp_path):
    page, text = run(results, tmp_path)
    for section in SECTIONS:
        if not found_files(section, results):
            assert section.command in text
        assert f"<h2>{section.title}</h2>" in page


def rows_of(text, start):
    return [line for line in text.splitlines() if line.startswith(f"| {start} |")]


def test_every_local_result_is_shown_once_and_the_baselines_last(results, data, tmp_path):
    systems = [hand_made(data, name=name) for name in ("bm25", "all-MiniLM-L6-v2", "mine")]
    systems[2].vectors = {text: vector[::-1] for text, vector in systems[2].vectors.items()}
    sets = [load_set(data, "STSB"), load_set(data, "ir/Toy")]
    (results / "local").mkdir()
    evaluate(systems, sets, results / "tiny.json", command="whole")
    for system in systems:
        evaluate([system], sets, results / "local" / f"{system.name}.json", command="cut", protocol=Protocol(2 + 1))
    _, text = run(results, tmp_path)
    whole, cut = text.split("### Whole sets")[1].split("## Masked words")[0].split("### Sets cut to 3 texts at most")
    for table in (whole, cut):
        assert rows_of(table, "set")[0].split(" | ")[2:5] == ["mine", "all-MiniLM-L6-v2", "bm25"]
        assert len(rows_of(table, "ir/Toy")) == 5
        assert "▲ better and ▼ worse than mine" in table
    assert "4 pairs |" in whole
    assert "3 pairs (cut) |" in cut
    assert [row.split(" | ")[0] for row in text.split("## Environment")[1].splitlines() if "local/" in row] == [
        "| mine", "| all-MiniLM-L6-v2", "| bm25",
    ]  # fmt: skip


def test_the_environment_is_that_of_the_records(results, tmp_path):
    _, text = run(results, tmp_path)
    environment = text.split("## Environment")[1]
    (row,) = [line for line in environment.splitlines() if "robustness.json" in line]
    assert row.endswith("| 0123456789ab | - | 9.8.7 | - | - | a processor | - | 3 | results/robustness.json |")
    record = json.loads((RESULTS / "late-chunking.json").read_text())["records"][0]
    (row,) = rows_of(environment, record["model"])
    for value in (record["settings"]["weights_sha256"][:12], record["versions"]["transformers"]):
        assert f"| {value} |" in row


def test_depths_have_a_figure(tmp_path):
    (tmp_path / "results" / "long").mkdir(parents=True)
    for name in ("needle.json", "needle.npz"):
        shutil.copy(RESULTS / "long" / name, tmp_path / "results" / "long")
    page, text = run(tmp_path / "results", tmp_path)
    assert "![Score by depth and length](figures/score-by-depth-and-length.png)" in text
    assert (tmp_path / "out" / "figures" / "score-by-depth-and-length.png").stat().st_size > 10_000
    assert page.count("data:image/png") == 1


def test_masked_words_of_other_documents_have_a_table_and_a_figure_of_their_own(tmp_path):
    (tmp_path / "results").mkdir()
    names = ("mlm-length.json", "mlm-length-minilm.json")
    for name in names:
        shutil.copy(RESULTS / name, tmp_path / "results")
    page, text = run(tmp_path / "results", tmp_path)
    assert page.count("data:image/png") == 2
    for name in names:
        targets = json.loads((RESULTS / name).read_text())["records"][0]["metrics"]["targets"]
        assert f"{targets:,} masked tokens" in text
        assert (
            tmp_path / "out" / "figures" / f"accuracy-and-loss-by-length-{name.removesuffix('.json')}.png"
        ).is_file()


@pytest.mark.parametrize(
    ("name", "content"),
    [("robustness.json", "{"), ("robustness.json", '{"model": 1}'), ("late-chunking.json", '{"records": [{}]}')],
)
def test_a_damaged_file_is_named(results, tmp_path, capsys, name, content):
    (results / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        run(results, tmp_path)
    assert error.value.code == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_records_of_the_weights_before_are_left_out():
    def record(model: str, weights: str | None, number: int) -> dict:
        return {"model": model, "settings": {"weights_sha256": weights} if weights else {}, "number": number}

    records = [record("a", "old", 1), record("b", "x", 2), record("a", "new", 3), record("bm25", None, 4)]
    records += [record("a", "new", 5)]
    assert [record["number"] for record in of_last_weights(records)] == [2, 3, 4, 5]


def test_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "nothing", tmp_path)
    assert error.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    _, text = run(RESULTS, tmp_path)
    committed = (RESULTS / "report" / "report.md").read_text()
    assert text.replace(str(RESULTS), "evaluation/results") == committed, (
        "run: python -m evaluation.report --results evaluation/results --output evaluation/results/report/index.html "
        "--markdown evaluation/results/report/report.md"
    )
