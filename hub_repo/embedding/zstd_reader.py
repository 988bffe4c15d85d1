"""A stream of what a .zst file holds, one frame after the other; a file that was cut off is an error."""

import io
from typing import BinaryIO

from ..requirements import require


class ZstdReader(io.RawIOBase):
    """Decompresses `raw`. NOTE: zstandard's own stream_reader takes a file that was cut off for a shorter one.

    Raises, while it is read:
        EOFError: The file ends within a frame.
        OSError: It is no zstd.
    """

    def __init__(self, raw: BinaryIO):
        self._zstandard = require("zstandard", "cli")
        self._raw, self._decompressor = raw, None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(2**16)
            if not self._compressed:
                if self._decompressor is not None:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return 0
            if self._decompressor is None:
                self._decompressor = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._decompressor.decompress(self._compressed))
            except self._zstandard.ZstdError as error:
                raise OSError(f"no zstd: {error}") from None
            self._compressed = self._decompressor.unused_data if self._decompressor.eof else b""
            if self._decompressor.eof:
                self._decompressor = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
