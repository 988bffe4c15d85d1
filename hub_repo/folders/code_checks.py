"""The Python files of a folder, looked at without being run: hashes, what they import, what config files make of them.

Law: reading is all that happens here. Whether the code is ours is decided by its bytes, not by names.
"""

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path

from modeling_jina_bert.checkpoints import is_plain_name

from .checkpoint_files import FolderError, read_json
from .findings import Finding
from .folder_files import code_files

_DYNAMIC = ("__import__", "compile", "eval", "exec")
_KNOWN_MODULES = ("sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules.",
                  "sentence_transformers.base.modules.")  # fmt: skip
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class CodeFile:
    """A Python file of a folder.

    Attributes:
        path: Relative to the folder.
        sha256: Of its bytes.
        imports: What it imports, as written: "os.path", ".sibling"; and calls that run or import by name: "eval()".
        is_ours: Whether the package has the same bytes under the same name.
        error: Why it could not be parsed; "" if it was.
    """

    path: str
    sha256: str
    imports: tuple[str, ...]
    is_ours: bool
    error: str = ""


def code_of(folder: Path) -> list[CodeFile]:
    """Every Python file of a folder, in sub-folders too.

    Args:
        folder: A model folder.
    """
    package = {path.name: path.read_bytes() for path in code_files()}
    found = []
    for path in sorted(folder.rglob("*.py")):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        imports, error = _imports(content)
        digest = hashlib.sha256(content).hexdigest()
        found.append(CodeFile(name, digest, imports, package.get(name) == content, error))
    return found


def _imports(content: bytes) -> tuple[tuple[str, ...], str]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return (), " ".join(str(error).split()) or type(error).__name__
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _DYNAMIC:
            names.add(f"{node.func.id}()")
    return tuple(sorted(names)), ""


def code_findings(folder: Path, code: list[CodeFile], *, trust: bool) -> list[Finding]:
    """Lists the code with hashes and imports, and compares it with the package's.

    Args:
        folder: A model folder.
        code: Its `code_of`.
        trust: Whether code other than ours is accepted.
    """
    findings = []
    for file in code:
        findings.append(
            Finding("note", file.path, f"sha256 {file.sha256}, imports {', '.join(file.imports) or 'nothing'}")
        )
        if file.error:
            findings.append(Finding("error", file.path, f"is not Python: {file.error}"))
        elif not file.is_ours:
            findings.append(
                Finding("warning", file.path, "differs from the package; run because of --trust")
                if trust
                else Finding("error", file.path, "differs from the package's code; nothing was run (--trust runs it)")
            )
    missing = sorted({path.name for path in code_files()} - {file.path for file in code})
    if missing and any(file.is_ours for file in code):
        findings.append(Finding("error", missing[0], "is missing: the code of the package is here in part only"))
    return findings + _auto_map_findings(folder) + _module_findings(folder)


def _auto_map_findings(folder: Path) -> list[Finding]:
    """Every auto_map entry must be a class in a file right in this folder."""
    findings = []
    for name in _CONFIGS:
        if not (folder / name).is_file():
            continue
        try:
            content = read_json(folder / name)
        except FolderError as error:
            findings.append(Finding("error", name, str(error)))
            continue
        auto_map = content.get("auto_map", {}) if isinstance(content, dict) else {}
        entries = auto_map.items() if isinstance(auto_map, dict) else [("auto_map", auto_map)]
        for auto, references in entries:
            for reference in references if isinstance(references, list | tuple) else [references]:
                if reference is not None and (problem := _reference_problem(folder, reference)):
                    findings.append(Finding("error", name, f"auto_map {auto} is {reference!r}: {problem}"))
    return findings


def _reference_problem(folder: Path, reference: object) -> str:
    if not isinstance(reference, str):
        return "not a text"
    if "--" in reference:
        return "code of another repository, which can change at any time"
    module, _, name = reference.partition(".")
    if not (module.isidentifier() and name.isidentifier()):
        return "not MODULE.CLASS"
    if not (folder / f"{module}.py").is_file():
        return f"{module}.py is not in the folder"
    return ""


def _module_findings(folder: Path) -> list[Finding]:
    """modules.json: known modules of sentence-transformers, in sub-folders of this one."""
    if not (folder / "modules.json").is_file():
        return [
            Finding("error", "modules.json", "is missing: SentenceTransformer cannot load the folder as it is meant")
        ]
    try:
        modules = read_json(folder / "modules.json")
    except FolderError as error:
        return [Finding("error", "modules.json", str(error))]
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return [Finding("error", "modules.json", "is not a list of modules")]
    findings = []
    for module in modules:
        path, kind = module.get("path"), str(module.get("type"))
        if path != "" and not is_plain_name(path):
            findings.append(Finding("error", "modules.json", f"the path {path!r} is not a folder in this one"))
        elif path and not (folder / path).is_dir() and not kind.endswith(".Normalize"):
            findings.append(Finding("error", "modules.json", f"the folder {path!r} is missing"))
        if not kind.startswith(_KNOWN_MODULES):
            findings.append(Finding("error", "modules.json", f"the type {kind!r} is not of sentence-transformers"))
    return findings
