"""DIMSE-C operations as SCU: one request, its responses (PS3.7 9.3).

Each works on a :class:`Lease` and ends it: returned after a final response,
cancelled in the background if the caller stops early, aborted if the exchange
broke. Async generators here must be closed by the caller (``aclosing``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from dicomproxy.dimse.association import Association, DataSource, Message
from dicomproxy.dimse.command import (
    RESPONSE,
    Command,
    CommandField,
    request,
)
from dicomproxy.dimse.errors import AssociationError, AssociationTimeout
from dicomproxy.dimse.negotiation import Context
from dicomproxy.dimse.pdu import ProtocolError
from dicomproxy.dimse.pool import Lease

VERIFICATION: Final = "1.2.840.10008.1.1"
_ASK_SECONDS: Final = 1.0
PENDING: Final = frozenset({0xFF00, 0xFF01})


class UnexpectedMessage(AssociationError):
    """The peer sent a message that is no answer to ours."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response; ``data`` is the identifier, if one came."""

    command: Command
    context: Context
    data: bytes = b""
    too_long: bool = False

    @property
    def status(self) -> int:
        return self.command.status

    @property
    def pending(self) -> bool:
        return self.command.status in PENDING


Incoming = Callable[[Message], Awaitable[None]]
"""Handles a request that the peer sends meanwhile: a C-STORE within a C-GET."""


async def receive_response(
    association: Association,
    message_id: int,
    field: int,
    timeout_seconds: float,
    incoming: Incoming | None = None,
) -> Response:
    """Wait for the next response to *message_id*.

    Raises:
        UnexpectedMessage: another message came; the association is aborted.
        AssociationError: it is over, or silent (AssociationTimeout).
    """
    while True:
        message = await association.receive(timeout_seconds)
        command = message.command
        if command.is_response:
            if command.field == field | RESPONSE and command.responds_to == message_id:
                return Response(command, message.context, message.data, message.too_long)
        elif incoming is not None:
            await incoming(message)
            continue
        association.protocol.protocol_error(ProtocolError("a message that answers nothing"))
        association.abort()
        raise UnexpectedMessage("a message that answers nothing")


async def exchange(
    lease: Lease,
    context: Context,
    command: Command,
    data: bytes | None,
    *,
    timeout_seconds: Callable[[], float],
    incoming: Incoming | None = None,
) -> AsyncGenerator[Response, None]:
    """Send a request and yield its responses, the last one not pending.

    Args:
        timeout_seconds: how long still, asked now and then while waiting, since what
            happens elsewhere may change it; at or below 0 it has passed.

    Raises:
        AssociationError: the exchange broke or a deadline passed; the lease is over.
    """
    association = lease.association
    message_id = command.message_id
    ended = False
    try:
        await association.send(context, command, data)
        while True:
            left = timeout_seconds()
            if left <= 0:
                raise AssociationTimeout("response")
            try:
                response = await receive_response(
                    association, message_id, command.field, min(left, _ASK_SECONDS), incoming
                )
            except AssociationTimeout:
                continue
            if not response.pending:
                ended = True
                lease.done()
                yield response
                return
            yield response
    except AssociationTimeout:
        # It may still be alive and merely slow: told to stop, not shot.
        lease.cancel(context, message_id)
        raise
    except AssociationError:
        lease.discard()
        raise
    finally:
        if not ended:
            lease.cancel(context, message_id)


async def echo(lease: Lease, timeout_seconds: float) -> int:
    """C-ECHO; return its status (PS3.7 9.3.5)."""
    association = lease.association
    try:
        context = association.context_for(VERIFICATION)
        message_id = association.next_message_id()
        await association.send(
            context, request(CommandField.C_ECHO_RQ, VERIFICATION, message_id, data_set=False)
        )
        response = await receive_response(
            association, message_id, CommandField.C_ECHO_RQ, timeout_seconds
        )
    except BaseException:
        lease.discard()
        raise
    lease.done()
    return response.status


async def store(
    association: Association,
    context: Context,
    command: Command,
    data: DataSource | bytes,
    timeout_seconds: float,
) -> Response:
    """C-STORE; return the response (PS3.7 9.3.1).

    Raises:
        AssociationError: the association is lost; what became of the instance is unknown.
    """
    await association.send(context, command, data)
    try:
        return await receive_response(
            association, command.message_id, CommandField.C_STORE_RQ, timeout_seconds
        )
    except (AssociationTimeout, asyncio.CancelledError):
        association.abort()
        raise
