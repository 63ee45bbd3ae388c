"""Study locations: visible at once, kept across restarts, and never in the way of an operation."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.ports import Location
from dicomproxy.state import StateStore
from dicomproxy.state.database import FILE_NAME, Changes, Database
from dicomproxy.state.file import StateFile, _Unusable
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch

DAY = 86_400


def at(study: str, source: str = "north", patient_id: str = PATIENT_ID) -> Location:
    return Location(study, source, patient_id)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = StateStore(tmp_path, retry_seconds=0.01)
    await store.start()
    yield store
    await store.close()


async def reopened(directory: Path, **options: float) -> StateStore:
    store = StateStore(directory, **options)  # type: ignore[arg-type]
    await store.start()
    return store


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the other side is a thread
            await asyncio.sleep(0)


class Gate:
    """Holds one method of Database, in its thread, until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        original = getattr(Database, method)

        def held(*args: object) -> object:
            self.entered.set()
            assert self.go.wait(10)
            return original(*args)

        monkeypatch.setattr(Database, method, held)


def break_disk(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    for method in methods:
        monkeypatch.setattr(Database, method, fail)


async def test_what_is_remembered_in_short_order_is_written_in_one_go(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The legs of a query end one after the other; the file is written once for them."""
    written: list[set[str]] = []
    original = Database.write

    def write(self: Database, changes: Changes, now: int) -> None:
        written.append(set(changes))
        original(self, changes, now)

    monkeypatch.setattr(Database, "write", write)
    for study in ("1.1", "1.2", "1.3"):
        store.remember([at(study)])
        for _ in range(10):
            await asyncio.sleep(0)
    await store.flush()
    assert written == [{"1.1", "1.2", "1.3"}]


async def test_study_never_seen_has_no_holder(store: StateStore) -> None:
    """An unknown study is answered with nothing, also when asked again."""
    assert await store.find("1.2.3") == ()
    assert await store.find("1.2.3") == ()


async def test_remembered_location_is_found_before_it_is_written(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """find sees what remember was told although the write has not ended."""
    gate = Gate(monkeypatch, "write")
    store.remember([at("1.2.3")])
    found = asyncio.create_task(store.find("1.2.3"))
    await until(gate.entered.is_set)
    gate.go.set()
    assert await found == (at("1.2.3"),)


async def test_location_survives_a_restart(tmp_path: Path) -> None:
    """What was remembered is found by the next process, every holder of it."""
    store = await reopened(tmp_path)
    store.remember([at("1.2.3"), at("1.2.3", "south", "other"), at("1.2.4")])
    await store.close()
    store = await reopened(tmp_path)
    assert set(await store.find("1.2.3")) == {at("1.2.3"), at("1.2.3", "south", "other")}
    await store.close()


async def test_forgotten_location_stays_forgotten(tmp_path: Path) -> None:
    """forget removes one holder, at once and for good, and leaves the others."""
    store = await reopened(tmp_path)
    store.remember([at("1.2.3"), at("1.2.3", "south")])
    await store.flush()
    store.forget("1.2.3", "north")
    assert await store.find("1.2.3") == (at("1.2.3", "south"),)
    await store.close()
    store = await reopened(tmp_path)
    assert await store.find("1.2.3") == (at("1.2.3", "south"),)
    await store.close()


async def test_latest_patient_id_of_a_holder_counts(store: StateStore) -> None:
    """A holder that names the patient anew replaces what it said before."""
    store.remember([at("1.2.3", patient_id="old")])
    await store.flush()
    assert await store.find("1.2.3") == (at("1.2.3", patient_id="old"),)
    store.remember([at("1.2.3", patient_id="new")])
    assert await store.find("1.2.3") == (at("1.2.3", patient_id="new"),)


async def test_change_during_a_read_wins_over_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A location remembered or forgotten while the file is read is in the answer."""
    store = await reopened(tmp_path)
    store.remember([at("1.2.3"), at("1.2.3", "south")])
    await store.close()
    store = await reopened(tmp_path)
    gate = Gate(monkeypatch, "read")
    found = asyncio.create_task(store.find("1.2.3"))
    await until(gate.entered.is_set)
    store.forget("1.2.3", "north")
    store.remember([at("1.2.3", "west")])
    gate.go.set()
    assert set(await found) == {at("1.2.3", "south"), at("1.2.3", "west")}
    assert set(await store.find("1.2.3")) == {at("1.2.3", "south"), at("1.2.3", "west")}
    await store.close()


async def test_what_is_known_is_bounded_and_read_again(tmp_path: Path) -> None:
    """Beyond its bound the memory forgets the study used longest ago, the file does not."""
    store = await reopened(tmp_path, known_studies=2)
    store.remember([at(f"1.2.{number}") for number in range(5)])
    await store.flush()
    for number in range(5):
        assert await store.find(f"1.2.{number}") == (at(f"1.2.{number}"),)
    assert "2 known" in repr(store)
    assert await store.find("1.2.0") == (at("1.2.0"),)
    await store.close()


async def test_location_not_seen_for_long_is_pruned_at_start(
    tmp_path: Path, log_watch: LogWatch
) -> None:
    """A location is kept for 90 days after it was last seen, and no longer."""
    now = 1_800_000_000.0
    store = StateStore(tmp_path, clock=lambda: now)
    await store.start()
    store.remember([at("1.2.3"), at("1.2.4")])
    await store.close()
    now += 60 * DAY
    store = StateStore(tmp_path, clock=lambda: now)
    await store.start()
    store.remember([at("1.2.4")])
    await store.close()
    now += 31 * DAY
    store = StateStore(tmp_path, clock=lambda: now)
    await store.start()
    assert await store.find("1.2.3") == ()
    assert await store.find("1.2.4") == (at("1.2.4"),)
    assert [line["pruned"] for line in log_watch.named("state_pruned")] == [1]
    await store.close()


async def test_oldest_locations_beyond_the_count_are_pruned(tmp_path: Path) -> None:
    """The file holds a bounded number of locations; those seen longest ago go first."""
    now = 1_800_000_000.0
    store = StateStore(tmp_path, clock=lambda: now)
    await store.start()
    for number in range(4):
        now += 1
        store.remember([at(f"1.2.{number}")])
        await store.flush()
    await store.close()
    store = StateStore(tmp_path, clock=lambda: now, max_locations=2)
    await store.start()
    assert [await store.find(f"1.2.{number}") for number in range(4)] == [
        (),
        (),
        (at("1.2.2"),),
        (at("1.2.3"),),
    ]
    await store.close()


def _write_version(path: Path, version: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute("CREATE TABLE other (x)")
    connection.close()


async def test_unreadable_file_is_set_aside(tmp_path: Path, log_watch: LogWatch) -> None:
    """A file that is no database is renamed, said so, and an empty one takes its place."""
    (tmp_path / FILE_NAME).write_bytes(b"this is no database" * 500)
    store = await reopened(tmp_path)
    assert await store.find("1.2.3") == ()
    store.remember([at("1.2.3")])
    await store.close()
    assert (tmp_path / f"{FILE_NAME}.damaged").read_bytes().startswith(b"this is no database")
    assert [line["reason"] for line in log_watch.named("state_set_aside")] == ["damaged"]
    store = await reopened(tmp_path)
    assert await store.find("1.2.3") == (at("1.2.3"),)
    await store.close()


@pytest.mark.parametrize("version", [0, 99])
async def test_file_of_another_kind_is_set_aside(
    tmp_path: Path, log_watch: LogWatch, version: int
) -> None:
    """A database with another schema, be it newer or somebody else's, is not touched."""
    _write_version(tmp_path / FILE_NAME, version)
    store = await reopened(tmp_path)
    store.remember([at("1.2.3")])
    await store.close()
    assert [line["reason"] for line in log_watch.named("state_set_aside")] == ["schema_version"]
    connection = sqlite3.connect(tmp_path / f"{FILE_NAME}.damaged")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]
    connection.close()


async def test_disk_on_which_a_new_file_is_damaged_too_is_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is failed by it, and what was remembered is written once the disk is well."""
    store = await reopened(tmp_path, retry_seconds=0.01)
    await store._ask(store._database.close, "close")

    def damaged(_file: StateFile) -> sqlite3.Connection:
        raise _Unusable("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "_open", damaged)
        assert await store.find("1.2") == ()
        store.remember([at("1.1")])
        await until(lambda: store.degraded)
    async with asyncio.timeout(60):
        await store.flush()
    await store.close()
    store = await reopened(tmp_path)
    assert await store.find("1.1") == (at("1.1"),)
    await store.close()


async def test_file_damaged_while_in_use_is_set_aside(tmp_path: Path, log_watch: LogWatch) -> None:
    """Damage met by a later start does not stop remembering."""
    store = await reopened(tmp_path)
    store.remember([at(f"1.2.{number}") for number in range(2000)])
    await store.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)
    store = await reopened(tmp_path)
    store.remember([at("1.2.3")])
    await store.flush()
    assert log_watch.named("state_set_aside")
    assert not store.degraded
    assert await store.find("1.2.3") == (at("1.2.3"),)
    await store.close()


async def test_full_disk_is_said_once_and_survived_from_memory(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """While nothing can be saved locations are found from memory, and saved afterwards."""
    with monkeypatch.context() as patch:
        break_disk(patch, "write", "read")
        for number in range(50):
            store.remember([at(f"1.2.{number}")])
            assert await store.find(f"1.2.{number}") == (at(f"1.2.{number}"),)
        await until(lambda: store.degraded)
    async with asyncio.timeout(60):
        await store.flush()
    assert not store.degraded
    assert len(log_watch.named("state_degraded")) == 1
    assert len(log_watch.named("state_recovered")) == 1
    assert await store.find("1.2.49") == (at("1.2.49"),)


async def test_pending_changes_are_bounded_while_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """Beyond the bound the oldest are given up, loudly, and the rest is kept."""
    store = await reopened(tmp_path, pending_studies=10, retry_seconds=0.01)
    with monkeypatch.context() as patch:
        break_disk(patch, "write")
        store.remember([at(f"1.2.{number}") for number in range(25)])
        await until(lambda: store.degraded)
    async with asyncio.timeout(60):
        await store.flush()
    assert [line["dropped"] for line in log_watch.named("state_recovered")] == [15]
    assert await store.find("1.2.14") == ()
    assert await store.find("1.2.15") == (at("1.2.15"),)
    await store.close()


async def test_directory_that_cannot_be_made_leaves_a_working_store(
    tmp_path: Path, log_watch: LogWatch
) -> None:
    """Without any file the store starts, remembers, answers and closes."""
    (tmp_path / "taken").write_bytes(b"")
    store = await reopened(tmp_path / "taken" / "state")
    assert store.degraded
    store.remember([at("1.2.3")])
    assert await store.find("1.2.3") == (at("1.2.3"),)
    assert await store.find("1.2.4") == ()
    await store.close()
    assert log_watch.named("state_degraded")[-1]["pending"] == 1


async def test_file_is_for_its_owner_only(store: StateStore, tmp_path: Path) -> None:
    """The file and its write-ahead log hold patient IDs: nobody else may read them."""
    store.remember([at("1.2.3")])
    await store.flush()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes) >= {FILE_NAME, f"{FILE_NAME}-wal"}
    assert set(modes.values()) == {0o600}


def test_full_disk_of_sqlite_itself_changes_nothing(tmp_path: Path) -> None:
    """A write that does not fit raises, leaves the file as it was, and the next one works."""
    database = Database(tmp_path)
    database.write({"1.2.3": {"north": at("1.2.3")}}, 1)
    connection = database._file._connection
    assert connection is not None
    connection.execute("PRAGMA max_page_count = 1")  # the least that holds what is there
    many: Changes = {f"1.2.9.{n}": {"north": at(f"1.2.9.{n}")} for n in range(2000)}
    with pytest.raises(sqlite3.OperationalError):
        database.write(many, 2)
    assert database.read("1.2.9.0") == ()
    assert database.read("1.2.3") == (at("1.2.3"),)
    database.write(many, 2)
    assert database.read("1.2.9.0") == (at("1.2.9.0"),)
    database.close()


_CHILD = """
import os, sys
from pathlib import Path
from dicomproxy.ports import Location
from dicomproxy.state import database
step = int(sys.argv[2])
store = database.Database(Path(sys.argv[1]))
calls = 0
def trace(_statement):
    global calls
    calls += 1
    if calls == step:
        os._exit(7)
connect = database.sqlite3.connect
def connecting(*args, **options):
    connection = connect(*args, **options)
    connection.set_trace_callback(trace)
    return connection
database.sqlite3.connect = connecting
for number in range(3):
    study = f"1.2.{number}"
    store.write({study: {"north": Location(study, "north", "id")}}, number + 1)
    os.write(1, f"{number}\\n".encode())
"""


@pytest.mark.parametrize("step", range(1, 16, 2))
def test_crash_at_any_statement_leaves_a_file_that_opens(tmp_path: Path, step: int) -> None:
    """A process that ends within its writes loses none that it said was done."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path), str(step)],
        capture_output=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.returncode in (0, 7), child.stderr
    database = Database(tmp_path)
    for number in child.stdout.split():
        assert len(database.read(f"1.2.{int(number)}")) == 1
    database.write({"1.2.9": {"north": at("1.2.9")}}, 9)
    assert database.read("1.2.9") == (at("1.2.9"),)
    database.close()
    assert not (tmp_path / f"{FILE_NAME}.damaged").exists()


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["remember", "forget", "find", "flush", "restart"]),
        st.sampled_from(["1.1", "1.2", "1.3"]),
        st.sampled_from(["north", "south"]),
        st.sampled_from(["a", "b"]),
    ),
    max_size=25,
)


@given(steps=_STEPS)
def test_store_agrees_with_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str, str]]
) -> None:
    """Whatever is remembered, forgotten, flushed and restarted, find says what a dict would."""
    directory = tmp_path_factory.mktemp("state")

    async def run() -> None:
        expected: dict[tuple[str, str], Location] = {}
        store = await reopened(directory, known_studies=2)
        for step, study, source, patient in steps:
            if step == "remember":
                store.remember([Location(study, source, patient)])
                expected[study, source] = Location(study, source, patient)
            elif step == "forget":
                store.forget(study, source)
                expected.pop((study, source), None)
            elif step == "flush":
                await store.flush()
            elif step == "restart":
                await store.close()
                store = await reopened(directory, known_studies=2)
            found = await store.find(study)
            assert set(found) == {at for (uid, _), at in expected.items() if uid == study}
        await store.close()

    asyncio.run(run())
