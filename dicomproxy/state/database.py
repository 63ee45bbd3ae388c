"""The SQLite file behind the state store; used from its one thread only.

Nothing in it is irreplaceable: a location is learnt again by the next query.
So a file that cannot be read is set aside, never repaired, and an empty one
takes its place. A full or read-only disk is no damage: it raises, and the file
is tried again later.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dicomproxy.logs import get_logger
from dicomproxy.ports import Location

FILE_NAME: Final = "state.sqlite3"
SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
    CREATE TABLE location (
        study_instance_uid TEXT NOT NULL,
        source TEXT NOT NULL,
        patient_id TEXT NOT NULL,
        last_seen INTEGER NOT NULL,
        PRIMARY KEY (study_instance_uid, source)
    ) WITHOUT ROWID;
    CREATE INDEX location_last_seen ON location (last_seen);
"""
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SIDE_FILES: Final = ("", "-wal", "-shm")

_log = get_logger()

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
                connection.executemany("INSERT OR REPLACE INTO location VALUES (?, ?, ?, ?)", seen)

        self._run(apply)

    def prune(self, before: int) -> int:
        """Delete locations last seen before *before*; return how many there were."""

        def delete(connection: sqlite3.Connection) -> int:
            with connection:
                return connection.execute(
                    "DELETE FROM location WHERE last_seen < ?", (before,)
                ).rowcount

        return self._run(delete)

    def close(self) -> None:
        """Close the file; it opens again if it is used again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _run[T](self, job: _Job[T]) -> T:
        raise NotImplementedError
