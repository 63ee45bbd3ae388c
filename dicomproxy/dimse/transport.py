"""One association's socket: bytes in, effects out (the thin asyncio edge of the core).

The machine decides, this module carries out. Bytes are received into blocks of
one bounded pool and parsed where they lie; a full pool stops reading, which
reaches the peer as TCP back-pressure. Every socket sends without delay
(TCP_NODELAY) and acknowledges at once (TCP_QUICKACK, re-armed after each read,
since the kernel clears it): a sender with Nagle's algorithm on and a receiver
that delays acknowledgements would wait 40 ms for each other at every message.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.trsock import TransportSocket
from typing import Any, Final, Protocol, cast

from dicomproxy.dimse.blocks import Block, BlockPool
from dicomproxy.dimse.framing import Fragment, Framer
from dicomproxy.dimse.machine import (
    Aborted,
    AssociationMachine,
    Close,
    Connect,
    Deliver,
    Effect,
    Indicate,
    Send,
    StartArtim,
    State,
    StopArtim,
)
from dicomproxy.dimse.pdu import Pdu, ProtocolError
from dicomproxy.logs import get_logger

_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)
_SPARE_BYTES: Final = 4096
_LEAST_READ_BYTES: Final = 16 * 1024

_log = get_logger()


class Listener(Protocol):
    """Whom an :class:`AssociationProtocol` tells what happened; all calls are synchronous."""

    def connected(self) -> None: ...

    def pdu(self, pdu: Pdu) -> None: ...

    def fragment(self, fragment: Fragment) -> None:
        """May raise ProtocolError; may lend the view by ``lend``."""
        ...

    def aborted(self, source: int, reason: int, lost: bool) -> None: ...

    def disconnected(self) -> None: ...

    @property
    def unfinished(self) -> bool:
        """Whether the peer owes the rest of a message, or we have stopped reading."""
        ...

    def flush(self) -> None:
        """Hand on the views collected by ``lend``; the block is about to be left."""
        ...


class AssociationProtocol(asyncio.BufferedProtocol):
    """The asyncio protocol of one association, requestor or acceptor."""

    def __init__(
        self,
        listener: Listener,
        pool: BlockPool,
        *,
        max_pdu_bytes: int,
        artim_seconds: float,
        stall_seconds: float,
        association_id: str,
    ) -> None:
        self.machine = AssociationMachine()
        self.transport: asyncio.Transport | None = None
        self.peer_address = ""
        self.peer_port = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.last_received = 0.0
        self._listener = listener
        self._framer = Framer(max_pdu_bytes)
        self._pool = pool
        self._artim_seconds = artim_seconds
        self._stall_seconds = stall_seconds
        self._association_id = association_id
        self._loop = asyncio.get_running_loop()
        self._socket: Any = None
        self._block: Block | None = None
        self._spare: memoryview | None = None
        self._fill = 0
        self._artim: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._pauses = 0
        self._awaiting_block = False
        self._broken = False
        self._writable = asyncio.Event()
        self._writable.set()
        self.lost = False
        self.drop_at_once = False
        """Set before the connection is made: there are too many already."""

    # ------------------------------------------------------ asyncio callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Zero: "writable" then means that the kernel has everything, so that
        # a block that was written may be reused.
        self.transport.set_write_buffer_limits(high=0)
        self._socket = _options_socket(self.transport)
        if self._socket is not None:
            self._set_option(socket.TCP_NODELAY)
            if _QUICKACK is not None:
                self._set_option(_QUICKACK)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple) and len(peer) >= 2:
            self.peer_address, self.peer_port = str(peer[0]), int(peer[1])
        self.last_received = self._loop.time()
        self._watch = self._loop.call_later(self._stall_seconds, self._check_stall)
        self._listener.connected()
        if self.drop_at_once:
            self.transport.abort()

    def _set_option(self, option: int) -> None:
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, option, 1)
        except OSError:
            pass  # the peer is gone already, or this is no TCP; the next read says so

    def get_buffer(self, sizehint: int) -> memoryview:
        block = self._block
        if block is None:
            block = self._pool.acquire()
            if block is None:
                # Between messages an association may read a little without a
                # block; its data is handed on before the next read.
                if self._spare is None:
                    self._spare = memoryview(bytearray(_SPARE_BYTES))
                return self._spare
            self._block = block
            self._fill = 0
        return block.view[self._fill :]

    def buffer_updated(self, size: int) -> None:
        if self._socket is not None and _QUICKACK is not None:
            self._set_option(_QUICKACK)
        self.received_bytes += size
        self.last_received = self._loop.time()
        block = self._block
        if block is None:
            if self._spare is not None:
                self._parse(self._spare[:size])
                self._listener.flush()
                if self._listener.unfinished:
                    # The rest of a message is not copied piece by piece: that
                    # would be memory beyond the pool, and no back-pressure.
                    self._want_block()
            return
        data = block.view[self._fill : self._fill + size]
        self._fill += size
        self._parse(data)
        if self._block is None:  # left while parsing: the connection is over
            return
        if self._pool.block_bytes - self._fill < _LEAST_READ_BYTES:
            self._leave_block()
            self._want_block()
        elif block.users == 1 and not self._listener.unfinished:
            self._leave_block()  # an idle association holds nothing
        elif block.users == 1 and not self._lent:
            self._fill = 0

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        for timer in (self._artim, self._watch):
            if timer is not None:
                timer.cancel()
        self._artim = self._watch = None
        self._perform(self.machine.transport_closed())
        self._leave_block()
        self._spare = None
        self._writable.set()
        if self._socket is not None and isinstance(self._socket, socket.socket):
            self._socket.close()
        self._socket = None
        self._listener.disconnected()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # ----------------------------------------------------------------- reading

    _lent = False

    def lend(self) -> Block | None:
        """Add a user to the block that is being read; ``None`` if it is no pool block."""
        if self._block is not None:
            self._block.users += 1
        return self._block

    def mark_lent(self, lent: bool) -> None:
        """Say whether views of the current block are collected and not handed on yet."""
        self._lent = lent

    def give_back(self, block: Block) -> None:
        self._pool.release(block)

    def pause(self) -> None:
        """Stop reading; counted."""
        self._pauses += 1
        if self._pauses == 1 and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0 and self.transport is not None and not self.transport.is_closing():
            self.last_received = self._loop.time()
            self.transport.resume_reading()

    @property
    def paused(self) -> bool:
        return self._pauses > 0

    def _parse(self, data: memoryview) -> None:
        if self._broken:
            return
        try:
            for item in self._framer.feed(data):
                before = self.machine.state
                if before is State.STA6 and type(item) is Fragment:
                    self._listener.fragment(item)  # what the machine would say, told sooner
                    continue
                effects = self.machine.received(item)
                if self.machine.state is State.STA13 and before is not State.STA13:
                    self._log_protocol_error(f"unexpected {type(item).__name__} in {before.name}")
                for effect in effects:
                    if type(effect) is Deliver:
                        self._listener.fragment(effect.fragment)
                    else:
                        self._perform((effect,))
                if self.machine.state == State.STA1:
                    return  # over; what follows a peer's abort is nobody's
        except ProtocolError as error:
            self.protocol_error(error)

    def protocol_error(self, error: ProtocolError) -> None:
        """Answer what the peer broke by A-ABORT (provider) and say so once."""
        # What still comes is read and dropped: paused, we would not notice that
        # the peer closes, and would keep the connection until ARTIM expires.
        self._broken = True
        self._lent = False
        if self._is_over():  # already ended; what still comes is of no interest
            return
        self._log_protocol_error(str(error))
        self._perform(self.machine.received_invalid(error.reason))

    def _log_protocol_error(self, reason: str) -> None:
        _log.warning(
            "protocol_error",
            association_id=self._association_id,
            peer_address=self.peer_address,
            reason=reason,
        )

    def _is_over(self) -> bool:
        return self.machine.state in (State.STA1, State.STA13)

    def _leave_block(self) -> None:
        block = self._block
        if block is not None:
            # Flushed while it is still ours to lend; afterwards it would be copied.
            self._listener.flush()
            self._lent = False
            self._block = None
            self._pool.release(block)
        self._fill = 0

    def _want_block(self) -> None:
        """Have a block for the next read, or stop reading until there is one."""
        if self._awaiting_block or self.lost:
            return
        self._block = self._pool.acquire()
        self._fill = 0
        if self._block is None:
            self._awaiting_block = True
            self.pause()
            self._pool.when_free(self._block_came)

    def _block_came(self) -> None:
        self._awaiting_block = False
        self._want_block()  # there is one, or the connection is gone
        self.resume()

    def _check_stall(self) -> None:
        left = self._stall_seconds
        if self._listener.unfinished or self.paused or not self._framer.between_pdus:
            left -= self._loop.time() - self.last_received
            if left <= 0:
                _log.warning(
                    "association_stalled",
                    association_id=self._association_id,
                    peer_address=self.peer_address,
                )
                self.abort()
                self.close_now()
                return
        self._watch = self._loop.call_later(max(left, 0.05), self._check_stall)

    # ----------------------------------------------------------------- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write P-DATA; state is the caller's business."""
        if self.transport is not None and not self.lost:
            self.sent_bytes += len(data)
            self.transport.write(data)

    @property
    def writable(self) -> bool:
        """Whether the kernel has everything that was written."""
        return self._writable.is_set()

    async def drained(self, stall_seconds: float) -> bool:
        """Wait until the kernel has everything; false if nothing was taken for so long."""
        while not self._writable.is_set():
            unsent = self._unsent_bytes
            try:
                async with asyncio.timeout(stall_seconds):
                    await self._writable.wait()
            except TimeoutError:
                if self._unsent_bytes >= unsent:
                    return False
        return True

    @property
    def _unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    # ---------------------------------------------------------------- effects

    def perform(self, effects: list[Effect]) -> None:
        """Carry out what the machine decided."""
        self._perform(effects)

    def abort(self) -> None:
        """Abort as service user."""
        self._perform(self.machine.abort())

    def close_now(self) -> None:
        """Drop the connection, whatever is still unsent."""
        if self.transport is not None:
            self.transport.abort()

    def forsake(self) -> None:
        """Let go of a connection that was given up while it was being made.

        Event loops differ in whether they say that it is lost, if they had said
        that it was made.
        """
        self.close_now()
        if self.transport is not None:
            self.connection_lost(None)

    def _perform(self, effects: tuple[Effect, ...] | list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(data):
                    if self.transport is not None and not self.transport.is_closing():
                        self.transport.write(data)
                case Indicate(pdu):
                    self._listener.pdu(pdu)
                case Aborted(source, reason, lost):
                    self._listener.aborted(source, reason, lost)
                case StartArtim():
                    self._start_artim()
                case StopArtim():
                    if self._artim is not None:
                        self._artim.cancel()
                        self._artim = None
                case Close():
                    if self.transport is None or self.transport.is_closing():
                        continue
                    if self.machine.state is State.STA1 and not self._writable.is_set():
                        # The peer ended it: nobody is to wait until it reads the rest.
                        self.close_now()
                    else:
                        self.transport.close()
                        # close() waits for the peer to read what is unsent.
                        self._start_artim()
                case Connect() | Deliver():
                    pass  # the connection exists before this protocol does

    def _start_artim(self) -> None:
        if self._artim is not None:
            self._artim.cancel()
        if not self.lost:
            self._artim = self._loop.call_later(self._artim_seconds, self._artim_expired)

    def _artim_expired(self) -> None:
        self._artim = None
        self.machine.artim_expired()
        self.close_now()


def _options_socket(transport: asyncio.Transport) -> Any:
    """Return something with a quick ``setsockopt`` for *transport*, None if it has no socket.

    asyncio's own stand-in passes options on. Those of other event loops refuse
    them, or make a socket of a duplicated descriptor for each call, which costs
    more than the read after which it is called: they get one duplicate for good.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or isinstance(sock, TransportSocket):
        return sock
    try:
        fd = os.dup(sock.fileno())
    except OSError:
        return None  # no descriptor is left; the options are a matter of speed
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None  # the peer is gone already
