"""Whether a folder is what it should be: whole, safe to load, and loadable by a stranger.

    python -m hub_repo.verify FOLDER [--trust]

Law: nothing of the folder is executed unless its code is the package's byte for byte, or `--trust` was given; and not
before every other check has passed. Weights are read as safetensors only. The status is 1 if there is an error.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_jina_bert import JinaBertConfig, JinaBertModel

from .folders import checkpoint_files as files
from .folders.checkpoint_files import FolderError, StoredTensor
from .folders.code_checks import CodeFile, code_findings, code_of
from .folders.findings import Finding, Report
from .folders.layouts import compare, read_config
from .folders.loading import CHECK_TEXTS, load_in_fresh_process, quiet_transformers, smallest_cosine
from .folders.tokenizer_checks import tokenizer_findings

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # protocols 2 to 5
_COMPILED = (".so", ".pyd", ".pyc", ".dll", ".dylib")
SMALLEST_COSINE = 0.9999
"""Between the vectors of the folder's own code and the package's, both in float32 from the same weights."""


def verify_folder(folder: Path, *, trust: bool = False) -> Report:
    """Checks a folder of our form.

    Args:
        folder: A model folder.
        trust: Run code that is not the package's, too.

    Returns:
        All findings, errors first; `ok` when there is no error.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return Report([Finding("error", "", f"{folder} is not a folder")])
    findings = list(_path_findings(folder))
    if not any(finding.severity == "error" for finding in findings):
        findings += _pickle_findings(folder)
        code = code_of(folder)
        findings += code_findings(folder, code, trust=trust)
        config, weight_findings = _weight_findings(folder)
        findings += weight_findings
        findings += tokenizer_findings(folder, config)
        if not any(finding.severity == "error" for finding in findings):
            findings += _loading_findings(folder, code, trust=trust)
    order = ("error", "warning", "note")
    return Report(sorted(findings, key=lambda finding: order.index(finding.severity)))


def _path_findings(folder: Path) -> Iterator[Finding]:
    """Links that lead out of the folder, and what is neither a file nor a folder.

    A snapshot in the cache of the Hub consists of links to the blobs beside it; those are where they should be.
    """
    inside = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        inside.append(folder.absolute().parent.parent.resolve() / "blobs")
    for directory, directories, names in os.walk(folder):
        for name in (*directories, *names):
            path = Path(directory) / name
            shown = path.relative_to(folder).as_posix()
            if path.is_symlink() and not _stays_inside(path, inside):
                yield Finding("error", shown, f"is a link out of the folder, to {os.readlink(path)}")
            elif not path.is_dir() and not path.is_file():
                yield Finding("error", shown, "is neither a file nor a folder")


def _stays_inside(link: Path, inside: list[Path]) -> bool:
    try:
        return any(link.resolve().is_relative_to(root) for root in inside)
    except (OSError, RuntimeError):  # a link to itself
        return False


def _pickle_findings(folder: Path) -> Iterator[Finding]:
    """Files that run code when they are read, by their names and by their first bytes."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or ".git" in path.relative_to(folder).parts:
            continue
        shown = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix in _PICKLES and not shown.startswith("openvino/"):
            yield Finding("error", shown, "may hold a pickle, which runs code when it is read: use safetensors")
        elif path.suffix in _COMPILED:
            yield Finding("error", shown, "is compiled code, which nobody can read")
        elif start[:2] in _PICKLE_STARTS or start == b"PK\x03\x04":
            yield Finding("error", shown, "begins like a pickle or an archive")


def _weight_findings(folder: Path) -> tuple[JinaBertConfig | None, list[Finding]]:
    """Header, configuration and every number of the weights."""
    findings: list[Finding] = []
    pickled = [name for name in files.PICKLES if (folder / name).exists()]
    if files.PICKLES[0] in pickled:
        return None, findings  # an error already; nothing of it is read
    if pickled:
        findings.append(Finding("error", pickled[0], "lists files that are pickles: delete it"))
        if not any((folder / name).exists() for name in (files.WEIGHTS, files.INDEX)):
            return None, findings
    try:
        stored = files.stored_tensors(folder)
        config = read_config(folder, set(stored))
        raw = files.read_json(folder / "config.json")
        found = compare(stored, config)
    except FolderError as error:
        return None, [Finding("error", "", str(error))]
    if raw.get("model_type") != JinaBertConfig.model_type:
        message = f"model_type is {raw.get('model_type')!r}: the official form (python -m hub_repo.convert)"
        findings.append(Finding("error", "config.json", message))
    findings += [Finding("error", "", f"the weights and config.json disagree: {line}") for line in found.problems()]
    findings += _not_finite(folder, stored)
    dtypes = sorted({tensor.dtype for tensor in stored.values()})
    findings.append(Finding("note", "", f"{len(stored)} tensors, {', '.join(dtypes)}"))
    return config, findings


def _not_finite(folder: Path, stored: dict[str, StoredTensor]) -> Iterator[Finding]:
    for name, tensor in files.read_tensors(folder, stored):
        if tensor.dtype in files.DTYPES.values() and not torch.isfinite(tensor).all():
            yield Finding("error", stored[name].file, f"{name} has values that are not finite")


def _loading_findings(folder: Path, code: list[CodeFile], *, trust: bool) -> list[Finding]:
    """Loads the folder in a fresh process with its own code, and compares with the package on the same weights."""
    if not code:
        return [Finding("error", "", "has no code: AutoModel cannot load it, with or without trust_remote_code")]
    if not trust and not all(file.is_ours for file in code):
        return []  # an error already
    try:
        found = load_in_fresh_process(folder)
    except RuntimeError as error:
        return [Finding("error", "", " ".join(str(error).split()))]
    model = JinaBertModel.from_pretrained(folder, dtype=torch.float32)
    expected = model.encode(list(CHECK_TEXTS))
    findings = []
    for name, vectors in found.items():
        cosine = smallest_cosine(vectors, expected)
        severity: Any = "note" if cosine >= SMALLEST_COSINE else "error"
        findings.append(
            Finding(severity, "", f"loads with {name} in a fresh process, cosine {cosine:.6f} to the package")
        )
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: prints the findings; 1 if there is an error, 2 if it cannot be checked."""
    parser = argparse.ArgumentParser(prog="hub_repo.verify", description="Check a model folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust", action="store_true", help="run the folder's code although it is not the package's")
    arguments = parser.parse_args(argv)
    quiet_transformers()
    try:
        report = verify_folder(arguments.folder, trust=arguments.trust)
    except (OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for finding in report.findings:
        print(finding)
    errors = f"{len(report.errors)} error{'s' * (len(report.errors) != 1)}"
    print(f"{arguments.folder}: {'verified' if report.ok else errors}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
