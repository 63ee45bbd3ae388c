"""An archive that stands in, and the source under test in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import PATIENT_ID, QUERY_RETRIEVE_LEVEL, STUDY_INSTANCE_UID, Level
from dicomproxy.dimse.layer import Limits, UpperLayer
from dicomproxy.ports import RetrieveOrder, RetrieveProgress, SourceQuery
from dicomproxy.sources.archive import Archive, ArchiveSettings
from dicomproxy.sources.dimse import DimseSource
from tests.dimse_edge.harness import layer_left_clean, until
from tests.sentinel import PATIENT_ID as SENTINEL_ID
from tests.support.stand_in import SECONDS, StandIn, serving

SHORT: Final = 0.4
"""Seconds: a deadline that is meant to pass, though not before an association is there."""


class Arrived:
    """Keeps what arrives within a C-GET; ``status`` is what each C-STORE is answered with."""

    def __init__(self) -> None:
        self.status = 0x0000
        self.finished: list[tuple[str, str, str, str, bytes]] = []
        self.discarded: list[str] = []

    def source_for(self, candidates: Sequence[str]) -> str | None:
        return next(iter(candidates), None)

    def receive(self, source: str, sop_class: str, sop_instance: str, syntax: str) -> _Arrival:
        return _Arrival(self, (source, sop_class, sop_instance, syntax))


class _Arrival:
    def __init__(self, kept: Arrived, names: tuple[str, str, str, str]) -> None:
        self._kept, self._names = kept, names
        self._data = bytearray()

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        for segment in segments:
            self._data += segment
        release()

    def discard(self) -> None:
        self._kept.discarded.append(self._names[2])

    async def finish(self) -> int:
        self._kept.finished.append((*self._names, bytes(self._data)))
        return self._kept.status


@dataclass(slots=True)
class Setting:
    source: DimseSource
    archive: Archive
    peer: StandIn
    arrived: Arrived
    port: int

    async def find(self, query: SourceQuery | None = None) -> list[Identifier]:
        """Query to the end."""
        async with asyncio.timeout(SECONDS), aclosing(self.source.find(query or study())) as rows:
            return [row async for row in rows]

    async def retrieve(self, order: RetrieveOrder) -> list[RetrieveProgress]:
        """Retrieve to the end."""
        async with asyncio.timeout(SECONDS), aclosing(self.source.retrieve(order)) as steps:
            return [step async for step in steps]


@asynccontextmanager
async def archive_at(
    port: int, *, layer: UpperLayer | None = None, limits: Limits | None = None, **settings: Any
) -> AsyncIterator[Archive]:
    """Yield an archive at *port* of loopback; afterwards nothing of it is in use."""
    given: dict[str, Any] = {
        "name": "north",
        "ae_title": "NORTHPACS",
        "host": "127.0.0.1",
        "port": port,
        "calling_ae_title": "DICOMPROXY",
        "query_timeout": SECONDS,
        "first_instance_timeout": SECONDS,
        "stall_timeout": SECONDS,
        "response_timeout": SECONDS,
    }
    archive = Archive(layer or UpperLayer(limits=limits), ArchiveSettings(**(given | settings)))
    try:
        yield archive
        await until(lambda: archive.pool.in_use == 0)
    finally:
        await archive.close()


@asynccontextmanager
async def asking(
    peer: StandIn, *, limits: Limits | None = None, max_associations: int = 20, **settings: Any
) -> AsyncIterator[Setting]:
    """Yield a source whose archive is *peer*; no association and no block is left behind."""
    async with (
        layer_left_clean(limits=limits) as layer,
        serving(layer, peer, max_associations=max_associations) as port,
        archive_at(port, layer=layer, **settings) as archive,
    ):
        arrived = Arrived()
        yield Setting(DimseSource(archive, arrived), archive, peer, arrived, port)


async def first(rows: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(SECONDS):
        return await anext(rows)


async def within(step: Awaitable[Any]) -> Any:
    async with asyncio.timeout(SECONDS):
        return await step


def keys(**texts: str) -> Identifier:
    """Build an identifier from keyword arguments such as ``patient`` and ``study``."""
    made = Identifier()
    for name, value in texts.items():
        tag = {"patient": PATIENT_ID, "study": STUDY_INSTANCE_UID, "level": QUERY_RETRIEVE_LEVEL}
        made.set_text(tag[name], value)
    return made


def study(uid: str = "1.2.3", **more: Any) -> SourceQuery:
    return SourceQuery(Level.STUDY, keys(study=uid, patient=SENTINEL_ID), **more)


def row(uid: str, patient: str = SENTINEL_ID) -> Identifier:
    return keys(level="STUDY", patient=patient, study=uid)
