"""An MLLP server that does what it is told, in its own words.

It shares no code with the program: a frame is read and written here by its bytes.
Each message is handed to ``behave`` together with the connection it came on, to be
answered, answered wrongly, or not at all.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class Caller:
    """One connection to the server."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self._writer = writer

    async def send(self, content: bytes) -> None:
        """Send one frame."""
        await self.send_raw(b"\x0b" + content + b"\x1c\r")

    async def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    def close(self) -> None:
        """End the connection properly."""
        self._writer.close()

    def reset(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()


Behave = Callable[[Caller, bytes], Awaitable[None]]


class MllpServer:
    """What happened so far, and what to do next; ``behave`` may be replaced at any time."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.port = 0
        self.received: list[bytes] = []
        self.connections = 0
        self.callers: dict[int, Caller] = {}
        self.open = 0
        self.changed = asyncio.Condition()

    async def until(self, true: Callable[[], bool]) -> None:
        """Return once *true* of what happened; fails after ten seconds."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(true)

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        caller = self.callers[self.connections] = Caller(self.connections, writer)
        await self._note()
        try:
            while True:
                framed = await reader.readuntil(b"\x1c\r")
                assert framed.startswith(b"\x0b")
                self.received.append(framed[1:-2])
                await self._note()
                await self.behave(caller, framed[1:-2])
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open -= 1
            writer.transport.abort()
            await self._note()


@asynccontextmanager
async def mllp_server(
    behave: Behave, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[MllpServer]:
    """Run a server on a free port of the loopback."""
    state = MllpServer(behave)
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(state._serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    state.port = server.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
