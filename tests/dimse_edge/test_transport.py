"""The socket's side: options, timers, back-pressure, and bytes cut in every way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import struct
import tracemalloc
from typing import Any

import pytest

from dicomproxy.dimse.association import Association, BytesSink, Message
from dicomproxy.dimse.command import CommandField, request, response
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationLost,
    AssociationRejected,
    AssociationReleased,
)
from dicomproxy.dimse.layer import Limits
from dicomproxy.dimse.operations import store
from dicomproxy.dimse.pdu import (
    RELEASE_RP_BYTES,
    Abort,
    AssociateAccept,
    AssociateRequest,
    ProtocolError,
    ReleaseResponse,
)
from dicomproxy.dimse.transport import _options_socket
from tests.dimse_edge.harness import (
    AMPLE,
    PROPOSAL,
    SHORT,
    CheckingSink,
    Pattern,
    Service,
    layer_left_clean,
    listening,
    patient,
    target,
    until,
)
from tests.dimse_edge.raw_peer import (
    CT,
    VERIFICATION,
    RawPeer,
    message,
    p_data,
    pdv,
    raw_acceptor,
    raw_requestor,
)
from tests.support.log_watch import LogWatch

BLOCK = 128 * 1024
ECHO = request(CommandField.C_ECHO_RQ, VERIFICATION, 1, data_set=False)
STORE = request(
    CommandField.C_STORE_RQ, CT, 7, data_set=True, affected_sop_instance_uid="1.2.3", priority=0
)
CT_CONTEXT = 3


def to_sinks(*sinks: CheckingSink) -> Any:
    """Return a ``sink_for`` that hands out *sinks* in turn."""
    left = list(sinks)
    return lambda _association, _context, _command: left.pop(0)


def option(association: Association, name: int) -> int:
    transport = association.protocol.transport
    assert transport is not None
    sock = transport.get_extra_info("socket")
    with socket.socket(fileno=sock.fileno()) as real:
        try:
            return real.getsockopt(socket.IPPROTO_TCP, name)
        finally:
            real.detach()


async def test_sockets_send_without_delay_on_both_sides() -> None:
    """TCP_NODELAY is set by requestor and acceptor, whatever event loop holds the socket."""
    async with layer_left_clean() as layer:
        service = Service()
        async with listening(layer, service) as (_, port):
            ours = await layer.request(target(port), PROPOSAL)
            theirs = await service.association()
            assert option(ours, socket.TCP_NODELAY) != 0
            assert option(theirs, socket.TCP_NODELAY) != 0
            await ours.release(60.0)


# ---------------------------------------------------------------------- timers


@pytest.mark.parametrize("sent", [b"", b"\x01\x00", bytes.fromhex("0100000000500001")])
async def test_artim_ends_a_connection_on_which_no_request_comes(
    sent: bytes, log_watch: LogWatch
) -> None:
    """Who connects and does not ask for an association is dropped (PS3.8 9.1.5)."""
    async with (
        layer_left_clean(patient(artim=SHORT)) as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.send(sent)
        await peer.expect_end()
    assert [line["level"] for line in log_watch.named("association")] == ["debug"]


async def test_artim_does_not_run_while_we_decide() -> None:
    """Our own judgement of a request may take longer than ARTIM."""
    released = asyncio.Event()

    async def ponder(_request: AssociateRequest) -> None:
        await released.wait()

    async with (
        layer_left_clean(patient(artim=AMPLE)) as layer,
        listening(layer, Service(before=ponder)) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.associate()
        loop = asyncio.get_running_loop()
        loop.call_later(1.5 * AMPLE, released.set)
        await peer.expect(AssociateAccept)
        await peer.release()


async def test_connection_that_stays_open_after_release_is_closed_by_artim() -> None:
    """The peer got its A-RELEASE-RP and does not close: we do."""
    async with (
        layer_left_clean(patient(artim=AMPLE)) as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        await peer.send(bytes.fromhex("05000000000400000000"))
        await peer.expect(ReleaseResponse)
        await peer.expect_end()


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(p_data(pdv(1, 3, ECHO.encode()))[:-5], id="inside a PDV"),
        pytest.param(b"\x04\x00\x00", id="inside a PDU header"),
        pytest.param(p_data(pdv(1, 1, ECHO.encode()[:10])), id="inside a command"),
        pytest.param(p_data(pdv(CT_CONTEXT, 3, STORE.encode())), id="before the data set"),
        pytest.param(message(CT_CONTEXT, STORE, Pattern.bytes_at(0, 100))[:-1], id="data set"),
    ],
)
async def test_message_that_does_not_go_on_is_a_stall(begun: bytes, log_watch: LogWatch) -> None:
    """Half a message holds memory; after the stall deadline the association is aborted."""
    async with layer_left_clean(patient(stall=SHORT)) as layer:
        sink = CheckingSink()
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            await peer.send(begun)
            assert isinstance(await service.end(), AssociationLost)
    assert len(log_watch.named("association_stalled")) == 1
    assert sink.faults == 0


async def test_association_between_messages_does_not_stall() -> None:
    """Idle is not stalled: what comes after a long pause is served."""
    async with (
        layer_left_clean(patient(stall=SHORT)) as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        woken = asyncio.Event()
        asyncio.get_running_loop().call_later(3 * SHORT, woken.set)
        await woken.wait()
        await peer.send_message(1, ECHO)
        assert (await peer.expect_message())[1].status == 0
        assert layer.receive_pool.lent == 0  # an idle association holds nothing
        await peer.release()


async def test_trickle_is_no_stall() -> None:
    """A slow line that keeps sending is waited for, however long the whole takes."""
    async with layer_left_clean(patient(stall=AMPLE)) as layer:
        sink = CheckingSink()
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            whole = message(CT_CONTEXT, STORE, Pattern.bytes_at(0, 10))
            step = len(whole) // 8 + 1
            for at in range(0, len(whole), step):
                await peer.send(whole[at : at + step])
                await asyncio.sleep(AMPLE / 6)  # the pace of the line is what is tested
            assert (await peer.expect_message())[1].status == 0
            assert (sink.received, sink.faults) == (10, 0)
            await peer.release()


# -------------------------------------------------------------------- protocol


@pytest.mark.parametrize(
    ("garbage", "source", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 2, 1, id="http"),
        pytest.param(bytes.fromhex("08 00 00 00 00 04 00 00 00 00"), 2, 1, id="unknown PDU"),
        pytest.param(bytes.fromhex("05 00 00 00 08 00"), 2, 6, id="release too long"),
        pytest.param(bytes.fromhex("04 00 7F FF FF FF"), 2, 6, id="P-DATA over our maximum"),
        pytest.param(bytes.fromhex("04 00 00 00 00 02 00 00"), 2, 6, id="P-DATA without PDV"),
        pytest.param(p_data(struct.pack(">LBB", 99, 1, 3) + b"ab"), 2, 6, id="PDV too long"),
        pytest.param(p_data(struct.pack(">LBB", 1, 1, 3)), 2, 6, id="PDV too short"),
        pytest.param(p_data(pdv(1, 2, b"ab")), 2, 2, id="data set without command"),
        pytest.param(
            p_data(pdv(CT_CONTEXT, 3, STORE.encode()), pdv(1, 2, b"ab")), 2, 6, id="other context"
        ),
        pytest.param(
            message(CT_CONTEXT, STORE) + message(1, ECHO), 2, 2, id="command inside a data set"
        ),
        pytest.param(
            p_data(pdv(1, 1, ECHO.encode()[:8]), pdv(3, 3, ECHO.encode()[8:])),
            2,
            6,
            id="command in two contexts",
        ),
        pytest.param(message(99, ECHO), 2, 6, id="context never accepted"),
        pytest.param(p_data(pdv(1, 3, b"\x08\x00\x18\x00")), 2, 6, id="no command set"),
        pytest.param(RELEASE_RP_BYTES, 2, 2, id="release response"),
        pytest.param(p_data(pdv(1, 1, bytes(40000))) * 2, 2, 6, id="endless command"),
    ],
)
async def test_protocol_error_is_answered_by_abort_and_logged(
    garbage: bytes, source: int, reason: int, log_watch: LogWatch
) -> None:
    """Whatever a peer sends in an association ends that one association, in the right words."""
    async with layer_left_clean() as layer:
        sink = CheckingSink()
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            await peer.send(garbage)
            assert await peer.expect_abort() == Abort(source, reason)
            assert isinstance(await service.end(), AssociationAborted)
    (line,) = log_watch.named("protocol_error")
    assert line["peer_address"] == "127.0.0.1"
    assert log_watch.named("association_crashed") == []
    assert log_watch.named("unhandled_error") == []


async def test_first_pdu_that_is_no_request_is_answered_by_abort(log_watch: LogWatch) -> None:
    """A-ABORT comes from the service user then (PS3.8 AA-1), and the line is closed."""
    async with (
        layer_left_clean() as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.send(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert await peer.expect_abort() == Abort(0, 0)
    assert len(log_watch.named("protocol_error")) == 1


async def test_garbage_without_end_is_dropped_after_artim() -> None:
    """A peer that goes on and on after A-ABORT costs no memory and one ARTIM period."""
    async with (
        layer_left_clean(patient(artim=AMPLE)) as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        with pytest.raises(ConnectionError):
            while True:
                await peer.send(b"\xff" * 65536)
        assert layer.receive_pool.lent <= 1


async def test_protocol_error_found_after_the_association_ended_is_no_crash() -> None:
    """The peer sends what it should not and aborts at once: both are seen, neither raises."""
    async with layer_left_clean() as layer:
        got = asyncio.Event()

        async def late(association: Association, _message: Message) -> None:
            await until(lambda: association.ended is not None)
            association.protocol.protocol_error(ProtocolError("found late"))
            got.set()

        async with listening(layer, Service(late)) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            await peer.send(message(1, ECHO), Abort(0, 0))
            async with asyncio.timeout(60):
                await got.wait()


@pytest.mark.parametrize("part", [3, 40, 100, 300])
async def test_connection_lost_at_any_byte_ends_the_association(part: int) -> None:
    """Closed inside a PDU: the service hears it once, and the sink that nothing more comes."""
    async with layer_left_clean() as layer:
        sink = CheckingSink()
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            whole = message(CT_CONTEXT, STORE, Pattern.bytes_at(0, 500))
            await peer.send(whole[:part])
            peer.writer.close()
            assert isinstance(await service.end(), AssociationLost)
            assert sink.discarded is (part > len(message(CT_CONTEXT, STORE)))


# ----------------------------------------------------------------- how bytes fall


def cut_pdus(context_id: int, command: bytes, data: bytes, size: int) -> bytes:
    """Return a message in PDUs of one PDV with at most *size* bytes each."""
    parts = []
    for control, body in ((1, command), (0, data)):
        for at in range(0, len(body), size):
            last = 2 if at + size >= len(body) else 0
            parts.append(p_data(pdv(context_id, control | last, body[at : at + size])))
    return b"".join(parts)


def one_pdu(context_id: int, command: bytes, data: bytes, size: int) -> bytes:
    """Return a message in one PDU of many PDVs, command and data set together."""
    pdvs = []
    for control, body in ((1, command), (0, data)):
        for at in range(0, len(body), size):
            last = 2 if at + size >= len(body) else 0
            pdvs.append(pdv(context_id, control | last, body[at : at + size]))
    return p_data(*pdvs)


def with_empty_ends(context_id: int, command: bytes, data: bytes, _size: int) -> bytes:
    """Return a message whose last fragments are empty."""
    return p_data(
        pdv(context_id, 1, command),
        pdv(context_id, 3, b""),
        pdv(context_id, 0, data),
        pdv(context_id, 2, b""),
    )


@pytest.mark.parametrize("read_size", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("shape", "size"),
    [(cut_pdus, 1), (cut_pdus, 61), (one_pdu, 1), (one_pdu, 97), (with_empty_ends, 0)],
)
async def test_message_is_the_same_however_it_is_cut(shape: Any, size: int, read_size: int) -> None:
    """PDUs of one byte, several PDVs in a PDU, and any split of the stream give one message."""
    async with layer_left_clean() as layer:
        sinks = CheckingSink(), CheckingSink()
        service = Service(sink_for=to_sinks(*sinks))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            data = Pattern.bytes_at(0, 301)
            whole = shape(CT_CONTEXT, STORE.encode(), data, size) * 2
            for at in range(0, len(whole), read_size):
                peer.writer.write(whole[at : at + read_size])
                if read_size == 1:
                    await asyncio.sleep(0)
            for sink in sinks:
                context_id, command, _ = await peer.expect_message()
                assert (context_id, command.responds_to, command.status) == (CT_CONTEXT, 7, 0)
                assert (sink.received, sink.faults, sink.discarded) == (301, 0, False)
            await peer.release()


async def test_empty_data_set_is_a_data_set() -> None:
    """An empty last fragment completes a message whose sink got nothing."""
    async with layer_left_clean() as layer:
        sink = CheckingSink()
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            await peer.send(message(CT_CONTEXT, STORE, b""))
            assert (await peer.expect_message())[1].status == 0
            assert (sink.received, sink.discarded) == (0, False)
            await peer.release()


# ------------------------------------------------------------- memory in bounds


async def test_slow_sink_pauses_reading_and_goes_on() -> None:
    """A sink that keeps its blocks stops the socket at the pool's limit, not at memory's end."""
    blocks = 4
    size = 4 * 1024 * 1024
    limits = Limits(receive_memory_bytes=blocks * BLOCK)
    async with layer_left_clean(limits=limits) as layer:
        sink = CheckingSink(hold=True)
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            theirs = await service.association()
            writing = asyncio.create_task(
                peer.send(p_data(pdv(CT_CONTEXT, 3, STORE.encode())), paced(size))
            )
            await until(lambda: theirs.protocol.paused)
            assert layer.receive_pool.lent == blocks
            assert sink.received <= blocks * BLOCK
            received = sink.received
            for _ in range(50):
                await asyncio.sleep(0)
            assert (sink.received, theirs.protocol.paused) == (received, True)
            sink.let_go()
            assert (await peer.expect_message())[1].status == 0
            await writing
            assert (sink.received, sink.faults) == (size, 0)
            assert not theirs.protocol.paused
            await peer.release()


def paced(size: int) -> bytes:
    """Return a data set of the pattern in full PDUs."""
    chunk = 64 * 1024
    return b"".join(
        p_data(
            pdv(
                CT_CONTEXT,
                2 if at + chunk >= size else 0,
                Pattern.bytes_at(at, min(chunk, size - at)),
            )
        )
        for at in range(0, size, chunk)
    )


async def test_lent_bytes_are_not_touched_until_given_back() -> None:
    """What a slow sink still holds is not overwritten by the messages that follow."""
    async with layer_left_clean() as layer:
        sinks = [CheckingSink(hold=True) for _ in range(200)]
        service = Service(sink_for=to_sinks(*sinks))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            for number in range(len(sinks)):
                if number % 2:  # in the same read as the one before, or in another
                    await peer.expect_message()
                await peer.send_message(CT_CONTEXT, STORE, Pattern.bytes_at(0, 1000 + 7 * number))
            for _ in range(len(sinks) // 2):
                assert (await peer.expect_message())[1].status == 0
            assert layer.receive_pool.lent >= 2
            for number, sink in enumerate(sinks):
                sink.let_go()
                assert (sink.received, sink.faults) == (1000 + 7 * number, 0)
            await peer.release()


async def test_slow_sink_of_one_association_is_no_limit_to_small_messages_of_another() -> None:
    """With every block lent, what is small is still read; what is large waits for a block."""
    limits = Limits(receive_memory_bytes=4 * BLOCK)
    async with layer_left_clean(limits=limits) as layer:
        slow, large = CheckingSink(hold=True), CheckingSink(hold=True)
        service = Service(sink_for=to_sinks(slow, large))
        async with (
            listening(layer, service) as (_, port),
            raw_requestor(port) as first,
            raw_requestor(port) as second,
            raw_requestor(port) as third,
        ):
            await first.establish()
            hog = await service.association()
            writing = asyncio.create_task(
                first.send(p_data(pdv(CT_CONTEXT, 3, STORE.encode())), paced(2_000_000))
            )
            await until(lambda: hog.protocol.paused)

            await second.establish()
            await second.send_message(1, ECHO)
            assert (await second.expect_message())[1].status == 0

            await third.establish()
            await service.association()
            waits = await service.association()
            more = asyncio.create_task(
                third.send(p_data(pdv(CT_CONTEXT, 3, STORE.encode())), paced(2_000_000))
            )
            await until(lambda: waits.protocol.paused)
            assert large.received <= 4096
            assert layer.receive_pool.lent == 4

            slow.let_go()
            large.let_go()
            for peer, task in ((first, writing), (third, more)):
                assert (await peer.expect_message())[1].status == 0
                await task
            assert (slow.received, slow.faults) == (2_000_000, 0)
            assert (large.received, large.faults) == (2_000_000, 0)
            for peer in (first, second, third):
                await peer.release()


async def test_association_lost_while_it_waits_for_a_block_is_forgotten() -> None:
    """A peer that dies while it is paused takes no block and keeps none from others."""
    limits = Limits(receive_memory_bytes=4 * BLOCK)
    async with layer_left_clean(patient(stall=AMPLE), limits) as layer:
        sink = CheckingSink(hold=True)
        service = Service(sink_for=to_sinks(sink))
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            theirs = await service.association()
            writing = asyncio.create_task(
                peer.send(p_data(pdv(CT_CONTEXT, 3, STORE.encode())), paced(2_000_000))
            )
            await until(lambda: theirs.protocol.paused)
            peer.reset()
            with contextlib.suppress(ConnectionError):
                await writing
            # A reset is not noticed while paused: the stall deadline ends it.
            assert isinstance(await service.end(), AssociationLost)
            assert sink.discarded
            sink.let_go()
            await until(lambda: layer.receive_pool.lent == 0)


async def test_200_megabytes_pass_through_a_few_blocks() -> None:
    """A large data set is sent and received whole, in a handful of blocks on either side."""
    size = 200_000_000
    async with layer_left_clean() as layer:
        sink = CountingSink()
        service = Service(sink_for=lambda *_: sink)
        async with listening(layer, service) as (_, port):
            association = await layer.request(target(port), PROPOSAL)
            gc.collect()
            tracemalloc.start()
            try:
                answer = await store(
                    association, association.context_for(CT), STORE, Zeros(size), 60.0
                )
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert answer.status == 0
            assert sink.received == size
            assert peak < 4_000_000
            assert repr(layer.receive_pool).startswith(("BlockPool(made=1/", "BlockPool(made=2/"))
            assert repr(layer.send_pool).startswith("BlockPool(made=1/")
            await association.release(60.0)


class CountingSink:
    def __init__(self) -> None:
        self.received = 0

    def write(self, segments: Any, release: Any) -> None:
        self.received += sum(map(len, segments))
        release()

    def discard(self) -> None:
        raise AssertionError("the data set broke off")


class Zeros:
    def __init__(self, size: int) -> None:
        self.size = size

    async def read_into(self, buffers: Any, _offset: int) -> int:
        return sum(map(len, buffers))


async def test_identifier_over_its_limit_is_marked_and_dropped() -> None:
    """A collected data set stops growing at the limit; the message says that it was too long."""
    sizes: list[tuple[int, bool]] = []

    async def note(association: Association, message: Message) -> None:
        assert isinstance(message.sink, BytesSink)
        sizes.append((len(message.data), message.too_long))
        await association.send(message.context, response(message.command, 0))

    async with (
        layer_left_clean(limits=Limits(max_identifier_bytes=1000)) as layer,
        listening(layer, Service(note)) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        for size in (1000, 1001, 300_000, 10):
            await peer.send(cut_pdus(CT_CONTEXT, STORE.encode(), bytes(size), 60_000))
            await peer.expect_message()
        await peer.release()
    assert sizes == [(1000, False), (0, True), (0, True), (10, False)]


async def test_full_inbox_pauses_reading_and_goes_on() -> None:
    """Requests beyond the limit wait in the socket until earlier ones are taken."""
    limit = 4
    go = asyncio.Event()
    answered: list[int] = []

    async def wait_first(association: Association, message: Message) -> None:
        await go.wait()
        answered.append(message.command.message_id)
        await association.send(message.context, response(message.command, 0))

    async with layer_left_clean(limits=Limits(max_pending_messages=limit)) as layer:
        service = Service(wait_first)
        async with listening(layer, service) as (_, port), raw_requestor(port) as peer:
            await peer.establish()
            theirs = await service.association()
            for number in range(1, 41):
                await peer.send_message(
                    1, request(CommandField.C_ECHO_RQ, VERIFICATION, number, data_set=False)
                )
                await asyncio.sleep(0)
            await until(lambda: theirs.protocol.paused)
            go.set()
            for number in range(1, 41):
                assert (await peer.expect_message())[1].responds_to == number
            assert answered == list(range(1, 41))
            await until(lambda: not theirs.protocol.paused)
            await peer.release()


# ------------------------------------------------------------------ descriptors


async def descriptors() -> int:
    return len(await asyncio.to_thread(os.listdir, "/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are listed on Linux")
async def test_associations_leave_no_descriptor_however_they_end() -> None:
    """Released, aborted, dropped by either side or refused at once: nothing stays open."""
    async with layer_left_clean() as layer:
        service = Service()
        async with listening(layer, service, max_associations=1) as (_, port):
            counts: list[int] = []
            for _ in range(12):
                for end in ("release", "abort", "drop", "refuse"):
                    association = await layer.request(target(port), PROPOSAL)
                    match end:
                        case "release":
                            await association.release(60.0)
                        case "abort":
                            association.abort()
                        case "drop":
                            association.protocol.close_now()
                        case _:
                            with pytest.raises(AssociationRejected):
                                await layer.request(target(port), PROPOSAL)
                            await association.release(60.0)
                    await association.wait_closed()
                    await service.end()
                    await until(lambda: layer.associations == set())
                counts.append(await descriptors())
            assert counts[-1] <= counts[0] + 2


async def test_descriptor_that_is_no_socket_is_closed_again() -> None:
    """Where the options cannot be had the association does without, and leaves nothing open."""
    duplicates: list[int] = []
    reading, writing = await asyncio.to_thread(os.pipe)

    class Transport:
        def get_extra_info(self, _name: str) -> Any:
            return self

        def fileno(self) -> int:
            duplicates.append(os.dup(reading))
            os.close(duplicates[-1])  # the number that the next duplicate gets
            return reading

    assert _options_socket(Transport()) is None  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Errno 9"):
        os.fstat(duplicates[0])
    os.close(reading)
    os.close(writing)


# -------------------------------------------------------------------- releasing


async def test_peer_that_releases_amid_our_data_set_ends_the_sending() -> None:
    """A-RELEASE-RQ is answered at once; what we were sending ends as released, all blocks back."""
    hold = asyncio.Event()
    data = Pattern(3_000_000, hold=hold, at=500_000)

    async def releases(peer: RawPeer) -> None:
        await peer.accept(max_length=0)
        async with asyncio.timeout(60):
            await data.reading.wait()
        await peer.send(bytes.fromhex("05000000000400000000"))
        pdu_type = 0
        while pdu_type != 6:
            pdu_type, _ = await peer.receive_pdu()
        hold.set()

    async with layer_left_clean() as layer, raw_acceptor(releases) as port:
        association = await layer.request(target(port), PROPOSAL)
        with pytest.raises(AssociationReleased):
            await store(association, association.context_for(CT), STORE, data, 60.0)


async def test_abort_reads_as_abort_even_with_data_in_flight() -> None:
    """The peer aborts while we send: its source and reason are what the sender hears."""
    hold = asyncio.Event()
    data = Pattern(3_000_000, hold=hold, at=500_000)

    async def aborts(peer: RawPeer) -> None:
        await peer.accept(max_length=0)
        async with asyncio.timeout(60):
            await data.reading.wait()
        await peer.send(Abort(2, 6))

    async with layer_left_clean() as layer, raw_acceptor(aborts) as port:
        association = await layer.request(target(port), PROPOSAL)
        async with asyncio.TaskGroup() as group:

            async def goes_on_once_aborted() -> None:
                await until(lambda: association.ended is not None)
                hold.set()

            group.create_task(goes_on_once_aborted())
            with pytest.raises(AssociationAborted) as caught:
                await store(association, association.context_for(CT), STORE, data, 60.0)
        assert (caught.value.source, caught.value.reason) == (2, 6)
