"""The index over a cross-reference table: one SQLite file, made anew for each content.

Nothing in it is irreplaceable, it is made from the table again. Its name holds
the hash of the table's bytes, and it gets that name only once it is whole and on
disk, so that one that is there can be used, also after a crash. Rule kept: an
index exists only for a table in which every foreign ID leads to one local ID,
and every local ID to one foreign ID in each domain. Blocks: for a thread.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final

from dicomproxy.identity.table_file import MOST_FAULTS, Link, TableError, TableFault, TableFile

_SCHEMA_VERSION: Final = 1
_TABLES: Final = f"""
    CREATE TABLE form (is_wide INTEGER NOT NULL);
    CREATE TABLE name (number INTEGER PRIMARY KEY, name TEXT NOT NULL, line INTEGER NOT NULL);
    CREATE TABLE link (
        name INTEGER NOT NULL, foreign_id TEXT NOT NULL, local_id TEXT NOT NULL,
        line INTEGER NOT NULL
    );
    PRAGMA user_version = {_SCHEMA_VERSION};
"""
# Made once all is in: sorting is much faster than growing a tree in random order.
_INDEXES: Final = (
    "CREATE INDEX by_foreign ON link (name, foreign_id, local_id, line)",
    "CREATE INDEX by_local ON link (local_id, name, foreign_id, line)",
)
_CONFLICTS: Final = (
    (
        "an ID that belongs to another local ID",
        "SELECT max(line), min(line) FROM link GROUP BY name, foreign_id"
        " HAVING min(local_id) <> max(local_id) LIMIT ?",
    ),
    (
        "another ID in the same domain for a local ID",
        "SELECT max(line), min(line) FROM link GROUP BY local_id, name"
        " HAVING min(foreign_id) <> max(foreign_id) LIMIT ?",
    ),
)
_CACHE_KIB: Final = 16_384
_BATCH: Final = 1_000
_MOST_NAMES: Final = 1_000
_STEPS: Final = 100_000

Stop = Callable[[], bool]
"""Whether the work is to be given up."""


class Stopped(Exception):
    """The work was given up: the program ends."""


class Changing(Exception):
    """The table was written to while it was read."""


def content_hash(file: Path, stop: Stop) -> str:
    """Return the SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
        Stopped: *stop* said so.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            if stop():
                raise Stopped
    return digest.hexdigest()


def build(file: Path, index: Path, expected_hash: str, stop: Stop) -> None:
    """Make *index* from the table in *file*, whose content has *expected_hash*.

    Raises:
        TableError: the table is at fault.
        Changing: it is not the content that it was.
        Stopped: *stop* said so.
        OSError, sqlite3.Error: the disk is.
    """
    index.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = index.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    # Made here, not by SQLite: it holds patient IDs, so that others may not read it.
    os.close(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with file.open("rb") as stream, closing(sqlite3.connect(unfinished)) as connection:
            hashed = _Hashed(stream)
            _fill(connection, TableFile(hashed), stop)
            if hashed.digest.hexdigest() != expected_hash:
                raise Changing
        _sync(unfinished)
        os.replace(unfinished, index)
        _sync(index.parent)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            raise Stopped from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


class _Hashed:
    """A stream that knows the hash of what was read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        self.digest.update(line)
        return line


def _fill(connection: sqlite3.Connection, table: TableFile, stop: Stop) -> None:
    connection.set_progress_handler(lambda: int(stop()), _STEPS)
    # Until it has its name it may be lost; then it is synchronized as a whole.
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.executescript(_TABLES)
    connection.execute("INSERT INTO form VALUES (?)", (bool(table.names),))
    numbers = {name: number for number, name in enumerate(table.names)}
    connection.executemany(
        "INSERT INTO name VALUES (?, ?, 1)", [(number, name) for name, number in numbers.items()]
    )
    for batch in _batches(_numbered(table.links(), numbers, connection)):
        if stop():
            raise Stopped
        connection.executemany("INSERT INTO link VALUES (?, ?, ?, ?)", batch)
    for statement in _INDEXES:
        connection.execute(statement)
    faults = [
        TableFault(line, f"{problem} (see line {first})" if first != line else problem)
        for problem, query in _CONFLICTS
        for line, first in connection.execute(query, (MOST_FAULTS,))
    ]
    if faults:
        raise TableError(sorted(faults)[:MOST_FAULTS])
    connection.commit()


def _numbered(
    links: Iterable[Link], numbers: dict[str, int], connection: sqlite3.Connection
) -> Iterator[tuple[int, str, str, int]]:
    for name, foreign_id, local_id, line in links:
        number = numbers.get(name)
        if number is None:
            number = numbers[name] = len(numbers)
            if number >= _MOST_NAMES:
                raise TableError([TableFault(line, f"more than {_MOST_NAMES} domains")])
            connection.execute("INSERT INTO name VALUES (?, ?, ?)", (number, name, line))
        yield number, foreign_id, local_id, line


def _batches(
    rows: Iterator[tuple[int, str, str, int]],
) -> Iterator[list[tuple[int, str, str, int]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TableIndex:
    """An index that is there, for reading; by one thread at a time.

    Raises:
        sqlite3.Error: it is damaged, or made by another version.
    """

    def __init__(self, index: Path) -> None:
        self.path = index
        self._connection = sqlite3.connect(
            f"{index.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version != _SCHEMA_VERSION:
                raise sqlite3.DatabaseError("another version")
            rows = self._connection.execute("SELECT name, number, line FROM name").fetchall()
            (self.is_wide,) = self._connection.execute("SELECT is_wide FROM form").fetchone()
            (self.links,) = self._connection.execute("SELECT count(*) FROM link").fetchone()
        except BaseException:
            self.close()
            raise
        self.numbers = MappingProxyType({name: number for name, number, _ in rows})
        """By the name of a domain, as the table has it, its number here."""
        self.lines = MappingProxyType({name: line for name, _, line in rows})
        """By name, the line on which it is first used."""

    def foreign(self, local_id: str, name: int) -> str | None:
        """Return the ID that a patient of this site has in a domain."""
        return self._one(
            "SELECT foreign_id FROM link WHERE local_id = ? AND name = ?", local_id, name
        )

    def local(self, foreign_id: str, name: int) -> str | None:
        """Return the local ID of the patient with that ID in a domain."""
        return self._one(
            "SELECT local_id FROM link WHERE foreign_id = ? AND name = ?", foreign_id, name
        )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _one(self, query: str, value: str, name: int) -> str | None:
        row = self._connection.execute(f"{query} LIMIT 1", (value, name)).fetchone()
        return None if row is None else str(row[0])
