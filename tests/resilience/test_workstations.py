"""Workstations that stall, refuse or vanish: their neighbours notice nothing, none is lied to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.destinations import workstation as destinations
from dicomproxy.dimse.association import Association
from dicomproxy.dimse.pdu import REJECT_CONGESTION, AssociateReject
from tests.resilience.archive import Archive
from tests.resilience.reading import Reading
from tests.resilience.region import assert_true, assert_whole, region, uid_of, uids
from tests.support.datasets import instance, study
from tests.support.stand_in import SECONDS
from tests.support.time_passes import time_passes, turns

MR = "1.2.840.10008.5.1.4.1.1.4"


async def test_one_that_stops_reading(tmp_path: Path) -> None:
    """Its delivery ends by itself and says what is missing; another gets the study meanwhile."""
    held = study(1, 3, rows=2048, columns=2048)
    north = Archive("NORTH", held)
    stuck, other = Reading("READING1"), Reading("READING2")
    paused: set[Association] = set()
    served = asyncio.Event()

    async def pause(_phase: str, association: Association) -> None:
        association.protocol.pause()
        paused.add(association)
        if served.is_set():
            await turns(100)  # what it is sent does not fit into what the kernel holds
            time_passes(21)

    stuck.at = pause
    timers = {"timers": {"stall": "20s", "response": "60s"}}
    async with (
        region(tmp_path, north, readings=[stuck, other], proxy=timers),
        asyncio.TaskGroup() as group,
    ):
        moving = group.create_task(stuck.move(uid_of(held)))
        async with asyncio.timeout(SECONDS):
            while not paused:  # noqa: ASYNC110  (set by the association, which has no event)
                await asyncio.sleep(0)
        answer = await other.move(uid_of(held))
        assert not moving.done()
        assert_whole(answer, other, north)

        served.set()
        time_passes(21)
        answer = await moving
        assert (answer.status, answer.completed, answer.failed) == (0xA702, 0, len(held))
        assert set(answer.listed) == uids(held)
        assert set(north.sent.values()) == {1}
        for association in paused:
            association.protocol.close_now()


async def test_one_that_does_not_answer(tmp_path: Path) -> None:
    """The same, where it has read everything and says nothing."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    mute, other = Reading("READING1"), Reading("READING2")
    asked, over = asyncio.Event(), asyncio.Event()

    async def say_nothing(phase: str, _association: Association) -> None:
        if phase == "instance":
            if asked.is_set():
                time_passes(21)
            asked.set()
            await over.wait()

    mute.at = say_nothing
    timers = {"timers": {"response": "20s"}}
    async with (
        region(tmp_path, north, readings=[mute, other], proxy=timers),
        asyncio.TaskGroup() as group,
    ):
        moving = group.create_task(mute.move(uid_of(held)))
        async with asyncio.timeout(SECONDS):
            await asked.wait()
        assert_whole(await other.move(uid_of(held)), other, north)

        time_passes(21)
        answer = await moving
        assert (answer.status, answer.completed, answer.failed) == (0xA702, 0, len(held))
        over.set()


async def test_one_that_takes_one_association_only(tmp_path: Path) -> None:
    """What needs a second one takes turns with the first, and all of it arrives."""
    held = study(2, 2)
    study_uid = uid_of(held)
    others = [
        instance(number, study_instance_uid=study_uid, sop_class_uid=MR, Modality="MR")
        for number in (1, 2)
    ]
    everything = [held[0], others[0], *held[1:], others[1]]
    north = Archive("NORTH", everything)
    single = Reading("READING1", max_associations=1)
    async with region(tmp_path, north, readings=[single]):
        answer = await single.move(study_uid)

        assert_whole(answer, single, north)
        assert single.peak == 1
        assert single.requests > 1


async def test_one_that_takes_one_association_only_from_us_or_from_the_local_pacs(
    tmp_path: Path,
) -> None:
    """Local and remote studies of one request arrive, though the local PACS was turned away."""
    at_local, at_north = study(1, 2), study(1, 3)
    north, single = Archive("NORTH", at_north), Reading("READING1")
    kept_out = asyncio.Event()

    def one_at_a_time() -> AssociateReject | None:
        if not single.open:
            return None
        kept_out.set()
        return REJECT_CONGESTION

    async def keep_it_out(phase: str, _association: Association) -> None:
        if phase == "instance":
            await kept_out.wait()

    async def after_us(phase: str) -> None:
        if phase == "move" and not kept_out.is_set():
            async with asyncio.timeout(SECONDS):
                while not single.open:  # noqa: ASYNC110  (it has no event)
                    await asyncio.sleep(0)

    single.admit, single.at = one_at_a_time, keep_it_out
    async with region(tmp_path, north, readings=[single]) as here:
        here.local.held = Archive("", at_local).held
        here.local.destinations["READING1"] = single.port
        here.local.at = after_us
        answer = await single.move(f"{uid_of(at_local)}\\{uid_of(at_north)}")

        assert_whole(answer, single, north, here.local)
        assert single.peak == 1
        assert len(here.local.orders) == 2


async def test_one_that_rejects_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again until it accepts; meanwhile another has had the study."""
    monkeypatch.setattr(destinations, "_RETRY_PAUSE_SECONDS", 0.02)
    held = study(1, 3)
    north = Archive("NORTH", held)
    busy, other = Reading("READING1"), Reading("READING2")
    rejected, ready = asyncio.Event(), asyncio.Event()

    def turn_away() -> AssociateReject | None:
        rejected.set()
        return None if ready.is_set() else REJECT_CONGESTION

    busy.admit = turn_away
    async with (
        region(tmp_path, north, readings=[busy, other]),
        asyncio.TaskGroup() as group,
    ):
        moving = group.create_task(busy.move(uid_of(held)))
        async with asyncio.timeout(SECONDS):
            await rejected.wait()
        assert_whole(await other.move(uid_of(held)), other, north)
        assert not moving.done()
        ready.set()

        assert_whole(await moving, busy, north)
        assert set(north.sent.values()) == {1}


class _Clock:
    """Stands in for asyncio where a pause is to pass in no time, and be counted."""

    def __init__(self) -> None:
        self.now = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def get_running_loop(self) -> _Clock:
        return self

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize("busy_seconds", [20, 40])
async def test_one_that_rejects_for_twenty_seconds(
    tmp_path: Path, busy_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As configured by default it is waited for; one that is busy for longer is told so."""
    clock = _Clock()
    monkeypatch.setattr(destinations, "asyncio", clock)
    held = study(1, 3)
    north = Archive("NORTH", held)
    busy, other = Reading("READING1"), Reading("READING2")
    busy.admit = lambda: REJECT_CONGESTION if clock.now < busy_seconds else None
    async with region(tmp_path, north, readings=[busy, other]):
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(busy.move(uid_of(held)))
            served = group.create_task(other.move(uid_of(held)))

        assert_whole(served.result(), other, north)
        assert other.requests == 1
        if busy_seconds < 30:
            assert_whole(waiting.result(), busy, north)
        else:
            assert_true(waiting.result(), busy, uids(held))
            assert 20 < clock.now <= 30
        assert set(north.sent.values()) == {1}


@pytest.mark.parametrize("leaves", [1, 2])
async def test_one_that_goes_away(tmp_path: Path, leaves: int) -> None:
    """It gets the rest if it is back at once; gone twice, the rest is failed by its UID."""
    held = study(1, 5)
    north = Archive("NORTH", held)
    leaving, other = Reading("READING1"), Reading("READING2")
    left = 0

    async def leave(phase: str, association: Association) -> None:
        nonlocal left
        if phase == "instance" and len(leaving.arrived) == left + 1 and left < leaves:
            left += 1
            association.protocol.close_now()
            await association.receive(SECONDS)  # raises: it is over

    leaving.at = leave
    async with region(tmp_path, north, readings=[leaving, other]) as here:
        async with asyncio.TaskGroup() as group:
            moving = group.create_task(leaving.move(uid_of(held)))
            bystander = group.create_task(other.move(uid_of(held)))

        assert_whole(bystander.result(), other, north)
        if leaves == 1:
            assert_whole(moving.result(), leaving, north)
        else:
            assert_true(moving.result(), leaving, uids(held))
            assert moving.result().completed == 2
        assert set(north.sent.values()) == {1}
        assert here.reading.requests == 2


async def test_one_that_accepts_nothing(tmp_path: Path) -> None:
    """Every instance is failed, by its UID; another is delivered the same ones."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    choosy, other = Reading("READING1"), Reading("READING2")
    choosy.supported = lambda _uid: None
    async with region(tmp_path, north, readings=[choosy, other]):
        async with asyncio.TaskGroup() as group:
            refused = group.create_task(choosy.move(uid_of(held)))
            taken = group.create_task(other.move(uid_of(held)))

        assert_true(refused.result(), choosy, uids(held))
        assert choosy.arrived == {}
        assert_whole(taken.result(), other, north)


async def test_one_that_is_not_there(tmp_path: Path) -> None:
    """Nothing is delivered and nothing is claimed; another gets the study."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    absent, other = Reading("READING1"), Reading("READING2")
    async with region(tmp_path, north, readings=[absent, other]):
        absent._listener._server.close()  # type: ignore[union-attr]
        async with asyncio.TaskGroup() as group:
            refused = group.create_task(absent.move(uid_of(held)))
            taken = group.create_task(other.move(uid_of(held)))

        assert refused.result().status == 0xA702
        assert refused.result().completed == 0
        assert_whole(taken.result(), other, north)
