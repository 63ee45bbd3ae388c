"""A scripted peer: plays bytes and states what it expects, as acceptor or as requestor.

It speaks through the pure codec only, so that it can do what no decent toolkit
would: stall, abort, reject, send garbage, vanish inside a PDU, never read.
Every wait has a deadline; a script that fails fails the test that started it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from dicomproxy.dimse.command import Command, decode_command
from dicomproxy.dimse.negotiation import IMPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.dimse.pdu import (
    APPLICATION_CONTEXT,
    Abort,
    AssociateAccept,
    AssociateRequest,
    ContextAnswer,
    Pdu,
    PduType,
    ProposedContext,
    ReleaseRequest,
    ReleaseResponse,
    UserInformation,
    decode,
    encode,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
VERIFICATION = "1.2.840.10008.1.1"
DEADLINE_SECONDS = 60.0

P = TypeVar("P", bound=Pdu)


def pdv(context_id: int, control: int, body: bytes) -> bytes:
    """Return one PDV; *control* is 1 for a command, plus 2 for a last fragment."""
    return struct.pack(">LBB", len(body) + 2, context_id, control) + body


def p_data(*pdvs: bytes) -> bytes:
    """Return a P-DATA-TF of *pdvs*."""
    body = b"".join(pdvs)
    return struct.pack(">BxL", PduType.P_DATA_TF, len(body)) + body


def message(context_id: int, command: Command, data: bytes | None = None) -> bytes:
    """Return a message in as few PDUs as it takes: one for each part."""
    parts = [p_data(pdv(context_id, 3, command.encode()))]
    if data is not None:
        parts.append(p_data(pdv(context_id, 2, data)))
    return b"".join(parts)


class RawPeer:
    """One connection in the hands of a script."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.pdu_lengths: list[int] = []
        """Length field of every P-DATA-TF read."""
        self.fragment_lengths: list[int] = []
        """Length of every fragment read, without its control header."""

    async def send(self, *items: Pdu | bytes) -> None:
        self.writer.write(
            b"".join(item if isinstance(item, bytes) else encode(item) for item in items)
        )
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.writer.drain()

    async def send_message(
        self, context_id: int, command: Command, data: bytes | None = None
    ) -> None:
        await self.send(message(context_id, command, data))

    async def receive_pdu(self) -> tuple[int, bytes]:
        """Return type and body of the next PDU."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            pdu_type, length = struct.unpack(">BxL", await self.reader.readexactly(6))
            return pdu_type, await self.reader.readexactly(length)

    async def expect(self, kind: type[P]) -> P:
        """Return the next PDU, which is of *kind*."""
        pdu_type, body = await self.receive_pdu()
        assert pdu_type != PduType.P_DATA_TF, f"P-DATA instead of {kind.__name__}"
        pdu = decode(pdu_type, body)
        assert isinstance(pdu, kind), f"{pdu} instead of {kind.__name__}"
        return pdu

    async def expect_message(self) -> tuple[int, Command, bytes]:
        """Return the next message: context ID, command and data set."""
        parts = {1: bytearray(), 0: bytearray()}
        command: Command | None = None
        while True:
            pdu_type, body = await self.receive_pdu()
            assert pdu_type == PduType.P_DATA_TF, f"PDU type {pdu_type} instead of P-DATA"
            self.pdu_lengths.append(len(body))
            at = 0
            while at < len(body):
                length, context_id, control = struct.unpack_from(">LBB", body, at)
                self.fragment_lengths.append(length - 2)
                parts[control & 1] += body[at + 6 : at + 4 + length]
                at += 4 + length
                if control & 3 == 3:
                    command = decode_command(bytes(parts[1]))
                if control & 2 and command and (not command.has_data_set or not control & 1):
                    assert at == len(body)
                    return context_id, command, bytes(parts[0])

    async def expect_end(self) -> None:
        """Read nothing more: the other side has closed."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            try:
                rest = await self.reader.read()
            except ConnectionError:
                rest = b""
        assert rest == b"", f"{len(rest)} bytes where an end was expected"

    async def expect_abort(self) -> Abort:
        """Return the A-ABORT, and see the connection closed once we close ours."""
        abort = await self.expect(Abort)
        self.writer.close()
        return abort

    # -------------------------------------------------------- as the requestor

    async def associate(
        self,
        *abstract_syntaxes: str,
        max_length: int = 16384,
        called_ae_title: str = "PROXY",
        application_context: str = APPLICATION_CONTEXT,
        protocol_version: int = 1,
    ) -> None:
        """Send A-ASSOCIATE-RQ, with contexts 1, 3, 5..."""
        await self.send(
            AssociateRequest(
                called_ae_title,
                "RAW",
                tuple(
                    ProposedContext(2 * number + 1, syntax, (IMPLICIT_VR_LITTLE_ENDIAN,))
                    for number, syntax in enumerate(abstract_syntaxes or (VERIFICATION, CT))
                ),
                UserInformation(max_length=max_length, implementation_class_uid="1.2.3"),
                application_context,
                protocol_version,
            )
        )

    async def establish(self, *abstract_syntaxes: str, max_length: int = 16384) -> None:
        await self.associate(*abstract_syntaxes, max_length=max_length)
        await self.expect(AssociateAccept)

    async def release(self) -> None:
        await self.send(ReleaseRequest())
        await self.expect(ReleaseResponse)
        self.writer.close()

    # --------------------------------------------------------- as the acceptor

    async def accept(self, *, max_length: int = 16384) -> AssociateRequest:
        """Take A-ASSOCIATE-RQ and accept every context."""
        request = await self.expect(AssociateRequest)
        await self.send(
            AssociateAccept(
                request.called_ae_title,
                request.calling_ae_title,
                tuple(
                    ContextAnswer(context.context_id, 0, context.transfer_syntaxes[0])
                    for context in request.contexts
                ),
                UserInformation(max_length=max_length, implementation_class_uid="1.2.3"),
            )
        )
        return request

    async def released(self) -> None:
        """Take A-RELEASE-RQ, answer it and see the connection closed."""
        await self.expect(ReleaseRequest)
        await self.send(ReleaseResponse())
        await self.expect_end()

    def reset(self) -> None:
        """End the connection by RST, as a crashed host does."""
        sock = self.writer.get_extra_info("socket")
        linger = struct.pack("ii", 1, 0)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except TypeError:  # the stand-in of another event loop
            with socket.socket(fileno=sock.fileno()) as real:
                real.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                real.detach()
        self.writer.transport.abort()


Script = Callable[[RawPeer], Awaitable[None]]


@asynccontextmanager
async def raw_acceptor(*scripts: Script) -> AsyncIterator[int]:
    """Listen on a free port; each connection plays the next script. Yields the port.

    Leaving waits until every script that began has ended, and raises what one
    of them raised.
    """
    left = list(scripts)
    async with asyncio.TaskGroup() as group:

        async def play(
            script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            try:
                async with asyncio.timeout(DEADLINE_SECONDS * 2):
                    await script(RawPeer(reader, writer))
            finally:
                writer.close()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not left:
                writer.close()
                raise AssertionError("more connections than scripts")
            group.create_task(play(left.pop(0), reader, writer))

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
    assert not left, f"{len(left)} scripts were not played"


@asynccontextmanager
async def raw_requestor(port: int) -> AsyncIterator[RawPeer]:
    """Connect to *port*; leaving closes what is still open."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawPeer(reader, writer)
    finally:
        writer.close()
