"""Messages in, messages out, release: each wait against abort, loss, stall and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, cancel, request, response
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationError,
    AssociationLost,
    AssociationReleased,
    AssociationTimeout,
)
from dicomproxy.dimse.layer import Limits, Timers
from dicomproxy.dimse.pdu import (
    RELEASE_RP_BYTES,
    RELEASE_RQ_BYTES,
    Abort,
    PduType,
    ReleaseRequest,
    ReleaseResponse,
)
from tests.dimse_edge.harness import (
    AMPLE,
    PROPOSAL,
    SHORT,
    CheckingSink,
    Pattern,
    Service,
    cancel_when,
    layer_left_clean,
    listening,
    patient,
    target,
    until,
)
from tests.dimse_edge.raw_peer import (
    CT,
    STUDY_ROOT_FIND,
    VERIFICATION,
    RawPeer,
    p_data,
    pdv,
    raw_acceptor,
    raw_requestor,
)

ECHO = request(CommandField.C_ECHO_RQ, VERIFICATION, 1, data_set=False)
STORE = request(
    CommandField.C_STORE_RQ, CT, 7, data_set=True, affected_sop_instance_uid="1.2.3", priority=0
)
FIND = request(CommandField.C_FIND_RQ, STUDY_ROOT_FIND, 5, data_set=True, priority=0)
LARGE = 12_000_000  # more than the kernel keeps for both ends of a loopback connection


Ending = Callable[[RawPeer, asyncio.Event], Awaitable[None]]
"""A script that plays once the event is set, be it only to go away."""


class Stage:
    """An association of ours with a scripted peer, and a gate that the script may wait for."""

    def __init__(self, association: Association, gate: asyncio.Event) -> None:
        self.association = association
        self.gate = gate


@asynccontextmanager
async def staged(
    script: Ending,
    *,
    times: Timers | None = None,
    limits: Limits | None = None,
    max_length: int = 16384,
) -> AsyncIterator[Stage]:
    """Yield an established association whose peer plays *script*; all is clean afterwards."""
    gate = asyncio.Event()

    async def play(peer: RawPeer) -> None:
        await peer.accept(max_length=max_length)
        await script(peer, gate)

    async with layer_left_clean(times, limits) as layer, raw_acceptor(play) as port:
        stage = Stage(await layer.request(target(port), PROPOSAL), gate)
        try:
            yield stage
        finally:
            gate.set()
            stage.association.abort()


async def passed(gate: asyncio.Event) -> None:
    async with asyncio.timeout(60):
        await gate.wait()


async def aborts(peer: RawPeer, gate: asyncio.Event) -> None:
    await passed(gate)
    await peer.send(Abort(2, 5))
    await peer.reader.read()


async def closes(_peer: RawPeer, gate: asyncio.Event) -> None:
    await passed(gate)


async def resets(peer: RawPeer, gate: asyncio.Event) -> None:
    await passed(gate)
    peer.reset()


async def releases(peer: RawPeer, gate: asyncio.Event) -> None:
    await passed(gate)
    await peer.send(ReleaseRequest())
    while (await peer.receive_pdu())[0] != PduType.RELEASE_RP:
        pass


async def is_silent(peer: RawPeer, gate: asyncio.Event) -> None:
    """Never read, never write, until the test is over."""
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await passed(gate)


async def reads_until_the_end(peer: RawPeer, _gate: asyncio.Event) -> None:
    async with asyncio.timeout(60):
        await peer.reader.read()


ENDINGS = [
    pytest.param(aborts, AssociationAborted, id="abort"),
    pytest.param(closes, AssociationLost, id="close"),
    pytest.param(resets, AssociationLost, id="reset"),
    pytest.param(releases, AssociationReleased, id="release"),
]


# ------------------------------------------------------------------- receiving


@pytest.mark.parametrize(("script", "error"), ENDINGS)
async def test_receive_ends_as_the_association_does(
    script: Ending, error: type[AssociationError]
) -> None:
    """Who waits for a message hears how it ended, and so does who asks later."""
    async with staged(script) as stage, asyncio.TaskGroup() as group:
        waiting = group.create_task(fails(stage.association.receive(60.0)))
        await asyncio.sleep(0)
        stage.gate.set()
        assert type(await waiting) is error
        with pytest.raises(error):
            await stage.association.receive(None)
        with pytest.raises(error):
            await stage.association.send(stage.association.context_for(VERIFICATION), ECHO)
        assert not stage.association.established


async def fails(awaitable: Awaitable[object]) -> AssociationError:
    with pytest.raises(AssociationError) as caught:
        await awaitable
    return caught.value


async def test_silence_is_a_timeout_and_the_association_stands() -> None:
    """A deadline that passes says so; what comes afterwards is still received."""

    async def answers_late(peer: RawPeer, gate: asyncio.Event) -> None:
        await passed(gate)
        await peer.send_message(1, response(ECHO, 0))
        await peer.released()

    async with staged(answers_late) as stage:
        with pytest.raises(AssociationTimeout):
            await stage.association.receive(SHORT)
        assert stage.association.established
        stage.gate.set()
        assert (await stage.association.receive(60.0)).command.responds_to == 1
        await stage.association.release(60.0)


@pytest.mark.parametrize("ended_before", [False, True], ids=["open", "ended by the peer"])
async def test_abort_discards_what_was_not_received(ended_before: bool) -> None:
    """A message that nobody has taken yet has its sink told, or what that holds would stay."""

    async def stores(peer: RawPeer, gate: asyncio.Event) -> None:
        await passed(gate)
        await peer.send_message(3, STORE, b"data")
        if ended_before:
            await peer.send(Abort(2, 5))
        else:
            assert (await peer.receive_pdu())[0] == PduType.ABORT

    sink = CheckingSink()
    async with staged(stores) as stage:
        association = stage.association
        association.sink_for = lambda *_: sink
        stage.gate.set()
        await until(lambda: association.messages_received == 1)
        await until(lambda: association.established is not ended_before)
        assert not sink.discarded
        association.abort()
        assert sink.discarded
        with pytest.raises(AssociationAborted):
            await association.receive(60.0)


async def test_receive_cancelled_loses_no_message() -> None:
    """Giving up waiting leaves the association as it was."""

    async def answers_late(peer: RawPeer, gate: asyncio.Event) -> None:
        await passed(gate)
        await peer.send_message(1, response(ECHO, 0))
        await peer.released()

    async with staged(answers_late) as stage:
        started = asyncio.Event()

        async def waits() -> None:
            started.set()
            await stage.association.receive(60.0)

        await cancel_when(started, waits())
        stage.gate.set()
        assert (await stage.association.receive(60.0)).command.responds_to == 1
        await stage.association.release(60.0)


async def test_deadline_is_put_off_while_a_message_arrives() -> None:
    """A large response on a slow line is no silence, nothing at all is."""
    data = Pattern.bytes_at(0, 80)

    async def trickles(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.send(p_data(pdv(5, 3, response(FIND, 0xFF00, data_set=True).encode())))
        for at in range(0, 80, 10):
            await asyncio.sleep(AMPLE / 6)  # the pace of the line is what is tested
            await peer.send(p_data(pdv(5, 2 if at == 70 else 0, data[at : at + 10])))
        await peer.released()

    async with staged(trickles) as stage:
        message = await stage.association.receive(AMPLE)
        assert (message.command.status, message.data) == (0xFF00, data)
        await stage.association.release(60.0)


async def test_messages_that_came_before_the_end_are_received_before_it() -> None:
    """An abort behind two responses does not eat them."""

    async def answers_and_aborts(peer: RawPeer, gate: asyncio.Event) -> None:
        await passed(gate)
        await peer.send_message(1, response(ECHO, 0))
        await peer.send_message(1, response(ECHO, 0x0122))
        await peer.send(Abort(0, 0))
        await peer.reader.read()

    async with staged(answers_and_aborts) as stage:
        stage.gate.set()
        await until(lambda: stage.association.ended is not None)
        statuses = [(await stage.association.receive(60.0)).command.status for _ in range(2)]
        assert statuses == [0, 0x0122]
        with pytest.raises(AssociationAborted):
            await stage.association.receive(60.0)


# --------------------------------------------------------------------- sending


@pytest.mark.parametrize("max_length", [0, 16, 17, 100, 4095, 16384, 262144, 10**7])
@pytest.mark.parametrize("size", [0, 1, 10, 3001, 600_001])
async def test_peers_maximum_length_is_obeyed(max_length: int, size: int) -> None:
    """No PDU is longer than the peer can take, whatever the size, and every byte arrives.

    Fragments are even but for the last (PS3.7 Annex F), 0 means no limit (PS3.8 D.1).
    """
    if max_length in (16, 17) and size > 3001:
        size = 30_001  # enough for many PDUs, and not a second of them

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        for context_id, expected in ((3, STORE), (5, FIND)):
            got = await peer.expect_message()
            assert got == (context_id, expected, Pattern.bytes_at(0, size))
            if max_length:
                assert max(peer.pdu_lengths) <= max_length
            odd = [length for length in peer.fragment_lengths if length % 2]
            assert len(odd) == size % 2
            peer.fragment_lengths.clear()
        await peer.released()

    async with staged(takes, max_length=max_length) as stage:
        association = stage.association
        await association.send(association.context_for(CT), STORE, Pattern(size))
        await association.send(
            association.context_for(STUDY_ROOT_FIND), FIND, Pattern.bytes_at(0, size)
        )
        assert association.messages_sent == 2
        await association.release(60.0)


@pytest.mark.parametrize("streamed", [True, False])
async def test_peer_that_never_reads_is_dropped_after_the_stall_deadline(streamed: bool) -> None:
    """Sending to a peer that takes nothing ends in a timeout, and its memory comes back."""
    async with staged(is_silent, times=patient(stall=SHORT), max_length=0) as stage:
        association = stage.association
        data = Pattern(LARGE) if streamed else Pattern.bytes_at(0, LARGE)
        with pytest.raises(AssociationTimeout) as caught:
            await association.send(association.context_for(CT), STORE, data)
        assert caught.value.phase == "sending"
        await association.wait_closed()  # though the peer still holds its end open


@pytest.mark.parametrize(("script", "error"), ENDINGS[:3])
@pytest.mark.parametrize("streamed", [True, False])
async def test_sending_ends_as_the_association_does(
    script: Ending, error: type[AssociationError], streamed: bool
) -> None:
    """A peer that goes away while it takes nothing wakes the sender."""

    async def not_reading(peer: RawPeer, gate: asyncio.Event) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await passed(gate)
        if script is aborts:
            await peer.send(Abort(2, 5))
            await passed(over)  # keeps its end open, full as it is
        else:
            await script(peer, gate)

    over = asyncio.Event()
    async with staged(not_reading, max_length=0) as stage, asyncio.TaskGroup() as group:
        association = stage.association
        data = Pattern(LARGE) if streamed else Pattern.bytes_at(0, LARGE)
        sending = group.create_task(
            fails(association.send(association.context_for(CT), STORE, data))
        )
        await until(lambda: not association.protocol.writable)
        stage.gate.set()
        caught = await sending
        await association.wait_closed()
        over.set()
        # With unread data in its buffers, a closing peer's kernel sends RST.
        assert type(caught) in (error, AssociationLost)
        assert association.messages_sent == 0


@pytest.mark.parametrize("streamed", [True, False])
async def test_send_cancelled_half_way_aborts(streamed: bool) -> None:
    """A message cannot be taken back: the association goes with it, and the block comes back."""
    async with staged(is_silent, times=patient(artim=SHORT), max_length=0) as stage:
        association = stage.association
        data = Pattern(LARGE) if streamed else Pattern.bytes_at(0, LARGE)
        await cancel_when(
            lambda: not association.protocol.writable,
            association.send(association.context_for(CT), STORE, data),
        )
        assert isinstance(association.ended, AssociationAborted)
        await association.wait_closed()


async def test_send_cancelled_while_its_data_is_read_aborts() -> None:
    """The source is slow, the sender gives up: the peer sees A-ABORT behind whole PDUs."""
    data = Pattern(LARGE, hold=asyncio.Event(), at=400_000)

    async def counts(peer: RawPeer, _gate: asyncio.Event) -> None:
        while (received := await peer.receive_pdu())[0] == PduType.P_DATA_TF:
            pass
        assert received[0] == PduType.ABORT

    async with staged(counts, max_length=0) as stage:
        association = stage.association
        await cancel_when(data.reading, association.send(association.context_for(CT), STORE, data))
        assert isinstance(association.ended, AssociationAborted)


class Short:
    """A source that has less than it said."""

    size = 500_000

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        return min(sum(map(len, buffers)), 300_000 - offset)


class Unreadable:
    size = 10

    async def read_into(self, _buffers: Sequence[memoryview], _offset: int) -> int:
        raise OSError(5, "input/output error")


@pytest.mark.parametrize("source", [Short(), Unreadable()])
async def test_source_that_breaks_off_aborts(source: Short | Unreadable) -> None:
    """Half a data set is never passed off as a whole one."""

    async def sees_abort(peer: RawPeer, _gate: asyncio.Event) -> None:
        while (received := await peer.receive_pdu())[0] == PduType.P_DATA_TF:
            pass
        assert received[0] == PduType.ABORT

    async with staged(sees_abort) as stage:
        association = stage.association
        with pytest.raises(OSError, match=r"broke off|input/output"):
            await association.send(association.context_for(CT), STORE, source)
        assert isinstance(association.ended, AssociationAborted)


async def test_sending_waits_for_memory_up_to_the_stall_deadline() -> None:
    """With every block for sending lent out, the sender waits, then aborts; no command is sent."""

    async def sees_abort(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.expect_abort()

    async with staged(
        sees_abort, times=patient(stall=SHORT), limits=Limits(send_memory_bytes=0)
    ) as stage:
        association = stage.association
        pool = association._send_pool
        blocks = [pool.acquire(), pool.acquire()]
        assert pool.acquire() is None
        with pytest.raises(AssociationTimeout) as caught:
            await association.send(association.context_for(CT), STORE, Pattern(10))
        assert caught.value.phase == "memory for sending"
        for block in blocks:
            assert block is not None
            pool.release(block)


async def test_peers_that_stop_reading_leave_memory_for_others() -> None:
    """However many of them hold what they were being sent from, the next one gets its data set."""
    limits = Limits(send_memory_bytes=2_000_000)
    crowd = 8

    async def stops_reading(peer: RawPeer) -> None:
        await peer.accept(max_length=0)
        await passed(over)

    async def takes(peer: RawPeer) -> None:
        await peer.accept(max_length=0)
        assert await peer.expect_message() == (3, STORE, Pattern.bytes_at(0, 700_001))
        await peer.released()

    over = asyncio.Event()
    async with (
        layer_left_clean(patient(stall=60.0), limits) as layer,
        AsyncExitStack() as peers,
        asyncio.TaskGroup() as group,
    ):
        ports = [await peers.enter_async_context(raw_acceptor(stops_reading)) for _ in range(crowd)]
        port = await peers.enter_async_context(raw_acceptor(takes))
        stalled = [await layer.request(target(one), PROPOSAL) for one in ports]
        sending = [
            group.create_task(lost(one.send(one.context_for(CT), STORE, Pattern(LARGE))))
            for one in stalled
        ]
        await until(lambda: layer.send_pool.lent == crowd)
        await until(lambda: not any(one.protocol.writable for one in stalled))
        association = await layer.request(target(port), PROPOSAL)
        async with asyncio.timeout(60):
            await association.send(association.context_for(CT), STORE, Pattern(700_001))
        await association.release(60.0)
        assert not any(task.done() for task in sending)
        for one in stalled:
            one.abort()
            one.protocol.close_now()
        over.set()


async def test_large_data_set_lets_others_have_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither reading nor writing ever waits, the loop still serves everybody else."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def waits(_peer: RawPeer, gate: asyncio.Event) -> None:
        await passed(gate)

    async with staged(waits, max_length=0) as stage, asyncio.TaskGroup() as group:
        association = stage.association
        monkeypatch.setattr(association.protocol, "write", lambda _data: None)
        other = group.create_task(others())
        await until(lambda: turns > 0)
        before = turns
        await association.send(association.context_for(CT), STORE, Pattern(40_000_000))
        assert turns - before >= 15
        other.cancel()


async def lost(sending: Awaitable[None]) -> None:
    with pytest.raises(AssociationError):
        await sending


async def test_command_longer_than_its_place_in_a_block_goes_ahead() -> None:
    """However long a command is, it arrives before its data set, both of them whole."""
    command = request(
        CommandField.C_STORE_RQ, CT, 1, data_set=True, affected_sop_instance_uid="1." + "2" * 3000
    )

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        assert await peer.expect_message() == (3, command, Pattern.bytes_at(0, 700_001))
        await peer.released()

    async with staged(takes) as stage:
        association = stage.association
        await association.send(association.context_for(CT), command, Pattern(700_001))
        await association.release(60)


async def test_sender_waiting_for_memory_goes_on_when_it_comes() -> None:
    """One block less in use elsewhere is enough; a cancelled waiter takes none."""

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        assert await peer.expect_message() == (3, STORE, Pattern.bytes_at(0, 100_000))
        await peer.released()

    async with staged(takes, limits=Limits(send_memory_bytes=0)) as stage:
        association = stage.association
        pool = association._send_pool
        blocks = [pool.acquire(), pool.acquire()]
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(
                association.send(association.context_for(CT), STORE, Pattern(100_000))
            )
            await until(lambda: bool(pool._waiters))
            for block in blocks:
                assert block is not None
                pool.release(block)
            await sending
        await association.release(60.0)


async def test_messages_sent_at_once_do_not_mix() -> None:
    """Several tasks send in one association: each message arrives whole, in some order."""

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        got = {(await peer.expect_message())[2] for _ in range(4)}
        assert got == {Pattern.bytes_at(0, size) for size in (5, 300_000, 70_000, 0)}
        await peer.released()

    async with staged(takes) as stage:
        association = stage.association
        context = association.context_for(CT)
        async with asyncio.TaskGroup() as group:
            for size in (5, 300_000, 70_000, 0):
                group.create_task(association.send(context, STORE, Pattern(size)))
        await association.release(60.0)


async def test_send_cancelled_before_its_turn_harms_nobody() -> None:
    """Who only waited for another message to be sent may give up; that message goes on."""
    hold = asyncio.Event()
    data = Pattern(500_000, hold=hold)

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        assert (await peer.expect_message())[2] == Pattern.bytes_at(0, 500_000)
        await peer.released()

    async with staged(takes) as stage, asyncio.TaskGroup() as group:
        association = stage.association
        sending = group.create_task(association.send(association.context_for(CT), STORE, data))
        await until(data.reading.is_set)
        started = asyncio.Event()

        async def second() -> None:
            started.set()
            await association.send(association.context_for(VERIFICATION), ECHO)

        await cancel_when(started, second())
        hold.set()
        await sending
        await association.release(60.0)


async def test_cancel_request_is_received_while_a_message_is_being_sent() -> None:
    """C-CANCEL comes in the midst of our large message; it is read before that has gone out."""
    hold = asyncio.Event()
    data = Pattern(3_000_000, hold=hold, at=300_000)
    cancelled: list[int] = []

    async def handle(association: Association, message: Message) -> None:
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(
                association.send(
                    message.context, response(message.command, 0xFF00, data_set=True), data
                )
            )
            cancel_request = await association.receive(60.0)
            cancelled.append(cancel_request.command.responds_to)
            assert not sending.done()
            hold.set()
        await association.send(message.context, response(message.command, 0xFE00))

    async with (
        layer_left_clean() as layer,
        listening(layer, Service(handle)) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish(STUDY_ROOT_FIND)
        await peer.send_message(1, FIND, b"")
        await until(data.reading.is_set)
        await peer.send_message(1, cancel(5))
        _, pending, identifier = await peer.expect_message()
        assert (pending.status, identifier) == (0xFF00, Pattern.bytes_at(0, 3_000_000))
        assert (await peer.expect_message())[1].status == 0xFE00
        assert cancelled == [5]
        await peer.release()


async def test_send_now_sends_only_between_messages() -> None:
    """A message that must not wait goes at once or not at all."""
    hold = asyncio.Event()
    data = Pattern(100, hold=hold)

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        assert (await peer.expect_message())[2] == Pattern.bytes_at(0, 100)
        assert (await peer.expect_message())[1] == cancel(7)
        await peer.released()

    async with staged(takes) as stage, asyncio.TaskGroup() as group:
        association = stage.association
        context = association.context_for(CT)
        sending = group.create_task(association.send(context, STORE, data))
        await until(data.reading.is_set)
        assert association.send_now(context, cancel(7)) is False
        hold.set()
        await sending
        assert association.send_now(context, cancel(7)) is True
        await association.release(60.0)
        assert association.send_now(context, cancel(7)) is False


async def test_messages_sent_in_one_go_arrive_whole_and_in_order() -> None:
    """One write for all of them; a command given twice, and one between, are each their own."""
    writes: list[int] = []

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        got = [(await peer.expect_message())[1:] for _ in range(4)]
        assert got == [(STORE, b"1" * 10), (STORE, b"2" * 9), (cancel(7), b""), (STORE, b"3" * 8)]
        await peer.released()

    async with staged(takes) as stage:
        association = stage.association
        write = association.protocol.write
        association.protocol.write = lambda data: (writes.append(len(data)), write(data))[1]  # type: ignore[method-assign]
        await association.send_all(
            association.context_for(CT),
            [(STORE, b"1" * 10), (STORE, b"2" * 9), (cancel(7), None), (STORE, b"3" * 8)],
        )
        assert (len(writes), association.messages_sent) == (1, 4)
        await association.release(60.0)


async def test_message_ids_go_round() -> None:
    """A Message ID is never 0 and never more than an US holds."""

    async def ends(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.released()

    async with staged(ends) as stage:
        ids = [stage.association.next_message_id() for _ in range(0x10001)]
        assert (ids[0], ids[0xFFFE], ids[0xFFFF]) == (1, 0xFFFF, 1)
        await stage.association.release(60.0)


# -------------------------------------------------------------------- releasing


async def test_release_in_order() -> None:
    """A-RELEASE-RQ, A-RELEASE-RP, closed; a second release does nothing."""

    async def ends(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.released()

    async with staged(ends) as stage:
        await stage.association.release(60.0)
        assert isinstance(stage.association.ended, AssociationReleased)
        await stage.association.release(60.0)


async def test_release_that_is_not_answered_becomes_an_abort() -> None:
    """A peer deaf to A-RELEASE-RQ gets A-ABORT when the deadline has passed."""

    async def deaf(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        assert await peer.expect_abort() == Abort(0, 0)

    async with staged(deaf) as stage:
        await stage.association.release(SHORT)
        assert isinstance(stage.association.ended, AssociationAborted)


@pytest.mark.parametrize(
    ("script", "error"), [(aborts, AssociationAborted), (closes, AssociationLost)]
)
async def test_release_answered_by_abort_or_loss_is_over_too(
    script: Ending, error: type[AssociationError]
) -> None:
    """Release never raises: that the association ends is all it promises."""

    async def other(peer: RawPeer, gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        gate.set()
        await script(peer, gate)

    async with staged(other) as stage:
        await stage.association.release(60.0)
        assert type(stage.association.ended) is error


async def test_release_cancelled_aborts() -> None:
    """Nobody waits for the answer any more, so the connection does not either."""
    asked = asyncio.Event()

    async def deaf(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        asked.set()
        assert await peer.expect_abort() == Abort(0, 0)

    async with staged(deaf) as stage:
        await cancel_when(asked, stage.association.release(60.0))
        await stage.association.wait_closed()


async def test_data_that_crosses_our_release_is_still_received() -> None:
    """The peer had sent a message before it saw our A-RELEASE-RQ (PS3.8 AR-6)."""

    async def crosses(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        await peer.send_message(1, response(ECHO, 0))
        await peer.send(ReleaseResponse())
        await peer.expect_end()

    async with staged(crosses) as stage:
        await stage.association.release(60.0)
        assert (await stage.association.receive(60.0)).command.responds_to == 1
        with pytest.raises(AssociationReleased):
            await stage.association.receive(60.0)


async def test_nothing_is_sent_once_release_was_asked_for() -> None:
    """After A-RELEASE-RQ no P-DATA may follow; who tries is told."""

    async def slow(peer: RawPeer, gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        await passed(gate)
        await peer.send(ReleaseResponse())
        await peer.expect_end()

    async with staged(slow) as stage, asyncio.TaskGroup() as group:
        association = stage.association
        releasing = group.create_task(association.release(60.0))
        await until(lambda: not association.established)
        with pytest.raises(AssociationReleased):
            await association.send(association.context_for(VERIFICATION), ECHO)
        stage.gate.set()
        await releasing


async def test_release_waits_for_the_message_being_sent() -> None:
    """A-RELEASE-RQ does not fall into the middle of a data set."""
    hold = asyncio.Event()
    data = Pattern(500_000, hold=hold)

    async def takes(peer: RawPeer, _gate: asyncio.Event) -> None:
        assert (await peer.expect_message())[2] == Pattern.bytes_at(0, 500_000)
        await peer.released()

    async with staged(takes) as stage, asyncio.TaskGroup() as group:
        association = stage.association
        group.create_task(association.send(association.context_for(CT), STORE, data))
        await until(data.reading.is_set)
        releasing = group.create_task(association.release(60.0))
        await asyncio.sleep(0)
        assert association.established
        hold.set()
        await releasing
        assert association.messages_sent == 1


async def test_release_collision_as_requestor() -> None:
    """Both ask at once: the requestor answers first, then gets its answer (PS3.8 9.2, AR-8/9)."""

    async def collides(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        await peer.send(RELEASE_RQ_BYTES)
        await peer.expect(ReleaseResponse)
        await peer.send(RELEASE_RP_BYTES)
        await peer.expect_end()

    async with staged(collides) as stage:
        await stage.association.release(60.0)
        assert isinstance(stage.association.ended, AssociationReleased)


async def test_release_collision_as_requestor_left_hanging_is_ended() -> None:
    """The peer asks too, is answered, and never answers us: the deadline ends it."""

    async def hangs(peer: RawPeer, _gate: asyncio.Event) -> None:
        await peer.expect(ReleaseRequest)
        await peer.send(RELEASE_RQ_BYTES)
        await peer.expect(ReleaseResponse)
        assert await peer.expect_abort() == Abort(0, 0)

    async with staged(hangs) as stage:
        await stage.association.release(SHORT)
        await stage.association.wait_closed()


@pytest.mark.parametrize("answered", [True, False])
async def test_release_collision_as_acceptor(answered: bool) -> None:
    """As acceptor we wait for the requestor's answer first (PS3.8 AR-10), or for the deadline."""
    released = asyncio.Event()

    async def release(association: Association, _message: Message) -> None:
        await association.release(60.0 if answered else SHORT)
        released.set()

    async with (
        layer_left_clean() as layer,
        listening(layer, Service(release)) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        await peer.send_message(1, ECHO)
        await peer.expect(ReleaseRequest)
        await peer.send(RELEASE_RQ_BYTES)
        if answered:
            await peer.send(RELEASE_RP_BYTES)
            await peer.expect(ReleaseResponse)
        else:
            await peer.expect(Abort)
        peer.writer.close()
        await passed(released)


async def test_abort_tells_the_peer_and_is_idempotent() -> None:
    """A-ABORT as service user (source 0), once."""

    async def sees_it(peer: RawPeer, _gate: asyncio.Event) -> None:
        assert await peer.expect(Abort) == Abort(0, 0)
        peer.writer.close()

    async with staged(sees_it) as stage:
        stage.association.abort()
        stage.association.abort()
        await stage.association.wait_closed()
        assert repr(stage.association).endswith("STA1>")


async def test_peer_that_does_not_close_after_our_abort_is_dropped_by_artim() -> None:
    """A-ABORT starts ARTIM (PS3.8 AA-1); when it expires the connection is gone."""

    async def stays(peer: RawPeer, gate: asyncio.Event) -> None:
        await peer.expect(Abort)
        await passed(gate)

    async with staged(stays, times=patient(artim=SHORT)) as stage:
        stage.association.abort()
        await stage.association.wait_closed()
