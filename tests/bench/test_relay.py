"""The benchmark's relay: bytes arrive whole, later, and no faster than the link."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bench.relay import Direction, listen
from tests.peers.ports import free_port


@pytest.mark.parametrize(
    ("delay", "rate", "sizes", "due"),
    [
        (0.0, None, [10, 10], [0.0, 0.0]),
        (0.015, None, [10, 10**9], [0.015, 0.015]),
        (0.0, 100.0, [100, 50], [1.0, 1.5]),
        (0.5, 100.0, [100, 50], [1.5, 2.0]),
    ],
)
def test_when_bytes_are_due(
    delay: float, rate: float | None, sizes: list[int], due: list[float]
) -> None:
    """The delay is added for each, and a rate makes each wait for those before it."""
    direction = Direction(delay, rate)

    assert [direction.due(0.0, size) for size in sizes] == pytest.approx(due)


def test_an_idle_link_saves_nothing_up() -> None:
    """A pause is not made up for by a burst."""
    direction = Direction(0.0, 100.0)
    direction.due(0.0, 100)

    assert direction.due(50.0, 100) == pytest.approx(51.0)


async def test_what_is_relayed_arrives_whole_and_no_sooner_than_the_delay() -> None:
    """More than the relay buffers, echoed: same bytes, and twice the delay at least."""
    port, target = free_port(), free_port()
    sent = bytes(range(256)) * 16_000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(echo, "127.0.0.1", target)
    link: dict[str, Any] = {"port": port, "host": "127.0.0.1", "to": target, "from_source": False}
    relay = await listen(link, Direction(0.02, None), Direction(0.02, None))
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = loop.time()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        assert loop.time() - began >= 0.038  # timers count whole milliseconds

        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        writer.write_eof()
        assert await reader.read() == b"", "the end is passed on, both ways"
        await gone.wait()
        writer.close()
        await writer.wait_closed()
    relay.close()
    server.close()
