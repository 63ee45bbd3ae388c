"""Flights over the cache as it is on disk: the one place where both rooms meet in a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from dicomproxy.cache import CacheSettings, DiskInstanceStore
from dicomproxy.ports import CachedInstance, InstanceReader
from dicomproxy.retrieval.coordinator import RetrieveOutcome
from tests.retrieval.fakes import STUDY, Archive, Workstation, World, study
from tests.support.log_watch import LogWatch


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskInstanceStore]:
    made = DiskInstanceStore(CacheSettings(tmp_path / "cache", 10**9))
    await made.start()
    yield made
    await made.close()


async def test_many_share_what_is_fetched_and_later_ones_what_is_cached(
    store: DiskInstanceStore,
) -> None:
    """Twenty retrieves fetch each instance once, the next one fetches none."""
    north = Archive("north", study(20, 10))
    world = World(north, store=store)
    world.know(north)
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*(world.operation(Workstation()).run() for _ in range(20)))
        assert outcomes == [RetrieveOutcome(0x0000, completed=30)] * 20
        again = Workstation()
        assert (await world.operation(again).run()).completed == 30
    assert len(again.received) == 30
    assert (len(north.sent), set(north.sent.values()), len(north.orders)) == (30, {1}, 1)
    await world.close()
    assert await store.evict(STUDY) == "evicted", "nobody has it leased any more"


async def test_cached_instances_are_opened_before_their_turn(
    store: DiskInstanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached study is opened a few instances at a time, and none stays open after a cancel."""
    north = Archive("north", study(12))
    world = World(north, store=store)
    world.know(north)
    several: list[int] = []
    real = store.open_several

    async def counting(
        instances: Sequence[CachedInstance], head_bytes: int = 0
    ) -> list[InstanceReader | None]:
        several.append(len(instances))
        return await real(instances, head_bytes)

    async with asyncio.timeout(60):
        await world.operation(Workstation()).run()
        monkeypatch.setattr(store, "open_several", counting)
        again = Workstation()
        assert (await world.operation(again).run()).completed == 12
        assert sorted(again.received) == sorted(north.sent)
        assert sum(several) == 11, "all but the first, each once"
        assert len(several) < 11
        held_up = Workstation()
        held_up.gate = asyncio.Event()
        operation = world.operation(held_up)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(operation.run())
            await held_up.waiting.wait()
            operation.cancel()
            held_up.gate.set()
        assert running.result().status == 0xFE00
    await world.close()
    assert await store.evict(STUDY) == "evicted", "nobody has it leased any more"


async def test_cached_study_of_another_patient_is_dropped(
    store: DiskInstanceStore, log_watch: LogWatch
) -> None:
    """After the source has filed the study under another patient, it is fetched anew."""
    north = Archive("north", study(3))
    world = World(north, store=store)
    world.know(north)
    async with asyncio.timeout(60):
        await world.operation(Workstation()).run()
        north.studies[STUDY].patient_id = "OTHER1"
        world.know(north)
        workstation = Workstation()
        outcome = await world.operation(workstation).run()
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert set(north.sent.values()) == {2}
    assert log_watch.named("identity_conflict")
    await world.close()
    assert await store.evict(STUDY) == "evicted", "nobody has it leased any more"
