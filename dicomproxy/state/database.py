"""The SQLite file behind the state store; used from its one thread only.

Nothing in it is irreplaceable: a location is learnt again by the next query.
So a file that cannot be read is set aside, never repaired, and an empty one
takes its place. A full or read-only disk is no damage: it raises, and the file
is tried again later.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from dicomproxy.logs import get_logger
from dicomproxy.ports import Location

FILE_NAME: Final = "state.sqlite3"
SCHEMA_VERSION: Final = 1

# One transaction: a full disk or a crash leaves no half of it.
_SCHEMA: Final = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE location (
        study_instance_uid TEXT NOT NULL,
        source TEXT NOT NULL,
        patient_id TEXT NOT NULL,
        last_seen INTEGER NOT NULL,
        PRIMARY KEY (study_instance_uid, source)
    ) WITHOUT ROWID;
    CREATE INDEX location_last_seen ON location (last_seen);
    PRAGMA user_version = {SCHEMA_VERSION};
    COMMIT;
"""
_REMEMBER: Final = """
    INSERT INTO location VALUES (?, ?, ?, ?)
    ON CONFLICT (study_instance_uid, source) DO UPDATE SET
        last_seen = excluded.last_seen,
        patient_id = CASE excluded.patient_id WHEN '' THEN patient_id ELSE excluded.patient_id END
"""
"""A row that does not name the patient does not unname one."""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SIDE_FILES: Final = ("", "-wal", "-shm")
_BUSY_SECONDS: Final = 5.0

_log = get_logger()

T = TypeVar("T")
Changes = Mapping[str, Mapping[str, Location | None]]
"""By study and source: where it was seen, or None to forget."""


class _Unusable(Exception):
    """The file is no database of ours; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Database:
    """The file, opened when first needed and again after a failure.

    Every method may raise ``sqlite3.Error`` or ``OSError``; none of them then
    has changed anything.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._connection: sqlite3.Connection | None = None

    def read(self, study_instance_uid: str) -> tuple[Location, ...]:
        """Return every stored location of a study."""

        def select(connection: sqlite3.Connection) -> tuple[Location, ...]:
            rows = connection.execute(
                "SELECT source, patient_id FROM location WHERE study_instance_uid = ?",
                (study_instance_uid,),
            )
            return tuple(Location(study_instance_uid, source, patient) for source, patient in rows)

        return self._run(select)

    def write(self, changes: Changes, now: int) -> None:
        """Apply *changes* in one transaction, as seen at *now* (seconds since 1970)."""
        gone = [
            (study, source)
            for study, by_source in changes.items()
            for source, location in by_source.items()
            if location is None
        ]
        seen = [
            (study, source, location.patient_id, now)
            for study, by_source in changes.items()
            for source, location in by_source.items()
            if location is not None
        ]

        def apply(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(
                    "DELETE FROM location WHERE study_instance_uid = ? AND source = ?", gone
                )
                connection.executemany(_REMEMBER, seen)

        self._run(apply)

    def prune(self, before: int, keep: int) -> int:
        """Delete locations last seen before *before*, and the oldest beyond *keep*; count them."""

        def delete(connection: sqlite3.Connection) -> int:
            with connection:
                aged = connection.execute("DELETE FROM location WHERE last_seen < ?", (before,))
                (count,) = connection.execute("SELECT count(*) FROM location").fetchone()
                if count <= keep:
                    return aged.rowcount
                surplus = connection.execute(
                    "DELETE FROM location WHERE (study_instance_uid, source) IN"
                    " (SELECT study_instance_uid, source FROM location ORDER BY last_seen LIMIT ?)",
                    (count - keep,),
                )
                return aged.rowcount + surplus.rowcount

        return self._run(delete)

    def close(self) -> None:
        """Close the file; it opens again if it is used again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run *job*; a file that turns out unusable is set aside and *job* meets an empty one."""
        try:
            return self._attempt(job)
        except _Unusable as unusable:
            self._set_aside(unusable.reason)
        try:
            return self._attempt(job)
        except _Unusable as unusable:
            # A new file is no better: it is the disk that fails.
            raise sqlite3.DatabaseError(unusable.reason) from None

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
        # Made here, not by SQLite: it holds patient IDs, so that others may not read it.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # A power cut may cost the last moments, never the file.
            connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == 0 and tables == 0:
                connection.executescript(_SCHEMA)
            elif version != SCHEMA_VERSION:
                raise _Unusable("schema_version")
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
        _log.error("state_set_aside", reason=reason, file=f"{FILE_NAME}.damaged")


def _is_damage(error: Exception) -> bool:
    # The low byte is the error, the rest details it; errors of the module itself have no code.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, sqlite3.DatabaseError) and code in _DAMAGED
