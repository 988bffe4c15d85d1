"""Files for other engines: each is loaded in its engine and gives the vectors of torch, or nothing is written.

Pins: ONNX (three precisions), OpenVINO, GGUF and the text-embeddings-inference folder of a model of the official form,
short, long and padded; the checks fail for disturbed weights; memory of the graph linear in the length; a failure
leaves the output as it was; what an engine would compute otherwise is refused.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, REPOSITORY, tiny_config
from safetensors.torch import load_file

from hub_repo import export as export_module
from hub_repo.engines import comparison
from hub_repo.engines.node import run_llama_cpp
from hub_repo.export import Formats, export_formats, main
from hub_repo.folders.carried_settings import CarriedSettings, carried_settings
from hub_repo.folders.checkpoint_files import FolderError
from hub_repo.folders.staging import staged
from hub_repo.formats import gguf_export, onnx_export, onnx_graph, openvino_export, tei
from hub_repo.formats.parity import Tolerance, check_batches, check_engine, disturbed, torch_embeddings
from hub_repo.requirements import require
from modeling_jina_bert import JinaBertModel

EXTRA = 'pip install -e ".[export]"'


def load(folder) -> JinaBertModel:
    return JinaBertModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return load(GOLDEN / "A-small4h")


@pytest.fixture(scope="module")
def onnx_folder(model, tmp_path_factory):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=EXTRA)
    folder = tmp_path_factory.mktemp("onnx")
    onnx_export.write_onnx(model, folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Everything in one command, of layout B, over an earlier export: the folder of it all, and what was printed."""
    for package in ("onnx", "onnxruntime", "openvino", "gguf"):
        pytest.importorskip(package, reason=EXTRA)
    root = tmp_path_factory.mktemp("exported")
    (root / "hub" / "onnx").mkdir(parents=True)
    for name in ("onnx/model_q4.onnx", "old.gguf", "LICENSE", "model-00001-of-00002.safetensors"):
        (root / "hub" / name).write_text("earlier")
    (root / "hub" / "config.json").write_text('{"model_type": "jina_bert"}')
    (root / "card.md").write_text("# A card\n")
    arguments = [
        "--model",
        GOLDEN / "B-8h",
        "--output",
        root / "hub",
        "--dtype",
        "bfloat16",
        "--card",
        root / "card.md",
    ]
    formats = ["--onnx", "fp32", "--openvino", "--gguf", "--tei", root / "tei"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(argument) for argument in arguments + formats]) == 0
    return root, printed.getvalue()


@pytest.mark.parametrize("precision", onnx_export.FILES)
def test_onnx_gives_the_vectors_of_torch(model, onnx_folder, precision):
    path = onnx_folder / onnx_export.FILES[precision]
    found = onnx_export.check_onnx(path, model, precision)
    assert found.within(onnx_export.TOLERANCES[precision])
    with pytest.raises(RuntimeError, match="does not reproduce the model"):
        onnx_export.check_onnx(path, disturbed(model), precision, lengths=(7,))


@pytest.mark.parametrize("name", ["A-small4h", "B-8h"])
def test_onnx_equals_the_official_code(name, onnx_folder, exported):
    """Hidden states against float64 outputs of the official code, with padding on the left as well."""
    import onnxruntime

    golden = load_file(GOLDEN / name / "golden.safetensors")
    folder = onnx_folder if name.startswith("A") else exported[0] / "hub"
    session = onnxruntime.InferenceSession(str(folder / onnx_export.FILES["fp32"]))
    for case in ("batch", "leftpad"):
        inputs = {key: golden[f"{case}.{key}"].numpy() for key in onnx_graph.INPUTS}
        states = session.run(None, inputs)[0]
        valid = inputs["attention_mask"].astype(bool)
        expected = golden[f"f64.{case}.last_hidden_state"].numpy()
        assert np.abs(states - expected)[valid].max() < 3e-5


def test_onnx_files_are_small_and_linear(model, onnx_folder):
    import onnx

    weights = sum(parameter.numel() for parameter in model.parameters())
    down = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(onnx_export._DOWN))
    assert down
    for precision, bytes_per_weight in (("fp32", 4), ("fp16", 2), ("int8", 1 + 3 * down / weights)):
        content = (onnx_folder / onnx_export.FILES[precision]).read_bytes()
        size = len(content)
        # No table of positions or distances, and none of the exporter's stack traces, which tell of this machine.
        assert size < bytes_per_weight * weights + 80_000, precision
        assert str(Path(onnx_export.__file__).parent).encode() not in content
    graph = onnx.shape_inference.infer_shapes(onnx.load(onnx_folder / onnx_export.FILES["fp32"])).graph
    assert [x.name for x in graph.input] == list(onnx_graph.INPUTS)
    dynamic = [[dim.dim_param for dim in x.type.tensor_type.shape.dim] for x in graph.input]
    batch, length = dynamic[0]
    assert batch
    assert length
    assert dynamic == [[batch, length]] * 3
    loops = [node for node in graph.node if node.op_type == "Loop"]
    assert len(loops) == model.config.num_hidden_layers
    shapes = [[dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim] for x in graph.value_info]
    assert any(shape.count(length) == 1 for shape in shapes)
    assert not any(shape.count(length) > 1 for shape in shapes)


def test_int8_survives_a_unit_that_is_far_larger_than_the_others(model, tmp_path):
    """A unit of the gated MLP times 300, its column of the down projection over 300: the same function."""
    pytest.importorskip("onnxruntime", reason=EXTRA)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for layer in scaled.encoder.layer:
            unit = scaled.config.intermediate_size + 3  # of the half without an activation
            layer.mlp.gated_layers.weight[unit] *= 300
            layer.mlp.wo.weight[:, 3] /= 300
    onnx_export.write_onnx(scaled, tmp_path, ["int8"])
    agreement = onnx_export.check_onnx(tmp_path / onnx_export.FILES["int8"], model, "int8", lengths=(7, 129))
    assert agreement.cosine > 0.99


def test_openvino_gives_the_vectors_of_torch(model, onnx_folder):
    pytest.importorskip("openvino", reason=EXTRA)
    path = openvino_export.write_openvino(onnx_folder / onnx_export.FILES["fp32"], onnx_folder, half=True)
    assert path.with_suffix(".bin").stat().st_size < 2 * sum(p.numel() for p in model.parameters()) + 100_000
    assert openvino_export.check_openvino(path, model, half=True, lengths=(7, 1025)).error < 2e-3
    with pytest.raises(RuntimeError, match="does not reproduce the model"):
        openvino_export.check_openvino(path, disturbed(model), half=True, lengths=())


@pytest.mark.parametrize("name", ["A-small4h", "B-8h"])
@pytest.mark.parametrize("dtype", gguf_export.TOLERANCES)
def test_gguf_holds_every_tensor(tmp_path, name, dtype):
    gguf = pytest.importorskip("gguf", reason=EXTRA)
    source, path = load(GOLDEN / name), tmp_path / "model.gguf"
    gguf_export.write_gguf(source, GOLDEN / name, path, dtype=dtype)
    gguf_export.check_gguf(path, source, dtype)
    with pytest.raises(RuntimeError, match="is not the model's, rounded to"):
        gguf_export.check_gguf(path, disturbed(source), dtype)

    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "jina-bert-v2"
    assert fields["jina-bert-v2.attention.head_count"] == source.config.num_attention_heads
    assert fields["jina-bert-v2.pooling_type"] == 1  # the mean
    assert fields["jina-bert-v2.attention.causal"] is False
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == source.config.vocab_size
    vocabulary = (GOLDEN / name / "vocab.txt").read_text().splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = next(i for i, token in enumerate(vocabulary) if token.startswith("##"))
    first = next(i for i, token in enumerate(vocabulary) if token.isalpha())
    assert (tokens[inner], tokens[first]) == (vocabulary[inner][2:], "\u2581" + vocabulary[first])
    assert fields["tokenizer.ggml.bos_token_id"] == vocabulary.index("[CLS]")
    if dtype == "f32":  # llama.cpp computes gelu(ffn_gate x) * (ffn_up x)
        mlp = source.encoder.layer[0].mlp
        both = mlp.up_gated_layer.weight if source.config.qk_post_norm else mlp.gated_layers.weight
        activated = both.chunk(2)[1 if source.config.qk_post_norm else 0]
        stored = {tensor.name: tensor for tensor in reader.tensors}
        np.testing.assert_array_equal(stored["blk.0.ffn_gate.weight"].data, activated.detach().numpy())


def test_gguf_refuses_what_llama_cpp_computes_otherwise(tmp_path, model):
    pytest.importorskip("gguf", reason=EXTRA)
    reglu = JinaBertModel(tiny_config(vocab_size=1000, feed_forward_type="reglu"))
    with pytest.raises(FolderError, match="GEGLU only"):
        gguf_export.write_gguf(reglu, GOLDEN / "A-small4h", tmp_path / "x.gguf")
    tokenizer = json.loads((GOLDEN / "A-small4h" / "tokenizer.json").read_text())
    shutil.copyfile(GOLDEN / "A-small4h" / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    for change, message in (
        ({"normalizer": {**tokenizer["normalizer"], "lowercase": False}}, "lowercase"),
        ({"normalizer": {**tokenizer["normalizer"], "strip_accents": False}}, "strip_accents"),
        ({"model": {**tokenizer["model"], "type": "Unigram"}}, "Unigram"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, **change}))
        with pytest.raises(FolderError, match=message):
            gguf_export.write_gguf(model, tmp_path, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    with pytest.raises(FolderError, match="type 'q4' is not one of"):
        gguf_export.write_gguf(model, GOLDEN / "A-small4h", tmp_path / "x.gguf", dtype="q4")


@pytest.mark.parametrize("name", ["A-small4h", "B-8h"])
def test_the_folder_for_text_embeddings_inference(tmp_path, name):
    source = load(GOLDEN / name)
    tei.write_tei(source, GOLDEN / name, tmp_path)
    assert tei.check_tei(tmp_path, source, "float16").error < 2e-3
    with pytest.raises(RuntimeError, match="does not reproduce the model"):
        tei.check_tei(tmp_path, disturbed(source), "float16")
    config, original = (json.loads((x / "config.json").read_text()) for x in (tmp_path, GOLDEN / name))
    assert (config["_name_or_path"], config["model_type"]) == (original["_name_or_path"], "bert")
    assert config["auto_map"] == original["auto_map"]
    assert json.loads((tmp_path / "modules.json").read_text())[1]["type"] == "sentence_transformers.models.Pooling"
    assert not list(tmp_path.glob("*.py"))
    kept = CarriedSettings(False, False, False, None, {"prompts": {"query": "Q: "}, "default_prompt_name": "query"})
    tei.write_tei(source, GOLDEN / name, tmp_path, kept=kept)
    written = carried_settings(tmp_path)
    assert (written.normalize, written.include_prompt) == (False, False)
    assert {key: written.settings[key] for key in kept.settings} == kept.settings
    del config["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="lacks hidden_act"):
        tei.check_tei(tmp_path, source, "float16")
    relu = JinaBertModel(tiny_config(vocab_size=1000, feed_forward_type="reglu"))
    tei.write_tei(relu, GOLDEN / name, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "relu"  # the server goes by this field


def test_a_check_that_the_control_passes_is_an_error(model):
    def engine(batch):
        return torch_embeddings(model, batch)

    assert check_engine("torch", engine, model, Tolerance(0.0, 0.999999), lengths=(7,)).error == 0
    with pytest.raises(RuntimeError, match="cannot tell the model from one with disturbed weights"):
        check_engine("torch", engine, model, Tolerance(2.0, -1.0), lengths=(7,))
    with pytest.raises(RuntimeError, match="does not reproduce"):
        check_engine("torch", lambda batch: engine(batch) * np.nan, model, Tolerance(2.0, -1.0), lengths=(7,))
    batches = check_batches(1000)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 129), (1, 7), (1, 129), (1, 2049)]
    assert batches[0]["attention_mask"].sum(axis=1).tolist() == [129, 31, 7]


def test_everything_in_one_export(exported):
    """Files of an earlier export go, the reader's own stay, and nothing else is left beside the folders."""
    root, printed = exported
    output = root / "hub"
    assert printed.count("wrote and verified") == 5
    assert "onnx/model.onnx" in printed
    kinds = (".safetensors", ".onnx", ".gguf", ".bin", ".xml")
    weights = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.suffix in kinds}
    openvino = {"openvino/openvino_model.xml", "openvino/openvino_model.bin"}
    assert weights == {"model.safetensors", "onnx/model.onnx", "hub-F16.gguf", *openvino}
    assert (output / "LICENSE").read_text() == "earlier"
    assert (output / "README.md").read_text() == "# A card\n"
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert load(root / "tei").config.qk_post_norm
    assert sorted(path.name for path in root.iterdir()) == ["card.md", "hub", "tei"]


def test_an_engine_that_differs_leaves_no_folder(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason=EXTRA)
    monkeypatch.setattr(export_module, "_verify", lambda *_: None)  # the fresh process; not what fails here
    write = gguf_export.write_gguf
    monkeypatch.setattr(
        gguf_export, "write_gguf", lambda model, *arguments, **options: write(disturbed(model), *arguments, **options)
    )
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_text("earlier")
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "jina_bert"}')
    with pytest.raises(RuntimeError, match=r"hub-F16\.gguf: .* is not the model's"):
        export_formats(
            str(GOLDEN / "A-small4h"), tmp_path / "hub", formats=Formats(gguf=("f16",), tei=tmp_path / "tei")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("config", [None, '{"model_type": "llama"}', "[]", "no JSON"])
def test_weights_of_another_model_are_not_removed(tmp_path, config):
    folder = tmp_path / "models"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "theirs.onnx").write_text("theirs")
    (folder / "adapter_model.safetensors").write_text("theirs")
    if config is not None:
        (folder / "config.json").write_text(config)
    before = sorted(folder.rglob("*"))
    with pytest.raises(FolderError, match=r"models holds onnx/theirs\.onnx, which would be removed"):
        export_formats(str(GOLDEN / "A-small4h"), folder)
    assert sorted(folder.rglob("*")) == before
    with staged(folder, into_existing=True, stale=("*-of-*.safetensors",)) as stage:
        (stage / "new").write_text("new")
    assert (folder / "adapter_model.safetensors").read_text() == "theirs"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def fail_half_way():
        with staged(tmp_path / "new") as stage:
            (stage / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "new") as stage:
        (stage / "file").write_text("whole")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text() == "whole"
    assert (tmp_path / "new").stat().st_mode & 0o755 == 0o755
    with pytest.raises(FolderError, match="is not empty"), staged(tmp_path / "new"):
        pass
    with pytest.raises(FolderError, match="is a file"), staged(tmp_path / "new" / "file", into_existing=True):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "fp8"], "ONNX precision 'fp8' is not one of fp32, fp16, int8"),
        (["--gguf", "q4"], "GGUF type 'q4' is not one of f32, f16, q8_0"),
        (["--card", "nowhere.md"], "nowhere.md is no file"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["--model", str(GOLDEN / "A-small4h"), "--output", str(tmp_path / "hub"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_table_of_engines(tmp_path, capsys):
    for package in ("onnx", "onnxruntime", "openvino", "gguf"):
        pytest.importorskip(package, reason=EXTRA)
    arguments = ["--model", GOLDEN / "A-small4h", "--output", tmp_path, "--lengths", 16, 129, "--rounds", 1]
    assert comparison.main([str(argument) for argument in arguments]) == 0
    rows = {row["engine"]: row for row in json.loads((tmp_path / "engines.json").read_text())["rows"]}
    assert len(rows) == 7
    assert rows["torch, float32"]["error"] == 0
    assert rows["onnxruntime, fp32"]["error"] < 1e-5 < rows["onnxruntime, int8"]["error"] < 5e-2
    assert all(row["cosine"] > 0.99 for row in rows.values())
    for name in ("torch, float32", "onnxruntime, int8", "OpenVINO, fp32"):
        assert all(speed > 0 for speed in rows[name]["speed"].values())
    assert (tmp_path / "engines.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A-small4h", "B-8h"])
def test_llama_cpp_itself(tmp_path, name):
    """Set NODE_ENGINES to a folder in which `npm install --ignore-scripts node-llama-cpp` was run."""
    pytest.importorskip("gguf", reason=EXTRA)
    if not os.environ.get("NODE_ENGINES"):
        pytest.skip("NODE_ENGINES names no folder with node_modules")
    source, path = load(GOLDEN / name), tmp_path / "model.gguf"
    gguf_export.write_gguf(source, GOLDEN / name, path, dtype="f32")
    batches = check_batches(source.config.vocab_size)[1:]
    for batch in batches:
        batch["input_ids"][:, 0], batch["input_ids"][:, -1] = 2, 3  # [CLS], [SEP]
    texts = ["hello world", "The quick Brown fox,\nüber"]
    result = run_llama_cpp(
        Path(os.environ["NODE_ENGINES"]), path, [batch["input_ids"][0] for batch in batches], texts=texts
    )
    assert result.tokens == source.tokenizer(texts, add_special_tokens=False)["input_ids"]
    twin = copy.deepcopy(source)
    for layer in twin.encoder.layer:
        layer.mlp.act = torch.nn.GELU(approximate="tanh")  # as ggml has it, from a float16 table
    errors = [np.abs(v - torch_embeddings(twin, b)).max() for v, b in zip(result.vectors, batches, strict=True)]
    assert errors[0] < 1e-3
    assert errors[-1] < 5e-5
    wrong = torch_embeddings(disturbed(twin), batches[0])
    assert np.abs(result.vectors[0] - wrong).max() > 1e-2


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r'no_such_package is needed: pip install -e "\.\[export\]"'):
        require("no_such_package.part", "export")


def test_openvino_does_not_call_home(tmp_path):
    pytest.importorskip("openvino", reason=EXTRA)
    code = (
        "import sys; from hub_repo.formats.openvino_export import import_openvino; import_openvino().convert_model;"
        "import openvino.tools.ovc.telemetry_utils as t; print(t.tm.__name__)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert process.stdout.split() == ["openvino.tools.ovc.telemetry_stub"], process.stderr
