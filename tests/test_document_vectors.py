"""Laws of the readers and of their commands: a truncation that is meant is not warned of, whatever else is said is."""

import logging

import pytest
from conftest import tiny_config

from evaluation import long_documents, needle
from evaluation.document_vectors import JinaReader
from modeling_jina_bert import JinaBertModel

TEXTS = ["a whale breathes air and lives in the sea", "bread"]


def test_only_the_truncation_that_is_meant_is_silent(tokenizer, caplog):
    model = JinaBertModel(tiny_config(model_max_length=6)).eval()
    model.tokenizer = tokenizer
    reader = JinaReader("random", model)
    reader.whole(TEXTS, 5)
    assert not caplog.records
    reader.queries(TEXTS)  # by the model's own limit: nobody asked for it
    assert "1 of 2 texts are longer than max_length=6 tokens and were truncated" in caplog.text


@pytest.mark.parametrize(("module", "words"), [(long_documents, ["--sets", "long"]), (needle, ["--data", "nowhere"])])
def test_a_command_leaves_the_loggers_of_the_model_alone(module, words, tmp_path, capsys):
    levels = {name: logging.getLogger(name).level for name in ("modeling_jina_bert", "modeling_jina_bert.encoding")}
    file = tmp_path / "file"
    file.touch()
    for more, message in (
        (["--output", str(tmp_path)], "nothing to evaluate"),
        (["--model", "x", "--output", str(file)], f"--output {file}: is a file"),
    ):
        with pytest.raises(SystemExit) as error:
            module.main([*words, *more])
        assert error.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert {name: logging.getLogger(name).level for name in levels} == levels
