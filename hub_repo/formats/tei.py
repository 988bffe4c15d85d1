"""The folder that text-embeddings-inference (Rust, candle) serves.

Law: it is the official form: `model_type: bert` with `_name_or_path` naming the repository of the official code, by
which alone that server tells a JinaBERT from a BERT. It is a folder of its own, never mixed with ours: without
trust_remote_code, transformers would load it as a BertModel with random MLPs and no error.

NOTE: that server computes GELU by its tanh approximation; `tanh_agreement` says what this does to a model's vectors.
COST: it builds a dense table of heads * max_position_embeddings ** 2 numbers when it starts: 3.2 GB for base at 8192.
"""

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_jina_bert import JinaBertModel

from ..folders import checkpoint_files as files
from ..folders.carried_settings import CarriedSettings
from ..folders.folder_files import SETTINGS, official_config, sentence_transformers_files, write_json
from .parity import Agreement, Tolerance, agreement, check_batches, check_engine, torch_embeddings

TOLERANCES = {
    "float32": Tolerance(1e-6, 0.999999),
    "float16": Tolerance(2e-3, 0.9999),
    "bfloat16": Tolerance(2e-2, 0.999),
}
"""By the dtype of the stored weights: what rounding them does to the embeddings at most."""
_REQUIRED = (
    "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "hidden_dropout_prob", "max_position_embeddings", "type_vocab_size", "initializer_range",
    "layer_norm_eps", "pad_token_id", "position_embedding_type", "model_type", "_name_or_path",
)  # fmt: skip
"""Fields of config.json without which its reader stops (backends/candle/src/models/bert.rs)."""


def write_tei(
    model: JinaBertModel, folder: Path, output: Path, *, dtype: str = "float16", kept: CarriedSettings | None = None
):
    """Writes the folder.

    Args:
        model: The float32 model; a pooler is left out.
        folder: Folder with the tokenizer files.
        output: Folder to write, which exists.
        dtype: Of the stored weights.
        kept: What the sentence-transformers files of the source said; None is the default.
    """
    kept = kept or CarriedSettings()
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = (
        ["JinaBertForMaskedLM"],
        torch.float32,
    )  # as the published embedding models say
    write_json(output / "config.json", official_config(config))
    weights = {
        name: tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("pooler.")
    }
    save_file(weights, output / files.WEIGHTS, metadata={"format": "pt"})
    for name in files.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    of_vectors = {"normalize": kept.normalize, "include_prompt": kept.include_prompt}
    shape = config.hidden_size, config.model_max_length
    for name, content in sentence_transformers_files(*shape, **of_vectors).items():
        write_json(output / name, {**content, **kept.settings} if name == SETTINGS else content)


def check_tei(output: Path, model: JinaBertModel, dtype: str) -> Agreement:
    """Checks what the server reads, and the vectors through our loader of the official form.

    The server itself is no Python package and does not run here.

    Raises:
        RuntimeError: A field that it needs is missing, or the vectors are not the model's.
    """
    config = files.read_json(output / "config.json")
    if missing := [name for name in _REQUIRED if name not in config]:
        raise RuntimeError(f"{output / 'config.json'} lacks {', '.join(missing)}.")
    if not (output / "tokenizer.json").is_file():
        raise RuntimeError(f"{output} has no tokenizer.json, which the server needs.")
    stored = JinaBertModel.from_pretrained(output, dtype=torch.float32).eval()
    return check_engine(output.name, lambda batch: torch_embeddings(stored, batch), model, TOLERANCES[dtype])


def tanh_agreement(model: JinaBertModel) -> Agreement:
    """How far the vectors move when GELU is its tanh approximation, as in candle and ggml."""
    twin = copy.deepcopy(model)
    if model.config.feed_forward_type == "geglu":
        for layer in twin.encoder.layer:
            layer.mlp.act = torch.nn.GELU(approximate="tanh")
    batches = check_batches(model.config.vocab_size, (129,))
    return agreement([torch_embeddings(twin, x) for x in batches], [torch_embeddings(model, x) for x in batches])
