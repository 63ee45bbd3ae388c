"""Asking over MLLP, against a server that answers in every way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dicomproxy.hl7.client import MllpClient
from dicomproxy.hl7.errors import Fault, MllpError
from tests.peers.mllp_server import Caller, mllp_server
from tests.peers.ports import free_port
from tests.support.certificates import calling, serving, stranger

QUESTION = b"MSH|question\r"
ANSWER = b"MSH|answer\r"


def whole(content: bytes) -> bytes:
    return content


async def answers(caller: Caller, content: bytes) -> None:
    await caller.send(content.replace(b"question", b"answer"))


async def silence(caller: Caller, content: bytes) -> None:
    """Go on reading, and say nothing."""


async def fault_of(client: MllpClient, message: bytes = QUESTION) -> tuple[Fault, str]:
    with pytest.raises(MllpError) as caught:
        await client.exchange(message, whole)
    return caught.value.fault, caught.value.reason


async def test_a_question_is_answered() -> None:
    """What comes back is the content of the frame."""
    async with mllp_server(answers) as server:
        client = MllpClient("127.0.0.1", server.port)
        assert await client.exchange(QUESTION, whole) == ANSWER
        assert server.received == [QUESTION]
        await client.close()


async def test_one_connection_serves_one_question_after_the_other() -> None:
    """A connection that ended its exchange properly is used again."""
    async with mllp_server(answers) as server:
        client = MllpClient("127.0.0.1", server.port)
        for _ in range(5):
            await client.exchange(QUESTION, whole)
        assert server.connections == 1
        await client.close()
        await server.until(lambda: server.open == 0)


async def test_questions_at_the_same_time_share_no_connection() -> None:
    """Each answer comes on the connection of its question, of which there are only so many."""
    gate = asyncio.Event()

    async def at_the_gate(caller: Caller, content: bytes) -> None:
        await gate.wait()
        await caller.send(content)

    async with mllp_server(at_the_gate) as server:
        client = MllpClient("127.0.0.1", server.port, max_connections=2)
        questions = [b"MSH|%d\r" % number for number in range(6)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.exchange(one, whole)) for one in questions]
            await server.until(lambda: len(server.received) == 2)
            assert server.connections == 2
            gate.set()
        assert [task.result() for task in tasks] == questions
        assert server.connections == 2
        await client.close()


async def test_a_connection_that_was_closed_while_it_rested_is_replaced() -> None:
    """The question is asked again on a new one, and the caller never knows."""
    async with mllp_server(answers) as server:
        client = MllpClient("127.0.0.1", server.port)
        await client.exchange(QUESTION, whole)

        async def closes_once(caller: Caller, content: bytes) -> None:
            server.behave = answers
            caller.reset()

        server.behave = closes_once
        assert await client.exchange(QUESTION, whole) == ANSWER
        assert server.connections == 2
        assert len(server.received) == 3
        await client.close()


async def test_a_server_that_always_closes_is_asked_twice() -> None:
    """One more attempt, not more."""

    async def closes(caller: Caller, content: bytes) -> None:
        caller.close()

    async with mllp_server(closes) as server:
        client = MllpClient("127.0.0.1", server.port)
        assert await fault_of(client) == (Fault.CLOSED, "")
        assert server.connections == 2
        await client.close()


async def test_an_answer_broken_off_is_none() -> None:
    """Half a message is not taken for a message."""

    async def half(caller: Caller, content: bytes) -> None:
        await caller.send_raw(b"\x0bMSH|ans")
        caller.close()

    async with mllp_server(half) as server:
        client = MllpClient("127.0.0.1", server.port)
        assert await fault_of(client) == (Fault.CLOSED, "mid_message")
        await client.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no_frame"),
        (b"\x0bMSH|\x1c|", "frame_not_ended"),
        (b"\x0b" + b"A" * 2000, "frame_too_long"),
    ],
)
async def test_garbage_is_told_apart(data: bytes, reason: str) -> None:
    """What is no frame, or too long a one, ends the exchange at once and is not retried."""

    async def garbage(caller: Caller, content: bytes) -> None:
        await caller.send_raw(data)

    async with mllp_server(garbage) as server:
        client = MllpClient("127.0.0.1", server.port, max_answer_bytes=1000)
        assert await fault_of(client) == (Fault.PROTOCOL, reason)
        assert server.connections == 1
        await server.until(lambda: server.open == 0)
        await client.close()


async def test_silence_ends_at_the_deadline() -> None:
    """Nobody waits longer, and the connection is not used again."""
    async with mllp_server(silence) as server:
        client = MllpClient("127.0.0.1", server.port, deadline_seconds=0.3)
        assert await fault_of(client) == (Fault.TIMEOUT, "")
        server.behave = answers
        await server.until(lambda: server.open == 0)
        client = MllpClient("127.0.0.1", server.port)
        assert await client.exchange(QUESTION, whole) == ANSWER
        assert server.connections == 2
        await client.close()


async def test_an_answer_that_comes_late_is_not_that_to_the_next_question() -> None:
    """A connection on which a question was given up carries no other."""
    late: list[Caller] = []

    async def keeps(caller: Caller, content: bytes) -> None:
        late.append(caller)

    async with mllp_server(keeps) as server:
        client = MllpClient("127.0.0.1", server.port)
        task = asyncio.get_running_loop().create_task(client.exchange(b"MSH|first\r", whole))
        await server.until(lambda: len(server.received) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async def both(caller: Caller, content: bytes) -> None:
            try:
                await late[0].send(b"MSH|late\r")
            except (OSError, RuntimeError):
                pass  # it is gone, as it should be
            await caller.send(content)

        server.behave = both
        assert await client.exchange(b"MSH|second\r", whole) == b"MSH|second\r"
        assert server.connections == 2
        await client.close()


async def test_a_word_that_nobody_asked_for_closes_the_connection() -> None:
    """Neither a second answer nor one before the question is ever taken."""

    async def twice(caller: Caller, content: bytes) -> None:
        await caller.send_raw(b"\x0bone\x1c\r\x0btwo\x1c\r")

    async with mllp_server(twice) as server:
        client = MllpClient("127.0.0.1", server.port)
        assert await client.exchange(QUESTION, whole) == b"one"
        await server.until(lambda: server.open == 0)
        server.behave = answers
        assert await client.exchange(QUESTION, whole) == ANSWER
        await server.callers[2].send(b"unasked")
        await server.until(lambda: server.open == 0)
        assert await client.exchange(QUESTION, whole) == ANSWER
        assert server.connections == 3
        await client.close()


async def test_an_answer_that_its_reader_refuses_costs_the_connection() -> None:
    """Who finds it to be another's answer gets a new connection for the next question."""

    def refuses(content: bytes) -> bytes:
        raise LookupError

    async with mllp_server(answers) as server:
        client = MllpClient("127.0.0.1", server.port)
        with pytest.raises(LookupError):
            await client.exchange(QUESTION, refuses)
        await server.until(lambda: server.open == 0)
        await client.exchange(QUESTION, whole)
        assert server.connections == 2
        await client.close()


async def test_nobody_there_is_unreachable() -> None:
    """A refused connection is told from one that breaks."""
    client = MllpClient("127.0.0.1", free_port())
    assert await fault_of(client) == (Fault.UNREACHABLE, "")
    await client.close()


async def test_those_who_wait_are_bounded_and_have_a_deadline() -> None:
    """With every connection taken callers wait, but not for ever and not without number."""
    async with mllp_server(silence) as server:
        client = MllpClient(
            "127.0.0.1", server.port, max_connections=1, max_waiting=1, deadline_seconds=1
        )
        loop = asyncio.get_running_loop()
        first = loop.create_task(fault_of(client))
        await server.until(lambda: len(server.received) == 1)
        second = loop.create_task(fault_of(client))
        await asyncio.sleep(0)
        assert await fault_of(client) == (Fault.BUSY, "")
        assert await first == await second == (Fault.TIMEOUT, "")
        await client.close()


async def test_a_connection_nobody_needs_is_given_up() -> None:
    """It rests for a while, then it is closed."""
    async with mllp_server(answers) as server:
        client = MllpClient("127.0.0.1", server.port, idle_seconds=0.02)
        await client.exchange(QUESTION, whole)
        await server.until(lambda: server.open == 0)
        assert "0 connections" in repr(client)
        await client.close()


async def test_closing_ends_what_is_under_way() -> None:
    """Nobody hangs on a client that is closed, and nobody can use it any more."""
    async with mllp_server(silence) as server:
        client = MllpClient("127.0.0.1", server.port)
        task = asyncio.get_running_loop().create_task(fault_of(client))
        await server.until(lambda: len(server.received) == 1)
        await client.close()
        assert (await task)[0] is Fault.CLOSED
        assert await fault_of(client) == (Fault.CLOSED, "client_closed")
        assert server.connections == 1


async def test_a_message_that_no_frame_can_hold_is_not_sent() -> None:
    """It would be read as two."""
    client = MllpClient("127.0.0.1", free_port())
    assert await fault_of(client, b"A\x1cB") == (Fault.PROTOCOL, "control_byte_in_message")


class TestTls:
    """The same over TLS."""

    async def test_a_question_is_answered(self, tmp_path: Path) -> None:
        """With a certificate that is trusted and names the host called."""
        async with mllp_server(answers, tls=serving(tmp_path)) as server:
            client = MllpClient("127.0.0.1", server.port, tls=calling(tmp_path))
            assert await client.exchange(QUESTION, whole) == ANSWER
            assert await client.exchange(QUESTION, whole) == ANSWER
            assert server.connections == 1
            await client.close()

    async def test_a_stranger_is_told_nothing(self, tmp_path: Path) -> None:
        """A certificate that nobody trusts ends it before a byte of the question is sent."""
        async with mllp_server(answers, tls=serving(tmp_path, by=stranger())) as server:
            client = MllpClient("127.0.0.1", server.port, tls=calling(tmp_path))
            assert await fault_of(client) == (Fault.TLS, "certificate")
            assert server.received == []
            await client.close()

    async def test_a_certificate_for_another_host_is_refused(self, tmp_path: Path) -> None:
        """Unless that is the name it is expected to bear."""
        async with mllp_server(answers, tls=serving(tmp_path, name="pix.example")) as server:
            context = calling(tmp_path)
            client = MllpClient("127.0.0.1", server.port, tls=context)
            assert await fault_of(client) == (Fault.TLS, "certificate")
            named = MllpClient("127.0.0.1", server.port, tls=context, server_name="pix.example")
            assert await named.exchange(QUESTION, whole) == ANSWER
            await client.close()
            await named.close()

    async def test_a_server_without_tls_is_refused(self, tmp_path: Path) -> None:
        """Plain text is never a fallback."""

        async def plain(caller: Caller, content: bytes) -> None:
            await caller.send(ANSWER)

        async with mllp_server(plain) as server:

            async def hello(caller: Caller, content: bytes) -> None:
                raise AssertionError("the question went out in the clear")

            server.behave = hello
            client = MllpClient(
                "127.0.0.1", server.port, tls=calling(tmp_path), connect_seconds=0.2
            )
            fault, _ = await fault_of(client)
            assert fault in (Fault.TLS, Fault.UNREACHABLE)
            assert server.received == []
            await client.close()
