"""A folder or repository of the official form becomes a folder of ours, and back.

    python -m hub_repo.convert --to ours --source jinaai/jina-embeddings-v2-small-en --output FOLDER
    python -m hub_repo.convert --to official --source hub_repo/tiny --output FOLDER

Law: every tensor of the source is renamed, cast, dropped or copied, and the report says which; one that is none of
these is an error that names it, and so is a layout that we do not know. The output computes what the source computed.

NOTE: the official form says `model_type: bert`. Without trust_remote_code, transformers loads it as a BertModel with
random MLPs and no error; with it, it needs transformers 4 and the code of another repository.
"""

import argparse
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modeling_jina_bert import JinaBertConfig, JinaBertModel

from .folders import checkpoint_files as files
from .folders.carried_settings import carried_settings
from .folders.checkpoint_files import FolderError, StoredTensor
from .folders.folder_files import SETTINGS, official_config, sentence_transformers_files, write_code, write_json
from .folders.layouts import PREFIX, compare, read_config
from .folders.loading import quiet_transformers
from .folders.staging import staged
from .folders.tokenizer_checks import refuse_bad_tokenizer
from .formats.parity import MIXED_LENGTHS, check_batches, torch_embeddings
from .hub.snapshot import fetch

logger = logging.getLogger(__name__)
TARGETS = ("ours", "official")
_CARRIED = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclasses.dataclass(frozen=True)
class TensorChange:
    """What became of one tensor.

    Attributes:
        source: Its name in the source.
        target: Its name in the output; None if it was dropped.
        dtypes: Stored dtype in the source and in the output, as safetensors writes them.
        reason: Why it was dropped; "" otherwise.
    """

    source: str
    target: str | None
    dtypes: tuple[str, str]
    reason: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether it was copied as it is."""
        return self.target == self.source and self.dtypes[0] == self.dtypes[1]

    def __str__(self) -> str:
        if self.target is None:
            return f"dropped {self.source}: {self.reason}"
        parts = []
        if self.target != self.source:
            parts.append(f"renamed {self.source} to {self.target}")
        if self.dtypes[0] != self.dtypes[1]:
            parts.append(f"{'cast' if parts else f'cast {self.source}'} from {self.dtypes[0]} to {self.dtypes[1]}")
        return ", ".join(parts) or f"copied {self.source}"


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: Folder that was read.
        output: Folder that was written.
        target: "ours" or "official".
        layout: "A" (jina-bert-implementation) or "B" (jina-bert-v2-qk-post-norm).
        tensors: One entry for each tensor of the source.
        fields: A line for each field of config.json that changed.
        notes: What else is different.
        largest_difference: Of a component of the embeddings (length 1) of random tokens, source against output.
    """

    source: Path
    output: Path
    target: str
    layout: str
    tensors: tuple[TensorChange, ...]
    fields: tuple[str, ...]
    notes: tuple[str, ...]
    largest_difference: float

    def lines(self) -> list[str]:
        """The report as text: each tensor that is not a plain copy, then the configuration, then the comparison."""
        changed = [str(tensor) for tensor in self.tensors if not tensor.is_plain]
        copied = len(self.tensors) - len(changed)
        return [
            f"{self.source} -> {self.output}: layout {self.layout}, {len(self.tensors)} tensors, "
            f"{copied} copied as they are",
            *changed,
            *(f"config.json: {line}" for line in self.fields),
            *self.notes,
            f"largest difference of the embeddings, source against output: {self.largest_difference:.1e}",
        ]


def convert(
    source: str | Path,
    output: Path,
    *,
    target: str = "ours",
    dtype: str | None = None,
    keep_head: bool = False,
    revision: str | None = None,
) -> ConversionReport:
    """Writes a folder of the other form.

    Args:
        source: A folder, or the name of a Hub repository.
        output: Folder to write; it must not exist, or be empty.
        target: "ours": loads on transformers 5 with AutoModel and SentenceTransformer. "official": the configuration
            of the published repositories, for what reads only those.
        dtype: Of the stored weights, "float32", "float16" or "bfloat16"; None keeps what is stored.
        keep_head: Keep an MLM or task head, with the `bert.` prefix on the encoder; else heads are dropped.
        revision: Of a Hub repository.

    Returns:
        What was done with every tensor and field.

    Raises:
        ValueError: Unknown arguments, an unknown layout, tensors that cannot be accounted for, no tokenizer that fits.
        RuntimeError: The output does not compute what the source did.
    """
    if target not in TARGETS:
        raise FolderError(f"target={target!r} is not one of {', '.join(TARGETS)}.")
    if dtype is not None and dtype not in files.DTYPE_NAMES:
        raise FolderError(f"dtype={dtype!r} is not one of {', '.join(files.DTYPE_NAMES)}.")
    folder = fetch(source, revision)
    stored = files.stored_tensors(folder)
    config = read_config(folder, set(stored))
    refuse_bad_tokenizer(folder, config)
    changes = plan(folder, stored, config, dtype=dtype, keep_head=keep_head)
    with staged(output) as stage:
        written = _write_weights(folder, stored, changes, stage)
        fields = _write_config(folder, stage, config, changes, target, written)
        notes = _write_other_files(folder, stage, config, target)
        difference = _largest_difference(folder, stage)
        if not difference <= _allowed(changes):
            raise RuntimeError(f"{output} would not compute what {folder} does: embeddings differ by {difference}.")
    layout = "B" if config.qk_post_norm else "A"
    return ConversionReport(folder, output, target, layout, changes, fields, tuple(notes), difference)


def plan(
    folder: Path, stored: dict[str, StoredTensor], config: JinaBertConfig, *, dtype: str | None, keep_head: bool
) -> tuple[TensorChange, ...]:
    """What becomes of every tensor.

    Args:
        folder: For the errors.
        stored: All tensors of the source.
        config: Its configuration.
        dtype: Of the output's weights; None keeps what is stored.
        keep_head: Whether heads are kept.

    Raises:
        FolderError: A tensor is missing, unexpected or of another shape.
    """
    found = compare(stored, config)
    if problems := found.problems():
        raise FolderError(f"{folder} is no JinaBERT that we know: {'; '.join(problems)}.")
    keep_head = keep_head and bool(found.heads)
    prefix = PREFIX if keep_head else ""
    targets: dict[str, str] = {name: prefix + bare for name, bare in found.encoder.items()}
    dropped = dict(found.dropped)
    for head, names in found.heads.items():
        for name in names:
            if keep_head:
                targets[name] = name
            else:
                dropped[name] = f"part of the head {head!r}, which embeddings do not use"
    changes = []
    for name in sorted(stored):
        before = stored[name].dtype
        after = files.DTYPE_NAMES[dtype] if dtype is not None and before in files.DTYPES else before
        target = targets.get(name)
        changes.append(TensorChange(name, target, (before, after if target else before), dropped.get(name, "")))
    return tuple(changes)


def _write_weights(
    folder: Path, stored: dict[str, StoredTensor], changes: Iterable[TensorChange], stage: Path
) -> set[str]:
    """Writes model.safetensors; returns the dtypes in it, as safetensors writes them."""
    by_source = {change.source: change for change in changes if change.target is not None}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in files.read_tensors(folder, {name: stored[name] for name in by_source}):
        change = by_source[name]
        cast = tensor.to(files.DTYPES.get(change.dtypes[1], tensor.dtype)).contiguous()
        if not torch.isfinite(cast).all():
            was = "overflows" if torch.isfinite(tensor).all() else "is not finite"
            raise FolderError(f"{folder}: {name} {was} as {change.dtypes[1]}.")
        weights[str(change.target)] = cast.clone() if cast.data_ptr() == tensor.data_ptr() else cast
    save_file(weights, stage / files.WEIGHTS, metadata={"format": "pt"})
    return {by_source[name].dtypes[1] for name in by_source}


def _write_config(
    folder: Path, stage: Path, config: JinaBertConfig, changes: Sequence[TensorChange], target: str, written: set[str]
) -> tuple[str, ...]:
    """Writes config.json; returns a line for each field that is not as in the source."""
    before: dict[str, Any] = files.read_json(folder / "config.json")
    has_head = any((change.target or "").startswith(PREFIX) for change in changes)
    stated = before.get("dtype") or before.get("torch_dtype") or "float32"
    config.architectures = _architectures(before, changes) if has_head else ["JinaBertModel"]
    config.dtype = stated if stated in files.DTYPE_NAMES else "float32"
    if target == "official":
        write_json(stage / "config.json", official_config(config))
    else:
        config.save_pretrained(stage)
    logger.debug("stored dtypes: %s", ", ".join(sorted(written)))
    return tuple(_field_changes(before, files.read_json(stage / "config.json")))


def _architectures(before: dict[str, Any], changes: Sequence[TensorChange]) -> list[str]:
    if any((change.target or "").startswith("cls.") for change in changes):
        return ["JinaBertForMaskedLM"]
    return before.get("architectures") or ["JinaBertModel"]


def _field_changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in sorted(set(before) | set(after)):
        if name == "auto_map" and name in before and name in after:
            yield f"auto_map names {_code_of(after)} instead of {_code_of(before)}"
        elif name not in after:
            yield f"{name} {before[name]!r} was left out"
        elif name not in before:
            yield f"{name} {after[name]!r} was added"
        elif before[name] != after[name]:
            yield f"{name} {before[name]!r} is now {after[name]!r}"


def _code_of(config: dict[str, Any]) -> str:
    reference = str(next(iter(config["auto_map"].values()), ""))
    return f"the code of {reference.split('--')[0]}" if "--" in reference else "the code beside the weights"


def _write_other_files(folder: Path, stage: Path, config: JinaBertConfig, target: str) -> list[str]:
    """Tokenizer, sentence-transformers files, card and, for our form, the code; returns notes for the report."""
    for name in (*files.TOKENIZER_FILES, *_CARRIED):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, stage / name)
    notes = []
    kept = carried_settings(folder)
    if kept.is_default:
        notes.append("sentence-transformers files were missing: mean pooling and normalisation were written")
    max_length = kept.max_length or config.model_max_length
    of_vectors = {"normalize": kept.normalize, "include_prompt": kept.include_prompt}
    for name, content in sentence_transformers_files(config.hidden_size, max_length, **of_vectors).items():
        if name == SETTINGS:
            content = {**content, **kept.settings}  # type: ignore[dict-item]
        write_json(stage / name, content)
    if target == "ours":
        write_code(stage)
    else:
        notes.append("without trust_remote_code this form loads as a BertModel with random MLPs, and no error says so")
    return notes


def _largest_difference(source: Path, output: Path) -> float:
    """Of the embeddings of a padded batch of random tokens, both folders loaded in float32."""
    first = JinaBertModel.from_pretrained(source, dtype=torch.float32).eval()
    batch = check_batches(first.config.vocab_size, ())[0]
    expected = torch_embeddings(first, batch)
    assert expected.shape[0] == len(MIXED_LENGTHS)
    del first
    second = JinaBertModel.from_pretrained(output, dtype=torch.float32).eval()
    len(second.tokenizer)  # an error if texts could not be embedded
    found = torch_embeddings(second, batch)
    return float(abs(found - expected).max())


def _allowed(changes: Sequence[TensorChange]) -> float:
    """Nothing when no tensor was cast; else what rounding the weights to the narrower dtype does to embeddings."""
    narrowed = {after for change in changes for before, after in [change.dtypes] if before != after}
    if not narrowed:
        return 0.0
    return {"F64": 1e-6, "F32": 1e-6, "F16": 5e-3, "BF16": 4e-2}[
        max(narrowed, key=("F64", "F32", "F16", "BF16").index)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: converts and prints the report; 2 if the input cannot be converted."""
    parser = argparse.ArgumentParser(prog="hub_repo.convert", description="Official form <-> a folder of ours.")
    parser.add_argument("--source", required=True, help="folder, or name of a Hub repository")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; it must not exist")
    parser.add_argument("--to", default="ours", choices=TARGETS)
    parser.add_argument(
        "--dtype", choices=sorted(files.DTYPE_NAMES), help="of the stored weights; as stored by default"
    )
    parser.add_argument("--keep-head", action="store_true", help="keep an MLM or task head")
    parser.add_argument("--revision", help="of a Hub repository")
    arguments = parser.parse_args(argv)
    quiet_transformers()
    try:
        report = convert(
            arguments.source, arguments.output, target=arguments.to, dtype=arguments.dtype,
            keep_head=arguments.keep_head, revision=arguments.revision,
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
