"""A cache at its limit while everybody fetches: its bound is kept, and what is in use stays."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

from dicomproxy.cache.layout import Layout
from dicomproxy.dimse.association import Association
from tests.e2e.support import command
from tests.peers.ports import free_port
from tests.resilience.archive import Archive
from tests.resilience.reading import Reading
from tests.resilience.region import assert_whole, peers, region, uid_of, uids, written
from tests.support.datasets import study
from tests.support.log_watch import LogWatch
from tests.support.stand_in import SECONDS

INSTANCE_BYTES = 128 * 256 * 2
PER_STUDY = 8
LIMIT_BYTES = 5 * PER_STUDY * INSTANCE_BYTES


def stored_bytes(directory: Path) -> int:
    """Return the size of every instance file, those that are being received included."""
    total, layout = 0, Layout(directory)
    # In the order in which they move: what moves meanwhile is not counted twice.
    for folder, _, names in (*os.walk(layout.studies), *os.walk(layout.incoming)):
        for name in names:
            if name.endswith((".dcm", ".part")):
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue  # renamed or deleted just now
    return total


async def test_limit_is_kept_under_load(tmp_path: Path, log_watch: LogWatch) -> None:
    """Three workstations fetch more than fits, twice, while a fourth is slow with one study."""
    used, *others = [study(1, PER_STUDY, rows=128, columns=256) for _ in range(13)]
    north = Archive("NORTH", [one for held in (used, *others) for one in held])
    slow = Reading("READING1")
    quick = [Reading(f"READING{number}") for number in (2, 3, 4)]
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def hold(phase: str, _association: Association) -> None:
        if phase == "instance":
            begun.set()
            await go_on.wait()

    slow.at = hold
    most = 0
    over = asyncio.Event()
    cache = {"max_size": f"{LIMIT_BYTES}B"}
    timers = {"timers": {"response": "600s"}}
    readings = [slow, *quick]
    async with region(tmp_path, north, readings=readings, cache=cache, proxy=timers) as here:
        directory = here.application.settings.cache.directory

        async def watch() -> None:
            nonlocal most
            while not over.is_set():
                most = max(most, await asyncio.to_thread(stored_bytes, directory))

        async def work(reading: Reading, studies: itertools.cycle) -> None:  # type: ignore[type-arg]
            for held in itertools.islice(studies, 2 * len(others) // len(quick)):
                answer = await reading.move(uid_of(held))
                assert (answer.status, answer.completed) == (0x0000, PER_STUDY)
                assert uids(held) <= set(reading.arrived)

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            delivering = group.create_task(slow.move(uid_of(used)))
            async with asyncio.timeout(SECONDS):
                await begun.wait()
            shared = itertools.cycle(others)
            workers = [group.create_task(work(reading, shared)) for reading in quick]
            async with asyncio.timeout(3 * SECONDS):
                await asyncio.wait(workers)
            go_on.set()
            answer = await delivering
            over.set()
            await watching

        stats = here.application.store.stats()
        held_back = uids(used)
        assert (answer.status, set(slow.arrived)) == (0x0000, held_back)
        assert {uid: north.sent[uid] for uid in held_back} == dict.fromkeys(held_back, 1)
        assert stats.evictions > 0
        assert stats.bytes <= LIMIT_BYTES
        assert LIMIT_BYTES // 2 < most <= LIMIT_BYTES
        assert not log_watch.named("instance_damaged")


async def test_more_in_use_than_fits(tmp_path: Path) -> None:
    """Nothing in use goes, and the limit stands: what does not fit is held in memory meanwhile."""
    studies = [study(1, PER_STUDY, rows=128, columns=256) for _ in range(4)]
    north = Archive("NORTH", [one for held in studies for one in held])
    readings = [Reading(f"READING{number}") for number in range(1, 5)]
    fetched = asyncio.Event()

    async def hold(phase: str, _association: Association) -> None:
        if phase == "instance":
            async with asyncio.timeout(SECONDS):
                await fetched.wait()

    async def count(phase: str) -> None:
        if len(north.acknowledged) == 4 * PER_STUDY:
            fetched.set()

    north.at = count
    for reading in readings:
        reading.at = hold
    limit = 2 * PER_STUDY * INSTANCE_BYTES
    async with region(tmp_path, north, readings=readings, cache={"max_size": f"{limit}B"}) as here:
        async with asyncio.TaskGroup() as group:
            moves = [
                group.create_task(reading.move(uid_of(held)))
                for reading, held in zip(readings, studies, strict=True)
            ]
            async with asyncio.timeout(SECONDS):
                await fetched.wait()
            store = here.application.store
            on_disk = await asyncio.to_thread(
                stored_bytes, here.application.settings.cache.directory
            )
            assert on_disk <= limit
            assert store.stats().spooled_bytes > 0

        for move, reading, held in zip(moves, readings, studies, strict=True):
            assert (move.result().status, move.result().completed) == (0x0000, PER_STUDY)
            assert set(reading.arrived) == uids(held)
        assert set(north.sent.values()) == {1}
        assert store.stats().bytes <= limit


async def test_evicted_study_is_fetched_again(tmp_path: Path) -> None:
    """What had to go is whole the next time, too."""
    studies = [study(1, PER_STUDY, rows=128, columns=256) for _ in range(6)]
    north = Archive("NORTH", [one for held in studies for one in held])
    readings = [Reading("READING1"), Reading("READING2")]
    cache = {"max_size": f"{LIMIT_BYTES}B"}
    async with region(tmp_path, north, readings=readings, cache=cache):
        for held in studies:
            assert (await readings[0].move(uid_of(held))).status == 0x0000
        answer = await readings[1].move(uid_of(studies[0]))

        assert (answer.status, set(readings[1].arrived)) == (0x0000, uids(studies[0]))
        assert {north.sent[uid] for uid in uids(studies[0])} == {2}


async def test_directory_belongs_to_one_proxy(tmp_path: Path) -> None:
    """A second one exits with 1 and says why; the first goes on with what it holds."""
    held = study(1, 3)
    north = Archive("NORTH", held)
    async with region(tmp_path, north) as here:
        await here.reading.find(uid_of(held))
        async with peers(tmp_path, [], []) as (_, content):
            content["proxy"]["port"], content["web"]["port"] = free_port(), free_port()
            other = tmp_path / "other"
            other.mkdir()
            config = written(other, content)
            code, output = await command("serve", "--config", str(config), directory=other)

        assert code == 1
        assert "start_failed" in output
        assert "CacheLocked" in output
        assert_whole(await here.reading.move(uid_of(held)), here.reading, north)
