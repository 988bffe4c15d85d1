"""The files of a Hub repository on this disk: those that a conversion reads, or a model is loaded from."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from ..folders.checkpoint_files import INDEX, WEIGHTS, FolderError
from .outline import hub_error

_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*")


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """A folder with the files of a folder or Hub repository; of the latter without what no conversion reads.

    Raises:
        FolderError: There is no such folder, repository or revision, it is gated, or the Hub cannot be reached: one
            line, without the token.
    """
    if Path(source).is_dir():
        return Path(source)
    if len(Path(source).parts) != 2 or Path(source).is_absolute():
        raise FolderError(f"{source} is neither a folder nor the name of a Hub repository.")
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_FETCHED)))
        if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            snapshot_download(str(source), revision=revision, allow_patterns=["pytorch_model*.bin"])
        return folder
    except LocalEntryNotFoundError as error:  # neither on the Hub nor in the cache; what the Hub said is the cause
        raise hub_error(str(source), revision, _said(error)) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # HfHubHTTPError is an OSError
        raise hub_error(str(source), revision, error) from None


def _said(error: BaseException) -> Exception:
    cause = error.__cause__
    return _said(cause) if isinstance(cause, LocalEntryNotFoundError) else cause or error
