"""A process that dies at any step leaves a cache that opens and serves whole instances only."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dicomproxy.ports import Refused
from tests.cache.support import data_set, fill, opened, read_instance, store_bytes

_DIED = 77
_CALLS = ("open", "writev", "rename", "pwrite", "mkdir", "unlink", "fsync", "ftruncate")
_STEPS = 200
_CHUNK = 40


async def _busy(directory: Path) -> None:
    """Everything that changes a cache, on top of a study that is held already."""
    store = await opened(directory, max_size_bytes=60_000)
    await fill(store, "1.1", 2, size=9_000)
    lease = await store.lease("1.2")
    for number in range(1, 4):
        uid = f"1.2.1.{number}"
        await store_bytes(store, lease, uid, data_set(uid, "1.2", size=9_000), piece=3000)
    await lease.remove(["1.2.1.1"])
    await lease.set_complete(True)
    await store.drop("1.0")
    lease.release()
    await store.pin("1.2", True)
    await fill(store, "1.3", 2, size=9_000)  # evicts 1.1
    await store.close()


def _die_at(step: int, calls: tuple[str, ...]) -> None:
    """Leave the process right after, or for odd steps right before, the call of that number."""
    seen = 0

    def counted(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            if step % 2 and seen == step // 2 + 1:
                if name in ("writev", "pwrite"):  # half of it got there
                    _write_half(name, args)
                os._exit(_DIED)
            mine = seen
            try:
                return real(*args, **kwargs)
            finally:
                if not step % 2 and mine == step // 2 + 1:
                    os._exit(_DIED)

        setattr(os, name, call)

    write = os.write
    pwrite = os.pwrite

    def _write_half(name: str, args) -> None:
        if name == "writev":
            data = b"".join(args[1])
            write(args[0], data[: len(data) // 2])
        else:
            pwrite(args[0], args[1][: len(args[1]) // 2], args[2])

    for name in calls:
        counted(name)


def main() -> None:
    directory, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for step in range(first, last):
        child = os.fork()
        if not child:
            here = directory / str(step)
            here.mkdir()

            async def prepared(here: Path = here) -> None:
                store = await opened(here, max_size_bytes=60_000)
                await fill(store, "1.0", 2, size=500)
                await store.close()

            asyncio.run(prepared())
            _die_at(step, _CALLS)
            asyncio.run(_busy(here))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, _DIED):
            sys.exit(f"step {step} ended with {code}")
        print(step, code, flush=True)


async def _serves_whole_instances_only(directory: Path) -> int:
    store = await opened(directory, max_size_bytes=60_000)
    sizes = {"1.0": 500, "1.1": 9_000, "1.2": 9_000, "1.3": 9_000}
    whole = {"1.0": 2, "1.1": 2, "1.2": 2, "1.3": 2}
    served = 0
    for study in store.studies():
        uid = study.study_instance_uid
        lease = await store.lease(uid)
        assert len(lease.instances) == study.instances
        if lease.complete:
            assert len(lease.instances) == whole[uid]
        for instance in tuple(lease.instances.values()):
            try:
                data = await read_instance(store, instance)
            except Refused:
                continue
            assert data == data_set(instance.sop_instance_uid, uid, size=sizes[uid])
            served += 1
        lease.release()
    on_disk = sum(path.stat().st_size for path in directory.glob("studies/*/*.dcm"))
    assert store.stats().bytes == on_disk
    # And it takes new ones.
    await fill(store, "1.9", 1)
    await store.close()
    return served


@pytest.mark.parametrize("first", range(0, _STEPS, _CHUNK))
async def test_crash_at_any_step_leaves_whole_instances(tmp_path: Path, first: int) -> None:
    """A child leaves before, within or after each system call that changes the cache."""
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.cache.test_crash",
            str(tmp_path),
            str(first),
            str(first + _CHUNK),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    codes = [int(line.split()[1]) for line in finished.stdout.splitlines()]
    assert len(codes) == _CHUNK
    if first + _CHUNK < _STEPS:
        assert set(codes) == {_DIED}
    else:
        assert codes[-1] == 0, "more calls than steps: raise _STEPS"
    served = [await _serves_whole_instances_only(tmp_path / str(first + n)) for n in range(_CHUNK)]
    if first >= _CHUNK:
        assert max(served) >= 2


if __name__ == "__main__":
    main()
