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

from .checkpoint_files import FolderError

WEIGHTS_OF_A_FOLDER = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "onnx/*", "openvino/*")
"""Files that hold weights: those of an earlier export would contradict the new ones, so they go."""


@contextlib.contextmanager
def staged(output: Path, *, into_existing: bool = False, stale: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write to, which becomes `output` when the block ends without an error.

    Args:
        output: The folder to be.
        into_existing: Whether `output` may exist: files of the same names are replaced and the others stay.
        stale: Patterns of files in an existing `output` that are removed unless they were written again.

    Yields:
        An empty folder beside `output`.

    Raises:
        FolderError: `output` is a file, or not empty and not `into_existing`.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FolderError(f"{output} is a file.")
    if output.exists() and not into_existing and any(output.iterdir()):
        raise FolderError(f"{output} is not empty: name a new folder.")
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=parent))
    try:
        yield stage
        _publish(stage, output, stale)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
    for path in {path for pattern in stale for path in output.glob(pattern)}:
        if path.is_file() and path.relative_to(output) not in written:
            path.unlink()
    for folder in ("onnx", "openvino"):
        with contextlib.suppress(OSError):  # missing, or not empty
            (output / folder).rmdir()
