"""Delivering to a workstation: in the syntax it takes, on as few associations as it likes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from dicomproxy.destinations import workstation as module
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, Tag, response
from dicomproxy.dimse.errors import AssociationAborted, AssociationReleased
from dicomproxy.dimse.layer import UpperLayer
from dicomproxy.dimse.pdu import REJECT_CALLED, REJECT_LIMIT, AssociateReject, AssociateRequest
from dicomproxy.ports import Delivered, DestinationError, Failure, Originator
from tests.destinations.support import (
    BIG_ENDIAN,
    CT,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    MR,
    RLE,
    Delivering,
    Desk,
    Item,
    desk,
    workstation,
)
from tests.dimse_edge.harness import SHORT, until
from tests.peers.ports import free_port
from tests.support.log_watch import LogWatch
from tests.support.stand_in import StandIn, anything, only, succeed
from tests.support.time_passes import time_passes

BIG = Item(data=bytes(range(256)) * 4000, uid="1.2.3.2")


def proposed(request: AssociateRequest) -> set[tuple[str, str]]:
    assert all(len(one.transfer_syntaxes) == 1 for one in request.contexts)
    return {(one.abstract_syntax, one.transfer_syntaxes[0]) for one in request.contexts}


# ------------------------------------------------------------------ what is sent


async def test_instances_go_out_as_they_are_held() -> None:
    """Bytes, syntax, UIDs, originator, priority and Message IDs of each C-STORE-RQ."""
    items = [Item(), BIG, Item(MR, IMPLICIT, b"", "1.2.3.3"), Item(CT, JPEG, b"jpeg", "1.2.3.5")]
    peer = StandIn(supported=anything(EXPLICIT, IMPLICIT, JPEG))
    async with desk(peer, associations=4) as at, at.open("LOCALPACS") as delivery:
        assert await delivery.send(*items) == [Delivered.COMPLETED] * 4
    assert {request.calling_ae_title for request in peer.requests} == {"LOCALPACS"}
    assert {request.called_ae_title for request in peer.requests} == {"READING1"}
    for item, message in zip(items, peer.messages, strict=True):
        command = message.command
        assert command.field == CommandField.C_STORE_RQ
        assert message.context.transfer_syntax == item.transfer_syntax_uid
        assert message.data == item.data
        assert command.affected_sop_class_uid == item.sop_class_uid
        assert command.affected_sop_instance_uid == item.uid
        assert command.elements[Tag.MOVE_ORIGINATOR_AE_TITLE] == "READING2"
        assert command.elements[Tag.MOVE_ORIGINATOR_MESSAGE_ID] == 77
        assert command.priority == 1
    assert [command.message_id for command in peer.commands[:2]] == [1, 2]


async def test_end_of_a_delivery_releases_its_associations() -> None:
    """Released in order, not aborted; and nothing is associated for a delivery of nothing."""
    async with desk(StandIn()) as at:
        async with at.open():
            pass
        assert at.peer.requests == []
        async with at.open() as delivery:
            await delivery.send(Item(), Item(MR, uid="1.2.3.7"))
        for _ in at.peer.associations:
            assert isinstance(await at.peer.end(), AssociationReleased)
        assert len(at.peer.associations) == 2


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, Delivered.COMPLETED),
        (0xB000, Delivered.WARNING),
        (0xB006, Delivered.WARNING),
        (0xB007, Delivered.WARNING),
        (0x0107, Delivered.WARNING),
        (0x0116, Delivered.WARNING),
        (0x0110, Delivered.FAILED),
        (0x0122, Delivered.FAILED),
        (0xA700, Delivered.FAILED),
        (0xA900, Delivered.FAILED),
        (0xC000, Delivered.FAILED),
        (0xFF00, Delivered.FAILED),
    ],
)
async def test_status_decides_the_outcome(
    log_watch: LogWatch, status: int, outcome: Delivered
) -> None:
    """Success, Warning and everything else (PS3.4 B.2.3); what is no success is logged."""

    async def handle(association: Association, message: Message) -> None:
        await association.send(message.context, response(message.command, status))

    async with desk(StandIn(handle)) as at, at.open() as delivery:
        assert await delivery.send(Item()) == [outcome]
        # The association goes on: one refused instance is no reason to end it.
        at.peer.handle = succeed
        assert await delivery.send(BIG) == [Delivered.COMPLETED]
        assert len(at.peer.associations) == 1
    logged = [
        (line["status"], line["sop_instance_uid"]) for line in log_watch.named("store_status")
    ]
    assert logged == ([] if status == 0 else [(f"0x{status:04X}", "1.2.3.1")])


# ------------------------------------------------------------- fallback syntaxes


async def test_instance_is_converted_where_its_syntax_is_not_taken() -> None:
    """A workstation with Implicit VR alone gets an uncompressed instance in it."""
    data = b"\x08\x00\x60\x00CS\x02\x00CT" + b"\x10\x00\x20\x00LO\x02\x00A1"
    async with desk(StandIn(supported=only({CT: [IMPLICIT]}))) as at, at.open() as delivery:
        assert await delivery.send(Item(CT, EXPLICIT, data)) == [Delivered.COMPLETED]
    (message,) = at.peer.messages
    assert message.context.transfer_syntax == IMPLICIT
    assert message.data == b"\x08\x00\x60\x00\x02\0\0\0CT" + b"\x10\x00\x20\x00\x02\0\0\0A1"


@pytest.mark.parametrize(
    ("supported", "item", "reason"),
    [
        (only({MR: [EXPLICIT]}), Item(), "no_context"),
        (only({CT: [RLE]}), Item(CT, JPEG), "no_context"),
        (only({CT: [IMPLICIT]}), Item(data=b"\x08\x00\x60\x00CS\x02\x00C"), "cut_short"),
        (only({CT: [IMPLICIT]}), Item(broken=True), "unreadable"),
    ],
    ids=["class_not_taken", "no_fallback_taken", "cut_short", "unreadable"],
)
async def test_what_cannot_be_delivered_is_failed_and_logged(
    log_watch: LogWatch, supported: Any, item: Item, reason: str
) -> None:
    """That object fails with its reason; the delivery goes on."""
    async with desk(StandIn(supported=supported)) as at, at.open() as delivery:
        assert await delivery.send(item) == [Delivered.FAILED]
    assert at.peer.messages == []
    (line,) = log_watch.named("instance_not_deliverable")
    assert line["reason"].startswith(reason)
    assert line["sop_instance_uid"] == item.uid
    assert line["destination_ae_title"] == "READING1"
    assert line["operation_id"] == "op-1"


async def test_too_large_to_convert(log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take too much memory is not converted; it is not even read."""
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    async with desk(StandIn(supported=only({CT: [IMPLICIT]}))) as at, at.open() as delivery:
        item = Item(data=b"x" * 101, broken=True)
        assert await delivery.send(item) == [Delivered.FAILED]
    assert [line["reason"] for line in log_watch.named("instance_not_deliverable")] == ["too_large"]


async def test_conversions_go_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two deliveries that convert at once hold one instance in memory, not two."""
    now, most = 0, 0

    async def converting(*_: object) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _turn in range(20):
            await asyncio.sleep(0)
        now -= 1
        return b""

    monkeypatch.setattr(module, "_converted", converting)
    async with desk(StandIn(supported=only({CT: [IMPLICIT]}))) as at:
        async with at.open() as one, at.open() as other, asyncio.TaskGroup() as group:
            for delivery in (one, other):
                group.create_task(delivery.send(Item(), BIG))
        assert len(at.peer.messages) == 4
    assert most == 1


async def test_cache_that_cannot_be_read_fails_the_instance_only(log_watch: LogWatch) -> None:
    """A data set that breaks off costs its association, not the delivery."""
    async with desk(StandIn()) as at, at.open() as delivery:
        outcomes = await delivery.send(Item(broken=True), Item(uid="1.2.3.8"))
        assert outcomes == [Delivered.FAILED, Delivered.COMPLETED]
        assert len(at.peer.associations) == 2
        assert isinstance(await at.peer.end(), AssociationAborted)
    (line,) = log_watch.named("cache_degraded")
    assert (line["reason"], line["sop_instance_uid"]) == ("unreadable", "1.2.3.1")


# ---------------------------------------------------------------- associations


async def test_each_pair_is_proposed_with_its_fallbacks() -> None:
    """One context for each syntax, so that the workstation's choice tells all."""
    async with desk(StandIn(supported=anything(RLE, EXPLICIT))) as at, at.open() as delivery:
        await delivery.send(Item(CT, RLE))
    assert proposed(at.peer.requests[0]) == {(CT, RLE), (CT, EXPLICIT), (CT, IMPLICIT)}


async def test_new_pair_adds_an_association_and_the_older_one_stays() -> None:
    """Up to the limit both stand: going back to the first pair needs no third."""
    async with desk(StandIn(), associations=2) as at, at.open() as delivery:
        await delivery.send(Item(CT), Item(MR, uid="1.2.3.6"), Item(CT, uid="1.2.3.7"))
        assert len(at.peer.associations) == 2
        assert all(one.established for one in at.peer.associations)
    # The second one covers what went before, should the first be lost.
    assert {CT, MR} <= {sop_class for sop_class, _ in proposed(at.peer.requests[1])}


async def test_pair_that_was_refused_is_not_proposed_again_and_again() -> None:
    """A class that the workstation does not take costs one association, not one an instance."""
    async with desk(StandIn(supported=only({CT: [EXPLICIT]}))) as at, at.open() as delivery:
        outcomes = await delivery.send(
            Item(CT), Item(MR, uid="1.2.3.6"), Item(MR, uid="1.2.3.7"), Item(CT, uid="1.2.3.8")
        )
        assert outcomes == [
            Delivered.COMPLETED,
            Delivered.FAILED,
            Delivered.FAILED,
            Delivered.COMPLETED,
        ]
    assert len(at.peer.requests) == 2


async def test_one_association_means_taking_turns() -> None:
    """Where one is allowed, the first is released before the second is requested."""
    open_now: list[int] = []

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        open_now.append(sum(one.established for one in at.peer.associations))
        return None

    async with desk(StandIn(admit=admit), associations=1) as at, at.open() as delivery:
        await delivery.send(Item(CT), Item(MR, uid="1.2.3.6"), Item(CT, uid="1.2.3.7"))
    # The second covers both pairs: no third.
    assert open_now == [0, 0]


async def test_workstation_that_takes_one_at_a_time_is_found_out(log_watch: LogWatch) -> None:
    """A transient rejection while others are open lets those go, once and for all."""
    async with desk(StandIn(), max_associations=1, associations=3) as at:
        async with at.open() as delivery:
            outcomes = await delivery.send(Item(CT), Item(MR, uid="1.2.3.6"))
            assert outcomes == [Delivered.COMPLETED] * 2
        assert at.workstation.takes_turns
        async with at.open() as delivery:
            await delivery.send(Item(CT, RLE), Item(MR, RLE, uid="1.2.3.6"))
    assert len(log_watch.named("workstation_takes_turns")) == 1
    assert len(log_watch.named("association_rejected")) == 1


async def test_workstation_that_leaves_the_second_waiting_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that accepts the next only after the first has gone is given way to."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        for association in at.peer.associations:
            await association.wait_closed()
        return None

    async with desk(StandIn(admit=admit), associations=2) as at, at.open() as delivery:
        outcomes = await delivery.send(Item(CT), Item(MR, uid="1.2.3.6"))
        assert outcomes == [Delivered.COMPLETED] * 2
        assert at.workstation.takes_turns


async def test_what_was_needed_lately_is_proposed_at_once() -> None:
    """The next delivery gets by with one association where the last one needed two."""
    async with desk(StandIn()) as at:
        async with at.open() as delivery:
            await delivery.send(Item(CT), Item(MR, uid="1.2.3.6"))
        async with at.open() as delivery:
            await delivery.send(Item(CT), Item(MR, uid="1.2.3.6"))
    assert len(at.peer.requests) == 3


async def test_what_is_expected_is_proposed_at_once() -> None:
    """A study of several kinds needs one association, and one that comes as a surprise another."""
    async with desk(StandIn(supported=anything(RLE, EXPLICIT))) as at, at.open() as delivery:
        delivery.delivery.expect([(CT, EXPLICIT), (MR, RLE)])
        delivery.delivery.expect([(CT, RLE)])
        await delivery.send(Item(CT), Item(MR, RLE, uid="1.2.3.6"), Item(CT, RLE, uid="1.2.3.7"))
        assert len(at.peer.requests) == 1
        assert proposed(at.peer.requests[0]) == {
            (sop_class, syntax) for sop_class in (CT, MR) for syntax in (RLE, EXPLICIT, IMPLICIT)
        }
        await delivery.send(Item(CT, JPEG, uid="1.2.3.8"))
        assert len(at.peer.requests) == 2


async def test_more_expected_than_an_association_holds() -> None:
    """What is expected never crowds out what is delivered."""
    async with desk(StandIn()) as at, at.open() as delivery:
        delivery.delivery.expect(
            (f"1.2.840.10008.5.1.4.1.1.{number}", RLE) for number in range(100, 300)
        )
        assert await delivery.send(Item(CT)) == [Delivered.COMPLETED]
    (request,) = at.peer.requests
    assert len(request.contexts) <= 128
    assert (CT, EXPLICIT) in proposed(request)


async def test_never_more_contexts_than_an_association_holds() -> None:
    """However many pairs there were, 128 contexts at most, the wanted one among them."""
    items = [
        Item(f"1.2.840.10008.5.1.4.1.1.{number}", RLE, b"", f"1.9.{number}")
        for number in range(140)
    ]
    peer = StandIn(supported=anything(RLE))
    async with desk(peer, associations=1) as at, at.open() as delivery:
        assert await delivery.send(*items) == [Delivered.COMPLETED] * len(items)
    for item, request in zip(items, at.peer.requests, strict=True):
        assert len(request.contexts) <= 128
        assert (item.sop_class_uid, RLE) in proposed(request)
    assert len(at.peer.requests[-1].contexts) == 126  # 42 classes of three contexts


# --------------------------------------------------------------------- failures


def rejecting(times: int, rejection: AssociateReject) -> Callable[[AssociateRequest], Any]:
    seen = 0

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        nonlocal seen
        seen += 1
        return rejection if seen <= times else None

    return admit


async def test_transient_rejection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy workstation is asked until it has room."""
    monkeypatch.setattr(module, "_RETRY_PAUSE_SECONDS", 0.01)
    peer = StandIn(admit=rejecting(3, REJECT_LIMIT))
    async with desk(peer, retry_seconds=30.0) as at, at.open() as delivery:
        assert await delivery.send(Item()) == [Delivered.COMPLETED]
    assert len(peer.requests) == 4


async def test_transient_rejection_does_not_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time for retries the destination is lost, with the reason in words."""
    monkeypatch.setattr(module, "_RETRY_PAUSE_SECONDS", 0.01)

    async def admit(_request: AssociateRequest) -> AssociateReject:
        if len(peer.requests) == 3:
            time_passes(31)
        return REJECT_LIMIT

    peer = StandIn(admit=admit)
    async with desk(peer, retry_seconds=30.0) as at, at.open() as delivery:
        with pytest.raises(DestinationError) as caught:
            await delivery.send(Item())
    assert caught.value.failure is Failure.BUSY
    assert "local limit exceeded" in caught.value.detail
    assert len(peer.requests) == 3


async def test_permanent_rejection_is_not_tried_again() -> None:
    """A workstation that does not know us will not know us in a second either."""
    peer = StandIn(admit=rejecting(1, REJECT_CALLED))
    async with desk(peer, retry_seconds=30.0) as at, at.open() as delivery:
        with pytest.raises(DestinationError) as caught:
            await delivery.send(Item())
    assert caught.value.failure is Failure.REJECTED
    assert len(peer.requests) == 1


async def test_nobody_there() -> None:
    """A workstation that is switched off is unreachable."""
    delivery = Delivering(workstation(UpperLayer(), free_port()).open("US", Originator("A", 1)))
    with pytest.raises(DestinationError) as caught:
        await delivery.send(Item())
    assert caught.value.failure is Failure.UNREACHABLE


@pytest.mark.parametrize("losses", [1, 2])
async def test_lost_association_is_opened_again_once(log_watch: LogWatch, losses: int) -> None:
    """The instance that was under way is sent again; a second loss is the end."""

    async def handle(association: Association, message: Message) -> None:
        if len(at.peer.messages) <= losses:
            association.abort()
        else:
            await succeed(association, message)

    async with desk(StandIn(handle)) as at, at.open() as delivery:
        if losses == 1:
            assert await delivery.send(Item(), BIG) == [Delivered.COMPLETED] * 2
        else:
            with pytest.raises(DestinationError) as caught:
                await delivery.send(Item())
            assert caught.value.failure is Failure.ABORTED
    assert len(at.peer.associations) == 2
    uids = [command.affected_sop_instance_uid for command in at.peer.commands]
    assert uids[:2] == ["1.2.3.1", "1.2.3.1"]
    (line,) = log_watch.named("delivery_reopened")
    assert line["failure"] == "aborted"


async def test_association_that_ended_between_instances_is_replaced() -> None:
    """What the workstation released while nothing was sent is no loss at all."""
    async with desk(StandIn()) as at, at.open() as delivery:
        for number in range(3):
            assert await delivery.send(Item(uid=f"1.2.3.{number}")) == [Delivered.COMPLETED]
            await at.peer.associations[-1].release(60.0)
            await at.peer.end()
            await until(lambda: not any(one.established for one in at.peer.associations))
    assert len(at.peer.associations) == 3


async def test_silent_workstation() -> None:
    """No answer within the deadline counts as a lost association."""
    stop = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await stop.wait()

    async with desk(StandIn(handle), response_timeout=SHORT) as at, at.open() as delivery:
        with pytest.raises(DestinationError) as caught:
            await delivery.send(Item())
        assert caught.value.failure is Failure.TIMEOUT
        assert len(at.peer.associations) == 2
        stop.set()


async def test_cancelled_in_the_middle_of_an_instance() -> None:
    """The association is aborted, since the workstation cannot be told that no more comes."""
    stored, stop = asyncio.Event(), asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        stored.set()
        await stop.wait()

    async with desk(StandIn(handle)) as at, at.open() as delivery:
        task = asyncio.create_task(delivery.send(BIG))
        await stored.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stop.set()
        assert isinstance(await at.peer.end(), AssociationAborted)


async def test_cancelled_while_associating() -> None:
    """A delivery that is given up while the workstation thinks leaves no connection."""
    asked, stop = asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        asked.set()
        await stop.wait()
        return None

    async with desk(StandIn(admit=admit)) as at, at.open() as delivery:
        task = asyncio.create_task(delivery.send(Item()))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stop.set()


async def test_cancelled_while_a_second_association_is_requested() -> None:
    """The first one is still released in order by close."""
    asked, stop = asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        if at.peer.associations:
            asked.set()
            await stop.wait()
        return None

    async with desk(StandIn(admit=admit)) as at:
        async with at.open() as delivery:
            await delivery.send(Item(CT))
            task = asyncio.create_task(delivery.send(Item(MR, uid="1.2.3.6")))
            await asked.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert isinstance(await at.peer.end(), AssociationReleased)
        stop.set()


async def test_cancelled_while_the_first_gives_way_to_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second was accepted meanwhile, and is not forgotten."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    stop = asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        if at.peer.associations:
            await stop.wait()
        return None

    async with desk(StandIn(admit=admit)) as at, at.open() as delivery:
        await delivery.send(Item(CT))
        (first,) = at.peer.associations
        first.protocol.pause()  # it will not see that it is released
        task = asyncio.create_task(delivery.send(Item(MR, uid="1.2.3.6")))
        await until(lambda: at.workstation.takes_turns)
        stop.set()
        await until(lambda: len(at.peer.associations) == 2)
        await until(lambda: sum(one.established for one in requested(at)) == 1)
        for _ in range(10):  # it is handed on to whoever requested it
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert isinstance(await at.peer.end(), AssociationAborted)
        first.protocol.resume()
        assert isinstance(await at.peer.end(), AssociationReleased)


def requested(at: Desk) -> list[Association]:
    """Return the associations that the proxy has open."""
    return [one for one in at.workstation.layer.associations if one.is_requestor]


async def test_big_endian_is_the_last_resort_of_nobody() -> None:
    """Nothing is ever converted into a syntax that is going out of use."""
    supported = only({CT: [BIG_ENDIAN]})
    async with desk(StandIn(supported=supported)) as at, at.open() as delivery:
        assert await delivery.send(Item(CT, EXPLICIT)) == [Delivered.FAILED]
