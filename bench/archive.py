"""An archive that generates what it holds: ``python -m bench.archive SETTINGS``.

It sends faster than Orthanc, so that the receiver is what is measured, and it
can leave the sending to DCMTK's ``storescu``, as it is shipped. A second port is
an archive that holds nothing: the proxy's local PACS where a row needs none.

Settings: ``port`` and ``empty_port``; ``studies``, as :class:`bench.data.Study`;
``destinations``, ports by title; ``storescu``, its path; ``files``, a directory of
Part 10 files by Study Instance UID, of studies that ``storescu`` is to send.
"""

from __future__ import annotations

import asyncio
import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from pydicom import Dataset
from pynetdicom.dsutils import decode, encode

from bench.control import obey
from bench.data import Study
from dicomproxy import logs
from dicomproxy.dimse import operations
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, request, response
from dicomproxy.dimse.errors import AssociationError
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

TITLE: Final = "GENERATED"
_WAIT_SECONDS: Final = 300.0
_SYNTAXES: Final = Supported(first_of(UNCOMPRESSED))


class Archive:
    """Answers C-FIND and C-MOVE, or finds nothing."""

    def __init__(self, settings: dict[str, Any], studies: list[Study]) -> None:
        self._layer = UpperLayer()
        self._studies = studies
        self._by_uid = {study.study_instance_uid: study for study in studies}
        self._destinations: dict[str, int] = settings["destinations"]
        self._storescu: str = settings["storescu"]
        self._files: dict[str, str] = settings["files"]
        self._sendings: asyncio.Queue[float] = asyncio.Queue(1000)

    async def listen(self, port: int) -> None:
        """Answer on *port*."""
        await Listener(self._layer, self, max_associations=100).start("127.0.0.1", port)

    async def negotiate(
        self, association: Association, asked: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        """Accept every context."""
        negotiated = negotiate(asked, lambda _uid: _SYNTAXES)
        return acceptance(asked, negotiated, max_length=128 * 1024), negotiated.contexts

    async def serve(self, association: Association) -> None:
        """Answer requests one after the other."""
        try:
            while True:
                message = await association.receive(_WAIT_SECONDS)
                match message.command.field:
                    case CommandField.C_FIND_RQ:
                        await self._find(association, message)
                    case CommandField.C_MOVE_RQ:
                        await self._move(association, message)
                    case CommandField.C_ECHO_RQ:
                        await association.send(message.context, response(message.command, 0))
                    case _:
                        pass
        except AssociationError:
            return

    async def _find(self, association: Association, message: Message) -> None:
        asked = _decoded(message)
        for study in self._studies:
            held, count = study.dataset, 1
            if asked.QueryRetrieveLevel == "IMAGE":
                count = study.instances
            uid, patient = asked.get("StudyInstanceUID"), asked.get("PatientID")
            if (uid and uid != study.study_instance_uid) or (
                patient and patient != study.patient_id
            ):
                continue
            row = Dataset()
            for element in asked:
                value = held[element.tag].value if element.tag in held else None
                row.add_new(element.tag, element.VR, value)
            row.QueryRetrieveLevel = asked.QueryRetrieveLevel
            first = study.sop_instance_uid(0).encode("ascii")
            implicit = message.context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
            encoded = encode(row, implicit, True) or b""
            pending = response(message.command, 0xFF00, data_set=True)
            for index in range(count):
                uid_bytes = study.sop_instance_uid(index).encode("ascii")
                data = encoded.replace(first, uid_bytes)
                await association.send(message.context, pending, data)
        await association.send(message.context, response(message.command, 0x0000))

    async def _move(self, association: Association, message: Message) -> None:
        asked = _decoded(message)
        if asked.QueryRetrieveLevel != "STUDY":
            # One sending for each study, or there would be no one time to tell.
            await association.send(message.context, response(message.command, 0xA900))
            return
        study = self._by_uid.get(str(asked.get("StudyInstanceUID")))
        title = message.command.move_destination
        port = self._destinations.get(title)
        if port is None:
            await association.send(message.context, response(message.command, 0xA801))
            return
        sent = 0
        if study is not None:
            uid = study.study_instance_uid
            send = self.storescu if uid in self._files else self.send
            self._sendings.put_nowait(await send(port, title, uid))
            sent = study.instances
        done = response(message.command, 0x0000, completed=sent, failed=0, warning=0)
        await association.send(message.context, done)

    # ----------------------------------------------------------------- commands

    async def sent_seconds(self) -> float:
        """Return how long the sending of a C-MOVE took, once for each, waiting for it."""
        async with asyncio.timeout(_WAIT_SECONDS):
            return await self._sendings.get()

    async def forget(self) -> None:
        """Forget how long earlier sendings took."""
        while not self._sendings.empty():
            self._sendings.get_nowait()

    async def send(self, port: int, called: str, study: str) -> float:
        """Send a study on one association; seconds from asking for it to the last answer.

        Raises:
            RuntimeError: an instance was not taken.
        """
        what, loop = self._by_uid[study], asyncio.get_running_loop()
        began = loop.time()
        association = await self._layer.request(
            Target("127.0.0.1", port, called, TITLE),
            Proposal(((what.sop_class_uid, (EXPLICIT_VR_LITTLE_ENDIAN,)),)),
        )
        context = association.context_for(what.sop_class_uid)
        for index in range(what.instances):
            store = request(
                CommandField.C_STORE_RQ,
                what.sop_class_uid,
                association.next_message_id(),
                data_set=True,
                priority=0,
                affected_sop_instance_uid=what.sop_instance_uid(index),
            )
            answer = await operations.store(
                association, context, store, what.data(index), _WAIT_SECONDS
            )
            if answer.status != 0x0000:
                association.abort()
                raise RuntimeError(f"C-STORE status {answer.status:04X}")
        took = loop.time() - began
        await association.release(10)
        return took

    async def storescu(self, port: int, called: str, study: str) -> float:
        """Have ``storescu`` send a study's files; seconds from its start to its end.

        Raises:
            RuntimeError: it failed.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        process = await asyncio.create_subprocess_exec(
            self._storescu,
            *("-aet", TITLE, "-aec", called, "+sd", "127.0.0.1", str(port)),
            str(Path(self._files[study])),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                code = await process.wait()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        if code:
            raise RuntimeError(f"storescu ended with {code}")
        return loop.time() - began


def _decoded(message: Message) -> Dataset:
    implicit = message.context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
    return decode(BytesIO(message.data), implicit, True)


async def main(settings: dict[str, Any]) -> None:
    """Answer, and do what the driver says."""
    logs.configure("error", stream=sys.stderr, hooks=False)
    archive = Archive(settings, [Study(**one) for one in settings["studies"]])
    await archive.listen(settings["port"])
    await Archive(settings, []).listen(settings["empty_port"])
    await obey(
        {
            "forget": archive.forget,
            "sent_seconds": archive.sent_seconds,
            "send": archive.send,
            "storescu": archive.storescu,
        }
    )


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
