"""`verify` and `info`: what is wrong with a folder is found without running anything of it.

Pins: a whole folder loads in a fresh process and passes; each damage is an error that names the file; code that is not
the package's never runs without trust; info says what a folder is from headers alone.
"""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from conftest import GOLDEN, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from hub_repo import inspect_folder as info_module
from hub_repo.convert import convert
from hub_repo.folders.code_checks import code_of
from hub_repo.folders.folder_files import code_files
from hub_repo.folders.loading import CHECK_TEXTS, smallest_cosine
from hub_repo.inspect_folder import inspect_folder
from hub_repo.verify import main, verify_folder
from modeling_jina_bert import JinaBertForMaskedLM, JinaBertModel


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of ours, converted from the golden model of layout B."""
    output = tmp_path_factory.mktemp("whole") / "b8h"
    convert(GOLDEN / "B-8h", output)
    (output / "README.md").write_text("# A card\n")
    return output


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "folder")


def errors(folder, **options):
    return [str(finding) for finding in verify_folder(folder, **options).errors]


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


MARK = """
import os, pathlib
from huggingface_hub import get_token
pathlib.Path({!r}).write_text(repr((get_token(), sorted(name for name in os.environ if name.endswith("TOKEN")))))
"""


def leave_a_trace(folder, mark):
    with (folder / "alibi.py").open("a") as file:
        file.write(MARK.format(str(mark)))


def test_code_that_is_not_ours_is_not_run(folder, tmp_path, capsys):
    leave_a_trace(folder, tmp_path / "it ran")
    assert main([str(folder)]) == 1
    output = capsys.readouterr().out
    assert "error: alibi.py: differs from the package's code; nothing was run" in output
    assert output.count("differs from the package") == 1
    assert not (tmp_path / "it ran").exists()


@pytest.mark.slow
def test_it_is_run_under_trust_and_sees_no_token(folder, tmp_path, monkeypatch):
    """Neither from the variables nor from the file that `hf auth login` writes."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text("hf_of_the_user")
    leave_a_trace(folder, tmp_path / "it ran")
    report = verify_folder(folder, trust=True)
    assert report.ok, [str(finding) for finding in report.errors]
    assert (tmp_path / "it ran").read_text() == "(None, [])"
    notes = [finding.message for finding in report.findings if "fresh process" in finding.message]
    assert len(notes) == 2
    assert all("cosine 1.000000" in note for note in notes)


def test_what_the_fresh_process_says_decides(whole, monkeypatch):
    """The process itself is in the slow tests and in every export; here, what becomes of its vectors."""
    right = JinaBertModel.from_pretrained(whole).encode(list(CHECK_TEXTS))
    wrong = right.copy()
    wrong[0] = right[0][::-1]
    for vectors, ok in ((right, True), (wrong, False), (right * float("nan"), False), (right[:, :9], False)):
        monkeypatch.setattr("hub_repo.verify.load_in_fresh_process", lambda _, vectors=vectors: {"AutoModel": vectors})
        assert verify_folder(whole).ok is ok

    def fails(_):
        raise RuntimeError("it does not load\nfor two reasons")

    monkeypatch.setattr("hub_repo.verify.load_in_fresh_process", fails)
    assert errors(whole) == ["error: it does not load for two reasons"]


@pytest.mark.slow
def test_a_whole_folder_is_verified_without_trust(whole, capsys):
    assert main([str(whole)]) == 0
    output = capsys.readouterr().out
    assert "loads with SentenceTransformer in a fresh process, cosine 1.000000" in output
    assert output.count("sha256") == len(code_files())
    assert output.endswith("verified\n")


def test_the_comparison_sees_other_vectors(whole):
    model = JinaBertModel.from_pretrained(whole)
    vectors = model.encode(list(CHECK_TEXTS))
    assert smallest_cosine(vectors, 3 * vectors) == pytest.approx(1)
    model.slopes = tuple(sorted(model.slopes))
    assert smallest_cosine(model.encode(list(CHECK_TEXTS)), vectors) < 0.9999
    assert smallest_cosine(vectors * float("nan"), vectors) != smallest_cosine(vectors, vectors)
    assert not smallest_cosine(vectors[:, :8], vectors) >= 0


KEY = "encoder.layer.1.attention.self.key.weight"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def link_out(folder):
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to("/etc/passwd")


def only_special_tokens(folder):
    """What transformers 5 makes of a folder with tokenizer_config.json alone, saved again."""
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def shard(folder, file):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = load_file(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)})
    )


def auto_map(folder, reference):
    config = json.loads((folder / "config.json").read_text())
    rewrite_json(folder / "config.json", auto_map={**config["auto_map"], "AutoModel": reference})


def module(folder, **fields):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1].update(fields)
    (folder / "modules.json").write_text(json.dumps(modules))


def pickles_alone(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def beside_an_index(folder):
    """What is wrong with the weights is found all the same."""
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    rewrite_json(folder / "config.json", vocab_size=900)


DAMAGES = {
    "vocabulary beside an index": (beside_an_index, "has token 999, the embedding 900 rows"),
    "index of pickles": (beside_an_index, "pytorch_model.bin.index.json: lists files that are pickles"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle": (lambda f: torch.save({}, f / "pytorch_model.bin"), "pytorch_model.bin: may hold a pickle"),
    "pickles alone": (pickles_alone, "pytorch_model.bin.index.json: lists files that are pickles"),
    "hidden pickle": (lambda f: (f / "notes.txt").write_bytes(pickle.dumps([1])), "notes.txt: begins like a pickle"),
    "compiled": (lambda f: (f / "alibi.so").write_bytes(b"\x7fELF"), "alibi.so: is compiled code"),
    "nan": (lambda f: rewrite(f, lambda w: w[KEY].view(-1)[7].fill_(float("nan"))), f"{KEY} has values that are not"),
    "shape": (lambda f: rewrite_json(f / "config.json", hidden_size=128), "the configuration says (128,"),
    "dtype": (lambda f: rewrite(f, lambda w: w.update({KEY: w[KEY].to(torch.int8)})), f"{KEY} is stored as I8"),
    "lacking": (lambda f: rewrite(f, lambda w: w.pop(KEY)), f"lacks 1 tensors: {KEY}"),
    "unknown": (lambda f: rewrite(f, lambda w: w.update(x=torch.ones(1))), "no JinaBERT of its layout has: x"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "no words": (only_special_tokens, "tokenizer.json: has no vocabulary beyond special tokens"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: cannot be read"),
    "vocabulary": (lambda f: rewrite_json(f / "config.json", vocab_size=900), "has token 999, the embedding 900 rows"),
    "shard outside": (lambda f: shard(f, "../part.safetensors"), "is not a file name in this folder"),
    "shard missing": (lambda f: shard(f, "other.safetensors"), "names 'other.safetensors', which is missing"),
    "link": (link_out, "vocab.txt: is a link out of the folder, to /etc/passwd"),
    "loop": (lambda f: (f / "a").symlink_to("a"), "a: is a link out of the folder"),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe: is neither a file nor a folder"),
    "code elsewhere": (lambda f: auto_map(f, "some/where--modeling.Model"), "code of another repository"),
    "odd module": (lambda f: auto_map(f, "../evil.Model"), "'../evil.Model': not MODULE.CLASS"),
    "no module": (lambda f: auto_map(f, "modeling_x.Model"), "modeling_x.py is not in the folder"),
    "module path": (lambda f: module(f, path="../1_Pooling"), "modules.json: the path '../1_Pooling' is not"),
    "module type": (lambda f: module(f, type="custom_st.Pooling"), "type 'custom_st.Pooling' is not of sentence"),
    "no modules": (lambda f: (f / "modules.json").unlink(), "modules.json: is missing"),
    "code missing": (lambda f: (f / "packing.py").unlink(), "packing.py: is missing"),
    "no code": (
        lambda f: [path.unlink() for path in f.glob("*.py")],
        "configuration_jina_bert.py is not in the folder",
    ),
    "more code": (lambda f: (f / "extra.py").write_text("import os\n"), "extra.py: differs from the package's code"),
    "syntax": (lambda f: (f / "alibi.py").write_text("def (:\n"), "alibi.py: is not Python"),
    "official": (lambda f: rewrite_json(f / "config.json", model_type="bert"), "model_type is 'bert'"),
    "config": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not readable JSON"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(folder, case):
    damage, message = DAMAGES[case]
    damage(folder)
    found = errors(folder)
    assert any(message in line for line in found), found
    assert not any("\n" in line for line in found)


def test_a_header_that_lies_is_not_believed(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert any("not a whole safetensors file" in line for line in errors(folder))


def test_not_a_folder(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().out


def test_a_snapshot_of_the_cache_is_links_to_its_blobs(whole, tmp_path):
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "abc", tmp_path / "models--me--x" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(whole, snapshot)
    (snapshot / "README.md").rename(blobs / "123")
    (snapshot / "README.md").symlink_to("../../blobs/123")
    (snapshot / "extra.py").write_text("")  # so that nothing is loaded
    assert len(errors(snapshot)) == 1
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../elsewhere")
    assert any("tokenizer.json: is a link out of the folder" in line for line in errors(snapshot))


def test_code_is_listed_with_its_imports(folder):
    (folder / "extra.py").write_text("import os.path\nfrom .alibi import x\nfrom urllib import request\neval('1')\n")
    listed = {file.path: file for file in code_of(folder)}
    assert set(listed) == {path.name for path in code_files()} | {"extra.py"}
    assert listed["extra.py"].imports == (".alibi", "eval()", "os.path", "urllib")
    assert not listed["extra.py"].is_ours
    assert all(file.is_ours for name, file in listed.items() if name != "extra.py")


@pytest.mark.parametrize("name", ["A-small4h", "B-8h"])
def test_info_of_both_forms(tmp_path, name):
    official = inspect_folder(GOLDEN / name)
    assert (official.kind, official.layout, official.loads) == ("official", name[0], True)
    assert official.heads == ("cls",)
    assert "not by AutoModel on transformers 5" in official.problems[0]
    convert(GOLDEN / name, tmp_path / "ours", dtype="bfloat16")
    ours = inspect_folder(tmp_path / "ours")
    assert (ours.kind, ours.layout, ours.loads, ours.problems) == ("ours", name[0], True, ())
    assert ours.dtypes == ("BF16",)
    model = JinaBertModel.from_pretrained(tmp_path / "ours")
    assert ours.parameters == model.num_parameters()
    assert ours.weight_bytes == 2 * ours.parameters
    assert (ours.pooling, ours.max_length) == ("mean_tokens, normalised", 8192)
    assert ours.shape["heads"] == model.config.num_attention_heads
    assert ours.missing == ("README.md",)


def test_info_of_other_folders(tmp_path, capsys):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    assert inspect_folder(tmp_path / "bert").kind == "plain BERT"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    found = inspect_folder(adapter)
    assert (found.kind, found.base_model, found.loads) == ("adapter", "me/base", False)
    (tmp_path / "empty").mkdir()
    assert inspect_folder(tmp_path / "empty").kind == "unknown"
    JinaBertForMaskedLM(tiny_config(vocab_size=100)).save_pretrained(tmp_path / "mlm")
    found = inspect_folder(tmp_path / "mlm")
    assert (found.kind, found.loads, found.heads) == ("ours", False, ("cls",))
    assert found.problems == (f"{tmp_path / 'mlm'} has no tokenizer: neither tokenizer.json nor vocab.txt.",)
    assert "tokenizer.json" in found.missing
    assert info_module.main([str(tmp_path / "nowhere")]) == 2
    assert info_module.main([str(tmp_path / "mlm"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "A"


def test_info_says_why_a_folder_does_not_load(folder):
    rewrite(folder, lambda weights: weights.pop(KEY))
    found = inspect_folder(folder)
    assert not found.loads
    assert found.problems == (f"lacks 1 tensors: {KEY}",)
    truncate(folder / "model.safetensors")
    assert "not a whole safetensors file" in inspect_folder(folder).problems[0]


def test_info_reads_no_tensor_and_runs_no_code(folder, tmp_path, monkeypatch):
    mark = tmp_path / "it ran"
    for path in folder.glob("*.py"):
        path.write_text(MARK.format(str(mark)))
    monkeypatch.setattr("hub_repo.folders.checkpoint_files.read_tensors", None)
    assert inspect_folder(folder).loads
    assert not mark.exists()
