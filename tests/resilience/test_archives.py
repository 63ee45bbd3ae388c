"""Archives that are not as the Standard has them: every study arrives whole all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dicomproxy.dimse.pdu import REJECT_CONGESTION
from dicomproxy.ports import CachedInstance, InstanceReader
from dicomproxy.retrieval.delivery import Ahead
from dicomproxy.retrieval.flight import Flight
from tests.resilience.archive import Archive, Held, at_phase
from tests.resilience.reading import Reading
from tests.resilience.region import assert_true, assert_whole, region, uid_of, uids
from tests.support.datasets import instance, study
from tests.support.log_watch import LogWatch
from tests.support.stand_in import SECONDS
from tests.support.time_passes import time_passes, turns

MOVE_AND_GET = pytest.mark.parametrize("retrieve", ["c-move", "c-get"])


@MOVE_AND_GET
async def test_one_association_only(tmp_path: Path, retrieve: str) -> None:
    """Whoever asks waits for its turn; the archive is never taken for broken."""
    held = study(2, 3)
    north = Archive("NORTH", held, max_associations=1)
    async with region(tmp_path, north, north={"retrieve": retrieve}) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert north.peak == 1
        assert set(north.sent.values()) == {1}


@MOVE_AND_GET
async def test_transient_rejections_are_waited_out(tmp_path: Path, retrieve: str) -> None:
    """An archive that turns every other association away gives all that it has."""
    held = study(2, 3)
    north = Archive("NORTH", held)
    async with region(tmp_path, north, north={"retrieve": retrieve}) as here:
        await here.reading.find(uid_of(held))
        turns = 0

        def every_other() -> object:
            nonlocal turns
            turns += 1
            return REJECT_CONGESTION if turns % 2 else None

        north.admit = every_other  # type: ignore[assignment]
        answer = await here.reading.move(uid_of(held))

        assert turns > 0
        assert_whole(answer, here.reading, north)
        assert set(north.sent.values()) == {1}


@pytest.mark.parametrize(
    "limit",
    [
        lambda archive: setattr(archive, "refuses_lists", True),
        lambda archive: setattr(archive, "refuses_move", {"IMAGE"}),
        lambda archive: setattr(archive, "refuses_move", {"IMAGE", "SERIES"}),
        lambda archive: setattr(archive, "refuses_find", {"IMAGE"}),
        lambda archive: setattr(archive, "refuses_find", {"IMAGE", "SERIES"}),
    ],
    ids=["lists", "image moves", "series moves", "image queries", "series queries"],
)
async def test_refused_levels_are_done_without(
    tmp_path: Path, limit: Callable[[Archive], None]
) -> None:
    """A study of which a part is held is completed at whatever level the archive takes."""
    held = study(2, 4)
    north = Archive("NORTH", held)
    async with region(tmp_path, north, retrieve={"retry_pause": "0s"}) as here:
        # A first retrieve leaves a part: the archive sends no more than three.
        north.choose = lambda wanted: wanted[:3]
        first = await here.reading.move(uid_of(held))
        assert first.status == 0xB000
        assert first.completed == len(here.reading.arrived)
        north.choose = lambda wanted: wanted
        limit(north)
        here.reading.arrived.clear()
        here.reading.times.clear()

        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)


async def test_another_title_that_is_known_to_send(tmp_path: Path) -> None:
    """Instances that come under a title listed in store_from belong to the flight."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    north.sends_as = "NORTHGATE"
    async with region(tmp_path, north, north={"store_from": ["NORTHGATE"]}) as here:
        assert_whole(await here.reading.move(uid_of(held)), here.reading, north)


async def test_another_title_that_is_not(tmp_path: Path) -> None:
    """Instances from a stranger are not taken, and every one of them is reported as failed."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    north.sends_as = "STRANGER"
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert here.reading.arrived == {}


async def test_no_move_originator(tmp_path: Path) -> None:
    """Who sends decides; who asked need not be named."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    north.names_originator = False
    async with region(tmp_path, north) as here:
        assert_whole(await here.reading.move(uid_of(held)), here.reading, north)


@MOVE_AND_GET
async def test_long_silence_before_the_first_instance(tmp_path: Path, retrieve: str) -> None:
    """A tape may be fetched: until something has come, patience is the longer one."""
    held = study(1, 3)
    north = Archive("NORTH", held)

    async def tape() -> None:
        time_passes(11)
        await turns(10)  # whatever is due is done

    north.at = at_phase("store", tape)
    timeouts = {"stall_timeout": "10s", "first_instance_timeout": "40s", "retrieve": retrieve}
    async with region(tmp_path, north, north=timeouts) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert len(north.orders) == 1


async def test_tape_while_another_study_streams(tmp_path: Path) -> None:
    """What arrives of one study does not begin another that is still on tape."""
    quick, slow = study(1, 4), study(1, 2)
    north = Archive("NORTH", [*quick, *slow])
    asked, streamed = asyncio.Event(), asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "move" and north.orders[-1].study == uid_of(slow):
            asked.set()
            await streamed.wait()
            time_passes(11)
            await turns(10)  # whatever is due is done
        elif phase == "move":
            async with asyncio.timeout(SECONDS):
                await asked.wait()

    north.at = script
    readings = [Reading("READING1"), Reading("READING2")]
    timeouts = {"stall_timeout": "10s", "first_instance_timeout": "40s"}
    async with region(tmp_path, north, readings=readings, north=timeouts):
        async with asyncio.TaskGroup() as group:
            first = group.create_task(readings[0].move(uid_of(quick)))
            second = group.create_task(readings[1].move(uid_of(slow)))
            assert (await first).completed == 4
            streamed.set()

        assert (second.result().status, second.result().completed) == (0x0000, 2)
        assert len(north.orders) == 2


@MOVE_AND_GET
async def test_first_instance_that_never_comes(tmp_path: Path, retrieve: str) -> None:
    """The longer patience has an end too; what was listed is then reported as failed."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    never, listed = asyncio.Event(), asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "store":
            async with asyncio.timeout(SECONDS):
                await listed.wait()
            time_passes(21)
            await never.wait()
        elif phase == "listed IMAGE":
            listed.set()

    north.at = script
    timeouts = {
        "first_instance_timeout": "20s",
        "stall_timeout": "10s",
        "retrieve": retrieve,
    }
    async with region(tmp_path, north, north=timeouts) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert here.reading.arrived == {}
        never.set()


@MOVE_AND_GET
async def test_stall_after_the_first_instance(tmp_path: Path, retrieve: str) -> None:
    """Once something has come the shorter patience counts, of a second attempt too."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    north.sends_pending = False
    ended, listed = asyncio.Event(), asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "listed IMAGE":
            listed.set()
        elif phase == "store" and len(north.acknowledged) == 2:
            async with asyncio.timeout(SECONDS):
                await listed.wait()
            time_passes(11)
            await ended.wait()

    north.at = script
    timeouts = {"stall_timeout": "10s", "first_instance_timeout": "300s", "retrieve": retrieve}
    async with region(tmp_path, north, north=timeouts) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert answer.completed == 2
        assert len(north.orders) == 2
        ended.set()


@MOVE_AND_GET
async def test_unchanged_pending_for_ever(
    tmp_path: Path, retrieve: str, log_watch: LogWatch
) -> None:
    """Responses that say nothing new are no sign of life: the order is given up and cancelled."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    ended, listed = asyncio.Event(), asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "listed IMAGE":
            listed.set()
        elif phase == "store" and len(north.acknowledged) == 2:
            async with asyncio.timeout(SECONDS):
                await listed.wait()
            for _ in range(11):
                await north.repeat_pending()
                await asyncio.sleep(0.01)
                time_passes(1)
            while not ended.is_set():
                await north.repeat_pending()
                await asyncio.sleep(0.01)

    north.at = script
    timeouts = {"stall_timeout": "10s", "first_instance_timeout": "10s", "retrieve": retrieve}
    async with region(tmp_path, north, north=timeouts) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert answer.completed == 2
        assert north.repeated > 5
        assert log_watch.named("flight_incomplete")[0]["failure"] == "timeout"
        ended.set()


@pytest.mark.parametrize(
    "lie",
    [
        lambda true: (0, 0, 0),
        lambda true: (1, 999, 0),
        lambda true: (999, true[1], true[2]),
        lambda true: (true[0], 0, true[1]),
    ],
    ids=["nothing", "too many", "never ready", "all failed"],
)
async def test_counts_that_lie(
    tmp_path: Path, lie: Callable[[tuple[int, int, int]], tuple[int, int, int]]
) -> None:
    """What has arrived is counted, whatever the archive says of it."""
    held = study(2, 3)
    north = Archive("NORTH", held)
    north.counts = lie
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert set(north.sent.values()) == {1}


async def test_success_that_is_none(tmp_path: Path) -> None:
    """An archive that sends a part and says Success of everything is not believed."""
    held = study(1, 5)
    north = Archive("NORTH", held)
    kept = str(held[3].SOPInstanceUID)
    north.choose = lambda wanted: [one for one in wanted if one.uid != kept]
    north.counts = lambda true: (true[0], true[1] + 1, 0)
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert answer.listed == (kept,)


async def test_failure_that_is_none(tmp_path: Path) -> None:
    """A final status of failure does not undo what has arrived."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    north.final_status = 0xC000
    async with region(tmp_path, north) as here:
        assert_whole(await here.reading.move(uid_of(held)), here.reading, north)


async def test_study_that_grows_while_it_is_fetched(tmp_path: Path) -> None:
    """Of a study of today what came meanwhile is fetched too, and nothing twice."""
    today = datetime.now(UTC).astimezone().strftime("%Y%m%d")
    held = study(1, 4, StudyDate=today)
    north = Archive("NORTH", held[:2])

    listed = asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "listed IMAGE":
            listed.set()
        elif phase == "move":
            async with asyncio.timeout(SECONDS):
                await listed.wait()
        elif phase == "store" and len(north.acknowledged) == 1:
            north.held.update({str(one.SOPInstanceUID): Held(one) for one in held[2:]})

    north.at = script
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert len(north.held) == 4
        assert set(north.sent.values()) == {1}


async def test_study_that_shrinks_between_two_retrieves(tmp_path: Path) -> None:
    """What its archive no longer lists leaves the cache, and nothing is fetched for it."""
    held = study(1, 4)
    north = Archive("NORTH", held)
    readings = [Reading(f"READING{number}") for number in (1, 2, 3)]
    async with region(tmp_path, north, readings=readings):
        first, second, third = readings
        await first.move(uid_of(held))
        del north.held[str(held[0].SOPInstanceUID)]

        # The listing is asked for while what is cached goes out already.
        meanwhile = await second.move(uid_of(held))
        after = await third.move(uid_of(held))

        assert (meanwhile.status, meanwhile.completed) == (0x0000, len(second.arrived))
        assert_whole(after, third, north)
        assert north.sent.total() == 4


@pytest.mark.parametrize("holders", [1, 2])
async def test_study_that_shrinks_as_it_is_delivered(
    tmp_path: Path, holders: int, log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dropped in its turn is nobody's failure; another holder that has it gives it."""
    held = study(1, 4)
    gone = str(held[0].SOPInstanceUID)
    north, others = Archive("NORTH", held), [Archive("SOUTH", held)][: holders - 1]
    readings = [Reading(f"READING{number}") for number in (1, 2)]
    dropped = asyncio.Event()
    remove, opening = Flight.remove, Ahead.open

    async def removed(self: Flight, sop_instance_uids: list[str]) -> None:
        await remove(self, sop_instance_uids)
        dropped.set()

    async def open_late(self: Ahead, one: CachedInstance) -> InstanceReader:
        if one.sop_instance_uid == gone and north.held.keys() != uids(held):
            async with asyncio.timeout(SECONDS):
                await dropped.wait()
        return await opening(self, one)

    monkeypatch.setattr(Flight, "remove", removed)
    monkeypatch.setattr(Ahead, "open", open_late)
    async with region(tmp_path, north, *others, readings=readings):
        await readings[0].find(uid_of(held))
        await readings[0].move(uid_of(held))
        del north.held[gone]

        answer = await readings[1].move(uid_of(held))

        assert_whole(answer, readings[1], others[0] if others else north)
        assert [set(one.sent) for one in others] == [{gone}][: holders - 1]
        assert not log_watch.named("instance_damaged")


async def test_study_that_shrinks_while_it_is_fetched(tmp_path: Path) -> None:
    """What was listed and is deleted before it is sent is reported as failed, by its UID."""
    held = study(1, 4)
    gone = str(held[3].SOPInstanceUID)
    north = Archive("NORTH", held)
    listed = asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "listed IMAGE":
            listed.set()
        elif phase == "move":
            async with asyncio.timeout(SECONDS):
                await listed.wait()
            north.held.pop(gone, None)

    north.at = script
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids(held))
        assert answer.listed == (gone,)


@MOVE_AND_GET
@pytest.mark.parametrize("foreign", ["study", "patient"])
async def test_foreign_instance_in_between(
    tmp_path: Path, foreign: str, retrieve: str, log_watch: LogWatch
) -> None:
    """An instance of another study or patient is not taken, and the rest is none the worse."""
    held = study(1, 3)
    if foreign == "study":
        alien = instance(99)
    else:
        alien = instance(99, study_instance_uid=uid_of(held), PatientID="SENTINELID4711-2")
    north = Archive("NORTH", held)
    north.choose = lambda wanted: [*wanted[:1], Held(alien), *wanted[1:]]
    async with region(tmp_path, north, north={"retrieve": retrieve}) as here:
        answer = await here.reading.move(uid_of(held))

        assert_whole(answer, here.reading, north)
        assert str(alien.SOPInstanceUID) in north.refused
        assert log_watch.named("identity_conflict")


async def test_listed_instance_of_another_patient(tmp_path: Path) -> None:
    """One that is listed in the study, and whose header contradicts, is failed by its UID."""
    held = study(1, 3)
    alien = instance(
        99,
        study_instance_uid=uid_of(held),
        series_instance_uid=str(held[0].SeriesInstanceUID),
        PatientID="SENTINELID4711-2",
    )
    north = Archive("NORTH", [*held, alien])
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held))

        assert_true(answer, here.reading, uids([*held, alien]))
        assert answer.listed == (str(alien.SOPInstanceUID),)


async def test_cancel_reaches_the_archive(tmp_path: Path) -> None:
    """A workstation that thinks better of it ends the fetching too."""
    held = study(1, 6)
    north = Archive("NORTH", held)
    wanted, go_on = asyncio.Event(), asyncio.Event()

    async def script(phase: str) -> None:
        if phase == "stored" and len(north.acknowledged) == 2:
            wanted.set()
            await go_on.wait()

    north.at = script
    async with region(tmp_path, north) as here:
        answer = await here.reading.move(uid_of(held), cancelled=wanted)
        assert answer.status == 0xFE00
        assert answer.completed == len(here.reading.arrived)
        go_on.set()

    assert north.cancels == 1
    assert sum(north.sent.values()) <= 3
