"""Laws of the local evaluation: a score is computed once for the same model, settings, protocol and texts; a wrong
input ends with one line that names it.
"""

import json
import math

import numpy as np
import pytest
import torch
from toy_evaluation import (  # noqa: F401  pytest finds the fixtures by name
    PAIRS,
    QRELS,
    QUERIES,
    HandMade,
    random_model,
    written_sets,
)

from evaluation import local
from evaluation.local import evaluate, main
from evaluation.records import read_samples, samples_path
from evaluation.sets import EvaluationError, load_set
from evaluation.systems import BM25
from evaluation.tables import table_rows


def toy_sets(data):
    return [load_set(data, "ir/Toy"), load_set(data, "STSB")]


def hand_made(data, **options):
    texts = [*load_set(data, "ir/Toy").documents.values(), *(row["text"] for row in QUERIES)]
    texts += [row[side] for row in PAIRS for side in ("sentence1", "sentence2")]
    return HandMade({text: [math.cos(i), math.sin(i)] for i, text in enumerate(texts)}, **options)


def test_what_is_scored_is_not_scored_again(data, tmp_path):
    output = tmp_path / "results.json"
    system = hand_made(data)
    first = evaluate([system], toy_sets(data), output, command="first")
    assert system.calls == 2
    assert evaluate([system], toy_sets(data), output, command="second") == first
    assert system.calls == 2
    other = hand_made(data, seed=1)
    evaluate([other], toy_sets(data), output, command="other settings")
    assert other.calls == 2
    again = evaluate([system], toy_sets(data), output, command="forced", force=True)
    assert system.calls == 4
    assert {record["command"] for record in again} == {"forced"}
    records = json.loads(output.read_text())["records"]
    assert sorted(record["command"] for record in records) == ["forced"] * 2 + ["other settings"] * 2
    assert len(read_samples(samples_path(output))) == 4


def test_a_run_killed_between_its_two_files_goes_on(data, tmp_path, monkeypatch):
    output, system = tmp_path / "results.json", hand_made(data)
    with monkeypatch.context() as patch:
        patch.setattr(local, "write_records", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate([system], toy_sets(data), output, command="")
    assert not output.exists()
    assert len(read_samples(samples_path(output))) == 1
    records = evaluate([system], toy_sets(data), output, command="")
    assert {record["samples"] for record in records} == set(read_samples(samples_path(output)))
    assert system.calls == 3


def test_two_processes_may_share_an_output(data, tmp_path):
    output = tmp_path / "results.json"
    first, second = local.Results(output), local.Results(output)
    key = {"set": "STSB", "settings": {}, "protocol": {}}
    for name, results in (("a", first), ("b", second)):
        samples = {"similarity": np.ones(2), "gold": np.ones(2)}
        record = {**key, "model": name, "metrics": {"spearman": 0.5}, "sizes": {"pairs": 2}, "samples": f"of {name}"}
        results.add({**key, "model": name}, record, samples)
    assert [local.Results(output).find({"model": name})["samples"] for name in "ab"] == ["of a", "of b"]


def test_a_score_whose_texts_or_samples_changed_is_computed_anew(data, tmp_path):
    output, system = tmp_path / "results.json", hand_made(data)
    first = evaluate([system], toy_sets(data), output, command="")
    assert {record["sizes"]["queries"] for record in first[:1]} == {3}
    samples_path(output).write_bytes(samples_path(output).read_bytes()[:100])  # damaged
    assert evaluate([system], toy_sets(data), output, command="") == [
        {**record, "seconds": again["seconds"]}
        for record, again in zip(first, json.loads(output.read_text())["records"], strict=True)
    ]
    assert system.calls == 4
    (data / "eval" / "ir" / "Toy" / "qrels.tsv").write_text("\n".join(QRELS[:3]) + "\n")
    changed = evaluate([system], toy_sets(data), output, command="")
    assert system.calls == 5
    assert changed[0]["data_sha256"] != first[0]["data_sha256"]
    assert changed[0]["sizes"]["queries"] == 2
    records = json.loads(output.read_text())["records"]
    assert len(records) == len(read_samples(samples_path(output))) == 2  # the old score is gone


def test_records_of_earlier_versions_are_kept_and_replaced(data, tmp_path):
    output, system = tmp_path / "results.json", hand_made(data)
    old = {"model": "hand", "set": "ir/Toy", "settings": system.settings, "metrics": {"ndcg_at_10": 0.1}, "sizes": {}}
    output.write_text(json.dumps({"records": [old, {**old, "set": "ir/Other"}]}))
    evaluate([system], toy_sets(data)[:1], output, command="")
    records = json.loads(output.read_text())["records"]
    assert [record["set"] for record in records] == ["ir/Other", "ir/Toy"]
    assert records[1]["metrics"]["ndcg_at_10"] != 0.1
    low, high = records[1]["intervals"]["ndcg_at_10"]
    assert low <= records[1]["metrics"]["ndcg_at_10"] <= high


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    output, system = tmp_path / "results.json", hand_made(data)
    with monkeypatch.context() as patch:
        patch.setattr(system, "similarity", lambda first, second: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate([system], toy_sets(data), output, command="")
    assert [record["set"] for record in json.loads(output.read_text())["records"]] == ["ir/Toy"]
    assert len(evaluate([system], toy_sets(data), output, command="")) == 2
    assert system.calls == 2


def test_the_command_writes_records_and_tables(data, model_folder, tmp_path, capsys):
    output, markdown = tmp_path / "results.json", tmp_path / "table.md"
    arguments = ["--model", str(model_folder), "--baseline", "bm25", "--data", str(data), "--sets", "long/Toy,STSB"]
    main([*arguments, "ir/Toy", "--output", str(output), "--markdown", str(markdown), "--max-length", "8"])
    records = json.loads(output.read_text())["records"]
    assert [record["set"] for record in records] == ["long/Toy"] * 2 + ["STSB"] * 2 + ["ir/Toy"] * 2
    model, bm25 = records[:2]
    assert model["settings"].items() >= {"max_length": 8, "dtype": "float32", "dimensions": 32}.items()
    assert model["sizes"] == {"queries": 3, "documents": 4, "empty_documents": 1, "truncated_documents": 3}
    assert bm25["settings"].items() >= {"k1": 1.5, "b": 0.75, "stopwords": "english"}.items()
    assert "--max-length 8" in model["command"]
    assert model["versions"]["torch"] == torch.__version__
    assert model["versions"]["threads"] == torch.get_num_threads()
    assert model["versions"]["processor"]
    assert -1 <= records[2]["metrics"]["spearman"] <= 1
    assert records[3]["metrics"]["spearman"] is None  # no two of these sentences share a word
    header, rows = table_rows(records)
    assert header[3:] == [f"{model_folder} (8 tokens)", "bm25"]
    assert len(rows) == 5 + 2 + 5
    lines = markdown.read_text().splitlines()
    assert lines[2].startswith("| long/Toy | 3 x 4 | nDCG@10 | ")
    assert lines[7].startswith("| STSB | 4 pairs | Spearman | ")
    assert lines[7].endswith(" | - |")
    assert "nDCG@10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "bm25", "--sets", "ir/Nope"], "unknown set 'ir/Nope'; there are ir/Toy, long/Toy, STSB."),
        (["--baseline", "bm25", "--data", "nowhere"], "--data nowhere: no folder nowhere/eval."),
        (["--model", "{tmp}/nowhere"], "model {tmp}/nowhere: no such folder."),
        (["--model", "{tmp}"], "model {tmp}: cannot be loaded ("),
        (["--baseline", "bm25", "--max-length", "0"], "--max-length 0: the least is 3 tokens"),
        (["--baseline", "bm25", "--max-texts", "9"], "--max-texts 9: the least is 10."),
        (
            ["--baseline", "bm25", "--output", "{tmp}/no/results.json"],
            "{tmp}/no/results.json: is a folder, or lies in",
        ),
        (
            ["--baseline", "bm25", "--output", "{tmp}/other.json"],
            "{tmp}/other.json: exists and holds no results",
        ),
        ([], "nothing to evaluate: give --model, --baseline, or both."),
    ],
)
def test_wrong_arguments_end_with_one_line(data, tmp_path, capsys, arguments, message):
    (tmp_path / "other.json").write_text("[]")
    defaults = ["--data", str(data), "--output", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit) as exit_info:
        main([*defaults, *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: " + message.format(tmp=tmp_path))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from"),
        (EvaluationError("bm25: 1 vectors are not finite"), 2, "error: bm25: 1 vectors are not finite"),
    ],
)
def test_an_interrupt_and_a_broken_model_end_with_one_line(data, tmp_path, capsys, monkeypatch, error, code, message):
    def similarity(self, first, second):
        raise error

    monkeypatch.setattr(BM25, "similarity", similarity)
    output = tmp_path / "results.json"
    with pytest.raises(SystemExit) as exit_info:
        main(["--baseline", "bm25", "--data", str(data), "--sets", "ir/Toy,STSB,long/Toy", "--output", str(output)])
    assert exit_info.value.code == code
    assert message in capsys.readouterr().err
    assert [record["set"] for record in json.loads(output.read_text())["records"]] == ["ir/Toy"]
