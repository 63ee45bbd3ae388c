"""A deflated data set (PS3.5 A.5) read as if it were not, and deflated again. Pure.

Inflating only goes forward; a piece of what was inflated last is kept, and who
asks for what lies further back starts from the beginning. Memory is bounded,
whatever the data inflate to.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from dicomproxy.dataset.splice_walk import Read, SpliceError

_COMPRESSED_BYTES: Final = 64 * 1024
_STEP_BYTES: Final = 256 * 1024
_KEPT_BYTES: Final = 1024 * 1024
MAX_INFLATED_BYTES: Final = 4 * 1024 * 1024 * 1024 - 1


class Inflated:
    """Access to the inflated bytes by offset and size.

    Args:
        read: gives access to the deflated ones.

    Raises:
        SpliceError: they do not inflate, end too early, or inflate beyond the limit.
    """

    def __init__(self, read: Read, limit_bytes: int = MAX_INFLATED_BYTES) -> None:
        self._compressed = read
        self._limit_bytes = limit_bytes
        self._begin()
        while self._grow():
            self._forget(self._start + len(self._held))
        self.size_bytes = self._start + len(self._held)
        self._begin()

    def read(self, offset: int, size: int) -> bytes:
        """Return inflated bytes, fewer at the end."""
        if offset < self._start:
            self._begin()
        while self._start + len(self._held) < offset + size and self._grow():
            self._forget(offset)
        at = offset - self._start
        return bytes(self._held[at : at + size])

    def _begin(self) -> None:
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._offset = 0
        self._start = 0
        self._held = bytearray()

    def _forget(self, position: int) -> None:
        surplus = min(position - self._start, len(self._held)) - _KEPT_BYTES
        if surplus > _KEPT_BYTES:
            del self._held[:surplus]
            self._start += surplus

    def _grow(self) -> bool:
        if self._inflater.eof:
            return False
        compressed = self._inflater.unconsumed_tail
        if not compressed:
            compressed = self._compressed(self._offset, _COMPRESSED_BYTES)
            self._offset += len(compressed)
        try:
            inflated = self._inflater.decompress(compressed, _STEP_BYTES)
        except zlib.error:
            raise SpliceError("does not inflate") from None
        self._held += inflated
        if not compressed and not inflated and not self._inflater.eof:
            raise SpliceError("truncated")
        if self._start + len(self._held) > self._limit_bytes:
            raise SpliceError("inflates beyond the limit")
        return True


def deflate(chunks: Iterable[bytes], chunk_bytes: int) -> Iterator[bytes]:
    """Yield *chunks* deflated, padded to even length, at most *chunk_bytes* at a time.

    The same bytes in the same pieces give the same result.
    """
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    pending = bytearray()
    total = 0
    for chunk in chunks:
        deflated = deflater.compress(chunk)
        total += len(deflated)
        pending += deflated
        while len(pending) >= chunk_bytes:
            yield bytes(pending[:chunk_bytes])
            del pending[:chunk_bytes]
    deflated = deflater.flush()
    pending += deflated
    if (total + len(deflated)) % 2:
        pending += b"\0"
    for at in range(0, len(pending), chunk_bytes):
        yield bytes(pending[at : at + chunk_bytes])
