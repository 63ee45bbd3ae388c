"""The journal of one study: which instances it holds, and nothing else is believed.

A text file to which lines are only ever appended::

    <CRC-32 of the rest, 8 hex digits> <JSON object>

The first line names the study, so that a directory explains itself when the
index is lost. Rules kept: an instance exists once its line is written, after
its file was renamed into place; a line that does not match its CRC was torn by
a crash, or rotted, and counts as not written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dicomproxy.cache.layout import JOURNAL_NAME
from dicomproxy.ports import CachedInstance

_VERSION: Final = 1
_PREFIX_BYTES: Final = 9
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode

_FIELDS: Final[tuple[tuple[str, type], ...]] = (
    ("sop_class_uid", str),
    ("sop_instance_uid", str),
    ("series_instance_uid", str),
    ("transfer_syntax_uid", str),
    ("source", str),
    ("file_name", str),
    ("data_set_offset", int),
    ("size", int),
    ("crc32", int),
)


@dataclass(slots=True)
class JournalContent:
    """What the good lines of a journal add up to.

    ``torn`` counts lines that were not good; ``end`` is where the last good
    line ends, and the next one belongs.
    """

    study_instance_uid: str = ""
    instances: dict[str, CachedInstance] = field(default_factory=dict)
    complete: bool = False
    pinned: bool = False
    end: int = 0
    torn: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the files, heads included."""
        return sum(held.data_set_offset + held.size for held in self.instances.values())


# ---------------------------------------------------------------------- lines


def study_line(study_instance_uid: str) -> bytes:
    return _line({"op": "study", "version": _VERSION, "study_instance_uid": study_instance_uid})


def add_line(instance: CachedInstance) -> bytes:
    return _line({"op": "add", **{name: getattr(instance, name) for name, _ in _FIELDS}})


def remove_line(sop_instance_uid: str) -> bytes:
    return _line({"op": "remove", "sop_instance_uid": sop_instance_uid})


def complete_line(complete: bool, instances: int) -> bytes:
    """Say that the study is whole, being these many instances, or that it is not.

    The number makes a study incomplete again whose earlier lines are lost.
    """
    return _line({"op": "complete", "value": complete, "instances": instances})


def pin_line(pinned: bool) -> bytes:
    return _line({"op": "pin", "value": pinned})


def _line(fields: Mapping[str, Any]) -> bytes:
    body = _encode(fields).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body), body)


# -------------------------------------------------------------------- reading


def parse_journal(data: bytes) -> JournalContent:
    """Add up the good lines of a journal; any bytes whatever give a result."""
    content = JournalContent()
    offset = 0
    for raw in data.splitlines(keepends=True):
        offset += len(raw)
        fields = _good_fields(raw)
        if fields is None or not _apply(content, fields):
            content.torn += 1
        else:
            content.end = offset
    return content


def read_journal(directory: Path) -> JournalContent:
    """Read the journal of the study in *directory*.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    return parse_journal((directory / JOURNAL_NAME).read_bytes())


def _good_fields(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n") or raw[8:9] != b" ":
        return None
    body = raw[_PREFIX_BYTES:-1]
    if raw[:8] != b"%08x" % zlib.crc32(body):
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _apply(content: JournalContent, fields: dict[str, Any]) -> bool:
    """Take one line into account; False if it means nothing here."""
    op = fields.get("op")
    if op == "study":
        uid = fields.get("study_instance_uid")
        if fields.get("version") != _VERSION or not isinstance(uid, str) or not uid:
            return False
        content.study_instance_uid = uid
        return True
    if not content.study_instance_uid:
        return False
    if op == "add":
        instance = _instance(content.study_instance_uid, fields)
        if instance is None:
            return False
        content.instances[instance.sop_instance_uid] = instance
    elif op == "remove":
        content.instances.pop(str(fields.get("sop_instance_uid")), None)
    elif op == "complete":
        whole = fields.get("instances") == len(content.instances)
        content.complete = fields.get("value") is True and whole
    elif op == "pin":
        content.pinned = fields.get("value") is True
    else:
        return False
    return True


def _instance(study_instance_uid: str, fields: dict[str, Any]) -> CachedInstance | None:
    values = {name: fields.get(name) for name, _ in _FIELDS}
    if any(type(values[name]) is not kind for name, kind in _FIELDS):
        return None
    name = str(values["file_name"])
    # A file name is one of ours or the line is not.
    if not name or "/" in name or name.startswith("."):
        return None
    return CachedInstance(study_instance_uid=study_instance_uid, **values)  # type: ignore[arg-type]


# -------------------------------------------------------------------- writing


class Journal:
    """An open journal; owned by the thread that writes.

    A line is written where the last good one ended, so that what a failed
    write left behind is overwritten, never joined to.
    """

    def __init__(self, fd: int, end: int) -> None:
        self._fd = fd
        self._end = end

    @classmethod
    def open(cls, directory: Path, study_instance_uid: str) -> Journal:
        """Open the journal in *directory*, beginning it if there is none.

        Raises:
            OSError: it cannot be opened, read or begun.
        """
        path = directory / JOURNAL_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            journal = cls(fd, 0)
            length = os.fstat(fd).st_size
            if length:
                content = parse_journal(_read_all(fd, length))
                journal._end = content.end
                if length > content.end:
                    os.ftruncate(fd, content.end)
            if not journal._end:
                journal.append(study_line(study_instance_uid))
        except BaseException:
            os.close(fd)
            raise
        return journal

    def append(self, lines: bytes) -> None:
        """Write *lines* whole, or leave the journal as it was.

        Raises:
            OSError: they could not be written.
        """
        written = 0
        try:
            while written < len(lines):
                written += os.pwrite(self._fd, lines[written:], self._end + written)
        except OSError:
            self._forget_tail()
            raise
        self._end += len(lines)

    def sync_later(self) -> Callable[[], None]:
        """Return what another thread calls to have the lines so far on disk."""
        fd = os.dup(self._fd)

        def sync() -> None:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        return sync

    def close(self) -> None:
        os.close(self._fd)

    def _forget_tail(self) -> None:
        try:
            os.ftruncate(self._fd, self._end)
        except OSError:
            # The next line overwrites what was written, and whatever of it then
            # still follows matches no CRC.
            return


def _read_all(fd: int, length: int) -> bytes:
    parts = []
    offset = 0
    while offset < length:
        part = os.pread(fd, length - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
