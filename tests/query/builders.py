"""Synthetic questions and rows, and scripted stand-ins for the ports of a query."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import Root
from dicomproxy.ports import (
    AuditEvent,
    Caller,
    LocalAnswer,
    Location,
    RetrieveOrder,
    RetrieveProgress,
    SourceQuery,
)
from dicomproxy.query.plan import QueryRequest, validate
from tests.sentinel import PATIENT_ID

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"

Step = Any
"""A row to give, an exception to raise, or something to await first."""


def identifier(charset: str = "", **elements: Any) -> Identifier:
    """Build a data set of any values, wrong ones included, as peers send them."""
    ds = Dataset()
    if charset:
        ds.SpecificCharacterSet = charset
    for keyword, value in elements.items():
        tag = tag_for_keyword(keyword)
        assert tag is not None, keyword
        ds.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=IGNORE))
    return Identifier.from_dataset(ds)


def request(root: Root = Root.STUDY, level: str = "STUDY", **elements: Any) -> QueryRequest:
    return validate(root, identifier(QueryRetrieveLevel=level, **elements))


def study_row(uid: str, patient: str = PATIENT_ID, **elements: Any) -> Identifier:
    return identifier(
        QueryRetrieveLevel="STUDY", StudyInstanceUID=uid, PatientID=patient, **elements
    )


def local_answer(row: Identifier, status: int = 0xFF00) -> LocalAnswer:
    return LocalAnswer(status, row.encode(EXPLICIT), EXPLICIT)


def caller(**changes: Any) -> Caller:
    given: dict[str, Any] = {
        "ae_title": "READING1",
        "peer_address": "127.0.0.1",
        "called_ae_title": "DICOMPROXY",
        "sources": ("north", "south"),
    }
    return Caller(**(given | changes))


async def play(steps: Sequence[Step]) -> AsyncIterator[Any]:
    """Yield rows, await what can be awaited, raise what can be raised."""
    for step in steps:
        if isinstance(step, asyncio.Event):
            await step.wait()
        elif callable(step):
            await step()
        elif isinstance(step, BaseException):
            raise step
        else:
            yield step


class ScriptedSource:
    """A source that plays its script for each question, and notes how each one ended."""

    wants_sop_classes = False
    round_trip_seconds = 0.0
    parallel_retrieves = 4

    def __init__(self, name: str, *script: Step) -> None:
        self.name = name
        self.script = script
        self.asked: list[SourceQuery] = []
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self.ended: list[str] = []

    async def find(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        self.asked.append(query)
        self.reached.set()
        how = "closed"
        try:
            async for row in play(self.script):
                yield row
            how = "finished"
        except Exception:
            how = "failed"
            raise
        finally:
            self.ended.append(how)
            self.over.set()

    def retrieve(self, order: RetrieveOrder) -> AsyncIterator[RetrieveProgress]:
        raise AssertionError("a query retrieves nothing")


class ScriptedLocal:
    """A local PACS that plays its script; by default it ends with Success."""

    def __init__(self, *script: Step, final: LocalAnswer | None = None) -> None:
        self.script = script
        self.final = LocalAnswer(0x0000) if final is None else final
        self.asked: list[tuple[str, str, bytes, str]] = []
        self.reached = asyncio.Event()
        self.ended: list[str] = []

    async def find(
        self,
        sop_class_uid: str,
        transfer_syntax_uid: str,
        data: bytes,
        *,
        calling_ae_title: str,
        priority: int = 0,
    ) -> AsyncIterator[LocalAnswer]:
        self.asked.append((sop_class_uid, transfer_syntax_uid, data, calling_ae_title))
        self.reached.set()
        how = "closed"
        try:
            async for step in play(self.script):
                yield step if isinstance(step, LocalAnswer) else local_answer(step)
            how = "finished"
            yield self.final
        finally:
            self.ended.append(how)

    def move(self, order: RetrieveOrder, **_: Any) -> AsyncIterator[RetrieveProgress]:
        raise AssertionError("a query moves nothing")


class RememberedLocations:
    """A memory of locations without a file."""

    def __init__(self, *known: Location) -> None:
        self.known: dict[tuple[str, str], Location] = {}
        self.remember(known)
        self.looking_up: Callable[[], Awaitable[object]] | None = None

    async def find(self, study_instance_uid: str) -> tuple[Location, ...]:
        if self.looking_up is not None:
            await self.looking_up()
        return tuple(
            location for (study, _), location in self.known.items() if study == study_instance_uid
        )

    def remember(self, locations: Sequence[Location]) -> None:
        for location in locations:
            self.known[location.study_instance_uid, location.source] = location

    def forget(self, study_instance_uid: str, source: str) -> None:
        self.known.pop((study_instance_uid, source), None)

    def holders(self, study_instance_uid: str) -> set[str]:
        return {source for study, source in self.known if study == study_instance_uid}


class RecordedAudit:
    """Keeps what was recorded."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []
        self.recorded = asyncio.Event()
        self.hangs = False

    async def record(self, *events: AuditEvent) -> None:
        self.events.extend(events)
        self.recorded.set()
        if self.hangs:
            await asyncio.Event().wait()

    def outcomes(self) -> Mapping[str, str]:
        return {event.source: event.outcome for event in self.events}
