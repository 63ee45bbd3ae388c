"""A disk that takes no more: eviction, then memory, then a refusal; never a lost byte."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.ports import StoreFull
from tests.cache.support import CT, EXPLICIT, data_set, fill, opened, read_instance, store_bytes
from tests.support.log_watch import LogWatch

MB = 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = os.geteuid() == 0 and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


async def test_full_disk_evicts_and_goes_on(small_disk: Path) -> None:
    """What nobody uses makes room, and the bytes written so far are kept."""
    store = await opened(small_disk)
    await fill(store, "1.1", 3, size=MB)
    lease = await store.lease("1.2")
    uid = "1.2.1"
    stored = await store_bytes(store, lease, uid, data_set(uid, "1.2", size=2 * MB))
    assert stored.instance.file_name
    assert [study.study_instance_uid for study in store.studies()] == ["1.2"]
    assert await read_instance(store, stored.instance) == data_set(uid, "1.2", size=2 * MB)
    lease.release()
    await store.close()


async def test_full_disk_with_nothing_to_evict_goes_on_in_memory(
    small_disk: Path, log_watch: LogWatch
) -> None:
    """Half on disk, half refused: the instance is whole in memory until its lease ends."""
    store = await opened(small_disk, memory_spool_bytes=5 * MB)
    lease = await store.lease("1.1")
    for number in range(1, 4):
        uid = f"1.1.{number}"
        await store_bytes(store, lease, uid, data_set(uid, "1.1", size=2_200_000, fill=number))
    in_memory = [held for held in lease.instances.values() if not held.file_name]
    assert len(in_memory) == 2
    assert store.stats().spooled_bytes == sum(held.size for held in in_memory)
    await lease.set_complete(True)
    assert lease.complete
    for number in range(1, 4):
        held = lease.instances[f"1.1.{number}"]
        expected = data_set(held.sop_instance_uid, "1.1", size=2_200_000, fill=number)
        assert await read_instance(store, held) == expected
    with pytest.raises(StoreFull):
        await store_bytes(store, lease, "1.1.4", data_set("1.1.4", "1.1", size=2_200_000))
    states = [entry["state"] for entry in log_watch.named("cache_degraded")]
    assert states == ["memory_spool", "refusing"]
    lease.release()
    await store.evict("none")  # queued behind what the release has queued
    again = await store.lease("1.1")
    assert (len(again.instances), again.complete) == (1, False)
    assert store.stats().spooled_bytes == 0
    again.release()
    await store.close()
    store = await opened(small_disk)
    assert [(s.instances, s.complete) for s in store.studies()] == [(1, False)]
    await store.close()


async def test_disk_that_recovers_is_used_again(small_disk: Path, log_watch: LogWatch) -> None:
    """Once there is room, instances become files, and the recovery is logged."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_900_000))
    store = await opened(small_disk / "cache")
    lease = await store.lease("1.1")
    first = await store_bytes(store, lease, "1.1.1", data_set("1.1.1", "1.1", size=MB))
    filler.unlink()
    second = await store_bytes(store, lease, "1.1.2", data_set("1.1.2", "1.1", size=MB))
    assert (bool(first.instance.file_name), bool(second.instance.file_name)) == (False, True)
    assert len(log_watch.named("cache_recovered")) == 1
    lease.release()
    await store.close()


async def test_full_disk_at_the_start_does_not_stop_the_service(small_disk: Path) -> None:
    """Without room even for a database the store opens, and instances go to memory."""
    store = await opened(small_disk / "cache")
    await store.close()
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    store = await opened(small_disk / "cache")
    lease = await store.lease("1.1")
    stored = await store_bytes(store, lease, "1.1.1", data_set("1.1.1", "1.1", size=MB))
    assert await read_instance(store, stored.instance) == data_set("1.1.1", "1.1", size=MB)
    lease.release()
    await store.close()


async def test_files_that_may_not_grow_go_to_memory(tmp_path: Path) -> None:
    """EFBIG evicts nothing, since that would not help."""
    store = await opened(tmp_path)
    await fill(store, "1.1", 1)
    lease = await store.lease("1.2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        data = data_set("1.2.1", "1.2", size=300_000)
        stored = await store_bytes(store, lease, "1.2.1", data, piece=30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stored.instance.file_name == ""
    assert await read_instance(store, stored.instance) == data
    assert len(store.studies()) == 1
    lease.release()
    await store.close()


async def test_instance_larger_than_the_cache_uses_memory_or_is_refused(tmp_path: Path) -> None:
    """The maximum size holds for a single instance too, and the store works on."""
    store = await opened(tmp_path, max_size_bytes=100_000, memory_spool_bytes=300_000)
    lease = await store.lease("1.1")
    data = data_set("1.1.1", "1.1", size=200_000)
    stored = await store_bytes(store, lease, "1.1.1", data, piece=30_000)
    assert await read_instance(store, stored.instance) == data
    with pytest.raises(StoreFull):
        await store_bytes(store, lease, "1.1.2", data_set("1.1.2", "1.1", size=200_000))
    small = await store_bytes(store, lease, "1.1.3", data_set("1.1.3", "1.1", size=10_000))
    assert small.instance.file_name
    assert store.stats().bytes < 100_000
    lease.release()
    await store.close()


async def test_free_space_is_kept(tmp_path: Path) -> None:
    """With less free than must be kept, nothing is written."""
    store = await opened(tmp_path, min_free_bytes=2**60)
    lease = await store.lease("1.1")
    stored = await store_bytes(store, lease, "1.1.1", data_set("1.1.1", "1.1"))
    assert stored.instance.file_name == ""
    assert list(tmp_path.glob("studies/*/*.dcm")) == []
    lease.release()
    await store.close()


@pytest.mark.parametrize("call", ["open", "writev", "rename", "pwrite", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_whatever_call_the_disk_refuses_nothing_is_lost(
    tmp_path: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance whose file cannot be begun, written, named or recorded is kept in memory."""
    store = await opened(tmp_path)
    lease = await store.lease("1.1")
    real = getattr(os, call)

    def refuse(first, *args, **kwargs):
        if isinstance(first, int) or "incoming" in str(first) or "studies" in str(first):
            raise OSError(code, "refused")
        return real(first, *args, **kwargs)

    data = data_set("1.1.1", "1.1", size=50_000)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        writer = store.receive(CT, "1.1.1", EXPLICIT, "north")
        writer.write([memoryview(data)[:9000]], lambda: None)
        writer.write([memoryview(data)[9000:]], lambda: None)
        stored = await writer.commit(lambda _header: lease)
    assert stored.instance.file_name == ""
    assert await read_instance(store, stored.instance) == data
    assert store.stats().bytes == 0
    after = await store_bytes(store, lease, "1.1.2", data_set("1.1.2", "1.1"))
    assert after.instance.file_name
    lease.release()
    await store.close()
    store = await opened(tmp_path)
    assert [(s.instances, s.complete) for s in store.studies()] == [(1, False)]
    await store.close()


async def test_study_that_the_disk_does_not_let_go_is_not_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still takes its room, counts as held, and is served."""
    store = await opened(tmp_path)
    await fill(store, "1.1", 2)
    before = store.stats()
    real = os.rename

    def refuse(path: Any, target: Any) -> None:
        if "trash" in str(target):
            raise OSError(errno.EIO, "refused")
        real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert await store.evict("1.1") == "failed"
    stats = store.stats()
    assert (stats.bytes, stats.instances, stats.evictions) == (before.bytes, 2, 0)
    assert store.is_complete("1.1")
    assert await store.evict("1.1") == "evicted"
    assert store.stats().bytes == 0
    await store.close()
