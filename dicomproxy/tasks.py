"""Tasks with a name and an owner.

House rule: no task without an owner. Within one operation an
``asyncio.TaskGroup`` owns its tasks; what lives longer (listeners, flights,
housekeeping) belongs to a :class:`TaskOwner`, which holds strong references,
reports crashes, and leaves nothing running when it is closed. Unlike in a
TaskGroup, a task that crashes here does not take its siblings along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from dicomproxy.logs import get_logger

T = TypeVar("T")

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
