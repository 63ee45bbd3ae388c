"""MLLP frames: a vertical tab, the message, file separator and carriage return. Pure.

Bytes in, whole messages out. What is no frame is refused at once, and what could
become one that is too long as soon as it is: nothing is collected beyond the limit.
"""

from __future__ import annotations

from typing import Final

from dicomproxy.hl7.errors import FrameError

START: Final = b"\x0b"
END: Final = b"\x1c\x0d"

_BETWEEN: Final = b"\r\n\x00 "
"""What careless senders put between two frames."""


def frame(message: bytes) -> bytes:
    """Return *message* as one frame.

    Raises:
        FrameError: it holds a byte that ends or begins a frame.
    """
    if b"\x0b" in message or b"\x1c" in message:
        raise FrameError("control_byte_in_message")
    return START + message + END


class FrameReader:
    """Takes bytes as they come and gives messages.

    Args:
        limit: bytes that a message may have.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0

    def __repr__(self) -> str:
        return f"<FrameReader, {len(self._buffer)} bytes>"

    @property
    def pending(self) -> bool:
        """Whether anything is held that was not given out."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes; at most as many as one read of a socket brings."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the next whole message, None if there is none yet.

        Raises:
            FrameError: what came is no frame, or a longer one than the limit.
                Nothing can be read any more.
        """
        if not self._scanned and not self._begun():
            return None
        end = self._buffer.find(b"\x1c", self._scanned)
        length = (end if end >= 0 else len(self._buffer)) - 1
        if length > self._limit:
            raise FrameError("frame_too_long")
        # A sender that broke off and begins anew: which part is meant cannot be known.
        if self._buffer.find(START, self._scanned, end if end >= 0 else None) >= 0:
            raise FrameError("frame_in_frame")
        if end < 0:
            self._scanned = len(self._buffer)
            return None
        if end + 1 == len(self._buffer):
            self._scanned = end
            return None
        if self._buffer[end + 1] != END[1]:
            raise FrameError("frame_not_ended")
        content = bytes(self._buffer[1:end])
        del self._buffer[: end + 2]
        self._scanned = 0
        return content

    def _begun(self) -> bool:
        """Drop what lies between frames; tell whether one begins."""
        kept = self._buffer.lstrip(_BETWEEN)
        if len(kept) != len(self._buffer):
            self._buffer = kept
        if not self._buffer:
            return False
        if self._buffer[0] != START[0]:
            raise FrameError("no_frame")
        self._scanned = 1
        return True
