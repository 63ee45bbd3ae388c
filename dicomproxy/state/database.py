"""The table of study locations; used from the state store's one thread only."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from dicomproxy.ports import Location
from dicomproxy.state.file import StateFile

FILE_NAME: Final = "state.sqlite3"
SCHEMA_VERSION: Final = 1

_TABLES: Final = """
    CREATE TABLE location (
        study_instance_uid TEXT NOT NULL,
        source TEXT NOT NULL,
        patient_id TEXT NOT NULL,
        last_seen INTEGER NOT NULL,
        PRIMARY KEY (study_instance_uid, source)
    ) WITHOUT ROWID;
    CREATE INDEX location_last_seen ON location (last_seen);
"""
_LATER: Final = """
    CREATE INDEX IF NOT EXISTS location_patient ON location (source, patient_id);
"""
_REMEMBER: Final = """
    INSERT INTO location VALUES (?, ?, ?, ?)
    ON CONFLICT (study_instance_uid, source) DO UPDATE SET
        last_seen = excluded.last_seen,
        patient_id = CASE excluded.patient_id WHEN '' THEN patient_id ELSE excluded.patient_id END
"""
"""A row that does not name the patient does not unname one."""

Changes = Mapping[str, Mapping[str, Location | None]]
"""By study and source: where it was seen, or None to forget."""


class Database:
    """Study locations in their file.

    Every method may raise ``sqlite3.Error`` or ``OSError``; none of them then
    has changed anything.
    """

    def __init__(self, directory: Path) -> None:
        self._file = StateFile(directory / FILE_NAME, _TABLES, SCHEMA_VERSION, later=_LATER)

    def read(self, study_instance_uid: str) -> tuple[Location, ...]:
        """Return every stored location of a study."""

        def select(connection: sqlite3.Connection) -> tuple[Location, ...]:
            rows = connection.execute(
                "SELECT source, patient_id FROM location WHERE study_instance_uid = ?",
                (study_instance_uid,),
            )
            return tuple(Location(study_instance_uid, source, patient) for source, patient in rows)

        return self._file.run(select)

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

        self._file.run(apply)

    def forget_patients(self, patients: Collection[tuple[str, str]]) -> None:
        """Delete every location of patients, each a source and the ID there."""

        def delete(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(
                    "DELETE FROM location WHERE source = ? AND patient_id = ?", patients
                )

        self._file.run(delete)

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

        return self._file.run(delete)

    def close(self) -> None:
        """Close the file; it opens again if it is used again."""
        self._file.close()
