"""Listening for MLLP: limits first, then frame by frame.

Rules kept: a caller from elsewhere, or one too many, is dropped before a byte is
read. A connection carries one message at a time and is not read while that is dealt
with. A frame that is begun must end in time and within the limit, an answer must be
taken in time, a connection that says nothing is closed after a while; what is no
MLLP closes it at once.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from prometheus_client import Counter

from dicomproxy.hl7.errors import FrameError, MalformedMessage
from dicomproxy.hl7.framing import FrameReader, frame
from dicomproxy.logs import bound_context, error_fields, get_logger
from dicomproxy.tasks import TaskOwner

Network = IPv4Network | IPv6Network

Receive = Callable[[bytes], Awaitable[bytes]]
"""Takes the content of a frame and returns that of its answer."""

_BACKLOG: Final = 64
_READ_BYTES: Final = 64 * 1024
_ACCEPT_PAUSE_SECONDS: Final = 1.0

_log = get_logger()

_REFUSED = Counter(
    "dicomproxy_mllp_connections_refused_total",
    "MLLP connections dropped before a byte was read, by reason: address or limit.",
    ["reason"],
)


class MllpListener:
    """Listens on one port and has each message answered.

    Args:
        receive: deals with a message; what it cannot answer to it raises
            :class:`MalformedMessage` for, and the connection is closed.
        tls: the context to listen with; None for plain TCP.
        allow_from: networks that may call; none for all.
        max_connections: how many are served at a time.
        max_message_bytes: the longest message read.
        handshake_seconds: for TLS to be agreed.
        frame_seconds: from the first byte of a frame to its last.
        answer_seconds: for *receive*, and again for the caller to take the answer.
        idle_seconds: how long a connection may be silent between messages.
    """

    def __init__(
        self,
        receive: Receive,
        *,
        tls: ssl.SSLContext | None = None,
        allow_from: tuple[Network, ...] = (),
        max_connections: int = 50,
        max_message_bytes: int = 1024 * 1024,
        handshake_seconds: float = 10.0,
        frame_seconds: float = 30.0,
        answer_seconds: float = 30.0,
        idle_seconds: float = 3600.0,
    ) -> None:
        self._receive = receive
        self._tls = tls
        self._allow_from = allow_from
        self._max_connections = max_connections
        self._max_message_bytes = max_message_bytes
        self._handshake_seconds = handshake_seconds
        self._frame_seconds = frame_seconds
        self._answer_seconds = answer_seconds
        self._idle_seconds = idle_seconds
        self._accepting = TaskOwner("mllp-accept")
        self._tasks = TaskOwner("mllp")
        self._sockets: list[socket.socket] = []
        self.refused = 0
        """Connections dropped before a byte was read."""

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<MllpListener {len(self._tasks)} connections>"

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port bound, which differs from *port* if that was 0.

        Raises:
            OSError: the address cannot be bound.
        """
        self._sockets = await _bound(host, port)
        for listening in self._sockets:
            self._accepting.spawn(self._accept(listening), name="accept")
        bound: int = self._sockets[0].getsockname()[1]
        _log.info("mllp_listening", host=host, port=bound)
        return bound

    async def close(self) -> None:
        """Stop listening and end every connection; what is unanswered is sent again by its peer."""
        await self._accepting.close()
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()
        await self._tasks.close()

    # --------------------------------------------------------------- internals

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listening)
            except ConnectionError:  # the caller is gone already
                continue
            except OSError as error:  # no descriptor left
                _log.error("mllp_accept_failed", **error_fields(error))
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            address = str(peer[0])
            if reason := self._refusal(address):
                self.refused += 1
                _REFUSED.labels(reason).inc()
                _log.warning("mllp_connection_refused", peer_address=address, reason=reason)
                accepted.close()
                continue
            self._spawn(accepted, address)

    def _spawn(self, accepted: socket.socket, address: str) -> None:
        unserved = [accepted]

        def ended(_: object) -> None:
            # A task that is cancelled before its first step closes nothing itself.
            for one in unserved:
                one.close()

        self._tasks.spawn(self._serve(unserved, address), name=address).add_done_callback(ended)

    def _refusal(self, address: str) -> str:
        if self._allow_from and not _within(address, self._allow_from):
            return "address"
        return "limit" if len(self._tasks) >= self._max_connections else ""

    async def _serve(self, unserved: list[socket.socket], address: str) -> None:
        with bound_context(peer_address=address):
            reason = ""
            writer: asyncio.StreamWriter | None = None
            try:
                reader, writer = await self._opened(unserved.pop())
                reason = await self._converse(reader, writer)
            except FrameError as error:
                reason = error.reason
            except MalformedMessage:
                reason = "malformed"
            except ssl.SSLError:
                reason = "tls"
            except TimeoutError:
                reason = "timeout"
            except OSError:
                reason = "lost"
            except Exception as error:
                # One connection's trouble stays its own.
                reason = "crashed"
                _log.error("mllp_connection_crashed", **error_fields(error))
            finally:
                if writer is not None:
                    writer.transport.abort()
            if reason:
                _log.warning("mllp_connection_closed", reason=reason)

    async def _opened(
        self, accepted: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_READ_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        async with asyncio.timeout(self._handshake_seconds):
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls
            )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """Answer messages until the caller is done; return a reason if that was no proper end."""
        frames = FrameReader(self._max_message_bytes)
        while True:
            content = await self._next(reader, frames)
            if content is None:
                return "mid_message" if frames.pending else ""
            async with asyncio.timeout(self._answer_seconds):
                answer = await self._receive(content)
            async with asyncio.timeout(self._answer_seconds):
                writer.write(frame(answer))
                await writer.drain()

    async def _next(self, reader: asyncio.StreamReader, frames: FrameReader) -> bytes | None:
        """Return the next message, None at the end of what is sent."""
        content = frames.next()
        while content is None and not frames.pending:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    data = await reader.read(_READ_BYTES)
            except TimeoutError:
                return None
            if not data:
                return None
            frames.feed(data)
            content = frames.next()
        async with asyncio.timeout(self._frame_seconds):
            while content is None:
                data = await reader.read(_READ_BYTES)
                if not data:
                    return None
                frames.feed(data)
                content = frames.next()
        return content


async def _bound(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of *host*; empty for every interface."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    made: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listening = socket.socket(family, kind, protocol)
            made.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
            listening.setblocking(False)
    except OSError:
        for listening in made:
            listening.close()
        raise
    return made


def _within(address: str, networks: tuple[Network, ...]) -> bool:
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in network for network in networks)
