"""One association as its user sees it: messages in, messages out.

Commands are assembled here; data sets never are. A data set flows, as views of
the block it was received into, to the sink that was chosen when its command was
complete, and it is sent from a source that fills blocks; so memory does not
grow with what is moved. Rules kept: a message is sent whole or the association
is aborted, since a peer cannot be told that the rest will not come; every wait
has a deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dicomproxy.dimse.blocks import Block, BlockPool
from dicomproxy.dimse.command import Command, decode_command
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationError,
    AssociationLost,
    AssociationRejected,
    AssociationReleased,
    AssociationTimeout,
    NoContext,
)
from dicomproxy.dimse.framing import Fragment, message_pdus
from dicomproxy.dimse.layout import BlockLayout, pdu_bytes_in
from dicomproxy.dimse.machine import State
from dicomproxy.dimse.negotiation import Context, accepted_contexts
from dicomproxy.dimse.pdu import (
    AbortReason,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    Pdu,
    ProtocolError,
    ReleaseRequest,
    ReleaseResponse,
)
from dicomproxy.dimse.sinks import BytesSink, DataSource, Sink
from dicomproxy.dimse.transport import AssociationProtocol

__all__ = [
    "Association",
    "BytesSink",
    "DataSource",
    "Message",
    "MessageLimits",
    "Sink",
    "SinkFor",
]

_TURN_BYTES: Final = 2 * 1024 * 1024


@dataclass(slots=True)
class Message:
    """One DIMSE message, complete; ``sink`` took its data set, if it had one."""

    context: Context
    command: Command
    sink: Sink | None = None

    @property
    def data(self) -> bytes:
        """The data set, where it was collected by a :class:`BytesSink`."""
        return self.sink.data if isinstance(self.sink, BytesSink) else b""

    @property
    def too_long(self) -> bool:
        return isinstance(self.sink, BytesSink) and self.sink.too_long


SinkFor = Callable[["Association", Context, Command], Sink]
"""Chooses where a data set goes; called when its command is complete."""


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """What one peer may make us hold."""

    max_identifier_bytes: int
    max_command_bytes: int
    max_pending_messages: int


class Association:
    """An association, requestor's or acceptor's side.

    Made by :class:`dicomproxy.dimse.layer.UpperLayer`. It implements the
    transport's ``Listener``; everything below "as the transport's listener" is
    called by the transport only.
    """

    def __init__(
        self,
        association_id: str,
        *,
        limits: MessageLimits,
        send_pool: BlockPool,
        stall_seconds: float,
        on_request: Callable[[Association, AssociateRequest], None] | None = None,
        request: AssociateRequest | None = None,
    ) -> None:
        self.association_id = association_id
        self.is_requestor = request is not None
        self.request = request
        self.accept: AssociateAccept | None = None
        self.contexts: dict[int, Context] = {}
        self.peer_max_length = 0
        self.messages_received = 0
        self.messages_sent = 0
        self.started = 0.0
        self.round_trip_seconds = 0.0
        """From our A-ASSOCIATE-RQ to its answer; 0 for an association that the peer requested."""
        self.on_ended: Callable[[Association], None] | None = None
        self.sink_for: SinkFor = _collect
        self.limits = limits
        self.protocol: AssociationProtocol
        self._send_pool = send_pool
        self._stall_seconds = stall_seconds
        self._on_request = on_request
        self._negotiated: asyncio.Future[AssociateAccept] = (
            asyncio.get_running_loop().create_future()
        )
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended: AssociationError | None = None
        self._inbox: deque[Message] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._inbox_paused = False
        self._command = bytearray()
        self._command_context = 0
        self._last_command: tuple[bytes | None, Command] = (None, Command({}))
        self._current: Message | None = None
        self._segments: list[memoryview] = []
        self._sending = asyncio.Lock()
        self._last_message_id = 0

    def __repr__(self) -> str:
        return f"<Association {self.association_id} {self.protocol.machine.state.name}>"

    # ---------------------------------------------------------------- identity

    @property
    def peer_address(self) -> str:
        return self.protocol.peer_address

    @property
    def calling_ae_title(self) -> str:
        return self.request.calling_ae_title if self.request else ""

    @property
    def called_ae_title(self) -> str:
        return self.request.called_ae_title if self.request else ""

    @property
    def established(self) -> bool:
        return self._ended is None and self.protocol.machine.established

    @property
    def ended(self) -> AssociationError | None:
        """Why it is over, ``None`` while it is not."""
        return self._ended

    def next_message_id(self) -> int:
        self._last_message_id = self._last_message_id % 0xFFFF + 1
        return self._last_message_id

    def context_for(self, abstract_syntax: str, *transfer_syntaxes: str) -> Context:
        """Return an accepted context in which we are SCU, by order of *transfer_syntaxes*.

        Raises:
            NoContext: none was accepted.
        """
        usable = [
            context
            for context in self.contexts.values()
            if context.abstract_syntax == abstract_syntax and context.as_scu
        ]
        for syntax in transfer_syntaxes:
            for context in usable:
                if context.transfer_syntax == syntax:
                    return context
        if usable and not transfer_syntaxes:
            return usable[0]
        raise NoContext(f"no accepted presentation context for {abstract_syntax}")

    # --------------------------------------------------------------- receiving

    async def receive(self, timeout_seconds: float | None) -> Message:
        """Return the next message.

        The deadline is for the next message to be complete, and is put off
        while the bytes of one still arrive.

        Raises:
            AssociationReleased, AssociationAborted, AssociationLost: it is over.
            AssociationTimeout: nothing came; the association still stands.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        while not self._inbox:
            if self._ended is not None:
                raise self._ended
            self._waiter = loop.create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._waiter
            except TimeoutError:
                assert timeout_seconds is not None  # noqa: S101  (else there is no deadline)
                put_off = self.protocol.last_received + timeout_seconds
                if not self._mid_message or put_off <= loop.time():
                    raise AssociationTimeout("message") from None
                deadline = put_off
            finally:
                self._waiter = None
        message = self._inbox.popleft()
        if self._inbox_paused and len(self._inbox) <= self.limits.max_pending_messages // 2:
            self._inbox_paused = False
            self.protocol.resume()
        return message

    # ----------------------------------------------------------------- sending

    async def send(
        self, context: Context, command: Command, data: bytes | DataSource | None = None
    ) -> None:
        """Send one message, whole.

        Raises:
            AssociationError: it is over, or the peer took nothing for the stall
                deadline; then the association is aborted.
            OSError: *data* broke off or could not be read; the association is aborted.
        """
        if data is None or isinstance(data, bytes):
            await self.send_all(context, ((command, data),))
            return
        encoded = command.encode()
        async with self._sending:
            self._check_sendable()
            try:
                await self._send_stream(context.context_id, encoded, data)
            except AssociationError:
                raise
            except BaseException:
                self.abort()
                raise
        self.messages_sent += 1

    async def send_all(
        self, context: Context, messages: Sequence[tuple[Command, bytes | None]]
    ) -> None:
        """Send small messages in one go: one call of the kernel, one wake-up of the peer.

        A command that is the same object as the one before it is encoded once.

        Raises:
            AssociationError: as for :meth:`send`.
        """
        parts: list[bytes] = []
        last: Command | None = None
        encoded = b""
        for command, data in messages:
            if command is not last:
                last, encoded = command, command.encode()
            parts.append(message_pdus(context.context_id, encoded, data, self._pdu_bytes))
        async with self._sending:
            self._check_sendable()
            self.protocol.write(b"".join(parts))
            await self._drain()
        self.messages_sent += len(messages)

    def send_now(self, context: Context, command: Command) -> bool:
        """Send a message without data set at once; false if one is being sent or none can be."""
        if self._sending.locked() or self._ended is not None:
            return False
        if not self.protocol.machine.may_send_data():
            return False
        self.protocol.write(
            message_pdus(context.context_id, command.encode(), None, self._pdu_bytes)
        )
        self.messages_sent += 1
        return True

    def _check_sendable(self) -> None:
        if self._ended is not None:
            raise self._ended
        if not self.protocol.machine.may_send_data():
            raise AssociationReleased("the association is being released")

    @property
    def _pdu_bytes(self) -> int:
        """Longest P-DATA-TF to send, headers included."""
        return pdu_bytes_in(self._send_pool.block_bytes, self.peer_max_length)

    async def _send_stream(self, context_id: int, command: bytes, data: DataSource) -> None:
        """Send a command and a data set block by block, the command along with the first."""
        size = data.size
        block = self._send_pool.acquire() or await self._block()
        try:
            layout = BlockLayout(block.view, context_id, self.peer_max_length)
            head = message_pdus(context_id, command, None, layout.pdu_bytes)
            begin = layout.put_before(head)
            if begin is None:
                self.protocol.write(head)
                await self._drain()
            offset = turn = 0
            while True:
                part = layout.lay_out(size - offset)
                if part.size and await data.read_into(part.views, offset) != part.size:
                    raise OSError("the data set broke off")
                if self._ended is not None:
                    raise self._ended
                self.protocol.write(block.view[layout.gap if begin is None else begin : part.end])
                begin = None
                # A block is reused only when the kernel has all of it: some
                # event loops keep what they are given instead of copying it.
                if self.protocol.lost or not self.protocol.writable:
                    await self._drain()
                    turn = 0
                offset += part.size
                if part.is_last:
                    return
                turn += part.size
                if turn >= _TURN_BYTES:
                    # Memory read at once, for a peer that takes it at once, waits for
                    # nothing: a large object would hold up all others to its end.
                    await asyncio.sleep(0)
                    turn = 0
        finally:
            if self.protocol.lost or self.protocol.writable:
                self._send_pool.release(block)
            else:
                # Still referenced by the transport, which is being closed.
                self._closed.add_done_callback(lambda _: self._send_pool.release(block))

    async def _block(self) -> Block:
        """Wait for a block to send from."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                return await self._send_pool.acquire_wait()
        except TimeoutError:
            self.abort()
            raise AssociationTimeout("memory for sending") from None

    async def _drain(self) -> None:
        """Wait until the kernel has everything, as long as some of it is taken; else abort."""
        try:
            taken = await self.protocol.drained(self._stall_seconds)
        except BaseException:
            self.abort()
            raise
        if not taken:
            self.abort()
            self.protocol.close_now()
            raise AssociationTimeout("sending")
        if self.protocol.lost:
            raise self._ended or AssociationLost("connection lost")

    # ------------------------------------------------------------------ ending

    async def release(self, timeout_seconds: float) -> None:
        """Release in order; abort if the peer does not answer. Never raises."""
        if not self.established:
            return
        async with self._sending:
            if self._ended is not None or not self.protocol.machine.established:
                return  # it ended while a message was being sent
            self.protocol.perform(self.protocol.machine.release())
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.shield(self._closed)
        except (TimeoutError, asyncio.CancelledError) as error:
            # Not by abort(): where both sides asked for release it is over for
            # its user, and still nothing but us would end the connection.
            self._end(AssociationAborted(0, 0))
            self.protocol.abort()
            if isinstance(error, asyncio.CancelledError):
                raise

    def abort(self) -> None:
        """Abort as service user; where it is over, only drop what was not received yet."""
        # Nobody will: what their sinks hold has no other end.
        while self._inbox:
            if (sink := self._inbox.popleft().sink) is not None:
                sink.discard()
        if self._ended is None:
            self._end(AssociationAborted(0, 0))
            self.protocol.abort()

    async def wait_closed(self) -> None:
        """Return once the connection is gone."""
        await asyncio.shield(self._closed)

    def _end(self, error: AssociationError) -> None:
        if self._ended is not None:
            return
        self._ended = error
        current, self._current = self._current, None
        self._segments.clear()
        if current is not None and current.sink is not None:
            current.sink.discard()
        if not self._negotiated.done():
            self._negotiated.set_exception(error)
            self._negotiated.exception()  # retrieved: nobody may be waiting
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ------------------------------------------------------------- negotiation

    async def negotiated(self, timeout_seconds: float) -> AssociateAccept:
        """Wait for the answer to our request.

        Raises:
            AssociationError: rejected, aborted, lost or silent.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(self._negotiated)
        except TimeoutError:
            self.abort()
            self.protocol.close_now()
            raise AssociationTimeout("association") from None

    def accepted(self, accept: AssociateAccept, contexts: dict[int, Context]) -> None:
        """Answer the peer's request: accept it."""
        if self._ended is None and self.protocol.machine.state is State.STA3:
            self.accept, self.contexts = accept, contexts
            self.protocol.perform(self.protocol.machine.accept(accept))

    def rejected(self, reject: AssociateReject) -> None:
        """Answer the peer's request: reject it."""
        if self._ended is None and self.protocol.machine.state is State.STA3:
            self.protocol.perform(self.protocol.machine.reject(reject))
            self._end(AssociationRejected(reject))

    # ---------------------------------------------- as the transport's listener

    def connected(self) -> None:
        machine = self.protocol.machine
        if self._ended is not None:  # given up while the connection was being made
            self.protocol.close_now()
            return
        if self.request is not None:
            self.protocol.perform(machine.associate())
            self.protocol.perform(machine.send_request(self.request))
        else:
            self.protocol.perform(machine.transport_connected())

    def pdu(self, pdu: Pdu) -> None:
        machine = self.protocol.machine
        match pdu:
            case AssociateRequest():
                self.request = pdu
                self.peer_max_length = pdu.user.max_length
                if self._on_request is not None:
                    self._on_request(self, pdu)
            case AssociateAccept():
                self.accept = pdu
                self.peer_max_length = pdu.user.max_length
                if self.request is not None:
                    # At once: the acceptor's first message may be right behind.
                    self.contexts = accepted_contexts(self.request, pdu)
                if not self._negotiated.done():
                    self._negotiated.set_result(pdu)
            case AssociateReject():
                self._end(AssociationRejected(pdu))
            case ReleaseRequest():
                # Answered at once: a peer that releases wants nothing more.
                if machine.state in (State.STA8, State.STA9):
                    self.protocol.perform(machine.release_response())
                self._end(AssociationReleased("released by the peer"))
            case ReleaseResponse():
                if machine.state is State.STA12:  # both asked, and we were asked first
                    self.protocol.perform(machine.release_response())
                self._end(AssociationReleased("released"))
            case _:
                pass  # A-ABORT comes as aborted()

    def fragment(self, fragment: Fragment) -> None:
        context_id, is_command, last, view = fragment
        current = self._current
        if not is_command:
            if current is None:
                raise ProtocolError("data set without a command", AbortReason.UNEXPECTED_PDU)
            if context_id != current.context.context_id:
                raise ProtocolError("data set in another context than its command")
            if view:
                self._segments.append(view)
                self.protocol.mark_lent(True)
            if last:
                self.flush()
                self._current = None
                self._complete(current)
            return
        if current is not None:
            raise ProtocolError("command inside a data set", AbortReason.UNEXPECTED_PDU)
        if self._command and context_id != self._command_context:
            raise ProtocolError("command split over two contexts")
        if len(self._command) + len(view) > self.limits.max_command_bytes:
            raise ProtocolError("command set over its limit")
        self._command += view
        self._command_context = context_id
        if not last:
            return
        data = bytes(self._command)
        self._command.clear()
        context = self.contexts.get(context_id)
        if context is None:
            raise ProtocolError("presentation context was not accepted")
        # Pending responses are alike to the byte, and nobody changes a command received.
        if data != self._last_command[0]:
            self._last_command = (data, decode_command(data))
        command = self._last_command[1]
        message = Message(context, command)
        if command.has_data_set:
            message.sink = self.sink_for(self, context, command)
            self._current = message
        else:
            self._complete(message)

    def _complete(self, message: Message) -> None:
        if self._ended is not None:
            return
        self.messages_received += 1
        self._inbox.append(message)
        if len(self._inbox) >= self.limits.max_pending_messages and not self._inbox_paused:
            self._inbox_paused = True
            self.protocol.pause()
        self._wake()

    def flush(self) -> None:
        self.protocol.mark_lent(False)
        if not self._segments:
            return
        segments, self._segments = self._segments, []
        current = self._current
        if current is None or current.sink is None:
            return
        block = self.protocol.lend()
        if block is None:
            # Not a block of the pool: its bytes are overwritten by the next read.
            current.sink.write([memoryview(b"".join(segments))], _nothing)
            return
        give_back = self.protocol.give_back
        current.sink.write(segments, lambda: give_back(block))

    def aborted(self, source: int, reason: int, lost: bool) -> None:
        self._end(
            AssociationLost("connection lost") if lost else AssociationAborted(source, reason)
        )

    def disconnected(self) -> None:
        self._end(AssociationLost("connection lost"))
        if not self._closed.done():
            self._closed.set_result(None)
        if self.on_ended is not None:
            self.on_ended(self)

    @property
    def _mid_message(self) -> bool:
        return self._current is not None or bool(self._command)

    @property
    def unfinished(self) -> bool:
        return self._ended is None and self._mid_message


def _collect(association: Association, context: Context, command: Command) -> Sink:
    return BytesSink(association.limits.max_identifier_bytes)


def _nothing() -> None:
    return
