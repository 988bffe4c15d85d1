"""Damaged and lying files of every kind, drawn by hypothesis: an answer or a `FolderError` of one line, never more.

Pins: a weight file cut anywhere never counts as loadable, changed anywhere is read or refused in one line; a
configuration loads exactly if its shapes are those of the weights; no name in an index, a module list or an auto_map
leads out of the folder; a damaged repository is described; `from_pretrained` takes none of it either, and what it
takes is finite; any text has a finite vector, or is named.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SHIPPED
from hub_login import logged_in_hub  # noqa: F401  pytest finds the fixture by name
from hub_state import Blob, Repo
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hub_repo.folders.checkpoint_files import FolderError, stored_tensors
from hub_repo.folders.code_checks import code_findings
from hub_repo.inspect_folder import inspect_folder, inspect_repository
from modeling_jina_bert import JinaBertModel

WEIGHTS = "model.safetensors"
HEADER = 8 + int.from_bytes((GOLDEN / "A-small4h" / WEIGHTS).read_bytes()[:8], "little")
SHAPES = json.loads((GOLDEN / "A-small4h" / "config.json").read_text())
# 1 to 512 layers are built on the meta device; hundreds of them, example after example, would take minutes.
NUMBERS = st.integers(-(2**70), 0) | st.integers(1, 9) | st.integers(600, 2**70) | st.sampled_from([64, 128, 1000])
ANYTHING = NUMBERS | st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.lists(NUMBERS, max_size=2)
NAMES = st.text(max_size=12) | st.lists(st.sampled_from(["..", ".", "", "outside", "model", WEIGHTS]), max_size=4).map(
    "/".join
)
FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", WEIGHTS, "tokenizer.json"):
        shutil.copy(GOLDEN / "A-small4h" / name, tmp_path / "model" / name)
    return tmp_path / "model"


@pytest.fixture
def outside(folder):
    """What a path out of the folder would find: weights, and a pooling that no folder of ours has."""
    (folder.parent / "outside").mkdir()
    shutil.copy(folder / WEIGHTS, folder.parent / "outside" / WEIGHTS)
    (folder.parent / "outside" / "config.json").write_text('{"pooling_mode_stolen": true}')
    return folder


def changed(content: bytes, places: list[tuple[int, int]]) -> bytes:
    data = bytearray(content)
    for place, value in places:
        data[place % len(data)] = value
    return bytes(data)


CHANGES = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 255)), min_size=1, max_size=4)


@settings(FOLDER, max_examples=200)
@given(data=st.data())
def test_damaged_safetensors(folder, data):
    content = (GOLDEN / "A-small4h" / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1), label="length")
    (folder / WEIGHTS).write_bytes(content[:length])
    found = inspect_folder(folder)
    assert (found.loads, len(found.problems)) == (False, 1)
    assert "is not a whole safetensors file" in found.problems[0]
    places = [(place % HEADER, value) for place, value in data.draw(CHANGES, label="bytes of the header")]
    (folder / WEIGHTS).write_bytes(changed(content, places))
    found = inspect_folder(folder)
    assert found.loads or found.problems
    assert not any("\n" in problem for problem in found.problems)


@settings(FOLDER, max_examples=200)
@given(data=st.data())
def test_damaged_bin(folder, data):
    whole = folder.parent / "whole.bin"
    if not whole.exists():
        torch.save(load_file(folder / WEIGHTS), whole)
        (folder / WEIGHTS).unlink()
    content = whole.read_bytes()
    damaged = changed(content, data.draw(CHANGES, label="bytes"))
    cut = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    for damage in (cut, damaged):
        (folder / "pytorch_model.bin").write_bytes(damage)
        said, stored = "", {}
        try:
            stored = stored_tensors(folder)
        except FolderError as error:
            said = str(error)
        assert bool(said) != bool(stored)
        assert said or damage is damaged  # one that was cut off is always refused
        assert "\n" not in said


@settings(FOLDER, max_examples=100)
@given(changes=st.dictionaries(
    st.sampled_from(["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                     "type_vocab_size"]), ANYTHING, min_size=1))  # fmt: skip
def test_a_configuration_that_lies(folder, changes):
    (folder / "config.json").write_text(json.dumps(SHAPES | changes))
    found = inspect_folder(folder)
    # The number of heads divides the width, and is in no shape.
    same = all(type(value) is int and (value == SHAPES[name] or (name == "num_attention_heads" and value > 0))
               for name, value in changes.items())  # fmt: skip
    assert not found.loads or same, found
    assert found.loads or found.problems
    assert not any("\n" in problem for problem in found.problems)


@settings(FOLDER, max_examples=200)
@given(name=NAMES)
def test_no_name_leads_out_of_the_folder(outside, name):
    if (outside / WEIGHTS).exists():
        (outside / WEIGHTS).rename(outside / "part.safetensors")
    names = load_file(outside / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "sentence_transformers.models.Pooling", "path": name}]
    (outside / "modules.json").write_text(json.dumps(modules))
    (outside / "sentence_bert_config.json").write_text("{}")
    config = SHAPES | {"model_type": "jina_bert", "auto_map": {"AutoModel": name}}
    (outside / "config.json").write_text(json.dumps(config))
    found = inspect_folder(outside)
    assert (found.loads, found.parameters) == (False, 0)
    assert "stolen" not in str(found.pooling)
    messages = [finding.message for finding in code_findings(outside, [], trust=False)]
    assert any(message.startswith("auto_map AutoModel is") for message in messages)
    assert any("is not a folder in this one" in m or "is missing" in m for m in messages) or name == ""


@settings(FOLDER, max_examples=60)
@given(places=CHANGES, cut=st.booleans(), in_bin=st.booleans())
def test_a_damaged_repository(hub, tmp_path, places, cut, in_bin):
    """Over HTTP; the bytes are those of the header, which is at the end of a .bin file."""
    source = GOLDEN / "A-small4h"
    name, path = ("pytorch_model.bin", tmp_path / "whole.bin") if in_bin else (WEIGHTS, source / WEIGHTS)
    if not path.exists():
        torch.save(load_file(source / WEIGHTS), path)
    content = path.read_bytes()
    near = [((len(content) - 1 - place % 8000) if in_bin else place % HEADER, value) for place, value in places]
    damaged = content[: near[0][0]] if cut else changed(content, near)
    hub.repos["me/model"] = Repo(private=False)
    config = Blob((source / "config.json").read_bytes(), False)
    hub.commit("me/model", {"config.json": config, name: Blob(damaged, True)}, title="damaged")
    found = inspect_repository("me/model")
    assert found.kind == "official"
    assert not (cut and found.loads)
    assert found.loads or found.problems
    assert not any("\n" in problem or "/tmp/" in problem for problem in found.problems)


def loaded(folder) -> JinaBertModel | None:
    """What `from_pretrained` makes of a folder; None if it names what is wrong with the folder, in one line."""
    said = ""
    try:
        model = JinaBertModel.from_pretrained(folder)
    except (ValueError, OSError) as error:
        said = str(error)
    if said:
        assert str(folder) in said
        assert "\n" not in said
        return None
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    return model


@settings(FOLDER, max_examples=100)
@given(data=st.data(), in_bin=st.booleans())
def test_damaged_weights_are_not_loaded(folder, data, in_bin):
    """Bytes of a tensor may change to other finite numbers; nothing else does without an error."""
    name = "pytorch_model.bin" if in_bin else WEIGHTS
    if in_bin:
        torch.save(load_file(GOLDEN / "A-small4h" / WEIGHTS), folder / name)
        (folder / WEIGHTS).unlink(missing_ok=True)
    else:
        shutil.copy(GOLDEN / "A-small4h" / WEIGHTS, folder / name)
    content = (folder / name).read_bytes()
    cut = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    (folder / name).write_bytes(cut)
    assert loaded(folder) is None
    places = data.draw(CHANGES, label="bytes")
    near = places if in_bin else [(place % HEADER, value) for place, value in places]
    (folder / name).write_bytes(changed(content, near))
    loaded(folder)


@settings(FOLDER, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(["hidden_size", "num_hidden_layers", "num_attention_heads",
                                                "intermediate_size", "vocab_size", "type_vocab_size"]),
                               ANYTHING, min_size=1) | ANYTHING)  # fmt: skip
def test_a_configuration_that_lies_is_not_loaded(folder, changes):
    (folder / "config.json").write_text(json.dumps(SHAPES | changes if isinstance(changes, dict) else changes))
    model = loaded(folder)
    if model is not None:
        assert isinstance(changes, dict)
        assert all(value == SHAPES[name] for name, value in changes.items() if name != "num_attention_heads")


@settings(FOLDER, max_examples=100)
@given(name=NAMES)
@example(name="\n")
def test_no_name_is_loaded_from_outside(outside, name):
    if (outside / WEIGHTS).exists():
        (outside / WEIGHTS).rename(outside / "part.safetensors")
    names = load_file(outside / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    assert loaded(outside) is None


@pytest.fixture(scope="module")
def model():
    return JinaBertModel.from_pretrained(SHIPPED)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(st.characters(), max_size=60), max_size=4))
def test_any_text_has_a_vector_or_is_named(model, texts):
    """`st.characters()` has the halves of surrogate pairs, too, which are no characters."""
    broken = [number for number, text in enumerate(texts) if any("\ud800" <= x <= "\udfff" for x in text)]
    if broken:
        with pytest.raises(ValueError, match=rf"^sentences\[{broken[0]}\] is not valid Unicode"):
            model.encode(texts)
        with pytest.raises(ValueError, match=rf"^texts\[{broken[0]}\] is not valid Unicode"):
            model.encode_chunks(texts)
        texts = [text for number, text in enumerate(texts) if number not in broken]
    vectors = model.encode(texts, normalize_embeddings=True)
    assert vectors.shape == (len(texts), 256)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    if texts:
        np.testing.assert_allclose(vectors[-1], model.encode(texts[-1], normalize_embeddings=True), atol=1e-5)
    for text, chunks in zip(texts, model.encode_chunks(texts), strict=True):
        assert all(chunk.text == text[slice(*chunk.span)] and np.isfinite(chunk.embedding).all() for chunk in chunks)
