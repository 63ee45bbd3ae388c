"""The cross-reference that is a table in a file, read again whenever the file changes.

Rules kept: lookups go to an index on disk, in a thread of their own, so that
neither the size of the table nor its being read again is felt. A new content is
in force at once and whole, or not at all: a table with any fault is refused,
which is logged with line numbers, and the one before stays in force. A file
that is still being written is left until it has kept still between two looks;
it is best replaced by renaming. Lookups wait for the first table, as long as
they may; where there is none to answer from they fail: that is an outage, not a
patient without an ID.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from prometheus_client import Gauge

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.reports import remember
from dicomproxy.identity.table_file import MOST_FAULTS, TableError, TableFault
from dicomproxy.identity.table_index import (
    Changing,
    Stopped,
    TableIndex,
    build,
    content_hash,
)
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import CrossReferenceError, Failure
from dicomproxy.tasks import TaskOwner

T = TypeVar("T")

_MOST_WAITING: Final = 256
_SETTLE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 30.0
_NAME_DIGITS: Final = 32
_HASH: Final = "[0-9a-f]" * _NAME_DIGITS
_NOT_THERE: Final = -1
_STOP_SECONDS: Final = 0.2

_BUILDING: Final[dict[Path, threading.Lock]] = {}
"""For each table, since after a reload the one before looks after the same file for a while."""

_log = get_logger()

_REFUSED = Gauge(
    "dicomproxy_cross_reference_table_refused",
    "1 while a table's latest content is not in force because it cannot be used, else 0.",
    ["service"],
)
_LINKS = Gauge(
    "dicomproxy_cross_reference_table_links",
    "IDs in other domains that the table in force has.",
    ["service"],
)

_in_use: Final[Counter[str]] = Counter()
"""How many there are of each table: after a reload two, for a while."""

_Signature = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Table:
    """A table in force: its index, and which of its names means which domain."""

    index: TableIndex
    numbers: dict[Domain, int]


def check_table(file: Path, domains: Domains) -> tuple[TableFault, ...]:
    """Return what is wrong with a table, nothing if it could be used. Blocks."""

    def never() -> bool:
        return False

    try:
        with tempfile.TemporaryDirectory() as directory:
            index = Path(directory) / "table.sqlite3"
            _signature(file)
            build(file, index, content_hash(file, never), never)
            _open(index, domains).index.close()
    except TableError as error:
        return error.faults
    except OSError as error:
        return (TableFault(0, f"cannot be read ({error.strerror or type(error).__name__})"),)
    except (sqlite3.Error, Changing) as error:
        return (TableFault(0, f"cannot be read ({type(error).__name__})"),)
    return ()


def remove_indexes(directory: Path, keep: Collection[str]) -> None:
    """Remove the indexes of tables other than those named: they hold patient IDs. Blocks.

    Raises:
        OSError: one cannot be removed.
    """
    for path in directory.glob(f"*-{_HASH}.*"):
        if path.name.split(".")[0][: -_NAME_DIGITS - 1] not in keep:
            # Whoever still reads it keeps it open.
            path.unlink(missing_ok=True)


class TableCrossReference:
    """Implements :class:`dicomproxy.ports.CrossReference`. Used from one event loop.

    Args:
        name: its name in the configuration; indexes are named after it.
        file: the table.
        directory: where its indexes go; other tables' may be there too.
        domains: what the names in the table mean.
        on_change: called when another content is in force than before.
        look_seconds: how often the file is looked at.
        deadline_seconds: for the disk to answer a lookup.
    """

    def __init__(
        self,
        name: str,
        file: Path,
        directory: Path,
        domains: Domains,
        *,
        on_change: Callable[[], None] | None = None,
        look_seconds: float = 5.0,
        deadline_seconds: float = 2.0,
    ) -> None:
        self._name = name
        self._file = file
        self._directory = directory
        self._domains = domains
        self._on_change = on_change
        self._look_seconds = look_seconds
        self._deadline_seconds = deadline_seconds
        self._table: _Table | None = None
        self._failure = CrossReferenceError(Failure.BUSY, "table_loading")
        self._concluded = asyncio.Event()  # whether there is a table, or why there is none
        self._seen: _Signature | None = None  # at the last look
        self._tried: _Signature | None = None  # what is in force, or was refused
        self._waiting = 0
        self._look_now = asyncio.Event()
        self._looked = asyncio.Condition()
        self._looking = False
        self._looks = 0
        self._pause_seconds = look_seconds
        self._unreadable = False
        self._stop = threading.Event()
        self._shown = False
        self._owner = TaskOwner(f"table-{name}")
        # Two, so that lookups go on while a table is read.
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix=f"table-{name}")
        self._builds = ThreadPoolExecutor(1, thread_name_prefix=f"table-build-{name}")

    def __repr__(self) -> str:
        return f"<TableCrossReference {self._name} {'ready' if self.ready else 'not ready'}>"

    @property
    def ready(self) -> bool:
        """Whether there is a table to answer from."""
        return self._table is not None

    # ---------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Begin to read the table, and to look for changes; does not wait for it."""
        self._shown = True
        _in_use[self._name] += 1
        self._owner.spawn(self._watch(), name="watch")

    async def look(self) -> None:
        """Look at the file now, and return once what it holds is in force or refused."""
        async with self._looked:
            # A look that is under way may have seen what was before.
            enough = self._looks + 1 + self._looking
            self._look_now.set()
            await self._looked.wait_for(lambda: self._looks >= enough)

    async def close(self) -> None:
        """Give up reading, and close the index."""
        self._stop.set()
        await self._owner.close()
        self._unshow()
        table, self._table = self._table, None
        self._failure = CrossReferenceError(Failure.ABORTED, "closing")
        self._concluded.set()
        if table is not None:
            self._lookups.submit(table.index.close)
        # Not waited for: a disk that hangs must not keep the program from ending.
        self._lookups.shutdown(wait=False)
        self._builds.shutdown(wait=False, cancel_futures=True)

    def _unshow(self) -> None:
        """Take a table that is configured no more out of the metrics."""
        if not self._shown:
            return
        self._shown = False
        _in_use[self._name] -= 1
        if not _in_use[self._name]:
            del _in_use[self._name]
            for gauge in (_REFUSED, _LINKS):
                with suppress(KeyError):
                    gauge.remove(self._name)

    # ------------------------------------------------------------------ lookup

    async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
        """Return the patient's ID in *domain*, none if the table has none.

        Raises:
            CrossReferenceError: there is no usable table, it does not know one of
                the domains, or the disk failed.
        """
        table = self._table or await self._first_table()
        asked = self._domains.canonical_id(patient)
        wanted = self._domains.canonical(domain)
        if asked.domain == wanted:
            return (asked,)
        to_local = None if self._is_local(asked.domain) else self._number(table, asked.domain)
        to_foreign = None if self._is_local(wanted) else self._number(table, wanted)

        def find() -> str | None:
            value: str | None = asked.value
            if to_local is not None:
                value = table.index.local(asked.value, to_local)
            if value is not None and to_foreign is not None:
                value = table.index.foreign(value, to_foreign)
            return value

        if _NOT_THERE in (to_local, to_foreign):
            return ()
        found = await self._ask(find, table)
        return () if found is None else (PatientId(found, wanted),)

    def forget(self, patient: PatientId) -> None:
        """Do nothing: nothing is remembered but what the table says."""

    async def _first_table(self) -> _Table:
        """Wait for the table that is being read, as after a start or a reload."""
        try:
            async with asyncio.timeout(self._deadline_seconds):
                await self._concluded.wait()
        except TimeoutError:
            pass
        if self._table is None:
            raise CrossReferenceError(self._failure.failure, self._failure.reason)
        return self._table

    def _is_local(self, domain: Domain) -> bool:
        return domain == self._domains.local

    def _number(self, table: _Table, domain: Domain) -> int:
        number = table.numbers.get(domain)
        if number is not None:
            return number
        if table.index.is_wide or domain not in tuple(self._domains):
            raise CrossReferenceError(Failure.STATUS, "unknown_domain")
        # In the long form a domain is there as soon as somebody has an ID in it.
        return _NOT_THERE

    async def _ask(self, find: Callable[[], T], table: _Table) -> T:
        if self._waiting >= _MOST_WAITING:
            raise CrossReferenceError(Failure.BUSY, "too_many_lookups")
        future = asyncio.get_running_loop().run_in_executor(self._lookups, find)
        self._waiting += 1
        future.add_done_callback(self._answered)
        try:
            async with asyncio.timeout(self._deadline_seconds):
                # Shielded: what hangs in the thread goes on counting as waiting.
                return await asyncio.shield(future)
        except TimeoutError:
            raise CrossReferenceError(Failure.TIMEOUT, "disk") from None
        except sqlite3.Error as error:
            _log.error("cross_reference_index_failed", service=self._name, **error_fields(error))
            if self._table is table:
                self._discard(table)
            raise CrossReferenceError(Failure.PROTOCOL, "index_damaged") from None

    def _answered(self, future: asyncio.Future[T]) -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # retrieved, for the case that nobody waits any more

    def _discard(self, table: _Table) -> None:
        """Have the index made again from the table."""
        self._table = None
        self._failure = CrossReferenceError(Failure.BUSY, "table_loading")
        self._concluded.clear()
        self._tried = None
        # Each in its thread, before the next look is.
        self._lookups.submit(table.index.close)
        self._builds.submit(table.index.path.unlink, missing_ok=True)
        self._look_now.set()

    # ---------------------------------------------------------------- watching

    async def _watch(self) -> None:
        while True:
            self._look_now.clear()
            self._looking = True
            still = await self._look_once()
            self._looking = False
            if still:
                async with self._looked:
                    self._looks += 1
                    self._looked.notify_all()
            try:
                async with asyncio.timeout(self._pause_seconds):
                    await self._look_now.wait()
            except TimeoutError:
                pass

    async def _look_once(self) -> bool:
        """Take what the file holds if that is new; whether the file keeps still."""
        self._pause_seconds = self._look_seconds
        try:
            signature = await self._in_build_thread(lambda: _signature(self._file))
        except OSError as error:
            self._failed(error)
            return True
        seen, self._seen = self._seen, signature
        try:
            if signature == self._tried and not self._unreadable:
                return True
            if signature != seen and (self._table is not None or _is_fresh(signature)):
                raise Changing
            table = await self._in_build_thread(lambda: self._load(signature))
        except (Changing, Stopped):
            self._pause_seconds = min(self._look_seconds, _SETTLE_SECONDS)
            return False
        except TableError as error:
            self._refuse(CrossReferenceError(Failure.PROTOCOL, "table_refused"), error.faults)
        except (OSError, sqlite3.Error) as error:
            # A disk is at fault, full perhaps: a large table is not read all the time.
            self._pause_seconds = max(self._look_seconds, _RETRY_SECONDS)
            self._failed(error)
            return True
        else:
            self._take(table)
        self._tried, self._unreadable = signature, False
        return True

    async def _in_build_thread(self, job: Callable[[], T]) -> T:
        # No deadline: reading a large table takes what it takes, and nobody waits.
        return await asyncio.get_running_loop().run_in_executor(self._builds, job)

    def _load(self, signature: _Signature) -> _Table:
        """In the build thread: find or make the index of what the file holds."""
        lock = _BUILDING.setdefault(self._directory / self._name, threading.Lock())
        while not lock.acquire(timeout=_STOP_SECONDS):
            if self._stop.is_set():
                raise Stopped
        try:
            return self._load_alone(signature)
        finally:
            lock.release()

    def _load_alone(self, signature: _Signature) -> _Table:
        digest = content_hash(self._file, self._stop.is_set)
        path = self._directory / f"{self._name}-{digest[:_NAME_DIGITS]}.sqlite3"
        try:
            table = _open(path, self._domains)
        except sqlite3.Error:
            path.unlink(missing_ok=True)
            build(self._file, path, digest, self._stop.is_set)
            table = _open(path, self._domains)
        if _signature(self._file) != signature:
            table.index.close()
            raise Changing
        for other in self._directory.glob(f"{self._name}-{_HASH}.*"):
            # Whoever still reads one keeps it open.
            if other != path:
                other.unlink(missing_ok=True)
        if self._stop.is_set():
            table.index.close()
            raise Stopped
        return table

    def _take(self, table: _Table) -> None:
        before, self._table = self._table, table
        self._concluded.set()
        _REFUSED.labels(self._name).set(0)
        _LINKS.labels(self._name).set(table.index.links)
        _log.info("cross_reference_table_loaded", service=self._name, count=table.index.links)
        if before is not None:
            self._lookups.submit(before.index.close)
            if before.index.path == table.index.path:
                return  # written again with the same content
        if self._on_change is not None:
            self._on_change()

    def _refuse(self, failure: CrossReferenceError, faults: tuple[TableFault, ...]) -> None:
        if self._table is None:
            self._failure = failure
        self._concluded.set()
        _REFUSED.labels(self._name).set(1)
        remember(self._name, "cross_reference_table_refused", self._state)
        _log.error(
            "cross_reference_table_refused",
            service=self._name,
            reason=failure.reason,
            lines=[fault.line for fault in faults],
            detail="; ".join(dict.fromkeys(map(str, faults))),
            state=self._state,
        )

    def _failed(self, error: OSError | sqlite3.Error) -> None:
        if self._table is None:
            self._failure = CrossReferenceError(Failure.UNREACHABLE, "table_unreadable")
        self._concluded.set()
        if self._unreadable:
            return  # said already; it is tried again at every look
        self._unreadable = True
        _REFUSED.labels(self._name).set(1)
        remember(self._name, "cross_reference_table_refused", self._state)
        _log.error(
            "cross_reference_table_refused",
            service=self._name,
            reason="table_unreadable",
            state=self._state,
            **error_fields(error),
        )

    @property
    def _state(self) -> str:
        return "former_table_in_force" if self.ready else "no_table"


def _signature(file: Path) -> _Signature:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        # A pipe or a device may never end, or never begin.
        raise OSError(errno.EINVAL, "not a file")
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _is_fresh(signature: _Signature) -> bool:
    """Tell whether a file was written to so lately that it may not be finished."""
    return time.time_ns() - signature[0] < _SETTLE_SECONDS * 1e9


def _open(index: Path, domains: Domains) -> _Table:
    """Open an index and find out what its names mean.

    Raises:
        TableError: a name means nothing, or the same as another one.
        sqlite3.Error: there is no such index, or it is damaged.
    """
    opened = TableIndex(index)
    numbers: dict[Domain, int] = {}
    faults = []
    for name, number in opened.numbers.items():
        domain, line = domains.named(name), opened.lines[name]
        if domain is None:
            faults.append(TableFault(line, "a name that no source and no domain has"))
        elif domain == domains.local:
            faults.append(TableFault(line, "a source that has the local domain"))
        elif domain in numbers:
            faults.append(TableFault(line, "a domain under a second name"))
        else:
            numbers[domain] = number
    if faults:
        opened.close()
        raise TableError(sorted(faults)[:MOST_FAULTS])
    return _Table(opened, numbers)
