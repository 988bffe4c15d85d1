"""Laws of the loader: every JinaBERT is scored, in the official form or in ours, with the same scores; its weights are
in the dtype that was asked for; what cannot be loaded is one line.
"""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CACHES, GOLDEN, SHIPPED
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Normalize
from toy_evaluation import written_sets  # noqa: F401  pytest finds the fixture by name

from evaluation import loading, local, long_documents
from evaluation.command_line import add_placement, placement_of
from evaluation.loading import (
    Placement,
    check_finite,
    is_official_form,
    load_jina_bert,
    load_sentence_transformer,
    placed,
)
from evaluation.mteb_model import TextEncoder
from evaluation.mteb_training import TRAINING_CODE
from evaluation.sets import EvaluationError
from hub_repo.convert import convert
from modeling_jina_bert import JinaBertModel

TEXTS = ["a whale breathes air and lives in the sea", "bread needs flour, water and salt", ""]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The shipped model in the official form."""
    folder = tmp_path_factory.mktemp("official") / "tiny"
    convert(SHIPPED, folder, target="official")
    return folder


def test_the_official_form_is_ours(official):
    assert is_official_form(str(official))
    assert not is_official_form(str(SHIPPED))
    ours, theirs = (load_sentence_transformer(str(folder), Placement("cpu")) for folder in (SHIPPED, official))
    assert isinstance(theirs[0].auto_model, JinaBertModel)
    assert [type(module) for module in theirs][1:] == [type(module) for module in ours][1:]
    assert isinstance(theirs[-1], Normalize)
    assert theirs.max_seq_length == ours.max_seq_length == 8192
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), atol=1e-6)


def test_modules_are_those_of_the_folder(official, tmp_path):
    folder = shutil.copytree(official, tmp_path / "bare")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    vectors = load_sentence_transformer(str(folder), Placement("cpu")).encode(TEXTS)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.05)
    (folder / "modules.json").unlink()
    np.testing.assert_allclose(load_sentence_transformer(str(folder), Placement("cpu")).encode(TEXTS), vectors)


@pytest.mark.parametrize("layout", ["A-small4h", "B-8h"])
def test_golden_models_of_both_layouts(layout):
    name = str(GOLDEN / layout)
    model, vectors = load_jina_bert(name, Placement("cpu")), load_sentence_transformer(name, Placement("cpu"))
    np.testing.assert_allclose(vectors.encode(TEXTS[:2]), model.encode(TEXTS[:2]), atol=1e-5)


def test_every_command_scores_the_official_form_as_ours(official, data, tmp_path):
    scores = []
    for number, folder in enumerate((SHIPPED, official)):
        options = ["--model", str(folder), "--device", "cpu", "--data", str(data), "--sets", "ir/Toy"]
        local.main([*options, "--output", str(tmp_path / f"{number}.json")])
        long_documents.main([*options, "--lengths", "8", "64", "--output", str(tmp_path / str(number))])
        records = json.loads((tmp_path / f"{number}.json").read_text())["records"]
        records += json.loads((tmp_path / str(number) / "records.json").read_text())["records"]
        scores.append([record["metrics"] for record in records])
        assert {(record["device"], record["revision"]) for record in records} == {("cpu", None)}
    assert scores[0] == scores[1]
    assert len(scores[0]) > 3


def test_mteb_reads_the_official_form_and_does_not_claim_its_training(official):
    encoders = [TextEncoder(str(folder), device="cpu") for folder in (SHIPPED, official)]
    claims = [encoder.mteb_model_meta.public_training_code for encoder in encoders]
    assert claims == [TRAINING_CODE, None]
    assert encoders[0].normalized
    assert encoders[1].normalized


MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def repository(official):
    """A repository of the official form in the Hub's cache; its tag "old" has other weights and does not normalise."""
    root = CACHES / "hub" / "models--me--official"
    for commit in (MAIN, OLD):
        shutil.copytree(official, root / "snapshots" / commit)
    old = root / "snapshots" / OLD
    modules = json.loads((old / "modules.json").read_text())
    (old / "modules.json").write_text(json.dumps(modules[:2]))
    weights = load_file(old / "model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in weights.items()}, old / "model.safetensors", {"format": "pt"})
    (root / "refs").mkdir()
    for name, commit in (("main", MAIN), ("old", OLD)):
        (root / "refs" / name).write_text(commit)
    yield "me/official"
    shutil.rmtree(root)


def test_a_revision_is_that_of_weights_modules_and_record(repository, official):
    for load in (load_jina_bert, load_sentence_transformer):
        main, old = (load(repository, Placement("cpu", revision=revision)) for revision in (None, "old"))
        np.testing.assert_allclose(main.encode(TEXTS), load(str(official), Placement("cpu")).encode(TEXTS), atol=1e-6)
        assert np.abs(main.encode(TEXTS) - old.encode(TEXTS)).max() > 1e-2
        assert [placed(model) for model in (main, old)] == [
            {"device": "cpu", "revision": MAIN}, {"device": "cpu", "revision": OLD},
        ]  # fmt: skip
    assert not isinstance(old[-1], Normalize)
    assert TextEncoder(repository, "old", device="cpu").revision == OLD
    with pytest.raises(EvaluationError, match=r"model me/official: cannot be loaded \("):
        load_jina_bert(repository, Placement("cpu", revision="none"))


def test_weights_are_in_the_dtype_that_was_asked_for(official, tmp_path):
    for dtype in loading.DTYPES:
        expected = {getattr(torch, dtype)}
        placement = Placement("cpu", dtype)
        assert {p.dtype for p in load_jina_bert(str(official), placement).parameters()} == expected
        assert {p.dtype for p in load_sentence_transformer(str(SHIPPED), placement).parameters()} == expected
    half = load_jina_bert(str(SHIPPED), Placement("cpu", "float16"))
    half.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    model = load_sentence_transformer(str(tmp_path / "half"), Placement("cpu"))
    assert next(model.parameters()).dtype == torch.float32


def test_what_cannot_be_meant_is_named(official):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append")
    add_placement(parser)
    found = placement_of(
        parser.parse_args(["--model", "a", "--device", "cpu", "--revision", "r", "--dtype", "bfloat16"])
    )
    assert found == Placement("cpu", "bfloat16", "r")
    assert found.of_baseline == Placement("cpu")
    for words, message in (
        ("--device nothing", "--device nothing: "),
        ("--model a --model b --revision r", "--revision r: is of one --model, there are 2."),
        ("--revision r", "--revision r: is of one --model, there are 0."),
    ):
        with pytest.raises(EvaluationError) as error:
            placement_of(parser.parse_args(words.split()))
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    for load in (load_jina_bert, load_sentence_transformer):
        with pytest.raises(EvaluationError, match=r"--revision r: .* is a folder, which has no revisions\."):
            load(str(official), Placement("cpu", revision="r"))
        with pytest.raises(EvaluationError, match=r"model /no/folder: no such folder\."):
            load("/no/folder", Placement("cpu"))


def test_a_vector_that_is_not_finite_names_model_and_text():
    vectors = np.ones((2, 3), np.float32)
    check_finite(vectors, ["good", "bad"], "tiny")
    vectors[1, 2] = np.inf
    with pytest.raises(EvaluationError, match=r"tiny: 1 vectors are not finite; the first is of 'bad'\."):
        check_finite(vectors, ["good", "bad"], "tiny")
