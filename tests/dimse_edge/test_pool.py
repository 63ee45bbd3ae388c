"""The pool: never above its ceiling, a slot for queries, and no slot lost however a lease ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dicomproxy.dimse import pool as pool_module
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, cancel, request, response
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationError,
    AssociationRejected,
    AssociationReleased,
    AssociationTimeout,
    ConnectFailed,
)
from dicomproxy.dimse.layer import Proposal
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import UNCOMPRESSED
from dicomproxy.dimse.operations import echo
from dicomproxy.dimse.pdu import (
    REJECT_CALLED,
    REJECT_LIMIT,
    Abort,
    AssociateReject,
    AssociateRequest,
    ReleaseRequest,
)
from dicomproxy.dimse.pool import AssociationPool, Lease, Purpose
from tests.dimse_edge.harness import (
    AMPLE,
    SHORT,
    Service,
    answer,
    cancel_when,
    layer_left_clean,
    listening,
    patient,
    pool_left_clean,
    until,
)
from tests.dimse_edge.raw_peer import STUDY_ROOT_FIND, VERIFICATION, RawPeer, raw_acceptor

QUERY, RETRIEVE = Purpose.QUERY, Purpose.RETRIEVE
OWN = Proposal(((VERIFICATION, UNCOMPRESSED),))
FIND = request(CommandField.C_FIND_RQ, STUDY_ROOT_FIND, 5, data_set=True, priority=0)


class Setting:
    def __init__(self, pool: AssociationPool, service: Service, listener: Listener) -> None:
        self.pool, self.service, self.listener = pool, service, listener

    async def lease(self, purpose: Purpose = QUERY, seconds: float = 60.0, **options: Any) -> Lease:
        return await self.pool.lease(purpose, timeout_seconds=seconds, **options)


@asynccontextmanager
async def pooled(
    *, ceiling: int = 2, max_associations: int = 20, service: Service | None = None, **options: Any
) -> AsyncIterator[Setting]:
    """Yield a pool whose target is a listener of ours; all is clean afterwards."""
    service = service or Service()
    async with (
        layer_left_clean() as layer,
        listening(layer, service, max_associations=max_associations) as (listener, port),
        pool_left_clean(layer, port, ceiling=ceiling, **options) as pool,
    ):
        yield Setting(pool, service, listener)


async def works(lease: Lease) -> None:
    """See that the leased association carries an exchange; gives it back."""
    assert await echo(lease, 60.0) == 0


async def test_association_given_back_serves_again() -> None:
    """The next lease gets the same association; the counts tell where it is."""
    async with pooled() as at:
        first = await at.lease()
        assert (first.reused, at.pool.in_use, at.pool.idle) == (False, 1, 0)
        first.done()
        assert (at.pool.in_use, at.pool.idle) == (0, 1)
        second = await at.lease()
        assert (second.reused, second.association) == (True, first.association)
        await works(second)
        assert repr(at.pool) == "<AssociationPool RAW in_use=0 idle=1 ceiling=2>"


async def test_discarded_association_is_aborted_and_its_slot_free() -> None:
    """Whoever does not know what the peer will say next leaves it to nobody else."""
    async with pooled(ceiling=1) as at:
        lease = await at.lease()
        lease.discard()
        assert isinstance(lease.association.ended, AssociationAborted)
        assert (at.pool.in_use, at.pool.idle) == (0, 0)
        assert isinstance(await at.service.end(), AssociationAborted)
        await works(await at.lease())


@pytest.mark.parametrize("first", ["done", "discard", "cancel"])
@pytest.mark.parametrize("second", ["done", "discard", "cancel"])
async def test_lease_ends_once(first: str, second: str) -> None:
    """A second end changes nothing, so that clean-up code need not know what went before."""

    def end(lease: Lease, how: str) -> None:
        if how == "cancel":
            lease.cancel(lease.association.context_for(STUDY_ROOT_FIND), 5)
        else:
            getattr(lease, how)()

    async def final(association: Association, message: Message) -> None:
        to_find = response(FIND, 0xFE00)
        await association.send(message.context, to_find)

    async with pooled(service=Service(final)) as at:
        lease = await at.lease()
        end(lease, first)
        end(lease, second)
        await until(lambda: at.pool.in_use == 0)
        assert at.pool.idle == (0 if first == "discard" else 1)


async def test_never_more_than_the_ceiling() -> None:
    """Twenty users of two slots: all are served, at most two at a time."""
    most = 0

    async def counts(association: Association, message: Message) -> None:
        nonlocal most
        most = max(most, len(at.listener.accepted))
        await answer(association, message)

    async with pooled(service=Service(counts)) as at:

        async def use() -> None:
            lease = await at.lease()
            assert at.pool.in_use <= 2
            await works(lease)

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(use())
    assert 1 <= most <= 2


async def test_waiting_for_a_slot_has_a_deadline() -> None:
    """All are in use for too long: AssociationTimeout, and the next in line is not forgotten."""
    async with pooled(ceiling=1) as at:
        lease = await at.lease()
        with pytest.raises(AssociationTimeout):
            await at.lease(seconds=SHORT)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(at.lease())
            await until(lambda: bool(at.pool._waiters))
            lease.done()
            assert (await waiting).association is lease.association
        (await waiting).done()


async def test_waiter_cancelled_is_forgotten() -> None:
    """Its place in the line is taken by the next."""
    async with pooled(ceiling=1) as at:
        lease = await at.lease()
        await cancel_when(lambda: bool(at.pool._waiters), at.lease())
        assert not at.pool._waiters
        lease.done()
        await works(await at.lease())


async def test_waiter_cancelled_in_its_turn_passes_it_on() -> None:
    """The slot came in the same moment as the cancellation: the next one gets it."""
    async with pooled(ceiling=1) as at:
        lease = await at.lease()
        gone = asyncio.create_task(at.lease())
        await until(lambda: len(at.pool._waiters) == 1)
        stays = asyncio.create_task(at.lease())
        await until(lambda: len(at.pool._waiters) == 2)
        lease.done()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        async with asyncio.timeout(60):
            (await stays).done()


async def test_one_slot_is_kept_for_queries() -> None:
    """Retrieves take all slots but one; a query does not wait for them."""
    async with pooled(ceiling=3) as at:
        retrieves = [await at.lease(RETRIEVE) for _ in range(2)]
        with pytest.raises(AssociationTimeout):
            await at.lease(RETRIEVE, SHORT)
        query = await at.lease(QUERY)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(at.lease(RETRIEVE))
            await until(lambda: bool(at.pool._waiters))
            query.done()  # a free slot, but not one for retrieves
            for _ in range(5):
                await asyncio.sleep(0)
            assert not waiting.done()
            retrieves[0].done()
            (await waiting).done()
        retrieves[1].done()


async def test_query_in_line_behind_a_retrieve_overtakes_it() -> None:
    """Who may not take the slot does not keep it from who may."""
    async with pooled(ceiling=2) as at:
        query, retrieve = await at.lease(QUERY), await at.lease(RETRIEVE)
        async with asyncio.TaskGroup() as group:
            second = group.create_task(at.lease(RETRIEVE))
            await until(lambda: len(at.pool._waiters) == 1)
            third = group.create_task(at.lease(QUERY))
            await until(lambda: len(at.pool._waiters) == 2)
            query.done()
            (await third).done()
            assert not second.done()
            retrieve.done()
            (await second).done()


async def test_what_nobody_waits_for_has_its_turn_last() -> None:
    """Whether somebody does is asked as a slot becomes free, not when the waiting began."""
    async with pooled(ceiling=2) as at:
        retrieve = await at.lease(RETRIEVE)
        first_is_wanted = True
        async with asyncio.TaskGroup() as group:
            first = group.create_task(at.lease(RETRIEVE, wanted=lambda: first_is_wanted))
            await until(lambda: len(at.pool._waiters) == 1)
            second = group.create_task(at.lease(RETRIEVE))
            await until(lambda: len(at.pool._waiters) == 2)
            first_is_wanted = False
            retrieve.done()
            overtook = await second
            assert not first.done()
            overtook.done()
            (await first).done()


async def test_single_slot_serves_retrieves_too() -> None:
    """With a ceiling of one there is nothing to keep back."""
    async with pooled(ceiling=1) as at:
        (await at.lease(RETRIEVE)).done()


async def test_fresh_lease_takes_no_idle_association_and_makes_it_yield() -> None:
    """At the ceiling, an idle association is released before another is requested."""
    async with pooled(ceiling=1) as at:
        first = await at.lease()
        first.done()
        second = await at.lease(fresh=True)
        assert not second.reused
        assert isinstance(first.association.ended, AssociationReleased)
        assert isinstance(await at.service.end(), AssociationReleased)
        await works(second)


async def test_association_with_a_proposal_of_its_own_is_never_kept() -> None:
    """It has other contexts than the pool's: released, not pooled, and not taken from it."""
    async with pooled() as at:
        (await at.lease()).done()
        lease = await at.lease(proposal=OWN)
        assert not lease.reused
        assert len(lease.association.contexts) == 1
        lease.done()
        # Its slot is given when it is released: until then the peer counts it.
        assert (at.pool.in_use, at.pool.idle) == (1, 1)
        await until(lambda: lease.association.ended is not None)
        assert isinstance(lease.association.ended, AssociationReleased)
        await until(lambda: at.pool.in_use == 0)
        assert at.pool.idle == 1


async def test_idle_association_expires() -> None:
    """What nobody wanted for a while is released in order."""
    async with pooled(idle_seconds=SHORT) as at:
        lease = await at.lease()
        lease.done()
        assert isinstance(await at.service.end(), AssociationReleased)
        assert at.pool.idle == 0


async def test_reused_association_does_not_expire_under_its_user() -> None:
    """The timer of an idle association stops when it is leased."""
    async with pooled(idle_seconds=AMPLE) as at:
        (await at.lease()).done()
        lease = await at.lease()
        woken = asyncio.Event()
        asyncio.get_running_loop().call_later(1.5 * AMPLE, woken.set)
        await woken.wait()
        assert lease.reused
        await works(lease)


@pytest.mark.parametrize("how", ["release", "abort", "close"])
async def test_idle_association_ended_by_the_peer_is_replaced(how: str) -> None:
    """A peer that tidies up between exchanges costs a new association, not an error."""
    ended = asyncio.Event()
    go = asyncio.Event()

    async def leaves(peer: RawPeer) -> None:
        await peer.accept()
        await go.wait()
        if how == "release":
            await peer.release()
        elif how == "abort":
            await peer.send(Abort(0, 0))
        peer.writer.close()

    async def stays(peer: RawPeer) -> None:
        await peer.accept()
        ended.set()
        await peer.released()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(leaves, stays) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        first = await pool.lease(QUERY, timeout_seconds=60)
        first.done()
        go.set()
        await until(lambda: first.association.ended is not None)
        second = await pool.lease(QUERY, timeout_seconds=60)
        assert not second.reused
        second.done()
        assert ended.is_set()


async def test_association_that_ends_in_use_is_not_kept() -> None:
    """Given back in good faith, but dead: the next one is new."""
    async with pooled() as at:
        lease = await at.lease()
        (await at.service.association()).abort()
        await until(lambda: lease.association.ended is not None)
        lease.done()
        assert at.pool.idle == 0
        second = await at.lease()
        assert not second.reused
        second.done()


# -------------------------------------------------------------------- rejection


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_who_asks_again_at_once_does_not_overtake_who_waits() -> None:
    """A slot goes to the next in line at once, not to whoever comes first after that."""
    async with pooled(ceiling=1) as at:
        lease = await at.lease()
        waiting = asyncio.create_task(at.lease())
        await until(lambda: bool(at.pool._waiters))
        lease.done()
        with pytest.raises(AssociationTimeout):
            await at.lease(seconds=SHORT)  # asks before the one that waits has been woken
        (await waiting).done()


async def test_risen_ceiling_serves_all_who_waited_for_it() -> None:
    """What was lowered for a while is the ceiling again, for those in line as well."""
    clock = Clock()
    async with pooled(ceiling=3, clock=clock) as at:
        at.pool._lowered_to, at.pool._lowered_at = 1, clock.now
        lease = await at.lease()
        waiting = [asyncio.create_task(at.lease()) for _ in range(3)]
        await until(lambda: len(at.pool._waiters) == 3)
        clock.now += 60.0
        lease.done()
        async with asyncio.timeout(60):
            leases = await asyncio.gather(*waiting)
        assert at.pool.in_use == 3
        for each in leases:
            each.done()


async def test_transient_rejection_lowers_the_ceiling_and_waits() -> None:
    """A peer that takes one association gets one; the second user waits for the first."""
    clock = Clock()
    async with pooled(ceiling=3, max_associations=1, clock=clock) as at:
        first = await at.lease()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(at.lease())
            await until(lambda: bool(at.pool._waiters))
            assert "ceiling=1" in repr(at.pool)
            first.done()
            second = await waiting
        assert second.association is first.association
        clock.now += 59.9
        assert "ceiling=1" in repr(at.pool)
        clock.now += 0.1
        assert "ceiling=3" in repr(at.pool)
        second.done()


async def test_transient_rejection_of_the_first_is_an_error() -> None:
    """With nothing of ours in use there is nothing to wait for."""

    async def busy(_request: AssociateRequest) -> AssociateReject:
        return REJECT_LIMIT

    async with pooled(service=Service(before=busy)) as at:
        with pytest.raises(AssociationRejected) as caught:
            await at.lease()
        assert caught.value.rejection == REJECT_LIMIT
        assert "ceiling=2" in repr(at.pool)


async def test_transient_rejection_makes_idle_associations_yield() -> None:
    """What fills the peer may be the association that we keep without need."""
    async with pooled(ceiling=3, max_associations=1) as at:
        kept = await at.lease()
        kept.done()
        lease = await at.lease(proposal=OWN)
        assert isinstance(kept.association.ended, AssociationReleased)
        await works(lease)


async def test_permanent_rejection_is_an_error_and_lowers_nothing() -> None:
    """A wrong AE title does not become right by waiting."""
    turn = iter((None, REJECT_CALLED))

    async def knows_one(_request: AssociateRequest) -> AssociateReject | None:
        return next(turn)

    async with pooled(service=Service(before=knows_one)) as at:
        first = await at.lease()
        with pytest.raises(AssociationRejected):
            await at.lease()
        assert (at.pool.in_use, repr(at.pool)[-10:]) == (1, "ceiling=2>")
        first.done()


async def test_refused_connection_gives_the_slot_back() -> None:
    """As often as it fails, the slots are all there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        async with (
            layer_left_clean() as layer,
            pool_left_clean(layer, probe.getsockname()[1], ceiling=1) as pool,
        ):
            for _ in range(3):
                with pytest.raises(ConnectFailed):
                    await pool.lease(RETRIEVE, timeout_seconds=60)
                assert pool.in_use == 0


@pytest.mark.parametrize("ending", ["timeout", "cancel", "abort", "close"])
async def test_negotiation_that_fails_gives_the_slot_back(ending: str) -> None:
    """Stall, cancellation, abort or loss while the association is negotiated."""
    asked = asyncio.Event()

    async def play(peer: RawPeer) -> None:
        await peer.expect(AssociateRequest)
        asked.set()
        if ending == "abort":
            await peer.send(Abort(2, 0))
            await peer.expect_end()
        elif ending in ("timeout", "cancel"):
            await peer.expect_abort()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(play) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        if ending == "cancel":
            await cancel_when(asked, pool.lease(QUERY, timeout_seconds=60))
        else:
            with pytest.raises(AssociationError) as caught:
                await pool.lease(QUERY, timeout_seconds=SHORT if ending == "timeout" else 60)
            assert isinstance(caught.value, AssociationTimeout) is (ending == "timeout")
        assert pool.in_use == 0


async def test_lease_cancelled_while_an_idle_one_yields() -> None:
    """The idle association's peer does not answer the release; the user gives up: both are gone."""
    asked = asyncio.Event()

    async def deaf(peer: RawPeer) -> None:
        await peer.accept()
        await peer.expect(ReleaseRequest)
        asked.set()
        await peer.expect_abort()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(deaf) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        (await pool.lease(QUERY, timeout_seconds=60)).done()
        await cancel_when(asked, pool.lease(QUERY, timeout_seconds=60, fresh=True))
        assert (pool.in_use, pool.idle) == (0, 0)


# ------------------------------------------------------------------- cancelling


def pending() -> Any:
    return response(FIND, 0xFF00, data_set=True)


async def test_cancelled_operation_is_read_to_its_end_and_the_association_kept() -> None:
    """C-CANCEL goes out, late matches are read and dropped, the final response ends it."""

    async def play(peer: RawPeer) -> None:
        await peer.accept()
        assert await peer.expect_message() == (5, FIND, b"")
        await peer.send_message(5, pending(), b"late match")
        assert await peer.expect_message() == (5, cancel(5), b"")
        await peer.send_message(5, pending(), b"later match")
        await peer.send_message(5, response(FIND, 0xFE00))
        await peer.released()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(play) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        lease = await pool.lease(QUERY, timeout_seconds=60)
        context = lease.association.context_for(STUDY_ROOT_FIND)
        await lease.association.send(context, FIND, b"")
        lease.cancel(context, 5)
        assert pool.in_use == 1  # until the peer has stopped
        again = await pool.lease(QUERY, timeout_seconds=60)
        assert again.association is lease.association
        again.done()


@pytest.mark.parametrize("ending", ["silence", "abort", "close"])
async def test_cancelled_operation_that_does_not_end_is_aborted(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that ignores C-CANCEL, or goes away, does not keep the slot."""
    monkeypatch.setattr(pool_module, "_DRAIN_SECONDS", SHORT)

    async def play(peer: RawPeer) -> None:
        await peer.accept()
        assert (await peer.expect_message())[1] == cancel(5)
        if ending == "abort":
            await peer.send(Abort(0, 0))
            await peer.expect_end()
        elif ending == "silence":
            await peer.expect_abort()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(play) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        lease = await pool.lease(QUERY, timeout_seconds=60)
        lease.cancel(lease.association.context_for(STUDY_ROOT_FIND), 5)
        await until(lambda: pool.in_use == 0)
        assert pool.idle == 0


async def test_endless_matches_after_cancel_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that answers for ever is no reason to read for ever."""
    monkeypatch.setattr(pool_module, "_DRAIN_SECONDS", SHORT)

    async def play(peer: RawPeer) -> None:
        await peer.accept()
        try:
            while True:
                await peer.send_message(5, pending(), b"match")
        except ConnectionError:
            pass

    async with (
        layer_left_clean(patient(artim=SHORT)) as layer,
        raw_acceptor(play) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        lease = await pool.lease(QUERY, timeout_seconds=60)
        lease.cancel(lease.association.context_for(STUDY_ROOT_FIND), 5)
        await until(lambda: pool.in_use == 0)
        assert isinstance(lease.association.ended, AssociationAborted)


async def test_cancel_on_a_dead_association_only_gives_the_slot_back() -> None:
    """There is nobody to tell."""
    async with pooled() as at:
        lease = await at.lease()
        context = lease.association.context_for(STUDY_ROOT_FIND)
        lease.association.abort()
        lease.cancel(context, 5)
        assert (at.pool.in_use, at.pool.idle) == (0, 0)


# ---------------------------------------------------------------------- closing


async def test_close_ends_everything() -> None:
    """Idle associations are released, those in use aborted, who waits gets an error."""
    async with pooled(ceiling=2) as at:
        idle, used = await at.lease(), await at.lease()
        context = used.association.context_for(STUDY_ROOT_FIND)
        idle.done()
        second = await at.lease()
        waiting = asyncio.create_task(at.lease())
        await until(lambda: bool(at.pool._waiters))
        second.done()
        with_slot = await waiting
        late = asyncio.create_task(at.lease())
        await until(lambda: bool(at.pool._waiters))
        used.cancel(context, 5)
        await at.pool.close()
        with pytest.raises(AssociationReleased):
            await late
        with pytest.raises(AssociationReleased):
            await at.lease()
        with_slot.done()
        assert (at.pool.in_use, at.pool.idle) == (0, 0)
        for lease in (used, with_slot):
            assert isinstance(lease.association.ended, AssociationAborted)
        await at.pool.close()


async def test_close_releases_the_idle_in_order() -> None:
    """The peer of an idle association sees a release, not an abort."""
    async with pooled() as at:
        (await at.lease()).done()
        await at.pool.close()
        assert isinstance(await at.service.end(), AssociationReleased)


async def test_close_does_not_wait_for_a_deaf_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A farewell that is not answered becomes an abort."""
    monkeypatch.setattr(pool_module, "_FAREWELL_SECONDS", SHORT)

    async def deaf(peer: RawPeer) -> None:
        await peer.accept()
        await peer.expect(ReleaseRequest)
        await peer.expect_abort()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(deaf) as port,
        pool_left_clean(layer, port) as pool,
    ):
        (await pool.lease(QUERY, timeout_seconds=60)).done()
        async with asyncio.timeout(60):
            await pool.close()
