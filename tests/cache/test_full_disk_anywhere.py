"""A disk that is full at any single call, or from that call on: what was stored is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dicomproxy.ports import Refused
from tests.cache.support import data_set, fill, opened, read_instance, store_bytes

_CALLS = ("open", "writev", "pwrite", "rename", "mkdir")
_STEPS = 60
_CHUNK = 15


class _Disk:
    """Counts the calls that change *root*, and refuses some for want of space."""

    def __init__(self, root: Path, step: int, *, lasting: bool) -> None:
        self._root, self._step, self._lasting = str(root), step, lasting
        self.seen = 0

    def fits(self, first: object) -> bool:
        if isinstance(first, int):
            first = os.readlink(f"/proc/self/fd/{first}")
        if not str(first).startswith(self._root):
            return True
        self.seen += 1
        return self.seen < self._step or (self.seen > self._step and not self._lasting)


def _make_full(patch: pytest.MonkeyPatch, disk: _Disk) -> None:
    def may_fail(name: str) -> None:
        real = getattr(os, name)

        def call(first, *args, **more):
            changes = name != "open" or (args and args[0] & (os.O_WRONLY | os.O_RDWR))
            if changes and not disk.fits(first):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(first, *args, **more)

        patch.setattr(os, name, call)

    for name in _CALLS:
        may_fail(name)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("first", range(1, _STEPS, _CHUNK))
async def test_no_space_at_any_call(tmp_path: Path, first: int, lasting: bool) -> None:
    """Every instance taken is read back byte for byte, then, and after a restart if it is held."""
    seen = 0
    for step in range(first, first + _CHUNK):
        seen = await _used(tmp_path / str(step), step, lasting=lasting)
    assert first + _CHUNK < _STEPS or seen < first + _CHUNK, "more calls than steps: raise _STEPS"


async def _used(root: Path, step: int, *, lasting: bool) -> int:
    uids = [f"1.2.1.{number}" for number in range(1, 5)]
    sizes = dict(zip(uids, (40_000, 9_000, 70_000, 500), strict=True))
    store = await opened(root, max_size_bytes=200_000)
    await fill(store, "1.1", 2, size=30_000)  # may go
    disk = _Disk(root, step, lasting=lasting)
    with pytest.MonkeyPatch.context() as patch:
        _make_full(patch, disk)
        lease = await store.lease("1.2")
        for uid in uids:
            await store_bytes(
                store, lease, uid, data_set(uid, "1.2", size=sizes[uid]), piece=20_000
            )
        await lease.remove([uids[1]])
        await lease.set_complete(True)
        left = dict(lease.instances)
        assert set(left) == {uids[0], *uids[2:]}
        for uid, held in left.items():
            assert await read_instance(store, held) == data_set(uid, "1.2", size=sizes[uid])
        on_disk = {uid for uid, held in left.items() if held.file_name}
        lease.release()
        await store.evict("none")  # behind what the release has left to do
    assert store.stats().spooled_bytes == 0
    await store.close()

    store = await opened(root, max_size_bytes=200_000)
    lease = await store.lease("1.2")
    assert set(lease.instances) <= {*left, uids[1]}
    assert on_disk <= set(lease.instances)
    if lease.complete:
        assert set(lease.instances) == set(left)
    for uid, held in dict(lease.instances).items():
        try:
            data = await read_instance(store, held)
        except Refused:
            assert uid not in on_disk
            continue
        assert data == data_set(uid, "1.2", size=sizes[uid])
    lease.release()
    files = sum(path.stat().st_size for path in root.glob("studies/*/*.dcm"))
    assert files == store.stats().bytes <= 200_000
    await store.close()
    return disk.seen
