"""The writer thread: gathered or not, everything happens once, in order, and memory comes back."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator

import pytest

from dicomproxy.cache.thread import ThreadStopped, WriterThread

DEADLINE_SECONDS = 60.0


class Log:
    """A sink that notes what it is given in a log that it shares with others."""

    def __init__(self, name: int, entries: list[tuple[int, bytes]]) -> None:
        self.name = name
        self._entries = entries

    def append(self, segments: list[memoryview]) -> None:
        self._entries.extend((self.name, bytes(segment)) for segment in segments)


@pytest.fixture
async def thread() -> AsyncIterator[WriterThread]:
    made = WriterThread(lambda: None)
    made.start()
    yield made
    made.stop()
    await asyncio.to_thread(made.join)


async def test_small_write_is_done_though_nothing_follows(thread: WriterThread) -> None:
    """What is gathered is written after a moment, and its memory given back on the loop."""
    entries: list[tuple[int, bytes]] = []
    given_back: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    thread.write(
        Log(1, entries),
        [memoryview(b"few")],
        lambda: given_back.set_result(threading.get_ident()),
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await given_back == threading.get_ident()
    assert entries == [(1, b"few")]


@pytest.mark.parametrize("seed", range(12))
async def test_order_is_kept_between_writes_and_jobs(thread: WriterThread, seed: int) -> None:
    """Each sink gets its bytes in order, and a job sees exactly what was written before it."""
    rng = random.Random(seed)
    entries: list[tuple[int, bytes]] = []
    sinks = [Log(name, entries) for name in range(3)]
    written: list[list[bytes]] = [[], [], []]
    returned: list[int] = []
    jobs: list[asyncio.Task[None]] = []

    def by_sink() -> list[list[bytes]]:
        return [[data for name, data in entries if name == sink.name] for sink in sinks]

    seen: list[tuple[list[list[bytes]], list[list[bytes]]]] = []

    def look(expected: list[list[bytes]]) -> None:
        seen.append((by_sink(), expected))

    async def ask(expected: list[list[bytes]]) -> None:
        await thread.ask(lambda: look(expected))

    total = rng.randint(20, 120)
    writes = 0
    async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as group:
        for _ in range(total):
            kind = rng.random()
            if kind < 0.7:
                sink = rng.choice(sinks)
                data = bytes([writes % 256]) * rng.choice([1, 100, 5_000, 140_000, 300_000])
                number = writes
                writes += 1
                written[sink.name].append(data)
                thread.write(
                    sink, [memoryview(data)], lambda number=number: returned.append(number)
                )
            else:
                expected = [list(parts) for parts in written]
                if kind < 0.85:
                    thread.submit(lambda expected=expected: look(expected))
                else:
                    jobs.append(group.create_task(ask(expected)))
                    await asyncio.sleep(0)  # it is queued now, in its place
        await thread.ask(lambda: None)
    assert all(had == expected for had, expected in seen)
    assert by_sink() == written
    assert sorted(returned) == list(range(writes))


async def test_stop_does_what_was_gathered_and_takes_no_more() -> None:
    """The last bytes before the end are written, those behind it give their memory back."""
    thread = WriterThread(lambda: None)
    thread.start()
    entries: list[tuple[int, bytes]] = []
    returned: list[str] = []
    sink = Log(1, entries)
    ended = asyncio.Event()

    def before() -> None:
        returned.append("before")
        ended.set()

    thread.write(sink, [memoryview(b"before")], before)
    thread.stop()
    thread.write(sink, [memoryview(b"after")], lambda: returned.append("after"))
    assert returned == ["after"]
    with pytest.raises(ThreadStopped):
        await thread.ask(lambda: None)
    await asyncio.to_thread(thread.join)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await ended.wait()
    assert (entries, returned) == ([(1, b"before")], ["after", "before"])
