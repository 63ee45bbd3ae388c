"""C-FIND as SCP (PS3.4 C.4.1): hand the question on, send answers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from dicomproxy.dataset.levels import Root
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import Command, response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.ports import Caller
from dicomproxy.query.coordinator import Answer, Answers, QueryCoordinator, QuerySummary
from dicomproxy.services.operations import Operation

OUT_OF_RESOURCES = 0xA700
CANCELLED = 0xFE00


async def serve_find(
    association: Association,
    message: Message,
    *,
    root: Root,
    caller: Caller,
    local_calling_ae_title: str,
    coordinator: QueryCoordinator,
    operation: Operation,
) -> tuple[int | None, dict[str, Any]]:
    """Answer one C-FIND-RQ; return its final status and the facts for the log.

    The status is None where the association was lost before it could be sent.
    """
    summary = QuerySummary()
    if message.too_long:
        answer = Answer(OUT_OF_RESOURCES, error_comment="Identifier is too long")
        await _send(association, message, (answer,), {})
        return OUT_OF_RESOURCES, {}
    answers = coordinator.find(
        sop_class_uid=message.context.abstract_syntax,
        root=root,
        transfer_syntax_uid=message.context.transfer_syntax,
        data=message.data,
        caller=caller,
        operation_id=operation.operation_id,
        priority=message.command.priority,
        local_calling_ae_title=local_calling_ae_title,
        summary=summary,
    )
    status: int | None = None
    commands: dict[int, Command] = {}
    try:
        async with aclosing(answers):
            while not operation.cancelled:
                # Only the wait is cut short by C-CANCEL, never a message half sent.
                batch = await _next(answers, operation)
                if batch is None or operation.cancelled:
                    break
                await _send(association, message, batch, commands)
                if not batch[-1].pending:
                    status = batch[-1].status
                    break
        if status is None:
            status = CANCELLED if operation.cancelled else 0xC001
            await _send(association, message, (Answer(status),), commands)
    except AssociationError:
        status = None
    operation.query_level = summary.query_level
    return status, {
        "matches": summary.local_matches + summary.remote_matches,
        "local_matches": summary.local_matches,
        "remote_matches": summary.remote_matches,
        "sources": list(summary.sources),
        "missing": list(summary.failed_sources),
        "withheld": summary.withheld,
        "duplicates": summary.duplicates,
        "reason": summary.local_only or None,
    }


async def _next(answers: AsyncIterator[Answers], operation: Operation) -> Answers | None:
    """Return the next answers; None if there are none, or C-CANCEL comes first."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as patience:
            operation.cancel = lambda: patience.reschedule(loop.time())
            return await anext(answers, None)
    except TimeoutError:
        return None
    finally:
        operation.cancel = None


async def _send(
    association: Association, message: Message, batch: Answers, commands: dict[int, Command]
) -> None:
    """Send answers together; *commands* keeps those of pending ones, which are all alike."""
    messages: list[tuple[Command, bytes | None]] = []
    for answer in batch:
        alike = answer.pending and bool(answer.data)
        command = commands.get(answer.status) if alike else None
        if command is None:
            command = response(
                message.command,
                answer.status,
                data_set=bool(answer.data),
                error_comment=answer.error_comment[:64] or None,
                offending_element=answer.offending_element or None,
            )
            if alike:
                commands[answer.status] = command
        messages.append((command, answer.data or None))
    await association.send_all(message.context, messages)
