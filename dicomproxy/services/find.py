"""C-FIND as SCP (PS3.4 C.4.1): hand the question on, send each answer as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from dicomproxy.dataset.levels import Root
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.ports import Caller
from dicomproxy.query.coordinator import Answer, QueryCoordinator, QuerySummary
from dicomproxy.services.operations import Operation

OUT_OF_RESOURCES = 0xA700
CANCELLED = 0xFE00
PENDING = frozenset({0xFF00, 0xFF01})


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
        await _send(association, message, answer)
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
    try:
        async with aclosing(answers):
            while not operation.cancelled:
                # Only the wait is cut short by C-CANCEL, never a message half sent.
                waited = await _next(answers, operation)
                if waited is None or operation.cancelled:
                    break
                await _send(association, message, waited)
                if waited.status not in PENDING:
                    status = waited.status
                    break
        if status is None:
            status = CANCELLED if operation.cancelled else 0xC001
            await _send(association, message, Answer(status))
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


async def _next(answers: AsyncIterator[Answer], operation: Operation) -> Answer | None:
    """Return the next answer; None if there is none, or C-CANCEL comes first."""
    loop = asyncio.get_running_loop()
    try:
        # Only the wait is cut short by C-CANCEL, never a message half sent.
        async with asyncio.timeout(None) as patience:
            operation.cancel = lambda: patience.reschedule(loop.time())
            return await anext(answers, None)
    except TimeoutError:
        return None
    finally:
        operation.cancel = None


async def _send(association: Association, message: Message, answer: Answer) -> None:
    command = response(
        message.command,
        answer.status,
        data_set=bool(answer.data),
        error_comment=answer.error_comment[:64] or None,
        offending_element=answer.offending_element or None,
    )
    await association.send(message.context, command, answer.data or None)
