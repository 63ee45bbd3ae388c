"""Delivering to a workstation by C-STORE.

Every new association proposes what was needed lately, so that most deliveries
get by with one; a SOP Class and transfer syntax that it does not cover takes
another. Up to the workstation's limit older ones stay, then they take turns.
A workstation that rejects transiently is tried again for a while; one that
loses its association gets it back once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from prometheus_client import Counter

from dicomproxy.destinations.transcode import (
    MOST_BYTES,
    TARGETS,
    CannotTranscode,
    transcode,
)
from dicomproxy.dimse.association import Association, DataSource
from dicomproxy.dimse.command import CommandField, request
from dicomproxy.dimse.errors import (
    AssociationError,
    AssociationRejected,
    AssociationTimeout,
    ConnectFailed,
)
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.negotiation import Context
from dicomproxy.dimse.operations import store
from dicomproxy.dimse.pdu import MAX_CONTEXTS
from dicomproxy.logs import get_logger
from dicomproxy.ports import (
    CachedInstance,
    Delivered,
    DestinationError,
    Failure,
    InstanceReader,
    Originator,
)

_RECENT_PAIRS: Final = 40
_RETRY_PAUSE_SECONDS: Final = 1.0
_PATIENCE_SECONDS: Final = 1.0
_RELEASE_SECONDS: Final = 5.0
_WARNINGS: Final = frozenset({0x0107, 0x0116})  # PS3.7 C.4.2; the Bxxx ones besides

_DELIVERED = Counter(
    "dicomproxy_destination_instances_total",
    "Instances offered to workstations.",
    ("destination_ae_title", "outcome"),
)
_BYTES = Counter(
    "dicomproxy_destination_bytes_total",
    "Data set bytes delivered to workstations.",
    ("destination_ae_title",),
)

_log = get_logger()

Pair = tuple[str, str]
"""SOP Class and transfer syntax."""


@dataclass(frozen=True, slots=True)
class WorkstationSettings:
    """How to reach one workstation; durations in seconds."""

    ae_title: str
    host: str
    port: int
    associations: int = 2
    connect_timeout: float = 3.0
    response_timeout: float = 60.0
    retry_seconds: float = 30.0


class Workstation:
    """One workstation, for all deliveries to it: remembers what it was sent lately."""

    def __init__(
        self,
        layer: UpperLayer,
        settings: WorkstationSettings,
        transcoding: asyncio.Semaphore | None = None,
    ) -> None:
        self.layer = layer
        self.settings = settings
        # Shared by all workstations: what is converted is held in memory.
        self.transcoding = transcoding or asyncio.Semaphore(1)
        self.recent: OrderedDict[Pair, None] = OrderedDict()
        self.takes_turns = False
        """It was seen to take one association at a time."""

    def open(
        self, calling_ae_title: str, originator: Originator, operation_id: str = ""
    ) -> WorkstationDelivery:
        """Return a destination; it associates when the first instance is delivered."""
        return WorkstationDelivery(self, calling_ae_title, originator, operation_id)

    def remember(self, pair: Pair) -> None:
        self.recent[pair] = None
        self.recent.move_to_end(pair)
        if len(self.recent) > _RECENT_PAIRS:
            self.recent.popitem(last=False)


class WorkstationDelivery:
    """Implements :class:`dicomproxy.ports.Destination`."""

    def __init__(
        self,
        workstation: Workstation,
        calling_ae_title: str,
        originator: Originator,
        operation_id: str,
    ) -> None:
        self._workstation = workstation
        self._settings = workstation.settings
        self._originator = originator
        self._operation_id = operation_id
        self._target = Target(
            self._settings.host,
            self._settings.port,
            self._settings.ae_title,
            calling_ae_title,
            self._settings.connect_timeout,
        )
        self._open: list[tuple[Association, frozenset[Pair]]] = []
        self._accepted: WeakKeyDictionary[Association, dict[Pair, Context]] = WeakKeyDictionary()
        self._pairs: OrderedDict[Pair, None] = OrderedDict()
        self._reopened = False

    def expect(self, pairs: Iterable[Pair]) -> None:
        """Propose these too when an association is needed, as far as they find room in it."""
        for pair in pairs:
            self._pairs.setdefault(pair)

    async def deliver(self, instance: CachedInstance, reader: InstanceReader) -> Delivered:
        """Send one instance; see :meth:`dicomproxy.ports.Destination.deliver`."""
        outcome = await self._deliver(instance, reader)
        _DELIVERED.labels(self._settings.ae_title, str(outcome)).inc()
        if outcome is not Delivered.FAILED:
            # Not the size in the store: what is sent may have another header.
            _BYTES.labels(self._settings.ae_title).inc(reader.size)
        return outcome

    async def close(self) -> None:
        """Release every association."""
        while self._open:
            association, _ = self._open.pop()
            await association.release(_RELEASE_SECONDS)

    async def _deliver(self, instance: CachedInstance, reader: InstanceReader) -> Delivered:
        pair = (instance.sop_class_uid, instance.transfer_syntax_uid)
        while True:
            association = await self._association_for(pair)
            context, data, reason = await self._prepare(association, instance, reader)
            if context is None or data is None:
                self._not_deliverable(instance, reason)
                return Delivered.FAILED
            command = request(
                CommandField.C_STORE_RQ,
                instance.sop_class_uid,
                association.next_message_id(),
                data_set=True,
                priority=self._originator.priority,
                affected_sop_instance_uid=instance.sop_instance_uid,
                move_originator_ae_title=self._originator.ae_title,
                move_originator_message_id=self._originator.message_id,
            )
            try:
                response = await store(
                    association, context, command, data, self._settings.response_timeout
                )
            except OSError:
                # What we hold broke off, not the workstation: it gets the next one.
                self._forget(association)
                _log.error(
                    "cache_degraded",
                    operation_id=self._operation_id,
                    sop_instance_uid=instance.sop_instance_uid,
                    reason="unreadable",
                )
                return Delivered.FAILED
            except AssociationError as error:
                self._forget(association)
                if self._reopened:
                    raise DestinationError(_failure_of(error)) from None
                self._reopened = True
                _log.warning(
                    "delivery_reopened",
                    operation_id=self._operation_id,
                    destination_ae_title=self._settings.ae_title,
                    failure=str(_failure_of(error)),
                )
                continue
            return self._judge(instance, response.status)

    def _judge(self, instance: CachedInstance, status: int) -> Delivered:
        if status == 0x0000:
            return Delivered.COMPLETED
        warned = status >> 12 == 0xB or status in _WARNINGS
        _log.warning(
            "store_status",
            operation_id=self._operation_id,
            destination_ae_title=self._settings.ae_title,
            sop_instance_uid=instance.sop_instance_uid,
            sop_class_uid=instance.sop_class_uid,
            status=status,
        )
        return Delivered.WARNING if warned else Delivered.FAILED

    # ------------------------------------------------------------ associations

    async def _association_for(self, pair: Pair) -> Association:
        """Return an association on which *pair* was proposed.

        Raises:
            DestinationError: none can be had.
        """
        self._open = [entry for entry in self._open if entry[0].established]
        for association, proposed in self._open:
            if pair in proposed:
                return association
        self._pairs[pair] = None
        self._workstation.remember(pair)
        limit = 1 if self._workstation.takes_turns else max(1, self._settings.associations)
        while len(self._open) >= limit:
            oldest, _ = self._open.pop(0)
            await oldest.release(_RELEASE_SECONDS)
        pairs = self._worth_proposing(pair)
        association = await self._associate(_proposal(pairs))
        self._open.append((association, frozenset(pairs)))
        return association

    def _worth_proposing(self, pair: Pair) -> list[Pair]:
        """Return *pair*, what this delivery needed before, and what others did lately."""
        wanted = dict.fromkeys((pair, *reversed(self._pairs), *reversed(self._workstation.recent)))
        chosen: list[Pair] = []
        used = 0
        classes: set[str] = set()
        for candidate in wanted:
            cost = 1 + (0 if candidate[0] in classes else len(TARGETS))
            if used + cost > MAX_CONTEXTS:
                break
            used += cost
            classes.add(candidate[0])
            chosen.append(candidate)
        return chosen

    async def _associate(self, proposal: Proposal) -> Association:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._settings.retry_seconds
        while True:
            try:
                return await self._request(proposal)
            except AssociationRejected as error:
                if not error.rejection.transient:
                    raise DestinationError(Failure.REJECTED, error.rejection.in_words()) from None
                if self._open:
                    await self._give_way()
                    continue
                if loop.time() + _RETRY_PAUSE_SECONDS >= give_up:
                    raise DestinationError(Failure.BUSY, error.rejection.in_words()) from None
            except AssociationError as error:
                raise DestinationError(_failure_of(error)) from None
            await asyncio.sleep(_RETRY_PAUSE_SECONDS)

    async def _request(self, proposal: Proposal) -> Association:
        """Associate; where others are open and no answer comes, let them go first.

        Many workstations serve one association at a time: the next one is
        connected but not answered until the first is released.
        """
        request = self._workstation.layer.request(self._target, proposal)
        if not self._open:
            return await request
        got: list[Association | AssociationError] = []
        try:
            async with asyncio.TaskGroup() as group:
                requesting = group.create_task(_outcome(request, got), name="associate")
                done, _ = await asyncio.wait({requesting}, timeout=_PATIENCE_SECONDS)
                if not done:
                    await self._give_way()
        except BaseException:
            # Given up while others were let go; what was accepted meanwhile is nobody's.
            for left in got:
                if isinstance(left, Association):
                    left.abort()
            raise
        (outcome,) = got
        if isinstance(outcome, AssociationError):
            raise outcome
        return outcome

    async def _give_way(self) -> None:
        if not self._workstation.takes_turns:
            self._workstation.takes_turns = True
            _log.info("workstation_takes_turns", destination_ae_title=self._settings.ae_title)
        while self._open:
            association, _ = self._open.pop()
            await association.release(_RELEASE_SECONDS)

    def _forget(self, association: Association) -> None:
        association.abort()
        self._open = [entry for entry in self._open if entry[0] is not association]

    # ----------------------------------------------------------------- content

    async def _prepare(
        self, association: Association, instance: CachedInstance, reader: InstanceReader
    ) -> tuple[Context | None, DataSource | None, str]:
        """Choose the context and the data for it: as held, or converted; else say why not."""
        contexts = self._accepted.get(association)
        if contexts is None:
            contexts = self._accepted[association] = {
                (context.abstract_syntax, context.transfer_syntax): context
                for context in association.contexts.values()
                if context.as_scu
            }
        sop_class = instance.sop_class_uid
        if (as_held := contexts.get((sop_class, instance.transfer_syntax_uid))) is not None:
            return as_held, reader, ""
        wanted = next((one for one in TARGETS if (sop_class, one) in contexts), None)
        if wanted is None:
            return None, None, "no_context"
        try:
            async with self._workstation.transcoding:
                data = await _converted(instance, reader, wanted)
        except CannotTranscode as error:
            return None, None, error.reason
        except OSError:
            return None, None, "unreadable"
        return contexts[sop_class, wanted], _Bytes(data), ""

    def _not_deliverable(self, instance: CachedInstance, reason: str) -> None:
        _log.warning(
            "instance_not_deliverable",
            operation_id=self._operation_id,
            destination_ae_title=self._settings.ae_title,
            sop_instance_uid=instance.sop_instance_uid,
            sop_class_uid=instance.sop_class_uid,
            transfer_syntax_uid=instance.transfer_syntax_uid,
            reason=reason,
        )


async def _outcome(
    request: Coroutine[Any, Any, Association], got: list[Association | AssociationError]
) -> None:
    """Take down a failure instead of raising it, which would end the group it runs in."""
    try:
        got.append(await request)
    except AssociationError as error:
        got.append(error)


class _Bytes:
    """A data set in memory, as a data source."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    @property
    def size(self) -> int:
        return len(self._data)

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        at = offset
        for buffer in buffers:
            piece = self._data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return at - offset


async def _converted(instance: CachedInstance, reader: InstanceReader, wanted: str) -> bytes:
    if reader.size > MOST_BYTES:
        raise CannotTranscode("too_large")
    data = bytearray(reader.size)
    if await reader.read_into([memoryview(data)], 0) != reader.size:
        raise CannotTranscode("unreadable")
    return await asyncio.to_thread(
        transcode, bytes(data), instance.sop_class_uid, instance.transfer_syntax_uid, wanted
    )


def _proposal(pairs: Sequence[Pair]) -> Proposal:
    """One context for each pair, and one with each fallback for each SOP Class."""
    contexts = [(sop_class, (syntax,)) for sop_class, syntax in pairs]
    for sop_class in dict.fromkeys(sop_class for sop_class, _ in pairs):
        contexts.extend(
            (sop_class, (syntax,)) for syntax in TARGETS if (sop_class, syntax) not in pairs
        )
    return Proposal(tuple(contexts))


def _failure_of(error: AssociationError) -> Failure:
    match error:
        case ConnectFailed():
            return Failure.UNREACHABLE
        case AssociationTimeout():
            return Failure.TIMEOUT
        case _:
            return Failure.ABORTED
