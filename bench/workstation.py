"""A workstation that is not the bottleneck: ``python -m bench.workstation SETTINGS``.

It takes whatever it is sent and throws it away, and it queries and retrieves,
so that one clock times a request and the arrival of its first instance.

Settings: ``port``; ``delayed_acks``: leave acknowledgements to the system, as
ordinary receivers do, which delays them, where false acknowledges at once.

Times are seconds from the moment at which an association is asked for.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, Final

from pydicom import Dataset
from pynetdicom.dsutils import decode, encode

from bench.control import obey
from dicomproxy import logs
from dicomproxy.dimse import transport
from dicomproxy.dimse.association import Association, BytesSink, Sink
from dicomproxy.dimse.command import Command, CommandField, Tag, request, response
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

FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
_WAIT_SECONDS: Final = 300.0
_SYNTAXES: Final = Supported(first_of(UNCOMPRESSED))


class Discard:
    """Counts a data set's bytes."""

    def __init__(self) -> None:
        self.received = 0

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        self.received += sum(map(len, segments))
        release()

    def discard(self) -> None:
        pass


class Workstation:
    """Receives on one port, under any title, and asks."""

    def __init__(self) -> None:
        self._layer = UpperLayer()
        self._loop = asyncio.get_running_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._arrived: dict[str, int] = {}
        self._bytes = 0
        self._first = self._last = 0.0

    async def listen(self, port: int) -> None:
        """Receive on *port*."""
        await Listener(self._layer, self, max_associations=400).start("127.0.0.1", port)

    # ---------------------------------------------------------------- receiving

    async def negotiate(
        self, association: Association, asked: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        """Accept every context."""
        await self._open.wait()
        association.sink_for = self._sink
        negotiated = negotiate(asked, lambda _uid: _SYNTAXES)
        return acceptance(asked, negotiated, max_length=128 * 1024), negotiated.contexts

    def _sink(self, association: Association, context: Context, command: Command) -> Sink:
        return Discard()

    async def serve(self, association: Association) -> None:
        """Take instances until it is over."""
        title = association.called_ae_title
        try:
            while True:
                message = await association.receive(_WAIT_SECONDS)
                answer = response(message.command, 0x0000)
                if not association.send_now(message.context, answer):
                    await association.send(message.context, answer)
                if isinstance(message.sink, Discard):
                    self._count(title, message.sink.received)
        except AssociationError:
            return

    def _count(self, title: str, size: int) -> None:
        self._last = self._loop.time()
        self._first = self._first or self._last
        self._bytes += size
        self._arrived[title] = self._arrived.get(title, 0) + 1

    # ----------------------------------------------------------------- commands

    async def hold(self) -> None:
        """Answer no association from now on: what comes must be kept until ``let_in``."""
        self._open.clear()

    async def let_in(self) -> None:
        """Answer associations again."""
        self._open.set()

    async def reset(self) -> None:
        """Forget what has arrived."""
        self._arrived = {}
        self._bytes = 0
        self._first = self._last = 0.0

    async def tally(self) -> dict[str, Any]:
        """Return what has arrived since the last ``reset``, and how long that took."""
        return {
            "instances": sum(self._arrived.values()),
            "bytes": self._bytes,
            "span": self._last - self._first,
        }

    async def move(self, moves: list[dict[str, Any]]) -> dict[str, Any]:
        """Retrieve several studies at once, each as its own workstation.

        Each of *moves* has ``port``, ``called``, ``calling`` and ``study``. The
        result counts over all of them; ``status`` is the first that is no success.
        """
        await self.reset()
        began = self._loop.time()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._move(one), name="move") for one in moves]
        total = self._loop.time() - began
        finals = [task.result() for task in tasks]
        return {
            "total": total,
            "first": self._first - began if self._first else None,
            "status": next((one.status for one in finals if one.status), 0),
            "completed": sum(one.count(Tag.COMPLETED) or 0 for one in finals),
            "failed": sum(one.count(Tag.FAILED) or 0 for one in finals),
            **await self.tally(),
        }

    async def _move(self, one: dict[str, Any]) -> Command:
        identifier = Dataset()
        identifier.QueryRetrieveLevel = "STUDY"
        identifier.StudyInstanceUID = one["study"]
        association, context = await self._associate(one, MOVE)
        asked = request(
            CommandField.C_MOVE_RQ,
            MOVE,
            association.next_message_id(),
            data_set=True,
            priority=0,
            move_destination=one["calling"],
        )
        await association.send(context, asked, _encoded(identifier, context))
        while True:
            command = (await association.receive(_WAIT_SECONDS)).command
            if command.status != 0xFF00:
                await association.release(10)
                return command

    async def find(self, port: int, called: str, calling: str, patient_id: str) -> dict[str, Any]:
        """Ask for a patient's studies; when the first row came, when the last word, how many."""
        identifier = Dataset()
        identifier.QueryRetrieveLevel = "STUDY"
        identifier.PatientID = patient_id
        for keyword in ("StudyInstanceUID", "StudyDate", "StudyDescription", "AccessionNumber"):
            setattr(identifier, keyword, "")
        began = self._loop.time()
        association, context = await self._associate(
            {"port": port, "called": called, "calling": calling}, FIND
        )
        association.sink_for = lambda *_: BytesSink(64 * 1024)
        asked = request(
            CommandField.C_FIND_RQ, FIND, association.next_message_id(), data_set=True, priority=0
        )
        await association.send(context, asked, _encoded(identifier, context))
        first: float | None = None
        studies: set[str] = set()
        while True:
            message = await association.receive(_WAIT_SECONDS)
            if message.command.status not in (0xFF00, 0xFF01):
                final = self._loop.time() - began
                await association.release(10)
                return {
                    "first": first,
                    "final": final,
                    "rows": len(studies),
                    "status": message.command.status,
                }
            first = first or self._loop.time() - began
            implicit = context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
            studies.add(str(decode(BytesIO(message.data), implicit, True).StudyInstanceUID))

    async def _associate(self, one: dict[str, Any], model: str) -> tuple[Association, Context]:
        association = await self._layer.request(
            Target("127.0.0.1", one["port"], one["called"], one["calling"]),
            Proposal(((model, (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)),)),
        )
        return association, association.context_for(model)


def _encoded(identifier: Dataset, context: Context) -> bytes:
    encoded = encode(identifier, context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN, True)
    assert encoded is not None
    return encoded


async def main(settings: dict[str, Any]) -> None:
    """Receive, and do what the driver says."""
    logs.configure("error", stream=sys.stderr, hooks=False)
    if settings["delayed_acks"]:
        transport._QUICKACK = None  # type: ignore[misc]  # this process is a peer of the proxy
    workstation = Workstation()
    await workstation.listen(settings["port"])
    await obey(
        {
            "hold": workstation.hold,
            "let_in": workstation.let_in,
            "reset": workstation.reset,
            "tally": workstation.tally,
            "move": workstation.move,
            "find": workstation.find,
        }
    )


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
