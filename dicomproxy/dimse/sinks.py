"""Where data sets go and where they come from: what an association asks of its user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Sink(Protocol):
    """Takes a data set as it arrives; all calls come from the event loop, in order."""

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        """Take bytes; *release* is to be called on the loop once they are no longer needed."""
        ...

    def discard(self) -> None:
        """The rest will not come."""
        ...


class DataSource(Protocol):
    """Gives a data set of known size."""

    @property
    def size(self) -> int: ...

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill *buffers* in order from byte *offset*; return how much was read."""
        ...


class BytesSink:
    """Collects a small data set, an identifier; what exceeds *limit_bytes* is dropped."""

    def __init__(self, limit_bytes: int) -> None:
        self.too_long = False
        self._limit = limit_bytes
        self._parts = bytearray()

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        for segment in segments:
            if len(self._parts) + len(segment) > self._limit:
                self.too_long = True
                self._parts.clear()
                self._limit = 0
            else:
                self._parts += segment
        release()

    def discard(self) -> None:
        self._parts.clear()

    @property
    def data(self) -> bytes:
        return bytes(self._parts)
