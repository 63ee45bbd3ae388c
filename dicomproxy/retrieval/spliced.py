"""Instances that are rewritten while they are read: the store's bytes with another header.

A reader of the store gives bytes to the event loop; rewriting wants to read
where it is. Rules kept: what a header needs is read first, without blocking, and
rewritten from memory, with a part or two from behind the pixels where something
follows them; only a data set of which more has to be seen, or a deflated one, is
gone through by a thread, which has the loop read for it, one or two at a time.
What nobody changes is read straight into where it is sent from. Memory in use
does not grow with the object.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final, Protocol

from dicomproxy.dataset.header import DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.dataset.splice import Copy, Read, Rewritten, Splice, SpliceError
from dicomproxy.ports import InstanceReader

HEAD_BYTES: Final = 64 * 1024
"""What is read before anything is decided; the headers of most instances end within it."""

_PART_BYTES: Final = 16 * 1024
_MOST_PARTS: Final = 4
"""Parts that are read one by one, the beginning among them, before a thread is asked."""

_THREADS: Final = 2
_READ_SECONDS: Final = 120.0


class Rewriting(Protocol):
    """As :class:`~dicomproxy.dataset.splice.Rewriter`."""

    def rewrite(self, read: Read, size_bytes: int, transfer_syntax_uid: str) -> Rewritten: ...


class _Beyond(Exception):
    """More of the data set is needed than is in memory: *size* bytes from *offset* on."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        super().__init__("more is needed")


class Splicing:
    """Rewrites instances, a few of the difficult ones at a time."""

    def __init__(self) -> None:
        self._threads = asyncio.Semaphore(_THREADS)

    async def open(
        self, reader: InstanceReader, transfer_syntax_uid: str, rewriting: Rewriting
    ) -> InstanceReader:
        """Return a reader of the rewritten data set, which closes *reader* in its turn.

        Raises:
            SpliceError, OSError: it cannot be rewritten, or read.
        """
        size = reader.size
        rewritten: Rewritten | None = None
        if transfer_syntax_uid != DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
            parts = [(0, await _part(reader, 0, HEAD_BYTES))]
            while rewritten is None:
                try:
                    rewritten = rewriting.rewrite(_within(parts, size), size, transfer_syntax_uid)
                except _Beyond as beyond:
                    if len(parts) == _MOST_PARTS or beyond.size > _PART_BYTES:
                        break
                    part = await _part(reader, beyond.offset, _PART_BYTES)
                    parts.append((beyond.offset, part))
        if rewritten is None:
            read = _from_thread(reader, asyncio.get_running_loop())
            async with self._threads:
                rewritten = await asyncio.to_thread(
                    rewriting.rewrite, read, size, transfer_syntax_uid
                )
        if isinstance(rewritten, Splice):
            return SplicedReader(reader, rewritten)
        return _ChunkReader(reader, rewritten, self._threads)


async def _part(reader: InstanceReader, offset: int, size: int) -> bytes:
    part = bytearray(min(size, reader.size - offset))
    if await reader.read_into([memoryview(part)], offset) != len(part):
        raise OSError("the data set broke off")
    return bytes(part)


def _within(parts: Sequence[tuple[int, bytes]], size: int) -> Read:
    """Return how what is in memory is read: *parts* of a data set, each with its offset."""

    def read(offset: int, count: int) -> bytes:
        count = min(count, size - offset)
        if count <= 0:
            return b""
        for begin, part in parts:
            at = offset - begin
            if at >= 0 and at + count <= len(part):
                return part[at : at + count]
        raise _Beyond(offset, count)

    return read


def _from_thread(reader: InstanceReader, loop: asyncio.AbstractEventLoop) -> Read:
    """Return how a thread reads: it waits for *loop*, which never waits for it."""

    def read(offset: int, count: int) -> bytes:
        buffer = bytearray(max(0, min(count, reader.size - offset)))
        if not buffer:
            return b""
        reading = asyncio.run_coroutine_threadsafe(
            reader.read_into([memoryview(buffer)], offset), loop
        )
        return bytes(buffer[: reading.result(_READ_SECONDS)])

    return read


class SplicedReader:
    """Implements :class:`~dicomproxy.ports.InstanceReader` over new bytes and ranges of another."""

    def __init__(self, reader: InstanceReader, splice: Splice) -> None:
        self._reader = reader
        self._segments = splice.segments
        self._ends = list(accumulate(map(_length, splice.segments)))

    @property
    def size(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def arrived(self) -> int:
        return self._reader.arrived

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """See the port; offsets are those of the rewritten data set."""
        begin = offset
        left = [buffer for buffer in buffers if buffer.nbytes]
        at = bisect_right(self._ends, offset)
        while left and at < len(self._segments):
            segment = self._segments[at]
            inside = offset - (self._ends[at] - _length(segment))
            here, left = _split(left, self._ends[at] - offset)
            count = sum(buffer.nbytes for buffer in here)
            if isinstance(segment, Copy):
                got = await self._reader.read_into(here, segment.offset + inside)
            else:
                got = _fill(here, segment, inside)
            offset += got
            if got < count:
                break
            at += 1
        return offset - begin

    async def close(self) -> None:
        await self._reader.close()


def _length(segment: bytes | Copy) -> int:
    return segment.size if isinstance(segment, Copy) else len(segment)


def _split(buffers: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """Divide *buffers* after their first *size* bytes."""
    first: list[memoryview] = []
    for number, buffer in enumerate(buffers):
        if size <= 0:
            return first, list(buffers[number:])
        first.append(buffer[:size])
        if buffer.nbytes > size:
            return first, [buffer[size:], *buffers[number + 1 :]]
        size -= buffer.nbytes
    return first, []


def _fill(buffers: Sequence[memoryview], data: bytes, at: int) -> int:
    begin = at
    for buffer in buffers:
        part = data[at : at + buffer.nbytes]
        buffer[: len(part)] = part
        at += len(part)
    return at - begin


class _ChunkReader:
    """Reads what can only be had from its beginning to its end, piece by piece.

    The pieces are made by threads. One who reads again from the beginning, as for
    another association, has them made again.
    """

    def __init__(
        self, reader: InstanceReader, rewritten: Rewritten, threads: asyncio.Semaphore
    ) -> None:
        self._reader = reader
        self._rewritten = rewritten
        self._threads = threads
        self._chunks: Iterator[bytes] = iter(())
        self._piece = b""
        self._begin = 0
        self._started = False

    @property
    def size(self) -> int:
        return self._rewritten.total_bytes

    @property
    def arrived(self) -> int:
        return self._reader.arrived

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """See the port; costs time in proportion to the offset unless that only grows.

        Raises:
            OSError: the original cannot be read, or is not what it was.
        """
        if not self._started or offset < self._begin:
            self._chunks, self._piece, self._begin = self._rewritten.chunks(), b"", 0
            self._started = True
        begin = offset
        left = [buffer for buffer in buffers if buffer.nbytes]
        while left:
            inside = offset - self._begin
            if inside >= len(self._piece):
                self._begin += len(self._piece)
                # A piece that is given up is lost: who reads on then has all made again.
                self._started = False
                self._piece = await self._next()
                self._started = True
                if not self._piece:
                    break
                continue
            here, left = _split(left, len(self._piece) - inside)
            offset += _fill(here, self._piece, inside)
        return offset - begin

    async def _next(self) -> bytes:
        following: Callable[[Iterator[bytes], bytes], bytes] = next
        async with self._threads:
            making = asyncio.get_running_loop().run_in_executor(None, following, self._chunks, b"")
            try:
                return await asyncio.shield(making)
            except asyncio.CancelledError:
                # Who reads again, from the beginning, shares with it what has been inflated.
                await _ended(making)
                raise
            except SpliceError:
                raise OSError("the data set broke off") from None

    async def close(self) -> None:
        await self._reader.close()


async def _ended(making: asyncio.Future[bytes]) -> None:
    """Wait for a thread, however often the waiting task is cancelled."""
    while not making.done():
        try:
            await asyncio.wait([making])
        except asyncio.CancelledError:
            continue
    if not making.cancelled():
        making.exception()  # seen
