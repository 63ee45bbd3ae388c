"""One SQLite file of the state room; used from one thread only.

Nothing in such a file is irreplaceable: what is lost is learnt again. So a file
that cannot be read is set aside, never repaired, and an empty one takes its
place. A full or read-only disk is no damage: it raises, and the file is tried
again later.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from dicomproxy.logs import get_logger

T = TypeVar("T")

_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SIDE_FILES: Final = ("", "-wal", "-shm")
_BUSY_SECONDS: Final = 5.0

_log = get_logger()


class _Unusable(Exception):
    """The file is no database of ours; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class StateFile:
    """A file, opened when first needed and again after a failure.

    Args:
        path: where it is; its directory is made if it does not exist.
        tables: SQL that makes its tables.
        schema_version: of *tables*; a file with another one is set aside.
        later: SQL that is run whenever the file is opened, and changes nothing
            where it was run before: indexes that older files lack.
        survives_power_cut: whether a write that returned is on the disk. If not,
            a power cut may cost the last moments, never the file.
    """

    def __init__(
        self,
        path: Path,
        tables: str,
        schema_version: int,
        *,
        later: str = "",
        survives_power_cut: bool = False,
    ) -> None:
        self._path = path
        self._tables = tables
        self._schema_version = schema_version
        self._later = later
        self._synchronous = "FULL" if survives_power_cut else "NORMAL"
        self._connection: sqlite3.Connection | None = None

    def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run *job*; a file that turns out unusable is set aside and *job* meets an empty one.

        Raises:
            sqlite3.Error, OSError: the disk failed, and nothing was changed
                if *job* changes in one transaction.
        """
        try:
            return self._attempt(job)
        except _Unusable as unusable:
            self._set_aside(unusable.reason)
        try:
            return self._attempt(job)
        except _Unusable as unusable:
            # A new file is no better: it is the disk that fails.
            raise sqlite3.DatabaseError(unusable.reason) from None

    def close(self) -> None:
        """Close the file; it opens again if it is used again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _attempt(self, job: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._open()
            return job(self._connection)
        except (sqlite3.Error, OSError) as error:
            # Closed after any failure: a disk that was full or gone is met afresh.
            self.close()
            if _is_damage(error):
                raise _Unusable("damaged") from None
            raise

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made here, not by SQLite: it holds patients' data, so that others may not read it.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and tables == 0:
                # One transaction: a full disk or a crash leaves no half of it.
                connection.executescript(
                    f"BEGIN IMMEDIATE; {self._tables}"
                    f" PRAGMA user_version = {self._schema_version}; COMMIT;"
                )
            elif version != self._schema_version:
                raise _Unusable("schema_version")
            if self._later:
                connection.executescript(self._later)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_aside(self, reason: str) -> None:
        """Rename the file and what belongs to it; only the latest such set is kept."""
        self.close()
        for suffix in _SIDE_FILES:
            try:
                os.replace(f"{self._path}{suffix}", f"{self._path}.damaged{suffix}")
            except FileNotFoundError:
                continue
        _log.error("state_set_aside", reason=reason, file=f"{self._path.name}.damaged")


def _is_damage(error: Exception) -> bool:
    # The low byte is the error, the rest details it; errors of the module itself have no code.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, sqlite3.DatabaseError) and code in _DAMAGED
