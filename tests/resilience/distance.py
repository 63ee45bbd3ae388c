"""Distance: a relay that passes bytes on later than they came, in either direction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tests.support.stand_in import SECONDS


@asynccontextmanager
async def relayed(port: Callable[[], int], delay_seconds: float) -> AsyncIterator[int]:
    """Yield a port at which *port* seems to be far away; connecting itself takes no time."""
    connections: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port())
            except OSError:
                return
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pass_on(reader, far_writer, delay_seconds))
                    group.create_task(_pass_on(far_reader, writer, delay_seconds))
            finally:
                far_writer.close()
        except asyncio.CancelledError:
            pass  # the region is gone
        finally:
            writer.close()
            connections.discard(task)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        left = list(connections)
        for task in left:
            task.cancel()
        if left:
            async with asyncio.timeout(SECONDS):
                await asyncio.wait(left)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1000)

    async def write() -> None:
        data = b"all"
        while data:
            due, data = await late.get()
            await asyncio.sleep(due - loop.time())
            if data:
                writer.write(data)
                await writer.drain()
        writer.close()

    async with asyncio.TaskGroup() as group:
        writing = group.create_task(write())
        data = b"all"
        try:
            while data:
                data = await reader.read(256 * 1024)
                await late.put((loop.time() + delay_seconds, data))
        except OSError:
            writer.close()
            writing.cancel()
