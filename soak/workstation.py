"""A workstation that checks: every answer, every count, every byte that arrives.

What must hold, whatever is done to the region:

* no row twice, and none of a study that the patient does not have;
* nothing is counted as completed that did not arrive, and Success means that
  everything which exists at the level asked for has arrived;
* an instance arrives as it was made, for a retrieve that asked for it;
* an operation that nobody cancelled is not cancelled, and none is silent for long.

What holds only while nothing is done to the workstation itself: the counts are
those of what arrived (where the proxy delivers, or all went well), and nothing
arrives twice.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Final

from pydicom import Dataset
from pynetdicom.dsutils import decode, encode

from dicomproxy.dimse.association import Association, BytesSink, Message, Sink
from dicomproxy.dimse.command import Command, CommandField, Tag, cancel, request, response
from dicomproxy.dimse.errors import AssociationError, AssociationReleased, AssociationTimeout
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    Context,
    Supported,
    acceptance,
    first_of,
    negotiate,
)
from dicomproxy.dimse.pdu import (
    REJECT_CONGESTION,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
)
from soak.content import CT, LOCAL, Plan, Study
from soak.report import Report
from tests.e2e.support import PROXY_TITLE

FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"

_SILENCE_SECONDS: Final = 30.0
"""Without a response this is a hang: Pending is sent every second."""
_LONGEST_SECONDS: Final = 180.0
_SUPPORTED: Final = Supported(first_of((EXPLICIT_VR_LITTLE_ENDIAN,)))
_OUTCOMES: Final = frozenset({0x0000, 0xB000, 0xA701, 0xA702, 0xFE00})
_UNIQUE: Final = {
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}


class Checksum:
    """Takes an instance and keeps its length and CRC-32."""

    def __init__(self) -> None:
        self.size = 0
        self.crc = 0
        self.broken_off = False

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        for segment in segments:
            self.size += len(segment)
            self.crc = zlib.crc32(segment, self.crc)
        release()

    def discard(self) -> None:
        self.broken_off = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a retrieve came to."""

    status: int
    completed: int
    failed: int
    warning: int
    failed_list: frozenset[str] = frozenset()


@dataclass(slots=True)
class Retrieve:
    """One retrieve that this workstation asked for."""

    what: str
    expected: frozenset[str]
    relayed: bool
    """Whether the local PACS delivers it."""
    arrived: Counter[str] = field(default_factory=Counter)


class Workstation:
    """One reading station; it receives on *port* and asks the proxy at *proxy_port*."""

    def __init__(
        self, title: str, port: int, proxy_port: int, plan: Plan, report: Report, layer: UpperLayer
    ) -> None:
        self.title = title
        self.port = port
        self.rejecting = False
        self.disturbances = 0
        """How often something was done to it; counted up before and after."""
        self._target = Target("127.0.0.1", proxy_port, PROXY_TITLE, title, connect_seconds=10)
        self._plan = plan
        self._report = report
        self._layer = layer
        self._listener: Listener | None = None
        self._receiving: set[Association] = set()
        self._retrieves: dict[int, Retrieve] = {}
        self._last_message_id = 0

    # ------------------------------------------------------------------ as peer

    async def start(self) -> None:
        """Receive."""
        self._listener = Listener(self._layer, self, max_associations=50)
        await self._listener.start("127.0.0.1", self.port)

    async def leave(self) -> None:
        """Be gone: what is being received is aborted, and nobody listens."""
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()

    def pause(self) -> Callable[[], None]:
        """Stop reading from every connection there is; return how to go on."""
        paused = [association.protocol for association in self._receiving]
        for protocol in paused:
            protocol.pause()

        def resume() -> None:
            for protocol in paused:
                protocol.resume()

        return resume

    def abort_receiving(self) -> None:
        for association in list(self._receiving):
            association.abort()

    async def negotiate(
        self, association: Association, asked: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        if self.rejecting:
            return REJECT_CONGESTION
        association.sink_for = self._sink
        negotiated = negotiate(asked, lambda uid: _SUPPORTED if uid == CT else None)
        return acceptance(asked, negotiated, max_length=128 * 1024), negotiated.contexts

    def _sink(self, association: Association, context: Context, command: Command) -> Sink:
        return Checksum() if command.field == CommandField.C_STORE_RQ else BytesSink(64 * 1024)

    async def serve(self, association: Association) -> None:
        self._receiving.add(association)
        try:
            while True:
                message = await association.receive(_LONGEST_SECONDS)
                self._take(association, message)
                await association.send(message.context, response(message.command, 0x0000))
        except AssociationTimeout:
            self._report.violation("a delivery's association stood idle for minutes")
        except AssociationReleased:
            self._report.deliveries["released"] += 1
        except AssociationError:
            self._report.deliveries["broken off"] += 1
        finally:
            self._receiving.discard(association)

    def _take(self, association: Association, message: Message) -> None:
        report, command, sink = self._report, message.command, message.sink
        if command.field != CommandField.C_STORE_RQ or not isinstance(sink, Checksum):
            return
        uid = command.affected_sop_instance_uid
        report.instances += 1
        report.bytes += sink.size
        if self._plan.check(uid) != (sink.size, sink.crc):
            report.violation("an instance arrived changed")
        if command.elements.get(Tag.MOVE_ORIGINATOR_AE_TITLE) != self.title:
            report.violation("an instance arrived under another's Move Originator")
            return
        retrieve = self._retrieves.get(command.count(Tag.MOVE_ORIGINATOR_MESSAGE_ID) or 0)
        if retrieve is None or uid not in retrieve.expected:
            report.violation("an instance arrived that its retrieve did not ask for")
            return
        retrieve.arrived[uid] += 1

    # ------------------------------------------------------------------ queries

    async def query(
        self, level: str, study: Study, *, series_uid: str = "", cancel_after: int = 0
    ) -> set[str]:
        """Ask for a patient's studies, a study's series or a series' instances.

        Returns the unique keys of the rows; none where the association failed.
        """
        kind = f"query {level}" + (" cancelled" if cancel_after else "")
        identifier = _identifier(level)
        if level == "STUDY":
            identifier.PatientID = study.patient_id
            expected = {one.uid for one in self._plan.patients[study.patient_id]}
            for keyword in ("StudyDate", "AccessionNumber", "NumberOfStudyRelatedInstances"):
                setattr(identifier, keyword, "")
        else:
            identifier.StudyInstanceUID = study.uid
            expected = set(study.instances)
            if level == "IMAGE":
                identifier.SeriesInstanceUID = series_uid
                expected = set(study.instances[series_uid])
        setattr(identifier, _UNIQUE[level], "")
        loop = asyncio.get_running_loop()
        began, rows = loop.time(), list[str]()
        async with self._operation(kind, FIND) as (association, context):
            message_id = association.next_message_id()
            asked = request(CommandField.C_FIND_RQ, FIND, message_id, data_set=True, priority=0)
            await association.send(context, asked, _encoded(identifier))
            while True:
                message = await self._receive(association)
                if message.command.status not in (0xFF00, 0xFF01):
                    break
                row = decode(BytesIO(message.data), False, True)
                rows.append(str(row.get(_UNIQUE[level], "")))
                if len(rows) == cancel_after:
                    await association.send(context, cancel(message_id))
            self._report.query_took(loop.time() - began)
            status = message.command.status
            self._report.operations[kind, f"{status:04X}"] += 1
            if status == 0xFE00 and not cancel_after:
                self._report.violation("a query was cancelled by nobody")
            if len(set(rows)) != len(rows):
                self._report.violation(f"a row came twice at {level} level")
            if not set(rows) <= expected:
                self._report.violation(f"a row was not asked for at {level} level")
            await association.release(5)
        return set(rows)

    # ---------------------------------------------------------------- retrieval

    async def open(
        self,
        study: Study,
        level: str = "STUDY",
        *,
        series_uid: str = "",
        images: Sequence[str] = (),
        cancel_after_seconds: float | None = None,
        abort_after_seconds: float | None = None,
    ) -> Answer | None:
        """Retrieve a study, a series or *images* to here; None where it was broken off."""
        identifier = _identifier(level)
        identifier.StudyInstanceUID = study.uid
        expected = study.all_instances
        if level != "STUDY":
            identifier.SeriesInstanceUID = series_uid
            expected = frozenset(study.instances[series_uid])
        if level == "IMAGE":
            identifier.SOPInstanceUID = list(images)
            expected = frozenset(images)
        kind = f"open {level}"
        if cancel_after_seconds is not None:
            kind += " cancelled"
        if abort_after_seconds is not None:
            kind += " aborted"
        self._last_message_id = message_id = self._last_message_id % 0xFFFF + 1
        # Late instances of those broken off are still known for a while.
        self._retrieves.pop((message_id - 1000) % 0xFFFF, None)
        what = f"{kind} of {study.uid} held by {study.holders}"
        retrieve = Retrieve(what, expected, LOCAL in study.holders)
        self._retrieves[message_id] = retrieve
        undisturbed = self.disturbances
        answer: Answer | None = None
        async with self._operation(kind, MOVE) as (association, context):
            asked = request(
                CommandField.C_MOVE_RQ,
                MOVE,
                message_id,
                data_set=True,
                priority=0,
                move_destination=self.title,
            )
            await association.send(context, asked, _encoded(identifier))
            loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
            if cancel_after_seconds is not None:
                timers.append(
                    loop.call_later(
                        cancel_after_seconds, association.send_now, context, cancel(message_id)
                    )
                )
            if abort_after_seconds is not None:
                timers.append(loop.call_later(abort_after_seconds, association.abort))
            try:
                answer = await self._final(association, retrieve)
            except AssociationError:
                if abort_after_seconds is None or timers[-1].when() > loop.time():
                    raise
                self._report.operations[kind, "broken off"] += 1
                return None
            finally:
                for timer in timers:
                    timer.cancel()
            self._report.operations[kind, f"{answer.status:04X}"] += 1
            self._judge(
                retrieve,
                answer,
                may_be_cancelled=cancel_after_seconds is not None,
                undisturbed=self.disturbances == undisturbed and not undisturbed % 2,
            )
            await association.release(5)
        return answer

    async def _final(self, association: Association, retrieve: Retrieve) -> Answer:
        """Read responses to the last; counts of each are looked at."""
        deadline = asyncio.get_running_loop().time() + _LONGEST_SECONDS
        while True:
            message = await self._receive(association)
            command = message.command
            completed = command.count(Tag.COMPLETED) or 0
            warning = command.count(Tag.WARNING) or 0
            if completed + warning > len(retrieve.arrived):
                self._report.violation("more was counted as completed than has arrived")
            if command.status != 0xFF00:
                listed = frozenset[str]()
                if message.data:
                    given = decode(BytesIO(message.data), False, True)
                    value = given.get("FailedSOPInstanceUIDList") or []
                    listed = frozenset([value] if isinstance(value, str) else map(str, value))
                failed = command.count(Tag.FAILED) or 0
                return Answer(command.status, completed, failed, warning, listed)
            if asyncio.get_running_loop().time() > deadline:
                self._report.violation("a retrieve went on for minutes")
                raise AssociationTimeout("retrieve")

    def _judge(
        self, retrieve: Retrieve, answer: Answer, *, may_be_cancelled: bool, undisturbed: bool
    ) -> None:
        arrived = retrieve.arrived
        wrong: list[str] = []
        if answer.status not in _OUTCOMES:
            wrong.append(f"a retrieve ended with {answer.status:04X}")
        if answer.status == 0xFE00 and not may_be_cancelled:
            wrong.append("a retrieve was cancelled by nobody")
        if answer.status == 0x0000 and set(arrived) != retrieve.expected:
            wrong.append("Success without everything having arrived")
        if answer.completed + answer.failed + answer.warning > len(retrieve.expected):
            wrong.append("more was counted than exists")
        if not answer.failed_list <= retrieve.expected:
            wrong.append("a failed instance is listed that was not asked for")
        if undisturbed:
            # The local PACS, told to stop or dead, may have sent one that it never counted.
            counted = not retrieve.relayed or answer.status == 0x0000
            if counted and answer.completed + answer.warning != len(arrived):
                wrong.append("the final counts are not those of what arrived")
            if arrived and max(arrived.values()) > 1:
                wrong.append("an instance arrived twice")
            if answer.failed_list & set(arrived):
                wrong.append("an instance is listed as failed that has arrived")
        if wrong:
            detail = (
                f"{self.title}, {retrieve.what}: {answer.status:04X}, completed "
                f"{answer.completed}, failed {answer.failed}, warning {answer.warning}, "
                f"listed {len(answer.failed_list)}; arrived {len(arrived)} "
                f"({arrived.total()} times) of {len(retrieve.expected)}"
            )
            for text in wrong:
                self._report.violation(text, detail)

    # ------------------------------------------------------------------- helpers

    @asynccontextmanager
    async def _operation(
        self, kind: str, sop_class_uid: str
    ) -> AsyncIterator[tuple[Association, Context]]:
        """Associate; what goes wrong is counted here, and ends the block."""
        try:
            association = await self._layer.request(
                self._target, Proposal(((sop_class_uid, (EXPLICIT_VR_LITTLE_ENDIAN,)),))
            )
        except AssociationError as error:
            self._report.operations[kind, type(error).__name__] += 1
            self._report.violation(f"no association with the proxy: {type(error).__name__}")
            raise Broken from error
        try:
            yield association, association.context_for(sop_class_uid)
        except AssociationError as error:
            self._report.operations[kind, type(error).__name__] += 1
            self._report.violation(f"the proxy broke off: {kind}, {type(error).__name__}")
        finally:
            association.abort()

    async def _receive(self, association: Association) -> Message:
        return await association.receive(_SILENCE_SECONDS)


class Broken(Exception):
    """No association with the proxy."""


def _identifier(level: str) -> Dataset:
    made = Dataset()
    made.QueryRetrieveLevel = level
    return made


def _encoded(identifier: Dataset) -> bytes:
    encoded = encode(identifier, False, True)
    if encoded is None:
        raise ValueError("the identifier does not encode")
    return encoded
