"""Instances opened before their turn: few, in time, and none that nobody comes for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from dicomproxy.ports import CachedInstance, InstanceReader, InstanceStore
from dicomproxy.retrieval.delivery import Ahead
from dicomproxy.retrieval.subscription import Subscription


def instance(number: int) -> CachedInstance:
    return CachedInstance(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=f"1.2.3.1.{number}",
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.1",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        source="north",
        file_name=f"{number}",
        data_set_offset=0,
        size=10,
        crc32=0,
    )


class Reader:
    def __init__(self, store: Store, of: CachedInstance) -> None:
        self.of = of
        self._store = store
        store.open_now.append(of)

    async def close(self) -> None:
        self._store.open_now.remove(self.of)


class Store:
    """Counts what is open; opens several once *gate* is set."""

    def __init__(self) -> None:
        self.open_now: list[CachedInstance] = []
        self.singly: list[CachedInstance] = []
        self.several = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self, one: CachedInstance) -> InstanceReader:
        self.singly.append(one)
        return cast(InstanceReader, Reader(self, one))

    async def open_several(
        self, wanted: Sequence[CachedInstance], head_bytes: int = 0
    ) -> list[InstanceReader | None]:
        self.several += 1
        await self.gate.wait()
        return [cast(InstanceReader, Reader(self, one)) for one in wanted]


class View:
    """The part of a subscription that is looked at: what would come next."""

    def __init__(self, instances: list[CachedInstance]) -> None:
        self.left = list(instances)

    def next(self) -> CachedInstance:
        return self.left.pop(0)

    def upcoming(self, most: int) -> list[CachedInstance]:
        return self.left[:most]


@pytest.fixture
def store() -> Store:
    return Store()


def ahead_of(view: View, store: Store) -> Ahead:
    return Ahead(cast(Subscription, cast(Any, view)), cast(InstanceStore, cast(Any, store)))


async def opened(ahead: Ahead) -> None:
    """Wait until what is being opened ahead is open."""
    if ahead._opening is not None:
        await asyncio.wait([ahead._opening])


async def test_few_are_open_at_once_and_each_is_opened_once(store: Store) -> None:
    """However long the study, the one being sent and four more are open; one visit opens some."""
    view = View([instance(number) for number in range(20)])
    ahead = ahead_of(view, store)
    async with asyncio.timeout(60):
        while view.left:
            reader = await ahead.open(view.next())
            await opened(ahead)
            assert len(store.open_now) <= 5
            await reader.close()
    await ahead.close()
    assert (len(store.singly), store.several < 12, store.open_now) == (1, True, [])


async def test_what_is_passed_over_is_let_go(store: Store) -> None:
    """Instances removed after they were opened keep neither descriptors nor those behind waiting.

    Where all that was opened is passed over, looking ahead goes on all the same.
    """
    view = View([instance(number) for number in range(20)])
    ahead = ahead_of(view, store)
    async with asyncio.timeout(60):
        await (await ahead.open(view.next())).close()
        await opened(ahead)
        gone = store.open_now[:]
        assert len(gone) == 4
        del view.left[:4]
        while view.left:
            reader = await ahead.open(view.next())
            await opened(ahead)
            assert not set(map(id, gone)) & set(map(id, store.open_now))
            await reader.close()
        assert len(store.singly) == 2, "the first, and the first behind those passed over"
    await ahead.close()
    assert store.open_now == []


async def test_closed_while_opening_leaves_nothing_open(store: Store) -> None:
    """A delivery cancelled while files are being opened keeps none of them."""
    view = View([instance(number) for number in range(6)])
    ahead = ahead_of(view, store)
    store.gate.clear()
    async with asyncio.timeout(60):
        await (await ahead.open(view.next())).close()
        opening = ahead._opening
        assert opening is not None
        store.gate.set()
        await ahead.close()
    assert opening.done()
    assert store.open_now == []


async def test_instance_that_came_twice_is_opened_once(store: Store) -> None:
    """A source may send one again; the one that is held now is opened, and closed again."""
    first, again = instance(1), replace(instance(1), file_name="1a")
    view = View([instance(0), first, again, instance(2)])
    ahead = ahead_of(view, store)
    async with asyncio.timeout(60):
        await (await ahead.open(view.next())).close()
        await opened(ahead)
        assert store.open_now == [again, instance(2)]
    await ahead.close()
    assert store.open_now == []
