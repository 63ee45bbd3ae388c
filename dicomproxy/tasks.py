"""Tasks with a name and an owner.

House rule: no task without an owner. Within one operation an
``asyncio.TaskGroup`` owns its tasks; what lives longer (listeners, flights,
housekeeping) belongs to a :class:`TaskOwner`, which holds strong references,
reports crashes, and leaves nothing running when it is closed. Unlike in a
TaskGroup, a task that crashes here does not take its siblings along.

What is cancelled before its first step never runs, its ``finally`` included: what
must be undone in any case belongs into a done callback.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType, TracebackType
from typing import Any, Final, Self, TypeVar

from dicomproxy.logs import get_logger, own_frame

T = TypeVar("T")

_MOST_FRAMES: Final = 40

_log = get_logger()


class OwnerClosed(RuntimeError):
    """A task was given to an owner that is closed or closing."""


class TaskOwner:
    """Owns tasks that outlive the call which started them.

    Args:
        name: prefix of its tasks' names, as logs and stack dumps show them.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<TaskOwner {self._name} {state}, {len(self._tasks)} running>"

    def __len__(self) -> int:
        """Count the tasks still running."""
        return len(self._tasks)

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Start *coro* as a task of this owner.

        A crash is logged as ``task_crashed``, by type only: messages of
        exceptions may carry patient values. Whoever awaits the task gets the
        exception as well.

        Raises:
            OwnerClosed: the owner is closed; *coro* is closed, not run.
        """
        if self._closed:
            coro.close()
            raise OwnerClosed(self._name)
        task = asyncio.create_task(coro, name=f"{self._name}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def wait_idle(self) -> None:
        """Return once no task runs, those started meanwhile included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel every task and return once all have ended.

        All are told to end before the first await, so that cancelling the
        caller leaves none behind. Safe to call twice, and from one of the
        owner's own tasks, which is then left to end by itself.
        """
        self._closed = True
        own = asyncio.current_task()
        pending = {task for task in self._tasks if task is not own}
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        # Retrieved here, so that asyncio does not print it (message and all)
        # when the task is collected.
        if (error := task.exception()) is not None:
            _log.error("task_crashed", task=task.get_name(), error_type=type(error).__name__)


def log_tasks() -> None:
    """Log every task with the frames of ours that it waits in, outermost first.

    For whoever wonders what a process is waiting for; on the event loop only.
    """
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        frames = (own_frame(frame.f_code, frame.f_lineno) for frame in _frames(task))
        _log.warning("task", task=task.get_name(), stack=[frame for frame in frames if frame])


def _frames(task: asyncio.Task[Any]) -> Iterator[FrameType]:
    """Yield the frames that *task* is suspended in; a task itself knows the outermost only."""
    waiting: Any = task.get_coro()
    for _ in range(_MOST_FRAMES):
        match waiting:
            case CoroutineType():
                frame, waiting = waiting.cr_frame, waiting.cr_await
            case AsyncGeneratorType():
                frame, waiting = waiting.ag_frame, waiting.ag_await
            case GeneratorType():
                frame, waiting = waiting.gi_frame, waiting.gi_yieldfrom
            case None | asyncio.Future():
                return
            case _:
                # What a step of an asynchronous generator is awaited by does not say whose.
                inner = (one for one in gc.get_referents(waiting) if isinstance(one, _SUSPENDED))
                waiting = next(inner, None)
                continue
        if frame is not None:
            yield frame


_SUSPENDED: Final = (CoroutineType, AsyncGeneratorType, GeneratorType)
