"""What of a folder may be published: its files, and every reason to refuse one.

Law: nothing that runs code when it is read (pickle), nothing private by its name or content (keys, tokens, `.env`,
`.git`), nothing from outside the folder, nothing larger than the limits. A secret that was found is named by file,
line and kind, never shown.

COST: every text file is read whole, of the weights the header only.
"""

import fnmatch
import hashlib
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from ..folders.checkpoint_files import FolderError


class UnpublishableFolder(FolderError):
    """A folder may not be published; the message has one line for each reason."""

    def __init__(self, folder: Path, problems: list[str]):
        super().__init__("\n".join([f"{folder} cannot be published:", *(f"  {problem}" for problem in problems)]))
        self.problems = problems


@dataclass(frozen=True)
class Limits:
    """Largest files that are published, in bytes; the Hub takes text outside of LFS up to 10 MB."""

    file_bytes: int = 5 * 10**9
    text_bytes: int = 10 * 10**6


@dataclass(frozen=True)
class LocalFile:
    """A file to publish: its path in the repository (with forward slashes), its source and its size in bytes."""

    path: str
    source: Path
    size: int

    @cached_property
    def sha256(self) -> str:
        """How the Hub names a file in LFS."""
        return self._hash(hashlib.sha256())

    @cached_property
    def blob_id(self) -> str:
        """How git, and with it the Hub, names any other file."""
        return self._hash(hashlib.sha1(b"blob %d\0" % self.size))

    def _hash(self, digest) -> str:
        with self.source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


@dataclass
class Contents:
    """What `scan` found: files to publish, paths left out without harm, and reasons to refuse the folder."""

    files: list[LocalFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# Made by tools while one works in a folder; worth nothing to anybody else.
_LEFT_OUT = ("__pycache__", ".ipynb_checkpoints", ".cache", ".DS_Store", "Thumbs.db")
_PRIVATE = (
    ".git", ".env", ".env.*", "*.env", ".netrc", ".npmrc", ".pypirc", ".aws", ".ssh", ".htpasswd",
    "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12", "*.pfx", "*.keystore", "*.kdbx",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
_PICKLE_OPCODES = frozenset(opcode.encode("latin-1") for opcode in pickletools.code2op)
# The public forms of these keys, after their issuers' documentation and the rules of gitleaks.
_SECRETS = {
    "a Hugging Face token": rb"\bhf_(?:[A-Za-z0-9]{30,}|oauth_[\w.-]{30,})|\bapi_org_[A-Za-z0-9]{30,}",
    "an AWS access key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": rb"(?i:aws_?secret_?(?:access_?)?key)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}\b",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "an OpenAI key": rb"\bsk-[\w-]*T3BlbkFJ[\w-]{16,}",
    "an Anthropic key": rb"\bsk-ant-[a-z0-9]+-[\w-]{60,}",
    "a Google key": rb"\bAIza[\w-]{35}\b",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a PyPI token": rb"\bpypi-AgE[\w-]{50,}",
}


def scan(folder: Path, limits: Limits) -> Contents:
    """Reads a folder as it would be published.

    Args:
        folder: The folder of a Hub repository.
        limits: Largest sizes.

    Returns:
        Files in the order of their paths; `problems` is not empty if the folder must not be published.

    Raises:
        UnpublishableFolder: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UnpublishableFolder(folder, ["it is not a folder"])
    contents = Contents()
    secrets = _secret_patterns()
    for path in _entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.name in _LEFT_OUT:
            contents.left_out.append(name)
            continue
        problems = list(_problems(path, folder.resolve(), limits, secrets))
        contents.problems += [f"{name}{problem}" for problem in problems]
        if not problems:
            contents.files.append(LocalFile(name, path, path.stat().st_size))
    return contents


def _entries(folder: Path) -> Iterator[Path]:
    """Every file; a folder only where it is a link, private or left out, and then nothing below it."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and entry.name not in _LEFT_OUT and not _is_private(entry.name):
            yield from _entries(path)
        else:
            yield path


def _is_private(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _PRIVATE)


def _problems(path: Path, root: Path, limits: Limits, secrets: dict[str, re.Pattern[bytes]]) -> Iterator[str]:
    """Reasons to refuse one entry, each to be read after its path: `": a pickle"`, `":12: a private key"`."""
    if _is_private(path.name):
        yield ": private by its name; take it out of the folder"
    elif path.is_symlink() and not path.resolve().is_relative_to(root):
        yield f": a link that leaves the folder, to {os.readlink(path)}"
    elif not path.exists():
        yield f": a broken link, to {os.readlink(path)}"
    elif not path.is_file():
        yield ": a link to a folder, which the Hub does not have" if path.is_dir() else ": not a regular file"
    elif path.name == ".gitignore":
        yield ": the Hub would silently leave out of the commit what it lists; take it out of the folder"
    elif (size := path.stat().st_size) > limits.file_bytes:
        yield f": {size:,} bytes, more than the limit of {limits.file_bytes:,}; save the weights in shards"
    elif reason := _runs_code(path):
        yield f": {reason}; weights are published as safetensors"
    elif path.suffix == ".safetensors":
        yield from _safetensors_problems(path, secrets)
    elif _is_text(path):
        if size > limits.text_bytes:
            yield f": {size:,} bytes of text, more than the limit of {limits.text_bytes:,}"
        else:
            yield from _secrets_in(path.read_bytes(), secrets)


def _runs_code(path: Path) -> str | None:
    """Why reading a file could run code: it is a pickle, by its suffix or whatever its suffix says."""
    if path.suffix == ".safetensors":
        return None  # its first bytes are a length, which can look like anything; safetensors itself reads it
    with path.open("rb") as file:
        head = file.read(3)
    # Protocol 2 and later: PROTO, the version, and another opcode.
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[2:] in _PICKLE_OPCODES:
        return "a pickle by its content"
    if head[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith(".pkl") for name in archive.namelist()):
                return "a torch archive of pickles by its content"
    # OpenVINO keeps the weights of NAME.xml as plain bytes in NAME.bin.
    if path.suffix in _PICKLES and not (path.suffix == ".bin" and path.with_suffix(".xml").is_file()):
        return f"a pickle by its suffix {path.suffix}"
    return None


def _safetensors_problems(path: Path, secrets: dict[str, re.Pattern[bytes]]) -> Iterator[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        yield f": not a whole safetensors file ({error})"
    else:
        for finding in _secrets_in(json.dumps(metadata).encode(), secrets):
            yield f" (metadata){finding}"


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _secret_patterns() -> dict[str, re.Pattern[bytes]]:
    """What is searched for: the known forms, and the very token that this machine is logged in with."""
    patterns = dict(_SECRETS)
    if (token := get_token()) and len(token) >= 8:
        patterns["the token of this machine"] = re.escape(token.encode())
    return {kind: re.compile(pattern) for kind, pattern in patterns.items()}


def _secrets_in(content: bytes, secrets: dict[str, re.Pattern[bytes]]) -> Iterator[str]:
    for kind, pattern in secrets.items():
        if match := pattern.search(content):
            line = content.count(b"\n", 0, match.start()) + 1
            yield f":{line}: {kind}; take it out, and revoke it if it was ever shared"
