"""What the store promises to those who receive, deliver and configure."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from pathlib import Path

import pytest

from dicomproxy.cache import CacheLocked, DiskInstanceStore
from dicomproxy.cache.layout import Layout
from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.ports import Refused, StudyLease
from tests.cache.support import (
    CT,
    EXPLICIT,
    MR,
    data_set,
    fill,
    opened,
    read_all,
    read_instance,
    settings,
    store_bytes,
)
from tests.support.log_watch import LogWatch


async def settled(store: DiskInstanceStore) -> None:
    """Return once everything queued so far is done."""
    await store.evict("no such study")


async def test_what_is_stored_is_read_back_after_a_restart(tmp_path: Path) -> None:
    """Every byte, the completeness and the pin of a study outlive an orderly restart."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 3, size=200_001)
    assert await store.pin("1.2.3", True)
    await store.close()
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    assert lease.complete
    for uid, instance in lease.instances.items():
        assert await read_instance(store, instance) == data_set(uid, size=200_001)
        assert instance.source == "north"
        assert instance.series_instance_uid == "1.2.3.1"
    lease.release()
    (listed,) = store.studies()
    assert (listed.instances, listed.complete, listed.pinned) == (3, True, True)
    await store.close()


async def test_files_are_part_10_and_private(tmp_path: Path) -> None:
    """An instance file is one that any toolkit reads; only we may read it."""
    import pydicom

    store = await opened(tmp_path)
    await fill(store, "1.2.3", 1)
    await store.close()
    (path,) = Layout(tmp_path).study("1.2.3").glob("*.dcm")
    ds = pydicom.dcmread(path)
    assert ds.file_meta.TransferSyntaxUID == EXPLICIT
    assert ds.SOPInstanceUID == "1.2.3.1.1"
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


async def test_memory_is_given_back_once_for_every_write(tmp_path: Path) -> None:
    """Each release is called on the loop, also for discarded, refused and late writes."""
    store = await opened(tmp_path)
    calls: list[str] = []
    data = memoryview(data_set("1.2.3.1"))
    kept = store.receive(CT, "1.2.3.1", EXPLICIT, "north")
    for name in ("a", "b"):
        kept.write([data[:10], data[10:10]], lambda name=name: calls.append(name))
    dropped = store.receive(CT, "1.2.3.1", EXPLICIT, "north")
    dropped.write([data], lambda: calls.append("c"))
    dropped.discard()
    dropped.write([data], lambda: calls.append("d"))
    await settled(store)
    assert calls == ["a", "b", "c", "d"]
    await store.close()
    kept.write([data], lambda: calls.append("e"))
    assert calls[-1] == "e"
    assert list(Layout(tmp_path).incoming.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (data_set("1.2.3.9"), "sop_instance_mismatch"),
        (data_set("1.2.3.1", sop_class_uid=MR), "sop_class_mismatch"),
        (b"", "unreadable_header"),
        (data_set("1.2.3.1")[:40], "unreadable_header"),
        (b"\xff" * 500, "sop_class_mismatch"),
    ],
)
async def test_instance_that_is_not_what_was_announced_is_refused(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    """A header that is unreadable, or contradicts the command, lets nothing in."""
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    with pytest.raises(Refused) as refused:
        await store_bytes(store, lease, "1.2.3.1", data)
    assert refused.value.reason == reason
    assert not lease.instances
    assert store.stats().bytes == 0
    assert list(Layout(tmp_path).incoming.iterdir()) == []
    lease.release()
    await store.close()


async def test_admit_sees_the_header_and_may_refuse(tmp_path: Path) -> None:
    """What admit raises is what commit raises, and the bytes are gone."""
    store = await opened(tmp_path)
    seen: list[InstanceHeader] = []

    def admit(header: InstanceHeader) -> StudyLease:
        seen.append(header)
        raise Refused("identity_conflict")

    writer = store.receive(CT, "1.2.3.1", EXPLICIT, "north")
    writer.write([memoryview(data_set("1.2.3.1"))], lambda: None)
    with pytest.raises(Refused, match="identity_conflict"):
        await writer.commit(admit)
    assert [header.study_instance_uid for header in seen] == ["1.2.3"]
    assert store.stats().bytes == 0
    await store.close()


async def test_same_bytes_are_a_duplicate_and_other_bytes_a_conflict(tmp_path: Path) -> None:
    """The first content stays, whatever comes after it."""
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    first = await store_bytes(store, lease, "1.2.3.1", data_set("1.2.3.1"))
    again = await store_bytes(store, lease, "1.2.3.1", data_set("1.2.3.1"), piece=77)
    other = await store_bytes(store, lease, "1.2.3.1", data_set("1.2.3.1", fill=9))
    assert (first.duplicate, first.conflict) == (False, False)
    assert (again.duplicate, again.conflict) == (True, False)
    assert (other.duplicate, other.conflict) == (False, True)
    assert first.instance == again.instance == other.instance
    assert await read_instance(store, first.instance) == data_set("1.2.3.1")
    lease.release()
    await store.close()


async def test_interleaved_writers_do_not_mix(tmp_path: Path) -> None:
    """Forty instances arriving piece by piece at once are each stored as they were."""
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")

    async def one(number: int) -> None:
        uid = f"1.2.3.{number}"
        data = memoryview(data_set(uid, size=20_000, fill=number))
        writer = store.receive(CT, uid, EXPLICIT, "north")
        for offset in range(0, len(data), 999):
            writer.write([data[offset : offset + 500], data[offset + 500 : offset + 999]], _nothing)
            await asyncio.sleep(0)
        await writer.commit(lambda _header: lease)

    async with asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(one(number))
    assert len(lease.instances) == 40
    for uid, instance in lease.instances.items():
        fill_byte = int(uid.rpartition(".")[2])
        assert await read_instance(store, instance) == data_set(uid, size=20_000, fill=fill_byte)
    lease.release()
    await store.close()


def _nothing() -> None:
    return None


async def test_change_of_a_study_makes_it_incomplete(tmp_path: Path) -> None:
    """Whole is a statement about certain instances: one more or one less, and it is void."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 2)
    lease = await store.lease("1.2.3")
    assert lease.complete
    await store_bytes(store, lease, "1.2.3.9", data_set("1.2.3.9"))
    assert not lease.complete
    await lease.set_complete(True)
    await lease.remove(["1.2.3.9", "1.2.3.unknown"])
    assert not lease.complete
    assert set(lease.instances) == {"1.2.3.1.1", "1.2.3.1.2"}
    lease.release()
    await store.close()
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    assert not lease.complete
    assert len(lease.instances) == 2
    lease.release()
    await store.close()


async def test_study_in_part_is_not_whole_after_a_restart(tmp_path: Path) -> None:
    """Instances without the statement that they are all are held, but not as a whole study."""
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    await store_bytes(store, lease, "1.2.3.1", data_set("1.2.3.1"))
    await store.close()
    assert not lease.instances
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    assert (len(lease.instances), lease.complete) == (1, False)
    lease.release()
    await store.close()


async def test_study_dropped_while_read_is_read_to_its_end(tmp_path: Path) -> None:
    """Dropping takes instances from leases at once, and nothing from an open reader."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 1)
    lease = await store.lease("1.2.3")
    (instance,) = lease.instances.values()
    reader = await store.open(instance)
    await store.drop("1.2.3")
    assert not lease.instances
    assert not lease.complete
    with pytest.raises(FileNotFoundError):
        await store.open(instance)
    assert await read_all(reader) == data_set(instance.sop_instance_uid)
    await store_bytes(store, lease, "1.2.3.5", data_set("1.2.3.5"))
    assert set(lease.instances) == {"1.2.3.5"}
    lease.release()
    await store.close()


async def test_cancelled_read_returns_only_when_buffers_are_left_alone(tmp_path: Path) -> None:
    """A cancelled reader leaves the store usable and its file closed."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 1, size=5_000_000)
    lease = await store.lease("1.2.3")
    (instance,) = lease.instances.values()
    store._files.at_once = False
    reader = await store.open(instance)
    buffer = memoryview(bytearray(reader.size))
    task = asyncio.create_task(reader.read_into([buffer], 0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = bytes(buffer)
    await reader.close()
    await reader.close()
    with pytest.raises(OSError, match="closed"):
        await reader.read_into([buffer], 0)
    assert bytes(buffer) == before
    assert await read_instance(store, instance) == data_set(
        instance.sop_instance_uid, size=5_000_000
    )
    lease.release()
    await store.close()


# ------------------------------------------------------------------ eviction


async def test_least_recently_used_studies_go_first(tmp_path: Path) -> None:
    """Crossing the high watermark evicts whole old studies, neither leased nor pinned ones."""
    store = await opened(tmp_path, max_size_bytes=1_000_000)
    for study in ("1.1", "1.2", "1.3", "1.4"):
        await fill(store, study, 2, size=100_000)
    assert await store.pin("1.1", True)
    in_use = await store.lease("1.2")
    await fill(store, "1.5", 2, size=100_000)
    assert {study.study_instance_uid for study in store.studies()} == {"1.1", "1.2", "1.4", "1.5"}
    stats = store.stats()
    assert (stats.evictions, stats.pinned) == (1, 1)
    assert stats.evicted_bytes > 200_000
    assert stats.bytes <= 1_000_000
    assert len(in_use.instances) == 2
    in_use.release()
    await store.close()
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("studies/*/*.dcm"))
    assert on_disk == stats.bytes


async def test_use_is_remembered_across_a_restart(tmp_path: Path) -> None:
    """What was touched last goes last, also in the next process."""
    store = await opened(tmp_path, max_size_bytes=1_000_000)
    for study in ("1.1", "1.2"):
        await fill(store, study, 1, size=400_000)
    lease = await store.lease("1.1")
    lease.touch()
    lease.release()
    await store.close()
    store = await opened(tmp_path, max_size_bytes=1_000_000)
    await fill(store, "1.3", 1, size=300_000)
    assert [study.study_instance_uid for study in store.studies()] == ["1.3", "1.1"]
    await store.close()


@pytest.mark.parametrize("held", ["leased", "pinned", "free", "absent"])
async def test_eviction_on_request_says_what_came_of_it(tmp_path: Path, held: str) -> None:
    """A study that may not go stays, and the answer says why."""
    store = await opened(tmp_path)
    if held != "absent":
        await fill(store, "1.2.3", 1)
    await settled(store)
    lease = await store.lease("1.2.3") if held == "leased" else None
    if held == "pinned":
        assert await store.pin("1.2.3", True)
    expected = {"leased": "in_use", "pinned": "pinned", "free": "evicted", "absent": "not_held"}
    assert await store.evict("1.2.3") == expected[held]
    assert len(store.studies()) == (held in ("leased", "pinned"))
    if lease is not None:
        lease.release()
    await store.close()


async def test_studies_unused_for_too_long_go(tmp_path: Path) -> None:
    """With a maximum age, what nobody used is evicted without anything arriving."""
    store = await opened(tmp_path, max_age_seconds=2.0)
    await fill(store, "1.2.4", 1)
    assert await store.pin("1.2.4", True)
    await fill(store, "1.2.3", 1)
    for _ in range(1200):
        if len(store.studies()) == 1:
            break
        await asyncio.sleep(0.05)
    assert [study.study_instance_uid for study in store.studies()] == ["1.2.4"]
    await store.close()


async def test_pin_needs_a_study(tmp_path: Path) -> None:
    """Pinning what is not held says so and leaves nothing behind."""
    store = await opened(tmp_path)
    assert not await store.pin("1.2.3", True)
    await settled(store)
    assert store.studies() == []
    await store.close()
    assert list(Layout(tmp_path).studies.iterdir()) == []


# -------------------------------------------------------- locks and damage


async def test_directory_has_one_owner(tmp_path: Path) -> None:
    """A second store is told that the cache is in use; after closing it may have it."""
    store = await opened(tmp_path)
    with pytest.raises(CacheLocked):
        await DiskInstanceStore(settings(tmp_path)).start()
    await store.close()
    second = await opened(tmp_path)
    await second.close()
    await second.close()


@pytest.mark.parametrize("how", ["short", "changed", "missing", "link"])
async def test_damaged_instance_is_not_served(
    tmp_path: Path, how: str, log_watch: LogWatch
) -> None:
    """After an unclean start a file that is not what was stored is removed, and that is logged."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 2)
    await store.close()
    Layout(tmp_path).clean.unlink()
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    instance = lease.instances["1.2.3.1.1"]
    path = Layout(tmp_path).study("1.2.3") / instance.file_name
    data = path.read_bytes()
    if how == "short":
        path.write_bytes(data[:-1])
    elif how == "changed":
        path.write_bytes(data[:-1] + b"x")
    else:
        path.unlink()
    if how == "link":
        path.symlink_to("/etc/hostname")
    if how == "link":
        with pytest.raises(OSError):
            await store.open(instance)
    else:
        with pytest.raises(Refused, match="damaged"):
            await store.open(instance)
        assert set(lease.instances) == {"1.2.3.1.2"}
        assert not lease.complete
        (entry,) = log_watch.named("cache_degraded")
        assert entry["reason"] == "instance_damaged"
    sound = lease.instances["1.2.3.1.2"]
    assert await read_instance(store, sound) == data_set("1.2.3.1.2")
    lease.release()
    await store.close()


async def test_unchecked_bytes_give_way_to_the_same_ones_arriving(tmp_path: Path) -> None:
    """A duplicate that arrives after an unclean start heals a file that rotted."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 1)
    await store.close()
    Layout(tmp_path).clean.unlink()
    (path,) = Layout(tmp_path).study("1.2.3").glob("*.dcm")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    again = await store_bytes(store, lease, "1.2.3.1.1", data_set("1.2.3.1.1"))
    assert again.duplicate
    assert await read_instance(store, again.instance) == data_set("1.2.3.1.1")
    assert store.stats().bytes == path.stat().st_size
    lease.release()
    await store.close()


async def test_verify_finds_damage_after_a_clean_start_too(tmp_path: Path) -> None:
    """Verifying reads every byte, and removes what is not as it was stored."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 3)
    path = next(Layout(tmp_path).study("1.2.3").glob("*.dcm"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(await store.verify("1.2.3")) == 1
    assert await store.verify("1.2.3") == []
    assert store.stats().instances == 2
    await store.close()


async def test_unclean_start_believes_files_only(tmp_path: Path) -> None:
    """Files without a line, lines without a file and strange directories are cleared away."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 2)
    await fill(store, "1.2.4", 1)
    await store.close()
    layout = Layout(tmp_path)
    layout.clean.unlink()
    next(layout.study("1.2.3").glob("*.dcm")).unlink()
    (layout.study("1.2.4") / "stray.dcm").write_bytes(b"x")
    (layout.studies / "stranger").mkdir()
    (layout.studies / "file").write_bytes(b"x")
    (layout.incoming / "x.part").write_bytes(b"x")
    store = await opened(tmp_path)
    assert {(s.study_instance_uid, s.instances, s.complete) for s in store.studies()} == {
        ("1.2.3", 1, False),
        ("1.2.4", 1, True),
    }
    assert sorted(path.name for path in layout.studies.iterdir()) == sorted(
        layout.study(uid).name for uid in ("1.2.3", "1.2.4")
    )
    assert not (layout.study("1.2.4") / "stray.dcm").exists()
    assert list(layout.incoming.iterdir()) == []
    await store.close()


def _garbage(database: Path) -> None:
    database.write_bytes(b"garbage" * 1000)


def _pickle_row(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE Cache SET mode = 4, value = ?", (b"cos\nsystem\n(S'touch pwned'\ntR.",)
        )
    connection.close()


def _pickle_key(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE Cache SET raw = 0, key = ?", (b"cos\nsystem\n(S'touch pwned'\ntR.",)
        )
    connection.close()


def _hostile_settings(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT OR REPLACE INTO Settings VALUES ('eviction_policy', 'x')")
        connection.execute("INSERT OR REPLACE INTO Settings VALUES ('__class__', 'x')")
    connection.close()


@pytest.mark.parametrize("spoil", [_garbage, _pickle_row, _pickle_key, _hostile_settings])
async def test_spoilt_index_is_rebuilt_from_journals(
    tmp_path: Path, spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a database that is not ours is executed or believed; studies are kept."""
    monkeypatch.chdir(tmp_path)
    store = await opened(tmp_path / "cache")
    for study in ("1.2.3", "1.2.4"):
        await fill(store, study, 2)
    await store.close()
    index = Layout(tmp_path / "cache").index
    if spoil in (_pickle_row, _pickle_key):
        with sqlite3.connect(index / "cache.db") as connection:
            connection.execute("DELETE FROM Cache WHERE rowid > 1")
        connection.close()
    spoil(index / "cache.db")
    store = await opened(tmp_path / "cache")
    assert not (tmp_path / "pwned").exists()
    assert {(s.study_instance_uid, s.instances, s.complete) for s in store.studies()} == {
        ("1.2.3", 2, True),
        ("1.2.4", 2, True),
    }
    await store.close()
    store = await opened(tmp_path / "cache")
    assert len(store.studies()) == 2
    await store.close()


async def test_damaged_journal_costs_its_study_only(tmp_path: Path) -> None:
    """A study whose journal names another study, or nothing, is empty; others are untouched."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 1)
    await fill(store, "1.2.4", 1)
    await store.close()
    (Layout(tmp_path).study("1.2.3") / "journal").write_bytes(os.urandom(100))
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    assert not lease.instances
    await store_bytes(store, lease, "1.2.3.7", data_set("1.2.3.7"))
    lease.release()
    other = await store.lease("1.2.4")
    assert len(other.instances) == 1
    other.release()
    await store.close()


async def test_memory_follows_what_is_in_use(tmp_path: Path) -> None:
    """Instances of a study are forgotten with its last lease, and loaded with the next."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 2)
    await settled(store)
    study = store._keeper.table.get("1.2.3")
    assert study is not None
    assert study.contents is None
    first, second = await store.lease("1.2.3"), await store.lease("1.2.3")
    first.release()
    first.release()
    await settled(store)
    assert not first.instances
    assert len(second.instances) == 2
    second.release()
    await store.close()


async def test_lru_uses_the_clock_of_use(tmp_path: Path) -> None:
    """Last use is listed as seconds since 1970, the last used study first."""
    store = await opened(tmp_path)
    before = time.time()
    await fill(store, "1.2.3", 1)
    await fill(store, "1.2.4", 1)
    listed = store.studies()
    assert [study.study_instance_uid for study in listed] == ["1.2.4", "1.2.3"]
    assert all(before <= study.last_used <= time.time() for study in listed)
    store.count_hits(2)
    store.count_misses(1)
    assert (store.stats().hits, store.stats().misses) == (2, 1)
    await store.close()
