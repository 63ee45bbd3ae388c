"""Several archives that hold a study: who gives what, and whose content counts.

What one cannot give comes from the next; what they hold differently is had from
the first in order of precedence, the local PACS before all others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydicom import Dataset

from tests.resilience.archive import Archive, Held
from tests.resilience.reading import Reading
from tests.resilience.region import assert_true, assert_whole, region, uid_of, uids
from tests.support.datasets import study
from tests.support.log_watch import LogWatch


def _differing(held: Sequence[Dataset]) -> list[Dataset]:
    """Return the same instances with other pixels."""
    made = copy.deepcopy(list(held))
    for one in made:
        one.PixelData = bytes(255 - byte for byte in one.PixelData)
    return made


@pytest.mark.parametrize("first", ["local", "north"])
async def test_first_in_order_wins_a_conflict(
    tmp_path: Path, first: str, log_watch: LogWatch
) -> None:
    """What a later holder sends of an instance that is here already is logged and not taken."""
    held = study(1, 4)
    theirs, rest = _differing(held[:2]), held[2:]
    # The later one gives only all that it has, so that what differs comes too.
    later = Archive("NORTH" if first == "local" else "SOUTH", [*theirs, *rest])
    later.refuses_lists = True
    later.refuses_move = {"IMAGE", "SERIES"}
    archives = [later] if first == "local" else [Archive("NORTH", held[:2]), later]
    async with region(tmp_path, *archives, local={"deliver": "proxy"}) as here:
        if first == "local":
            here.local.held = {str(one.SOPInstanceUID): Held(one) for one in held[:2]}
            here.local.destinations = dict(later.destinations)
        await here.reading.find(uid_of(held))

        answer = await here.reading.move(uid_of(held))

        assert (answer.status, answer.completed, answer.failed) == (0x0000, 4, 0)
        assert here.reading.arrived == {str(one.SOPInstanceUID): Held(one).data for one in held}
        assert set(here.reading.times.values()) == {1}
        conflicts = log_watch.named("instance_conflict")
        assert {entry["sop_instance_uid"] for entry in conflicts} == uids(theirs)
        assert {entry["holder"] for entry in conflicts} == {first}
        assert {entry["source"] for entry in conflicts} == {later.title.lower()}


async def test_only_what_a_study_has_grown_by_travels(tmp_path: Path) -> None:
    """Opened again a study that has grown is topped up, whoever asks and whoever holds more."""
    held = study(2, 4)
    north, south = Archive("NORTH", held[:3]), Archive("SOUTH", held[:3])
    readings = [Reading(f"READING{number}") for number in (1, 2, 3)]
    retrieve = {"retry_pause": "0s"}
    async with region(tmp_path, north, south, readings=readings, retrieve=retrieve):
        await readings[0].find(uid_of(held))
        assert_whole(await readings[0].move(uid_of(held)), readings[0], north)
        north.held = Archive("NORTH", held[:5]).held
        assert_whole(await readings[1].move(uid_of(held)), readings[1], north)
        south.held = Archive("SOUTH", held).held

        assert_whole(await readings[2].move(uid_of(held)), readings[2], south)
        assert (set(north.sent), set(south.sent)) == (uids(held[:5]), uids(held[5:]))
        assert {*north.sent.values(), *south.sent.values()} == {1}


async def test_each_gives_what_the_other_lost(tmp_path: Path) -> None:
    """Two archives with gaps of their own make one whole study; a gap of both is told."""
    held = study(1, 6)
    north, south = Archive("NORTH", held), Archive("SOUTH", held)
    north.lost, south.lost = uids(held[2:5]), uids(held[4:])
    async with region(tmp_path, north, south) as here:
        await here.reading.find(uid_of(held))
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert answer.listed == (str(held[4].SOPInstanceUID),)
        assert set(south.sent) == uids(held[2:4])


async def test_cached_study_whose_archive_is_gone(tmp_path: Path, log_watch: LogWatch) -> None:
    """It is delivered, and that nobody could be asked whether it is still right is logged."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    readings = [Reading("READING1"), Reading("READING2")]
    async with region(tmp_path, north, readings=readings):
        assert (await readings[0].move(uid_of(held))).status == 0x0000
        north.vanish()

        assert_whole(await readings[1].move(uid_of(held)), readings[1], north)
        (entry,) = log_watch.named("manifest_unverified")
        assert (entry["source"], entry["reason"]) == ("north", "unreachable")


async def test_partly_cached_study_whose_archive_is_gone(tmp_path: Path) -> None:
    """A part is never passed off as the whole."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    readings = [Reading("READING1"), Reading("READING2")]
    retrieve = {"retry_pause": "0s"}
    async with region(tmp_path, north, readings=readings, retrieve=retrieve):
        north.lost = uids(held[2:])
        assert (await readings[0].move(uid_of(held))).status == 0xB000
        north.vanish()

        answer = await readings[1].move(uid_of(held))

        assert answer.status != 0x0000
        assert answer.completed == len(readings[1].arrived)
