"""The one thread that changes the cache: bytes, journals and index rows.

The event loop queues work and never waits for a disk. Rules kept: jobs run in
the order in which they were queued; consecutive writes to one file are joined
into one system call; what must happen on the loop afterwards (memory handed
back, futures resolved) is collected and costs one wakeup per batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from dicomproxy.logs import error_fields, get_logger

T = TypeVar("T")

_BATCH_JOBS: Final = 64
_BATCH_BYTES: Final = 4 * 1024 * 1024
_DEADLINE_SECONDS: Final = 120.0

_log = get_logger()


class Sink(Protocol):
    """Takes the bytes of one instance, in the writer thread. Never raises."""

    def append(self, segments: list[memoryview]) -> None: ...


class ThreadStopped(Exception):
    """Work was given to a thread that has ended."""


_Write = tuple[Sink, Sequence[memoryview], Callable[[], None]]
_Job = Callable[[], None]


class WriterThread:
    """Runs jobs in order and reports back to the loop that started it.

    Args:
        after_batch: called in the thread whenever a batch is done.
    """

    def __init__(self, after_batch: Callable[[], None]) -> None:
        self._after_batch = after_batch
        self._queue: SimpleQueue[_Write | _Job | None] = SimpleQueue()
        self._replies: list[Callable[[], object]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    # ---------------------------------------------------------- from the loop

    def start(self) -> None:
        """Begin; replies go to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and not self._stopped

    def write(
        self, sink: Sink, segments: Sequence[memoryview], release: Callable[[], None]
    ) -> None:
        """Have *segments* appended to *sink*, then *release* called on the loop."""
        if self._stopped:
            release()
            return
        self._queue.put((sink, segments, release))

    def submit(self, job: Callable[[], object]) -> None:
        """Run *job*; what it returns or raises is of no interest to anybody."""
        if not self._stopped:
            self._queue.put(lambda: _quietly(job))

    async def ask(self, job: Callable[[], T]) -> T:
        """Run *job* and return its result.

        Raises:
            ThreadStopped: the thread has ended.
            TimeoutError: the disk did not answer; *job* may still run later.
        """
        if self._stopped or self._loop is None:
            raise ThreadStopped
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = job()
            except BaseException as error:
                self.post(lambda error=error: _fail(future, error))  # type: ignore[misc]
            else:
                self.post(lambda: _resolve(future, result))

        self._queue.put(run)
        async with asyncio.timeout(_DEADLINE_SECONDS):
            return await future

    def stop(self) -> None:
        """Let the thread end after what is queued; writes from now on are dropped."""
        if not self._stopped:
            self._stopped = True
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the end; not on the loop."""
        if self._thread is not None:
            self._thread.join(_DEADLINE_SECONDS)

    # -------------------------------------------------------- from the thread

    def post(self, reply: Callable[[], object]) -> None:
        """Run *reply* on the loop, after those posted before it."""
        self._replies.append(reply)

    def deliver(self) -> None:
        """Send what was posted now, before something slow."""
        replies, self._replies = self._replies, []
        if not replies or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_run_all, replies)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _run(self) -> None:
        going = True
        while going:
            going = self._run_batch(self._queue.get())
            _quietly(self._after_batch)
            self.deliver()

    def _run_batch(self, job: _Write | _Job | None) -> bool:
        """Do *job* and what else is queued already; False once told to end."""
        pending: dict[Sink, list[memoryview]] = {}
        releases: list[Callable[[], None]] = []
        size = done = 0
        while True:
            if isinstance(job, tuple):
                sink, segments, release = job
                pending.setdefault(sink, []).extend(segments)
                releases.append(release)
                size += sum(segment.nbytes for segment in segments)
            else:
                self._append(pending, releases)
                if job is None:
                    return False
                job()
            done += 1
            if size >= _BATCH_BYTES or done == _BATCH_JOBS:
                break
            try:
                job = self._queue.get_nowait()
            except Empty:
                break
        self._append(pending, releases)
        return True

    def _append(
        self, pending: dict[Sink, list[memoryview]], releases: list[Callable[[], None]]
    ) -> None:
        for sink, segments in pending.items():
            _quietly(lambda sink=sink, segments=segments: sink.append(segments))  # type: ignore[misc]
        self._replies += releases
        pending.clear()
        releases.clear()


def _quietly(job: Callable[[], Any]) -> None:
    """Run *job*; a crash is logged, and does not end the thread."""
    try:
        job()
    except Exception as error:
        _log.error("task_crashed", task="cache-writer", **error_fields(error))


def _run_all(replies: list[Callable[[], object]]) -> None:
    for reply in replies:
        try:
            reply()
        except Exception as error:  # one caller's mistake is not the next one's
            _log.error("task_crashed", task="cache-reply", **error_fields(error))


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
