"""Time that passes when a test says so.

A test of a deadline that waits for it in earnest is slow, and must choose one so
short that a busy machine exceeds it by itself. Here deadlines are as long as in
earnest, and what has a deadline is on the test's own loop: once the test's script
has reached the silence, it lets the loop's clock jump.
"""

from __future__ import annotations

import asyncio


def time_passes(seconds: float) -> None:
    """Let the clock of the running loop be *seconds* later; what is due comes at its next turn."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]


async def turns(count: int) -> None:
    """Let the loop take *count* turns, in which whatever is due and ready is done."""
    for _ in range(count):
        await asyncio.sleep(0)
