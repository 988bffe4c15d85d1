"""Writes a publishable Hub folder from a checkpoint.

    python -m hub_repo.export --model RUN/final --output hub_repo/tiny [--dtype float16] [--card CARD.md]

Law: the folder loads on its own, with `AutoModel` and `SentenceTransformer` and trust_remote_code, offline, and gives
the vectors of the checkpoint to the rounding of the stored dtype; `export` loads it in a fresh process and compares
before it reports success. The sentence-transformers files are written in the schema that releases before 6 and
serving engines read, too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import modeling_jina_bert
from modeling_jina_bert import JinaBertModel

CODE_FOLDER = Path(modeling_jina_bert.__file__).parent
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CHECK_TEXTS = ["How is the weather today?", "", "A longer text, of many words. " * 60]
_MODULES = ("Transformer", "Pooling", "Normalize")


def code_files() -> list[Path]:
    """The remote code: every module of the package but `__init__`."""
    return sorted(path for path in CODE_FOLDER.glob("*.py") if path.name != "__init__.py")


def sentence_transformers_files(hidden_size: int, max_length: int) -> dict[str, object]:
    """Relative path -> content of the JSON files that make a folder a sentence-transformers model.

    Args:
        hidden_size: Width of the embeddings.
        max_length: Tokens a text is cut at by `SentenceTransformer.encode`.
    """
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, _MODULES, strict=True))
    ]
    pooling = {"word_embedding_dimension": hidden_size}
    for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"):
        pooling[f"pooling_mode_{mode}"] = mode == "mean_tokens"
    return {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine", "prompts": {}},
    }


def export(model_path: str, output: Path, *, dtype: str = "float16", card: Path | None = None) -> Path:
    """Writes the folder, then loads it in a fresh process and compares its vectors with the checkpoint's.

    Args:
        model_path: A checkpoint of this project, or a folder or repository of the official form.
        output: Folder to write; files of the same names are replaced, others are left alone.
        dtype: Of the stored weights; config.json says float32, so a plain load computes in float32.
        card: Model card to publish as README.md.

    Returns:
        `output`.

    Raises:
        ValueError: An unknown dtype.
        RuntimeError: The written folder does not reproduce the checkpoint.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}.")
    model = JinaBertModel.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.model_max_length = model.config.model_max_length
    # Training leaves its truncation in the fast tokenizer; a published tokenizer has none baked in.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    model.tokenizer = tokenizer
    output.mkdir(parents=True, exist_ok=True)

    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(output)
    weights = {name: tensor.to(_DTYPES[dtype]).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner reads
    _write_tokenizer(tokenizer, output)
    for name, content in sentence_transformers_files(model.config.hidden_size, model.config.model_max_length).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in code_files():
        shutil.copyfile(path, output / path.name)
    if card is not None:
        shutil.copyfile(card, output / "README.md")
    _verify(model, output)
    return output


_TRANSIENT_TOKENIZER_KEYS = (
    "backend", "is_local", "local_files_only", "max_length", "stride", "truncation_side", "truncation_strategy",
)  # fmt: skip


def _write_tokenizer(tokenizer, output: Path):
    """tokenizer.json, a tokenizer_config.json free of what this session added to it, and for WordPiece vocab.txt."""
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in _TRANSIENT_TOKENIZER_KEYS}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    vocabulary = tokenizer.get_vocab()
    if any(token.startswith("##") for token in vocabulary):  # WordPiece: older tokenizers and converters look for it
        entries = sorted(vocabulary, key=vocabulary.__getitem__)
        (output / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")


_VERIFY_PROGRAM = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
folder, vectors, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
auto = AutoModel.from_pretrained(folder, trust_remote_code=True).encode(texts)
sentence = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts)
assert "modeling_jina_bert" not in sys.modules, "the installed package was used"
np.savez(vectors, AutoModel=auto, SentenceTransformer=sentence)
"""


def _verify(model: JinaBertModel, output: Path):
    """Loads the folder as a stranger would and compares: cosine at least 0.9999 to the float32 checkpoint."""
    expected = model.encode(_CHECK_TEXTS, normalize_embeddings=True)
    with tempfile.TemporaryDirectory() as scratch:
        vectors = Path(scratch) / "vectors.npz"
        process = subprocess.run(
            [sys.executable, "-c", _VERIFY_PROGRAM, str(output.resolve()), str(vectors), *_CHECK_TEXTS],
            capture_output=True,
            text=True,
            cwd=scratch,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "HF_HUB_OFFLINE": "1"},
        )
        if process.returncode:
            raise RuntimeError(f"{output} does not load in a fresh process:\n{process.stderr[-2000:]}")
        with np.load(vectors) as found:
            for name, vectors in found.items():
                cosine = (vectors * expected).sum(1) / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
                if not cosine.min() >= 0.9999:
                    raise RuntimeError(
                        f"{output}: other vectors than the checkpoint's, cosine {cosine.min()} ({name})."
                    )


def main():
    parser = argparse.ArgumentParser(description="Write a publishable Hub folder from a checkpoint.")
    parser.add_argument("--model", required=True, help="checkpoint: a stage's final folder, or the official form")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", default="float16", choices=sorted(_DTYPES), help="of the stored weights")
    parser.add_argument("--card", type=Path, help="model card to publish as README.md")
    arguments = parser.parse_args()
    folder = export(arguments.model, arguments.output, dtype=arguments.dtype, card=arguments.card)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote and verified {folder} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
