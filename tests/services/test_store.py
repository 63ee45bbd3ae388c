"""C-STORE as SCP: for a flight it is taken, otherwise refused and logged, never passed on."""

from __future__ import annotations

import asyncio

import pytest

from dicomproxy.dimse.association import Association
from dicomproxy.dimse.command import CommandField, request
from dicomproxy.dimse.operations import VERIFICATION
from tests.services.support import CT, EXPLICIT, PRIVATE, Peer, serving, within
from tests.support.datasets import data_set_bytes, instance
from tests.support.log_watch import LogWatch

BIG = bytes(range(256)) * 4000


async def test_instance_for_a_flight_reaches_the_arrivals_whole() -> None:
    """Named by source, class, UID and syntax; bytes as they came; the arrivals' own status."""
    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"north"}
        for uid, data in (("1.2.3.1", b"data"), ("1.2.3.2", BIG)):
            command = await peer.store(data, uid)
            assert (command.status, command.field) == (0x0000, 0x8001)
            assert command.affected_sop_instance_uid == uid
        assert at.arrivals.data == {"1.2.3.1": b"data", "1.2.3.2": BIG}
        assert at.arrivals.received == [
            ("north", CT, "1.2.3.1", EXPLICIT),
            ("north", CT, "1.2.3.2", EXPLICIT),
        ]


@pytest.mark.parametrize("status", [0x0124, 0xA700, 0xA900, 0xC000, 0xC001])
async def test_status_of_the_arrivals_is_the_answer(status: int) -> None:
    """What became of the instance is for them to say; the association goes on."""
    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"north"}
        at.arrivals.status = status
        assert (await peer.store(b"data")).status == status
        at.arrivals.status = 0x0000
        assert (await peer.store(b"data", "1.2.3.2", 2)).status == 0x0000


async def test_instance_that_nobody_asked_for_is_refused(log_watch: LogWatch) -> None:
    """Not authorized (0124), logged with sender and UIDs, its bytes forgotten."""
    data = data_set_bytes(instance(1))
    async with serving() as at, at.peer("NORTHPACS") as peer:
        assert (await peer.store(data)).status == 0x0124
        assert (await peer.store(BIG, "1.2.3.2")).status == 0x0124
        assert at.arrivals.received == []
        assert at.layer.receive_pool.lent == 0
    first = log_watch.named("store_refused")[0]
    assert (first["calling_ae_title"], first["sources"]) == ("NORTHPACS", ["north"])
    assert (first["sop_class_uid"], first["sop_instance_uid"]) == (CT, "1.2.3.1")
    assert (first["peer_address"], first["reason"]) == ("127.0.0.1", "no_flight")


async def test_flight_from_another_source_is_no_permission() -> None:
    """While south is fetched from, north still may not send."""
    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"south"}
        assert (await peer.store(b"data")).status == 0x0124


async def test_local_pacs_sends_for_its_own_flight() -> None:
    """Where the proxy delivers for the local PACS, that is a source like any other."""
    async with serving() as at, at.peer("LOCALPACS") as peer:
        at.arrivals.fetching = {"local"}
        assert (await peer.store(b"data")).status == 0x0000
        assert at.arrivals.received[0][0] == "local"


async def test_private_objects_are_taken() -> None:
    """By the SOP Class of the command, or of the context where the command leaves it out."""
    async with serving() as at, at.peer("NORTHPACS", contexts=[PRIVATE]) as peer:
        at.arrivals.fetching = {"north"}
        for sop_class in (PRIVATE, ""):
            command = request(
                CommandField.C_STORE_RQ,
                sop_class,
                1,
                data_set=True,
                affected_sop_instance_uid="1.2.3.1",
            )
            await peer.association.send(peer.context(PRIVATE), command, b"data")
            assert (await peer.receive()).command.status == 0x0000
        assert [one[1] for one in at.arrivals.received] == [PRIVATE, PRIVATE]


async def test_instance_without_a_name_is_refused() -> None:
    """A C-STORE-RQ that names no instance cannot be part of a flight."""
    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"north"}
        assert (await peer.store(b"data", "")).status == 0x0124


async def test_store_without_a_data_set_is_not_understood() -> None:
    """C000, and nothing is counted as arrived."""
    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"north"}
        assert (await peer.store(None)).status == 0xC000
        assert at.arrivals.received == []


class Half:
    """A data set that breaks off in the middle."""

    size = len(BIG)

    def __init__(self, gate: asyncio.Event) -> None:
        self._gate = gate

    async def read_into(self, buffers: list[memoryview], offset: int) -> int:
        if offset:
            await self._gate.wait()
        return sum(map(len, buffers))


@pytest.mark.parametrize("how", ["abort", "lost"])
async def test_transfer_that_is_cut_off_is_discarded(how: str) -> None:
    """Half an instance never exists, whichever way its sender goes."""
    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"north"}
        gate = asyncio.Event()
        command = request(
            CommandField.C_STORE_RQ, CT, 1, data_set=True, affected_sop_instance_uid="1.2.3.1"
        )
        sending = asyncio.create_task(peer.association.send(peer.context(CT), command, Half(gate)))
        while not at.arrivals.received:  # noqa: ASYNC110  (what it reads has no event)
            await asyncio.sleep(0)
        await _go(peer.association, how)
        assert await within(at.arrivals.discarded.get()) == "1.2.3.1"
        gate.set()
        await within(asyncio.gather(sending, return_exceptions=True))
        assert at.arrivals.data == {}


async def _go(association: Association, how: str) -> None:
    if how == "abort":
        association.abort()
    else:
        association.protocol.close_now()


async def test_sender_may_verify_between_instances() -> None:
    """Several services share one association, in the order in which they were asked."""

    async def echo(peer: Peer) -> int:
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION)
        return (await peer.receive()).command.status

    async with serving() as at, at.peer("NORTHPACS") as peer:
        at.arrivals.fetching = {"north"}
        for number in range(3):
            assert (await peer.store(b"data", f"1.2.3.{number}")).status == 0x0000
            assert await echo(peer) == 0x0000
        assert len(at.arrivals.data) == 3
