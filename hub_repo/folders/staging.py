"""A folder is written whole or not at all.

Law: what is written lies in a hidden sibling of the output until it has been verified; then it is moved into place by
renames on one file system. A failure before that leaves the output as it was and no sibling behind.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from modeling_jina_bert import JinaBertConfig

from .checkpoint_files import FolderError, read_json

WEIGHTS_OF_A_FOLDER = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*.gguf",
    "onnx/*",
    "openvino/*",
)
"""Files that hold weights: those of an earlier export would contradict the new ones, so they go."""


@contextlib.contextmanager
def staged(output: Path, *, into_existing: bool = False, stale: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write to, which becomes `output` when the block ends without an error.

    Args:
        output: The folder to be.
        into_existing: Whether `output` may exist: files of the same names are replaced and the others stay.
        stale: Patterns of files in an existing `output` that are removed unless they were written again. If there are
            any, it has to be the folder of a JinaBERT.

    Yields:
        An empty folder beside `output`.

    Raises:
        FolderError: `output` is a file, or not empty and not `into_existing`; it holds what would be removed, and is
            not the folder of a JinaBERT.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FolderError(f"{output} is a file.")
    if output.exists() and not into_existing and any(output.iterdir()):
        raise FolderError(f"{output} is not empty: name a new folder.")
    if (found := _stale(output, stale)) and not holds_jina_bert(output):
        raise FolderError(
            f"{output} holds {found[0].relative_to(output)}, which would be removed as of an earlier export, and is "
            "no folder of a JinaBERT: name another folder."
        )
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=parent))
    try:
        yield stage
        _publish(stage, output, stale)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stale(output: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in output.glob(pattern) if path.is_file()})


def holds_jina_bert(folder: Path) -> bool:
    """Whether its config.json is that of a JinaBERT, in our form or the official one."""
    try:
        config = read_json(folder / "config.json")
    except FolderError:
        return False
    if not isinstance(config, dict):
        return False
    official = config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi"
    return official or config.get("model_type") == JinaBertConfig.model_type


def _umask() -> int:
    """What the user keeps from others."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _publish(stage: Path, output: Path, stale: Sequence[str]):
    for path in (stage, *stage.rglob("*")):  # mkdtemp and safetensors write what only their owner may read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
    if not output.exists():
        os.replace(stage, output)
        return
    written = {path.relative_to(stage) for path in stage.rglob("*") if path.is_file()}
    for name in sorted(written):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / name, output / name)
    for path in _stale(output, stale):
        if path.relative_to(output) not in written:
            path.unlink()
    for folder in ("onnx", "openvino"):
        with contextlib.suppress(OSError):  # missing, or not empty
            (output / folder).rmdir()
