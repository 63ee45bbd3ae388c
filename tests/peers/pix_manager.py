"""A PIX manager that speaks ITI-9, in every way it may answer.

It reads the question and writes the answer byte by byte, with no code of the
program. Persons are sets of (ID, namespace, OID); domains not named by any are
unknown, as the transaction has it.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.peers.mllp_server import Caller, MllpServer, mllp_server

Identifier = tuple[str, str, str]
"""ID, namespace, OID."""


@dataclass
class Question:
    """What came, still as written."""

    text: str
    control_id: str
    tag: str
    identifier: list[str]
    """CX components of QPD-3."""
    wanted: list[str]
    """CX components of QPD-4."""


def read_question(content: bytes) -> Question:
    """Take a QBP^Q23 apart, failing on whatever is not as the transaction has it."""
    charset = content.split(b"\r")[0].split(b"|")
    codec = {"": "ascii", "8859/1": "latin-1", "UNICODE UTF-8": "utf-8"}
    text = content.decode(codec[charset[17].decode() if len(charset) > 17 else ""])
    assert text.endswith("\r")
    header, query, control = (line.split("|") for line in text[:-1].split("\r"))
    assert header[0] == "MSH"
    assert header[1] == "^~\\&"
    assert header[8] == "QBP^Q23^QBP_Q21"
    assert header[10:12] == ["P", "2.5"]
    assert query[:2] == ["QPD", "IHE PIX Query"]
    assert control == ["RCP", "I"]
    assert 0 < len(header[9]) <= 20
    assert 0 < len(query[2]) <= 32
    return Question(text, header[9], query[2], query[3].split("^"), query[4].split("^"))


@dataclass
class Reply:
    """A response and what is wrong with it; None leaves a segment out."""

    acknowledgement: str = "AA"
    status: str | None = "OK"
    identifiers: list[str] | None = None
    """PID-3's repetitions, as written."""
    errors: list[str] = field(default_factory=list)
    """ERR segments, as written."""
    control_id: str | None = None
    tag: str | None = None
    message_type: str = "RSP^K23^RSP_K23"
    charset: str = ""
    codec: str = "utf-8"
    query: str | None = None
    """The QPD segment as repeated, as written; empty leaves it out, None repeats what came."""

    def written(self, question: Question) -> bytes:
        control_id = question.control_id if self.control_id is None else self.control_id
        tag = question.tag if self.tag is None else self.tag
        lines = [
            f"MSH|^~\\&|PIX|REGION|DICOMPROXY||20240506070809||{self.message_type}|P1|P|2.5"
            f"||||||{self.charset}",
            f"MSA|{self.acknowledgement}|{control_id}",
            *self.errors,
        ]
        if self.status is not None:
            lines.append(f"QAK|{tag}|{self.status}")
        asked = next(line for line in question.text.split("\r") if line.startswith("QPD"))
        lines += [query] if (query := asked if self.query is None else self.query) else []
        if self.identifiers is not None:
            lines.append(f"PID|||{'~'.join(self.identifiers)}||^^^^^^S")
        return "".join(f"{line}\r" for line in lines).encode(self.codec)


Decide = Callable[[Question], Reply]


class PixManager:
    """The persons it knows; ``decide`` overrides what it would answer, ``behave`` how."""

    def __init__(self, persons: list[list[Identifier]]) -> None:
        self.persons = persons
        self.questions: list[Question] = []
        self.decide: Decide = self.honest
        self.behave: Callable[[Caller, bytes], Awaitable[None]] | None = None
        self.server: MllpServer | None = None

    @property
    def port(self) -> int:
        assert self.server is not None
        return self.server.port

    def honest(self, question: Question) -> Reply:
        """Answer as ITI-9 says (3.9.4.2.2.6)."""
        value, (namespace, oid) = question.identifier[0], _authority(question.identifier)
        known = {one[1:] for person in self.persons for one in person}
        if not any(_same(one, (namespace, oid)) for one in known):
            return Reply("AE", "AE", errors=["ERR||QPD^1^3^1^4|204^Unknown Key Identifier|E"])
        wanted = _authority(question.wanted)
        if not any(_same(one, wanted) for one in known):
            return Reply("AE", "AE", errors=["ERR||QPD^1^4^1|204^Unknown Key Identifier|E"])
        for person in self.persons:
            if any(one[0] == value and _same(one[1:], (namespace, oid)) for one in person):
                found = [one for one in person if _same(one[1:], wanted)]
                if not found:
                    return Reply(status="NF")
                return Reply(identifiers=[f"{one[0]}^^^{one[1]}&{one[2]}&ISO" for one in found])
        return Reply("AE", "AE", errors=["ERR||QPD^1^3^1^1|204^Unknown Key Identifier|E"])

    async def answer(self, caller: Caller, content: bytes) -> None:
        question = read_question(content)
        self.questions.append(question)
        if self.behave is not None:
            await self.behave(caller, content)
        else:
            await caller.send(self.decide(question).written(question))


def _authority(components: list[str]) -> tuple[str, str]:
    pieces = [*components[3].split("&"), "", ""]
    assert pieces[2] in ("", "ISO")
    return pieces[0], pieces[1]


def _same(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    if one[1] and other[1]:
        return one[1] == other[1]
    return bool(one[0]) and one[0] == other[0]


@asynccontextmanager
async def pix_manager(
    *persons: list[Identifier], tls: ssl.SSLContext | None = None
) -> AsyncIterator[PixManager]:
    """Run a manager that knows *persons* on a free port of the loopback."""
    manager = PixManager(list(persons))
    async with mllp_server(manager.answer, tls=tls) as server:
        manager.server = server
        yield manager
