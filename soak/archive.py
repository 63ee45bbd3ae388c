"""An archive that generates what it sends: ``python -m soak.archive SETTINGS`` (JSON).

It is built on the proxy's own upper layer, so that it costs little: C-FIND at
every level of Study Root and Patient Root, C-MOVE and C-GET at STUDY, SERIES and
IMAGE level, C-CANCEL of each. It ends when its process is killed.

Settings: ``seed`` and ``sources``, of which the plan is made; ``holder``, whose
studies it holds; ``ae_title``, ``port``; ``destinations``, ports by AE title;
``delay_seconds`` before each instance; ``max_associations``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from pydicom import Dataset
from pynetdicom.dsutils import decode, encode

from dicomproxy import logs
from dicomproxy.dimse import operations
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import Command, CommandField, request, response
from dicomproxy.dimse.errors import AssociationError, AssociationTimeout
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    UNCOMPRESSED,
    Context,
    Supported,
    acceptance,
    first_of,
    negotiate,
)
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest
from soak.content import CT, Plan, Study

_WAIT_SECONDS: Final = 60.0
_OTHERS: Final = Supported(first_of(UNCOMPRESSED))
_STORAGE: Final = Supported(first_of((EXPLICIT_VR_LITTLE_ENDIAN,)), accept_scp_role=True)
_LEVELS: Final = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}


@dataclass(slots=True)
class _Operation:
    """What one association is doing; one request at a time."""

    message: Message
    cancelled: bool = False
    stored: asyncio.Queue[Command] | None = None
    """Responses to the C-STOREs of a C-GET."""


class Archive:
    """Answers with the studies of one holder."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._plan = Plan(settings["seed"], settings["sources"])
        self._studies = self._plan.held_by(settings["holder"])
        self._ae_title: str = settings["ae_title"]
        self._destinations: dict[str, int] = settings["destinations"]
        self._delay_seconds: float = settings["delay_seconds"]
        self._layer = UpperLayer()
        self._listener = Listener(self._layer, self, max_associations=settings["max_associations"])

    async def listen(self, port: int) -> None:
        await self._listener.start("127.0.0.1", port)

    async def negotiate(
        self, association: Association, asked: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        negotiated = negotiate(asked, lambda uid: _STORAGE if uid == CT else _OTHERS)
        return acceptance(asked, negotiated, max_length=128 * 1024), negotiated.contexts

    async def serve(self, association: Association) -> None:
        """Answer, and listen for C-CANCEL meanwhile."""
        running: _Operation | None = None
        task: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    message = await association.receive(_WAIT_SECONDS)
                except AssociationTimeout:
                    if task is not None and not task.done():
                        continue
                    return
                except AssociationError:
                    if task is not None:
                        task.cancel()  # nobody is told what comes of it
                    return
                command = message.command
                if command.is_response:
                    if running is not None and running.stored is not None:
                        running.stored.put_nowait(command)
                elif command.field == CommandField.C_CANCEL_RQ:
                    if running is not None:
                        running.cancelled = True
                else:
                    running = _Operation(message)
                    task = group.create_task(self._answer(association, running), name="answer")

    async def _answer(self, association: Association, operation: _Operation) -> None:
        message = operation.message
        try:
            match message.command.field:
                case CommandField.C_FIND_RQ:
                    await self._find(association, operation)
                case CommandField.C_MOVE_RQ:
                    await self._move(association, operation)
                case CommandField.C_GET_RQ:
                    await self._get(association, operation)
                case _:
                    await association.send(message.context, response(message.command, 0x0000))
        except AssociationError:
            association.abort()

    # ------------------------------------------------------------------ queries

    async def _find(self, association: Association, operation: _Operation) -> None:
        message = operation.message
        asked = _decoded(message)
        seen: set[str] = set()
        keyword = _LEVELS[asked.QueryRetrieveLevel]
        implicit = message.context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
        for study, uid in self._matching(asked):
            held = self._plan.dataset(uid)
            unique = str(held[keyword].value)
            if unique in seen:
                continue
            seen.add(unique)
            if operation.cancelled:
                await association.send(message.context, response(message.command, 0xFE00))
                return
            await association.send(
                message.context,
                response(message.command, 0xFF00, data_set=True),
                encode(_row(asked, held, study, self._ae_title), implicit, True),
            )
        await association.send(message.context, response(message.command, 0x0000))

    def _matching(self, asked: Dataset) -> list[tuple[Study, str]]:
        """Return what the unique keys name: one instance of each entity at least."""
        patients, studies, series, images = (_named(asked, one) for one in _LEVELS.values())
        level = asked.QueryRetrieveLevel
        return [
            (study, uid)
            for study in self._studies
            if (not patients or study.patient_id in patients)
            and (not studies or study.uid in studies)
            for series_uid, uids in study.instances.items()
            if not series or series_uid in series
            for uid in (uids if level == "IMAGE" or images else uids[:1])
            if not images or uid in images
        ]

    # ---------------------------------------------------------------- retrieval

    def _wanted(self, message: Message) -> list[str]:
        asked = _decoded(message)
        asked.QueryRetrieveLevel = "IMAGE"
        return [uid for _, uid in self._matching(asked)]

    async def _move(self, association: Association, operation: _Operation) -> None:
        message = operation.message
        port = self._destinations.get(message.command.move_destination)
        if port is None:
            await association.send(message.context, response(message.command, 0xA801))
            return
        called = message.command.move_destination
        target = Target("127.0.0.1", port, called, self._ae_title)
        proposal = Proposal(((CT, (EXPLICIT_VR_LITTLE_ENDIAN,)),))
        try:
            out = await self._layer.request(target, proposal)
        except AssociationError:
            await association.send(message.context, response(message.command, 0xA702))
            return
        try:
            await self._send(association, operation, out)
            await out.release(5)
        finally:
            out.abort()

    async def _get(self, association: Association, operation: _Operation) -> None:
        operation.stored = asyncio.Queue(8)
        await self._send(association, operation, association)

    async def _send(
        self, association: Association, operation: _Operation, out: Association
    ) -> None:
        message = operation.message
        wanted, done, failed = self._wanted(message), 0, 0
        async for uid in self._paced(wanted):
            if operation.cancelled:
                break
            try:
                status = await self._store(association, operation, out, uid)
            except AssociationError:
                if out is association:
                    raise
                break  # the destination is gone, and the rest with it
            done, failed = done + (status == 0x0000), failed + (status != 0x0000)
            await association.send(
                message.context,
                response(
                    message.command,
                    0xFF00,
                    remaining=len(wanted) - done - failed,
                    completed=done,
                    failed=failed,
                    warning=0,
                ),
            )
        failed = len(wanted) - done
        status = 0x0000 if not failed else 0xB000 if done else 0xA702
        if operation.cancelled:
            status = 0xFE00
        await association.send(
            message.context,
            response(message.command, status, completed=done, failed=failed, warning=0),
        )

    async def _paced(self, uids: list[str]) -> AsyncIterator[str]:
        for uid in uids:
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            yield uid

    async def _store(
        self, association: Association, operation: _Operation, out: Association, uid: str
    ) -> int:
        context = out.context_for(CT)
        asked = operation.message.command
        store = request(
            CommandField.C_STORE_RQ,
            CT,
            out.next_message_id(),
            data_set=True,
            priority=0,
            affected_sop_instance_uid=uid,
            move_originator_ae_title=association.calling_ae_title,
            move_originator_message_id=asked.message_id,
        )
        data = self._plan.data(uid)
        if operation.stored is None:
            return (await operations.store(out, context, store, data, _WAIT_SECONDS)).status
        await out.send(context, store, data)
        async with asyncio.timeout(_WAIT_SECONDS):
            return (await operation.stored.get()).status


def _named(asked: Dataset, keyword: str) -> set[str]:
    value = asked.get(keyword)
    if not value:
        return set()
    return {str(value)} if isinstance(value, str) else {str(one) for one in value}


def _row(asked: Dataset, held: Dataset, study: Study, ae_title: str) -> Dataset:
    computed = {
        "QueryRetrieveLevel": asked.QueryRetrieveLevel,
        "RetrieveAETitle": ae_title,
        "ModalitiesInStudy": "CT",
        "NumberOfStudyRelatedSeries": len(study.series),
        "NumberOfStudyRelatedInstances": sum(study.series),
        "NumberOfSeriesRelatedInstances": len(study.instances[held.SeriesInstanceUID]),
    }
    row = Dataset()
    for element in asked:
        if element.keyword in computed:
            setattr(row, element.keyword, computed[element.keyword])
        elif element.keyword != "SpecificCharacterSet":
            value = held[element.tag].value if element.tag in held else None
            row.add_new(element.tag, element.VR, value)
    return row


def _decoded(message: Message) -> Dataset:
    implicit = message.context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
    return decode(BytesIO(message.data), implicit, True)


async def main(settings: dict[str, Any]) -> None:
    """Answer for as long as the process lives."""
    logs.configure("error", stream=sys.stderr, hooks=False)
    archive = Archive(settings)
    await archive.listen(settings["port"])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
