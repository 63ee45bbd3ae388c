"""A source that is killed, or falls silent, at each point of the exchange.

Whatever the point: the rest comes from another holder if there is one; else the
workstation is told what it has got and what it has not, to the instance. Nothing
hangs, and nothing is reported that did not happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.resilience.archive import Archive
from tests.resilience.region import assert_true, assert_whole, region, uid_of, uids
from tests.support.datasets import study
from tests.support.stand_in import SECONDS
from tests.support.time_passes import time_passes, turns

BEFORE_THE_MANIFEST = ("connect", "associate", "find")
AFTER_THE_MANIFEST = ("move", "between", "middle", "final")
PHASES = (*BEFORE_THE_MANIFEST, *AFTER_THE_MANIFEST)

Action = Callable[[], Awaitable[None] | None]


def fate(
    archive: Archive, point: str, action: Action, *, patience_seconds: float = 0.0
) -> Callable[[str], Awaitable[None]]:
    """Return a script that does *action* at *point*; the manifest is given out first, or never.

    Who waits for an order that is never served waits no longer than *patience_seconds*.
    """
    listed = asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "listed IMAGE":
            listed.set()
        elif phase == "move" and point in AFTER_THE_MANIFEST:
            async with asyncio.timeout(SECONDS):
                await listed.wait()
        elif phase == "move":
            time_passes(patience_seconds)
            await asyncio.Event().wait()  # until the association is over
        stored = len(archive.acknowledged)
        reached = {
            "associate": phase == "associate",
            "find": phase == "row",
            "move": phase == "move",
            "between": phase == "store" and stored >= 2,
            "middle": phase == "middle" and stored >= 2,
            "final": phase == "final",
        }
        if reached.get(point) and (awaitable := action()) is not None:
            await awaitable

    return script


@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
@pytest.mark.parametrize("holders", [1, 2])
@pytest.mark.parametrize("point", PHASES)
async def test_killed(tmp_path: Path, point: str, holders: int, retrieve: str) -> None:
    """A killed source is left at once, for the next holder or for good."""
    held = study(1, 5, rows=700, columns=512)
    north = Archive("NORTH", held)
    archives = [north, Archive("SOUTH", held)][:holders]
    sources: dict[str, Any] = {"north": {"retrieve": retrieve}, "south": {"retrieve": retrieve}}
    async with region(tmp_path, *archives, **dict(list(sources.items())[:holders])) as here:
        await here.reading.find(uid_of(held))
        if point == "connect":
            north.vanish()
        elif point == "associate":
            north.hang_up()
        north.at = fate(north, point, north.die)

        answer = await here.reading.move(uid_of(held))

        assert north.dead
        if holders == 2:
            assert_whole(answer, here.reading, here.south)
            assert set(here.south.sent) == uids(held) - set(north.acknowledged)
        elif point in BEFORE_THE_MANIFEST:
            assert (answer.completed, answer.failed, answer.listed) == (0, 0, ())
            assert answer.status in (0xA701, 0xA702)
            assert here.reading.arrived == {}
        else:
            assert_true(answer, here.reading, uids(held))
            # One that was whole when the connection broke may have been stored, unacknowledged.
            assert len(north.acknowledged) <= answer.completed <= len(north.sent)
            assert (
                len(north.acknowledged) >= {"move": 0, "between": 2, "middle": 2, "final": 5}[point]
            )
            assert (answer.completed == 0) is (point == "move")


@pytest.mark.parametrize("holders", [1, 2])
@pytest.mark.parametrize("point", PHASES[1:])
async def test_silent(tmp_path: Path, point: str, holders: int) -> None:
    """A source that says nothing more is given up when its time is over, and no later."""
    held = study(1, 5, rows=700, columns=512)
    north = Archive("NORTH", held)
    archives = [north, Archive("SOUTH", held)][:holders]
    over = asyncio.Event()
    patience = {"first_instance_timeout": "10s", "stall_timeout": "10s"}
    if point in BEFORE_THE_MANIFEST:
        patience["query_timeout"] = "10s"
    async with region(tmp_path, *archives, north=patience) as here:
        await here.reading.find(uid_of(held))
        if point == "associate":
            north.hang_up()

        async def silence() -> None:
            await turns(20)  # what was sent arrives before that
            time_passes(11)
            await over.wait()

        north.at = fate(north, point, silence, patience_seconds=11)
        answer = await here.reading.move(uid_of(held))

        if holders == 2:
            assert_whole(answer, here.reading, here.south)
            assert set(here.south.sent) == uids(held) - set(north.acknowledged)
        elif point in BEFORE_THE_MANIFEST:
            assert (answer.completed, answer.failed, answer.listed) == (0, 0, ())
            assert answer.status in (0xA701, 0xA702)
        else:
            assert_true(answer, here.reading, uids(held))
            # One that was whole when the connection broke may have been stored, unacknowledged.
            assert len(north.acknowledged) <= answer.completed <= len(north.sent)
            assert (
                len(north.acknowledged) >= {"move": 0, "between": 2, "middle": 2, "final": 5}[point]
            )
            assert (answer.completed == 0) is (point == "move")
        over.set()


async def test_killed_and_back(tmp_path: Path) -> None:
    """A later retrieve fetches from an archive that is back only what it had not given."""
    held = study(1, 5, rows=700, columns=512)
    north = Archive("NORTH", held)
    again = Archive("NORTH", held)
    async with region(tmp_path, north, retrieve={"retry_pause": "0s"}) as here:
        await here.reading.find(uid_of(held))
        north.at = fate(north, "middle", north.die)
        assert (await here.reading.move(uid_of(held))).status == 0xB000
        here.reading.arrived.clear()
        here.reading.times.clear()
        again.destinations = north.destinations
        await again.start(north.port)
        try:
            answer = await here.reading.move(uid_of(held))
        finally:
            await again.stop()

    assert_whole(answer, here.reading, again)
    assert set(again.sent) == uids(held) - set(north.acknowledged)
