"""Who tells of merged records: a sender of ADT over MLLP, in its own words.

It shares no code with the program: messages are written and answers read by their bytes.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

Identifier = tuple[str, str, str]
"""ID, namespace, OID."""

_SECONDS: Final = 60.0


def cx(one: Identifier | str) -> str:
    """Return an ID as it stands in PID-3 and MRG-1; a text alone has no domain."""
    return one if isinstance(one, str) else f"{one[0]}^^^{one[1]}&{one[2]}&ISO^PI"


def a40(surviving: Identifier | str, prior: Identifier | str, control_id: str = "1") -> bytes:
    """Return a merge (ITI-8)."""
    return _written(
        f"MSH|^~\\&|HIS|HOSPITAL|||20240506070809||ADT^A40^ADT_A39|{control_id}|P|2.3.1",
        "EVN||20240506070809",
        f"PID|||{cx(surviving)}||^^^^^^S",
        f"MRG|{cx(prior)}",
    )


def a31(*now: Identifier | str, control_id: str = "1") -> bytes:
    """Return an update notification (ITI-10): every ID that a person has now."""
    return _written(
        f"MSH|^~\\&|MPI|REGION|||20240506070809||ADT^A31^ADT_A05|{control_id}|P|2.5",
        "EVN||20240506070809",
        f"PID|||{'~'.join(map(cx, now))}||^^^^^^S",
        "PV1||N",
    )


def _written(*lines: str) -> bytes:
    return "".join(f"{line}\r" for line in lines).encode()


async def tell(port: int, message: bytes, tls: ssl.SSLContext | None = None) -> str:
    """Send one message; return what comes back, empty where the connection is closed instead."""
    async with asyncio.timeout(_SECONDS):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        except ConnectionError:
            return ""
        try:
            writer.write(b"\x0b" + message + b"\x1c\r")
            framed = await reader.readuntil(b"\x1c\r")
        except (asyncio.IncompleteReadError, ConnectionError):
            return ""
        finally:
            writer.transport.abort()
    assert framed.startswith(b"\x0b")
    return framed[1:-2].decode()


def acknowledged(answer: str) -> tuple[str, str]:
    """Return MSA-1 and MSA-2 of an answer."""
    (line,) = (line for line in answer.split("\r") if line.startswith("MSA|"))
    fields = line.split("|")
    return fields[1], fields[2]
