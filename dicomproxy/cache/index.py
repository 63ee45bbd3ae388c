"""The database of studies: one diskcache item each, which journals can rebuild.

diskcache stores whatever it is given by pickling it, and unpickles whatever it
finds; a database that somebody else wrote could then run code. Our
:class:`JsonDisk` lets nothing through but ``str`` keys and JSON objects.

Owned by one thread: diskcache keeps a connection per thread.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import diskcache

_STUDY: Final = "study:"
_EPOCH_KEY: Final = "store:epoch"
_MODE_RAW: Final = 1
_TIMEOUT_SECONDS: Final = 5.0

_SETTINGS: Final[Mapping[str, Any]] = {
    # The store decides what goes; diskcache would drop rows and keep the files.
    "eviction_policy": "none",
    "cull_limit": 0,
    "size_limit": 2**62,
    "statistics": 0,
    "tag_index": 0,
    "sqlite_cache_size": 256,
    "sqlite_mmap_size": 0,
    "sqlite_journal_mode": "wal",
    "sqlite_synchronous": 1,
    "sqlite_auto_vacuum": 1,
    "disk_min_file_size": 0,
    "disk_pickle_protocol": 0,
}

_NOT_THE_FILES_FAULT: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
    }
)


class IndexUnusable(Exception):
    """The database cannot be used now, though it may be sound: full, locked, read-only."""


class IndexDamaged(Exception):
    """The database is not one of ours, or no longer."""


class _Refused(ValueError):
    """A key or value that is not a ``str`` or a JSON object."""


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """One row. ``open`` was written while instances were arriving: the size is
    then stale after a crash. ``epoch`` is the unclean start since which every
    instance was checked."""

    size_bytes: int
    instances: int
    last_used: float
    pinned: bool = False
    complete: bool = False
    open: bool = False
    epoch: int = 0

    @classmethod
    def from_json(cls, value: object) -> StudyRecord:
        """Check and convert a row's value.

        Raises:
            ValueError: it is none of ours.
        """
        if not isinstance(value, dict) or set(value) != set(cls.__slots__):
            raise ValueError("not a study record")
        for name in ("size_bytes", "instances", "epoch"):
            if type(value[name]) is not int or value[name] < 0:
                raise ValueError("not a study record")
        for name in ("pinned", "complete", "open"):
            if type(value[name]) is not bool:
                raise ValueError("not a study record")
        if type(value["last_used"]) not in (int, float):
            raise ValueError("not a study record")
        return cls(**value)


class JsonDisk(diskcache.Disk):  # type: ignore[misc]
    """Serialises ``str`` keys and JSON objects, refuses all else, writes no files."""

    def put(self, key: object) -> tuple[str, bool]:
        if type(key) is not str:
            raise _Refused("keys are text")
        return key, True

    def get(self, key: object, raw: object) -> str:
        if type(key) is not str or raw != 1:
            raise _Refused("keys are text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        if read or not isinstance(value, dict):
            raise _Refused("values are JSON objects")
        try:
            text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError):
            raise _Refused("values are JSON objects") from None
        return 0, _MODE_RAW, None, text

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> dict[str, Any]:
        if mode != _MODE_RAW or filename is not None or type(value) is not str or read:
            raise _Refused("values are JSON objects")
        found = json.loads(value)
        if not isinstance(found, dict):
            raise _Refused("values are JSON objects")
        return found

    def filename(self, key: object = None, value: object = None) -> tuple[str, str]:
        raise _Refused("values are JSON objects")

    def remove(self, file_path: object) -> None:
        # A row that names a file was not written by us: nothing is deleted for it.
        raise _Refused("values are JSON objects")


class StudyIndex:
    """The rows, as the one thread that opened them sees them."""

    def __init__(self, directory: Path) -> None:
        try:
            self._cache = diskcache.Cache(
                str(directory), timeout=_TIMEOUT_SECONDS, disk=JsonDisk, **_SETTINGS
            )
        except Exception as error:
            # A hostile or damaged Settings table can raise nearly anything here.
            raise _translated(error) from None

    def rows(self) -> dict[str, StudyRecord]:
        """Return every row.

        Raises:
            IndexDamaged: one of them is not ours, or the file is corrupt.
            IndexUnusable: it cannot be read now.
        """
        found: dict[str, StudyRecord] = {}
        try:
            for key in self._cache.iterkeys():
                if key.startswith(_STUDY):
                    found[key[len(_STUDY) :]] = StudyRecord.from_json(self._cache[key])
        except Exception as error:
            raise _translated(error) from None
        return found

    @property
    def epoch(self) -> int:
        """Names the latest unclean start; 0 if there was none."""
        try:
            value = self._cache.get(_EPOCH_KEY, default=None)
            return 0 if value is None else int(value["epoch"])
        except Exception as error:
            raise _translated(error) from None

    def set_epoch(self, epoch: int) -> None:
        self._set(_EPOCH_KEY, {"epoch": epoch})

    def put(self, study_instance_uid: str, record: StudyRecord) -> None:
        """Write a row.

        Raises:
            IndexUnusable, IndexDamaged: it was not written.
        """
        self._set(_STUDY + study_instance_uid, asdict(record))

    def delete(self, study_instance_uid: str) -> None:
        """Delete a row; none is no error.

        Raises:
            IndexUnusable, IndexDamaged: it was not deleted.
        """
        try:
            self._cache.delete(_STUDY + study_instance_uid)
        except (sqlite3.Error, diskcache.Timeout) as error:
            raise _translated(error) from None

    def close(self) -> None:
        try:
            self._cache.close()
        except sqlite3.Error as error:
            raise _translated(error) from None

    def _set(self, key: str, value: dict[str, Any]) -> None:
        try:
            self._cache.set(key, value)
        except (sqlite3.Error, diskcache.Timeout) as error:
            raise _translated(error) from None


def _translated(error: Exception) -> IndexUnusable | IndexDamaged:
    """Tell a database that cannot be used now from one that never will be again."""
    if isinstance(error, (diskcache.Timeout, OSError)):
        return IndexUnusable(type(error).__name__)
    # The low byte is the primary code, whatever extended code SQLite gave.
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and (code & 0xFF) in _NOT_THE_FILES_FAULT:
        return IndexUnusable(type(error).__name__)
    return IndexDamaged(type(error).__name__)


def set_aside(directory: Path) -> str:
    """Rename the database out of the way and return its new name.

    Raises:
        OSError: it could not be renamed.
    """
    aside = directory.with_name(f"{directory.name}.damaged-{time.time_ns()}")
    directory.rename(aside)
    directory.mkdir(mode=0o700)
    return aside.name


def read_rows(directory: Path) -> Iterator[tuple[str, StudyRecord]]:
    """Yield the rows of a database that another process may be writing.

    Opened read-only and without diskcache, which writes settings whenever it opens.

    Raises:
        IndexUnusable, IndexDamaged: it cannot be read.
    """
    path = directory / diskcache.core.DBNAME
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_TIMEOUT_SECONDS
        )
        try:
            found = connection.execute("SELECT key, value FROM Cache ORDER BY key").fetchall()
        finally:
            connection.close()
        for key, value in found:
            if isinstance(key, str) and key.startswith(_STUDY):
                yield key[len(_STUDY) :], StudyRecord.from_json(json.loads(value))
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise _translated(error) from None
