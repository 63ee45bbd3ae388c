"""Accepting: limits, draining, the service's word, and crashes that stay where they are."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from dicomproxy.dimse import listener as listener_module
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, request
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.pdu import (
    REJECT_APPLICATION_CONTEXT,
    REJECT_CALLING,
    REJECT_CONGESTION,
    REJECT_LIMIT,
    REJECT_PROTOCOL_VERSION,
    Abort,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    ReleaseResponse,
)
from tests.dimse_edge.harness import Service, answer, layer_left_clean, listening, until
from tests.dimse_edge.raw_peer import VERIFICATION, raw_requestor
from tests.sentinel import PATIENT_NAME
from tests.support.log_watch import LogWatch

ECHO = request(CommandField.C_ECHO_RQ, VERIFICATION, 1, data_set=False)


async def test_association_over_the_limit_is_rejected_transiently(log_watch: LogWatch) -> None:
    """Local limit exceeded (PS3.8 9.3.4); a place that becomes free is given away again."""
    async with (
        layer_left_clean() as layer,
        listening(layer, Service(), max_associations=2) as (listener, port),
        AsyncExitStack() as stack,
    ):
        peers = [await stack.enter_async_context(raw_requestor(port)) for _ in range(4)]
        for peer in peers[:2]:
            await peer.establish()
        await peers[2].associate()
        assert await peers[2].expect(AssociateReject) == REJECT_LIMIT
        peers[2].writer.close()
        await peers[0].release()
        await until(lambda: len(listener.accepted) == 1)
        await peers[3].establish()
        for peer in (peers[1], peers[3]):
            await peer.release()
    (line,) = log_watch.named("association_rejected")
    assert (line["result"], line["reject_source"]) == (2, 3)
    assert line["reason"] == "transient: local limit exceeded"
    assert line["calling_ae_title"] == "RAW"


async def test_draining_listener_rejects_and_lets_the_accepted_go_on() -> None:
    """Temporary congestion for the new, service as before for the old, then idle."""
    async with (
        layer_left_clean() as layer,
        listening(layer, Service()) as (listener, port),
        raw_requestor(port) as old,
        raw_requestor(port) as new,
    ):
        await old.establish()
        listener.drain()
        await new.associate()
        assert await new.expect(AssociateReject) == REJECT_CONGESTION
        new.writer.close()
        await old.send_message(1, ECHO)
        assert (await old.expect_message())[1].status == 0
        idle = asyncio.create_task(listener.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
        await old.release()
        async with asyncio.timeout(60):
            await idle


async def test_connections_beyond_every_limit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """When answering would be the load, the connection ends without an answer."""
    monkeypatch.setattr(listener_module, "_SURPLUS", 2)
    async with (
        layer_left_clean() as layer,
        listening(layer, Service(), max_associations=1) as (_, port),
        AsyncExitStack() as stack,
    ):
        peers = [await stack.enter_async_context(raw_requestor(port)) for _ in range(2)]
        await until(lambda: len(layer.associations) == 2)  # open, without a request yet
        third = await stack.enter_async_context(raw_requestor(port))
        await third.expect_end()
        await peers[0].establish()
        await peers[0].release()
        peers[1].writer.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"application_context": "1.2.3"}, REJECT_APPLICATION_CONTEXT),
        ({"protocol_version": 2}, REJECT_PROTOCOL_VERSION),
    ],
)
async def test_other_protocols_are_rejected_permanently(
    change: dict[str, object], expected: AssociateReject
) -> None:
    """Another application context or protocol version has its own reason (PS3.8 9.3.4)."""
    async with (
        layer_left_clean() as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.associate(**change)  # type: ignore[arg-type]
        assert await peer.expect(AssociateReject) == expected


async def test_protocol_version_that_includes_ours_is_accepted() -> None:
    """Only bit 0 of the version is tested (PS3.8 9.3.2)."""
    async with (
        layer_left_clean() as layer,
        listening(layer, Service()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.associate(protocol_version=3)
        await peer.expect(AssociateAccept)
        await peer.release()


async def test_rejection_by_the_service_reaches_the_peer(log_watch: LogWatch) -> None:
    """What the service says is sent word for word, and the place is free again."""

    async def nobody(_request: AssociateRequest) -> AssociateReject:
        return REJECT_CALLING

    async with (
        layer_left_clean() as layer,
        listening(layer, Service(before=nobody)) as (listener, port),
        raw_requestor(port) as peer,
    ):
        await peer.associate()
        assert await peer.expect(AssociateReject) == REJECT_CALLING
        await until(lambda: not listener.accepted)
    assert len(log_watch.named("association_rejected")) == 1


async def test_peer_gone_during_our_judgement_is_no_crash(log_watch: LogWatch) -> None:
    """The requestor aborts while we still decide: the answer goes nowhere."""
    decide = asyncio.Event()

    async def ponder(_request: AssociateRequest) -> None:
        await decide.wait()

    async with (
        layer_left_clean() as layer,
        listening(layer, Service(before=ponder)) as (listener, port),
        raw_requestor(port) as peer,
    ):
        await peer.associate()
        await until(lambda: len(listener.accepted) == 1)
        await peer.send(Abort(0, 0))
        peer.writer.close()
        await until(lambda: not layer.associations)
        decide.set()
        await until(lambda: not listener.accepted)
    assert log_watch.named("association_crashed") == []


@pytest.mark.parametrize("where", ["negotiate", "serve"])
async def test_crash_of_a_service_is_logged_and_stays_its_own(
    where: str, log_watch: LogWatch
) -> None:
    """A bug met by one association aborts that one; others go on. The log names no value."""

    async def crash_before(request: AssociateRequest) -> None:
        if request.called_ae_title == "CRASH" and where == "negotiate":
            raise ValueError(PATIENT_NAME)

    async def crash_serving(association: Association, message: Message) -> None:
        if association.called_ae_title == "CRASH":
            raise ValueError(PATIENT_NAME)
        await answer(association, message)

    service = Service(crash_serving, before=crash_before)
    async with (
        layer_left_clean() as layer,
        listening(layer, service) as (listener, port),
        raw_requestor(port) as good,
        raw_requestor(port) as bad,
    ):
        await good.establish()
        await bad.associate(called_ae_title="CRASH")
        if where == "serve":
            await bad.expect(AssociateAccept)
            await bad.send_message(1, ECHO)
        assert await bad.expect_abort() == Abort(0, 0)
        await until(lambda: len(listener.accepted) == 1)
        await good.send_message(1, ECHO)
        assert (await good.expect_message())[1].status == 0
        await good.release()
    (line,) = log_watch.named("association_crashed")
    assert line["error_type"] == "ValueError"


async def test_service_that_returns_leaves_nothing_open() -> None:
    """When the service is done with an association that still stands, it is aborted."""

    class Bored(Service):
        async def serve(self, association: Association) -> None:
            return

    async with (
        layer_left_clean() as layer,
        listening(layer, Bored()) as (_, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        assert await peer.expect_abort() == Abort(0, 0)


async def test_close_ends_the_port_and_every_association() -> None:
    """After close nobody listens, what was served is cancelled and aborted."""
    working, cancelled = asyncio.Event(), asyncio.Event()

    async def for_ever(_association: Association, _message: Message) -> None:
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with layer_left_clean() as layer:
        listener = Listener(layer, Service(for_ever), max_associations=5)
        port = await listener.start("127.0.0.1", 0)
        async with raw_requestor(port) as peer, raw_requestor(port) as negotiating:
            await peer.establish()
            await peer.send_message(1, ECHO)
            await until(lambda: working.is_set() and len(layer.associations) == 2)
            async with asyncio.timeout(60):
                await listener.close()
            assert cancelled.is_set()
            assert await peer.expect_abort() == Abort(0, 0)
            with pytest.raises(OSError, match="Connect"):
                await asyncio.open_connection("127.0.0.1", port)
            # Connected before, asking only now: it is told that this is no time.
            await negotiating.associate()
            assert await negotiating.expect(AssociateReject) == REJECT_CONGESTION
        await listener.close()


async def test_peer_that_only_connects_is_no_event(log_watch: LogWatch) -> None:
    """A health check that connects and leaves is one debug line."""
    async with layer_left_clean() as layer, listening(layer, Service()) as (_, port):
        async with raw_requestor(port):
            await until(lambda: len(layer.associations) == 1)
        await until(lambda: not layer.associations)
    assert [line["level"] for line in log_watch.entries] == ["debug"]


async def test_port_in_use_is_an_os_error() -> None:
    """Who starts us hears that the address cannot be bound."""
    async with layer_left_clean() as layer, listening(layer, Service()) as (_, port):
        with pytest.raises(OSError, match=r".*"):
            await Listener(layer, Service(), max_associations=1).start("127.0.0.1", port)


async def test_release_by_the_peer_is_answered_while_the_service_works() -> None:
    """A peer that asks for release amid an operation is answered at once."""
    go = asyncio.Event()

    async def slow(_association: Association, _message: Message) -> None:
        await go.wait()

    async with (
        layer_left_clean() as layer,
        listening(layer, Service(slow)) as (listener, port),
        raw_requestor(port) as peer,
    ):
        await peer.establish()
        await peer.send_message(1, ECHO)
        await peer.send(bytes.fromhex("05000000000400000000"))
        await peer.expect(ReleaseResponse)
        peer.writer.close()
        go.set()
        await until(lambda: not listener.accepted)
