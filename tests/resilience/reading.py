"""A workstation that keeps account: what it asked for, was told, and really holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import QUERY_RETRIEVE_LEVEL, STUDY_INSTANCE_UID
from dicomproxy.dimse.association import Association, BytesSink, Message
from dicomproxy.dimse.command import Command, CommandField, Tag, cancel, request, response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import UNCOMPRESSED, Context, Supported, acceptance, negotiate
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest
from tests.support.stand_in import SECONDS, anything

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
_FAILED_SOP_INSTANCE_UID_LIST = 0x00080058
_LARGEST_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Answer:
    """What a C-MOVE came to; ``pending`` are the counts of its Pending responses."""

    status: int
    completed: int
    failed: int
    warning: int
    listed: tuple[str, ...]
    pending: tuple[tuple[int, int, int], ...] = ()


class Reading:
    """A workstation: asks the proxy, and receives on a port of its own.

    Args:
        max_associations: more are rejected transiently.
    """

    def __init__(self, title: str, *, max_associations: int = 20) -> None:
        self.title = title
        self.proxy_port = 0
        # The script.
        self.admit: Callable[[], AssociateReject | None] = lambda: None
        self.at: Callable[[str, Association], Awaitable[None]] = _nothing
        self.supported: Callable[[str], Supported | None] = anything()
        # What happened.
        self.arrived: dict[str, bytes] = {}
        self.times: Counter[str] = Counter()
        self.requests = 0
        self.open: set[Association] = set()
        self.peak = 0
        self._layer = UpperLayer()
        self._listener = Listener(self._layer, self, max_associations=max_associations)
        self.port = 0

    async def start(self) -> None:
        self.port = await self._listener.start("127.0.0.1", 0)

    async def stop(self) -> None:
        async with asyncio.timeout(SECONDS):
            await self._layer.close(1.0)
            await self._listener.close()

    # ----------------------------------------------------------------- receives

    async def negotiate(
        self, association: Association, asked: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        self.requests += 1
        if (rejection := self.admit()) is not None:
            return rejection
        association.sink_for = lambda *_: BytesSink(_LARGEST_BYTES)
        outcome = negotiate(asked, self.supported)
        return acceptance(asked, outcome, max_length=65536), outcome.contexts

    async def serve(self, association: Association) -> None:
        self.open.add(association)
        self.peak = max(self.peak, len(self.open))
        try:
            await self.at("associated", association)
            while True:
                message = await association.receive(SECONDS)
                await self.at("instance", association)
                uid = message.command.affected_sop_instance_uid
                self.arrived[uid] = message.data
                self.times[uid] += 1
                await association.send(message.context, response(message.command, 0x0000))
        except AssociationError:
            pass
        finally:
            self.open.discard(association)

    # --------------------------------------------------------------------- asks

    async def _ask(
        self,
        field: CommandField,
        sop_class: str,
        identifier: Identifier,
        cancelled: asyncio.Event | None = None,
        **more: str,
    ) -> list[Message]:
        """Return every response; each must come in time."""
        async with asyncio.timeout(SECONDS):
            association = await self._layer.request(
                Target("127.0.0.1", self.proxy_port, "DICOMPROXY", self.title),
                Proposal(((sop_class, UNCOMPRESSED),)),
            )
        context = association.context_for(sop_class)
        try:
            await association.send(
                context,
                request(field, sop_class, 1, data_set=True, priority=0, **more),
                identifier.encode(context.transfer_syntax),
            )
            responses: list[Message] = []
            cancelling = None
            if cancelled is not None:
                cancelling = asyncio.create_task(_cancel(association, context, cancelled))
            try:
                async with asyncio.timeout(2 * SECONDS):
                    while not responses or responses[-1].command.status in (0xFF00, 0xFF01):
                        responses.append(await association.receive(SECONDS))
            finally:
                if cancelling is not None:
                    cancelling.cancel()
            await association.release(SECONDS)
            return responses
        finally:
            association.abort()

    async def find(self, study: str) -> tuple[list[Identifier], int]:
        """Ask for one study; rows and final status."""
        *rows, final = await self._ask(CommandField.C_FIND_RQ, FIND, _the_study(study))
        decoded = [Identifier.decode(row.data, row.context.transfer_syntax) for row in rows]
        return decoded, final.command.status

    async def move(self, study: str, *, cancelled: asyncio.Event | None = None) -> Answer:
        """Have one study sent here.

        Args:
            cancelled: once it is set, C-CANCEL is sent.
        """
        *pending, final = await self._ask(
            CommandField.C_MOVE_RQ, MOVE, _the_study(study), cancelled, move_destination=self.title
        )
        listed: Sequence[str] = ()
        if final.data:
            identifier = Identifier.decode(final.data, final.context.transfer_syntax)
            listed = identifier.values(_FAILED_SOP_INSTANCE_UID_LIST)
        counted = final.command
        return Answer(
            counted.status,
            counted.count(Tag.COMPLETED) or 0,
            counted.count(Tag.FAILED) or 0,
            counted.count(Tag.WARNING) or 0,
            tuple(listed),
            tuple(_counts(message.command) for message in pending),
        )


def _counts(command: Command) -> tuple[int, int, int]:
    tags = (Tag.REMAINING, Tag.COMPLETED, Tag.FAILED)
    remaining, completed, failed = (command.count(tag) or 0 for tag in tags)
    return remaining, completed, failed


def _the_study(study: str) -> Identifier:
    identifier = Identifier()
    identifier.set_text(QUERY_RETRIEVE_LEVEL, "STUDY")
    identifier.set_text(STUDY_INSTANCE_UID, study)
    return identifier


async def _cancel(association: Association, context: Context, wanted: asyncio.Event) -> None:
    await wanted.wait()
    await association.send(context, cancel(1))


async def _nothing(_phase: str, _association: Association) -> None:
    return
