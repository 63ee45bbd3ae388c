"""The local PACS as a workstation would talk to it: queries as bytes, and moves it performs itself.

Associations are pooled per calling AE title, since the PACS may know its
workstations by theirs. Identifiers are relayed as their bytes are wherever the
PACS takes the transfer syntax in which they came.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from dicomproxy.dataset.identifier import Identifier, IdentifierError
from dicomproxy.dataset.levels import QUERY_RETRIEVE_LEVEL, Level
from dicomproxy.dimse.association import Association
from dicomproxy.dimse.command import Command, CommandField, cancel, request
from dicomproxy.dimse.errors import NoContext
from dicomproxy.dimse.negotiation import UNCOMPRESSED, Context
from dicomproxy.dimse.pool import AssociationPool, Lease, Purpose
from dicomproxy.ports import (
    Cancellation,
    Failure,
    LocalAnswer,
    RetrieveOrder,
    RetrieveProgress,
    SourceError,
    SourceQuery,
)
from dicomproxy.sources.archive import (
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_MOVE,
    STUDY_ROOT_FIND,
    STUDY_ROOT_MOVE,
    Archive,
)
from dicomproxy.sources.dimse import DimseSource, progress_of, retrieve_identifier
from dicomproxy.tasks import TaskOwner

_MOST_POOLS: Final = 64
_MOST_PATIENTS: Final = 100_000  # of one answer, since each one's ID is kept until its end


class LocalPacs:
    """Implements :class:`dicomproxy.ports.LocalArchive`.

    Args:
        archive: the PACS, with the title that we call it by ourselves.
        source: the same PACS as a source, for questions that need translating.
    """

    def __init__(self, archive: Archive, source: DimseSource) -> None:
        self.archive = archive
        self._source = source
        self._pools: OrderedDict[str, AssociationPool] = OrderedDict()
        self._tasks = TaskOwner("local-pools")

    @property
    def name(self) -> str:
        return self.archive.settings.name

    async def close(self) -> None:
        for pool in [*self._pools.values()]:
            await pool.close()
        await self._tasks.wait_idle()
        await self._tasks.close()
        await self.archive.close()

    def _pool(self, calling_ae_title: str) -> AssociationPool:
        if calling_ae_title == self.archive.settings.calling_ae_title:
            return self.archive.pool
        pool = self._pools.get(calling_ae_title)
        if pool is None:
            self._make_room()
            pool = self._pools[calling_ae_title] = self.archive.make_pool(calling_ae_title)
        self._pools.move_to_end(calling_ae_title)
        return pool

    def _make_room(self) -> None:
        """Keep the number of pools bounded: those of nobody who asks now go, the oldest first."""
        for title, pool in list(self._pools.items()):
            if len(self._pools) < _MOST_POOLS:
                return
            if not pool.in_use:
                del self._pools[title]
                self._tasks.spawn(pool.close(), name="close")

    # -------------------------------------------------------------------- find

    async def find(
        self,
        sop_class_uid: str,
        transfer_syntax_uid: str,
        data: bytes,
        *,
        calling_ae_title: str,
        priority: int = 0,
    ) -> AsyncGenerator[LocalAnswer, None]:
        """Relay a C-FIND; see :meth:`dicomproxy.ports.LocalArchive.find`."""

        def choose(lease: Lease) -> tuple[Context, Command, bytes]:
            association = lease.association
            context, encoded = _find_context(association, sop_class_uid, transfer_syntax_uid, data)
            command = request(
                CommandField.C_FIND_RQ,
                context.abstract_syntax,
                association.next_message_id(),
                data_set=True,
                priority=priority,
            )
            return context, command, encoded

        settings = self.archive.settings
        loop = asyncio.get_running_loop()
        deadline = loop.time() + settings.response_timeout
        responses = self.archive.ask(
            "find",
            choose,
            purpose=Purpose.QUERY,
            probe=True,  # the local PACS is always asked: nobody else can answer for it
            lease_seconds=settings.response_timeout,
            left_seconds=lambda: deadline - loop.time(),
            pool=self._pool(calling_ae_title),
        )
        try:
            async with aclosing(responses):
                async for answer in responses:
                    # A long answer may take longer; silence may not.
                    deadline = loop.time() + settings.response_timeout
                    if answer.too_long:
                        raise SourceError(
                            self.name, Failure.PROTOCOL, detail="identifier over its limit"
                        )
                    yield LocalAnswer(
                        answer.status,
                        answer.data if answer.pending else b"",
                        answer.context.transfer_syntax,
                        "" if answer.pending else answer.command.error_comment,
                    )
            return
        except SourceError as error:
            if error.failure is not Failure.NO_CONTEXT or sop_class_uid != PATIENT_ROOT_FIND:
                raise
        # It speaks Study Root only, and is asked about patients.
        async with aclosing(self._find_patients(transfer_syntax_uid, data)) as matches:
            async for match in matches:
                yield LocalAnswer(0xFF00, match.encode(transfer_syntax_uid), transfer_syntax_uid)
        yield LocalAnswer(0x0000)

    async def _find_patients(
        self, transfer_syntax_uid: str, data: bytes
    ) -> AsyncGenerator[Identifier, None]:
        try:
            identifier = Identifier.decode(data, transfer_syntax_uid)
        except IdentifierError:
            raise SourceError(self.name, Failure.NO_CONTEXT) from None
        query = SourceQuery(Level.PATIENT, identifier, interactive=True, max_matches=_MOST_PATIENTS)
        matches = self._source.find(query)
        async with aclosing(matches):
            async for match in matches:
                yield match

    # -------------------------------------------------------------------- move

    async def move(
        self,
        order: RetrieveOrder,
        *,
        destination_ae_title: str,
        calling_ae_title: str,
        message_id: int,
        priority: int = 0,
        cancellation: Cancellation | None = None,
    ) -> AsyncGenerator[RetrieveProgress, None]:
        """Have the PACS send; see :meth:`dicomproxy.ports.LocalArchive.move`."""
        cancelling = _Cancelling(message_id)

        def choose(lease: Lease) -> tuple[Context, Command, bytes]:
            association = lease.association
            roots = (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE)
            wanted = roots[1] if order.level is Level.PATIENT else roots[0]
            try:
                context = association.context_for(wanted)
            except NoContext:
                if order.level is Level.PATIENT or not order.patient_id:
                    raise
                context = association.context_for(roots[1])
            command = request(
                CommandField.C_MOVE_RQ,
                context.abstract_syntax,
                message_id,
                data_set=True,
                priority=priority,
                move_destination=destination_ae_title,
            )
            identifier = retrieve_identifier(order, context.abstract_syntax == roots[1])
            cancelling.begin(association, context)
            if cancellation is not None:
                cancellation.send = cancelling.ask
            return context, command, identifier.encode(context.transfer_syntax)

        def left_seconds() -> float:
            cancelling.send_if_asked()  # the request itself may have been in the way before
            return deadline - loop.time()

        settings = self.archive.settings
        loop = asyncio.get_running_loop()
        # Its instances go elsewhere: only its responses show that something moves.
        deadline = loop.time() + settings.first_instance_timeout
        responses = self.archive.ask(
            "relayed_move",
            choose,
            purpose=Purpose.RETRIEVE,
            probe=True,
            lease_seconds=settings.first_instance_timeout,
            left_seconds=left_seconds,
            pool=self._pool(calling_ae_title),
        )
        try:
            async with aclosing(responses):
                async for answer in responses:
                    deadline = loop.time() + settings.stall_timeout
                    if not answer.pending:
                        cancelling.end()
                    yield progress_of(answer)
        finally:
            cancelling.end()


class _Cancelling:
    """Sends the C-CANCEL of one move, once, as soon as it can be sent."""

    def __init__(self, message_id: int) -> None:
        self._message_id = message_id
        self._asked = False
        self._exchange: tuple[Association, Context, int] | None = None

    def begin(self, association: Association, context: Context) -> None:
        """The request is about to be sent, for the second time maybe."""
        self._exchange = (association, context, association.messages_sent)

    def end(self) -> None:
        """The association may serve another from now on, with the same Message ID even."""
        self._exchange = None

    def ask(self) -> None:
        self._asked = True
        self.send_if_asked()

    def send_if_asked(self) -> None:
        if not self._asked or self._exchange is None:
            return
        association, context, sent_before = self._exchange
        # It must not overtake the request.
        if association.messages_sent == sent_before + 1:
            association.send_now(context, cancel(self._message_id))


def _find_context(
    association: Association, sop_class_uid: str, transfer_syntax_uid: str, data: bytes
) -> tuple[Context, bytes]:
    """Choose a context for the bytes as they are, else write them in another syntax."""
    syntaxes = (transfer_syntax_uid, *UNCOMPRESSED)
    try:
        context = association.context_for(sop_class_uid, *syntaxes)
    except NoContext:
        if sop_class_uid != PATIENT_ROOT_FIND or _level(data, transfer_syntax_uid) in (
            "",
            Level.PATIENT,
        ):
            raise
        # Below the patient both models ask alike: the patient is a key of the study.
        context = association.context_for(STUDY_ROOT_FIND, *syntaxes)
    if context.transfer_syntax == transfer_syntax_uid:
        return context, data
    try:
        identifier = Identifier.decode(data, transfer_syntax_uid)
    except IdentifierError:
        raise NoContext("the identifier cannot be written in another syntax") from None
    return context, identifier.encode(context.transfer_syntax)


def _level(data: bytes, transfer_syntax_uid: str) -> str:
    try:
        return Identifier.decode(data, transfer_syntax_uid).text(QUERY_RETRIEVE_LEVEL)
    except IdentifierError:
        return ""
