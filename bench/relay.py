"""A relay that makes a link longer and narrower: ``python -m bench.relay SETTINGS``.

Bytes read at one moment are written *delay_seconds* later, in either direction;
where a rate is given, a direction passes no more than that, over all its
connections together. Data is acknowledged at once on the relay's own sockets,
so that it adds distance and nothing else. Setting up a TCP connection costs no
round trip here: both sides are spared it alike.

Settings: ``links``, a list of ``{"port", "host", "to", "from_source"}``;
``delay_seconds``; ``bytes_per_second`` or null. *from_source* says which way the
connections of a link are opened, so that the directions can be told apart.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections import deque
from typing import Any, Final, cast

from bench.control import obey

_TIMER_SECONDS: Final = 0.0005
"""How much too soon bytes may be written: timers count whole milliseconds, rounded up."""
_LEAST_QUEUED_BYTES: Final = 1024 * 1024
_MOST_QUEUED_BYTES: Final = 16 * 1024 * 1024
_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)


class Direction:
    """When bytes that are read now may be written: a clock that all connections share."""

    def __init__(self, delay_seconds: float, bytes_per_second: float | None) -> None:
        self.delay_seconds = delay_seconds
        self._rate = bytes_per_second
        self._free_at = 0.0

    def due(self, now: float, count: int) -> float:
        """Return the time at which *count* bytes have passed."""
        if self._rate is not None:
            self._free_at = max(self._free_at, now) + count / self._rate
            now = self._free_at
        return now + self.delay_seconds


class End(asyncio.Protocol):
    """One side of a relayed connection: what it reads, its other side writes later."""

    def __init__(self, direction: Direction) -> None:
        self.other: End
        self._direction = direction
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._socket: Any = None
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._queued_bytes = 0
        self._most = _MOST_QUEUED_BYTES if direction.delay_seconds else _LEAST_QUEUED_BYTES
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._writable = True
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._acknowledge()
        self.other.kick()

    def _acknowledge(self) -> None:
        if _QUICKACK is not None:
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
            except OSError:
                pass  # gone; connection_lost follows

    def data_received(self, data: bytes) -> None:
        self._acknowledge()
        self._put(data)
        self._queued_bytes += len(data)
        if self._queued_bytes > self._most and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._put(None)
        return True  # what is under way still arrives

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._put(None)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.other.kick()

    def _put(self, data: bytes | None) -> None:
        due = self._direction.due(self._loop.time(), len(data) if data else 0)
        self._queue.append((due, data))
        self.kick()

    def kick(self) -> None:
        """Write what is due, as far as the other side takes it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        target = self.other._transport
        while self._queue and target is not None and (self.other._writable or self.other.closed):
            due, data = self._queue[0]
            if due > self._loop.time() + _TIMER_SECONDS:
                self._timer = self._loop.call_at(due, self.kick)
                break
            self._queue.popleft()
            if data is None:
                target.close()
                continue
            self._queued_bytes -= len(data)
            if not self.other.closed:
                target.write(data)
        if self._paused and self._queued_bytes < self._most // 2 and self._transport is not None:
            self._paused = False
            if not self.closed:
                self._transport.resume_reading()


async def listen(
    link: dict[str, Any], to_source: Direction, from_source: Direction
) -> asyncio.Server:
    """Relay the connections of one link."""
    loop = asyncio.get_running_loop()
    ahead, back = (from_source, to_source) if link["from_source"] else (to_source, from_source)
    connecting: set[asyncio.Task[None]] = set()

    def accept() -> End:
        near, far = End(ahead), End(back)
        near.other, far.other = far, near

        async def connect() -> None:
            try:
                await loop.create_connection(lambda: far, link["host"], link["to"])
            except OSError:
                if near._transport is not None:
                    near._transport.abort()

        task = loop.create_task(connect(), name="connect")
        connecting.add(task)
        task.add_done_callback(connecting.discard)
        return near

    return await loop.create_server(accept, "127.0.0.1", link["port"], backlog=256)


async def main(settings: dict[str, Any]) -> None:
    """Start every link and wait for the driver to end."""
    rate = settings.get("bytes_per_second")
    to_source = Direction(settings["delay_seconds"], rate)
    from_source = Direction(settings["delay_seconds"], rate)
    servers = [await listen(link, to_source, from_source) for link in settings["links"]]
    await obey({})
    for server in servers:
        server.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
