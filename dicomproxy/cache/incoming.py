"""One arriving instance: a file in ``incoming/``, or memory while the disk takes none.

The upper half is used from the event loop, the lower half by the writer
thread. An instance begins as a file; where the disk refuses even after
eviction, what was written is read back into memory and the rest follows it
there, so that nothing is lost. Only when memory too is used up is it given up,
and that is told at the end, when there is somebody to tell.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from dicomproxy.cache.checksum import crc32
from dicomproxy.cache.keeper import Keeper
from dicomproxy.cache.layout import instance_name
from dicomproxy.cache.lease import Lease
from dicomproxy.cache.room import NO_SPACE
from dicomproxy.cache.studies import Contents, Study
from dicomproxy.cache.thread import ThreadStopped, WriterThread
from dicomproxy.cache.vectors import MOST_BUFFERS, skip
from dicomproxy.dataset.header import WINDOW_BYTES, HeaderError, InstanceHeader, read_header
from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.ports import Admit, CachedInstance, Refused, Stored, StoreFull

_READ_BACK_BYTES: Final = 1024 * 1024


class IncomingInstance:
    """Receives the bytes of one data set; implements the port InstanceWriter."""

    def __init__(
        self,
        thread: WriterThread,
        keeper: Keeper,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        source: str,
    ) -> None:
        self._thread = thread
        self._keeper = keeper
        self._room = keeper.room
        self._sop_class_uid = sop_class_uid
        self._sop_instance_uid = sop_instance_uid
        self._transfer_syntax_uid = transfer_syntax_uid
        self._source = source
        # Of the writer thread:
        self._path: str | None = None
        self._fd = -1
        self._head = b""
        self._written = 0
        self._size = 0
        self._crc32 = 0
        self._beginning = b""
        self._memory: bytearray | None = None
        self._given_up: Exception | None = None
        self._ended = False

    # ---------------------------------------------------------- from the loop

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        """Queue *segments*, which stay unchanged until *release* is called on the loop."""
        self._thread.write(self, segments, release)

    async def commit(self, admit: Admit) -> Stored:
        """Make the instance exist, where *admit* says; ends it either way.

        Not synced: what a power failure takes away is found by its CRC-32.
        A caller that is cancelled leaves an instance that may exist.

        Raises:
            Refused: *admit* said no, the header cannot be read, or it is not
                what the command announced.
            StoreFull: neither disk nor memory had room, or the disk does not answer.
        """
        try:
            return await self._thread.ask(partial(self._commit, admit))
        except (ThreadStopped, TimeoutError):
            self.discard()
            raise StoreFull from None

    def discard(self) -> None:
        """Forget it; after a commit this does nothing."""
        self._thread.submit(self.end)

    # -------------------------------------------------------- from the thread

    def append(self, segments: list[memoryview]) -> None:
        """Take more bytes, or note why not."""
        if self._ended or self._given_up is not None:
            return
        size = 0
        for segment in segments:
            if (missing := WINDOW_BYTES - len(self._beginning)) > 0:
                # For the header, which is read when all has come.
                self._beginning += segment[:missing]
            self._crc32 = crc32(segment, self._crc32)
            size += segment.nbytes
        self._size += size
        if self._memory is not None:
            self._keep(segments, size)
        else:
            self._write([segment for segment in segments if segment.nbytes], size)

    def _write(self, views: list[memoryview], size: int) -> None:
        try:
            if self._fd < 0:
                self._head = build_file_meta(
                    self._sop_class_uid, self._sop_instance_uid, self._transfer_syntax_uid
                )
                views = [memoryview(self._head), *views]
                size += len(self._head)
                self._begin()
            if not self._room.make_room(size):
                self._move_to_memory(views, "cache_full")
                return
            while views:
                try:
                    count = os.writev(self._fd, views[:MOST_BUFFERS])
                except OSError as error:
                    if error.errno in NO_SPACE and self._room.evict_after_refusal(size):
                        continue
                    raise
                self._written += count
                self._room.wrote(count)
                skip(views, count)
        except OSError as error:
            self._move_to_memory(views, errno.errorcode.get(error.errno or 0, "OSError"))
        except ValueError:  # the command's UIDs cannot be written
            self._give_up(Refused("invalid_uid"))

    def _begin(self) -> None:
        self._keeper.arriving.add(self)
        path = f"{self._keeper.layout.incoming}/{self._room.new_name()}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._room.with_room(lambda: self._open(path, flags))

    def _open(self, path: str, flags: int) -> None:
        self._fd = os.open(path, flags, 0o600)
        self._path = path

    def _move_to_memory(self, rest: list[memoryview], reason: str) -> None:
        """Go on in memory, with what is in the file and the *rest* that is not."""
        if self._written < len(self._head):
            rest = rest[1:]  # what is left of the head, which memory does without
        if not self._room.reserve_memory(self._size):
            self._give_up(StoreFull(), reason)
            return
        memory = bytearray()
        try:
            offset = len(self._head)
            while offset < self._written:
                part = os.pread(self._fd, min(_READ_BACK_BYTES, self._written - offset), offset)
                if not part:
                    raise OSError(errno.EIO, "short read")
                memory += part
                offset += len(part)
        except OSError:
            self._room.free_memory(self._size)
            self._give_up(StoreFull(), reason)
            return
        for segment in rest:
            memory += segment
        self._memory = memory
        self._room.degraded("memory_spool", reason, self._size)
        self._remove_file()

    def _keep(self, segments: list[memoryview], size: int) -> None:
        if self._memory is None:
            return
        if not self._room.reserve_memory(size):
            self._give_up(StoreFull(), "memory_spool_full")
            return
        for segment in segments:
            self._memory += segment

    def _give_up(self, why: Exception, reason: str = "") -> None:
        if isinstance(why, StoreFull):
            self._room.degraded("refusing", reason, self._size)
        self._given_up = why
        self._forget_memory()
        self._remove_file()

    def _commit(self, admit: Admit) -> Stored:
        try:
            if self._ended:
                raise Refused("discarded")
            if self._fd < 0 and self._memory is None and self._given_up is None:
                raise Refused("unreadable_header")  # not one byte came
            if self._given_up is not None:
                raise self._given_up
            header = self._header()
            lease = admit(header)
            if not isinstance(lease, Lease):
                raise TypeError("admit returns a lease of this store")
            study, contents = lease.study, lease.study.contents
            if contents is None or lease.released:
                raise Refused("study_released")
            stored = self._store(study, contents, header)
            if not stored.duplicate and not stored.conflict:
                uid, instance = stored.instance.sop_instance_uid, stored.instance
                self._thread.post(partial(contents.live.__setitem__, uid, instance))
            return stored
        finally:
            self.end()

    def _header(self) -> InstanceHeader:
        try:
            header = read_header(self._read, self._transfer_syntax_uid)
        except (HeaderError, OSError):
            raise Refused("unreadable_header") from None
        if header.sop_class_uid != self._sop_class_uid:
            raise Refused("sop_class_mismatch")
        if header.sop_instance_uid != self._sop_instance_uid:
            raise Refused("sop_instance_mismatch")
        return header

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size <= len(self._beginning) or self._size == len(self._beginning):
            return self._beginning[offset : offset + size]
        if self._memory is not None:
            return bytes(self._memory[offset : offset + size])
        return os.pread(self._fd, size, offset + len(self._head))

    def _store(self, study: Study, contents: Contents, header: InstanceHeader) -> Stored:
        instance = self._described(study.study_instance_uid, header)
        held = contents.held.get(self._sop_instance_uid)
        if held is not None:
            same = (held.crc32, held.size, held.transfer_syntax_uid) == (
                instance.crc32,
                instance.size,
                instance.transfer_syntax_uid,
            )
            if same and self._path is not None:
                self._heal(study, contents, instance)
            return Stored(held, duplicate=same, conflict=not same)
        if self._path is not None:
            try:
                self._keeper.place(study, contents, self._path, instance)
            except OSError as error:
                self._move_to_memory([], errno.errorcode.get(error.errno or 0, "OSError"))
                if self._given_up is not None:
                    raise self._given_up from None
            else:
                self._path = None
                self._written = 0
                self._room.working()
                return Stored(instance)
        assert self._memory is not None  # noqa: S101 - else it is a file
        instance = self._described(study.study_instance_uid, header)
        self._keeper.hold(study, contents, self._memory, instance)
        self._memory = None
        return Stored(instance)

    def _heal(self, study: Study, contents: Contents, instance: CachedInstance) -> None:
        """Let these bytes replace the same ones that were not checked since a crash."""
        if self._path is None:
            return
        try:
            if self._keeper.heal(study, contents, self._path, instance):
                self._path = None
                self._written = 0
        except OSError:
            return  # the held ones are checked when they are opened

    def _described(self, study_instance_uid: str, header: InstanceHeader) -> CachedInstance:
        in_memory = self._memory is not None
        return CachedInstance(
            sop_class_uid=self._sop_class_uid,
            sop_instance_uid=self._sop_instance_uid,
            study_instance_uid=study_instance_uid,
            series_instance_uid=header.series_instance_uid,
            transfer_syntax_uid=self._transfer_syntax_uid,
            source=self._source,
            file_name="" if in_memory else instance_name(self._sop_instance_uid),
            data_set_offset=0 if in_memory else len(self._head),
            size=self._size,
            crc32=self._crc32,
        )

    def end(self) -> None:
        """Free whatever was not handed over; in the writer thread."""
        self._keeper.arriving.discard(self)
        self._ended = True
        self._forget_memory()
        self._remove_file()

    def _forget_memory(self) -> None:
        if self._memory is not None:
            self._room.free_memory(len(self._memory))
            self._memory = None

    def _remove_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._path is not None:
            path, self._path = self._path, None
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._room.not_recorded("not_deleted", error)
        self._room.incoming_bytes -= self._written
        self._written = 0
