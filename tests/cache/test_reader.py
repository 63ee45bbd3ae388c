"""Reading for delivery: at once where memory has it, from the disk where it has not."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.cache import DiskInstanceStore
from dicomproxy.cache.reader import MemoryReader
from dicomproxy.ports import CachedInstance, StudyLease
from tests.cache.support import data_set, fill, opened, read_all, read_instance

SIZE = 300_000
Preadv = Callable[..., int]


async def held(store: DiskInstanceStore, count: int = 1) -> tuple[StudyLease, list[CachedInstance]]:
    await fill(store, "1.2.3", count, size=SIZE)
    lease = await store.lease("1.2.3")
    return lease, list(lease.instances.values())


def refusing(answer: int | OSError, calls: list[int]) -> Preadv:
    """A preadv that answers reads which may not wait with an error, or with that many bytes."""
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        calls.append(flags)
        if not flags:
            return real(fd, buffers, offset)
        if isinstance(answer, OSError):
            raise answer
        return real(fd, [memoryview(buffers[0])[:answer]], offset)

    return preadv


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux has such reads")
@pytest.mark.parametrize(
    ("answer", "asked_again"),
    [
        pytest.param(BlockingIOError(errno.EAGAIN, ""), True, id="not in memory"),
        pytest.param(OSError(errno.EOPNOTSUPP, ""), False, id="no such file system"),
        pytest.param(1000, True, id="only its beginning is in memory"),
    ],
)
async def test_what_is_not_in_memory_is_read_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | OSError, asked_again: bool
) -> None:
    """Whatever a read that may not wait gives, the instance arrives whole."""
    store = await opened(tmp_path)
    _, (instance,) = await held(store)
    calls: list[int] = []
    monkeypatch.setattr(os, "preadv", refusing(answer, calls))
    for _ in range(2):
        assert await read_instance(store, instance) == data_set("1.2.3.1.1", size=SIZE)
    assert calls.count(os.RWF_NOWAIT) == (2 if asked_again else 1)
    assert calls.count(0) >= 2
    await store.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux has such reads")
async def test_failing_disk_is_an_error_whoever_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input error is not mistaken for a read that would have to wait."""
    store = await opened(tmp_path)
    _, (instance,) = await held(store)
    reader = await store.open(instance)
    monkeypatch.setattr(os, "preadv", refusing(OSError(errno.EIO, ""), []))
    with pytest.raises(OSError, match="Errno 5"):
        await reader.read_into([memoryview(bytearray(10))], 0)
    await reader.close()
    await store.close()


async def test_several_are_opened_at_the_price_of_one(tmp_path: Path) -> None:
    """One visit to the threads opens all that are whole; what is not is left to open()."""
    store = await opened(tmp_path)
    lease, instances = await held(store, 4)
    directory = next((tmp_path / "studies").iterdir())
    await asyncio.to_thread(os.truncate, directory / instances[2].file_name, 100)
    readers = await store.open_several(instances)
    assert [reader is None for reader in readers] == [False, False, True, False]
    lease.release()
    assert await store.evict("1.2.3") == "in_use"
    for instance, reader in zip(instances, readers, strict=True):
        if reader is not None:
            assert await read_all(reader) == data_set(instance.sop_instance_uid, size=SIZE)
    assert await store.evict("1.2.3") == "evicted"
    assert await store.open_several(instances) == [None] * 4
    await store.close()


@pytest.mark.parametrize("head_bytes", [1, 100, SIZE - 1, SIZE, SIZE + 100])
async def test_beginnings_are_read_with_opening(tmp_path: Path, head_bytes: int) -> None:
    """What was asked for is there without another visit to a thread, the rest as ever."""
    store = await opened(tmp_path)
    _, (instance,) = await held(store, 1)
    whole = data_set(instance.sop_instance_uid, size=SIZE)
    (reader,) = await store.open_several([instance], head_bytes)
    assert reader is not None
    store._files.at_once = False  # as on file systems on which reads may always wait
    first = bytearray(min(head_bytes, len(whole)))
    reading = reader.read_into([memoryview(first)], 0)
    with pytest.raises(StopIteration):
        reading.send(None)  # it ends without having waited once
    assert first == whole[:head_bytes]

    for offset in (0, 1, head_bytes - 1, head_bytes, SIZE - 1):
        one, two = bytearray(70), bytearray(SIZE)
        count = await reader.read_into([memoryview(one), memoryview(two)], offset)
        assert count == min(len(whole) - offset, 70 + SIZE)
        assert (one + two)[:count] == whole[offset : offset + count]
    await reader.close()
    with pytest.raises(OSError, match="closed"):
        await reader.read_into([memoryview(first)], 0)
    await store.close()


async def test_opening_several_given_up_leaves_nothing_in_use(tmp_path: Path) -> None:
    """Whoever no longer wants them keeps neither the study nor its files, nor what memory holds."""
    store = await opened(tmp_path)
    lease, instances = await held(store, 3)
    study = store._keeper.table.get("1.2.3")
    assert study is not None
    assert study.contents is not None
    # As if it had found no room on disk.
    study.contents.spool[instances[0].sop_instance_uid] = bytearray(SIZE)
    task = asyncio.create_task(store.open_several(instances))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    study.contents.spool.clear()
    lease.release()
    assert await store.evict("1.2.3") == "evicted"
    await store.close()


async def test_several_cannot_be_opened_once_the_threads_have_ended(tmp_path: Path) -> None:
    """A store that is being closed opens nothing ahead, and keeps nothing in use."""
    store = await opened(tmp_path)
    lease, instances = await held(store, 2)
    store._readers.shutdown(wait=False)
    assert await store.open_several(instances) == [None, None]
    lease.release()
    assert await store.evict("1.2.3") == "evicted"
    await store.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
async def test_advice_that_is_refused_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that does not read ahead is read all the same."""

    def refused(*_: int) -> None:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(os, "posix_fadvise", refused)
    store = await opened(tmp_path)
    _, instances = await held(store, 2)
    for instance, reader in zip(instances, await store.open_several(instances), strict=True):
        assert reader is not None
        assert await read_all(reader) == data_set(instance.sop_instance_uid, size=SIZE)
    await store.close()


async def test_what_is_closed_is_closed_soon(tmp_path: Path) -> None:
    """Descriptors are closed a few at a time, and none is left at the end."""
    store = await opened(tmp_path)
    lease, instances = await held(store, 3)
    before = len(await asyncio.to_thread(os.listdir, "/proc/self/fd"))
    for reader in await store.open_several(instances):
        assert reader is not None
        await reader.close()
    store._files.flush()
    await asyncio.get_running_loop().run_in_executor(store._readers, lambda: None)
    lease.release()
    await store.close()
    assert len(await asyncio.to_thread(os.listdir, "/proc/self/fd")) < before + 3


async def test_when_an_instance_came_is_known_after_a_restart(tmp_path: Path) -> None:
    """It stays what it was, however often the instance is opened; in memory it is not kept."""
    before = int(time.time())
    store = await opened(tmp_path)
    _, (instance,) = await held(store)
    reader = await store.open(instance)
    arrived = reader.arrived
    await reader.close()
    await store.close()
    assert before <= arrived <= time.time()

    os.utime(next(tmp_path.rglob(instance.file_name)), (arrived - 1000, arrived - 1000))
    store = await opened(tmp_path)
    lease = await store.lease("1.2.3")
    (ahead,) = await store.open_several(list(lease.instances.values()))
    assert ahead is not None
    assert ahead.arrived == arrived - 1000
    await ahead.close()
    lease.release()
    await store.close()
    assert MemoryReader(bytearray(b"12"), lambda: None).arrived == 0
