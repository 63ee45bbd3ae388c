"""Listening for MLLP: every way a caller may behave."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.hl7.client import MllpClient
from dicomproxy.hl7.errors import Fault, MalformedMessage, MllpError
from dicomproxy.hl7.inbox import Inbox
from dicomproxy.hl7.journal import Journal
from dicomproxy.hl7.listener import MllpListener
from dicomproxy.hl7.message import Message
from dicomproxy.hl7.tls import TlsSettings, client_context, server_context
from tests.support.certificates import authority, calling, serving, stranger
from tests.support.log_watch import LogWatch

Receive = Callable[[bytes], Awaitable[bytes]]


async def echo(content: bytes) -> bytes:
    if content == b"no message":
        raise MalformedMessage("no_message")
    return b"ack " + content


@asynccontextmanager
async def listening(receive: Receive = echo, **options: Any) -> AsyncIterator[int]:
    listener = MllpListener(receive, **options)
    port = await listener.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await listener.close()


class Caller:
    """A caller that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int, tls: ssl.SSLContext | None = None) -> Caller:
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, limit=2**21))

    async def answer(self) -> bytes:
        async with asyncio.timeout(10):
            framed = await self.reader.readuntil(b"\x1c\r")
        assert framed[:1] == b"\x0b"
        return framed[1:-2]

    async def ended(self) -> bool:
        """Return whether the other side ended the connection, saying no more."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read() == b""
            except OSError:
                return True

    def close(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def calls(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Caller]:
    caller = await Caller.to(port, tls)
    try:
        yield caller
    finally:
        caller.close()


async def test_each_message_is_answered_in_turn() -> None:
    """One after the other, also when they come together or in pieces."""
    async with listening() as port, calls(port) as caller:
        caller.writer.write(b"\x0bone\x1c\r")
        assert await caller.answer() == b"ack one"
        caller.writer.write(b"\x0btwo\x1c\r\x0bthree\x1c\r\r\n\x0bfo")
        assert await caller.answer() == b"ack two"
        assert await caller.answer() == b"ack three"
        caller.writer.write(b"ur\x1c")
        await asyncio.sleep(0)
        caller.writer.write(b"\r")
        assert await caller.answer() == b"ack four"


async def test_nothing_is_read_while_a_message_is_dealt_with() -> None:
    """The next one waits in the sender's socket, not in our memory."""
    gate = asyncio.Event()
    begun: list[bytes] = []

    async def slow(content: bytes) -> bytes:
        begun.append(content)
        await gate.wait()
        return content

    async with listening(slow) as port, calls(port) as caller:
        caller.writer.write(b"\x0bone\x1c\r\x0btwo\x1c\r")
        filler = b"\x0b" + b"A" * 1_000_000 + b"\x1c\r"
        for _ in range(20):
            caller.writer.write(filler)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await caller.writer.drain()
        assert begun == [b"one"]
        gate.set()
        assert await caller.answer() == b"one"
        assert await caller.answer() == b"two"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no_frame"),
        (b"\x0bone\x1cX", "frame_not_ended"),
        (b"\x0bone\x0btwo", "frame_in_frame"),
        (b"\x0b" + b"A" * 200, "frame_too_long"),
        (b"\x0bno message\x1c\r", "malformed"),
    ],
)
async def test_what_is_no_mllp_ends_the_connection(
    data: bytes, reason: str, log_watch: LogWatch
) -> None:
    """At once, and with a word in the log that says why."""
    async with listening(max_message_bytes=100) as port, calls(port) as caller:
        caller.writer.write(data)
        assert await caller.ended()
    assert f'"reason":"{reason}"' in log_watch.text


async def test_a_caller_that_leaves_in_mid_message_harms_nobody(log_watch: LogWatch) -> None:
    """Half a message is dropped, and others are served."""
    async with listening() as port:
        async with calls(port) as caller:
            caller.writer.write(b"\x0bhalf")
            caller.writer.write_eof()
            assert await caller.ended()
        async with calls(port) as caller:
            caller.writer.write(b"\x0bone\x1c\r")
            assert await caller.answer() == b"ack one"
    assert '"reason":"mid_message"' in log_watch.text


async def test_a_caller_that_leaves_before_its_answer_harms_nobody() -> None:
    """What it sent is dealt with all the same."""
    gate, dealt_with = asyncio.Event(), asyncio.Event()

    async def slow(content: bytes) -> bytes:
        await gate.wait()
        dealt_with.set()
        return content

    async with listening(slow) as port:
        async with calls(port) as caller:
            caller.writer.write(b"\x0bone\x1c\r")
            await caller.writer.drain()
        gate.set()
        async with asyncio.timeout(10):
            await dealt_with.wait()


async def test_a_frame_that_does_not_end_has_a_deadline(log_watch: LogWatch) -> None:
    """Also one that drips."""
    async with listening(frame_seconds=0.1) as port, calls(port) as caller:
        caller.writer.write(b"\x0bone")
        assert await caller.ended()
    assert '"reason":"timeout"' in log_watch.text


async def test_a_caller_that_says_nothing_is_dropped_after_a_while(log_watch: LogWatch) -> None:
    """Between messages as well as before the first; that is no fault, and not logged as one."""
    async with listening(idle_seconds=0.05) as port:
        async with calls(port) as caller:
            assert await caller.ended()
        async with calls(port) as caller:
            caller.writer.write(b"\x0bone\x1c\r\r\n")
            assert await caller.answer() == b"ack one"
            assert await caller.ended()
    assert "mllp_connection_closed" not in log_watch.text


async def test_a_message_that_is_not_dealt_with_has_a_deadline() -> None:
    """The sender is not left without an end."""

    async def never(content: bytes) -> bytes:
        await asyncio.Event().wait()
        return content

    async with listening(never, answer_seconds=0.05) as port, calls(port) as caller:
        caller.writer.write(b"\x0bone\x1c\r")
        assert await caller.ended()


async def test_an_answer_that_nobody_takes_has_a_deadline(log_watch: LogWatch) -> None:
    """A caller that does not read is dropped."""

    async def long(content: bytes) -> bytes:
        return b"A" * 20_000_000

    async with listening(long, answer_seconds=0.2) as port, calls(port) as caller:
        caller.writer.write(b"\x0bone\x1c\r")
        async with asyncio.timeout(10):
            # A log line wakes nobody.
            while '"reason":"timeout"' not in log_watch.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_trouble_with_one_message_stays_with_its_connection(log_watch: LogWatch) -> None:
    """Other callers are served."""

    async def crashes(content: bytes) -> bytes:
        if content == b"bad":
            raise LookupError
        return content

    async with listening(crashes) as port, calls(port) as bad, calls(port) as good:
        bad.writer.write(b"\x0bbad\x1c\r")
        assert await bad.ended()
        good.writer.write(b"\x0bgood\x1c\r")
        assert await good.answer() == b"good"
    assert "mllp_connection_crashed" in log_watch.text


async def test_connections_are_bounded() -> None:
    """One too many is dropped, and there is room again when one ends."""
    two = listening(max_connections=2)
    async with two as port, calls(port) as first, calls(port) as second:
        for caller in (first, second):
            caller.writer.write(b"\x0bone\x1c\r")
            assert await caller.answer() == b"ack one"
        async with calls(port) as third:
            assert await third.ended()
        first.writer.write_eof()
        assert await first.ended()
        async with calls(port) as fourth:
            fourth.writer.write(b"\x0bfour\x1c\r")
            assert await fourth.answer() == b"ack four"


@pytest.mark.parametrize(("network", "served"), [("127.0.0.0/8", True), ("10.0.0.0/8", False)])
async def test_only_allowed_addresses_are_served(network: str, served: bool) -> None:
    """Who calls from elsewhere is dropped before a byte is read."""
    async with listening(allow_from=(ip_network(network),)) as port, calls(port) as caller:
        caller.writer.write(b"\x0bone\x1c\r")
        if served:
            assert await caller.answer() == b"ack one"
        else:
            assert await caller.ended()


async def test_who_is_turned_away_is_counted(log_watch: LogWatch) -> None:
    """One from elsewhere is told apart from one too many, also while there is no room."""
    listener = MllpListener(echo, allow_from=(ip_network("10.0.0.0/8"),), max_connections=0)
    port = await listener.start("127.0.0.1", 0)
    async with calls(port) as caller:
        assert await caller.ended()
    assert (listener.refused, listener.connections) == (1, 0)
    (line,) = log_watch.named("mllp_connection_refused")
    assert line["reason"] == "address"
    await listener.close()


async def test_closing_ends_every_connection() -> None:
    """Nobody is left hanging on a listener that is gone."""
    listener = MllpListener(echo)
    port = await listener.start("127.0.0.1", 0)
    async with calls(port) as caller:
        caller.writer.write(b"\x0bone\x1c\r")
        assert await caller.answer() == b"ack one"
        await listener.close()
        assert await caller.ended()
    with pytest.raises(OSError):
        await Caller.to(port)


async def test_closing_ends_a_connection_that_was_only_just_accepted() -> None:
    """One whose task never took a step is not left open."""
    near, far = socket.socketpair()
    with far:
        listener = MllpListener(echo)
        listener._spawn(near, "127.0.0.1")
        await listener.close()
        await asyncio.sleep(0)
        assert near.fileno() == -1


class TestTls:
    """The same over TLS."""

    async def test_messages_are_answered(self, tmp_path: Path) -> None:
        """Whatever arrives together with the end of the handshake is not lost."""
        async with listening(tls=serving(tmp_path)) as port:
            for _ in range(5):
                async with calls(port, calling(tmp_path)) as caller:
                    caller.writer.write(b"\x0bone\x1c\r\x0btwo\x1c\r")
                    assert await caller.answer() == b"ack one"
                    assert await caller.answer() == b"ack two"

    async def test_a_large_message_comes_whole(self, tmp_path: Path) -> None:
        """Reading pauses and goes on under TLS as it does without."""
        content = b"A" * 900_000
        ours = listening(tls=serving(tmp_path))
        async with ours as port, calls(port, calling(tmp_path)) as caller:
            caller.writer.write(b"\x0b" + content + b"\x1c\r")
            assert await caller.answer() == b"ack " + content

    async def test_plain_text_is_refused(self, tmp_path: Path, log_watch: LogWatch) -> None:
        """It is not read as a message."""

        async def none(content: bytes) -> bytes:
            raise AssertionError("read in the clear")

        async with listening(none, tls=serving(tmp_path)) as port, calls(port) as caller:
            caller.writer.write(b"\x0bone\x1c\r")
            # TLS may still say its own "no" before it hangs up.
            async with asyncio.timeout(10):
                try:
                    await caller.reader.read()
                except OSError:
                    pass
        assert "mllp_connection_crashed" not in log_watch.text
        assert "mllp_connection_closed" in log_watch.text

    async def test_a_handshake_that_does_not_go_on_has_a_deadline(
        self, tmp_path: Path, log_watch: LogWatch
    ) -> None:
        """A caller that connects and says nothing does not hold a place."""
        ours = listening(tls=serving(tmp_path), handshake_seconds=0.1)
        async with ours as port, calls(port) as caller:
            assert await caller.ended()
        assert '"reason":"timeout"' in log_watch.text

    async def test_callers_show_the_certificate_that_is_asked_for(self, tmp_path: Path) -> None:
        """With a CA configured, one without a certificate, or a stranger's, is not served."""
        ours = authority()
        server = server_context(
            TlsSettings(
                ca_file=ours.ca_file(tmp_path), certificate_file=ours.certificate_file(tmp_path)
            )
        )
        known, unknown = tmp_path / "known", tmp_path / "unknown"
        for directory in (known, unknown):
            directory.mkdir()

        def client(certificate: Path | None) -> MllpClient:
            context = client_context(
                TlsSettings(ca_file=ours.ca_file(tmp_path), certificate_file=certificate)
            )
            return MllpClient("127.0.0.1", port, tls=context)

        async with listening(tls=server) as port:
            good = client(ours.certificate_file(known, "caller.example"))
            assert await good.exchange(b"one", bytes) == b"ack one"
            await good.close()
            for certificate in (None, stranger().certificate_file(unknown, "caller.example")):
                bad = client(certificate)
                with pytest.raises(MllpError) as caught:
                    await bad.exchange(b"one", bytes)
                assert caught.value.fault in (Fault.CLOSED, Fault.TLS, Fault.UNREACHABLE)
                await bad.close()


async def test_a_message_goes_all_the_way(tmp_path: Path) -> None:
    """From a client over TLS to the listener, the disk and a subscriber, and the answer back."""
    handled: list[str] = []

    class Subscriber:
        def check(self, message: Message) -> None:
            pass

        async def handle(self, message: Message) -> None:
            handled.append(message.control_id)

    inbox = Inbox(Journal(tmp_path / "journal"))
    inbox.subscribe("ADT", "A31", Subscriber())
    await inbox.start()
    async with listening(inbox.receive, tls=serving(tmp_path)) as port:
        client = MllpClient("127.0.0.1", port, tls=calling(tmp_path))
        for number in range(3):
            question = f"MSH|^~\\&|R|H|U|H|2024||ADT^A31|M{number}|P|2.5\rPID|1||X\r".encode()
            answer = await client.exchange(question, bytes)
            assert f"MSA|AA|M{number}\r".encode() in answer
        await inbox.wait_idle()
        assert handled == ["M0", "M1", "M2"]
        await client.close()
    await inbox.close()
