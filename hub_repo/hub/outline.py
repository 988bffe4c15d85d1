"""The outline of a Hub repository: a folder with its small JSON files, its other files empty, its weights hollow.

Law: no file is run and no tensor is fetched. Everything is read at one commit, and lies below the outline whatever the
listing calls it. A weight file is sparse: of its full size, with the header in place and holes for the tensors, so
what reads headers reads it as the file itself, and sees that one was cut off when it was uploaded.

COST: a request for the commit, one for each page of the listing and each of six JSON files at most, two for each
safetensors file, about six for a .bin file. Headers are in the order of 10 to 100 KB.
"""

import dataclasses
import io
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this huggingface_hub is built on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, validate_repo_id

from modeling_jina_bert.checkpoints import is_plain_name

from ..folders import checkpoint_files as files
from ..folders.checkpoint_files import FolderError
from .remote import one_line

JSON_BYTES = 20 * 10**6
"""A larger JSON file is left empty: no configuration is, and an index of a thousand shards is not."""
HEADER_BYTES = 10**8  # the longest header that safetensors itself takes
_BLOCK = 64 * 1024  # bytes asked for at once from a .bin file, whose directory is at its end
_READ = re.compile(
    r"(config|adapter_config|modules|sentence_bert_config|(model\.safetensors|pytorch_model\.bin)\.index)\.json"
    r"|[0-9]_Pooling/config\.json"
)
_LISTED = re.compile(r"[^/]+|[0-9]_Pooling/config\.json|onnx/[^/]+\.onnx|openvino/[^/]+\.xml")


@dataclasses.dataclass(frozen=True)
class Outline:
    """What was read of a repository.

    Attributes:
        folder: The outline; it is gone when the block of `outlined` ends.
        commit: That it is of.
        problems: What could not be read, a line each.
    """

    folder: Path
    commit: str
    problems: tuple[str, ...]


@contextmanager
def outlined(repo_id: str, revision: str | None = None) -> Iterator[Outline]:
    """Reads the outline of a model repository.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag, commit or `refs/pr/N`; None is `main`.

    Raises:
        FolderError: No such repository or revision, it is gated, or the Hub cannot be reached: one line, without the
            token.
    """
    with tempfile.TemporaryDirectory(prefix="jina-bert-") as scratch:
        folder = Path(scratch) / "outline"
        folder.mkdir()
        try:
            hub = _Revision(repo_id, revision)
            problems = list(_write(hub, folder))
        except (HTTPError, OSError, ValueError, RuntimeError) as error:  # HfHubHTTPError is an OSError
            raise error if isinstance(error, FolderError) else hub_error(repo_id, revision, error) from None
        yield Outline(folder, hub.commit, tuple(problems))


class _Revision:
    """The files of a repository at the commit that a revision is at now."""

    def __init__(self, repo_id: str, revision: str | None):
        validate_repo_id(repo_id)
        self.api, self.repo_id = HfApi(), repo_id
        info = self.api.model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        self.commit = str(info.sha)
        tree = self.api.list_repo_tree(repo_id, recursive=True, revision=self.commit)
        self.sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    def read(self, path: str, start: int, size: int) -> bytes:
        """`size` bytes of a file, fewer at its end."""
        size = min(size, self.sizes[path] - start)
        if size <= 0:
            return b""
        url = hf_hub_url(self.repo_id, path, revision=self.commit, endpoint=self.api.endpoint)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, max_retries=2) as response:
            hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise FolderError(f"{self.repo_id}: the server does not send parts of files; download it first.")
            content = b""
            try:
                for block in response.iter_bytes():
                    content += block
                    if len(content) >= size:  # a server that takes no note of the range would send the whole file
                        break
            except HTTPError as error:  # here, or the connection would be tried again with nobody to read from it
                raise FolderError(f"{self.repo_id}: {path} broke off: {one_line(error)}") from None
        if len(content) < size:
            raise FolderError(f"{self.repo_id}: {path} broke off after {start + len(content):,} bytes.")
        return content[:size]


def _write(hub: _Revision, folder: Path) -> Iterator[str]:
    """Writes the outline; yields problems."""
    for path, size in sorted(hub.sizes.items()):
        if not all(map(is_plain_name, path.split("/"))):
            yield f"lists {path!r}, which is no path in a folder"
            continue
        if not _LISTED.fullmatch(path):
            continue
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
        if _READ.fullmatch(path):
            if size <= JSON_BYTES:
                (folder / path).write_bytes(hub.read(path, 0, size))
            else:
                yield f"{path} has {size:,} bytes, too many for a configuration; it was not read"
    try:
        weights = files.weight_files(folder)
    except FolderError:
        return  # who reads the outline finds the same
    for path in weights:
        if path.endswith(".safetensors"):
            _write_hollow(folder / path, hub.sizes[path], _safetensors_header(hub, path))
        elif not (pieces := _archive_pieces(hub, path)):
            yield (
                f"{path} is no whole archive: cut off, or of a PyTorch before 1.6, which cannot be read without the "
                "tensors"
            )
        else:
            _write_hollow(folder / path, hub.sizes[path], pieces)


def _write_hollow(path: Path, size: int, pieces: dict[int, bytes]):
    """A sparse file of `size` bytes with `pieces`, offset -> content."""
    with path.open("wb") as file:
        for offset, content in pieces.items():
            file.seek(offset)
            file.write(content)
        file.truncate(size)


def _safetensors_header(hub: _Revision, path: str) -> dict[int, bytes]:
    start = hub.read(path, 0, 8)
    return {0: start + hub.read(path, 8, min(int.from_bytes(start, "little"), HEADER_BYTES))}


def _archive_pieces(hub: _Revision, path: str) -> dict[int, bytes]:
    """The directory of a .bin file and its entries that are no tensors; nothing if it is no archive."""
    size = hub.sizes[path]
    try:
        with zipfile.ZipFile(io.BufferedReader(_Ranges(hub, path), _BLOCK)) as archive:
            entries, end = sorted(archive.infolist(), key=lambda entry: entry.header_offset), archive.start_dir
    except FolderError:  # of the way to the file, not of the file
        raise
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error):
        return {}  # whatever a malformed directory makes of itself
    ends = [entry.header_offset for entry in entries[1:]] + [end]
    spans = {
        entry.header_offset: until - entry.header_offset
        for entry, until in zip(entries, ends, strict=True)
        if PurePosixPath(entry.filename).parent.name != "data"  # tensors are in NAME/data/0, NAME/data/1, ...
    }
    spans[end] = size - end
    if sum(spans.values()) > HEADER_BYTES:
        return {}
    return {offset: hub.read(path, offset, length) for offset, length in spans.items()}


class _Ranges(io.RawIOBase):
    """A file of the repository, read where it is asked for."""

    def __init__(self, hub: _Revision, path: str):
        self.hub, self.path, self.place = hub, path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.hub.sizes[self.path]}[whence]
        if origin + offset < 0:
            raise ValueError(f"{self.path}: there is nothing before its beginning")
        self.place = origin + offset
        return self.place

    def readinto(self, buffer) -> int:
        content = self.hub.read(self.path, self.place, len(buffer))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def hub_error(repo_id: str, revision: str | None, error: BaseException) -> FolderError:
    """The one line for an error of the Hub or of the way to it."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        said = f"is neither a folder nor the name of a Hub repository: {one_line(error)}"
    elif isinstance(error, GatedRepoError):  # a RepositoryNotFoundError, too
        said = f"is gated: accept its conditions on {page}, and log in with `hf auth login`, or set HF_TOKEN."
    elif isinstance(error, RepositoryNotFoundError):
        said = f"is neither a folder nor a repository on {constants.ENDPOINT}, or the token may not see it."
    elif isinstance(error, RevisionNotFoundError):
        said = f"has no revision {revision} on {constants.ENDPOINT}."
    elif isinstance(error, OfflineModeIsEnabled):
        said = "is no folder, and the Hub cannot be asked: HF_HUB_OFFLINE is set."
    elif status == 401:
        said = "cannot be read: the Hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN."
    elif isinstance(error, UnicodeEncodeError):  # its text may show the token
        said = "cannot be read: the token in HF_TOKEN or of `hf auth login` has characters that no token has."
    else:
        said = f"cannot be read from {constants.ENDPOINT}: {one_line(error).rstrip('.')}."
    return FolderError(f"{repo_id} {said}")
