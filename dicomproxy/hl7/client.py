"""Asking over MLLP: one message, one answer, on a small pool of connections.

Rules kept: a connection carries one exchange at a time, and is used again only if
the last one ended with an answer that was asked for. Whatever else happens on it
(a deadline, a cancelled caller, a word nobody asked for) closes it, so that a late
answer is never taken for that to the next question. A connection that breaks is
replaced and the question asked once more: only for questions that change nothing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, cast

from dicomproxy.hl7.errors import Fault, FrameError, MllpError
from dicomproxy.hl7.framing import FrameReader, frame

T = TypeVar("T")


class MllpClient:
    """Exchanges messages with one server. Used from one event loop.

    Args:
        host: its name or address.
        port: its TCP port.
        tls: the context to connect with; None for plain TCP.
        server_name: the name its certificate must bear, if not *host*.
        deadline_seconds: for a whole exchange: waiting for a connection, making it,
            both attempts, the answer.
        connect_seconds: for making a connection, TLS included.
        idle_seconds: how long an unused connection is kept.
        max_connections: how many exchanges may go on at a time.
        max_waiting: how many callers may wait for their turn.
        max_answer_bytes: the longest answer read.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
        deadline_seconds: float = 5.0,
        connect_seconds: float = 3.0,
        idle_seconds: float = 60.0,
        max_connections: int = 2,
        max_waiting: int = 100,
        max_answer_bytes: int = 256 * 1024,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._server_name = server_name
        self._deadline_seconds = deadline_seconds
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._turns = asyncio.Semaphore(max_connections)
        self._waiting = 0
        self._max_waiting = max_waiting
        self._max_answer_bytes = max_answer_bytes
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<MllpClient {len(self._all)} connections, {len(self._idle)} idle>"

    async def exchange(self, message: bytes, read: Callable[[bytes], T]) -> T:
        """Send *message* and return what *read* makes of the answer.

        *read* is synchronous; if it raises, the connection that brought such an
        answer is closed, and the exception goes to the caller.

        Raises:
            MllpError: no answer came, in time or at all.
        """
        try:
            framed = frame(message)
        except FrameError as error:
            raise MllpError(Fault.PROTOCOL, error.reason) from None
        try:
            async with asyncio.timeout(self._deadline_seconds), self._turn():
                return await self._exchange(framed, read)
        except TimeoutError:
            pass
        raise MllpError(Fault.TIMEOUT)

    async def close(self) -> None:
        """Close every connection; exchanges under way end as ``closed``."""
        self._closed = True
        connections = list(self._all)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.wait_lost()

    # --------------------------------------------------------------- internals

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= self._max_waiting:
            raise MllpError(Fault.BUSY)
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _exchange(self, framed: bytes, read: Callable[[bytes], T]) -> T:
        connection = self._reused() or await self._connect()
        try:
            answer = await self._asked(connection, framed)
        except MllpError as error:
            if error.fault is not Fault.CLOSED or self._closed:
                raise
            # Closed while it rested, as a rule, or by a server that restarts.
            connection = await self._connect()
            answer = await self._asked(connection, framed)
        try:
            result = read(answer)
        except BaseException:
            connection.abort()
            raise
        self._keep(connection)
        return result

    async def _asked(self, connection: _Connection, framed: bytes) -> bytes:
        try:
            return await connection.ask(framed)
        except BaseException:
            connection.abort()
            raise

    def _reused(self) -> _Connection | None:
        if not self._idle:
            return None
        connection = self._idle.pop()
        connection.rest(None)
        return connection

    def _keep(self, connection: _Connection) -> None:
        if self._closed or not connection.usable:
            connection.abort()
            return
        connection.rest(self._idle_seconds)
        self._idle.append(connection)

    async def _connect(self) -> _Connection:
        if self._closed:
            raise MllpError(Fault.CLOSED, "client_closed")
        connection = _Connection(self._max_answer_bytes, self._gone)
        self._all.add(connection)
        try:
            failure = await self._opened(connection)
        except BaseException:
            self._all.discard(connection)
            connection.abort()
            raise
        if failure is None:
            return connection
        self._all.discard(connection)
        connection.abort()
        raise failure

    async def _opened(self, connection: _Connection) -> MllpError | None:
        """Connect; return what went wrong, without the exception that tells too much."""
        server_name = (self._server_name or None) if self._tls is not None else None
        try:
            async with asyncio.timeout(self._connect_seconds):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=server_name,
                )
        except ssl.SSLCertVerificationError:
            return MllpError(Fault.TLS, "certificate")
        except ssl.SSLError:
            return MllpError(Fault.TLS)
        except TimeoutError:
            return MllpError(Fault.UNREACHABLE, "connect_timeout")
        except OSError:
            return MllpError(Fault.UNREACHABLE)
        return None

    def _gone(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One connection: at most one question at a time, and no word without a question."""

    def __init__(self, limit: int, gone: Callable[[_Connection], None]) -> None:
        self._reader = FrameReader(limit)
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._lost = asyncio.Event()
        self._broken = False

    @property
    def usable(self) -> bool:
        """Whether a question may be asked on it."""
        return (
            self._transport is not None
            and not self._broken
            and not self._transport.is_closing()
            and not self._reader.pending
        )

    async def ask(self, framed: bytes) -> bytes:
        """Send a frame and return the content of the one that answers.

        Raises:
            MllpError: the connection ended, or what came is no frame.
        """
        if self._transport is None or not self.usable:
            raise MllpError(Fault.CLOSED)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(framed)
            return await self._answer
        finally:
            self._answer = None

    def rest(self, seconds: float | None) -> None:
        """Close it after so long, unless told otherwise by None."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if seconds is not None:
            self._rest = asyncio.get_running_loop().call_later(seconds, self.abort)

    def abort(self) -> None:
        """Close it at once."""
        self._broken = True
        self.rest(None)
        if self._transport is not None:
            self._transport.abort()

    async def wait_lost(self) -> None:
        """Return once the transport is gone, or does not say so within a second."""
        if self._transport is None:
            return
        try:
            async with asyncio.timeout(1.0):
                await self._lost.wait()
        except TimeoutError:
            pass  # aborted all the same

    # ------------------------------------------------------ called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not a subclass of asyncio's in every event loop.
        self._transport = cast(asyncio.Transport, transport)
        if self._broken:  # given up while it was being made
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.done():
            self.abort()
            return
        self._reader.feed(data)
        try:
            content = self._reader.next()
        except FrameError as error:
            answer.set_exception(MllpError(Fault.PROTOCOL, error.reason))
            self.abort()
            return
        if content is not None:
            answer.set_result(content)

    def connection_lost(self, exc: Exception | None) -> None:
        self._broken = True
        self.rest(None)
        self._lost.set()
        if self._answer is not None and not self._answer.done():
            reason = "mid_message" if self._reader.pending else ""
            self._answer.set_exception(MllpError(Fault.CLOSED, reason))
        self._gone(self)
