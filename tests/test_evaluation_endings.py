"""Laws of every command that scores: a vector that is not finite is an error that names the model and the text, and
Ctrl-C ends it with one line that says how to go on.
"""

import json
import shutil

import pytest
import torch
from conftest import REPOSITORY
from toy_evaluation import (  # noqa: F401  pytest finds the fixtures by name
    random_model,
    write_rows,
    written_sets,
)

from evaluation import late_chunking, local, long_documents, mteb_run, needle, robustness
from modeling_jina_bert import JinaBertModel

TEXTS = [json.loads(line)["text"] for line in (REPOSITORY / "tests/data/corpus.jsonl").read_text().splitlines()][:12]
TOY = ["--sets", "ir/Toy"]
SMALL = [*TOY, "--lengths", "8", "--chunks", "4"]
HAY = ["--needles", "ir/Toy", "--haystacks", "ir/Hay", "--documents", "2", "--lengths", "256", "--depths", "0"]
COMMANDS = {  # name -> entry point, options, file of its records
    "local": (local.main, TOY, "out.json"),
    "long_documents": (long_documents.main, SMALL, "out"),
    "needle": (needle.main, HAY, "out"),
    "late_chunking": (late_chunking.main, [*TOY, "--chunks", "whole", "2"], "out.json"),
    "mteb_run": (mteb_run.main, ["--tasks", "ir/Toy"], "out"),
    "robustness": (robustness.main, ["--set", "ir/Toy", "--dtypes"], "out.json"),
}


@pytest.fixture
def run(model_folder, data, tmp_path, capsys):
    """Runs a command with the random model; its exit status and what it wrote to stderr."""
    folder = data / "eval" / "ir" / "Hay"
    write_rows(folder / "corpus.jsonl.zst", [{"_id": str(i), "text": text} for i, text in enumerate(TEXTS)])
    write_rows(folder / "queries.jsonl.zst", [{"_id": "q", "text": "?"}])
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")

    def run_command(command, *options, model=model_folder, option="--model"):
        main, own, output = COMMANDS[command]
        fixed = [option, str(model), "--device", "cpu", "--data", str(data), "--output", str(tmp_path / output)]
        with pytest.raises(SystemExit) as error:
            main([*fixed, *own, *options])
        return error.value.code, capsys.readouterr().err

    return run_command


@pytest.fixture
def broken(model_folder, tmp_path):
    """Makes the model one that overflows at a word: its weights are finite, the LayerNorm of that word is NaN."""

    def with_word(word):
        model = JinaBertModel.from_pretrained(model_folder)
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[model.tokenizer.convert_tokens_to_ids(word)] = 3e38
        folder = shutil.copytree(model_folder, tmp_path / f"knows-no-{word}")
        model.save_pretrained(folder)
        return folder

    return with_word


@pytest.mark.parametrize("option", ["--model", "--baseline"])
@pytest.mark.parametrize(("word", "text"), [("mammals", "whales mammals"), ("bread", "Bread needs flour")])
def test_long_documents_refuses_nan(run, broken, word, text, option):
    folder = broken(word)
    code, error = run("long_documents", model=folder, option=option)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error")]
    assert f"{folder}: 1 vectors are not finite; the first is of '{text}" in line


REFUSED = [
    ("local", "bread", "Bread needs flour"),
    ("needle", "mammals", "whales mammals"),
    ("needle", "sea", "Whales are mammals of the sea."),
    ("needle --kinds late", "sea", "Whales are mammals of the sea."),
    ("late_chunking", "mammals", "whales mammals"),
    ("late_chunking", "bread", "Bread needs flour"),
    ("robustness", "bread", "Bread needs flour"),
]


@pytest.mark.parametrize(("command", "word", "text"), REFUSED)
def test_nan_is_refused(run, broken, command, word, text):
    name, *options = command.split()
    code, error = run(name, *options, model=broken(word))
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error")]
    assert f"knows-no-{word}" in line
    assert "not finite" in line
    assert text in line


def test_nan_fails_a_task_of_mteb(run, broken, tmp_path):
    folder = broken("bread")
    code, error = run("mteb_run", model=folder)
    assert code == 1
    assert f"error: ir-Toy: {folder}: 1 vectors are not finite; the first is of 'Bread needs flour" in error
    assert not list((tmp_path / "out").rglob("ir-Toy.json"))


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_with_one_line(run, command, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for owner, name in ((JinaBertModel, "encode"), (JinaBertModel, "forward")):
        monkeypatch.setattr(owner, name, interrupted)
    code, error = run(command)
    assert code == 130
    (line,) = [line for line in error.splitlines() if line.startswith("interrupted")]
    goes_on = "begins anew" if command == "robustness" else f"goes on from {tmp_path / COMMANDS[command][2]}"
    assert line == f"interrupted; the same command {goes_on}"
    assert "Traceback" not in error
