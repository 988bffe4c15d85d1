"""What a folder or a Hub repository is, and whether it will load, without loading it.

    python -m hub_repo.inspect_folder FOLDER [--json]
    python -m hub_repo.inspect_folder OWNER/NAME [--revision REVISION] [--json]

Law: none of its code runs and no tensor is read: configuration files, and the headers of weight files. Of a repository
nothing else is fetched, and nothing stays on the disk.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from modeling_jina_bert import JinaBertConfig
from modeling_jina_bert.checkpoints import is_plain_name

from .folders import checkpoint_files as files
from .folders.checkpoint_files import FolderError, StoredTensor
from .folders.folder_files import OFFICIAL_CODE, code_files
from .folders.layouts import compare, read_config
from .folders.tokenizer_checks import refuse_bad_tokenizer, refuse_missing_tokenizer
from .hub.outline import outlined

Kind = Literal["ours", "official", "plain BERT", "adapter", "another model", "unknown"]
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclasses.dataclass(frozen=True)
class FolderInfo:
    """What is known of a folder or repository.

    Attributes:
        folder: The folder, or the name of the repository.
        kind: "ours" (`model_type: jina_bert`), "official" (the form of the published repositories), "plain BERT",
            "adapter" (PEFT), "another model", or "unknown".
        loads: Whether `JinaBertModel.from_pretrained` takes it, with a tokenizer for `encode`.
        problems: Why it does not; also what makes it load less well than it should.
        layout: "A" (jina-bert-implementation), "B" (jina-bert-v2-qk-post-norm), or None.
        model_type: As config.json says.
        architectures: As config.json says.
        dtypes: Stored dtypes, as safetensors writes them.
        parameters: Numbers in the weight files.
        weight_bytes: Their size.
        shape: layers, hidden_size, heads, intermediate_size, vocab_size, where known.
        heads: Task heads in the weights.
        pooling: As the sentence-transformers files say, with normalisation; None without them.
        max_length: Tokens a text is cut at by sentence-transformers, else as config.json says.
        base_model: Of an adapter.
        formats: Other engines' files that lie in the folder.
        missing: Files that a published folder of its kind has and this one has not.
        commit: Of a repository, what was read.
    """

    folder: Path | str
    kind: Kind
    loads: bool
    problems: tuple[str, ...] = ()
    layout: str | None = None
    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    parameters: int = 0
    weight_bytes: int = 0
    shape: dict[str, int] = dataclasses.field(default_factory=dict)
    heads: tuple[str, ...] = ()
    pooling: str | None = None
    max_length: int | None = None
    base_model: str | None = None
    formats: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    commit: str | None = None

    def lines(self) -> list[str]:
        """The information as text, one fact a line."""
        shape = ", ".join(f"{name} {value:,}" for name, value in self.shape.items())
        weights = f"{self.parameters:,} parameters, {'/'.join(self.dtypes)}, {self.weight_bytes / 1e6:.1f} MB"
        facts = {
            "commit": self.commit,
            "kind": self.kind + (f", layout {self.layout}" if self.layout else ""),
            "loads": "yes" if self.loads else "no",
            "problem": self.problems,
            "model type": self.model_type,
            "architectures": ", ".join(self.architectures),
            "base model": self.base_model,
            "shape": shape,
            "weights": weights if self.parameters else "none",
            "heads": ", ".join(self.heads),
            "pooling": self.pooling,
            "max length": f"{self.max_length:,} tokens" if self.max_length else None,
            "formats": ", ".join(self.formats),
            "missing": ", ".join(self.missing),
        }
        lines = [str(self.folder)]
        for name, fact in facts.items():
            lines += [f"  {name:<14}{value}" for value in (fact if isinstance(fact, tuple) else (fact,)) if value]
        return lines


def inspect_source(source: str | Path, revision: str | None = None) -> FolderInfo:
    """Inspects a folder, or a repository where there is no such folder.

    Args:
        source: A folder, or `owner/name`.
        revision: Of a repository.

    Raises:
        FolderError: It is neither, a revision was given for a folder, or the repository cannot be read.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise FolderError(f"{source} is a folder: --revision is for a Hub repository.")
        return inspect_folder(Path(source))
    if isinstance(source, Path) or source.count("/") != 1 or Path(source).exists():
        raise FolderError(f"{source} is neither a folder nor the name of a Hub repository, owner/name.")
    return inspect_repository(source, revision)


def inspect_repository(repo_id: str, revision: str | None = None) -> FolderInfo:
    """Reads configuration files and weight headers of a repository.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag, commit or `refs/pr/N`; None is `main`.

    Raises:
        FolderError: It cannot be read.
    """
    with outlined(repo_id, revision) as outline:
        info = _inspect(outline.folder, is_outline=True)
    found = (problem.replace(str(outline.folder), repo_id) for problem in info.problems)
    problems = tuple(dict.fromkeys((*outline.problems, *found)))
    return dataclasses.replace(info, folder=repo_id, commit=outline.commit, problems=problems)


def inspect_folder(folder: Path) -> FolderInfo:
    """Reads configuration files and weight headers.

    Args:
        folder: Any folder.

    Raises:
        FolderError: It is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder.")
    return _inspect(folder, is_outline=False)


def _inspect(folder: Path, *, is_outline: bool) -> FolderInfo:
    common: dict[str, Any] = {"folder": folder, "formats": tuple(_formats(folder))}
    if (folder / "adapter_config.json").is_file():
        adapter = _object(folder / "adapter_config.json")
        base = adapter.get("base_model_name_or_path")
        problem = f"an adapter: load {base or 'its base model'} and add it with PEFT"
        return FolderInfo(kind="adapter", loads=False, problems=(problem,), base_model=base, **common)
    try:
        raw = _object(folder / "config.json")
    except FolderError as error:
        return FolderInfo(kind="unknown", loads=False, problems=(str(error),), **common)
    common |= {"model_type": raw.get("model_type"), "architectures": tuple(map(str, raw.get("architectures") or ()))}
    kind = _kind(raw)
    if kind not in ("ours", "official"):
        problem = f"model_type {raw.get('model_type')!r} without ALiBi is no JinaBERT"
        return FolderInfo(kind=kind, loads=False, problems=(problem,), **common, **_weights(folder)[0])
    return _jina_bert(folder, raw, kind, common, is_outline=is_outline)


def _jina_bert(
    folder: Path, raw: dict[str, Any], kind: Kind, common: dict[str, Any], *, is_outline: bool
) -> FolderInfo:
    weights, stored, problem = _weights(folder)
    problems, layout, heads, shape = [problem] if problem else [], None, (), {}
    if stored:
        try:
            config = read_config(folder, set(stored))
            found = compare(stored, config)
            layout, heads, shape = "B" if config.qk_post_norm else "A", tuple(found.heads), _shape(config)
            problems += found.problems()
            if is_outline:  # in which tokenizer.json is empty
                refuse_missing_tokenizer(folder)
            else:
                refuse_bad_tokenizer(folder, config)
        except FolderError as error:
            problems.append(str(error))
    loads = not problems
    if loads and kind == "official":
        problems.append("not by AutoModel on transformers 5, and as random weights without trust_remote_code: "
                        "python -m hub_repo.convert")  # fmt: skip
    missing = tuple(_missing(folder, kind))
    pooling, max_length = _sentence_transformers(folder)
    return FolderInfo(
        kind=kind, loads=loads, problems=tuple(problems), layout=layout, heads=heads, shape=shape, missing=missing,
        pooling=pooling, max_length=max_length or raw.get("model_max_length"), **common, **weights,
    )  # fmt: skip


def _kind(raw: dict[str, Any]) -> Kind:
    model_type = raw.get("model_type")
    if model_type == JinaBertConfig.model_type:
        return "ours"
    named = f"{raw.get('_name_or_path')} {raw.get('auto_map')}"
    if model_type == "bert" and raw.get("position_embedding_type") == "alibi":
        return "official"
    if any(repository in named for repository in OFFICIAL_CODE.values()):
        return "official"
    return "plain BERT" if model_type == "bert" else "another model"


def _weights(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor], str]:
    """Fields of the information, the tensors, and why there are none."""
    try:
        stored = files.stored_tensors(folder)
    except FolderError as error:
        return {}, {}, str(error)
    sizes = [math.prod(tensor.shape) for tensor in stored.values()]
    size = sum(n * _BYTES.get(tensor.dtype, 0) for n, tensor in zip(sizes, stored.values(), strict=True))
    dtypes = tuple(sorted({tensor.dtype for tensor in stored.values()}))
    return {"dtypes": dtypes, "parameters": sum(sizes), "weight_bytes": size}, stored, ""


def _shape(config: JinaBertConfig) -> dict[str, int]:
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }


def _sentence_transformers(folder: Path) -> tuple[str | None, int | None]:
    """Pooling in words, and the maximum length in tokens; None for what the files do not say."""
    try:
        modules = files.read_json(folder / "modules.json")
        kinds = [str(module["type"]).split(".")[-1] for module in modules]
        path = next((module["path"] for module in modules if str(module["type"]).endswith(".Pooling")), None)
        pooling = _object(folder / path / "config.json") if is_plain_name(path) else {}
        limits = _object(folder / "sentence_bert_config.json")
    except (FolderError, TypeError, KeyError):
        return None, None
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, on in pooling.items() if name.startswith(prefix) and on is True]
    words = ", ".join(modes or [str(pooling.get("pooling_mode"))])
    return words + (", normalised" if "Normalize" in kinds else ""), limits.get("max_seq_length")


def _formats(folder: Path) -> list[str]:
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("onnx/*.onnx"))]
    found += [path.relative_to(folder).as_posix() for path in sorted(folder.glob("openvino/*.xml"))]
    return found + [path.name for path in sorted(folder.glob("*.gguf"))]


def _missing(folder: Path, kind: Kind) -> list[str]:
    wanted = ["tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json",
              "sentence_bert_config.json", "README.md"]  # fmt: skip
    wanted += [path.name for path in code_files()] if kind == "ours" else []  # the official form names a repository
    return [name for name in wanted if not (folder / name).is_file()]


def _object(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise FolderError(f"{path} holds no JSON object.")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the information; 2 if there is no such folder or repository."""
    description = "Say what a model folder or repository is."
    parser = argparse.ArgumentParser(prog="hub_repo.inspect_folder", description=description)
    parser.add_argument("source", help="folder, or name of a Hub repository")
    parser.add_argument("--revision", help="of a Hub repository: branch, tag, commit or refs/pr/N")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    try:
        info = inspect_source(arguments.source, arguments.revision)
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(info), indent=2, default=str) if arguments.json else "\n".join(info.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
