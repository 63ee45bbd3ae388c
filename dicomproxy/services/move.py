"""C-MOVE as SCP (PS3.4 C.4.2): run a retrieve, and keep its requester informed.

Pending responses follow each change of the counts and, while nothing moves,
come on a timer: a silent SCP loses workstations. They are sent by a task of
their own, so that a requester that reads slowly cannot hold up a delivery.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from dicomproxy.dataset.identifier import Identifier, IdentifierError
from dicomproxy.dataset.levels import QUERY_RETRIEVE_LEVEL, Root
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import Command, response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.dimse.negotiation import IMPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.logs import get_logger
from dicomproxy.ports import Caller, Originator
from dicomproxy.retrieval.coordinator import (
    DestinationPlan,
    RetrieveCoordinator,
    RetrieveOperation,
    RetrieveOutcome,
    RetrieveRefused,
    parse_request,
)
from dicomproxy.services.operations import Operation

OUT_OF_RESOURCES: Final = 0xA700
UNABLE_TO_PROCESS: Final = 0xC000
PENDING: Final = 0xFF00
CANCELLED: Final = 0xFE00
_FAILED_SOP_INSTANCE_UID_LIST: Final = 0x00080058
_LONGEST_SHORT_VALUE: Final = 0xFFFE  # UI has a 16-bit length where the VR is explicit
_MOST_COUNT: Final = 0xFFFF

_log = get_logger()

DestinationFor = Callable[[str, Originator, str], DestinationPlan]
"""Takes a Move Destination, who asks and the operation's ID."""


async def serve_move(
    association: Association,
    message: Message,
    *,
    root: Root,
    caller: Caller,
    local_calling_ae_title: str,
    coordinator: RetrieveCoordinator,
    destination_for: DestinationFor,
    operation: Operation,
    pending_seconds: float,
) -> tuple[int | None, dict[str, Any]]:
    """Answer one C-MOVE-RQ; return its final status and the facts for the log.

    The status is None where the association was lost before it could be sent.
    """
    command = message.command
    operation.destination_ae_title = command.move_destination
    try:
        if message.too_long:
            raise RetrieveRefused(OUT_OF_RESOURCES, None, "Identifier is too long")
        try:
            identifier = Identifier.decode(message.data, message.context.transfer_syntax)
        except IdentifierError:
            raise RetrieveRefused(UNABLE_TO_PROCESS, None, "Identifier cannot be read") from None
        operation.query_level = identifier.text(QUERY_RETRIEVE_LEVEL)[:16]
        request = parse_request(root, identifier)
    except RetrieveRefused as refused:
        return await _refuse(association, message, refused)
    originator = Originator(caller.ae_title, command.message_id, command.priority)
    retrieve = coordinator.start(
        request,
        caller=caller,
        originator=originator,
        destination=destination_for(command.move_destination, originator, operation.operation_id),
        operation_id=operation.operation_id,
        local_calling_ae_title=local_calling_ae_title,
    )
    operation.cancel = retrieve.cancel
    operation.phase = lambda: retrieve.phase
    if operation.cancelled:
        retrieve.cancel()
    news = asyncio.Event()

    def changed() -> None:
        _copy_counts(retrieve, operation)
        news.set()

    retrieve.changed = changed
    informing = _Informer(association, message, retrieve, news, pending_seconds)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(informing.run(), name="pending")
        outcome = await retrieve.run()
        informing.stop()
    operation.completed, operation.failed = outcome.completed, outcome.failed
    operation.warning, operation.remaining = outcome.warning, outcome.remaining
    try:
        await _send_final(association, message, outcome, operation)
    except AssociationError:
        return None, {}
    return outcome.status, {}


class _Informer:
    """Sends Pending responses until it is stopped or the association is lost."""

    def __init__(
        self,
        association: Association,
        message: Message,
        retrieve: RetrieveOperation,
        news: asyncio.Event,
        pending_seconds: float,
    ) -> None:
        self._association = association
        self._message = message
        self._retrieve = retrieve
        self._news = news
        self._pending_seconds = pending_seconds
        self._stopped = False

    def stop(self) -> None:
        # Not by cancelling: a message is sent whole or the association is gone.
        self._stopped = True
        self._news.set()

    async def run(self) -> None:
        while not self._stopped:
            try:
                async with asyncio.timeout(self._pending_seconds):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            counts = self._retrieve.counts
            pending = response(
                self._message.command,
                PENDING,
                remaining=min(counts.remaining, _MOST_COUNT),
                completed=min(counts.completed, _MOST_COUNT),
                failed=min(counts.failed, _MOST_COUNT),
                warning=min(counts.warning, _MOST_COUNT),
            )
            try:
                await self._association.send(self._message.context, pending)
            except AssociationError:
                return  # whoever serves the association ends the retrieve


def _copy_counts(retrieve: RetrieveOperation, operation: Operation) -> None:
    counts = retrieve.counts
    operation.remaining, operation.completed = counts.remaining, counts.completed
    operation.failed, operation.warning = counts.failed, counts.warning
    operation.bytes = retrieve.bytes
    operation.moved = time.monotonic()


async def _send_final(
    association: Association, message: Message, outcome: RetrieveOutcome, operation: Operation
) -> None:
    data = b""
    failed_uids = outcome.failed_sop_instance_uids
    if failed_uids and outcome.status != 0x0000:
        syntax = message.context.transfer_syntax
        listed = _fitting(failed_uids, syntax)
        if len(listed) < len(failed_uids):
            _log.warning(
                "failed_list_cut",
                operation_id=operation.operation_id,
                failed=len(failed_uids),
                count=len(listed),
            )
        identifier = Identifier()
        identifier.set_text(_FAILED_SOP_INSTANCE_UID_LIST, listed)
        data = identifier.encode(syntax)
    await association.send(
        message.context, _final(message.command, outcome, bool(data)), data or None
    )


def _final(to: Command, outcome: RetrieveOutcome, data_set: bool) -> Command:
    return response(
        to,
        outcome.status,
        data_set=data_set,
        # Remaining belongs to Pending, and to Cancel (PS3.4 Table C.4-2).
        remaining=outcome.remaining if outcome.status == CANCELLED else None,
        completed=min(outcome.completed, _MOST_COUNT),
        failed=min(outcome.failed, _MOST_COUNT),
        warning=min(outcome.warning, _MOST_COUNT),
        error_comment=outcome.error_comment[:64] or None,
    )


def _fitting(uids: tuple[str, ...], transfer_syntax_uid: str) -> tuple[str, ...]:
    """Return as many of *uids* as the value can hold, all where its length has 32 bits."""
    if transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN:
        return uids
    size = 0
    for number, uid in enumerate(uids):
        size += len(uid) + 1
        if size > _LONGEST_SHORT_VALUE:
            return uids[:number]
    return uids


async def _refuse(
    association: Association, message: Message, refused: RetrieveRefused
) -> tuple[int | None, dict[str, Any]]:
    offending = refused.offending_element
    try:
        await association.send(
            message.context,
            response(
                message.command,
                refused.status,
                offending_element=None if offending is None else (offending,),
                error_comment=refused.comment[:64] or None,
            ),
        )
    except AssociationError:
        return None, {}
    return refused.status, {"reason": "refused"}
