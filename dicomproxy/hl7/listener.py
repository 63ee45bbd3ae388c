"""Listening for MLLP: limits first, then frame by frame.

Rules kept: a caller from elsewhere, or one too many, is dropped before a byte is
read. A connection carries one message at a time and is not read while that is dealt
with. A frame that is begun must end in time and within the limit, an answer must be
taken in time, a connection that says nothing is closed after a while; what is no
MLLP closes it at once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from dicomproxy.hl7.errors import FrameError, MalformedMessage
from dicomproxy.hl7.framing import FrameReader, frame
from dicomproxy.logs import bound_context, error_fields, get_logger
from dicomproxy.tasks import OwnerClosed, TaskOwner

Network = IPv4Network | IPv6Network

Receive = Callable[[bytes], Awaitable[bytes]]
"""Takes the content of a frame and returns that of its answer."""

_BACKLOG: Final = 64
_READ_BYTES: Final = 64 * 1024

_log = get_logger()


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
        self._tasks = TaskOwner("mllp")
        self._server: asyncio.Server | None = None

    def __repr__(self) -> str:
        return f"<MllpListener {len(self._tasks)} connections>"

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port bound, which differs from *port* if that was 0.

        Raises:
            OSError: the address cannot be bound.
        """
        self._server = await asyncio.start_server(
            self._connected, host or None, port, backlog=_BACKLOG, reuse_address=True
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        _log.info("mllp_listening", host=host, port=bound)
        return bound

    async def close(self) -> None:
        """Stop listening and end every connection; what is unanswered is sent again by its peer."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self._tasks.close()

    # --------------------------------------------------------------- internals

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        reason = self._refusal(address)
        if reason:
            _log.warning("mllp_connection_refused", peer_address=address, reason=reason)
            transport.abort()
            return
        # Nothing may be read before TLS has taken over.
        if self._tls is not None:
            transport.pause_reading()  # type: ignore[attr-defined]
        try:
            self._tasks.spawn(self._serve(reader, writer, address), name=address)
        except OwnerClosed:
            transport.abort()

    def _refusal(self, address: str) -> str:
        if len(self._tasks) >= self._max_connections:
            return "limit"
        if self._allow_from and not _within(address, self._allow_from):
            return "address"
        return ""

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str
    ) -> None:
        with bound_context(peer_address=address):
            reason = ""
            try:
                if self._tls is not None:
                    await self._secure(writer, self._tls)
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
                writer.transport.abort()
            if reason:
                _log.warning("mllp_connection_closed", reason=reason)

    async def _secure(self, writer: asyncio.StreamWriter, context: ssl.SSLContext) -> None:
        async with asyncio.timeout(self._handshake_seconds):
            await writer.start_tls(context)

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


def _within(address: str, networks: tuple[Network, ...]) -> bool:
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in network for network in networks)
