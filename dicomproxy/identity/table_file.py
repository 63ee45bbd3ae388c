"""The file of a cross-reference table: CSV, read line by line.

Two forms, told apart by the header row. *Wide*, a row for each patient::

    local,north,south
    4711,N-0815,S/22

and *long*, a row for each ID::

    local_id,source,id
    4711,north,N-0815

A column, or a value in ``source`` (which may be called ``domain``), is the name
of a source, or the namespace or the universal ID of its domain. In the wide
form a cell may be empty. Text is UTF-8; commas, semicolons or tabs separate,
whichever the header row has; quotes as in every CSV file.

Rules kept: a fault names a line, never a value, since values are patients'. The
file is never in memory, whatever its size, nor is a line beyond a limit. A table
that links nobody is refused: an export that failed must not look like a region
in which nobody has priors.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, Protocol

LONGEST_ID: Final = 64
"""LO (PS3.5 6.2)."""

MOST_FAULTS: Final = 20
"""Told at most; the rest of a file with so many is not read."""

_SHORTENED: Final = re.compile(r"[0-9]([.,][0-9]+)?E\+[0-9]{2,}")
"""A long number as a spreadsheet saves it: what it was is lost."""

_LONGEST_LINE_BYTES: Final = 65_536
_MOST_COLUMNS: Final = 256
_SEPARATORS: Final = ",;\t"
_LOCAL: Final = "local"
_LONG_FORMS: Final = ({"local_id", "source", "id"}, {"local_id", "domain", "id"})


class TableFault(NamedTuple):
    """One thing to correct; lines count from 1, 0 is the whole file."""

    line: int
    problem: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}" if self.line else self.problem


class TableError(Exception):
    """The table cannot be used; *faults* says why, at most :data:`MOST_FAULTS`."""

    def __init__(self, faults: Iterable[TableFault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(map(str, self.faults)))


class Link(NamedTuple):
    """A patient of this site has that ID in the domain that the file calls *name*."""

    name: str
    foreign_id: str
    local_id: str
    line: int


class Lines(Protocol):
    """A binary file, as far as it is needed here."""

    def readline(self, limit: int, /) -> bytes: ...


_TakeApart = Callable[[list[str]], Iterator[tuple[str, str, str]]]
"""Makes of a row the name, the foreign and the local ID of each of its links."""


class _Unreadable(Exception):
    """What follows this line cannot be made sense of."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        self.problem = problem
        super().__init__(problem)


def _lines(stream: Lines) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > _LONGEST_LINE_BYTES:
            raise _Unreadable(number, f"more than {_LONGEST_LINE_BYTES} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _Unreadable(number, "bytes that are not UTF-8") from None


class TableFile:
    """A table whose header row is read, and whose links are still to come.

    Raises:
        TableError: the header row is not one of a table.
        OSError: the file cannot be read.
    """

    def __init__(self, stream: Lines) -> None:
        self._lines = _lines(stream)
        try:
            header_line = next(self._lines, "")
            self._separator = max(_SEPARATORS, key=header_line.count)
            header = next(csv.reader([header_line], delimiter=self._separator), [])
            self._columns = [cell.strip() for cell in header]
            self.names: tuple[str, ...] = ()
            """What the header row calls the domains; none in the long form."""
            if set(self._columns) in _LONG_FORMS and len(self._columns) == 3:
                self._take_apart = _long_form(self._columns)
            else:
                self._take_apart = _wide_form(self._columns)
                self.names = tuple(name for name in self._columns if name != _LOCAL)
        except _Unreadable as broken:
            raise TableError([TableFault(broken.line, broken.problem)]) from None

    def links(self) -> Iterator[Link]:
        """Yield every link, in the order of the file.

        Raises:
            TableError: after the last link, or earlier if there are many faults;
                whoever took links until then throws them away.
            OSError: the file cannot be read.
        """
        faults: list[TableFault] = []
        found = False
        try:
            for link in self._links(faults):
                found = True
                yield link
        except _Unreadable as broken:
            faults.append(TableFault(broken.line, broken.problem))
        if not found and not faults:
            faults.append(TableFault(0, "not one ID, as after an export that failed"))
        if faults:
            raise TableError(faults)

    def _links(self, faults: list[TableFault]) -> Iterator[Link]:
        rows = csv.reader(self._lines, delimiter=self._separator, strict=True)
        width = len(self._columns)
        try:
            for row in rows:
                line = rows.line_num + 1  # the header row was read before
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != width:
                    problem = f"{len(row)} cells where the header row has {width}"
                    faults.append(TableFault(line, problem))
                else:
                    for link in self._take_apart([cell.strip() for cell in row]):
                        if problem := _problem(*link):
                            faults.append(TableFault(line, problem))
                        else:
                            yield Link(*link, line)
                if len(faults) >= MOST_FAULTS:
                    return
        except csv.Error:
            raise _Unreadable(rows.line_num + 1, "a quote that does not fit") from None


def _long_form(columns: list[str]) -> _TakeApart:
    local, foreign = columns.index("local_id"), columns.index("id")
    name = 3 - local - foreign

    def take_apart(row: list[str]) -> Iterator[tuple[str, str, str]]:
        yield row[name], row[foreign], row[local]

    return take_apart


def _wide_form(columns: list[str]) -> _TakeApart:
    if columns.count(_LOCAL) != 1 or not 2 <= len(columns) <= _MOST_COLUMNS:
        raise _Unreadable(
            1,
            "a header row that is neither local and the names of sources, "
            "nor local_id, source (or domain) and id",
        )
    if "" in columns or len(set(columns)) < len(columns):
        raise _Unreadable(1, "a column without a name, or a name twice")
    local = columns.index(_LOCAL)
    others = [(at, name) for at, name in enumerate(columns) if at != local]

    def take_apart(row: list[str]) -> Iterator[tuple[str, str, str]]:
        for at, name in others:
            if row[at]:
                yield name, row[at], row[local]

    return take_apart


def _problem(name: str, foreign_id: str, local_id: str) -> str:
    if not name:
        return "no source"
    for value, what in ((local_id, "local ID"), (foreign_id, "foreign ID")):
        if not value:
            return f"no {what}"
        if len(value) > LONGEST_ID:
            return f"a {what} of more than {LONGEST_ID} characters"
        if _SHORTENED.fullmatch(value):
            return f"a {what} that a spreadsheet has shortened to a rounded number"
        # As a key a wild card would match other patients as well (PS3.4 C.2.2.2.4).
        if not value.isprintable() or not set(value).isdisjoint("\\*?"):
            return f"a character that no {what} has"
    return ""
