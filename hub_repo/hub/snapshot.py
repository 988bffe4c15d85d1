"""The files of a Hub repository on this disk: those that a conversion reads, or a model is loaded from."""

from pathlib import Path

from ..folders.checkpoint_files import INDEX, WEIGHTS, FolderError

_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*")


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """A folder with the files of a folder or Hub repository; of the latter without what no conversion reads.

    Raises:
        FolderError: There is no such folder or repository, or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    if len(Path(source).parts) != 2 or Path(source).is_absolute():
        raise FolderError(f"{source} is neither a folder nor the name of a Hub repository.")
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_FETCHED)))
        if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            snapshot_download(str(source), revision=revision, allow_patterns=["pytorch_model*.bin"])
        return folder
    except Exception as error:  # the Hub client has many
        message = " ".join(str(error).split())[:300]
        raise FolderError(f"{source} cannot be fetched from the Hub: {type(error).__name__}: {message}") from None
