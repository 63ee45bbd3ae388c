"""The audit file itself; used from one thread.

Appends whole batches and syncs them. A batch that fails is cut off again, so
that a retry does not write lines twice. The file may be rotated away, emptied
or replaced between two batches: it is looked at before each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from dicomproxy.audit.chain import Link, chain_line, read_link
from dicomproxy.logs import get_logger

_TAIL_BYTES: Final = 64 * 1024

_log = get_logger()


class Journal:
    """An append-only file of chained lines.

    After an exception of :meth:`append` nothing of that batch counts as written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._size = 0
        self._last = Link()

    @property
    def last(self) -> Link:
        """Number and hash of the last line written or found."""
        return self._last

    def append(self, payloads: list[bytes]) -> None:
        """Write *payloads* as the next lines and return once they are on disk.

        Raises:
            OSError: the disk is full, failing or gone.
        """
        self._make_ready()
        lines: list[bytes] = []
        last = self._last
        for payload in payloads:
            line, last = chain_line(payload, last)
            lines.append(line)
        if not lines:
            return
        data = b"".join(lines)
        try:
            _write_all(self._descriptor, data)
            os.fsync(self._descriptor)
        except OSError:
            self._cut_back()
            raise
        self._size += len(data)
        self._last = last

    def close(self) -> None:
        """Close the file; it opens again if it is used again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _make_ready(self) -> None:
        """Have the file open that is now under the path, and know its last line."""
        if self._descriptor >= 0 and not self._is_current():
            self.close()
        if self._descriptor < 0:
            self._open()
        elif (size := os.fstat(self._descriptor).st_size) != self._size:
            # Emptied by a rotation that copies, or touched by somebody else.
            _log.warning("audit_file_changed", size=size, expected=self._size)
            self._read_end()

    def _is_current(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        # For its owner only; what an operator made of an existing file is respected.
        self._descriptor = os.open(self._path, flags, 0o600)
        try:
            _sync_directory(self._path.parent)
            self._read_end()
        except OSError:
            self.close()
            raise

    def _read_end(self) -> None:
        """Learn the last line, and end it if a crash tore it."""
        size = os.fstat(self._descriptor).st_size
        lines = self._last_lines(size)
        if lines and lines[-1] != b"":
            _write_all(self._descriptor, b"\n")
            os.fsync(self._descriptor)
            _log.error("audit_repaired", size=size)
            size += 1
            lines.append(b"")
        if lines:
            found = read_link(lines[:-1])
            self._last = Link(max(found.seq, self._last.seq), found.hash)
        # An empty file continues the one that was rotated away before.
        self._size = size

    def _last_lines(self, size: int) -> list[bytes]:
        """Split the end of the file; the last piece is what follows the last newline.

        Reads back until a whole line is among them that tells its number: a torn
        line may stand last.
        """
        length = _TAIL_BYTES
        while size:
            start = max(0, size - length)
            pieces = _read_all(self._descriptor, size - start, start).split(b"\n")
            if start == 0:
                return pieces
            whole = pieces[1:]  # the first one's beginning may be out of reach
            if len(whole) > 1 and read_link(whole).seq:
                return whole
            length *= 4
        return []

    def _cut_back(self) -> None:
        """Remove what a failed batch left, or forget the file, whose end is then read again."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            self.close()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_all(descriptor: int, length: int, offset: int) -> bytes:
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
