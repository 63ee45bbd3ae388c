"""Where each study was seen: memory in front, one SQLite file behind.

Rules kept: what was remembered is visible to the next :meth:`StateStore.find`
at once and written behind, in batches, by one thread. A disk that fails, fills
up or hangs costs the memory of older studies, never an operation: the store
then answers from what it holds in memory, says ``state_degraded``, and writes
later what it could not write now. Everything held in memory has a bound.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from prometheus_client import Counter, Gauge

from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import Location
from dicomproxy.state.database import Database
from dicomproxy.tasks import TaskOwner

T = TypeVar("T")

_DAY_SECONDS: Final = 86_400
_BATCH_STUDIES: Final = 5_000
_DEADLINE_SECONDS: Final = 10.0
_GATHER_SECONDS: Final = 0.1
_PRUNE_SECONDS: Final = 3_600.0

_log = get_logger()

_DEGRADED = Gauge("dicomproxy_state_degraded", "1 while study locations cannot be saved, else 0.")
_DROPPED = Counter(
    "dicomproxy_state_dropped_total", "Studies whose locations were forgotten unsaved, for space."
)

_Known = dict[str, Location]
_Changed = dict[str, Location | None]
_Patient = tuple[str, str]
"""A source, and an ID there."""


@dataclass(slots=True, eq=False)
class _Read:
    """What changes about a study while its file is read: that wins over what was read."""

    changes: _Changed
    forgotten: set[_Patient]


class StateStore:
    """Implements :class:`dicomproxy.ports.Locations`; used from one event loop.

    Args:
        directory: where the file is; made if it does not exist.
        max_age_days: a location not seen for so long is forgotten.
        max_locations: beyond it, those seen longest ago are forgotten.
        known_studies: how many studies' locations are kept in memory for reading.
        pending_studies: how many may wait to be written, while the disk takes none.
        retry_seconds: pause after a failure before the disk is tried again.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_age_days: int = 90,
        max_locations: int = 5_000_000,
        known_studies: int = 20_000,
        pending_studies: int = 50_000,
        retry_seconds: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = Database(directory)
        self._max_age_seconds = max_age_days * _DAY_SECONDS
        self._max_locations = max_locations
        self._known_limit = known_studies
        self._pending_limit = pending_studies
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._pending: OrderedDict[str, _Changed] = OrderedDict()
        self._writing: dict[str, _Changed] = {}
        self._reads: dict[str, list[_Read]] = {}
        self._forgotten: dict[_Patient, None] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._owner = TaskOwner("state")
        self._executor: ThreadPoolExecutor | None = None
        self._degraded = False
        self._dropped = 0
        self._retry_at = 0.0

    def __repr__(self) -> str:
        state = "degraded" if self._degraded else "fine"
        return f"<StateStore {state}, {len(self._known)} known, {len(self._pending)} pending>"

    @property
    def degraded(self) -> bool:
        """Whether the disk failed when it was last tried."""
        return self._degraded

    # ---------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Open the file and prune it. Never raises for the disk: see :attr:`degraded`."""
        # One worker: the connection belongs to its thread.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="state")
        await self._prune()
        self._owner.spawn(self._write_behind(), name="write-behind")
        self._owner.spawn(self._prune_hourly(), name="prune")

    async def flush(self) -> None:
        """Return once what was remembered so far is written; while degraded this may take long."""
        await self._idle.wait()

    async def close(self) -> None:
        """Write what is pending, in one last attempt, and close the file."""
        await self._owner.close()
        if self._executor is None:
            return
        self._take_back()
        await self._write_forgotten()
        while self._pending and await self._write_batch():
            pass
        if self._pending:
            _log.error("state_degraded", reason="closing", pending=len(self._pending))
        await self._ask(self._database.close, "close")
        executor, self._executor = self._executor, None
        executor.shutdown(wait=False, cancel_futures=True)

    # --------------------------------------------------------------- locations

    async def find(self, study_instance_uid: str) -> tuple[Location, ...]:
        """Return every known holder, in no order; empty if the study was never seen."""
        known = self._known.get(study_instance_uid)
        if known is not None:
            self._known.move_to_end(study_instance_uid)
            return tuple(known.values())
        # What changes while the file is read must win over what was read, even if
        # it is written and off our hands before this coroutine runs again.
        read = _Read(self._unsaved(study_instance_uid), set(self._forgotten))
        self._reads.setdefault(study_instance_uid, []).append(read)
        try:
            stored = await self._read(study_instance_uid)
        finally:
            reads = self._reads[study_instance_uid]
            reads.remove(read)
            if not reads:
                del self._reads[study_instance_uid]
        found = {
            location.source: location
            for location in stored or ()
            if (location.source, location.patient_id) not in read.forgotten
        }
        _apply(read.changes, found)
        if stored is not None:
            self._known[study_instance_uid] = found
            if len(self._known) > self._known_limit:
                self._known.popitem(last=False)
        return tuple(found.values())

    def remember(self, locations: Sequence[Location]) -> None:
        """Add or refresh; visible to find at once, written behind."""
        for location in locations:
            self._change(location.study_instance_uid, location.source, location)

    def forget(self, study_instance_uid: str, source: str) -> None:
        """The study is no longer held there."""
        self._change(study_instance_uid, source, None)

    def forget_patients(self, patients: Collection[tuple[str, str]]) -> None:
        """Forget where the studies of *patients* are, each a source and the ID there.

        For records that were merged, or whose IDs moved: what is retrieved next is
        located anew.
        """
        if not patients:
            return
        gone = set(patients)
        held: tuple[Mapping[str, _Known | _Changed], ...] = (
            self._known,
            self._writing,
            self._pending,
        )
        hanging = {
            (study, source)
            for studies in held
            for study, locations in studies.items()
            for source, location in locations.items()
            if location is not None and (source, location.patient_id) in gone
        }
        for study, source in hanging:
            self._change(study, source, None)
        self._forgotten.update(dict.fromkeys(patients))
        while len(self._forgotten) > self._pending_limit:
            del self._forgotten[next(iter(self._forgotten))]
            self._count_dropped()
        for reads in self._reads.values():
            for read in reads:
                read.forgotten |= gone
        self._idle.clear()
        self._work.set()

    def _change(self, study: str, source: str, location: Location | None) -> None:
        change = {source: location}
        self._pending.setdefault(study, {}).update(change)
        for read in self._reads.get(study, ()):
            read.changes.update(change)
        if (known := self._known.get(study)) is not None:
            _apply(change, known)
        self._bound_pending()
        self._idle.clear()
        self._work.set()

    def _unsaved(self, study: str) -> _Changed:
        return {**self._writing.get(study, {}), **self._pending.get(study, {})}

    def _bound_pending(self) -> None:
        while len(self._pending) > self._pending_limit:
            self._pending.popitem(last=False)
            self._count_dropped()

    def _count_dropped(self) -> None:
        _DROPPED.inc()
        self._dropped += 1
        if self._dropped == 1:  # the total follows once the disk is back
            _log.error("state_degraded", reason="pending_full", limit=self._pending_limit)

    # -------------------------------------------------------------------- disk

    async def _read(self, study: str) -> tuple[Location, ...] | None:
        """Return what is stored, or None while it cannot be known."""
        if self._degraded and asyncio.get_running_loop().time() < self._retry_at:
            # Not asked: a disk that hangs would gather a queue.
            return None
        return await self._ask(lambda: self._database.read(study), "read")

    async def _write_behind(self) -> None:
        while True:
            await self._work.wait()
            # What one query teaches is written at once, and not while it is answered.
            await asyncio.sleep(_GATHER_SECONDS)
            self._work.clear()
            while self._pending or self._forgotten:
                if not (await self._write_forgotten() and await self._write_batch()):
                    await asyncio.sleep(self._retry_seconds)
            self._idle.set()

    async def _write_forgotten(self) -> bool:
        """Delete what was forgotten by patient; whether that worked.

        Comes before what is pending is written: it would take along what was
        remembered later.
        """
        taken = list(self._forgotten)
        if not taken:
            return True

        def delete() -> bool:
            self._database.forget_patients(taken)
            return True

        if not await self._ask(delete, "write"):
            return False
        for patient in taken:
            self._forgotten.pop(patient, None)
        return True

    async def _write_batch(self) -> bool:
        """Write the oldest pending changes; whether that worked."""
        if not self._pending:
            return True
        taken = list(itertools.islice(self._pending, _BATCH_STUDIES))
        self._writing = {study: self._pending.pop(study) for study in taken}
        changes: Mapping[str, Mapping[str, Location | None]] = self._writing
        now = int(self._clock())

        def write() -> bool:
            self._database.write(changes, now)
            return True

        written = await self._ask(write, "write")
        if written:
            self._writing = {}
            return True
        self._take_back()
        return False

    def _take_back(self) -> None:
        """Make changes pending again that were not written, before and below later ones."""
        for study, changed in reversed(self._writing.items()):
            self._pending[study] = {**changed, **self._pending.get(study, {})}
            self._pending.move_to_end(study, last=False)
        self._writing = {}
        self._bound_pending()

    async def _prune_hourly(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_SECONDS)
            await self._prune()

    async def _prune(self) -> None:
        before = int(self._clock()) - self._max_age_seconds
        count = await self._ask(lambda: self._database.prune(before, self._max_locations), "prune")
        if count:
            _log.info("state_pruned", pruned=count)

    async def _ask(self, job: Callable[[], T], operation: str) -> T | None:
        """Run *job* in the thread; None, and degraded, if the disk failed or was too slow."""
        if self._executor is None:
            return None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DEADLINE_SECONDS):
                result = await loop.run_in_executor(self._executor, job)
        except (sqlite3.Error, OSError) as error:  # TimeoutError is an OSError
            self._retry_at = loop.time() + self._retry_seconds
            if not self._degraded:
                self._degraded = True
                _DEGRADED.set(1)
                _log.error("state_degraded", operation=operation, **error_fields(error))
            return None
        # Reading may work on a full disk: with changes waiting, only a write is proof.
        waiting = self._pending or self._writing or self._forgotten
        if self._degraded and (operation == "write" or not waiting):
            self._degraded = False
            _DEGRADED.set(0)
            _log.warning("state_recovered", dropped=self._dropped)
            self._dropped = 0
        return result


def _apply(changes: Mapping[str, Location | None], known: _Known) -> None:
    for source, location in changes.items():
        if location is None:
            known.pop(source, None)
        elif location.patient_id or source not in known:
            known[source] = location
