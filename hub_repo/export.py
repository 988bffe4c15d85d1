"""Writes a publishable Hub folder from a checkpoint, and the files of other engines beside it.

    python -m hub_repo.export --model RUN/final --output hub_repo/tiny [--dtype float16] [--card CARD.md]
        [--onnx [fp32 fp16 int8]] [--openvino] [--gguf [f16 q8_0]] [--tei FOLDER]

Law: the folder loads on its own, with `AutoModel` and `SentenceTransformer` and trust_remote_code, offline, and gives
the vectors of the checkpoint to the rounding of the stored dtype; `export` loads it in a fresh process and compares
before it reports success. Every other engine's file is loaded in that engine and compared, too. Until then everything
lies in a hidden sibling: a failure leaves the output as it was. The sentence-transformers files are written in the
schema that releases before 6 and serving engines read.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_jina_bert import JinaBertModel

from .folders import checkpoint_files as files
from .folders.carried_settings import CarriedSettings, carried_settings
from .folders.checkpoint_files import DTYPE_NAMES, WEIGHTS, FolderError
from .folders.folder_files import (
    SETTINGS,
    code_files,
    sentence_transformers_files,
    write_code,
    write_json,
    write_tokenizer,
)
from .folders.layouts import read_fitting
from .folders.loading import CHECK_TEXTS, load_in_fresh_process, quiet_transformers, smallest_cosine
from .folders.staging import WEIGHTS_OF_A_FOLDER, staged
from .folders.tokenizer_checks import refuse_bad_tokenizer
from .formats import gguf_export, onnx_export, openvino_export, tei
from .formats.parity import Agreement, disturbed
from .hub.snapshot import fetch
from .requirements import require

_SMALLEST_COSINE = {"float32": 0.999999, "float16": 0.9999, "bfloat16": 0.999}
"""Between the float32 checkpoint and the folder, by the dtype that the weights are rounded to."""


@dataclass(frozen=True)
class Formats:
    """What is written for other engines; nothing by default.

    Attributes:
        onnx: Precisions of the ONNX files: "fp32", "fp16", "int8".
        openvino: Whether the OpenVINO form is written.
        gguf: Types of the GGUF files for llama.cpp: "f32", "f16", "q8_0".
        tei: Folder to write for text-embeddings-inference; it must not exist, or be empty.
    """

    onnx: Sequence[str] = ()
    openvino: bool = False
    gguf: Sequence[str] = ()
    tei: Path | None = None

    def check(self):
        """Refuses before minutes are spent: unknown names, and packages that are missing.

        Raises:
            FolderError: An unknown precision or type.
            ImportError: A package is missing.
        """
        for kind, given, known in (
            ("ONNX precision", self.onnx, onnx_export.FILES),
            ("GGUF type", self.gguf, gguf_export.TOLERANCES),
        ):
            if unknown := sorted(set(given) - set(known)):
                raise FolderError(f"{kind} {unknown[0]!r} is not one of {', '.join(known)}.")
        packages = {"onnx"} if self.onnx or self.openvino else set()
        packages |= {"onnxruntime"} if self.onnx else set()
        packages |= {"openvino"} if self.openvino else set()
        packages |= {"gguf"} if self.gguf else set()
        for package in sorted(packages):
            require(package, "export")


@dataclass(frozen=True)
class Written:
    """A file that was written and verified.

    Attributes:
        path: Where it is now.
        size: Of it and of the weights it belongs to, in bytes.
        agreement: How far its engine is off torch.
    """

    path: Path
    size: int
    agreement: Agreement


def export(
    model_path: str,
    output: Path,
    *,
    dtype: str = "float16",
    card: Path | None = None,
    formats: Formats | None = None,
) -> Path:
    """Writes the folder; `export_formats` with its report left out.

    Returns:
        `output`.
    """
    export_formats(model_path, output, dtype=dtype, card=card, formats=formats)
    return Path(output)


def export_formats(
    model_path: str,
    output: Path,
    *,
    dtype: str = "float16",
    card: Path | None = None,
    formats: Formats | None = None,
) -> list[Written]:
    """Writes the folder, then loads it in a fresh process and compares its vectors with the checkpoint's.

    Args:
        model_path: A checkpoint of this project, or a folder or repository of the official form.
        output: Folder to write; files of the same names are replaced, weights of an earlier export are removed, others
            are left alone.
        dtype: Of the stored weights; config.json says float32, so a plain load computes in float32.
        card: Model card to publish as README.md.
        formats: What is written for other engines.

    Returns:
        The files for other engines, verified.

    Raises:
        ValueError: An unknown dtype or format; a checkpoint that cannot be loaded, or that a format cannot hold.
        RuntimeError: What was written does not reproduce the checkpoint.
        ImportError: A package that a format needs is missing.
    """
    formats, output = formats or Formats(), Path(output)
    if dtype not in DTYPE_NAMES:
        raise FolderError(f"dtype={dtype!r} is not one of {', '.join(DTYPE_NAMES)}.")
    if card is not None and not card.is_file():
        raise FolderError(f"{card} is no file.")
    if formats.tei is not None and formats.tei.resolve() == output.resolve():
        raise FolderError(f"{output} is named for two forms: give text-embeddings-inference a folder of its own.")
    formats.check()
    model, tokenizer, kept = _load(model_path)
    with ExitStack() as stack:
        stage = stack.enter_context(staged(output, into_existing=True, stale=WEIGHTS_OF_A_FOLDER))
        _write_folder(model, tokenizer, stage, dtype, kept)
        if card is not None:
            shutil.copyfile(card, stage / "README.md")
        _verify(model, stage, output, dtype)
        if kept.settings:  # a default prompt would have been before the texts of the check
            write_json(stage / SETTINGS, {**files.read_json(stage / SETTINGS), **kept.settings})
        places = {stage: output}
        if formats.tei is not None:
            places[stack.enter_context(staged(formats.tei))] = formats.tei
        written = [
            Written(places[root] / path.relative_to(root), _size(path), agreement)
            for root, path, agreement in _write_formats(model, list(places), output, dtype, formats, kept)
        ]
    return written


def _load(model_path: str):
    """The checkpoint in float32, its tokenizer and settings, as they are published.

    The length that a training cut its texts at is none of them.
    """
    folder = fetch(model_path)
    kept = carried_settings(folder)
    _, config = read_fitting(folder)
    refuse_bad_tokenizer(folder, config)
    model = JinaBertModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = model.tokenizer
    tokenizer.model_max_length = model.config.model_max_length
    # Training leaves its truncation in the fast tokenizer; a published tokenizer has none baked in.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return model, tokenizer, kept


def _write_folder(model: JinaBertModel, tokenizer, folder: Path, dtype: str, kept: CarriedSettings):
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise FolderError(f"{name} has values that are not finite as {dtype}.")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_tokenizer(tokenizer, folder)
    shape = model.config.hidden_size, model.config.model_max_length
    of_vectors = {"normalize": kept.normalize, "include_prompt": kept.include_prompt}
    for name, content in sentence_transformers_files(*shape, **of_vectors).items():
        write_json(folder / name, content)
    write_code(folder)


def _verify(model: JinaBertModel, folder: Path, output: Path, dtype: str):
    """Loads the folder as a stranger would; compares with the float32 checkpoint, and with a disturbed one."""
    expected = model.encode(list(CHECK_TEXTS), normalize_embeddings=True)
    control = disturbed(model).encode(list(CHECK_TEXTS), normalize_embeddings=True)
    for name, vectors in load_in_fresh_process(folder).items():
        cosine = smallest_cosine(vectors, expected)
        if not cosine >= _SMALLEST_COSINE[dtype]:
            raise RuntimeError(f"{output}: other vectors than the checkpoint's, cosine {cosine} ({name}).")
        if smallest_cosine(vectors, control) >= _SMALLEST_COSINE[dtype]:
            raise RuntimeError(f"{output}: the check cannot tell the checkpoint from disturbed weights ({name}).")


def _write_formats(
    model: JinaBertModel, roots: Sequence[Path], output: Path, dtype: str, formats: Formats, kept: CarriedSettings
) -> Iterator[tuple[Path, Path, Agreement]]:
    """Writes and checks each format; yields the folder it is in, the file and how far its engine is off."""
    stage = roots[0]
    onnx = list(formats.onnx) + (["fp32"] if formats.openvino and "fp32" not in formats.onnx else [])
    for path, precision in zip(onnx_export.write_onnx(model, stage, onnx), onnx, strict=True):
        if precision in formats.onnx:
            yield stage, path, onnx_export.check_onnx(path, model, precision)
    if formats.openvino:
        half = dtype != "float32"
        source = stage / onnx_export.FILES["fp32"]
        path = openvino_export.write_openvino(source, stage, half=half)
        yield stage, path, openvino_export.check_openvino(path, model, half=half)
        if "fp32" not in formats.onnx:
            source.unlink()
    for kind in formats.gguf:
        path = stage / gguf_export.gguf_name(output, kind)
        gguf_export.write_gguf(model, stage, path, dtype=kind)
        yield stage, path, gguf_export.check_gguf(path, model, kind)
    if formats.tei is not None:
        tei.write_tei(model, stage, roots[1], dtype=dtype, kept=kept)
        yield roots[1], roots[1] / WEIGHTS, tei.check_tei(roots[1], model, dtype)


def _size(path: Path) -> int:
    companion = path.with_suffix(".bin")  # the weights of an OpenVINO file
    return path.stat().st_size + (companion.stat().st_size if companion.is_file() else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: exports and prints what was written; 2 if it cannot be."""
    parser = argparse.ArgumentParser(prog="hub_repo.export", description="Write a publishable Hub folder.")
    parser.add_argument("--model", required=True, help="checkpoint: a stage's final folder, or the official form")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", default="float16", choices=sorted(DTYPE_NAMES), help="of the stored weights")
    parser.add_argument("--card", type=Path, help="model card to publish as README.md")
    parser.add_argument(
        "--onnx", nargs="*", metavar="PRECISION", help=f"of {', '.join(onnx_export.FILES)}; all if bare"
    )
    parser.add_argument("--openvino", action="store_true", help="the OpenVINO form")
    parser.add_argument(
        "--gguf", nargs="*", metavar="TYPE", help=f"of {', '.join(gguf_export.TOLERANCES)}; f16 if bare"
    )
    parser.add_argument(
        "--tei", type=Path, metavar="FOLDER", help="folder for text-embeddings-inference, beside the output"
    )
    arguments = parser.parse_args(argv)
    onnx = () if arguments.onnx is None else arguments.onnx or tuple(onnx_export.FILES)
    gguf = () if arguments.gguf is None else arguments.gguf or ("f16",)
    quiet_transformers()
    formats = Formats(onnx=onnx, openvino=arguments.openvino, gguf=gguf, tei=arguments.tei)
    try:
        written = export_formats(
            arguments.model, arguments.output, dtype=arguments.dtype, card=arguments.card, formats=formats
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    for file in written:
        print(f"wrote and verified {file.path} ({file.size / 1e6:.1f} MB): {file.agreement}")
    print(f"wrote and verified {arguments.output} ({size / 1e6:.1f} MB)")
    return 0


__all__ = ["Formats", "Written", "code_files", "export", "export_formats", "sentence_transformers_files"]

if __name__ == "__main__":
    sys.exit(main())
