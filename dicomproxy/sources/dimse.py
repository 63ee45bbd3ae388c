"""A source that speaks DIMSE: C-FIND to ask, C-MOVE to ourselves or C-GET to fetch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, cast

from dicomproxy.dataset.identifier import Identifier, IdentifierError
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
)
from dicomproxy.dataset.transfer_syntaxes import UNCOMPRESSED as UNCOMPRESSED_SYNTAXES
from dicomproxy.dataset.transfer_syntaxes import context_groups, within_bytes
from dicomproxy.dimse.association import Association, BytesSink, Message, Sink
from dicomproxy.dimse.command import Command, CommandField, Tag, request, response
from dicomproxy.dimse.errors import NoContext
from dicomproxy.dimse.layer import Proposal
from dicomproxy.dimse.negotiation import UNCOMPRESSED, Context
from dicomproxy.dimse.operations import Response
from dicomproxy.dimse.pdu import MAX_CONTEXTS, RoleSelection
from dicomproxy.dimse.pool import Lease, Purpose
from dicomproxy.logs import get_logger
from dicomproxy.ports import (
    Arrival,
    Arrivals,
    Failure,
    RetrieveOrder,
    RetrieveProgress,
    SourceError,
    SourceQuery,
)
from dicomproxy.sources.archive import (
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
    Archive,
    deadline,
)
from dicomproxy.sources.storage_classes import COMMON_STORAGE_CLASSES

_FAILED_SOP_INSTANCE_UID_LIST: Final = 0x00080058
_UNABLE_TO_PROCESS: Final = 0xC000
_SYNTAXES_BYTES: Final = 44 * 1024
_MOST_PUT_OFF: Final = 3
"""How many times its own patience an order that has not begun may wait for others."""
"""For the transfer syntaxes of one request: with all else in it, it stays under
64 KiB, above which acceptors, ours among them, take it for an attack."""
_UNRECOGNIZED_OPERATION: Final = 0x0211

_log = get_logger()


class DimseSource:
    """Implements :class:`dicomproxy.ports.Source` for one archive."""

    def __init__(self, archive: Archive, arrivals: Arrivals) -> None:
        self.archive = archive
        self._arrivals = arrivals

    def __repr__(self) -> str:
        return f"<DimseSource {self.name}>"

    @property
    def name(self) -> str:
        return self.archive.settings.name

    @property
    def wants_sop_classes(self) -> bool:
        """Whether its contexts follow from the SOP Classes of an order."""
        return self.archive.settings.retrieve == "c-get"

    @property
    def round_trip_seconds(self) -> float:
        """How far away the archive is, by its shortest A-ASSOCIATE lately."""
        return self.archive.pool.round_trip_seconds

    @property
    def parallel_retrieves(self) -> int:
        """The ceiling on associations, but for the one that is kept for queries."""
        return max(1, self.archive.settings.parallel_associations - 1)

    # -------------------------------------------------------------------- find

    async def find(self, query: SourceQuery) -> AsyncGenerator[Identifier, None]:
        """Yield matches; see :meth:`dicomproxy.ports.Source.find`."""
        settings = self.archive.settings
        left = deadline(settings.query_timeout)
        collapse = False

        def choose(lease: Lease) -> tuple[Context, Command, bytes]:
            nonlocal collapse
            context, identifier, collapse = self._question(lease.association, query)
            command = request(
                CommandField.C_FIND_RQ,
                context.abstract_syntax,
                lease.association.next_message_id(),
                data_set=True,
                priority=0,
            )
            return context, command, identifier.encode(context.transfer_syntax)

        responses = self.archive.ask(
            "find",
            choose,
            purpose=Purpose.QUERY,
            probe=query.interactive,
            lease_seconds=settings.query_timeout,
            left_seconds=left,
        )
        maximum = query.max_matches or settings.max_matches
        seen: set[str] = set()
        count = 0
        async with aclosing(responses):
            async for answer in responses:
                if not answer.pending:
                    self._check_status(answer)
                    return
                match = self._decode(answer)
                if collapse:
                    patient_id = match.text(PATIENT_ID)
                    if patient_id in seen:
                        continue
                    seen.add(patient_id)
                    match.set_text(QUERY_RETRIEVE_LEVEL, Level.PATIENT)
                yield match
                count += 1
                if count >= maximum:
                    _log.warning("source_matches_capped", source=self.name, maximum=maximum)
                    return

    def _question(
        self, association: Association, query: SourceQuery
    ) -> tuple[Context, Identifier, bool]:
        """Choose the information model; say whether answers are per study but asked per patient."""
        identifier = query.identifier.copy()
        identifier.set_text(QUERY_RETRIEVE_LEVEL, query.level)
        at_patient_level = query.level is Level.PATIENT
        if at_patient_level and not self.archive.settings.study_root_only:
            try:
                return association.context_for(PATIENT_ROOT_FIND), identifier, False
            except NoContext:
                pass
        try:
            context = association.context_for(STUDY_ROOT_FIND)
        except NoContext:
            # An archive of the other kind; above the level it wants the patient named.
            if self.archive.settings.study_root_only or identifier.is_empty(PATIENT_ID):
                raise
            return association.context_for(PATIENT_ROOT_FIND), identifier, False
        if at_patient_level:
            # In Study Root a patient's attributes are keys of the studies (PS3.4 C.6.2.1).
            identifier.set_text(QUERY_RETRIEVE_LEVEL, Level.STUDY)
            if STUDY_INSTANCE_UID not in identifier:
                identifier.set_empty(STUDY_INSTANCE_UID)
        return context, identifier, at_patient_level

    def _decode(self, answer: Response) -> Identifier:
        if answer.too_long:
            raise SourceError(self.name, Failure.PROTOCOL, detail="identifier over its limit")
        try:
            return Identifier.decode(answer.data, answer.context.transfer_syntax)
        except IdentifierError:
            raise SourceError(
                self.name, Failure.PROTOCOL, detail="identifier does not decode"
            ) from None

    def _check_status(self, answer: Response) -> None:
        if answer.status != 0x0000:
            raise SourceError(self.name, Failure.STATUS, answer.status)

    # ---------------------------------------------------------------- retrieve

    async def retrieve(self, order: RetrieveOrder) -> AsyncGenerator[RetrieveProgress, None]:
        """Fetch; see :meth:`dicomproxy.ports.Source.retrieve`."""
        settings = self.archive.settings
        patience = _Patience(order, settings.first_instance_timeout, settings.stall_timeout)
        getting = settings.retrieve == "c-get"
        receiver = _Receiver(self.name, self._arrivals)
        responses = self.archive.ask(
            "get" if getting else "move",
            lambda lease: self._retrieve_request(lease.association, order, getting),
            purpose=Purpose.RETRIEVE,
            probe=order.wanted is None or order.wanted(),
            lease_seconds=settings.first_instance_timeout,
            left_seconds=patience.left,
            proposal=self._get_proposal(order) if getting else None,
            prepare=self._receive(receiver) if getting else None,
            incoming=receiver.incoming if getting else None,
            wanted=order.wanted,
        )
        last: tuple[int | None, ...] = ()
        async with aclosing(responses):
            async for answer in responses:
                progress = progress_of(answer)
                counts = (
                    progress.remaining,
                    progress.completed,
                    progress.failed,
                    progress.warning,
                )
                if counts != last:
                    last = counts
                    patience.something_moved()
                yield progress

    def _retrieve_request(
        self, association: Association, order: RetrieveOrder, getting: bool
    ) -> tuple[Context, Command, bytes]:
        if getting:
            field, roots = CommandField.C_GET_RQ, (STUDY_ROOT_GET, PATIENT_ROOT_GET)
            more: dict[str, Any] = {}
        else:
            field, roots = CommandField.C_MOVE_RQ, (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE)
            more = {"move_destination": self.archive.settings.calling_ae_title}
        context = _context(association, roots, order)
        command = request(
            field,
            context.abstract_syntax,
            association.next_message_id(),
            data_set=True,
            priority=0,
            **more,
        )
        identifier = retrieve_identifier(order, context.abstract_syntax == roots[1])
        return context, command, identifier.encode(context.transfer_syntax)

    # ------------------------------------------------------------------- C-GET

    def _get_proposal(self, order: RetrieveOrder) -> Proposal:
        """Propose storage contexts, of each class as many as fit (PS3.7 D.3.3.4).

        Few classes are proposed in every syntax accepted; very many only in those
        that archives hold most.
        """
        get = tuple((sop_class, UNCOMPRESSED) for sop_class in (STUDY_ROOT_GET, PATIENT_ROOT_GET))
        room = MAX_CONTEXTS - len(get)
        classes = (tuple(dict.fromkeys(order.sop_classes)) or COMMON_STORAGE_CLASSES)[:room]
        accept = self.archive.settings.accept_order
        # What is held most often must not share a context.
        likeliest = [syntax for syntax in UNCOMPRESSED_SYNTAXES[:2] if syntax in accept]
        rest = (syntax for syntax in accept if syntax not in likeliest)
        ordered = within_bytes((*likeliest, *rest), _SYNTAXES_BYTES // len(classes))
        groups = context_groups(ordered, room // len(classes))
        return Proposal(
            get + tuple((sop_class, group) for sop_class in classes for group in groups),
            tuple(RoleSelection(sop_class, scu=False, scp=True) for sop_class in classes),
        )

    def _receive(self, receiver: _Receiver) -> Callable[[Lease], None]:
        def prepare(lease: Lease) -> None:
            receiver.association = lease.association
            lease.association.sink_for = receiver.sink_for

        return prepare


class _Receiver:
    """Takes the C-STORE requests that arrive within a C-GET."""

    def __init__(self, source: str, arrivals: Arrivals) -> None:
        self.association: Association | None = None
        self._source = source
        self._arrivals = arrivals

    def sink_for(self, association: Association, context: Context, command: Command) -> Sink:
        """Send instances to the cache, identifiers of responses to memory."""
        if command.field == CommandField.C_STORE_RQ and context.as_scp:
            return self._arrivals.receive(
                self._source,
                command.affected_sop_class_uid,
                command.affected_sop_instance_uid,
                context.transfer_syntax,
            )
        return BytesSink(association.limits.max_identifier_bytes)

    async def incoming(self, message: Message) -> None:
        """Answer a request of the peer: store it, or say that it is not understood."""
        if self.association is None:
            return
        if message.command.field == CommandField.C_CANCEL_RQ:
            return
        status = _UNRECOGNIZED_OPERATION
        if message.command.field == CommandField.C_STORE_RQ:
            arrival = message.sink
            is_arrival = arrival is not None and not isinstance(arrival, BytesSink)
            status = await cast(Arrival, arrival).finish() if is_arrival else _UNABLE_TO_PROCESS
        await self.association.send(message.context, response(message.command, status))


def _context(association: Association, roots: tuple[str, str], order: RetrieveOrder) -> Context:
    """Choose Study Root, or Patient Root where it is all there is and the patient is known."""
    if order.level is Level.PATIENT:
        return association.context_for(roots[1])
    try:
        return association.context_for(roots[0])
    except NoContext:
        if not order.patient_id:
            raise
        return association.context_for(roots[1])


def retrieve_identifier(order: RetrieveOrder, with_patient: bool) -> Identifier:
    """Build the identifier of a C-MOVE or C-GET: level and unique keys only (PS3.4 C.4.2.1.4)."""
    identifier = Identifier()
    identifier.set_text(QUERY_RETRIEVE_LEVEL, order.level)
    if order.patient_id and (with_patient or order.level is Level.PATIENT):
        if not order.patient_id.isascii():
            identifier = identifier.with_character_set(("ISO_IR 192",))
        identifier.set_text(PATIENT_ID, order.patient_id)
    for tag, uids in (
        (STUDY_INSTANCE_UID, order.study_instance_uids),
        (SERIES_INSTANCE_UID, order.series_instance_uids),
        (SOP_INSTANCE_UID, order.sop_instance_uids),
    ):
        if uids:
            identifier.set_text(tag, uids)
    return identifier


def progress_of(answer: Response) -> RetrieveProgress:
    """Read a C-MOVE or C-GET response; counts that are absent are 0."""
    command = answer.command
    failed: tuple[str, ...] = ()
    if answer.data:
        try:
            identifier = Identifier.decode(answer.data, answer.context.transfer_syntax)
            failed = identifier.values(_FAILED_SOP_INSTANCE_UID_LIST)
        except IdentifierError:
            pass  # the counts stand; which ones failed then shows by their absence
    return RetrieveProgress(
        remaining=command.count(Tag.REMAINING),
        completed=command.count(Tag.COMPLETED) or 0,
        failed=command.count(Tag.FAILED) or 0,
        warning=command.count(Tag.WARNING) or 0,
        final=not answer.pending,
        status=answer.status,
        failed_sop_instance_uids=failed,
    )


class _Patience:
    """How long a retrieve may still be silent: long until it begins, then not so long."""

    def __init__(self, order: RetrieveOrder, first_seconds: float, stall_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._order = order
        self._first_seconds = first_seconds
        self._stall_seconds = stall_seconds
        self._started = self._loop.time()
        self._moved = 0.0

    def something_moved(self) -> None:
        self._moved = self._loop.time()

    def left(self) -> float:
        if not self._order.last_activity:
            # An archive that serves one order after another is busy with others first; but one
            # that is always busy must not keep this one waiting for ever.
            latest = self._started + _MOST_PUT_OFF * self._first_seconds
            possible = min(self._order.last_possible_activity, latest)
            end = max(self._started, self._moved, possible) + self._first_seconds
        else:
            certain = max(self._order.last_activity, self._moved) + self._stall_seconds
            # What began later is another order's, or comes too late: one study's
            # instances must not keep up the order for another one that stalled.
            in_time = (last for first, last in self._order.doubtful.values() if first <= certain)
            end = max(certain, max(in_time, default=0.0) + self._stall_seconds)
        return end - self._loop.time()
