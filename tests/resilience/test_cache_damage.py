"""A cache that was damaged, emptied or reconfigured while the proxy was down, or turns read-only.

Whatever was done to it: the workstation gets every instance whole, and only
what is really gone or spoilt is fetched a second time.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diskcache
import pytest

from dicomproxy.cache.layout import Layout
from tests.e2e.support import command
from tests.resilience.archive import Archive
from tests.resilience.reading import Reading
from tests.resilience.region import assert_whole, peers, region, uid_of, uids, written
from tests.support.datasets import study
from tests.support.log_watch import LogWatch

Damage = Callable[[Layout, Path], None]
"""Does something to a cache, or to the directory of the one study in it."""


def _rot(layout: Layout, directory: Path) -> None:
    """Change one bit in the pixels of one file, after a stop that was not orderly."""
    layout.clean.unlink()
    path = min(directory.glob("*.dcm"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(data)


def _truncate(_layout: Layout, directory: Path) -> None:
    path = min(directory.glob("*.dcm"))
    os.truncate(path, path.stat().st_size - 1)


def _delete(_layout: Layout, directory: Path) -> None:
    min(directory.glob("*.dcm")).unlink()


def _lose_index(layout: Layout, _directory: Path) -> None:
    shutil.rmtree(layout.index)


def _empty_index(layout: Layout, _directory: Path) -> None:
    for path in layout.index.iterdir():
        path.unlink()


def _spoil_index(layout: Layout, _directory: Path) -> None:
    for path in layout.index.iterdir():
        path.write_bytes(b"\xff" * max(1, path.stat().st_size))


def _cut_index(layout: Layout, _directory: Path) -> None:
    (path,) = layout.index.glob("*.db")
    os.truncate(path, path.stat().st_size // 2)


def _lose_journal(_layout: Layout, directory: Path) -> None:
    (directory / "journal").unlink()


def _tear_journal(layout: Layout, directory: Path) -> None:
    """Leave its last line but one half written, as a power failure may."""
    layout.clean.unlink()
    path = directory / "journal"
    lines = path.read_bytes().splitlines(keepends=True)
    adding = [number for number, line in enumerate(lines) if b".dcm" in line or b"add" in line]
    last = adding[-1] if adding else len(lines) - 2
    path.write_bytes(b"".join(lines[:last]) + lines[last][: len(lines[last]) // 2])


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (_rot, 1),
        (_truncate, 1),
        (_delete, 1),
        (_lose_index, 0),
        (_empty_index, 0),
        (_spoil_index, 0),
        (_cut_index, 0),
        (_lose_journal, 4),
        (_tear_journal, 1),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else str(value),
)
async def test_damage_costs_what_it_spoilt(tmp_path: Path, damage: Damage, again: int) -> None:
    """As many instances as were spoilt are fetched anew, and none is delivered that was."""
    held = study(1, 4)
    async with region(tmp_path, Archive("NORTH", held)) as here:
        assert (await here.reading.move(uid_of(held))).status == 0x0000
    layout = Layout(tmp_path / "cache")
    assert layout.clean.exists()
    damage(layout, layout.study(uid_of(held)))

    north = Archive("NORTH", held)
    readings = [Reading("READING1"), Reading("READING2")]
    async with region(tmp_path, north, readings=readings) as here:
        assert_whole(await readings[0].move(uid_of(held)), readings[0], north)
        assert north.sent.total() == again
        assert_whole(await readings[1].move(uid_of(held)), readings[1], north)
        assert north.sent.total() == again
        stats = here.application.store.stats()
        assert (stats.studies, stats.instances) == (1, 4)


def _read_only(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let every call that would change something below *root* fail as on a read-only disk.

    A disk that fails is turned read-only under files that are open, which no
    process can ask for: so the calls are made to fail instead.
    """

    def refuse(name: str) -> None:
        real = getattr(os, name)

        def call(first: Any, *args: Any, **more: Any) -> Any:
            path = f"/proc/self/fd/{first}" if isinstance(first, int) else os.fspath(first)
            if isinstance(first, int):
                path = os.readlink(path)
            writes = name != "open" or (args and args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and path.startswith(str(root)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(first, *args, **more)

        patch.setattr(os, name, call)

    for name in ("open", "writev", "pwrite", "rename", "mkdir", "unlink", "rmdir", "ftruncate"):
        refuse(name)

    def refuse_row(*_args: Any, **_more: Any) -> None:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        raise error

    for name in ("set", "delete"):
        patch.setattr(diskcache.Cache, name, refuse_row)


async def test_file_system_turned_read_only(tmp_path: Path, log_watch: LogWatch) -> None:
    """What is held is served, what is not passes through memory; afterwards files again."""
    cached, passing, later = study(1, 3), study(1, 3), study(1, 3)
    north = Archive("NORTH", [*cached, *passing, *later])
    readings = [Reading(f"READING{number}") for number in range(1, 5)]
    keys = {"state": {"directory": str(tmp_path / "state")}}
    async with region(tmp_path, north, readings=readings, **keys) as here:
        assert (await readings[0].move(uid_of(cached))).status == 0x0000
        with pytest.MonkeyPatch.context() as patch:
            _read_only(patch, tmp_path / "cache")

            again = await readings[1].move(uid_of(cached))
            through = await readings[2].move(uid_of(passing))

            assert (again.status, set(readings[1].arrived)) == (0x0000, uids(cached))
            assert (through.status, set(readings[2].arrived)) == (0x0000, uids(passing))
            assert {north.sent[uid] for uid in uids(cached)} == {1}
            reasons = {entry.get("reason") for entry in log_watch.named("cache_degraded")}
            assert "EROFS" in reasons
            # Behind whatever has been left to do, which fails too.
            assert await here.application.store.evict("none") == "not_held"

        assert (await readings[3].move(uid_of(later))).status == 0x0000
        assert log_watch.named("cache_recovered")
        assert here.application.store.stats().spooled_bytes == 0

    north = Archive("NORTH", [*cached, *later])
    readings = [Reading("READING1"), Reading("READING2")]
    async with region(tmp_path, north, readings=readings, **keys):
        for reading, held in zip(readings, (cached, later), strict=True):
            assert (await reading.move(uid_of(held))).status == 0x0000
            assert set(reading.arrived) == uids(held)
        assert north.sent.total() == 0


async def test_eviction_on_a_read_only_file_system(tmp_path: Path) -> None:
    """What cannot be deleted takes room all the same: the limit is kept, memory stands in."""
    old, new = study(1, 4, rows=128, columns=256), study(1, 4, rows=128, columns=256)
    size = 4 * 128 * 256 * 2
    north = Archive("NORTH", [*old, *new])
    readings = [Reading("READING1"), Reading("READING2"), Reading("READING3")]
    keys = {
        "state": {"directory": str(tmp_path / "state")},
        "cache": {"max_size": f"{int(1.5 * size)}B"},
    }
    async with region(tmp_path, north, readings=readings, **keys):
        assert (await readings[0].move(uid_of(old))).status == 0x0000
        with pytest.MonkeyPatch.context() as patch:
            _read_only(patch, tmp_path / "cache")
            assert (await readings[1].move(uid_of(new))).status == 0x0000
        assert set(readings[1].arrived) == uids(new)
        assert (await readings[2].move(uid_of(new))).status == 0x0000
        files = await asyncio.to_thread(lambda: [*(tmp_path / "cache").rglob("*.dcm")])
        assert sum(path.stat().st_size for path in files) <= 1.5 * size


async def test_file_system_that_is_read_only_at_the_start(tmp_path: Path) -> None:
    """Nothing could be recorded: the proxy ends with 1 and says why."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        async with peers(tmp_path, [], [Reading("READING1")]) as (_, content):
            content["cache"]["directory"] = str(disk / "cache")
            config = written(tmp_path, content)
            code, output = await command("serve", "--config", str(config), directory=tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert code == 1
    assert "start_failed" in output
    assert "EROFS" in output or "Read-only" in output


async def test_limit_lowered_between_two_starts(tmp_path: Path) -> None:
    """Less may be held than is: the oldest goes at once, the latest is still there."""
    studies = [study(1, 4, rows=128, columns=256) for _ in range(4)]
    size = 4 * 128 * 256 * 2
    north = Archive("NORTH", [one for held in studies for one in held])
    async with region(tmp_path, north) as here:
        for held in studies:
            assert (await here.reading.move(uid_of(held))).status == 0x0000
        assert here.application.store.stats().bytes > 4 * size

    again = Archive("NORTH", [one for held in studies for one in held])
    limit = int(2.5 * size)
    async with region(tmp_path, again, cache={"max_size": f"{limit}B"}) as here:
        stats = here.application.store.stats()
        assert stats.bytes <= limit
        assert [one.study_instance_uid for one in here.application.store.studies()] == [
            uid_of(held) for held in reversed(studies[-stats.studies :])
        ]
        assert stats.studies > 0
        assert (await here.reading.move(uid_of(studies[-1]))).status == 0x0000
        assert again.sent.total() == 0


async def test_limit_lowered_below_what_is_pinned(tmp_path: Path) -> None:
    """What is pinned stays, and nothing is written above the limit: it passes through memory."""
    kept, other = study(1, 4, rows=128, columns=256), study(1, 2)
    north = Archive("NORTH", [*kept, *other])
    async with region(tmp_path, north) as here:
        assert (await here.reading.move(uid_of(kept))).status == 0x0000
        await here.application.store.pin(uid_of(kept), True)
        held_bytes = here.application.store.stats().bytes

    again = Archive("NORTH", [*kept, *other])
    readings = [Reading("READING1"), Reading("READING2")]
    cache = {"max_size": f"{held_bytes // 2}B"}
    async with region(tmp_path, again, readings=readings, cache=cache) as here:
        assert (await readings[0].move(uid_of(other))).status == 0x0000
        assert set(readings[0].arrived) == uids(other)
        assert (await readings[1].move(uid_of(kept))).status == 0x0000
        assert set(again.sent) == uids(other)
        assert here.application.store.stats().bytes == held_bytes
