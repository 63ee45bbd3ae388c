"""Received messages on disk, until they are handled. Used from one thread.

Rules kept: :meth:`Journal.append` returns once the message is on disk, or nothing of
it counts. The file is for its owner only, since a message names a patient; it has a
bound; it is empty when everything is handled. Two processes never share one.

A line is a message (``M``, number, CRC-32, base64) or the note that one was handled
(``D``, number). Notes are not synced: what was handled and whose note was lost is
handled again, so that handling must bear repetition.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import os
import zlib
from pathlib import Path
from typing import Final

from dicomproxy.logs import get_logger

_READ_BYTES: Final = 1024 * 1024

_log = get_logger()


class JournalFull(Exception):
    """The bound is reached: messages that nobody handled fill the journal."""


class Journal:
    """An append-only file of messages that wait to be handled.

    Args:
        path: the file; made if it does not exist.
        max_bytes: how large it may become.
        max_messages: how many may wait in it.
    """

    def __init__(
        self, path: Path, *, max_bytes: int = 64 * 1024 * 1024, max_messages: int = 10_000
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_messages = max_messages
        self._descriptor = -1
        self._size = 0
        self._last = 0
        # Number to offset and length of its line; the messages themselves stay on disk.
        self._waiting: dict[int, tuple[int, int]] = {}

    @property
    def count(self) -> int:
        """How many messages wait."""
        return len(self._waiting)

    def open(self) -> list[int]:
        """Open the file; return the numbers of what waits, in the order received.

        Raises:
            OSError: it cannot be opened, or another process has it.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptor = _open_locked(self._path, os.O_CREAT)
        try:
            _sync_directory(self._path.parent)
            self._scan()
            if not self._waiting:
                self._cut(0)
        except BaseException:
            self.close()
            raise
        return list(self._waiting)

    def append(self, message: bytes) -> int:
        """Write a message; return its number once it is on disk.

        Raises:
            JournalFull: there is no room within the bounds.
            OSError: the disk is full, failing or gone.
        """
        number = self._last + 1
        line = _message_line(number, message)
        if len(self._waiting) >= self._max_messages:
            raise JournalFull
        if self._size + len(line) > self._max_bytes:
            self._compact()
            if self._size + len(line) > self._max_bytes:
                raise JournalFull
        offset = self._size
        self._write(line, synced=True)
        self._last = number
        self._waiting[number] = (offset, len(line))
        return number

    def read(self, number: int) -> bytes:
        """Return a message that waits.

        Raises:
            OSError: the disk fails.
            ValueError: what is there is not what was written.
        """
        offset, length = self._waiting[number]
        line = _read(self._descriptor, offset, length)
        found = _parse_message(line)
        if found is None or found[0] != number:
            raise ValueError("damaged")
        return found[1]

    def done(self, number: int) -> None:
        """Note that a message was handled, or is given up.

        Raises:
            OSError: the disk took no note; after a restart it is handled again.
        """
        if self._waiting.pop(number, None) is None:
            return
        if self._waiting:
            self._write(b"D %d\n" % number, synced=False)
        else:
            self._cut(0)

    def close(self) -> None:
        """Close the file; it opens again with :meth:`open`."""
        descriptor, self._descriptor = self._descriptor, -1
        self._waiting.clear()
        if descriptor >= 0:
            os.close(descriptor)

    # --------------------------------------------------------------- internals

    def _scan(self) -> None:
        """Learn what waits, and cut off what a crash left of a last line."""
        self._waiting.clear()
        self._last = self._size = 0
        damaged = 0
        rest = b""
        while piece := _read(self._descriptor, self._size + len(rest), _READ_BYTES):
            lines = (rest + piece).split(b"\n")
            rest = lines.pop()
            for line in lines:
                damaged += not self._take(line, self._size)
                self._size += len(line) + 1
        if rest:
            os.ftruncate(self._descriptor, self._size)
        if damaged:
            _log.error("mllp_journal_damaged", lines=damaged, path=str(self._path))

    def _take(self, line: bytes, offset: int) -> bool:
        """Note one line of the file; False if it is none of ours."""
        kind, _, rest = line.partition(b" ")
        if kind == b"D" and rest.isdigit():
            self._waiting.pop(int(rest), None)
            return True
        found = _parse_message(line + b"\n")
        if found is None:
            return False
        self._last = max(self._last, found[0])
        self._waiting[found[0]] = (offset, len(line) + 1)
        return True

    def _write(self, data: bytes, *, synced: bool) -> None:
        if self._descriptor < 0:
            raise OSError("the journal is closed")
        # What a failed write left behind is overwritten, and gone if this one is shorter.
        if os.fstat(self._descriptor).st_size != self._size:
            os.ftruncate(self._descriptor, self._size)
        try:
            _write_all(self._descriptor, data, self._size)
            if synced:
                os.fsync(self._descriptor)
        except OSError:
            self._cut(self._size)
            raise
        self._size += len(data)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self._size = size

    def _compact(self) -> None:
        """Write what waits into a new file that takes the old one's place."""
        new_path = self._path.with_name(self._path.name + ".new")
        # Locked before it bears the name, so that nobody gets in between.
        descriptor = _open_locked(new_path, os.O_CREAT)
        waiting: dict[int, tuple[int, int]] = {}
        size = 0
        try:
            os.ftruncate(descriptor, 0)
            for number, (offset, length) in self._waiting.items():
                _write_all(descriptor, _read(self._descriptor, offset, length), size)
                waiting[number] = (size, length)
                size += length
            os.fsync(descriptor)
            os.replace(new_path, self._path)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(self._descriptor)
        self._descriptor, self._waiting, self._size = descriptor, waiting, size
        _sync_directory(self._path.parent)


def _message_line(number: int, message: bytes) -> bytes:
    return b"M %d %08x %s\n" % (number, zlib.crc32(message), base64.b64encode(message))


def _parse_message(line: bytes) -> tuple[int, bytes] | None:
    """Return number and content of a message's line, None if it is not one or not whole."""
    pieces = line.split(b" ")
    if len(pieces) != 4 or pieces[0] != b"M" or not pieces[1].isdigit():
        return None
    try:
        message = base64.b64decode(pieces[3].rstrip(b"\n"), validate=True)
        checksum = int(pieces[2], 16)
    except (binascii.Error, ValueError):
        return None
    return (int(pieces[1]), message) if zlib.crc32(message) == checksum else None


def _open_locked(path: Path, flags: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, 0o600)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read(descriptor: int, offset: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        length -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
