"""Associations to one peer, kept between exchanges and never more than allowed.

A *slot* is the right to have one association; slots in use and idle
associations together never exceed the ceiling. With a ceiling above one, one
slot is kept for queries, so that a long retrieve cannot make them wait. What
nobody waits for has its turn after all others. Idle associations yield first. A
peer that rejects transiently while others are in use lowers the ceiling for a
while, and whoever asked waits for a slot. One that does so although nothing is
in use is busy with others: a retrieve asks it again for some seconds, a query
leaves it alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, cancel, response
from dicomproxy.dimse.errors import (
    AssociationError,
    AssociationRejected,
    AssociationReleased,
    AssociationTimeout,
    NoTurn,
)
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.negotiation import Context
from dicomproxy.tasks import TaskOwner

_IDLE_SECONDS: Final = 30.0
_LOWERED_SECONDS: Final = 60.0
_DRAIN_SECONDS: Final = 30.0
_RELEASE_SECONDS: Final = 5.0
_FAREWELL_SECONDS: Final = 1.0
_BUSY_SECONDS: Final = 10.0
_BUSY_PAUSE_SECONDS: Final = 0.5
_AFTERMATH_SECONDS: Final = 0.1
_ROUND_TRIPS: Final = 8
_OUT_OF_RESOURCES: Final = 0xA700


class Purpose(Enum):
    """What an association is wanted for; queries may use every slot."""

    QUERY = "query"
    RETRIEVE = "retrieve"


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody in line for a slot."""

    purpose: Purpose
    turn: asyncio.Future[bool]
    """Ends with whether a slot was given, which then is held already."""
    wanted: Callable[[], bool] | None = None

    @property
    def is_wanted(self) -> bool:
        return self.wanted is None or self.wanted()


class Lease:
    """An association in somebody's hands. Ends by exactly one of its methods."""

    def __init__(
        self, pool: AssociationPool, association: Association, *, reused: bool, pooled: bool
    ) -> None:
        self.association = association
        self.reused = reused
        self._pool = pool
        self._pooled = pooled
        self._over = False

    def done(self) -> None:
        """The exchange ended in order: the association may serve another."""
        if not self._over:
            self._over = True
            self._pool._returned(self.association, keep=self._pooled)

    def answered_in(self, seconds: float) -> None:
        """Tell the pool how long a first response took; see there."""
        self._pool.answered_in(seconds)

    def discard(self) -> None:
        """Abort: the association is in an unknown state."""
        if not self._over:
            self._over = True
            self.association.abort()
            self._pool._returned(self.association, keep=False)

    def cancel(self, context: Context, message_id: int) -> None:
        """Give up an operation that has not had its final response (PS3.7 9.3.2.3).

        C-CANCEL is sent; the responses still to come are read in the
        background, then the association is returned, or aborted if they do not end.
        """
        if self._over:
            return
        self._over = True
        self._pool._drain(self.association, context, message_id, keep=self._pooled)


class AssociationPool:
    """Associations to one target.

    Args:
        proposal: what associations that are kept are proposed with.
        ceiling: how many there may be at once.
    """

    def __init__(
        self,
        layer: UpperLayer,
        target: Target,
        proposal: Proposal,
        *,
        ceiling: int,
        idle_seconds: float = _IDLE_SECONDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.target = target
        self.ceiling = ceiling
        self._layer = layer
        self._proposal = proposal
        self._idle_seconds = idle_seconds
        self._clock = clock or asyncio.get_running_loop().time
        self._lowered_to = ceiling
        self._lowered_at = 0.0
        self._ended_at = float("-inf")
        self._in_use = 0
        self._retrieving = 0
        self._purposes: dict[Association, Purpose] = {}
        self._idle: deque[tuple[Association, asyncio.TimerHandle]] = deque()
        self._waiters: deque[_Waiter] = deque()
        self._tasks = TaskOwner(f"pool-{target.called_ae_title}")
        self._round_trips: deque[float] = deque(maxlen=_ROUND_TRIPS)
        self._answers: deque[float] = deque(maxlen=_ROUND_TRIPS)
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"<AssociationPool {self.target.called_ae_title} in_use={self._in_use}"
            f" idle={len(self._idle)} ceiling={self._limit}>"
        )

    @property
    def in_use(self) -> int:
        return self._in_use

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def round_trip_seconds(self) -> float:
        """How far away the peer is, in seconds: the quickest answer lately; 0 where there was none.

        The quickest one, since whatever else keeps us or the peer busy only adds to it.
        """
        return min((*self._round_trips, *self._answers), default=0.0)

    def answered_in(self, seconds: float) -> None:
        """Note how long the first response to a request took: no less than a round trip."""
        self._answers.append(seconds)

    @property
    def _limit(self) -> int:
        if self._clock() - self._lowered_at >= _LOWERED_SECONDS:
            self._lowered_to = self.ceiling
        return self._lowered_to

    # ----------------------------------------------------------------- leasing

    async def lease(
        self,
        purpose: Purpose,
        *,
        timeout_seconds: float,
        fresh: bool = False,
        proposal: Proposal | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> Lease:
        """Return an association, an idle one if there is one.

        Args:
            timeout_seconds: for everything: a slot, connection, negotiation.
            fresh: do not take an idle one, it may be dead.
            proposal: request one of its own with this, never kept.
            wanted: whether anybody waits for the exchange, asked at each turn; while
                nobody does, others go first. Without it somebody does.

        Raises:
            AssociationError: none could be had in time; NoTurn if the peer was not asked.
        """
        give_up = self._clock() + min(_BUSY_SECONDS, timeout_seconds)
        in_line = True
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    in_line = True
                    await self._take_slot(purpose, wanted)
                    in_line = False
                    association = None if fresh or proposal else self._take_idle()
                    if association is not None:
                        self._purposes[association] = purpose
                        return Lease(self, association, reused=True, pooled=True)
                    try:
                        lease = await self._request(purpose, proposal)
                    except AssociationRejected as error:
                        pause = self._pause_before_again(purpose)
                        left = give_up - self._clock() - pause
                        if not pause or not error.rejection.transient or left <= 0:
                            raise
                        await asyncio.sleep(pause)
                        continue
                    if lease is not None:
                        return lease
        except TimeoutError:
            raise (NoTurn if in_line else AssociationTimeout)("association") from None

    async def _request(self, purpose: Purpose, proposal: Proposal | None) -> Lease | None:
        """Use the slot taken for a new association; ``None`` to wait for another slot."""
        try:
            # Idle ones count against the ceiling too, and yield.
            while self._idle and self._in_use + len(self._idle) > self._limit:
                await self._pop_idle(latest=False).release(_RELEASE_SECONDS)
            association = await self._layer.request(self.target, proposal or self._proposal)
        except AssociationRejected as error:
            self._give_slot(purpose)
            if error.rejection.transient and self._idle:
                # Those we keep without need may be what fills the peer.
                await self._pop_idle(latest=False).release(_RELEASE_SECONDS)
                return None
            if error.rejection.transient and self._in_use:
                # The peer takes no more than it has: wait for one of those.
                self._lowered_to = max(1, min(self._limit, self._in_use))
                self._lowered_at = self._clock()
                return None
            raise
        except BaseException:
            self._give_slot(purpose)
            raise
        self._round_trips.append(association.round_trip_seconds)
        self._purposes[association] = purpose
        return Lease(self, association, reused=False, pooled=proposal is None)

    def _pause_before_again(self, purpose: Purpose) -> float:
        """Return when to ask a busy peer again; 0 for a query that had better leave it alone."""
        if purpose is Purpose.RETRIEVE:
            return _BUSY_PAUSE_SECONDS
        # What we have just ended the peer may not have seen the end of yet.
        recent = self._clock() - self._ended_at < _BUSY_PAUSE_SECONDS
        return _AFTERMATH_SECONDS if recent else 0.0

    def _may_take(self, purpose: Purpose) -> bool:
        limit = self._limit
        if self._in_use >= limit:
            return False
        kept_for_queries = 1 if limit > 1 else 0
        return purpose is Purpose.QUERY or self._retrieving < limit - kept_for_queries

    async def _take_slot(self, purpose: Purpose, wanted: Callable[[], bool] | None) -> None:
        self._check_open()
        self._wake()  # a ceiling that was lowered may have risen since
        if self._may_take(purpose):
            self._hold_slot(purpose)
            return
        entry = _Waiter(purpose, asyncio.get_running_loop().create_future(), wanted)
        self._waiters.append(entry)
        try:
            given = await entry.turn
        except asyncio.CancelledError:
            if entry in self._waiters:
                self._waiters.remove(entry)
            elif not entry.turn.cancelled() and entry.turn.result():
                self._give_slot(purpose)  # the turn was ours and is passed on
            raise
        if self._closed and given:
            self._give_slot(purpose)
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise AssociationReleased("the pool is closed")

    def _hold_slot(self, purpose: Purpose) -> None:
        self._in_use += 1
        self._retrieving += purpose is Purpose.RETRIEVE

    def _give_slot(self, purpose: Purpose) -> None:
        self._in_use -= 1
        self._retrieving -= purpose is Purpose.RETRIEVE
        self._wake()

    def _wake(self) -> None:
        """Give free slots to those in line; at once, so that nobody who comes later is quicker."""
        while able := [
            entry
            for entry in self._waiters
            if not entry.turn.done() and self._may_take(entry.purpose)
        ]:
            # In line; but what somebody waits for before what nobody does.
            entry = next((one for one in able if one.is_wanted), able[0])
            self._waiters.remove(entry)
            self._hold_slot(entry.purpose)
            entry.turn.set_result(True)

    def _take_idle(self) -> Association | None:
        while self._idle:
            association = self._pop_idle(latest=True)  # likeliest to be alive
            if association.established:
                return association
        return None

    def _pop_idle(self, *, latest: bool) -> Association:
        association, timer = self._idle.pop() if latest else self._idle.popleft()
        timer.cancel()
        return association

    # --------------------------------------------------------------- returning

    def _returned(self, association: Association, *, keep: bool) -> None:
        purpose = self._purposes.pop(association)
        room = self._in_use - 1 + len(self._idle) < self._limit
        if keep and room and association.established and not self._closed:
            timer = asyncio.get_running_loop().call_later(
                self._idle_seconds, self._expire, association
            )
            self._idle.append((association, timer))
        elif association.established and not self._closed:
            self._tasks.spawn(self._release(association, purpose), name="release")
            return
        else:
            association.abort()
            self._ended_at = self._clock()
        self._give_slot(purpose)

    async def _release(self, association: Association, purpose: Purpose) -> None:
        """Release, and only then give the slot: until then the peer counts it as one of ours."""
        try:
            await association.release(_RELEASE_SECONDS)
        finally:
            self._ended_at = self._clock()
            self._give_slot(purpose)

    def _expire(self, association: Association) -> None:
        self._idle = deque(entry for entry in self._idle if entry[0] is not association)
        self._end(association)

    def _end(self, association: Association) -> None:
        if not association.established:
            return
        if self._closed:
            association.abort()
        else:
            self._tasks.spawn(association.release(_RELEASE_SECONDS), name="release")

    def _drain(
        self, association: Association, context: Context, message_id: int, *, keep: bool
    ) -> None:
        if not association.established or self._closed:
            association.abort()
            self._returned(association, keep=False)
            return
        self._tasks.spawn(
            self._read_to_final(association, context, message_id, keep), name="cancel"
        )

    async def _read_to_final(
        self, association: Association, context: Context, message_id: int, keep: bool
    ) -> None:
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                await association.send(context, cancel(message_id))
                while True:
                    message = await association.receive(_DRAIN_SECONDS)
                    answered = message.command
                    if not answered.is_response:
                        await _decline(association, message)
                        continue
                    if answered.responds_to == message_id and answered.status & 0xFF00 != 0xFF00:
                        break
        except (AssociationError, TimeoutError):
            association.abort()
        finally:
            if association.protocol.machine.established and association in self._purposes:
                self._returned(association, keep=keep)
            else:
                association.abort()
                self._returned(association, keep=False)

    async def close(self) -> None:
        """Release what is idle, abort the rest; whoever waits gets an error."""
        self._closed = True
        for entry in self._waiters:
            if not entry.turn.done():
                entry.turn.set_result(False)
        self._waiters.clear()
        for association in list(self._purposes):
            association.abort()
        while self._idle:
            self._tasks.spawn(
                self._pop_idle(latest=True).release(_FAREWELL_SECONDS), name="release"
            )
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._tasks.wait_idle()
        except TimeoutError:
            pass
        await self._tasks.close()


async def _decline(association: Association, message: Message) -> None:
    """Refuse what still comes within an operation that was given up.

    A peer that waits for the answer to a C-STORE within a C-GET would get
    neither to the cancellation nor to its final response.
    """
    if message.sink is not None:
        message.sink.discard()
    if message.command.field == CommandField.C_STORE_RQ:
        refusal = response(message.command, _OUT_OF_RESOURCES)
        await association.send(message.context, refusal)
