"""The services in front of scripted coordinators, and a peer that talks to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any, Final, cast

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import Command, CommandField, cancel, request
from dicomproxy.dimse.layer import Limits, Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import UNCOMPRESSED, Context
from dicomproxy.dimse.operations import VERIFICATION
from dicomproxy.dimse.pdu import RoleSelection
from dicomproxy.ports import Caller, Originator
from dicomproxy.query.coordinator import Answer, Answers, QueryCoordinator
from dicomproxy.retrieval.coordinator import (
    DestinationPlan,
    RetrieveCoordinator,
    RetrieveOutcome,
    RetrieveRequest,
)
from dicomproxy.retrieval.tally import Counts
from dicomproxy.services.acceptor import ServiceAcceptor, ServiceSettings
from dicomproxy.services.access import AccessControl, KnownPeer, Senders
from dicomproxy.services.operations import Operations
from dicomproxy.services.store import StorageService
from tests.dimse_edge.harness import layer_left_clean
from tests.support.stand_in import SECONDS

PATIENT_FIND: Final = "1.2.840.10008.5.1.4.1.2.1.1"
PATIENT_MOVE: Final = "1.2.840.10008.5.1.4.1.2.1.2"
STUDY_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"
MODALITY_WORKLIST: Final = "1.2.840.10008.5.1.4.31"
CT: Final = "1.2.840.10008.5.1.4.1.1.2"
PRIVATE: Final = "1.3.12.2.1107.5.9.1"
EXPLICIT: Final = "1.2.840.10008.1.2.1"
IMPLICIT: Final = "1.2.840.10008.1.2"
RLE: Final = "1.2.840.10008.1.2.5"
JPEG: Final = "1.2.840.10008.1.2.4.50"

EVERYTHING: Final = (VERIFICATION, PATIENT_FIND, STUDY_FIND, PATIENT_MOVE, STUDY_MOVE, CT)

Answering = Callable[[dict[str, Any]], AsyncIterator[Answer | Answers]]


class Queries:
    """Stands for the query coordinator: ``answering`` makes the answers of each query."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.closed = asyncio.Event()
        self.answering: Answering = ending_well

    async def find(self, **asked: Any) -> AsyncIterator[Answers]:
        self.asked.append(asked)
        try:
            async for answer in self.answering(asked):
                yield answer if isinstance(answer, tuple) else (answer,)
        finally:
            self.closed.set()


async def ending_well(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
    yield Answer(0x0000)


class Retrieve:
    """Stands for a retrieve operation: runs until ``ends`` is set to its outcome."""

    def __init__(self) -> None:
        self.counts = Counts(remaining=3)
        self.bytes = 0
        self.phase = "fetching"
        self.changed: Callable[[], None] | None = None
        self.cancelled = asyncio.Event()
        self.running = asyncio.Event()
        self.ended = asyncio.Event()
        self.stopped = asyncio.Event()
        self.outcome: RetrieveOutcome | BaseException = RetrieveOutcome(0x0000)

    def cancel(self) -> None:
        self.cancelled.set()

    def end(self, outcome: RetrieveOutcome | BaseException) -> None:
        self.outcome = outcome
        self.ended.set()

    def count(self, **numbers: int) -> None:
        self.counts = Counts(**numbers)
        assert self.changed is not None
        self.changed()

    async def run(self) -> RetrieveOutcome:
        self.running.set()
        try:
            await self.ended.wait()
        finally:
            self.stopped.set()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@dataclass(slots=True)
class Started:
    request: RetrieveRequest
    caller: Caller
    originator: Originator
    destination: DestinationPlan
    operation_id: str
    local_calling_ae_title: str


class Retrieves:
    """Stands for the retrieve coordinator; ``next`` are the operations it gives out."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.given: asyncio.Queue[Retrieve] = asyncio.Queue()
        self.prepared: list[Retrieve] = []

    def start(self, asked: RetrieveRequest, **more: Any) -> Retrieve:
        self.started.append(Started(asked, **more))
        retrieve = self.prepared.pop(0) if self.prepared else Retrieve()
        self.given.put_nowait(retrieve)
        return retrieve

    async def next(self) -> Retrieve:
        """Return the next operation once it runs."""
        async with asyncio.timeout(SECONDS):
            retrieve = await self.given.get()
            await retrieve.running.wait()
            return retrieve


class Directory:
    """Knows the destination READING2 only."""

    def destination_for(self, caller: Caller) -> Callable[..., DestinationPlan]:
        def plan(title: str, originator: Originator, operation_id: str) -> DestinationPlan:
            def never() -> Any:
                raise AssertionError("nothing is delivered here")

            return DestinationPlan(title, title == "READING2", never)

        return plan


class Arrivals:
    """Takes what is sent for the sources in ``fetching``."""

    def __init__(self) -> None:
        self.fetching: set[str] = set()
        self.status = 0x0000
        self.received: list[tuple[str, str, str, str]] = []
        self.data: dict[str, bytes] = {}
        self.discarded: asyncio.Queue[str] = asyncio.Queue()

    def source_for(self, candidates: Sequence[str]) -> str | None:
        return next((one for one in candidates if one in self.fetching), None)

    def receive(self, *names: str) -> Any:
        self.received.append(cast(Any, names))
        return _Arrival(self, names[2])


class _Arrival:
    def __init__(self, arrivals: Arrivals, uid: str) -> None:
        self._arrivals, self._uid = arrivals, uid
        self._data = bytearray()

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        for segment in segments:
            self._data += segment
        release()

    def discard(self) -> None:
        self._arrivals.discarded.put_nowait(self._uid)

    async def finish(self) -> int:
        self._arrivals.data[self._uid] = bytes(self._data)
        return self._arrivals.status


SOURCES = ("north", "south")
PEERS = (
    KnownPeer("READING1", caller=Caller("READING1", sources=SOURCES, query_budget_seconds=3.0)),
    KnownPeer("MODALITY"),
    KnownPeer("ELSEWHERE", (ip_network("10.9.0.0/16"),), caller=Caller("ELSEWHERE")),
    KnownPeer("BOTH", caller=Caller("BOTH", sources=SOURCES)),
)
SENDERS = (
    Senders("north", frozenset({"NORTHPACS", "BOTH"})),
    Senders("south", frozenset({"SOUTHPACS"})),
    Senders("local", frozenset({"LOCALPACS"})),
)


@dataclass(slots=True)
class Services:
    """The services on their port, what stands behind them, and the layer peers use."""

    layer: UpperLayer
    port: int
    acceptor: ServiceAcceptor
    listener: Listener
    operations: Operations
    queries: Queries
    retrieves: Retrieves
    arrivals: Arrivals

    @asynccontextmanager
    async def peer(
        self,
        calling: str = "READING1",
        called: str = "DICOMPROXY",
        contexts: Sequence[str | tuple[str, tuple[str, ...]]] = EVERYTHING,
        roles: tuple[RoleSelection, ...] = (),
    ) -> AsyncIterator[Peer]:
        """Associate; released at the end of the block if it still stands."""
        proposal = Proposal(
            tuple((one, UNCOMPRESSED) if isinstance(one, str) else one for one in contexts), roles
        )
        target = Target("127.0.0.1", self.port, called, calling)
        peer = Peer(await self.layer.request(target, proposal))
        try:
            yield peer
        finally:
            await peer.association.release(SECONDS)


@dataclass(slots=True)
class Peer:
    """The other side: sends requests, reads responses."""

    association: Association
    unread: list[Message] = field(default_factory=list)

    def context(self, sop_class: str) -> Context:
        return self.association.context_for(sop_class)

    @property
    def accepted(self) -> dict[str, str]:
        """Abstract syntax to transfer syntax of what was accepted."""
        return {
            one.abstract_syntax: one.transfer_syntax for one in self.association.contexts.values()
        }

    async def send(
        self,
        field_: CommandField,
        sop_class: str,
        data: bytes | Identifier | None = None,
        message_id: int = 1,
        **more: Any,
    ) -> Command:
        context = self.context(sop_class)
        encoded = data.encode(context.transfer_syntax) if isinstance(data, Identifier) else data
        command = request(field_, sop_class, message_id, data_set=encoded is not None, **more)
        await self.association.send(context, command, encoded)
        return command

    async def find(self, data: bytes | Identifier, message_id: int = 1, **more: Any) -> None:
        await self.send(CommandField.C_FIND_RQ, STUDY_FIND, data, message_id, priority=0, **more)

    async def move(
        self, data: bytes | Identifier, message_id: int = 1, destination: str = "READING2"
    ) -> None:
        await self.send(
            CommandField.C_MOVE_RQ,
            STUDY_MOVE,
            data,
            message_id,
            priority=1,
            move_destination=destination,
        )

    async def store(self, data: bytes | None, uid: str = "1.2.3.1", message_id: int = 1) -> Command:
        await self.send(
            CommandField.C_STORE_RQ,
            CT,
            data,
            message_id,
            priority=0,
            affected_sop_instance_uid=uid,
        )
        return (await self.receive()).command

    async def cancel(self, message_id: int = 1, sop_class: str = STUDY_FIND) -> None:
        await self.association.send(self.context(sop_class), cancel(message_id))

    async def receive(self) -> Message:
        return await self.association.receive(SECONDS)

    async def final(self) -> tuple[list[Message], Message]:
        """Return the Pending responses and the final one."""
        pending = []
        while True:
            message = await self.receive()
            if message.command.status & 0xFF00 != 0xFF00:
                return pending, message
            pending.append(message)


@asynccontextmanager
async def serving(
    *,
    limits: Limits | None = None,
    accept: dict[str, tuple[str, ...] | None] | None = None,
    **settings: Any,
) -> AsyncIterator[Services]:
    """Yield the services, listening; afterwards no operation and no association is left."""
    async with layer_left_clean(limits=limits) as layer:
        queries, retrieves, arrivals = Queries(), Retrieves(), Arrivals()
        operations = Operations()
        acceptor = ServiceAcceptor(
            ServiceSettings(**({"idle_seconds": SECONDS, "pending_seconds": SECONDS} | settings)),
            AccessControl(frozenset({"DICOMPROXY", "LOCALPACS"}), PEERS, SENDERS),
            cast(QueryCoordinator, queries),
            cast(RetrieveCoordinator, retrieves),
            StorageService(arrivals, accept or {}),
            Directory(),
            operations,
        )
        listener = Listener(layer, acceptor, max_associations=20)
        port = await listener.start("127.0.0.1", 0)
        try:
            yield Services(
                layer, port, acceptor, listener, operations, queries, retrieves, arrivals
            )
        finally:
            async with asyncio.timeout(SECONDS):
                await listener.close()
        assert operations.running == {}
        async with asyncio.timeout(SECONDS):
            await operations.wait_idle()
            await acceptor.wait_idle()


async def within(step: Awaitable[Any]) -> Any:
    async with asyncio.timeout(SECONDS):
        return await step
