"""What somebody waits for comes before what nobody does, at every limit that they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dicomproxy.ports import RetrieveOrder
from tests.retrieval.fakes import STUDY, Archive, Workstation, World, study, study_request
from tests.support.stand_in import SECONDS

OTHER = "1.2.99"


def _far(*studies: object) -> Archive:
    """Return a far archive that is asked by lists, two at a time."""
    north = Archive("north", *studies)  # type: ignore[arg-type]
    north.round_trip_seconds, north.parallel_retrieves = 0.03, 2
    return north


async def _until(condition: object) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0)


async def _settle() -> None:
    for _ in range(3):
        for _ in range(200):
            await asyncio.sleep(0)
        await asyncio.to_thread(lambda: None)


@asynccontextmanager
async def _abandoned(north: Archive, gate: asyncio.Event) -> AsyncIterator[World]:
    """Yield a region in which one study is being fetched though whoever wanted it has left."""
    north.gate = lambda uid: gate if uid.startswith(f"{STUDY}.") else None
    world = World(north, finish_abandoned=True)
    world.know(north)
    operation = world.operation(Workstation())
    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            leaving = group.create_task(operation.run())
            await _until(lambda: bool(north.orders))
            operation.cancel()
            await leaving
        yield world
    finally:
        await world.close()


def _of(orders: list[RetrieveOrder], uid: str) -> list[RetrieveOrder]:
    return [order for order in orders if order.study_instance_uids == (uid,)]


async def test_nothing_more_is_ordered_for_nobody_meanwhile() -> None:
    """The rest of an abandoned study is asked for once the other one is here, and only then."""
    north, gate = _far(study(250), study(20, uid=OTHER)), asyncio.Event()
    async with _abandoned(north, gate) as world:
        held_up = asyncio.Event()
        north.gate = lambda uid: gate if uid.startswith(f"{STUDY}.") else held_up
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            waiting = group.create_task(world.operation(Workstation(), study_request(OTHER)).run())
            await _until(lambda: bool(_of(north.orders, OTHER)))
            before = len(_of(north.orders, STUDY))
            gate.set()  # what had been asked for by then comes
            await _until(lambda: len(world.store.studies[STUDY].instances) > 0)
            await _until(lambda: not _of([*world.flights.orders("north")], STUDY))
            await _settle()
            assert len(_of(north.orders, STUDY)) == before
            assert len(world.store.studies[STUDY].instances) < 250
            held_up.set()
            assert (await waiting).status == 0x0000

        await _until(lambda: len(world.flights) == 0)
        await _settle()
        assert world.store.studies[STUDY].complete
        assert set(north.sent.values()) == {1}


async def test_whoever_comes_back_waits_for_nobody() -> None:
    """A study that is wanted again is fetched at once, beside the other one."""
    north, gate = _far(study(30), study(20, uid=OTHER)), asyncio.Event()
    async with _abandoned(north, gate) as world:
        held_up = asyncio.Event()
        north.gate = lambda uid: gate if uid.startswith(f"{STUDY}.") else held_up
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            other = group.create_task(world.operation(Workstation(), study_request(OTHER)).run())
            await _until(lambda: bool(_of(north.orders, OTHER)))
            gate.set()
            assert (await world.operation(Workstation()).run()).completed == 30
            assert not other.done()
            held_up.set()
        assert set(north.sent.values()) == {1}


async def test_share_of_a_source_is_counted_without_them() -> None:
    """A study that nobody waits for takes no part of the ceiling from one that somebody does."""
    north, gate = _far(study(30), study(40, uid=OTHER)), asyncio.Event()
    north.parallel_retrieves = 4
    async with _abandoned(north, gate) as world:
        held_up = asyncio.Event()
        north.gate = lambda uid: gate if uid.startswith(f"{STUDY}.") else held_up
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            group.create_task(world.operation(Workstation(), study_request(OTHER)).run())
            await _until(lambda: len(_of(north.orders, OTHER)) == 4)
            held_up.set()
        gate.set()
        await _until(lambda: len(world.flights) == 0)
        await _settle()


async def test_orders_say_whether_somebody_waits() -> None:
    """An order that was placed for somebody is for nobody once he has left, and again for one."""
    north, gate = _far(study(3)), asyncio.Event()
    async with _abandoned(north, gate) as world:
        order = north.orders[0]
        assert order.wanted is not None
        assert not order.wanted()
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            back = group.create_task(world.operation(Workstation()).run())
            await _until(order.wanted)
            gate.set()
            assert (await back).completed == 3
