"""GGUF for llama.cpp (architecture jina-bert-v2): writing, and reading back what was written.

Law: every tensor of the encoder is in the file, under llama.cpp's name, and re-reading the file gives it back to the
rounding of its type; what llama.cpp would compute otherwise is refused. Its own GELU is the tanh approximation, from a
float16 table: on the models of the tests its vectors are off by 3e-4 a component with an f32 file, in either layout.

NOTE: the gated linear unit is stored as two tensors, ffn_gate and ffn_up. Of one ffn_up, llama.cpp takes the first
half for the gate, which is wrong for the layout of jina-bert-v2-qk-post-norm.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_jina_bert import JinaBertModel

from ..folders.checkpoint_files import FolderError, read_json
from ..requirements import require
from .parity import Agreement, Tolerance, check_engine, torch_embeddings

ARCHITECTURE = "jina-bert-v2"
TOLERANCES = {"f32": Tolerance(1e-6, 0.999999), "f16": Tolerance(1e-3, 0.9999), "q8_0": Tolerance(3e-2, 0.999)}
"""Types of the matrices, and how far the vectors of the re-read tensors may be off. Vectors and norms are float32."""
_FLOAT32_ALWAYS = ("token_types.weight",)  # llama.cpp adds a row of it without converting
_SUFFIXES = (".weight", ".bias")


def gguf_name(path: Path, dtype: str) -> str:
    """File name as is usual for GGUF: NAME-F16.gguf."""
    return f"{path.absolute().name}-{dtype.upper()}.gguf"


def write_gguf(model: JinaBertModel, folder: Path, path: Path, *, dtype: str = "f16"):
    """Writes the encoder and its tokenizer as one file.

    Args:
        model: The float32 model; a pooler is left out, as embeddings do not use it.
        folder: Folder with the tokenizer files.
        path: File to write.
        dtype: Of the matrices: "f32", "f16" or "q8_0".

    Raises:
        FolderError: llama.cpp would not compute this model or split its texts otherwise; the reason.
        ImportError: The package gguf is not installed.
    """
    gguf = require("gguf", "export")
    _refuse_unsupported(model, dtype)
    vocabulary = _vocabulary(folder, model.config.vocab_size)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in (_hyperparameters(model, path.stem, dtype) | vocabulary).items():
        _add(writer, key, value)
    for name, tensor in llama_tensors(model).items():
        kind = _tensor_type(name, tensor, dtype)
        data = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        if not np.isfinite(data.astype(np.float32)).all():
            raise FolderError(f"{path.name}: {name} is not finite as {kind.name}: export another type.")
        writer.add_tensor(name, data, raw_dtype=kind)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def llama_tensors(model: JinaBertModel) -> dict[str, torch.Tensor]:
    """The encoder under llama.cpp's names, from the mapping of the package gguf; the gated linear unit in two."""
    gguf = require("gguf", "export")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.JINA_BERT_V2, model.config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("pooler."):
            continue
        target = names.get_name(name, try_suffixes=_SUFFIXES)
        if target is None:
            raise FolderError(f"the installed gguf has no name for {name}: pip install -U gguf")
        if target.endswith("ffn_up.weight"):
            gate, up = _halves(tensor, model.config.qk_post_norm)
            tensors[target.replace("ffn_up", "ffn_gate")], tensors[target] = gate, up
        else:
            tensors[target] = tensor
    return tensors


def read_gguf(path: Path, model: JinaBertModel) -> JinaBertModel:
    """A model of the same configuration with the tensors of the file.

    Args:
        path: A file of `write_gguf`.
        model: For the configuration and the names; not changed.

    Raises:
        RuntimeError: A tensor is missing, is not of the model, or has another shape.
    """
    gguf = require("gguf", "export")
    expected = llama_tensors(model)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if odd := sorted(set(stored) ^ set(expected)):
        raise RuntimeError(f"{path.name} does not hold the tensors of the model: {', '.join(odd)}.")
    found = {}
    for name, tensor in stored.items():
        data = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if data.shape != tuple(expected[name].shape):
            raise RuntimeError(f"{path.name}: {name} is {data.shape}, the model's is {tuple(expected[name].shape)}.")
        found[name] = torch.from_numpy(data)
    twin = JinaBertModel(model.config, add_pooling_layer=False)
    state = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.JINA_BERT_V2, model.config.num_hidden_layers)
    for name in twin.state_dict():
        target = names.get_name(name, try_suffixes=_SUFFIXES)
        if target.endswith("ffn_up.weight"):
            halves = [found[target.replace("ffn_up", "ffn_gate")], found[target]]
            state[name] = torch.cat(halves[::-1] if model.config.qk_post_norm else halves)
        else:
            state[name] = found[target]
    twin.load_state_dict(state)
    return twin.eval()


def check_gguf(path: Path, model: JinaBertModel, dtype: str) -> Agreement:
    """Re-reads every tensor and the header, and compares the vectors computed from them with the model's.

    Raises:
        RuntimeError: They differ by more than the rounding of the type, or the control passes.
    """
    gguf = require("gguf", "export")
    twin = read_gguf(path, model)
    expected = llama_tensors(model)
    for name, tensor in llama_tensors(twin).items():
        kind = _tensor_type(name, tensor, dtype)
        rounded = gguf.quants.dequantize(gguf.quants.quantize(expected[name].numpy(), kind), kind)
        if not np.array_equal(tensor.numpy(), rounded):
            raise RuntimeError(f"{path.name}: {name} is not the model's, rounded to {kind.name}.")
    fields = gguf.GGUFReader(path).fields
    for key, value in _hyperparameters(model, path.stem, dtype).items():
        stored = fields[key].contents()
        if stored != (np.float32(value) if isinstance(value, float) else value):
            raise RuntimeError(f"{path.name}: {key} is {stored!r}, not {value!r}.")
    if len(fields["tokenizer.ggml.tokens"].data) != model.config.vocab_size:
        raise RuntimeError(f"{path.name} has another number of tokens than of rows of the word embedding.")
    return check_engine(path.name, lambda batch: torch_embeddings(twin, batch), model, TOLERANCES[dtype])


def _refuse_unsupported(model: JinaBertModel, dtype: str):
    if dtype not in TOLERANCES:
        raise FolderError(f"gguf type {dtype!r} is not one of {', '.join(TOLERANCES)}.")
    if model.config.feed_forward_type != "geglu":
        raise FolderError(f"gguf: llama.cpp's {ARCHITECTURE} is GEGLU only, this model is "
                          f"{model.config.feed_forward_type}.")  # fmt: skip
    if dtype == "q8_0" and model.config.hidden_size % 32:
        raise FolderError(f"gguf: q8_0 needs a multiple of 32, hidden_size is {model.config.hidden_size}.")


def _halves(tensor: torch.Tensor, qk_post_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The half that the activation is applied to, and the other one."""
    first, second = tensor.chunk(2)
    return (second, first) if qk_post_norm else (first, second)


def _tensor_type(name: str, tensor: torch.Tensor, dtype: str):
    gguf = require("gguf", "export")
    small = tensor.dim() == 1 or name in _FLOAT32_ALWAYS
    return gguf.GGMLQuantizationType["F32" if small else dtype.upper()]


def _hyperparameters(model: JinaBertModel, name: str, dtype: str) -> dict[str, Any]:
    gguf, config = require("gguf", "export"), model.config
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    of_the_architecture = {
        "block_count": config.num_hidden_layers,
        "context_length": config.model_max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "attention.causal": False,
        "pooling_type": int(gguf.PoolingType.MEAN),
    }
    return {
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[file_types[dtype]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{ARCHITECTURE}.{key}": value for key, value in of_the_architecture.items()},
        "tokenizer.ggml.token_type_count": config.type_vocab_size,
    }


def _add(writer, key: str, value: Any):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """The tokenizer in llama.cpp's terms: tokens, types, special ids and, for byte-level BPE, merges."""
    gguf = require("gguf", "export")
    content = read_json(folder / "tokenizer.json")
    kind = content.get("model", {}).get("type")
    tokens: dict[int, str] = {id: token for token, id in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    tokens |= {id: token["content"] for id, token in added.items()}
    if max(tokens) >= rows:
        raise FolderError(f"{folder / 'tokenizer.json'} has token {max(tokens)}, the word embedding {rows} rows.")
    special = {id for id, token in added.items() if token["special"]}
    types = [gguf.TokenType.UNUSED] * rows
    for id in tokens:
        types[id] = gguf.TokenType.CONTROL if id in special else gguf.TokenType.NORMAL
    texts = [tokens.get(id, f"[PAD{id}]") for id in range(rows)]
    if kind == "WordPiece":
        _refuse_other_word_pieces(folder, content)
        # llama.cpp writes the start of a word where WordPiece writes its continuation.
        marked = (x.removeprefix("##") if x.startswith("##") else f"\N{LOWER ONE EIGHTH BLOCK}{x}" for x in texts)
        texts = [text if id in special else mark for id, (text, mark) in enumerate(zip(texts, marked, strict=True))]
        result: dict[str, Any] = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "jina-v2-en"}
    else:
        _refuse_other_byte_level_bpe(folder, content)
        merges = [x if isinstance(x, str) else " ".join(x) for x in content["model"]["merges"]]
        result = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": merges}
    result |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": [int(x) for x in types]}
    return result | _special_tokens(folder, {token: id for id, token in tokens.items()})


def _special_tokens(folder: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Ids and flags; the classification token opens a text and the separator closes it, as in BERT and RoBERTa."""
    config = read_json(folder / "tokenizer_config.json")
    found = {}
    for role in ("cls", "sep", "unk", "pad", "mask"):
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[role] = ids[token]
    if not {"cls", "sep"} <= set(found):
        raise FolderError(f"{folder / 'tokenizer_config.json'} names no cls_token and sep_token of the vocabulary.")
    keys = {
        "cls": ("bos", "cls"),
        "sep": ("eos", "seperator"),
        "unk": ("unknown",),
        "pad": ("padding",),
        "mask": ("mask",),
    }
    result: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": id for role, id in found.items() for key in keys[role]}
    return result | {f"tokenizer.ggml.add_{x}_token": True for x in ("bos", "eos")}


def _refuse_other_word_pieces(folder: Path, content: dict):
    """llama.cpp's WordPiece lower-cases, strips accents and splits Chinese characters: the tokenizer must, too."""
    normalizer = content.get("normalizer") or {}
    wanted = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    odd = [name for name, value in wanted.items() if normalizer.get(name) != value]
    if normalizer.get("strip_accents") is False:
        odd.append("strip_accents")
    if odd or content["model"].get("continuing_subword_prefix") != "##":
        found = json.dumps(
            {name: normalizer.get(name) for name in odd} or content["model"].get("continuing_subword_prefix")
        )
        raise FolderError(f"{folder / 'tokenizer.json'}: llama.cpp's WordPiece splits texts otherwise ({found}).")


def _refuse_other_byte_level_bpe(folder: Path, content: dict):
    """GPT-2's byte-level BPE without a normalizer is what llama.cpp's pre-tokenizer "gpt-2" does."""
    pre = content.get("pre_tokenizer") or {}
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    if content.get("model", {}).get("type") != "BPE" or not plain or content.get("normalizer"):
        found: Sequence[Any] = [content.get("model", {}).get("type"), pre.get("type"), content.get("normalizer")]
        raise FolderError(
            f"{folder / 'tokenizer.json'}: only lower-casing WordPiece and plain byte-level BPE are known to split "
            f"texts in llama.cpp as here; found {json.dumps(found)}."
        )
