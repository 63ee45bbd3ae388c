"""DIMSE operations as SCU: each against every way in which its peer may fail it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import pytest

from dicomproxy.dimse.association import Message
from dicomproxy.dimse.command import Command, CommandField, cancel, request, response
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationError,
    AssociationLost,
    AssociationReleased,
    AssociationTimeout,
    NoContext,
)
from dicomproxy.dimse.layer import Limits, Proposal, Timers
from dicomproxy.dimse.negotiation import UNCOMPRESSED
from dicomproxy.dimse.operations import Response, UnexpectedMessage, echo, exchange, store
from dicomproxy.dimse.pdu import Abort
from dicomproxy.dimse.pool import AssociationPool, Lease, Purpose
from tests.dimse_edge.harness import (
    SHORT,
    Pattern,
    cancel_when,
    layer_left_clean,
    pool_left_clean,
    until,
)
from tests.dimse_edge.raw_peer import (
    CT,
    STUDY_ROOT_FIND,
    VERIFICATION,
    RawPeer,
    raw_acceptor,
)
from tests.support.log_watch import LogWatch

ECHO = request(CommandField.C_ECHO_RQ, VERIFICATION, 1, data_set=False)
STORE = request(
    CommandField.C_STORE_RQ, CT, 7, data_set=True, affected_sop_instance_uid="1.2.3", priority=0
)
FIND = request(CommandField.C_FIND_RQ, STUDY_ROOT_FIND, 5, data_set=True, priority=0)
PENDING = response(FIND, 0xFF00, data_set=True)
FINAL = response(FIND, 0x0000)

Play = Callable[[RawPeer], Awaitable[None]]


@asynccontextmanager
async def leased(
    play: Play, *, times: Timers | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[AssociationPool, Lease]]:
    """Yield a lease whose peer accepts and then plays; afterwards all is clean."""

    async def accepts(peer: RawPeer) -> None:
        await peer.accept()
        await play(peer)

    async with (
        layer_left_clean(times, limits) as layer,
        raw_acceptor(accepts) as port,
        pool_left_clean(layer, port, ceiling=1) as pool,
    ):
        yield pool, await pool.lease(Purpose.QUERY, timeout_seconds=60)


async def aborts(peer: RawPeer) -> None:
    await peer.expect_message()
    await peer.send(Abort(2, 3))
    await peer.expect_end()


async def closes(peer: RawPeer) -> None:
    await peer.expect_message()


async def releases(peer: RawPeer) -> None:
    await peer.expect_message()
    await peer.release()


async def is_silent(peer: RawPeer) -> None:
    await peer.expect_message()
    await peer.expect_abort()


def answers(*commands: Command) -> Play:
    async def play(peer: RawPeer) -> None:
        context_id, _, _ = await peer.expect_message()
        for command in commands:
            await peer.send_message(context_id, command)
        await peer.expect_abort()

    return play


ENDINGS = [
    pytest.param(aborts, AssociationAborted, id="abort"),
    pytest.param(closes, AssociationLost, id="close"),
    pytest.param(releases, AssociationReleased, id="release"),
    pytest.param(is_silent, AssociationTimeout, id="silence"),
]

TO_ANOTHER = response(request(CommandField.C_ECHO_RQ, VERIFICATION, 99, data_set=False), 0)
UNFIT = [
    pytest.param(TO_ANOTHER, id="another message"),
    pytest.param(
        response(request(CommandField.N_GET_RQ, VERIFICATION, 1, data_set=False), 0),
        id="another operation",
    ),
    pytest.param(request(CommandField.C_ECHO_RQ, VERIFICATION, 1, data_set=False), id="request"),
    pytest.param(cancel(1), id="cancel"),
]


# ------------------------------------------------------------------------ echo


@pytest.mark.parametrize("status", [0x0000, 0x0122])
async def test_echo_returns_the_status_and_keeps_the_association(status: int) -> None:
    """Whatever the status, the exchange ended in order."""

    async def play(peer: RawPeer) -> None:
        for number in (1, 2):
            context_id, command, _ = await peer.expect_message()
            assert (command.field, command.message_id) == (CommandField.C_ECHO_RQ, number)
            await peer.send_message(context_id, response(command, status))
        await peer.released()

    async with leased(play) as (pool, lease):
        assert await echo(lease, 60.0) == status
        again = await pool.lease(Purpose.QUERY, timeout_seconds=60)
        assert again.reused
        assert await echo(again, 60.0) == status


@pytest.mark.parametrize(("play", "error"), ENDINGS)
async def test_echo_that_fails_gives_the_association_up(
    play: Play, error: type[AssociationError]
) -> None:
    """Abort, loss, release or silence: the error says which, the lease is over."""
    async with leased(play) as (pool, lease):
        with pytest.raises(error):
            await echo(lease, SHORT if error is AssociationTimeout else 60.0)
        assert (pool.in_use, pool.idle) == (0, 0)


async def test_echo_cancelled_gives_the_association_up() -> None:
    """An answer may still come: nobody else gets this association."""
    asked = asyncio.Event()

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        asked.set()
        await peer.expect_abort()

    async with leased(play) as (pool, lease):
        await cancel_when(asked, echo(lease, 60.0))
        assert (pool.in_use, pool.idle) == (0, 0)


@pytest.mark.parametrize("unfit", UNFIT)
async def test_message_that_answers_nothing_is_a_protocol_error(
    unfit: Command, log_watch: LogWatch
) -> None:
    """Another Message ID, another operation, or a request out of the blue: A-ABORT, and a line."""
    async with leased(answers(unfit)) as (_, lease):
        with pytest.raises(UnexpectedMessage):
            await echo(lease, 60.0)
    assert len(log_watch.named("protocol_error")) == 1


async def test_unfit_message_from_a_peer_that_has_left_is_no_crash() -> None:
    """It answers wrongly and aborts at once: still an AssociationError."""

    async def play(peer: RawPeer) -> None:
        context_id, _, _ = await peer.expect_message()
        await peer.send_message(context_id, TO_ANOTHER)
        await peer.send(Abort(0, 0))
        peer.writer.close()

    async with leased(play) as (_, lease):
        with pytest.raises(AssociationError):
            await echo(lease, 60.0)


async def test_echo_without_its_context_is_no_context() -> None:
    """Verification was not accepted: the association is given up, the slot comes back."""

    async def play(peer: RawPeer) -> None:
        await peer.accept()
        await peer.expect_abort()

    async with (
        layer_left_clean() as layer,
        raw_acceptor(play) as port,
        pool_left_clean(layer, port) as pool,
    ):
        lease = await pool.lease(
            Purpose.QUERY, timeout_seconds=60, proposal=Proposal(((CT, UNCOMPRESSED),))
        )
        with pytest.raises(NoContext):
            await echo(lease, 60.0)
        assert pool.in_use == 0


# ----------------------------------------------------------------------- store


@pytest.mark.parametrize("status", [0x0000, 0xB007, 0xA700])
@pytest.mark.parametrize("streamed", [True, False])
async def test_store_returns_the_response(status: int, streamed: bool) -> None:
    """Success, warning or failure are for the caller to judge."""

    async def play(peer: RawPeer) -> None:
        context_id, command, data = await peer.expect_message()
        assert (command, data) == (STORE, Pattern.bytes_at(0, 70_000))
        await peer.send_message(context_id, response(command, status))
        await peer.released()

    async with leased(play) as (_, lease):
        data = Pattern(70_000) if streamed else Pattern.bytes_at(0, 70_000)
        association = lease.association
        answer = await store(association, association.context_for(CT), STORE, data, 60.0)
        assert (answer.status, answer.command.affected_sop_instance_uid) == (status, "1.2.3")
        lease.done()


@pytest.mark.parametrize(("play", "error"), ENDINGS)
async def test_store_that_fails_ends_the_association(
    play: Play, error: type[AssociationError]
) -> None:
    """What became of the instance is not known, and nothing more is sent there."""
    async with leased(play) as (_, lease):
        association = lease.association
        seconds = SHORT if error is AssociationTimeout else 60.0
        with pytest.raises(error):
            await store(association, association.context_for(CT), STORE, Pattern(100), seconds)
        assert not association.established
        lease.discard()


async def test_store_cancelled_ends_the_association() -> None:
    """Cancelled while the response is awaited: aborted."""
    asked = asyncio.Event()

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        asked.set()
        await peer.expect_abort()

    async with leased(play) as (_, lease):
        association = lease.association
        await cancel_when(
            asked, store(association, association.context_for(CT), STORE, Pattern(100), 60.0)
        )
        assert isinstance(association.ended, AssociationAborted)
        lease.discard()


# -------------------------------------------------------------------- exchange


def query(
    lease: Lease,
    *,
    seconds: Callable[[], float] = lambda: 60.0,
    incoming: Callable[[Message], Awaitable[None]] | None = None,
    data: bytes = b"key",
) -> AbstractAsyncContextManager[AsyncGenerator[Response, None]]:
    context = lease.association.context_for(STUDY_ROOT_FIND)
    return aclosing(
        exchange(lease, context, FIND, data, timeout_seconds=seconds, incoming=incoming)
    )


async def gather(lease: Lease, **options: Any) -> list[Response]:
    """Return every response of a query."""
    async with query(lease, **options) as found:
        return [one async for one in found]


@pytest.mark.parametrize("status", [0x0000, 0xA700, 0xFE00, 0xC001])
async def test_exchange_yields_responses_up_to_the_final_one(status: int) -> None:
    """Pending ones with their identifiers, then the final one; the association is kept."""

    async def play(peer: RawPeer) -> None:
        assert await peer.expect_message() == (5, FIND, b"key")
        for match in (b"first", b"second"):
            await peer.send_message(5, PENDING, match)
        await peer.send_message(5, response(FIND, 0xFF01, data_set=True), b"third")
        await peer.send_message(5, response(FIND, status))
        await peer.released()

    async with leased(play) as (pool, lease):
        got = [(one.status, one.data, one.pending) for one in await gather(lease)]
        assert got == [
            (0xFF00, b"first", True),
            (0xFF00, b"second", True),
            (0xFF01, b"third", True),
            (status, b"", False),
        ]
        assert (pool.in_use, pool.idle) == (0, 1)


async def test_final_response_may_be_the_last_thing_read() -> None:
    """The lease is over before the final response is yielded: stopping there cancels nothing."""

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        await peer.send_message(5, FINAL)
        await peer.released()  # and no C-CANCEL before it

    async with leased(play) as (pool, lease):
        async with query(lease) as found:
            async for _ in found:
                break
        assert (pool.in_use, pool.idle) == (0, 1)


async def test_stopping_early_cancels_and_keeps_the_association() -> None:
    """Enough was seen: C-CANCEL, late matches dropped, and the association serves again."""

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        for match in (b"first", b"second"):
            await peer.send_message(5, PENDING, match)
        assert (await peer.expect_message())[1] == cancel(5)
        await peer.send_message(5, PENDING, b"late")
        await peer.send_message(5, response(FIND, 0xFE00))
        await peer.released()

    async with leased(play) as (pool, lease):
        async with query(lease) as found:
            async for one in found:
                assert one.data == b"first"
                break
        again = await pool.lease(Purpose.QUERY, timeout_seconds=60)
        assert again.reused
        again.done()


async def test_exchange_cancelled_cancels_at_the_peer() -> None:
    """The task is cancelled while it waits: the peer gets C-CANCEL, the association stays."""
    asked = asyncio.Event()

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        asked.set()
        assert (await peer.expect_message())[1] == cancel(5)
        await peer.send_message(5, response(FIND, 0xFE00))
        await peer.released()

    async with leased(play) as (pool, lease):
        await cancel_when(asked, gather(lease))
        await until(lambda: pool.idle == 1)


async def test_deadline_passed_cancels_at_the_peer() -> None:
    """A slow peer is told to stop, not shot: what it says then is read in the background."""

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        await peer.send_message(5, PENDING, b"first")
        assert (await peer.expect_message())[1] == cancel(5)
        await peer.send_message(5, response(FIND, 0xFE00))
        await peer.released()

    async with leased(play) as (pool, lease):
        loop = asyncio.get_running_loop()
        end = loop.time() + SHORT
        with pytest.raises(AssociationTimeout) as caught:
            await gather(lease, seconds=lambda: end - loop.time())
        assert caught.value.phase == "response"
        await until(lambda: pool.idle == 1)


async def test_deadline_is_asked_again_before_each_wait() -> None:
    """What happens elsewhere, instances that arrive, may put it off while the peer is silent."""
    asked: list[float] = []
    go = asyncio.Event()

    def seconds() -> float:
        asked.append(SHORT / 4)
        if len(asked) == 3:
            go.set()
        return asked[-1]

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        async with asyncio.timeout(60):
            await go.wait()
        await peer.send_message(5, FINAL)
        await peer.released()

    async with leased(play) as (_, lease):
        assert [one.status for one in await gather(lease, seconds=seconds)] == [0]
    assert len(asked) >= 3


@pytest.mark.parametrize(("play", "error"), ENDINGS[:3])
async def test_exchange_that_breaks_is_an_error(play: Play, error: type[AssociationError]) -> None:
    """Abort, loss or release instead of a response: the lease is over, nothing is kept."""
    async with leased(play) as (pool, lease):
        with pytest.raises(error):
            await gather(lease)
        await until(lambda: pool.in_use == 0)
        assert pool.idle == 0


@pytest.mark.parametrize("unfit", [*UNFIT, pytest.param(response(STORE, 0))])
async def test_exchange_with_an_unfit_answer_is_a_protocol_error(unfit: Command) -> None:
    """As for every operation."""
    async with leased(answers(unfit)) as (pool, lease):
        with pytest.raises(UnexpectedMessage):
            await gather(lease)
        assert (pool.in_use, pool.idle) == (0, 0)


async def test_requests_of_the_peer_are_handled_meanwhile() -> None:
    """A C-STORE within a C-GET goes to its handler, in order with the responses."""
    seen: list[bytes] = []

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        await peer.send_message(3, STORE, b"instance")
        assert (await peer.expect_message())[1] == response(STORE, 0)
        await peer.send_message(5, FINAL)
        await peer.released()

    async with leased(play) as (pool, lease):

        async def take(message: Message) -> None:
            seen.append(message.data)
            await lease.association.send(message.context, response(message.command, 0))

        assert len(await gather(lease, incoming=take)) == 1
        assert (seen, pool.idle) == ([b"instance"], 1)


async def test_handler_that_fails_cancels_the_exchange() -> None:
    """Its exception reaches the caller, and the peer is told to stop."""

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        await peer.send_message(3, STORE, b"instance")
        assert (await peer.expect_message())[1] == cancel(5)
        await peer.send_message(5, response(FIND, 0xFE00))
        await peer.released()

    async def fails(_message: Message) -> None:
        raise ZeroDivisionError

    async with leased(play) as (pool, lease):
        with pytest.raises(ZeroDivisionError):
            await gather(lease, incoming=fails)
        await until(lambda: pool.idle == 1)


async def test_identifier_over_the_limit_is_marked() -> None:
    """A match too long to be kept is told apart from one without an identifier."""

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        await peer.send_message(5, PENDING, bytes(1001))
        await peer.send_message(5, PENDING, bytes(1000))
        await peer.send_message(5, FINAL)
        await peer.released()

    async with leased(play, limits=Limits(max_identifier_bytes=1000)) as (_, lease):
        got = [(len(one.data), one.too_long) for one in await gather(lease)]
        assert got == [(0, True), (1000, False), (0, False)]


async def test_flood_of_matches_waits_in_the_socket() -> None:
    """A caller that takes its time holds a bounded number of responses; none is lost."""
    count = 3000
    matches = 0

    async def play(peer: RawPeer) -> None:
        await peer.expect_message()
        for number in range(count):
            await peer.send_message(5, PENDING, b"%04d" % number + bytes(200))
        await peer.send_message(5, FINAL)
        await peer.released()

    async with leased(play, limits=Limits(max_pending_messages=8)) as (_, lease):
        protocol = lease.association.protocol
        async with query(lease) as found:
            async for one in found:
                if matches == 0:
                    await until(lambda: protocol.paused)
                if one.pending:
                    assert int(one.data[:4]) == matches
                    matches += 1
    assert matches == count


async def test_exchange_abandoned_while_its_request_is_sent_is_aborted() -> None:
    """Half a request cannot be taken back: no C-CANCEL, the association goes."""

    async def play(peer: RawPeer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            await over.wait()

    over = asyncio.Event()
    async with leased(play, times=Timers(artim=SHORT)) as (pool, lease):
        protocol = lease.association.protocol
        await cancel_when(lambda: not protocol.writable, gather(lease, data=bytes(12_000_000)))
        assert (pool.in_use, pool.idle) == (0, 0)
        await lease.association.wait_closed()
        over.set()
