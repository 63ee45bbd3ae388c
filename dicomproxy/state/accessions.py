"""Which accession number stands for which number of which source; kept across restarts.

Rules kept: a number once given out means the same for good, and no two origins
have the same number. What is assigned is on the disk before it is told. A disk
that fails costs that, never an operation: numbers are then assigned from memory
alone, which gives the same ones (they are made from what they stand for), and
written once the disk is back. Everything held in memory has a bound.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from prometheus_client import Gauge

from dicomproxy.dataset.accession import AccessionsUnavailable, Origin, candidates
from dicomproxy.dataset.patient import Domain
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.state.file import StateFile
from dicomproxy.tasks import TaskOwner

T = TypeVar("T")

FILE_NAME: Final = "accessions.sqlite3"
SCHEMA_VERSION: Final = 1

_TABLES: Final = """
    CREATE TABLE accession (
        assigned TEXT NOT NULL PRIMARY KEY,
        source TEXT NOT NULL,
        number TEXT NOT NULL,
        namespace TEXT NOT NULL,
        universal_id TEXT NOT NULL,
        universal_id_type TEXT NOT NULL,
        last_seen INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX accession_last_seen ON accession (last_seen);
"""
_FIND: Final = (
    "SELECT source, number, namespace, universal_id, universal_id_type, last_seen"
    " FROM accession WHERE assigned = ?"
)
_DAY_SECONDS: Final = 86_400
_DEADLINE_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 2.0  # somebody waits, who has a query budget of some seconds
_PRUNE_SECONDS: Final = 3_600.0
_MOST_WAITING: Final = 256
_BATCH: Final = 1_000

_log = get_logger()

_DEGRADED = Gauge(
    "dicomproxy_accessions_degraded", "1 while assigned accession numbers cannot be saved, else 0."
)

Wanted = tuple[Origin, str]
"""What a number is wanted for, and the prefix that it may be, "" for one that is minted."""


class AccessionMap:
    """Assigns accession numbers and finds what they stand for. Used from one event loop.

    Args:
        directory: where the file is; made if it does not exist.
        most: numbers kept; beyond it those not seen longest are forgotten.
        known: how many are kept in memory for reading.
        pending: how many may wait to be written, while the disk takes none.
        retry_seconds: pause after a failure before the disk is tried again.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        directory: Path,
        *,
        most: int = 10_000_000,
        known: int = 50_000,
        pending: int = 50_000,
        retry_seconds: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = StateFile(
            directory / FILE_NAME, _TABLES, SCHEMA_VERSION, survives_power_cut=True
        )
        self._most = most
        self._known_limit = known
        self._pending_limit = pending
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._known: OrderedDict[str, Origin] = OrderedDict()
        self._numbers: OrderedDict[Wanted, str] = OrderedDict()
        self._pending: OrderedDict[str, Origin] = OrderedDict()
        self._lost = 0
        self._degraded = False
        self._retry_at = 0.0
        self._waiting = 0
        self._owner = TaskOwner("accessions")
        self._executor: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        state = "degraded" if self._degraded else "fine"
        return f"<AccessionMap {state}, {len(self._pending)} pending>"

    @property
    def degraded(self) -> bool:
        """Whether the disk failed when it was last tried."""
        return self._degraded

    # ---------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Open the file and prune it. Never raises for the disk: see :attr:`degraded`."""
        # One worker: the connection belongs to its thread.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="accessions")
        await self._prune()
        self._owner.spawn(self._keep(), name="keep")

    async def close(self) -> None:
        """Write what is pending, in one last attempt, and close the file."""
        await self._owner.close()
        if self._executor is None:
            return
        if not await self._write_pending():
            _log.error("accessions_degraded", reason="closing", pending=len(self._pending))
        await self._ask(self._file.close, "close")
        executor, self._executor = self._executor, None
        executor.shutdown(wait=False, cancel_futures=True)

    # ----------------------------------------------------------------- numbers

    async def assign(self, wanted: Sequence[Wanted]) -> list[str]:
        """Return for each origin the number that stands for it, assigning it if need be.

        The same number each time; another one than a prefix would give, if that
        is too long or stands for another origin already. Never raises for the disk.
        """
        numbers = {one: self._held(one) for one in wanted}
        unknown = [one for one, number in numbers.items() if not number]
        if unknown:
            job = partial(self._assign_on_disk, unknown, int(self._clock()))
            on_disk = await self._ask(job, "write", _ANSWER_SECONDS)
            for one in unknown:
                assigned = self._assign(one) if on_disk is None else on_disk[one]
                numbers[one] = self._take(one, *assigned)
        return [numbers[one] for one in wanted]

    async def find(self, number: str) -> Origin | None:
        """Return what an assigned number stands for; None if it is none of ours.

        Raises:
            AccessionsUnavailable: the disk does not say.
        """
        held = self._known.get(number) or self._pending.get(number)
        if held is not None:
            return held

        def read() -> tuple[tuple[Origin, int] | None]:
            return (self._file.run(lambda file: _find(file, number)),)

        found = await self._ask(read, "read", _ANSWER_SECONDS)
        if found is None:
            raise AccessionsUnavailable
        (row,) = found
        if row is None:
            return None
        self._know(number, row[0])
        return row[0]

    def _held(self, one: Wanted) -> str:
        """Return the number in memory, nothing where the disk has to be asked or told."""
        number = self._numbers.get(_key(one), "")
        known, issuer = self._known.get(number), one[0].issuer
        has_news = known is None or (issuer.is_named and issuer != known.issuer)
        return "" if has_news else number

    def _assign(self, one: Wanted) -> tuple[str, Origin]:
        """Assign from memory, to be written later."""
        origin, prefix = one
        number = next(
            candidate
            for candidate in candidates(origin, prefix)
            if self._is_free(candidate, origin)
        )
        held = self._known.get(number)
        if held is not None and not origin.issuer.is_named:
            origin = held
        self._pending[number] = origin
        if len(self._pending) > self._pending_limit:
            self._pending.popitem(last=False)
            self._lost += 1
        return number, origin

    def _take(self, one: Wanted, number: str, origin: Origin) -> str:
        """Keep in memory what was assigned, with its issuer if that is known."""
        self._know(number, origin)
        self._numbers[_key(one)] = number
        if len(self._numbers) > self._known_limit:
            self._numbers.popitem(last=False)
        return number

    def _is_free(self, number: str, origin: Origin) -> bool:
        held = self._pending.get(number) or self._known.get(number)
        return held is None or held.is_same(origin)

    def _know(self, number: str, origin: Origin) -> None:
        self._known[number] = origin
        self._known.move_to_end(number)
        if len(self._known) > self._known_limit:
            self._known.popitem(last=False)

    # -------------------------------------------------------------------- disk

    def _assign_on_disk(
        self, wanted: Iterable[Wanted], now: int
    ) -> dict[Wanted, tuple[str, Origin]]:
        """In the thread: find or assign every number, in one transaction."""

        def assign(file: sqlite3.Connection) -> dict[Wanted, tuple[str, Origin]]:
            with file:
                file.execute("BEGIN IMMEDIATE")
                return {
                    (origin, prefix): next(
                        (candidate, stored)
                        for candidate in candidates(origin, prefix)
                        if (stored := _claim(file, candidate, origin, now)) is not None
                    )
                    for origin, prefix in wanted
                }

        return self._file.run(assign)

    def _save_on_disk(self, pending: Sequence[tuple[str, Origin]], now: int) -> list[str]:
        """In the thread: write what was assigned from memory; the numbers that were taken."""

        def save(file: sqlite3.Connection) -> list[str]:
            with file:
                file.execute("BEGIN IMMEDIATE")
                return [
                    number
                    for number, origin in pending
                    if _claim(file, number, origin, now) is None
                ]

        return self._file.run(save)

    async def _keep(self) -> None:
        """Write what could not be written, and prune now and then."""
        loop = asyncio.get_running_loop()
        prune_at = loop.time() + _PRUNE_SECONDS
        while True:
            await asyncio.sleep(self._retry_seconds)
            await self._write_pending()
            if loop.time() >= prune_at:
                prune_at = loop.time() + _PRUNE_SECONDS
                await self._prune()

    async def _write_pending(self) -> bool:
        """Write what waits, oldest first; whether nothing waits any more."""
        while self._pending:
            batch = list(islice(self._pending.items(), _BATCH))
            now = int(self._clock())
            taken = await self._ask(partial(self._save_on_disk, batch, now), "write", probe=True)
            if taken is None:
                return False
            for number, origin in batch:
                if self._pending.get(number) == origin:
                    del self._pending[number]
            if taken:
                # Given out before the disk could be asked; what the disk says, counts.
                _log.error("accession_collision", count=len(taken))
                for number in taken:
                    self._known.pop(number, None)
                self._numbers.clear()
        return True

    async def _prune(self) -> None:
        def delete(file: sqlite3.Connection) -> int:
            with file:
                (count,) = file.execute("SELECT count(*) FROM accession").fetchone()
                if count <= self._most:
                    return 0
                return file.execute(
                    "DELETE FROM accession WHERE assigned IN"
                    " (SELECT assigned FROM accession ORDER BY last_seen LIMIT ?)",
                    (count - self._most,),
                ).rowcount

        count = await self._ask(lambda: self._file.run(delete), "prune", probe=True)
        if count:
            _log.info("accessions_pruned", pruned=count)

    def _is_resting(self) -> bool:
        return self._degraded and asyncio.get_running_loop().time() < self._retry_at

    async def _ask(
        self, job: Callable[[], T], operation: str, seconds: float = 0.0, *, probe: bool = False
    ) -> T | None:
        """Run *job* in the thread; None, and degraded, if the disk failed or was too slow.

        Shortly after a failure it is not asked, but by a *probe*: a disk that
        hangs would gather a queue.
        """
        full = self._waiting >= _MOST_WAITING
        if self._executor is None or full or (self._is_resting() and not probe):
            return None
        loop = asyncio.get_running_loop()
        self._waiting += 1
        future = loop.run_in_executor(self._executor, job)
        future.add_done_callback(self._answered)
        try:
            async with asyncio.timeout(seconds or _DEADLINE_SECONDS):
                result = await asyncio.shield(future)
        except (sqlite3.Error, OSError) as error:  # TimeoutError is an OSError
            self._retry_at = loop.time() + self._retry_seconds
            if not self._degraded:
                self._degraded = True
                _DEGRADED.set(1)
                _log.error("accessions_degraded", operation=operation, **error_fields(error))
            return None
        # Reading may work on a full disk: with numbers waiting, only a write is proof.
        if self._degraded and (operation == "write" or not self._pending):
            self._degraded = False
            _DEGRADED.set(0)
            _log.warning("accessions_recovered", dropped=self._lost)
            self._lost = 0
        return result

    def _answered(self, future: asyncio.Future[T]) -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # retrieved, for the case that nobody waits any more


def _key(one: Wanted) -> Wanted:
    """Return what decides a number: the issuer does not."""
    origin, prefix = one
    return Origin(origin.source, origin.number), prefix


def _find(file: sqlite3.Connection, number: str) -> tuple[Origin, int] | None:
    row = file.execute(_FIND, (number,)).fetchone()
    if row is None:
        return None
    source, original, namespace, universal_id, universal_id_type, last_seen = row
    return Origin(source, original, Domain(namespace, universal_id, universal_id_type)), last_seen


def _claim(file: sqlite3.Connection, number: str, origin: Origin, now: int) -> Origin | None:
    """Let *number* stand for *origin*, within a transaction, unless it stands for another.

    Returns:
        The origin with what is known of its issuer; None if the number is another's.
    """
    found = _find(file, number)
    if found is not None:
        held, last_seen = found
        if not held.is_same(origin):
            return None
        issuer = origin.issuer if origin.issuer.is_named else held.issuer
        if issuer == held.issuer and now - last_seen < _DAY_SECONDS:
            return held
    else:
        issuer = origin.issuer
    file.execute(
        "INSERT OR REPLACE INTO accession VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            number,
            origin.source,
            origin.number,
            issuer.namespace,
            issuer.universal_id,
            issuer.universal_id_type,
            now,
        ),
    )
    return Origin(origin.source, origin.number, issuer)
