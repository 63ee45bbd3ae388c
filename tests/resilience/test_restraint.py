"""Failures are not paid for again and again by the source that had them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from dicomproxy.dimse import pool
from dicomproxy.dimse.pdu import REJECT_CONGESTION, AssociateReject
from tests.resilience.archive import Archive
from tests.resilience.reading import Reading
from tests.resilience.region import assert_true, assert_whole, region, uid_of, uids
from tests.support.datasets import study
from tests.support.time_passes import time_passes


@pytest.mark.parametrize("sends", [0, 2])
async def test_retry_storm(tmp_path: Path, sends: int) -> None:
    """A workstation that repeats a failing retrieve is answered the same at no cost to anyone."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    north.lost = uids(held[sends:])
    readings = [Reading(f"READING{number}") for number in range(1, 7)]
    async with region(tmp_path, north, readings=readings):
        first = await readings[0].move(uid_of(held))
        assert_true(first, readings[0], uids(held))
        assert first.completed == sends
        cost = north.requests, len(north.orders), len(north.questions), north.sent.total()

        for reading in readings[1:]:
            answer = await reading.move(uid_of(held))

            assert_true(answer, reading, uids(held))
            assert answer.completed == sends
        assert cost == (
            north.requests,
            len(north.orders),
            len(north.questions),
            north.sent.total(),
        )


async def test_storm_of_many_at_once(tmp_path: Path) -> None:
    """Twenty at the same moment cost no more than one, and each is told the truth."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    lost = str(held[2].SOPInstanceUID)
    north.lost = {lost}
    readings = [Reading(f"READING{number}") for number in range(20)]
    async with region(tmp_path, north, readings=readings):
        async with asyncio.TaskGroup() as group:
            moves = [group.create_task(reading.move(uid_of(held))) for reading in readings]

        for move, reading in zip(moves, readings, strict=True):
            assert_true(move.result(), reading, uids(held))
            assert move.result().listed == (lost,)
        assert set(north.sent.values()) == {1}
        tries = [one for one in north.orders if one.level != "IMAGE" or lost in one.instances]
        assert len(tries) == 2


async def test_after_the_pause_it_is_tried_again(tmp_path: Path) -> None:
    """Only what is missing is asked for then, and an archive that has recovered completes it."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    north.lost = uids(held[2:])
    readings = [Reading("READING1"), Reading("READING2")]
    async with region(tmp_path, north, readings=readings, retrieve={"retry_pause": "10s"}):
        answer = await readings[0].move(uid_of(held))
        assert (answer.status, answer.completed) == (0xB000, 2)
        north.lost = ()
        time_passes(10)

        assert_whole(await readings[1].move(uid_of(held)), readings[1], north)
        assert set(north.sent.values()) == {1}


async def test_an_open_breaker_is_probed_for_a_person(tmp_path: Path) -> None:
    """An archive that is back serves the first retrieve, though queries had given it up."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    failing = True

    async def script(phase: str) -> None:
        if failing and phase == "associate":
            north.hang_up()

    keys = {"breaker": {"failures": 2, "pause": "60s"}}
    async with region(tmp_path, north, north=keys) as here:
        await here.reading.find(uid_of(held))
        north.hang_up()
        north.at = script
        for _ in range(3):
            await here.reading.find(uid_of(held))
        asked = north.requests
        await here.reading.find(uid_of(held))
        assert north.requests == asked  # given up: not even asked
        failing = False

        assert_whole(await here.reading.move(uid_of(held)), here.reading, north)


async def test_transient_rejections_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that is busy for a moment, and not with us, is waited for."""
    monkeypatch.setattr(pool, "_BUSY_PAUSE_SECONDS", 0.02)
    held = study(1, 3)
    north = Archive("NORTH", held)
    async with region(tmp_path, north) as here:
        await here.reading.find(uid_of(held))
        north.hang_up()
        asked = 0

        def busy() -> AssociateReject | None:
            nonlocal asked
            asked += 1
            return REJECT_CONGESTION if asked <= 6 else None

        north.admit = busy
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)


@pytest.mark.parametrize("located", [True, False], ids=["located", "not located"])
@pytest.mark.parametrize("how", ["hangs up", "rejects", "refuses", "silent"])
async def test_retry_storm_against_one_that_is_down(
    tmp_path: Path, how: str, located: bool
) -> None:
    """A source that is not well is not bothered again by those who repeat themselves."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    readings = [Reading(f"READING{number}") for number in range(1, 7)]
    over = asyncio.Event()

    async def script(phase: str) -> None:
        if how == "hangs up" and phase == "associate":
            north.hang_up()
        if how == "silent":
            time_passes(11)
            await over.wait()

    deadlines = ("query_timeout", "first_instance_timeout", "connect_timeout")
    keys = dict.fromkeys(deadlines, "10s")
    async with region(tmp_path, north, readings=readings, north=keys) as here:
        if located:
            await here.reading.find(uid_of(held))
            north.hang_up()
        north.at = script
        if how == "rejects":
            north.admit = lambda: AssociateReject(1, 1, 1)
        elif how == "refuses":
            north.refuses_find = {"STUDY", "SERIES", "IMAGE"}
            north.refuses_move = {"STUDY", "SERIES", "IMAGE"}
        first = replace(await readings[0].move(uid_of(held)), pending=())
        assert first.status in (0xA701, 0xA702)
        cost = north.requests, len(north.orders), len(north.questions)

        for reading in readings[1:]:
            assert replace(await reading.move(uid_of(held)), pending=()) == first

        assert cost == (north.requests, len(north.orders), len(north.questions))
        over.set()


async def test_a_study_that_could_not_be_located_is_looked_for_again(tmp_path: Path) -> None:
    """After the pause its source is asked once more; other studies are not concerned."""
    held, other = study(1, 3), study(1, 2)
    north = Archive("NORTH", [*held, *other])
    readings = [Reading(f"READING{number}") for number in range(1, 4)]
    pause = {"retry_pause": "10s"}
    async with region(tmp_path, north, readings=readings, retrieve=pause):
        north.refuses_find = {"STUDY"}
        assert (await readings[0].move(uid_of(held))).status == 0xA701
        north.refuses_find = ()

        assert (await readings[1].move(uid_of(other))).status == 0x0000
        time_passes(10)
        answer = await readings[2].move(uid_of(held))
        assert (answer.status, set(readings[2].arrived)) == (0x0000, uids(held))
