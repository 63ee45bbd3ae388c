"""An append-only file of disclosures: one JSON object a line, on disk before anyone is answered.

Each record carries its number and the SHA-256 of the line before it, so that a
line removed or changed later shows. Rules kept: :meth:`FileAudit.record`
returns once its events are on disk, however many ask at once sharing one
``fsync``; a failing disk is reported loudly, its events are kept in memory and
written when it works again, and clinical traffic goes on. Unlike logs this file
names patients, so it is readable by its owner only.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prometheus_client import Counter, Gauge

from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import AuditEvent
from dicomproxy.tasks import TaskOwner

_MOST_KEPT: Final = 10_000
_RETRY_SECONDS: Final = 5.0
_TAIL_BYTES: Final = 256 * 1024
_FIRST_HASH: Final = "0" * 64

_RECORDED = Counter("dicomproxy_audit_events_total", "Events on disk.", ("event", "outcome"))
_WAITING = Gauge("dicomproxy_audit_waiting", "Events that the disk has not taken yet.")
_LOST = Counter("dicomproxy_audit_lost_total", "Events given up since too many were waiting.")

_log = get_logger()


class FileAudit:
    """Implements :class:`dicomproxy.ports.Audit` with one file.

    Args:
        path: created with its directory if missing, mode 0600. If it is moved
            away, the next record begins a new one.
        retry_seconds: how often a failing disk is tried again.
    """

    def __init__(self, path: Path, *, retry_seconds: float = _RETRY_SECONDS) -> None:
        self._path = path
        self._retry_seconds = retry_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._tasks = TaskOwner("audit")
        self._waiting: deque[AuditEvent] = deque()
        self._taken = 0  # events ever put into the queue
        self._settled = 0  # of these, written or given up
        self._work = asyncio.Event()
        self._changed = asyncio.Condition()
        self._failing = False
        self._fd = -1
        self._number = 0
        self._hash = _FIRST_HASH

    def __repr__(self) -> str:
        return f"<FileAudit waiting={len(self._waiting)} failing={self._failing}>"

    @property
    def failing(self) -> bool:
        """Whether the disk did not take the last events it was given."""
        return self._failing

    async def start(self) -> None:
        """Open the file, so that a path that cannot be used shows at the start.

        Raises:
            OSError: it cannot be opened, read or repaired.
        """
        await self._in_thread(self._open)
        self._tasks.spawn(self._write_on(), name="writer")

    async def close(self) -> None:
        """Write what is waiting, if the disk takes it, and close the file."""
        await self._tasks.close()
        if self._waiting:
            await self._write_waiting()
        await self._in_thread(self._close)
        self._thread.shutdown(wait=False)

    async def record(self, *events: AuditEvent) -> None:
        """Return once *events* are on disk, or the disk is known to fail."""
        now = datetime.now(UTC)
        for event in events:
            stamped = event if event.at is not None else replace(event, at=now)
            if len(self._waiting) >= _MOST_KEPT:
                self._waiting.popleft()
                self._settled += 1
                _LOST.inc()
                _log.error("audit_failed", reason="too_many_waiting", maximum=_MOST_KEPT)
            self._waiting.append(stamped)
            self._taken += 1
        mine = self._taken
        _WAITING.set(len(self._waiting))
        self._work.set()
        async with self._changed:
            await self._changed.wait_for(lambda: self._settled >= mine or self._failing)

    # ----------------------------------------------------------------- writing

    async def _write_on(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                written = await self._write_waiting()
                async with self._changed:
                    self._changed.notify_all()
                if not written:
                    await asyncio.sleep(self._retry_seconds)

    async def _write_waiting(self) -> bool:
        batch = list(self._waiting)
        try:
            await self._in_thread(lambda: self._append(batch))
        except OSError as error:
            if not self._failing:
                self._failing = True
                _log.error("audit_failed", waiting=len(batch), **error_fields(error))
            return False
        for event in batch:
            # Those given up meanwhile were the oldest, and are counted already.
            if self._waiting and self._waiting[0] is event:
                self._waiting.popleft()
                self._settled += 1
        for event in batch:
            _RECORDED.labels(event.event, event.outcome).inc()
        _WAITING.set(len(self._waiting))
        if self._failing:
            self._failing = False
            _log.warning("audit_recovered", events=len(batch))
        return True

    async def _in_thread(self, job: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, job)

    # ------------------------------------------------- in the thread, from here

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
            if tail and not tail.endswith(b"\n"):
                # A crash tore the last line: it stays, as a line of its own.
                os.write(fd, b"\n")
                tail += b"\n"
        except BaseException:
            os.close(fd)
            raise
        self._close()
        self._fd = fd
        lines = tail.splitlines()
        self._hash = hashlib.sha256(lines[-1]).hexdigest() if lines else _FIRST_HASH
        self._number = _last_number(lines)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _append(self, events: list[AuditEvent]) -> None:
        if self._fd < 0 or self._moved_away():
            self._open()
        number, digest = self._number, self._hash
        lines = []
        for event in events:
            number += 1
            line = _line(event, number, digest)
            digest = hashlib.sha256(line).hexdigest()
            lines.append(line + b"\n")
        before = os.fstat(self._fd).st_size
        data = memoryview(b"".join(lines))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError:
            # All or nothing, so that what is written again later is there once.
            os.ftruncate(self._fd, before)
            raise
        self._number, self._hash = number, digest

    def _moved_away(self) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        ours = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)


def _line(event: AuditEvent, number: int, previous: str) -> bytes:
    fields: Mapping[str, Any] = asdict(event)
    shown = {
        key: value
        for key, value in fields.items()
        if value not in ("", None, (), {}) and key not in ("at", "extra")
    }
    at = event.at.isoformat(timespec="milliseconds") if event.at is not None else ""
    if event.status is not None:
        shown["status"] = f"{event.status:04X}"
    record = {"number": number, "at": at, **shown, **event.extra, "previous": previous}
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _last_number(lines: list[bytes]) -> int:
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("number"), int):
            return int(record["number"])
    return 0
