"""Instances opened for sending: from their file, or from memory.

What the page cache holds is copied on the loop's thread, by a read that gives
up where it would have to wait (RWF_NOWAIT): that costs less than telling
another thread to do it. What has to come from the disk is read by a small pool
of threads, and so is everything on file systems without such reads. A file that
was unlinked or replaced while it is open is read to its end all the same.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from dicomproxy.cache.checksum import crc32
from dicomproxy.cache.vectors import MOST_BUFFERS, fill, skip
from dicomproxy.ports import CachedInstance

_PIECE_BYTES: Final = 1024 * 1024
_NO_WAIT: Final[int | None] = getattr(os, "RWF_NOWAIT", None)
_READ_AHEAD_BYTES: Final = 4 * 1024 * 1024
_MOST_UNWANTED: Final = 8
_UNWANTED_SECONDS: Final = 0.1
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class NotWhole(Exception):
    """The file is not what the journal says it is."""


def open_whole(path: Path | str, instance: CachedInstance, *, check_crc: bool) -> int:
    """Open an instance's file after checking its size and, if asked, its CRC.

    Returns:
        A file descriptor for the caller to close.

    Raises:
        NotWhole: it is missing, shorter or longer, or its bytes have changed.
        OSError: it cannot be opened now, though it may be sound.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotWhole from None
    try:
        if os.fstat(fd).st_size != instance.data_set_offset + instance.size:
            raise NotWhole
        if check_crc and _crc32(fd, instance.data_set_offset) != instance.crc32:
            raise NotWhole
    except BaseException:
        os.close(fd)
        raise
    return fd


class OpenedAhead(NamedTuple):
    """A descriptor, and what was read with it: see :class:`FileReader`."""

    fd: int
    head: bytes = b""
    arrived: int | None = None


def open_ahead(
    wanted: Iterable[tuple[str, CachedInstance]], head_bytes: int = 0
) -> list[OpenedAhead | None]:
    """Open files that will be read soon, and have the disk begin; None for one that is not whole.

    With each descriptor come the first *head_bytes* of its data set, fewer where it
    is shorter. CRCs are not looked at. Never raises.
    """
    opened: list[OpenedAhead | None] = []
    for path, instance in wanted:
        try:
            fd = open_whole(path, instance, check_crc=False)
        except (NotWhole, OSError):
            opened.append(None)
            continue
        ahead = OpenedAhead(fd)
        if head_bytes:
            with suppress(OSError):  # it will be said when it is read in earnest
                head = os.pread(fd, head_bytes, instance.data_set_offset)
                ahead = OpenedAhead(fd, head, int(os.fstat(fd).st_mtime))
        opened.append(ahead)
        if hasattr(os, "posix_fadvise"):
            length = min(instance.data_set_offset + instance.size, _READ_AHEAD_BYTES)
            with suppress(OSError):  # advice need not be taken
                os.posix_fadvise(fd, 0, length, os.POSIX_FADV_WILLNEED)
    return opened


def whole_instances(directory: Path, instances: Iterable[CachedInstance]) -> set[str]:
    """Return the SOP Instance UIDs of those whose files in *directory* have the right CRC.

    Raises:
        OSError: the process may not, or cannot, open files.
    """
    whole = set()
    for instance in instances:
        try:
            fd = open_whole(directory / instance.file_name, instance, check_crc=True)
        except NotWhole:
            continue
        os.close(fd)
        whole.add(instance.sop_instance_uid)
    return whole


def _crc32(fd: int, offset: int) -> int | None:
    """CRC-32 from *offset* to the end; None if the disk does not give it."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    crc = 0
    try:
        while count := os.preadv(fd, [buffer], offset):
            crc = crc32(buffer[:count], crc)
            offset += count
    except OSError:
        return None
    return crc


class Files:
    """What the readers of one cache share.

    Args:
        pool: threads that read, open and close.
    """

    def __init__(self, pool: Executor) -> None:
        self.pool = pool
        self.at_once = _NO_WAIT is not None
        """Whether what is in memory can be read without waiting; false once it was refused."""
        self._unwanted: list[int] = []
        self._timer: asyncio.TimerHandle | None = None

    def close(self, fd: int) -> None:
        """Close *fd* soon, off the loop, along with others.

        The last one to close an unlinked file frees its blocks, which takes a while.
        """
        self._unwanted.append(fd)
        if len(self._unwanted) >= _MOST_UNWANTED:
            self.flush()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_UNWANTED_SECONDS, self.flush)

    def flush(self) -> None:
        """Have what is to be closed closed now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        unwanted, self._unwanted = self._unwanted, []
        if not unwanted:
            return
        try:
            self.pool.submit(_close_all, unwanted)
        except RuntimeError:  # the pool has been shut down
            _close_all(unwanted)

    def read_at_once(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what can be had without waiting for a disk; none, if nothing can."""
        if not self.at_once or len(buffers) > MOST_BUFFERS:
            return 0
        try:
            return os.preadv(fd, buffers, offset, _NO_WAIT or 0)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self.at_once = False  # this file system has no such reads
            return 0


class FileReader:
    """Reads the data set of one file.

    Args:
        fd: owned from now on.
        on_close: called once, on the loop.
        head: the first bytes of the data set, if they have been read already.
        arrived: when the last byte was written, if that has been asked already.
    """

    def __init__(
        self,
        fd: int,
        instance: CachedInstance,
        files: Files,
        on_close: Callable[[], None],
        head: bytes = b"",
        arrived: int | None = None,
    ) -> None:
        self._arrived = arrived
        self._fd = fd
        self._head = head
        self._instance = instance
        self._files = files
        self._on_close = on_close
        self._reading = 0
        self._closed = False

    @property
    def size(self) -> int:
        return self._instance.size

    @property
    def arrived(self) -> int:
        """When the last byte was written, in seconds since 1970; waits for no disk."""
        if self._arrived is None:
            self._arrived = int(os.fstat(self._fd).st_mtime)
        return self._arrived

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill *buffers* from data set byte *offset*; fewer bytes only at the end.

        Returns, or raises, only once nobody writes to *buffers* any more, even
        if it is cancelled: they are blocks that another transfer uses next.
        Hence no deadline here; a read of a local file cannot be called off.

        Raises:
            OSError: the disk failed, or the reader is closed.
        """
        if self._closed:
            raise OSError("the reader is closed")
        wanted = min(sum(map(len, buffers)), self.size - offset)
        if offset < len(self._head):
            done = fill(buffers, self._head, offset)
            if done >= wanted:
                return done
            rest = list(buffers)
            skip(rest, done)
            # What is left begins behind the head, so that this goes no deeper.
            return done + await self.read_into(rest, offset + done)
        at = offset + self._instance.data_set_offset
        done = self._files.read_at_once(self._fd, buffers, at)
        if done >= wanted:
            return done
        rest = list(buffers)
        skip(rest, done)
        self._reading += 1
        try:
            job = asyncio.get_running_loop().run_in_executor(
                self._files.pool, _read, self._fd, rest, at + done
            )
            try:
                return done + await asyncio.shield(job)
            except asyncio.CancelledError:
                await _ended(job)
                raise
        finally:
            self._reading -= 1
            self._close_if_idle()

    async def close(self) -> None:
        """Let go of the file; twice is no error."""
        if not self._closed:
            self._closed = True
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self._closed or self._reading:
            return
        self._files.close(self._fd)
        self._on_close()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _ended(job: asyncio.Future[int]) -> None:
    """Wait for the end of *job*, however often the waiting task is cancelled."""
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError:
            continue
    if not job.cancelled():
        job.exception()  # seen


def _read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill *buffers*, however little the system gives at a time."""
    done = 0
    remaining = [buffer for buffer in buffers if buffer.nbytes]
    while remaining:
        count = os.preadv(fd, remaining[:MOST_BUFFERS], offset + done)
        if not count:
            break
        done += count
        skip(remaining, count)
    return done


class MemoryReader:
    """Reads an instance that is held in memory."""

    def __init__(self, data: bytearray, on_close: Callable[[], None]) -> None:
        self._data: memoryview | None = memoryview(data)
        self._size = len(data)
        self._on_close = on_close

    @property
    def size(self) -> int:
        return self._size

    @property
    def arrived(self) -> int:
        """Not known: what is in memory is there for once."""
        return 0

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As :meth:`FileReader.read_into`; copies at once."""
        if self._data is None:
            raise OSError("the reader is closed")
        return fill(buffers, self._data, offset)

    async def close(self) -> None:
        if self._data is not None:
            self._data = None
            self._on_close()
