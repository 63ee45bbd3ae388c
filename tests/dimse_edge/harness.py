"""What the tests of the edge share: a layer that must be left clean, sinks, sources, a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.dimse.layer import Limits, Proposal, Target, Timers, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import (
    UNCOMPRESSED,
    Context,
    Supported,
    acceptance,
    first_of,
    negotiate,
)
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest
from dicomproxy.dimse.pool import AssociationPool
from tests.dimse_edge.raw_peer import CT, DEADLINE_SECONDS, STUDY_ROOT_FIND, VERIFICATION

PROPOSAL = Proposal(
    ((VERIFICATION, UNCOMPRESSED), (CT, UNCOMPRESSED), (STUDY_ROOT_FIND, UNCOMPRESSED))
)
SHORT = 0.2
"""Seconds: a deadline that is meant to pass."""
AMPLE = 2.0
"""Seconds: one that is meant to pass too, though not before something else, on a busy machine."""


def patient(**changed: float) -> Timers:
    """Return timers that pass for nobody but those named."""
    return Timers(
        **{
            "artim": 60.0,
            "association": 60.0,
            "response": 60.0,
            "idle": 60.0,
            "stall": 60.0,
            **changed,
        }
    )


@asynccontextmanager
async def layer_left_clean(
    timers: Timers | None = None, limits: Limits | None = None
) -> AsyncIterator[UpperLayer]:
    """Yield an upper layer; afterwards, by itself, no association and no block is left."""
    layer = UpperLayer(timers or patient(), limits)
    yield layer
    async with asyncio.timeout(DEADLINE_SECONDS):
        for association in list(layer.associations):
            await association.wait_closed()
    assert layer.associations == set()
    assert layer.receive_pool.lent == 0
    assert layer.send_pool.lent == 0


def target(port: int) -> Target:
    return Target("127.0.0.1", port, "RAW", "PROXY")


class Service:
    """An acceptor that answers everything with Success, unless told otherwise.

    Args:
        handle: called with each message instead.
        negotiate: called with each request before it is answered; may reject.
    """

    def __init__(
        self,
        handle: Callable[[Association, Message], Awaitable[None]] | None = None,
        *,
        before: Callable[[AssociateRequest], Awaitable[AssociateReject | None]] | None = None,
        sink_for: Callable[[Association, Context, Any], Any] | None = None,
        max_length: int = 256 * 1024,
    ) -> None:
        self._handle = handle or answer
        self._before = before
        self._sink_for = sink_for
        self._max_length = max_length
        self.associations: asyncio.Queue[Association] = asyncio.Queue()
        self.ended: asyncio.Queue[AssociationError] = asyncio.Queue()

    async def negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        if self._before is not None and (reject := await self._before(request)) is not None:
            return reject
        if self._sink_for is not None:
            association.sink_for = self._sink_for
        outcome = negotiate(request, lambda _uid: Supported(first_of(UNCOMPRESSED)))
        return acceptance(request, outcome, max_length=self._max_length), outcome.contexts

    async def serve(self, association: Association) -> None:
        self.associations.put_nowait(association)
        try:
            while True:
                await self._handle(association, await association.receive(60.0))
        except AssociationError as error:
            self.ended.put_nowait(error)

    async def association(self) -> Association:
        """Return the next association served."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.associations.get()

    async def end(self) -> AssociationError:
        """Return how the next association ended."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.ended.get()


async def answer(association: Association, message: Message) -> None:
    await association.send(message.context, response(message.command, 0x0000))


@asynccontextmanager
async def listening(
    layer: UpperLayer, service: Any, *, max_associations: int = 10
) -> AsyncIterator[tuple[Listener, int]]:
    """Yield a listener of *layer* and its port."""
    listener = Listener(layer, service, max_associations=max_associations)
    port = await listener.start("127.0.0.1", 0)
    try:
        yield listener, port
    finally:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await listener.close()


class Pattern:
    """A data set of *size* bytes that are computed, not kept; each byte tells its offset."""

    def __init__(self, size: int, *, hold: asyncio.Event | None = None, at: int = 0) -> None:
        self.size = size
        self.reading = asyncio.Event()
        """Set when the read at or after byte *at* has begun, which then waits for *hold*."""
        self._hold, self._at = hold, at

    @staticmethod
    def bytes_at(offset: int, count: int) -> bytes:
        first = offset % 251
        return (_CYCLE * (count // 251 + 2))[first : first + count]

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= self._at:
            self.reading.set()
            if self._hold is not None:
                await self._hold.wait()
        done = 0
        for buffer in buffers:
            buffer[:] = self.bytes_at(offset + done, len(buffer))
            done += len(buffer)
        return done


_CYCLE = bytes(range(251))


class CheckingSink:
    """Compares what arrives with :class:`Pattern`, keeps nothing, gives back at once or on demand.

    Args:
        hold: keep every block until :meth:`let_go`.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self.received = 0
        self.writes = 0
        self.faults = 0
        self.discarded = False
        self.arrived = asyncio.Event()
        self.releases: list[Callable[[], None]] = []
        self.held: list[tuple[int, list[memoryview]]] = []
        self.hold = hold

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        self.writes += 1
        for segment in segments:
            self.faults += segment != Pattern.bytes_at(self.received, len(segment))
            self.received += len(segment)
        if self.hold:
            start = self.received - sum(map(len, segments))
            self.held.append((start, list(segments)))
            self.releases.append(release)
        else:
            release()
        self.arrived.set()

    def discard(self) -> None:
        self.discarded = True

    def let_go(self) -> None:
        """Give back what is held, which nobody has touched, and hold nothing any more."""
        self.hold = False
        for at, segments in self.held:
            for segment in segments:
                self.faults += segment != Pattern.bytes_at(at, len(segment))
                at += len(segment)
        self.held.clear()
        releases, self.releases = self.releases, []
        for release in releases:
            release()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until *condition* holds: for effects that signal nothing."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110  (what it reads has no event)
            await asyncio.sleep(0)


async def cancel_when(
    started: asyncio.Event | Callable[[], bool], coro: Coroutine[Any, Any, Any]
) -> None:
    """Run *coro*, cancel it once *started*, and see that it ends cancelled."""
    task = asyncio.create_task(coro)
    await until(started.is_set if isinstance(started, asyncio.Event) else started)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await task


@asynccontextmanager
async def pool_left_clean(
    layer: UpperLayer, port: int, *, ceiling: int = 2, **options: Any
) -> AsyncIterator[AssociationPool]:
    """Yield a pool towards *port*; afterwards nothing of it is in use, and it is closed."""
    pool = AssociationPool(layer, target(port), PROPOSAL, ceiling=ceiling, **options)
    try:
        yield pool
        await until(lambda: pool.in_use == 0)
        assert pool._retrieving == 0
        assert not pool._waiters
        assert not pool._purposes
    finally:
        await pool.close()
        assert pool.idle == 0
        assert len(pool._tasks) == 0
