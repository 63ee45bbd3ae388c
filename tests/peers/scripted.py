"""A peer that plays a script over a raw socket, byte by byte as the script says.

It knows nothing of our own codec: PDUs and command sets are laid out here from
PS3.8 section 9.3 and PS3.7 section 6.3, so that a mistake on one side is not
repeated on the other. As an acceptor it plays one script per connection, the
last one again and again; as a requestor it plays one and ends.

A script is a list of steps::

    [Expect(ASSOCIATE_RQ), Accept(), Expect(P_DATA), Stall()]
    [Expect(ASSOCIATE_RQ), Send(associate_rj(2, 3, 2)), Close()]
    [Expect(ASSOCIATE_RQ), Send(b"\\x04\\x00\\x00"), Reset()]
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from tests.peers.node import Node

ASSOCIATE_RQ: Final = 0x01
ASSOCIATE_AC: Final = 0x02
ASSOCIATE_RJ: Final = 0x03
P_DATA: Final = 0x04
RELEASE_RQ: Final = 0x05
RELEASE_RP: Final = 0x06
ABORT: Final = 0x07

IMPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
_APPLICATION_CONTEXT: Final = b"1.2.840.10008.3.1.1.1"
_SECONDS: Final = 60.0


class ScriptBroken(AssertionError):
    """The other side did something else than the script expected."""


# -------------------------------------------------------------------- the bytes


def pdu(kind: int, body: bytes, *, length: int | None = None) -> bytes:
    """Lay out a PDU; *length* replaces the true one."""
    return struct.pack(">BxI", kind, len(body) if length is None else length) + body


def item(kind: int, body: bytes) -> bytes:
    """Lay out a variable item or sub-item."""
    return struct.pack(">BxH", kind, len(body)) + body


def _user_information(maximum_length: int) -> bytes:
    maximum = item(0x51, struct.pack(">I", maximum_length))
    return item(0x50, maximum + item(0x52, b"1.2.3.4") + item(0x55, b"SCRIPTED"))


def _associate(kind: int, called: str, calling: str, contexts: bytes, maximum_length: int) -> bytes:
    head = struct.pack(">H2x16s16s32x", 1, called.ljust(16).encode(), calling.ljust(16).encode())
    body = item(0x10, _APPLICATION_CONTEXT) + contexts + _user_information(maximum_length)
    return pdu(kind, head + body)


def associate_rq(
    contexts: Mapping[str, Sequence[str]],
    *,
    called: str = "CALLED",
    calling: str = "SCRIPTED",
    maximum_length: int = 16384,
) -> bytes:
    """Lay out A-ASSOCIATE-RQ with contexts 1, 3, 5...: abstract syntax to transfer syntaxes."""
    proposed = b"".join(
        item(
            0x20,
            bytes([2 * number + 1, 0, 0, 0])
            + item(0x30, abstract.encode())
            + b"".join(item(0x40, syntax.encode()) for syntax in syntaxes),
        )
        for number, (abstract, syntaxes) in enumerate(contexts.items())
    )
    return _associate(ASSOCIATE_RQ, called, calling, proposed, maximum_length)


def associate_ac(
    results: Mapping[int, tuple[int, str]],
    *,
    called: str = "CALLED",
    calling: str = "CALLING",
    maximum_length: int = 16384,
) -> bytes:
    """Lay out A-ASSOCIATE-AC: context ID to result (0 accepted) and transfer syntax."""
    answered = b"".join(
        item(0x21, bytes([context, 0, result, 0]) + item(0x40, syntax.encode()))
        for context, (result, syntax) in results.items()
    )
    return _associate(ASSOCIATE_AC, called, calling, answered, maximum_length)


def associate_rj(result: int, source: int, reason: int) -> bytes:
    """Lay out A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
    return pdu(ASSOCIATE_RJ, bytes([0, result, source, reason]))


def abort(source: int = 0, reason: int = 0) -> bytes:
    """Lay out A-ABORT (PS3.8 9.3.8)."""
    return pdu(ABORT, bytes([0, 0, source, reason]))


def release_rq() -> bytes:
    return pdu(RELEASE_RQ, bytes(4))


def release_rp() -> bytes:
    return pdu(RELEASE_RP, bytes(4))


def pdv(context: int, data: bytes, *, command: bool, last: bool = True) -> bytes:
    """Lay out one presentation data value item (PS3.8 9.3.5.1, Annex E)."""
    return struct.pack(">IBB", len(data) + 2, context, command | last << 1) + data


def p_data(context: int, data: bytes, *, command: bool, last: bool = True) -> bytes:
    """Lay out P-DATA-TF with one value."""
    return pdu(P_DATA, pdv(context, data, command=command, last=last))


def command_set(elements: Mapping[int, int | str]) -> bytes:
    """Lay out a command set: element number of group 0000 to US value or text."""
    body = b""
    for element, value in sorted(elements.items()):
        if isinstance(value, int):
            encoded = struct.pack("<H", value)
        else:
            # UIDs are padded with a null byte, all other text with a space.
            padding = b"\0" if element in (0x0002, 0x0003, 0x1000, 0x1001) else b" "
            encoded = value.encode("ascii")
            encoded += padding * (len(encoded) % 2)
        body += struct.pack("<HHI", 0, element, len(encoded)) + encoded
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def read_command_set(data: bytes) -> dict[int, bytes]:
    """Split a command set into element number and value."""
    found = {}
    at = 0
    while at < len(data):
        group, element, length = struct.unpack_from("<HHI", data, at)
        if group != 0:
            raise ScriptBroken(f"group {group:04X} in a command set")
        found[element] = data[at + 8 : at + 8 + length]
        at += 8 + length
    return found


def proposed_contexts(request: bytes) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Read an A-ASSOCIATE-RQ: context ID to abstract syntax and transfer syntaxes."""
    found = {}
    for kind, body in _items(request[74:]):
        if kind == 0x20:
            inner = list(_items(body[4:]))
            abstract = next(text for item_kind, text in inner if item_kind == 0x30)
            syntaxes = (text.decode() for item_kind, text in inner if item_kind == 0x40)
            found[body[0]] = (abstract.decode(), tuple(syntaxes))
    return found


def _items(data: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        kind, length = struct.unpack_from(">BxH", data, at)
        yield kind, data[at + 4 : at + 4 + length]
        at += 4 + length


# -------------------------------------------------------------------- the steps


@dataclass(frozen=True, slots=True)
class Expect:
    """Read one PDU; it must be of *kind* if one is given."""

    kind: int | None = None


@dataclass(frozen=True, slots=True)
class ExpectEnd:
    """Read on until the other side has closed; a PDU of *kind* must come before if given."""

    kind: int | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Write bytes, at once or *piece* bytes at a time."""

    data: bytes
    piece: int = 0


@dataclass(frozen=True, slots=True)
class Accept:
    """Answer the last A-ASSOCIATE-RQ: every context, or those of *abstract_syntaxes*, accepted.

    Each with the first transfer syntax proposed.
    """

    abstract_syntaxes: tuple[str, ...] | None = None
    maximum_length: int = 16384


@dataclass(frozen=True, slots=True)
class Stall:
    """Do nothing, with the connection open, until :meth:`ScriptedPeer.resume`."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection in order (FIN)."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Cut the connection (RST)."""


@dataclass(frozen=True, slots=True)
class Do:
    """Call *action* with what was received so far; write what it returns."""

    action: Callable[[Sequence[bytes]], bytes | Awaitable[bytes]]


Step = Expect | ExpectEnd | Send | Accept | Stall | Close | Reset | Do


@dataclass(slots=True)
class Connection:
    """One connection as it went: PDUs received, and what broke the script."""

    received: list[bytes] = field(default_factory=list)
    broken: Exception | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def kinds(self) -> list[int]:
        return [one[0] for one in self.received]


class ScriptedPeer:
    """Listens on loopback and plays *scripts*, the first to the first connection.

    Leaving the block raises what broke a script, so that a test cannot overlook it.
    """

    def __init__(self, *scripts: Sequence[Step], ae_title: str = "SCRIPTED") -> None:
        self._scripts = scripts
        self._ae_title = ae_title
        self._server: asyncio.Server | None = None
        self._resumed = asyncio.Event()
        self._stalled = asyncio.Semaphore(0)
        self._opened = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self.connections: list[Connection] = []

    @property
    def node(self) -> Node:
        assert self._server is not None
        return Node(self._ae_title, "127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, kind: object, error: object, _traceback: object) -> None:
        assert self._server is not None
        self._server.close()
        self.resume()
        for writer in self._writers:
            writer.transport.abort()
        async with asyncio.timeout(_SECONDS):
            for connection in self.connections:
                await connection.ended.wait()
        if error is None:
            for connection in self.connections:
                if isinstance(connection.broken, ScriptBroken):
                    raise connection.broken

    def resume(self) -> None:
        """End every stall, present and future."""
        self._resumed.set()

    async def stalled(self) -> None:
        """Wait until a connection has come to a stall."""
        async with asyncio.timeout(_SECONDS):
            await self._stalled.acquire()

    async def ended(self, number: int = 0) -> Connection:
        """Wait until connection *number* is over, and return it."""
        async with asyncio.timeout(_SECONDS):
            while len(self.connections) <= number:
                self._opened.clear()
                await self._opened.wait()
            await self.connections[number].ended.wait()
        return self.connections[number]

    async def request(self, node: tuple[str, str, int]) -> Connection:
        """Connect to *node* and play the first script to its end.

        Raises:
            ScriptBroken: the other side did something unexpected.
        """
        reader, writer = await asyncio.open_connection(node[1], node[2])
        await self._serve(reader, writer)
        connection = self.connections[-1]
        if connection.broken:
            raise connection.broken
        return connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection()
        script = self._scripts[min(len(self.connections), len(self._scripts) - 1)]
        self.connections.append(connection)
        self._writers.append(writer)
        self._opened.set()
        try:
            async with asyncio.timeout(_SECONDS):
                for step in script:
                    await self._play(step, connection, reader, writer)
        except TimeoutError:
            connection.broken = ScriptBroken(f"nothing came for {_SECONDS:g} s")
        except (ScriptBroken, ConnectionError) as error:
            connection.broken = error
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                pass
            connection.ended.set()

    async def _play(
        self,
        step: Step,
        connection: Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        match step:
            case Expect(kind):
                await self._expect(kind, connection, reader)
            case ExpectEnd(kind):
                await self._expect_end(kind, connection, reader)
            case Send(data, piece):
                for at in range(0, len(data), piece or len(data) or 1):
                    writer.write(data[at : at + (piece or len(data))])
                    await writer.drain()
            case Accept():
                writer.write(_answer(step, connection.received[-1]))
                await writer.drain()
            case Stall():
                self._stalled.release()
                await self._resumed.wait()
            case Close():
                writer.close()
            case Reset():
                _reset(writer)
            case Do(action):
                answer = action(connection.received)
                writer.write(answer if isinstance(answer, bytes) else await answer)
                await writer.drain()

    async def _expect(
        self, kind: int | None, connection: Connection, reader: asyncio.StreamReader
    ) -> None:
        try:
            head = await reader.readexactly(6)
            received = head + await reader.readexactly(int.from_bytes(head[2:], "big"))
        except asyncio.IncompleteReadError as error:
            raise ScriptBroken(f"closed where PDU {kind} was expected") from error
        connection.received.append(received)
        if kind is not None and received[0] != kind:
            raise ScriptBroken(f"PDU {received[0]} where {kind} was expected")

    async def _expect_end(
        self, kind: int | None, connection: Connection, reader: asyncio.StreamReader
    ) -> None:
        before = len(connection.received)
        while True:
            try:
                await self._expect(None, connection, reader)
            except (ScriptBroken, ConnectionError):
                break
        if kind is not None and kind not in connection.kinds[before:]:
            raise ScriptBroken(f"closed without PDU {kind}")


def _answer(step: Accept, request: bytes) -> bytes:
    if request[0] != ASSOCIATE_RQ:
        raise ScriptBroken("there is no association request to accept")
    wanted = step.abstract_syntaxes
    return associate_ac(
        {
            context: (0 if wanted is None or abstract in wanted else 3, syntaxes[0])
            for context, (abstract, syntaxes) in proposed_contexts(request).items()
        },
        called=request[10:26].decode().strip(),
        calling=request[26:42].decode().strip(),
        maximum_length=step.maximum_length,
    )


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    # With a linger time of 0, closing sends RST and drops what was not sent yet.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
