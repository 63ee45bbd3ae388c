"""Tasks that have an owner, and what is said of those that wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from dicomproxy import logs
from dicomproxy.tasks import OwnerClosed, TaskOwner, log_tasks
from tests.support.log_watch import LogWatch


async def test_close_leaves_nothing_running() -> None:
    """Every task is cancelled and awaited, one that had not begun included."""
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    owner = TaskOwner("owner")
    begun = owner.spawn(work("begun"), name="begun")
    await asyncio.sleep(0)
    unbegun = owner.spawn(work("unbegun"), name="unbegun")
    await owner.close()
    assert (begun.cancelled(), unbegun.cancelled(), len(owner)) == (True, True, 0)
    assert ended == ["begun"]
    with pytest.raises(OwnerClosed):
        owner.spawn(work("late"), name="late")


async def test_crash_stays_with_its_task(log_watch: LogWatch) -> None:
    """Siblings go on, and the crash is logged by type only."""

    async def crash() -> None:
        raise ValueError("sentinel of no use")

    async with TaskOwner("owner") as owner:
        sibling = owner.spawn(asyncio.Event().wait(), name="sibling")
        crashed = owner.spawn(crash(), name="crash")
        await asyncio.wait([crashed])
        assert not sibling.done()
    (line,) = log_watch.named("task_crashed")
    assert (line["task"], line["error_type"]) == ("owner:crash", "ValueError")


async def outermost() -> None:
    async with aclosing(steps()) as stream:
        async for _ in stream:
            pass


async def steps() -> AsyncIterator[None]:
    await innermost()
    yield


async def innermost() -> None:
    await asyncio.Event().wait()


async def test_what_a_task_waits_in_is_told_to_the_innermost_frame(
    log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through coroutines and asynchronous generators; frames of others are left out."""
    monkeypatch.setattr(logs, "_OWN_CODE", Path(__file__).parent)
    async with TaskOwner("owner") as owner:
        owner.spawn(outermost(), name="waiting")
        await asyncio.sleep(0)
        owner.spawn(innermost(), name="not begun")
        log_tasks()
    told = {line["task"]: line["stack"] for line in log_watch.named("task")}
    names = [frame.split(":")[:2] for frame in told["owner:waiting"]]
    assert names == [["test_tasks.py", name] for name in ("outermost", "steps", "innermost")]
    assert [frame.split(":")[1] for frame in told["owner:not begun"]] == ["innermost"]
