"""An archive that follows a script: it refuses, lies, stalls and dies where a test wants it to.

It is made of the proxy's own upper layer and lives on the test's loop, so that a
test can hold it at a gate. Whatever it does passes through :meth:`Archive.at`,
which a test replaces, and whatever it did is written down: orders, what it sent,
what was acknowledged, and how many associations there were at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from pydicom import Dataset

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    QUERY_RETRIEVE_LEVEL,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
)
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import Command, CommandField, request
from dicomproxy.dimse.errors import AssociationError, AssociationTimeout
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import Context, acceptance, negotiate
from dicomproxy.dimse.operations import store
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest
from tests.support.datasets import data_set_bytes
from tests.support.stand_in import SECONDS, anything, send_final, send_pending

PATIENT_ID = 0x00100020
_LEVELS = {
    "PATIENT": PATIENT_ID,
    "STUDY": STUDY_INSTANCE_UID,
    "SERIES": SERIES_INSTANCE_UID,
    "IMAGE": SOP_INSTANCE_UID,
}


class Held:
    """One instance: its unique keys, and its data set as it travels."""

    def __init__(self, dataset: Dataset) -> None:
        self.uid = str(dataset.SOPInstanceUID)
        self.study = str(dataset.StudyInstanceUID)
        self.sop_class = str(dataset.SOPClassUID)
        self.transfer_syntax = str(dataset.file_meta.TransferSyntaxUID)
        self.data = data_set_bytes(dataset)
        header = Dataset()
        header.update({one.tag: one for one in dataset if one.tag < 0x00280000})
        self.row = Identifier.from_dataset(header)

    def matches(self, asked: Identifier) -> bool:
        return all(
            not asked.values(tag) or self.row.text(tag) in asked.values(tag)
            for tag in _LEVELS.values()
        )


@dataclass(frozen=True, slots=True)
class Order:
    """A C-MOVE or C-GET that came."""

    level: str
    study: str
    instances: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Operation:
    message: Message
    cancelled: bool = False
    stored: asyncio.Queue[Command] = field(default_factory=lambda: asyncio.Queue(8))
    """Responses to the C-STOREs of a C-GET."""


class Died(Exception):
    """The archive is no more; raised within it by :meth:`Archive.die`."""


Counts = tuple[int, int, int]
"""Remaining, completed, failed."""


class Archive:
    """Holds instances, and gives them as its script says.

    Args:
        max_associations: more are rejected transiently.
    """

    def __init__(
        self, title: str, held: Sequence[Dataset] = (), *, max_associations: int = 50
    ) -> None:
        self.title = title
        self.held = {str(one.SOPInstanceUID): Held(one) for one in held}
        self.destinations: dict[str, int] = {}
        # The script.
        self.at: Callable[[str], Awaitable[None]] = _nothing
        self.admit: Callable[[], AssociateReject | None] = lambda: None
        self.refuses_find: Collection[str] = ()
        self.refuses_move: Collection[str] = ()
        self.refuses_lists = False
        self.sends_as = title
        self.names_originator = True
        self.counts: Callable[[Counts], Counts] = lambda true: true
        self.choose: Callable[[list[Held]], list[Held]] = lambda wanted: wanted
        self.lost: Collection[str] = ()
        """Instances that are listed and cannot be sent: they count as failed."""
        self.final_status: int | None = None
        self.sends_pending = True
        # What happened.
        self.requests = 0
        self.orders: list[Order] = []
        self.questions: list[str] = []
        self.sent: Counter[str] = Counter()
        self.acknowledged: list[str] = []
        self.refused: dict[str, int] = {}
        self.cancels = 0
        self.repeated = 0
        self.open: set[Association] = set()
        self.peak = 0
        self.moving: set[object] = set()
        """Retrieves that have not had their final response."""
        self.peak_moving = 0
        self.dead = False
        self._layer = UpperLayer()
        self._listener = Listener(self._layer, self, max_associations=max_associations)
        self._outgoing: set[Association] = set()
        self._last: dict[Association, tuple[Message, Counts]] = {}
        self.port = 0

    async def start(self, port: int = 0) -> None:
        self.port = await self._listener.start("127.0.0.1", port)

    async def stop(self) -> None:
        self.dead = True
        async with asyncio.timeout(SECONDS):
            await self._layer.close(1.0)
            await self._listener.close()

    def die(self) -> None:
        """End as a killed process does: every connection is closed, nobody listens any more.

        Raises:
            Died: always, so that the script goes no further.
        """
        self.vanish()
        raise Died

    def vanish(self) -> None:
        """Do the same without ending whoever calls."""
        self.dead = True
        server, loop = self._listener._server, asyncio.get_running_loop()
        assert server is not None
        for listening in server.sockets:
            loop.remove_reader(listening)

        def close(turns: int) -> None:
            # A connection that is being accepted when a server is closed would be lost track of;
            # those that come from now on are refused as the socket closes.
            if turns:
                loop.call_soon(close, turns - 1)
            else:
                server.close()

        close(10)
        self.hang_up()

    def hang_up(self) -> None:
        """Close every connection, saying nothing."""
        for association in [*self.open, *self._outgoing]:
            association.protocol.close_now()

    # ------------------------------------------------------------ associations

    async def negotiate(
        self, association: Association, asked: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        self.requests += 1
        self.open.add(association)
        if self.dead:
            self.hang_up()
        try:
            if (rejection := self.admit()) is not None:
                self.open.discard(association)
                return rejection
            await self.at("associate")
        except Died:
            pass  # the connection is closed already
        except BaseException:
            self.open.discard(association)
            raise
        self.peak = max(self.peak, len(self.open))
        outcome = negotiate(asked, anything())
        return acceptance(asked, outcome, max_length=65536), outcome.contexts

    async def serve(self, association: Association) -> None:
        """Answer one request at a time, and listen for C-CANCEL meanwhile."""
        running: _Operation | None = None
        task: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        message = await association.receive(SECONDS)
                    except AssociationTimeout:
                        if task is not None and not task.done():
                            continue
                        return
                    except AssociationError:
                        if task is not None:
                            task.cancel()
                        return
                    command = message.command
                    if command.is_response:
                        if running is not None:
                            running.stored.put_nowait(command)
                    elif command.field == CommandField.C_CANCEL_RQ:
                        self.cancels += 1
                        if running is not None:
                            running.cancelled = True
                    else:
                        running = _Operation(message)
                        task = group.create_task(self._answer(association, running))
        finally:
            self.open.discard(association)

    async def _answer(self, association: Association, operation: _Operation) -> None:
        try:
            match operation.message.command.field:
                case CommandField.C_FIND_RQ:
                    await self._find(association, operation)
                case CommandField.C_MOVE_RQ | CommandField.C_GET_RQ:
                    self.moving.add(operation)
                    self.peak_moving = max(self.peak_moving, len(self.moving))
                    try:
                        await self._retrieve(association, operation)
                    finally:
                        self.moving.discard(operation)
                case _:
                    await send_final(association, operation.message)
        except Died:
            pass
        except AssociationError:
            association.abort()

    # ------------------------------------------------------------------ queries

    async def _find(self, association: Association, operation: _Operation) -> None:
        message = operation.message
        asked = Identifier.decode(message.data, message.context.transfer_syntax)
        level = asked.text(QUERY_RETRIEVE_LEVEL)
        self.questions.append(level)
        await self.at("find")
        if level in self.refuses_find:
            await send_final(association, message, 0xA900)
            return
        seen = set()
        for held in list(self.held.values()):
            key = held.row.text(_LEVELS[level])
            if key in seen or not held.matches(asked):
                continue
            seen.add(key)
            row = Identifier()
            for element in asked:
                known = held.row.element(element.tag)
                if known is None:
                    row.set_empty(element.tag)
                else:
                    row.put(known)
            row.set_text(QUERY_RETRIEVE_LEVEL, level)
            await send_pending(association, message, row)
            await self.at("row")
        await send_final(association, message, 0xFE00 if operation.cancelled else 0x0000)
        await self.at(f"listed {level}")

    # ---------------------------------------------------------------- retrieval

    async def _retrieve(self, association: Association, operation: _Operation) -> None:
        message = operation.message
        asked = Identifier.decode(message.data, message.context.transfer_syntax)
        level = asked.text(QUERY_RETRIEVE_LEVEL)
        instances = asked.values(SOP_INSTANCE_UID)
        self.orders.append(Order(level, asked.text(STUDY_INSTANCE_UID), instances))
        await self.at("move")
        if level in self.refuses_move or (self.refuses_lists and len(instances) > 1):
            await send_final(association, message, 0xA900)
            return
        wanted = self.choose([one for one in self.held.values() if one.matches(asked)])
        if message.command.field == CommandField.C_GET_RQ:
            await self._send(association, operation, association, wanted)
            return
        if not wanted:
            await send_final(association, message)
            return
        port = self.destinations.get(message.command.move_destination)
        if port is None:
            await send_final(association, message, 0xA801)
            return
        target = Target("127.0.0.1", port, message.command.move_destination, self.sends_as)
        kinds = sorted({(one.sop_class, one.transfer_syntax) for one in wanted})
        proposal = Proposal(tuple((sop_class, (syntax,)) for sop_class, syntax in kinds))
        try:
            out = await self._layer.request(target, proposal)
        except AssociationError:
            await send_final(association, message, 0xA702, failed=len(wanted))
            return
        self._outgoing.add(out)
        try:
            await self._send(association, operation, out, wanted)
            await out.release(SECONDS)
        finally:
            self._outgoing.discard(out)
            out.abort()

    async def _send(
        self,
        association: Association,
        operation: _Operation,
        out: Association,
        wanted: Sequence[Held],
    ) -> None:
        message = operation.message
        completed = failed = 0
        for held in wanted:
            if operation.cancelled:
                await send_final(association, message, 0xFE00, completed=completed, failed=failed)
                return
            if held.uid in self.lost:
                failed += 1
                continue
            await self.at("store")
            status = await self._store(operation, out, held)
            if status == 0x0000:
                completed += 1
                self.acknowledged.append(held.uid)
            else:
                failed += 1
                self.refused[held.uid] = status
            told = self.counts((len(wanted) - completed - failed, completed, failed))
            self._last[association] = message, told
            if self.sends_pending:
                await self._tell(association)
            await self.at("stored")
        self._last.pop(association, None)
        await self.at("final")
        self.moving.discard(operation)
        _, done, bad = self.counts((0, completed, failed))
        status = 0x0000 if not failed else 0xB000 if completed else 0xA702
        await send_final(
            association,
            message,
            status if self.final_status is None else self.final_status,
            completed=done,
            failed=bad,
            warning=0,
        )

    async def _tell(self, association: Association) -> None:
        message, (left, done, bad) = self._last[association]
        await send_pending(
            association, message, remaining=left, completed=done, failed=bad, warning=0
        )

    async def repeat_pending(self) -> None:
        """Send the last Pending response again wherever a retrieve is under way."""
        for association in list(self._last):
            if association.established:
                await self._tell(association)
                self.repeated += 1
            else:
                del self._last[association]

    async def _store(self, operation: _Operation, out: Association, held: Held) -> int:
        self.sent[held.uid] += 1
        context = out.context_for(held.sop_class, held.transfer_syntax)
        asked = operation.message.command
        originator = {
            "move_originator_ae_title": "DICOMPROXY",
            "move_originator_message_id": asked.message_id,
        }
        command = request(
            CommandField.C_STORE_RQ,
            held.sop_class,
            out.next_message_id(),
            data_set=True,
            priority=0,
            affected_sop_instance_uid=held.uid,
            **(originator if self.names_originator else {}),
        )
        data = _Interruptible(held.data, lambda: self.at("middle"))
        if asked.field == CommandField.C_MOVE_RQ:
            return (await store(out, context, command, data, SECONDS)).status
        await out.send(context, command, data)
        async with asyncio.timeout(SECONDS):
            return (await operation.stored.get()).status


class _Interruptible:
    """A data set that is sent by blocks, and asks *middle* before all but the first."""

    def __init__(self, data: bytes, middle: Callable[[], Awaitable[None]]) -> None:
        self._data = memoryview(data)
        self._middle = middle

    @property
    def size(self) -> int:
        return len(self._data)

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        if offset:
            await self._middle()
        at = offset
        for buffer in buffers:
            piece = self._data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return at - offset


async def _nothing(_phase: str) -> None:
    return


def at_phase(
    phase: str, action: Callable[[], Awaitable[None] | None], *, times: int = 1
) -> Callable[[str], Awaitable[None]]:
    """Return a script that does *action* when *phase* is reached for the *times*-th time."""
    left = times

    async def script(reached: str) -> None:
        nonlocal left
        if reached == phase:
            left -= 1
            if left == 0 and (awaitable := action()) is not None:
                await awaitable

    return script
