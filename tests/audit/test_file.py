"""The audit file: on disk before record returns, in order, and never in the way of traffic."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.audit import FileAudit, verify
from dicomproxy.ports import AuditEvent
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch


def event(number: int, **fields: Any) -> AuditEvent:
    return AuditEvent(
        event="disclosure",
        outcome="success",
        caller_ae_title="READING1",
        peer_address="127.0.0.1",
        source="north",
        operation_id=f"op{number}",
        patient_id=PATIENT_ID,
        **fields,
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def faults(path: Path) -> list[str]:
    return [fault.reason for fault in verify(path.read_bytes().splitlines(keepends=True))]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the other side is a thread
            await asyncio.sleep(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit" / "audit.jsonl"


@pytest.fixture
async def audit(path: Path) -> AsyncIterator[FileAudit]:
    audit = FileAudit(path, retry_seconds=0.02)
    await audit.start()
    yield audit
    await audit.close()


class Disk:
    """Stands before os.write or os.fsync: counts calls, fails or holds them when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing = False
        self.syncs = 0
        self.torn = False
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()
        write, fsync = os.write, os.fsync

        def writing(descriptor: int, data: Any) -> int:
            if self.failing:
                if self.torn:
                    write(descriptor, bytes(data)[:10])
                raise OSError(errno.ENOSPC, "full")
            return write(descriptor, data)

        def syncing(descriptor: int) -> None:
            self.syncs += 1
            self.entered.set()
            assert self.go.wait(10)
            fsync(descriptor)

        monkeypatch.setattr(os, "write", writing)
        monkeypatch.setattr(os, "fsync", syncing)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, audit: FileAudit) -> Disk:
    return Disk(monkeypatch)


async def test_event_is_in_the_file_when_record_returns(audit: FileAudit, path: Path) -> None:
    """One numbered line per event, with the patient and the time, in order."""
    await audit.record(event(1), event(2))
    await audit.record(event(3))
    found = read(path)
    assert [line["operation_id"] for line in found] == ["op1", "op2", "op3"]
    assert [line["seq"] for line in found] == [1, 2, 3]
    assert {line["patient_id"] for line in found} == {PATIENT_ID}
    assert all(line["at"].endswith("+00:00") for line in found)
    assert faults(path) == []


async def test_record_does_not_return_before_the_disk_has_it(audit: FileAudit, disk: Disk) -> None:
    """record waits for fsync, not only for write."""
    disk.go.clear()
    call = asyncio.create_task(audit.record(event(1)))
    await until(disk.entered.is_set)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not call.done()
    disk.go.set()
    async with asyncio.timeout(60):
        await call


async def test_concurrent_calls_share_a_sync(audit: FileAudit, disk: Disk, path: Path) -> None:
    """Two hundred calls during one sync cost one more sync."""
    disk.go.clear()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(audit.record(event(0)))
        await until(disk.entered.is_set)
        for number in range(1, 201):
            group.create_task(audit.record(event(number)))
        await until(lambda: "201 queued" in repr(audit))
        disk.go.set()
    assert disk.syncs == 2
    assert [line["operation_id"] for line in read(path)] == [f"op{n}" for n in range(201)]


async def test_cancelled_call_is_recorded_all_the_same(
    audit: FileAudit, disk: Disk, path: Path
) -> None:
    """Whoever gives up waiting does not take the event back."""
    disk.go.clear()
    call = asyncio.create_task(audit.record(event(1)))
    await until(disk.entered.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    disk.go.set()
    await audit.record(event(2))
    assert [line["operation_id"] for line in read(path)] == ["op1", "op2"]


async def test_file_is_for_its_owner_only(audit: FileAudit, path: Path) -> None:
    """A file that names patients is made so that nobody else can read it."""
    await audit.record(event(1))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_chain_goes_on_after_a_restart(path: Path) -> None:
    """The next process continues number and hash where the last one ended."""
    for number in range(3):
        audit = FileAudit(path)
        await audit.start()
        await audit.record(event(number))
        await audit.close()
    assert [line["seq"] for line in read(path)] == [1, 2, 3]
    assert faults(path) == []


@pytest.mark.parametrize("torn", [b'{"seq":3,"prev', b"x" * 300_000, b"\x00" * 4096])
async def test_torn_last_line_is_ended_at_start(
    path: Path, log_watch: LogWatch, torn: bytes
) -> None:
    """What a crash left of a line stays, on a line of its own, and the chain goes on."""
    audit = FileAudit(path)
    await audit.start()
    await audit.record(event(1), event(2))
    await audit.close()
    with path.open("ab") as file:
        file.write(torn)
    audit = FileAudit(path)
    await audit.start()
    await audit.record(event(3))
    await audit.close()
    assert path.read_bytes().splitlines()[2] == torn
    assert json.loads(path.read_bytes().splitlines()[3])["seq"] == 3
    assert faults(path) == ["unreadable"]
    assert len(log_watch.named("audit_repaired")) == 1


@pytest.mark.parametrize("replacement", [False, True], ids=["moved", "moved_and_made_anew"])
async def test_file_rotated_away_is_opened_anew(
    audit: FileAudit, path: Path, tmp_path: Path, replacement: bool
) -> None:
    """After a rotation lines go to the new file, and continue the old one's chain."""
    await audit.record(event(1))
    path.rename(tmp_path / "old")
    if replacement:
        path.touch(0o640)
    await audit.record(event(2))
    assert [line["operation_id"] for line in read(tmp_path / "old")] == ["op1"]
    assert [line["seq"] for line in read(path)] == [2]
    (tmp_path / "both").write_bytes((tmp_path / "old").read_bytes() + path.read_bytes())
    assert faults(tmp_path / "both") == []


async def test_file_emptied_by_a_copying_rotation_goes_on(
    audit: FileAudit, path: Path, log_watch: LogWatch
) -> None:
    """A file cut to nothing under us is said, and takes the next line."""
    await audit.record(event(1))
    os.truncate(path, 0)
    await audit.record(event(2))
    assert [line["seq"] for line in read(path)] == [2]
    assert log_watch.named("audit_file_changed")


@pytest.mark.parametrize("torn", [False, True])
async def test_full_disk_keeps_events_in_order_and_nobody_waiting(
    audit: FileAudit, disk: Disk, path: Path, log_watch: LogWatch, torn: bool
) -> None:
    """While nothing can be written record returns, loudly; later every event is there once."""
    await audit.record(event(0))
    disk.torn = torn
    disk.failing = True
    async with asyncio.timeout(60):
        for number in range(1, 20):
            await audit.record(event(number))
    assert audit.failing
    first = log_watch.named("audit_failed")[0]
    assert (first["level"], first["errno"]) == ("critical", "ENOSPC")
    disk.failing = False
    await until(lambda: not audit.failing)
    await audit.record(event(20))
    assert [line["operation_id"] for line in read(path)] == [f"op{n}" for n in range(21)]
    assert faults(path) == []
    assert log_watch.named("audit_recovered")


async def test_events_beyond_the_queue_are_counted_lost_in_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """The queue has a bound; the file itself says afterwards how many are missing."""
    audit = FileAudit(path, retry_seconds=0.02, queue_bytes=1000)
    await audit.start()
    disk = Disk(monkeypatch)
    disk.failing = True
    for number in range(20):
        await audit.record(event(number))
    refused = [line for line in log_watch.named("audit_failed") if line.get("reason")]
    assert {line["reason"] for line in refused} == {"queue_full"}
    disk.failing = False
    await until(lambda: not audit.failing)
    await audit.close()
    found = read(path)
    kept = [line["operation_id"] for line in found if line["event"] == "disclosure"]
    assert kept == [f"op{n}" for n in range(len(kept))]
    assert kept
    gap = found[-1]
    assert (gap["event"], gap["extra"]) == ("audit_gap", {"lost_events": 20 - len(kept)})
    assert faults(path) == []


async def test_disk_that_hangs_holds_record_no_longer_than_its_deadline(
    path: Path, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """A disk that does not answer is given up waiting for, once, and caught up with later."""
    audit = FileAudit(path, deadline_seconds=0.05)
    await audit.start()
    disk = Disk(monkeypatch)
    disk.go.clear()
    async with asyncio.timeout(60):
        await audit.record(event(1))
        await audit.record(event(2))
    assert [line["reason"] for line in log_watch.named("audit_failed")] == ["timeout"]
    disk.go.set()
    await until(lambda: not audit.failing)
    await audit.close()
    assert [line["operation_id"] for line in read(path)] == ["op1", "op2"]


async def test_path_that_cannot_be_used_shows_at_the_start(tmp_path: Path) -> None:
    """A proxy that could record nothing does not begin to disclose."""
    (tmp_path / "taken").touch()
    audit = FileAudit(tmp_path / "taken" / "audit.jsonl")
    async with asyncio.timeout(60):
        with pytest.raises(OSError):
            await audit.start()
        await audit.close()


async def test_what_cannot_be_written_before_the_end_is_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """Events still queued when the audit closes, or recorded after, are said to be lost."""
    audit = FileAudit(path)
    await audit.start()
    Disk(monkeypatch).failing = True
    async with asyncio.timeout(60):
        await audit.record(event(1), event(2))
        await audit.close()
        await audit.record(event(3))
    last = [line for line in log_watch.named("audit_failed") if line.get("reason")]
    assert [(line["reason"], line["dropped"]) for line in last] == [("closing", 2), ("closed", 1)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "small"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(target)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield target
    subprocess.run(["umount", str(target)], check=True)


async def test_real_full_disk_loses_nothing(small_disk: Path, log_watch: LogWatch) -> None:
    """On a file system without space lines are cut back whole, and written once there is room."""
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    audit = FileAudit(small_disk / "audit.jsonl", retry_seconds=0.02)
    await audit.start()
    for number in range(120):
        await audit.record(event(number))
    assert audit.failing
    assert log_watch.named("audit_failed")[0]["errno"] == "ENOSPC"
    written = (small_disk / "audit.jsonl").read_bytes()
    assert written.endswith(b"\n")
    filler.unlink()
    await until(lambda: not audit.failing and "0 queued" in repr(audit))
    await audit.close()
    found = read(small_disk / "audit.jsonl")
    assert [line["operation_id"] for line in found] == [f"op{n}" for n in range(120)]
    assert faults(small_disk / "audit.jsonl") == []


_CHILD = """
import asyncio, os, sys
from pathlib import Path
from dicomproxy.audit import FileAudit
from dicomproxy.ports import AuditEvent
step, calls, write, fsync = int(sys.argv[2]), 0, os.write, os.fsync
def counted(real, half):
    def call(*args):
        global calls
        calls += 1
        if calls == step:
            half(*args)
            os._exit(7)
        return real(*args)
    return call
async def main():
    audit = FileAudit(Path(sys.argv[1]))
    await audit.start()
    os.write = counted(write, lambda descriptor, data: write(descriptor, bytes(data)[:50]))
    os.fsync = counted(fsync, lambda descriptor: None)
    for number in range(4):
        await audit.record(AuditEvent("query", "success", "A", "", "north", f"op{number}"))
        write(1, b"%d\\n" % number)
    await audit.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("step", range(1, 10))
async def test_crash_at_any_write_loses_nothing_that_was_acknowledged(
    path: Path, step: int
) -> None:
    """A process that ends within a write or a sync leaves a file that goes on."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), str(step)],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.returncode in (0, 7), child.stderr
    audit = FileAudit(path)
    await audit.start()
    await audit.record(event(99))
    await audit.close()
    assert faults(path) in ([], ["unreadable"])
    found = set()
    for line in path.read_bytes().splitlines():
        try:
            found.add(json.loads(line)["operation_id"])
        except ValueError:
            continue
    assert found >= {f"op{int(number)}" for number in child.stdout.split()} | {"op99"}
