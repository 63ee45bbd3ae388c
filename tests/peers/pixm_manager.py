"""A PIXm manager that speaks ITI-83 over HTTP, in every way it may answer.

Written with a bare socket server rather than an HTTP library, so that it can also
answer what no library would. Persons are sets of (system, ID).
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Identifier = tuple[str, str]


@dataclass
class Question:
    """One request."""

    method: str
    path: str
    parameters: list[tuple[str, str]]
    headers: dict[str, str]

    def __getitem__(self, name: str) -> str:
        values = [value for key, value in self.parameters if key == name]
        assert len(values) == 1
        return values[0]


def response(status: int, body: bytes | dict[str, Any] | list[Any] = b"", *headers: str) -> bytes:
    """Return an HTTP response; a JSON body where one is given as such."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} Whatever",
        "Content-Type: application/fhir+json",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


def parameters(*found: Identifier) -> dict[str, Any]:
    """Return a Parameters resource with identifiers and one reference."""
    return {
        "resourceType": "Parameters",
        "parameter": [
            *(
                {
                    "name": "targetIdentifier",
                    "valueIdentifier": {"use": "official", "system": system, "value": value},
                }
                for system, value in found
            ),
            {"name": "targetId", "valueReference": {"reference": "Patient/7"}},
        ],
    }


def outcome(code: str, text: str, *, where: str = "diagnostics") -> dict[str, Any]:
    """Return an OperationOutcome with one issue."""
    told = {"details": {"text": text}} if where == "details" else {"diagnostics": text}
    return {
        "resourceType": "OperationOutcome",
        "issue": [{"severity": "error", "code": code, **told}],
    }


UNKNOWN_ID = outcome("not-found", "sourceIdentifier Patient Identifier not found")
UNKNOWN_SOURCE = outcome("code-invalid", "sourceIdentifier Assigning Authority not found")
UNKNOWN_TARGET = outcome("code-invalid", "targetSystem not found")


class PixmManager:
    """The persons it knows; ``behave`` overrides what it would answer."""

    def __init__(self, persons: list[list[Identifier]]) -> None:
        self.persons = persons
        self.questions: list[Question] = []
        self.connections = 0
        self.port = 0
        self.behave: Callable[[Question, asyncio.StreamWriter], Awaitable[None]] | None = None

    def honest(self, question: Question) -> bytes:
        """Answer as ITI-83 says (2:3.83.4.2.2)."""
        assert (question.method, question.path) == ("GET", "/fhir/Patient/$ihe-pix")
        system, _, value = question["sourceIdentifier"].partition("|")
        value = value.replace("\\|", "|").replace("\\,", ",").replace("\\$", "$")
        value = value.replace("\\\\", "\\")
        systems = {one[0] for person in self.persons for one in person}
        if system not in systems:
            return response(400, UNKNOWN_SOURCE)
        if question["targetSystem"] not in systems:
            return response(403, UNKNOWN_TARGET)
        for person in self.persons:
            if (system, value) in person:
                found = [one for one in person if one[0] == question["targetSystem"]]
                return response(200, parameters(*found))
        return response(404, UNKNOWN_ID)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
                first, *lines = head[:-4].split("\r\n")
                method, target, _ = first.split(" ")
                pairs = (line.partition(": ") for line in lines)
                question = Question(
                    method,
                    urlsplit(target).path,
                    parse_qsl(urlsplit(target).query, strict_parsing=True),
                    {name.lower(): value for name, _, value in pairs},
                )
                self.questions.append(question)
                if self.behave is not None:
                    await self.behave(question, writer)
                else:
                    writer.write(self.honest(question))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()


@asynccontextmanager
async def pixm_manager(
    *persons: list[Identifier], tls: ssl.SSLContext | None = None
) -> AsyncIterator[PixmManager]:
    """Run a manager that knows *persons* on a free port of the loopback."""
    manager = PixmManager(list(persons))
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(manager._serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    manager.port = server.sockets[0].getsockname()[1]
    try:
        yield manager
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
