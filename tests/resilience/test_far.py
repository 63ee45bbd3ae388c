"""An archive that is far away: round trips are hidden by asking for several lists at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import PROXY_TITLE
from tests.resilience.archive import Archive, at_phase
from tests.resilience.distance import relayed
from tests.resilience.reading import Reading
from tests.resilience.region import Region, assert_true, assert_whole, region, uid_of, uids
from tests.support.datasets import study
from tests.support.stand_in import SECONDS

FAR_SECONDS = 0.015
"""Each way."""

MOVE_AND_GET = pytest.mark.parametrize("retrieve", ["c-move", "c-get"])


@asynccontextmanager
async def far(
    directory: Path, archive: Archive, *others: Archive, **more: Any
) -> AsyncIterator[Region]:
    """Yield a region in which *archive* is far away, to be asked and when it sends."""
    async with (
        relayed(lambda: archive.port, FAR_SECONDS) as there,
        region(directory, archive, *others, distant=there, **more) as here,
        relayed(lambda: here.application.port, FAR_SECONDS) as back,
    ):
        archive.destinations[PROXY_TITLE] = back
        yield here


@MOVE_AND_GET
@pytest.mark.parametrize("ceiling", [2, 4, 8])
async def test_lists_are_fetched_in_parallel(tmp_path: Path, ceiling: int, retrieve: str) -> None:
    """As many retrieves at once as the ceiling allows beside queries, and each instance once."""
    held = study(1, 21)
    north = Archive("NORTH", held)
    keys = {"parallel_associations": ceiling, "retrieve": retrieve}
    all_busy = asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "store":
            if len(north.moving) == ceiling - 1:
                all_busy.set()
            async with asyncio.timeout(SECONDS):
                await all_busy.wait()

    north.at = script
    async with far(tmp_path, north, north=keys) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert set(north.sent.values()) == {1}
        assert north.peak <= ceiling
        assert north.peak_moving == ceiling - 1


async def test_near_archive_is_asked_once(tmp_path: Path) -> None:
    """Where no round trip is to be hidden nothing is gained by lists: one order is the study."""
    held = study(3, 10)
    north = Archive("NORTH", held)
    async with region(tmp_path, north) as here:
        assert_whole(await here.reading.move(uid_of(held)), here.reading, north)

        assert [order.level for order in north.orders] == ["STUDY"]


async def test_ceiling_covers_all_studies_and_queries(tmp_path: Path) -> None:
    """Three studies at once, and queries that are answered while every retrieve is held up."""
    studies = [study(1, 12) for _ in range(3)]
    north = Archive("NORTH", [one for held in studies for one in held])
    readings = [Reading(f"READING{number}") for number in range(1, 5)]
    all_busy, go_on = asyncio.Event(), asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "store":
            if len(north.moving) == 3:
                all_busy.set()
            await go_on.wait()

    north.at = script
    async with far(tmp_path, north, readings=readings) as here, asyncio.TaskGroup() as group:
        moves = [
            group.create_task(reading.move(uid_of(held)))
            for reading, held in zip(readings[:3], studies, strict=True)
        ]
        async with asyncio.timeout(SECONDS):
            await all_busy.wait()
        rows, status = await here.readings[3].find(uid_of(studies[0]))
        assert (len(rows), status) == (1, 0x0000)
        assert not go_on.is_set()
        go_on.set()
        answers = [await move for move in moves]

        assert [(one.status, one.completed) for one in answers] == [(0x0000, 12)] * 3
        assert north.peak <= 4
        assert north.peak_moving == 3
        assert set(north.sent.values()) == {1}


@MOVE_AND_GET
@pytest.mark.parametrize("refused", [{"IMAGE"}, {"IMAGE", "SERIES"}])
async def test_lists_are_refused(tmp_path: Path, refused: set[str], retrieve: str) -> None:
    """It is then asked at the level that it takes, now and for other studies."""
    first, second = study(2, 3), study(2, 3)
    north = Archive("NORTH", [*first, *second])
    north.refuses_move = refused
    async with far(tmp_path, north, north={"retrieve": retrieve}) as here:
        answer = await here.reading.move(uid_of(first))
        assert (answer.status, answer.completed) == (0x0000, 6)
        assert set(north.sent.values()) == {1}
        north.orders.clear()

        answer = await here.reading.move(uid_of(second))

        assert (answer.status, answer.completed) == (0x0000, 6)
        assert not {order.level for order in north.orders} & refused
        assert set(north.sent.values()) == {1}


@MOVE_AND_GET
async def test_one_association_only(tmp_path: Path, retrieve: str) -> None:
    """A far archive that takes no second association gives one list after the other."""
    held = study(2, 3)
    north = Archive("NORTH", held, max_associations=1)
    async with far(tmp_path, north, north={"retrieve": retrieve}) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert north.peak == 1
        assert set(north.sent.values()) == {1}


@MOVE_AND_GET
@pytest.mark.parametrize("holders", [1, 2])
async def test_killed_among_parallel_lists(tmp_path: Path, holders: int, retrieve: str) -> None:
    """What none of the lists brought comes from the next holder, or is failed by its UID."""
    held = study(2, 10)
    north = Archive("NORTH", held)
    others = [Archive("SOUTH", held)][: holders - 1]
    listed, both = 0, asyncio.Event()
    die = at_phase("stored", north.die, times=7)

    async def script(phase: str) -> None:
        nonlocal listed
        if phase == "listed IMAGE":
            listed += 1
            if listed == 2:
                both.set()
        elif phase == "move":
            async with asyncio.timeout(SECONDS):
                await both.wait()
        await die(phase)

    north.at = script
    async with far(tmp_path, north, *others, north={"retrieve": retrieve}) as here:
        await here.reading.find(uid_of(held))
        answer = await here.reading.move(uid_of(held))

        assert north.dead
        if holders == 2:
            assert_whole(answer, here.reading, here.south)
            assert not set(here.south.sent) & set(north.acknowledged)
        else:
            assert_true(answer, here.reading, uids(held))
            assert 7 <= answer.completed < len(held)
