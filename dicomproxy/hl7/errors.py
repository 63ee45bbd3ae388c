"""What can go wrong with HL7, in words that may be logged.

House rule: no exception of this room carries a byte of a message, nor the text of
a parser's or a peer's complaint.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Which way an exchange over MLLP failed; branched on, logged, counted."""

    UNREACHABLE = "unreachable"  # no TCP connection
    TLS = "tls"  # the handshake failed: certificate, version, no TLS there at all
    CLOSED = "closed"  # the connection ended before the answer did
    TIMEOUT = "timeout"  # the deadline passed
    PROTOCOL = "protocol"  # what came was no frame, or not within the limit
    BUSY = "busy"  # too many wait for a connection already


class MllpError(Exception):
    """An exchange over MLLP came to nothing.

    Args:
        fault: which way.
        reason: a constant word more, such as ``frame_too_long``.
    """

    def __init__(self, fault: Fault, reason: str = "") -> None:
        self.fault = fault
        self.reason = reason
        super().__init__(f"{fault} {reason}".strip())


class FrameError(Exception):
    """Bytes that are no MLLP; ``reason`` is a constant word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class MalformedMessage(Exception):
    """A frame's content is not an HL7 message that can be read; ``reason`` is a constant word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class UnknownCharacterSet(MalformedMessage):
    """MSH-18 names a set that is not known, in a message that needs one."""

    def __init__(self) -> None:
        super().__init__("unknown_character_set")


class Refusal(Exception):
    """A received message is not taken: whoever checks it raises this.

    Args:
        code: of HL7 table 0357, such as 101 for a required field that is missing.
        location: where, as an ERL: ``MRG^1^1``. Positions only, no value.
        permanent: answered AR, the sender need not try again; else AE.
    """

    def __init__(self, code: int, location: str = "", *, permanent: bool = False) -> None:
        self.code = code
        self.location = location
        self.permanent = permanent
        super().__init__(f"{code} {location}".strip())
