"""The one thread that changes the cache: bytes, journals and index rows.

The event loop queues work and never waits for a disk. Rules kept: jobs run in
the order in which they were queued; consecutive writes to one file are joined
into one system call; what must happen on the loop afterwards (memory handed
back, futures resolved) is collected and costs one wakeup per batch.

Waking a thread costs more than most of what it is woken for, and two that run
want the interpreter in turns. Writes are therefore gathered for a moment, until
they are worth it or something waits for them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from dicomproxy.logs import error_fields, get_logger

T = TypeVar("T")

_GATHERED_BYTES: Final = 256 * 1024
_GATHERING_SECONDS: Final = 0.003
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
_Work = list[_Write | _Job]


class WriterThread:
    """Runs jobs in order and reports back to the loop that started it.

    Args:
        after_batch: called in the thread whenever a batch is done.
    """

    def __init__(self, after_batch: Callable[[], None]) -> None:
        self._after_batch = after_batch
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._replies: list[Callable[[], object]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._gathered: _Work = []
        self._gathered_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

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
        """Have *segments* appended to *sink* soon, then *release* called on the loop."""
        if self._stopped or self._loop is None:
            release()
            return
        self._gathered.append((sink, segments, release))
        self._gathered_bytes += sum(segment.nbytes for segment in segments)
        if self._gathered_bytes >= _GATHERED_BYTES:
            self._hand_over()
        elif self._timer is None:
            self._timer = self._loop.call_later(_GATHERING_SECONDS, self._hand_over)

    def _do(self, job: _Job) -> None:
        """Queue *job*, behind what was written before it."""
        self._gathered.append(job)
        self._hand_over()

    def _hand_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gathered:
            gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
            self._queue.put(gathered)

    def submit(self, job: Callable[[], object]) -> None:
        """Run *job*; what it returns or raises is of no interest to anybody."""
        if not self._stopped:
            self._do(lambda: _quietly(job))

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

        self._do(run)
        async with asyncio.timeout(_DEADLINE_SECONDS):
            return await future

    def stop(self) -> None:
        """Let the thread end after what is queued; writes from now on are dropped."""
        if not self._stopped:
            self._hand_over()
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

    def _run_batch(self, work: _Work | None) -> bool:
        """Do *work* and what else is queued already; False once told to end."""
        pending: dict[Sink, list[memoryview]] = {}
        releases: list[Callable[[], None]] = []
        size = done = 0
        while work is not None:
            for job in work:
                if isinstance(job, tuple):
                    sink, segments, release = job
                    pending.setdefault(sink, []).extend(segments)
                    releases.append(release)
                    size += sum(segment.nbytes for segment in segments)
                else:
                    self._append(pending, releases)
                    job()
            done += len(work)
            if size >= _BATCH_BYTES or done >= _BATCH_JOBS:
                break
            try:
                work = self._queue.get_nowait()
            except Empty:
                break
        self._append(pending, releases)
        return work is not None

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
