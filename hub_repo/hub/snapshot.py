"""The files of a Hub repository on this disk: those that a conversion reads, or a model is loaded from."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from modeling_jina_bert.checkpoints import read_weight_map

from ..folders.checkpoint_files import INDEX, PICKLES, WEIGHTS, FolderError
from .outline import hub_error

_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*", "NOTICE*")


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """A folder with the files of a folder or Hub repository; of the latter without what no conversion reads.

    Raises:
        FolderError: There is no such folder, repository or revision, it is gated, or the Hub cannot be reached: one
            line, without the token.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise FolderError(f"{source} is a folder here, which has no revision {revision!r}.")
        return Path(source)
    if len(Path(source).parts) != 2 or Path(source).is_absolute():
        raise FolderError(f"{source} is neither a folder nor the name of a Hub repository.")
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_FETCHED)))
        if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            for name in _bin_files(folder):
                with suppress(RemoteEntryNotFoundError):  # who reads the folder says what is missing
                    hf_hub_download(str(source), name, revision=folder.name)  # the commit of the other files
        return folder
    except LocalEntryNotFoundError as error:  # neither on the Hub nor in the cache; what the Hub said is the cause
        raise hub_error(str(source), revision, _said(error)) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # HfHubHTTPError is an OSError
        raise hub_error(str(source), revision, error) from None


def _bin_files(folder: Path) -> list[str]:
    """Names of the weights in the .bin form; none if the index cannot be read, which who reads the folder says."""
    index = folder / PICKLES[1]
    if not index.exists():
        return [PICKLES[0]]
    with suppress(ValueError):
        return sorted(set(read_weight_map(index).values()))
    return []


def _said(error: BaseException) -> Exception:
    cause = error.__cause__
    return _said(cause) if isinstance(cause, LocalEntryNotFoundError) else cause or error
