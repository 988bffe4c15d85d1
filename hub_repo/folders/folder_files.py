"""The files of a published folder beside its weights: code, tokenizer, configuration, sentence-transformers files."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

import modeling_jina_bert
from modeling_jina_bert import JinaBertConfig

CODE_FOLDER = Path(modeling_jina_bert.__file__).parent
OFFICIAL_CODE = {False: "jinaai/jina-bert-implementation", True: "jinaai/jina-bert-v2-qk-post-norm"}
"""`qk_post_norm` -> repository of the official code of that layout."""
_PACKAGE_ONLY = ("__init__.py", "masking.py")
_MODULES = ("Transformer", "Pooling", "Normalize")
_OURS_ALONE = ("auto_map", "dtype", "qk_post_norm", "sparse_attention", "sparse_prediction", "tie_word_embeddings",
               "transformers_version")  # fmt: skip
_TRANSIENT_TOKENIZER_KEYS = (
    "backend", "is_local", "local_files_only", "max_length", "stride", "truncation_side", "truncation_strategy",
)  # fmt: skip


def code_files() -> list[Path]:
    """The remote code: every module of the package but those that only training and evaluation import."""
    return sorted(path for path in CODE_FOLDER.glob("*.py") if path.name not in _PACKAGE_ONLY)


SETTINGS = "config_sentence_transformers.json"


def write_json(path: Path, content: object):
    """Writes indented JSON; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sentence_transformers_files(
    hidden_size: int, max_length: int, *, normalize: bool = True, include_prompt: bool = True
) -> dict[str, object]:
    """Relative path -> content of the JSON files that make a folder a sentence-transformers model.

    NOTE: in the schema that releases before 6 and serving engines read; the current release reads it, too.

    Args:
        hidden_size: Width of the embeddings.
        max_length: Tokens a text is cut at by `SentenceTransformer.encode`.
        normalize: Whether embeddings are scaled to length 1.
        include_prompt: Whether the tokens of a prompt count in the mean.
    """
    kinds = _MODULES if normalize else _MODULES[:-1]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    pooling: dict[str, object] = {"word_embedding_dimension": hidden_size}
    for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"):
        pooling[f"pooling_mode_{mode}"] = mode == "mean_tokens"
    if not include_prompt:
        pooling["include_prompt"] = False
    return {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        SETTINGS: {"similarity_fn_name": "cosine", "prompts": {}},
    }


def official_config(config: JinaBertConfig) -> dict[str, Any]:
    """config.json as the published repositories have it: `model_type: bert`, and the code in another repository.

    Args:
        config: Ours; `architectures` and `dtype` are taken over.
    """
    repository = OFFICIAL_CODE[config.qk_post_norm]
    heads = {"AutoModelForMaskedLM": "ForMaskedLM", "AutoModel": "Model",
             "AutoModelForSequenceClassification": "ForSequenceClassification"}  # fmt: skip
    classes = {auto: f"{repository}--modeling_bert.JinaBert{suffix}" for auto, suffix in heads.items()}
    defaults = PreTrainedConfig().to_dict()  # what every configuration has and none of the published files states
    ours = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _OURS_ALONE and (name not in defaults or defaults[name] != value)
    }
    official = {
        # text-embeddings-inference knows the model by this name alone; its value is the repository of the code.
        "_name_or_path": repository,
        "auto_map": {"AutoConfig": f"{repository}--configuration_bert.JinaBertConfig", **classes},
        "model_type": "bert",
        "hidden_act": config.hidden_act,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "use_cache": True,
        "gradient_checkpointing": False,
    }
    merged = ours | official
    return {name: merged[name] for name in sorted(merged) if merged[name] is not None or name == "classifier_dropout"}


def write_tokenizer(tokenizer, folder: Path):
    """tokenizer.json, a tokenizer_config.json free of what this session added to it, and for WordPiece vocab.txt."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: value for name, value in config.items() if name not in _TRANSIENT_TOKENIZER_KEYS})
    vocabulary = tokenizer.get_vocab()
    if any(token.startswith("##") for token in vocabulary):  # WordPiece: older tokenizers and converters look for it
        entries = sorted(vocabulary, key=vocabulary.__getitem__)
        (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")


def write_code(folder: Path):
    """Copies the code beside the weights."""
    for path in code_files():
        shutil.copyfile(path, folder / path.name)
