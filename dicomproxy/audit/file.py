"""An audit trail in a file: on disk before ``record`` returns, whatever happens.

Rules kept: a line is written whole or taken back; order is the order in which
events were recorded; ``record`` never raises and never waits for a disk that is
known to fail. Many concurrent calls share one ``fsync``: one thread takes what
is queued, writes it, syncs it, and wakes everybody at once.

While the disk fails events wait in a queue of bounded size, in order, and are
tried again. What does not fit is lost, which is logged, counted, and written
into the file itself (``audit_gap``) as soon as it takes a line again. A line
may appear twice if the disk failed in the middle and could not be cut back;
``operation_id`` tells.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from prometheus_client import Counter, Gauge

from dicomproxy.audit.chain import encode_event
from dicomproxy.audit.journal import Journal
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import AuditEvent

_BATCH_BYTES: Final = 1024 * 1024

_log = get_logger()

_EVENTS = Counter("dicomproxy_audit_written_total", "Audit events that are on disk.")
_FAILURES = Counter(
    "dicomproxy_audit_failures_total", "Attempts to write audit events that failed."
)
_LOST = Counter("dicomproxy_audit_events_lost_total", "Audit events that could not be kept.")
_QUEUED = Gauge("dicomproxy_audit_queued", "Audit events that wait to be written.")


@dataclass(slots=True)
class _Entry:
    """The events of one call, and whom to wake; ``count`` lines."""

    payloads: list[bytes]
    size: int
    done: Callable[[], None] | None


class FileAudit:
    """Implements :class:`dicomproxy.ports.Audit`; used from one event loop.

    Args:
        path: the file; made, for its owner only, if it does not exist.
        queue_bytes: how much may wait while the disk takes nothing.
        retry_seconds: pause after a failure before the disk is tried again.
        deadline_seconds: how long ``record`` waits for a disk that hangs.
        now: the present moment, with its time zone.
    """

    def __init__(
        self,
        path: Path,
        *,
        queue_bytes: int = 16 * 1024 * 1024,
        retry_seconds: float = 5.0,
        deadline_seconds: float = 10.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._journal = Journal(path)
        self._queue_bytes = queue_bytes
        self._retry_seconds = retry_seconds
        self._deadline_seconds = deadline_seconds
        self._now = now
        self._condition = threading.Condition()
        # Guarded by the condition:
        self._queue: deque[_Entry] = deque()
        self._queued_bytes = 0
        self._queued_events = 0
        self._lost = 0
        self._failing = False
        self._error: Exception | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event = asyncio.Event()

    def __repr__(self) -> str:
        state = "failing" if self._failing else "fine"
        return f"<FileAudit {state}, {self._queued_events} queued>"

    @property
    def failing(self) -> bool:
        """Whether the disk failed when it was last tried."""
        return self._failing

    async def start(self) -> None:
        """Open the file and repair its torn last line.

        Raises:
            OSError: it cannot be: a proxy that could record nothing does not start.
        """
        self._loop = asyncio.get_running_loop()
        opened = asyncio.Event()
        # Without events: the file is opened, and a disk that fails is known at once.
        self._queue.append(_Entry([], 0, opened.set))
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()
        await self._wait_for(opened)
        if self._failing:
            await self.close()
            raise self._error or TimeoutError("the audit file's disk does not answer")

    async def record(self, *events: AuditEvent) -> None:
        """Return once *events* are on disk.

        Never raises. Where the disk fails they are queued, ``audit_failed`` is
        logged, and the call returns at once. A cancelled call's events are
        written all the same.
        """
        now = self._now()
        payloads = [encode_event(event, now) for event in events]
        if not payloads:
            return
        written = asyncio.Event()
        if not self._enqueue(_Entry(payloads, sum(map(len, payloads)), written.set)):
            return
        if not self._failing:
            await self._wait_for(written)

    async def close(self) -> None:
        """Write what is queued, in one last attempt, and close the file."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread is None:
            self._ended.set()
        await self._wait_for(self._ended)
        with self._condition:
            lost = self._queued_events
            if self._ended.is_set():  # else a thread is still at them, in a disk that hangs
                self._queue.clear()
                self._queued_events = self._queued_bytes = 0
        if lost:
            _LOST.inc(lost)
            _QUEUED.set(0)
            _log.critical("audit_failed", reason="closing", dropped=lost)

    # ---------------------------------------------------------- from the loop

    def _enqueue(self, entry: _Entry) -> bool:
        count = len(entry.payloads)
        with self._condition:
            closed = self._closing
            full = self._queued_bytes + entry.size > self._queue_bytes
            if not closed and not full:
                self._queue.append(entry)
                self._queued_bytes += entry.size
                self._queued_events += count
                _QUEUED.set(self._queued_events)
                self._condition.notify()
                return True
            self._lost += count
        _LOST.inc(count)
        _log.critical("audit_failed", reason="closed" if closed else "queue_full", dropped=count)
        return False

    async def _wait_for(self, event: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                await event.wait()
        except TimeoutError:
            # The disk hangs. From now on nobody waits for it, until it answers.
            _FAILURES.inc()
            with self._condition:
                self._failing = True
                queued = self._queued_events
            _log.critical("audit_failed", reason="timeout", queued=queued)

    # -------------------------------------------------------- from the thread

    def _run(self) -> None:
        going = True
        while going:
            with self._condition:
                while not self._queue and not self._closing:
                    self._condition.wait()
                batch = self._batch()
            if not batch:
                break
            if not self._write(batch):
                going = self._pause()
        try:
            self._journal.close()
        except OSError:
            pass  # all that was reported as written had been synced
        self._tell([self._ended.set])

    def _batch(self) -> list[_Entry]:
        """Return the oldest entries; they stay queued until they are written."""
        batch: list[_Entry] = []
        size = 0
        for entry in self._queue:
            if batch and size + entry.size > _BATCH_BYTES:
                break
            batch.append(entry)
            size += entry.size
        return batch

    def _write(self, batch: list[_Entry]) -> bool:
        payloads = [payload for entry in batch for payload in entry.payloads]
        with self._condition:
            lost = self._lost
        if lost and not self._queue_holds_more(batch):
            # After all that was kept: later events than those are missing.
            payloads.append(self._gap(lost))
        else:
            lost = 0
        try:
            self._journal.append(payloads)
        except Exception as error:
            self._failed(batch, error)
            return False
        with self._condition:
            for entry in batch:
                self._queue.popleft()
                self._queued_bytes -= entry.size
                self._queued_events -= len(entry.payloads)
            self._lost -= lost
            recovered, self._failing = self._failing, False
            _QUEUED.set(self._queued_events)
        _EVENTS.inc(len(payloads))
        if recovered:
            _log.warning("audit_recovered", count=len(payloads), dropped=lost)
        self._tell([entry.done for entry in batch if entry.done])
        return True

    def _failed(self, batch: list[_Entry], error: Exception) -> None:
        _FAILURES.inc()
        with self._condition:
            self._failing = True
            self._error = error
            queued = self._queued_events
            # All of them, not only the batch's: nobody waits for a failing disk.
            waiting = [entry.done for entry in self._queue if entry.done]
            for entry in self._queue:
                entry.done = None
        _log.critical("audit_failed", queued=queued, **error_fields(error))
        self._tell(waiting)

    def _pause(self) -> bool:
        """Wait before the next attempt; False if there is to be none."""
        until = time.monotonic() + self._retry_seconds
        with self._condition:
            if self._closing:
                return False
            while (left := until - time.monotonic()) > 0 and not self._closing:
                self._condition.wait(left)
        return True

    def _queue_holds_more(self, batch: list[_Entry]) -> bool:
        with self._condition:
            return len(self._queue) > len(batch)

    def _gap(self, lost: int) -> bytes:
        event = AuditEvent(
            event="audit_gap",
            outcome="failure",
            caller_ae_title="",
            peer_address="",
            source="",
            operation_id="",
            extra={"lost_events": lost},
        )
        return encode_event(event, self._now())

    def _tell(self, wakes: list[Callable[[], None]]) -> None:
        """Wake those who wait on the loop, all with one wakeup of it."""
        if self._loop is None or not wakes:
            return
        try:
            self._loop.call_soon_threadsafe(lambda: [wake() for wake in wakes])
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more
