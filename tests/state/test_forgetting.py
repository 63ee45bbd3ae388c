"""Locations that hang on a patient go when that patient's record was merged or changed."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.ports import Location
from dicomproxy.state import StateStore
from dicomproxy.state.database import FILE_NAME, Database
from tests.sentinel import PATIENT_ID

ME = ("north", PATIENT_ID)


def at(study: str, source: str = "north", patient_id: str = PATIENT_ID) -> Location:
    return Location(study, source, patient_id)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = await opened(tmp_path)
    yield store
    await store.close()


async def opened(directory: Path) -> StateStore:
    store = StateStore(directory, retry_seconds=0.01)
    await store.start()
    return store


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the other side is a thread
            await asyncio.sleep(0.005)


SOME = [at("1.1"), at("1.1", "south"), at("1.2"), at("1.3", patient_id="other")]
LEFT = {"1.1": {at("1.1", "south")}, "1.2": set(), "1.3": {at("1.3", patient_id="other")}}


@pytest.mark.parametrize("known", ["pending", "written", "read", "only on disk"])
async def test_locations_of_a_patient_are_forgotten(tmp_path: Path, known: str) -> None:
    """Wherever they are held, they are gone at once and for good, and no others are."""
    store = await opened(tmp_path)
    store.remember(SOME)
    if known != "pending":
        await store.flush()
    if known == "read":
        for study in LEFT:
            await store.find(study)
    if known == "only on disk":
        await store.close()
        store = await opened(tmp_path)
    store.forget_patients([ME])

    assert {study: set(await store.find(study)) for study in LEFT} == LEFT
    await store.close()
    store = await opened(tmp_path)
    assert {study: set(await store.find(study)) for study in LEFT} == LEFT
    await store.close()


@pytest.mark.parametrize("flushed", [False, True])
async def test_what_is_remembered_later_stays(tmp_path: Path, flushed: bool) -> None:
    """A study that is located anew under the same ID is not taken along by the writing."""
    store = await opened(tmp_path)
    store.remember(SOME)
    await store.flush()
    store.forget_patients([ME])
    store.remember([at("1.2")])

    assert await store.find("1.2") == (at("1.2"),)
    if flushed:
        async with asyncio.timeout(10):
            await store.flush()
    await store.close()
    store = await opened(tmp_path)
    assert await store.find("1.2") == (at("1.2"),)
    assert await store.find("1.1") == (at("1.1", "south"),)
    await store.close()


@pytest.mark.parametrize("again", [False, True])
async def test_forgetting_during_a_read_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """What was read before the patient was forgotten is not the answer; what came after is."""
    store = await opened(tmp_path)
    store.remember(SOME)
    await store.close()
    store = await opened(tmp_path)
    entered, go = threading.Event(), threading.Event()
    original = Database.read

    def held(self: Database, study: str) -> tuple[Location, ...]:
        found = original(self, study)
        entered.set()
        assert go.wait(10)
        return found

    monkeypatch.setattr(Database, "read", held)
    finding = asyncio.create_task(store.find("1.1"))
    await until(entered.is_set)
    store.forget_patients([ME])
    if again:
        store.remember([at("1.1")])
    go.set()

    expected = {at("1.1", "south")} | ({at("1.1")} if again else set())
    assert set(await finding) == expected
    assert set(await store.find("1.1")) == expected
    await store.close()


async def test_forgetting_waits_for_a_disk_that_fails(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing can be deleted what is on disk is not believed, and is deleted later."""
    store.remember(SOME)
    await store.flush()
    original, read = Database.forget_patients, Database.read
    reads: list[str] = []

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def counted(self: Database, study: str) -> tuple[Location, ...]:
        reads.append(study)
        return read(self, study)

    monkeypatch.setattr(Database, "forget_patients", fail)
    monkeypatch.setattr(Database, "read", counted)
    store.forget_patients([ME])
    await until(lambda: store.degraded)
    async with asyncio.timeout(10):
        while not reads:
            assert at("1.1") not in await store.find("1.1")
            await asyncio.sleep(0)
    assert at("1.1") not in await store.find("1.1")
    assert store.degraded  # that it can be read proves nothing
    monkeypatch.setattr(Database, "forget_patients", original)
    async with asyncio.timeout(10):
        await store.flush()
    assert await store.find("1.1") == (at("1.1", "south"),)
    assert not store.degraded


async def test_forgetting_nobody_is_nothing(store: StateStore) -> None:
    """Without patients nothing is written."""
    store.forget_patients([])
    async with asyncio.timeout(10):
        await store.flush()


def test_file_of_an_earlier_version_gets_its_index(tmp_path: Path) -> None:
    """A file without the index by patient is not set aside, and patients are found by index."""
    database = Database(tmp_path)
    database.write({"1.1": {"north": at("1.1")}}, 1)
    database.close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("DROP INDEX location_patient")
    connection.close()
    database = Database(tmp_path)
    assert database.read("1.1") == (at("1.1"),)
    database.close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    plan = connection.execute(
        "EXPLAIN QUERY PLAN DELETE FROM location WHERE source = ? AND patient_id = ?", ME
    ).fetchall()
    connection.close()
    assert "location_patient" in str(plan)


STEP = st.one_of(
    st.tuples(st.just("remember"), st.sampled_from("12"), st.sampled_from("ab")),
    st.tuples(st.just("forget"), st.just(""), st.sampled_from("ab")),
    st.tuples(st.just("flush"), st.just(""), st.just("")),
    st.tuples(st.just("find"), st.sampled_from("12"), st.just("")),
)


@given(st.lists(STEP, max_size=12))
def test_any_order_of_forgetting_and_remembering(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str]]
) -> None:
    """Against a plain dictionary: what is found is what was remembered and not forgotten since."""

    async def run() -> None:
        directory = tmp_path_factory.mktemp("state")
        store = StateStore(directory)
        await store.start()
        model: dict[str, str] = {}
        for what, study, patient in steps:
            if what == "remember":
                store.remember([at(study, patient_id=patient)])
                model[study] = patient
            elif what == "forget":
                store.forget_patients([("north", patient)])
                model = {key: value for key, value in model.items() if value != patient}
            elif what == "find":
                await store.find(study)
            else:
                await store._write_forgotten()
                await store._write_batch()
        for _ in range(2):
            for study in "12":
                expected = (at(study, patient_id=model[study]),) if study in model else ()
                assert await store.find(study) == expected
            await store.close()
            store = StateStore(directory)
            await store.start()
        await store.close()

    asyncio.run(run())
