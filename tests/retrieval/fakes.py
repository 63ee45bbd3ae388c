"""Every port of the core in memory: archives, store, workstation, local PACS, memory, audit.

Order is made by gates, never by time: an archive waits for its gate before each
instance, a destination before each delivery.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from dicomproxy.dataset.header import EXPLICIT_VR_LITTLE_ENDIAN, HeaderError, read_header
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
    Root,
)
from dicomproxy.ports import (
    LOCAL,
    Admit,
    AuditEvent,
    CachedInstance,
    Caller,
    Cancellation,
    Delivered,
    DestinationError,
    Failure,
    InstanceReader,
    InstanceStore,
    LocalAnswer,
    Location,
    Originator,
    Refused,
    RetrieveOrder,
    RetrieveProgress,
    SourceError,
    SourceQuery,
    Stored,
    StoreFull,
    StudyLease,
)
from dicomproxy.retrieval.arrivals import FlightArrivals
from dicomproxy.retrieval.coordinator import (
    DestinationPlan,
    RetrieveCoordinator,
    RetrieveOperation,
    RetrieveRequest,
    RetrieveSettings,
)
from dicomproxy.retrieval.flights import Flights
from dicomproxy.retrieval.persons import Identification
from dicomproxy.retrieval.selection import selection_of
from tests import sentinel

CT = "1.2.840.10008.5.1.4.1.1.2"
STUDY = "1.2.3"
TODAY = date(2026, 11, 24)
OLD = "20200102"


@dataclass
class Study:
    """A study as an archive holds it: series to SOP Instance UIDs.

    ``values`` are in its row and in the header of each instance.
    """

    uid: str = STUDY
    patient_id: str = sentinel.PATIENT_ID
    study_date: str = OLD
    series: dict[str, list[str]] = field(default_factory=dict)
    values: dict[int, str] = field(default_factory=dict)

    @property
    def instances(self) -> list[str]:
        return [uid for uids in self.series.values() for uid in uids]


def study(*sizes: int, uid: str = STUDY, **more: str) -> Study:
    """Make a study with a series for each of *sizes*."""
    series = {
        f"{uid}.{number}": [f"{uid}.{number}.{index}" for index in range(1, size + 1)]
        for number, size in enumerate(sizes, 1)
    }
    return Study(uid=uid, series=series, **more)


def encoded(
    study_uid: str,
    series: str,
    uid: str,
    patient_id: str,
    filler: str = "",
    values: Mapping[int, str] | None = None,
) -> bytes:
    """Return the data set of a tiny instance."""
    dataset = Identifier()
    for tag, text in (values or {}).items():
        dataset.set_text(tag, text)
    dataset.set_text(0x00080016, CT)
    dataset.set_text(SOP_INSTANCE_UID, uid)
    dataset.set_text(PATIENT_ID, patient_id)
    dataset.set_text(STUDY_INSTANCE_UID, study_uid)
    dataset.set_text(SERIES_INSTANCE_UID, series)
    dataset.set_text(0x00204000, filler or "image")
    return dataset.encode(EXPLICIT_VR_LITTLE_ENDIAN)


class Archive:
    """A source. ``sent`` counts what left it, ``gate`` holds each instance back."""

    wants_sop_classes = False
    round_trip_seconds = 0.0
    parallel_retrieves = 4

    def __init__(self, name: str, *studies: Study) -> None:
        self.name = name
        self.studies = {held.uid: held for held in studies}
        self.arrivals: FlightArrivals
        self.sent: Counter[str] = Counter()
        self.orders: list[RetrieveOrder] = []
        self.queries: list[SourceQuery] = []
        self.cancelled = 0
        self.find_failures: dict[Level, SourceError] = {}
        self.find_gate: asyncio.Event | None = None
        self.gate: Callable[[str], asyncio.Event | None] = lambda uid: None
        self.withheld: set[str] = set()
        self.stall_after: list[int] = []
        self.headers: dict[str, dict[str, str]] = {}
        self.values: dict[str, dict[int, str]] = {}
        self.filler = ""
        self.refused_levels: set[Level] = set()
        self.statuses: list[int] = []
        self.completed_lie = 0

    def fail(self, level: Level, failure: Failure, status: int | None = None) -> None:
        self.find_failures[level] = SourceError(self.name, failure, status)

    def down(self) -> None:
        for level in Level:
            self.fail(level, Failure.UNREACHABLE)
        self.refused_levels = set(Level)

    def up(self) -> None:
        self.find_failures.clear()
        self.refused_levels.clear()

    async def find(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        self.queries.append(query)
        if self.find_gate is not None:
            await self.find_gate.wait()
        await asyncio.sleep(0)
        if (error := self.find_failures.get(query.level)) is not None:
            raise error
        keys = query.identifier
        for held in list(self.studies.values()):
            asked = keys.text(STUDY_INSTANCE_UID)
            if asked and asked != held.uid:
                continue
            patient = keys.text(PATIENT_ID)
            if patient and patient.lower() != held.patient_id.lower():  # as many archives do
                continue
            if query.level is Level.STUDY:
                row = Identifier()
                row.set_text(STUDY_INSTANCE_UID, held.uid)
                row.set_text(PATIENT_ID, held.patient_id)
                row.set_text(0x00080020, held.study_date)
                for tag, text in held.values.items():
                    row.set_text(tag, text)
                yield row
                continue
            for series, uids in list(held.series.items()):
                if query.level is Level.SERIES:
                    row = Identifier()
                    row.set_text(STUDY_INSTANCE_UID, held.uid)
                    row.set_text(SERIES_INSTANCE_UID, series)
                    yield row
                elif series == keys.text(SERIES_INSTANCE_UID):
                    for uid in list(uids):
                        row = Identifier()
                        row.set_text(SOP_INSTANCE_UID, uid)
                        row.set_text(0x00080016, CT)
                        yield row

    async def retrieve(self, order: RetrieveOrder) -> AsyncIterator[RetrieveProgress]:
        self.orders.append(order)
        await asyncio.sleep(0)
        if order.level in self.refused_levels:
            failure = self.find_failures.get(order.level)
            raise failure or SourceError(self.name, Failure.STATUS, 0xA900)
        held = self.studies.get(order.study_instance_uids[0])
        wanted = selection_of(order)
        chosen = [
            (series, uid)
            for series, uids in (held.series.items() if held is not None else ())
            for uid in uids
            if wanted.covers(series, uid) and uid not in self.withheld
        ]
        progress = RetrieveProgress(remaining=len(chosen))
        stall = self.stall_after.pop(0) if self.stall_after else None
        ended = False
        try:
            for number, (series, uid) in enumerate(chosen):
                if stall is not None and number >= stall:
                    ended = True
                    raise SourceError(self.name, Failure.TIMEOUT)
                if (gate := self.gate(uid)) is not None:
                    await gate.wait()
                assert held is not None
                status = await self.send(held, series, uid)
                progress.remaining = len(chosen) - number - 1
                if status == 0:
                    progress.completed += 1
                else:
                    progress.failed += 1
                yield replace(progress)
            progress.final = True
            progress.remaining = None
            progress.completed += self.completed_lie
            progress.status = 0xB000 if progress.failed else 0
            if self.statuses:
                progress.status = self.statuses.pop(0)
            ended = True
            yield progress
        finally:
            if not ended:
                self.cancelled += 1

    async def send(self, held: Study, series: str, uid: str) -> int:
        """C-STORE one instance to the proxy; its status."""
        self.sent[uid] += 1
        header = {"study": held.uid, "patient": held.patient_id, **self.headers.get(uid, {})}
        values = {**held.values, **self.values.get(uid, {})}
        data = encoded(header["study"], series, uid, header["patient"], self.filler, values)
        arrival = self.arrivals.receive(self.name, CT, uid, EXPLICIT_VR_LITTLE_ENDIAN)
        half = len(data) // 2
        view = memoryview(data)
        arrival.write([view[:half]], lambda: None)
        arrival.write([view[half:]], lambda: None)
        return await arrival.finish()


# ------------------------------------------------------------------------ store


class _Held:
    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.instances: dict[str, CachedInstance] = {}
        self.data: dict[str, bytes] = {}
        self.complete = False


class Lease:
    def __init__(self, store: Store, held: _Held) -> None:
        self._store = store
        self.held = held
        self.released = False

    @property
    def study_instance_uid(self) -> str:
        return self.held.uid

    @property
    def instances(self) -> Mapping[str, CachedInstance]:
        return self.held.instances

    @property
    def complete(self) -> bool:
        return self.held.complete

    async def set_complete(self, complete: bool) -> None:
        self.held.complete = complete

    async def remove(self, sop_instance_uids: Sequence[str]) -> None:
        for uid in sop_instance_uids:
            self.held.instances.pop(uid, None)
            self.held.data.pop(uid, None)

    def touch(self) -> None:
        pass

    def release(self) -> None:
        assert not self.released, "a lease is released once"
        self.released = True
        self._store.leases -= 1


class Writer:
    def __init__(self, store: Store, sop_class: str, uid: str, syntax: str, source: str) -> None:
        self._store = store
        self._command = sop_class, uid, syntax, source
        self._data = bytearray()
        self.discarded = False

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        for segment in segments:
            self._data += segment
        release()

    async def commit(self, admit: Admit) -> Stored:
        data = bytes(self._data)
        sop_class, uid, syntax, source = self._command
        try:
            header = read_header(lambda at, size: data[at : at + size], syntax)
        except HeaderError:
            raise Refused("unreadable_header") from None
        if header.sop_instance_uid != uid:
            raise Refused("sop_instance_mismatch")
        # Admission is asked in another thread, as the real store does.
        lease = await asyncio.to_thread(admit, header)
        if uid in self._store.full_for:
            raise StoreFull
        assert isinstance(lease, Lease)
        held = lease.held
        crc = zlib.crc32(data)
        if (present := held.instances.get(uid)) is not None:
            same = present.crc32 == crc
            return Stored(present, duplicate=same, conflict=not same)
        instance = CachedInstance(
            sop_class_uid=sop_class,
            sop_instance_uid=uid,
            study_instance_uid=header.study_instance_uid,
            series_instance_uid=header.series_instance_uid,
            transfer_syntax_uid=syntax,
            source=source,
            file_name=uid,
            data_set_offset=0,
            size=len(data),
            crc32=crc,
        )
        held.instances[uid] = instance
        held.data[uid] = data
        return Stored(instance)

    def discard(self) -> None:
        self.discarded = True


class Reader:
    def __init__(self, store: Store, data: bytes) -> None:
        self._store = store
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def arrived(self) -> int:
        return self._store.arrived

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        count = 0
        for buffer in buffers:
            piece = self._data[offset + count : offset + count + len(buffer)]
            buffer[: len(piece)] = piece
            count += len(piece)
        return count

    async def close(self) -> None:
        self._store.readers -= 1


class Store:
    """An :class:`~dicomproxy.ports.InstanceStore`; ``damaged`` are found so when opened."""

    def __init__(self) -> None:
        self.studies: dict[str, _Held] = {}
        self.leases = 0
        self.readers = 0
        self.hits = 0
        self.misses = 0
        self.dropped: list[str] = []
        self.full_for: set[str] = set()
        self.damaged: Counter[str] = Counter()
        self.lease_gate: asyncio.Event | None = None
        self.arrived = 0

    async def lease(self, study_instance_uid: str) -> StudyLease:
        await asyncio.sleep(0)
        if self.lease_gate is not None:
            await self.lease_gate.wait()
        self.leases += 1
        held = self.studies.setdefault(study_instance_uid, _Held(study_instance_uid))
        return Lease(self, held)

    async def drop(self, study_instance_uid: str) -> None:
        await asyncio.sleep(0)
        self.dropped.append(study_instance_uid)
        held = self.studies.pop(study_instance_uid, None)
        if held is not None:
            held.instances.clear()
            held.complete = False

    def receive(
        self, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source: str
    ) -> Writer:
        return Writer(self, sop_class_uid, sop_instance_uid, transfer_syntax_uid, source)

    async def open(self, instance: CachedInstance) -> InstanceReader:
        await asyncio.sleep(0)
        uid = instance.sop_instance_uid
        held = self.studies.get(instance.study_instance_uid)
        if held is None or uid not in held.data:
            raise FileNotFoundError(uid)
        if self.damaged[uid]:
            self.damaged[uid] -= 1
            del held.instances[uid], held.data[uid]
            raise Refused("damaged")
        self.readers += 1
        return Reader(self, held.data[uid])

    async def open_several(
        self, instances: Sequence[CachedInstance], head_bytes: int = 0
    ) -> list[InstanceReader | None]:
        await asyncio.sleep(0)
        readers: list[InstanceReader | None] = []
        for instance in instances:
            uid = instance.sop_instance_uid
            held = self.studies.get(instance.study_instance_uid)
            if held is None or uid not in held.data or self.damaged[uid]:
                readers.append(None)
                continue
            self.readers += 1
            readers.append(Reader(self, held.data[uid]))
        return readers

    def count_hits(self, count: int) -> None:
        self.hits += count

    def count_misses(self, count: int) -> None:
        self.misses += count

    def put(self, of: Study, source: str, uids: Sequence[str] = (), complete: bool = True) -> None:
        """Have a study, or part of it, held from the start."""
        held = self.studies.setdefault(of.uid, _Held(of.uid))
        for series, instances in of.series.items():
            for uid in instances:
                if uids and uid not in uids:
                    continue
                data = encoded(of.uid, series, uid, of.patient_id)
                held.data[uid] = data
                held.instances[uid] = CachedInstance(
                    CT,
                    uid,
                    of.uid,
                    series,
                    EXPLICIT_VR_LITTLE_ENDIAN,
                    source,
                    uid,
                    0,
                    len(data),
                    zlib.crc32(data),
                )
        held.complete = complete


# -------------------------------------------------------------- the other ports


class Workstation:
    """A destination; ``gate`` holds each delivery, ``fates`` are outcomes by UID."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.data: dict[str, bytes] = {}
        self.opened = 0
        self.closed = 0
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.fates: dict[str, Delivered | Exception] = {}
        self.refusals: list[Failure] = []
        self.refused = 0
        self.expected: list[set[tuple[str, str]]] = []

    def open(self) -> Workstation:
        self.opened += 1
        return self

    def expect(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.expected.append(set(pairs))

    async def deliver(self, instance: CachedInstance, reader: InstanceReader) -> Delivered:
        self.waiting.set()
        if self.refusals:
            self.refused += 1
            raise DestinationError(self.refusals.pop())
        if self.gate is not None:
            await self.gate.wait()
        data = bytearray(reader.size)
        await reader.read_into([memoryview(data)], 0)
        self.data[instance.sop_instance_uid] = bytes(data)
        fate = self.fates.get(instance.sop_instance_uid, Delivered.COMPLETED)
        if isinstance(fate, Exception):
            raise fate
        self.received.append(instance.sop_instance_uid)
        return fate

    async def close(self) -> None:
        self.closed += 1


class LocalPacs:
    """The local PACS as a mover: plays its script of progress, then an error if there is one.

    Asked again it plays the next of ``later``, if there is one.
    Told to cancel, it plays ``once_cancelled`` instead of the rest, if that is set.
    ``cancelled`` counts the iterators closed before their end.
    """

    def __init__(self) -> None:
        self.moves: list[tuple[RetrieveOrder, str, str, int]] = []
        self.script: list[RetrieveProgress | SourceError] = []
        self.later: list[list[RetrieveProgress | SourceError]] = []
        self.once_cancelled: list[RetrieveProgress | SourceError] | None = None
        self.gate: asyncio.Event | None = None
        self.told_to_cancel = 0
        self.cancelled = 0

    async def find(
        self,
        sop_class_uid: str,
        transfer_syntax_uid: str,
        data: bytes,
        *,
        calling_ae_title: str,
        priority: int = 0,
    ) -> AsyncIterator[LocalAnswer]:
        yield LocalAnswer(0)

    async def move(
        self,
        order: RetrieveOrder,
        *,
        destination_ae_title: str,
        calling_ae_title: str,
        message_id: int,
        priority: int = 0,
        cancellation: Cancellation | None = None,
    ) -> AsyncIterator[RetrieveProgress]:
        self.moves.append((order, destination_ae_title, calling_ae_title, message_id))
        ended = False
        script = [*self.script]
        if self.later:
            self.script = self.later.pop(0)

        def cancel() -> None:
            self.told_to_cancel += 1
            if self.once_cancelled is not None and self.gate is not None:
                script[:] = self.once_cancelled
                self.gate.set()

        if cancellation is not None:
            cancellation.send = cancel
        try:
            while script:
                step = script.pop(0)
                if isinstance(step, SourceError):
                    ended = True
                    raise step
                yield step
                if self.gate is not None:
                    await self.gate.wait()
            ended = True
        finally:
            if not ended:
                self.cancelled += 1


class Memory:
    """Locations."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Location] = {}

    async def find(self, study_instance_uid: str) -> tuple[Location, ...]:
        return tuple(
            location for (uid, _), location in self.known.items() if uid == study_instance_uid
        )

    def remember(self, locations: Sequence[Location]) -> None:
        for location in locations:
            self.known[location.study_instance_uid, location.source] = location

    def forget(self, study_instance_uid: str, source: str) -> None:
        self.known.pop((study_instance_uid, source), None)


class AuditTrail:
    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    async def record(self, *events: AuditEvent) -> None:
        await asyncio.sleep(0)
        self.events.extend(events)


class World:
    """A region: a local PACS, sources in order, and the core between them and workstations."""

    def __init__(
        self,
        *sources: Archive,
        local: Archive | None = None,
        relay: bool = False,
        pause: float = 30.0,
        finish_abandoned: bool = False,
        store: InstanceStore | None = None,
        identity: Identification | None = None,
    ) -> None:
        self.store = Store()
        used = store or self.store
        self.memory = Memory()
        self.audit = AuditTrail()
        self.local = local or Archive(LOCAL)
        self.local_pacs = LocalPacs()
        self.sources = {source.name: source for source in sources}
        settings = RetrieveSettings(
            finish_abandoned=finish_abandoned, retry_pause_seconds=pause, today=lambda: TODAY
        )
        self.flights = Flights(used, settings, self.memory)
        self.arrivals = FlightArrivals(used, self.flights)
        for archive in (self.local, *sources):
            archive.arrivals = self.arrivals
        self.coordinator = RetrieveCoordinator(
            used,
            self.flights,
            self.memory,
            self.audit,
            self.sources,
            self.local,
            self.local_pacs,
            relay,
            identity,
        )

    def know(self, *archives: Archive) -> None:
        """Have it remembered what *archives* hold."""
        for archive in archives:
            self.memory.remember(
                [
                    Location(held.uid, archive.name, held.patient_id)
                    for held in archive.studies.values()
                ]
            )

    def caller(self, *names: str, is_source: bool = False) -> Caller:
        return Caller(
            "READING1", "127.0.0.1", sources=names or tuple(self.sources), is_source=is_source
        )

    def operation(
        self,
        workstation: Workstation,
        request: RetrieveRequest | None = None,
        *,
        caller: Caller | None = None,
        known: bool = True,
    ) -> RetrieveOperation:
        return self.coordinator.start(
            request or study_request(),
            caller=caller or self.caller(),
            originator=Originator("READING1", 7),
            destination=DestinationPlan("READING1", known, workstation.open),
            operation_id="op-1",
            local_calling_ae_title="READING1",
        )

    async def close(self) -> None:
        await self.flights.close()
        await self.coordinator.close()
        assert self.store.leases == 0, "every lease is given back"
        assert self.store.readers == 0, "every reader is closed"
        assert len(self.flights) == 0


def study_request(*uids: str) -> RetrieveRequest:
    return RetrieveRequest(Root.STUDY, Level.STUDY, study_instance_uids=uids or (STUDY,))


def series_request(*series: str, of: str = STUDY) -> RetrieveRequest:
    return RetrieveRequest(
        Root.STUDY, Level.SERIES, study_instance_uids=(of,), series_instance_uids=series
    )


def image_request(series: str, *uids: str, of: str = STUDY) -> RetrieveRequest:
    return RetrieveRequest(Root.STUDY, Level.IMAGE, "", (of,), (series,), uids)
