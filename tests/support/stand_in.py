"""A peer on our own upper layer that does what a test says: archive or workstation, as needed.

Unlike the peers of ``tests/peers`` it lives on the test's own loop, so that a
test can hold an answer at a gate and see what its other side does meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dimse.association import Association, BytesSink, Message
from dicomproxy.dimse.command import Command, CommandField, response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.dimse.layer import UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import (
    UNCOMPRESSED,
    Context,
    Supported,
    acceptance,
    negotiate,
    requestors_order,
)
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest

SECONDS = 60.0
"""How long a test waits for what must come."""

Handler = Callable[[Association, Message], Awaitable[None]]


def anything(*syntaxes: str) -> Callable[[str], Supported | None]:
    """Support every abstract syntax, in the first proposed of *syntaxes*, with either role."""
    supported = Supported(requestors_order(syntaxes or UNCOMPRESSED), accept_scp_role=True)
    return lambda _uid: supported


def only(syntaxes: Mapping[str, Sequence[str]]) -> Callable[[str], Supported | None]:
    """Support the abstract syntaxes named, each in its transfer syntaxes."""
    table = {
        uid: Supported(requestors_order(held), accept_scp_role=True)
        for uid, held in syntaxes.items()
    }
    return table.get


class StandIn:
    """Implements the listener's acceptor by what it is told.

    Args:
        handle: called with each message, one at a time; by default all succeed.
        supported: which contexts are accepted.
        admit: asked before an association is accepted; may wait, or return a rejection.
    """

    def __init__(
        self,
        handle: Handler | None = None,
        *,
        supported: Callable[[str], Supported | None] | None = None,
        admit: Callable[[AssociateRequest], Awaitable[AssociateReject | None]] | None = None,
    ) -> None:
        self.handle = handle or succeed
        self.supported = supported or anything()
        self.admit = admit
        self.requests: list[AssociateRequest] = []
        self.associations: list[Association] = []
        self.messages: list[Message] = []
        self.ends: asyncio.Queue[AssociationError] = asyncio.Queue()

    async def negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        self.requests.append(request)
        if self.admit is not None and (reject := await self.admit(request)) is not None:
            return reject
        association.sink_for = lambda *_: BytesSink(1 << 26)
        outcome = negotiate(request, self.supported)
        return acceptance(request, outcome, max_length=65536), outcome.contexts

    async def serve(self, association: Association) -> None:
        self.associations.append(association)
        try:
            while True:
                message = await association.receive(60.0)
                self.messages.append(message)
                await self.handle(association, message)
        except AssociationError as error:
            self.ends.put_nowait(association.ended or error)

    @property
    def commands(self) -> list[Command]:
        return [message.command for message in self.messages]

    async def end(self) -> AssociationError:
        """Return how the next association ended."""
        async with asyncio.timeout(SECONDS):
            return await self.ends.get()

    def identifiers(self) -> list[Identifier]:
        """Return the identifiers that came, decoded."""
        return [
            Identifier.decode(message.data, message.context.transfer_syntax)
            for message in self.messages
            if message.data
        ]


@asynccontextmanager
async def serving(
    layer: UpperLayer, stand_in: StandIn, *, max_associations: int = 20
) -> AsyncIterator[int]:
    """Serve *stand_in* on a free port, which is yielded."""
    listener = Listener(layer, stand_in, max_associations=max_associations)
    port = await listener.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        async with asyncio.timeout(SECONDS):
            await listener.close()


async def succeed(association: Association, message: Message) -> None:
    """Answer with Success."""
    await association.send(message.context, response(message.command, 0x0000))


async def send_pending(
    association: Association, message: Message, row: Identifier | bytes | None = None, **more: Any
) -> None:
    """Send one Pending response, with *row* as its identifier."""
    data = row.encode(message.context.transfer_syntax) if isinstance(row, Identifier) else row
    command = response(message.command, 0xFF00, data_set=data is not None, **more)
    await association.send(message.context, command, data)


async def send_final(
    association: Association,
    message: Message,
    status: int = 0x0000,
    row: Identifier | None = None,
    **more: Any,
) -> None:
    """Send the final response."""
    data = None if row is None else row.encode(message.context.transfer_syntax)
    command = response(message.command, status, data_set=data is not None, **more)
    await association.send(message.context, command, data)


def answers(*rows: Identifier | bytes, final: int = 0x0000) -> Handler:
    """Return a handler that answers everything with *rows* and a final status."""

    async def handle(association: Association, message: Message) -> None:
        for row in rows:
            await send_pending(association, message, row)
        await send_final(association, message, final)

    return handle


async def cancelled(association: Association, message: Message) -> None:
    """Wait for the C-CANCEL of *message*, and end it as cancelled."""
    while True:
        got = await association.receive(SECONDS)
        assert got.command.field == CommandField.C_CANCEL_RQ
        if got.command.responds_to == message.command.message_id:
            break
    await send_final(association, message, 0xFE00)
