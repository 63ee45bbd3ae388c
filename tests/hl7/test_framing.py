"""MLLP frames, whole and in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.hl7.errors import FrameError
from dicomproxy.hl7.framing import FrameReader, frame

CONTENT = st.binary(max_size=40).map(lambda data: data.replace(b"\x0b", b"").replace(b"\x1c", b""))


def read(data: bytes, cuts: list[int], limit: int = 100) -> list[bytes]:
    """Feed *data* cut at *cuts*; return what came out."""
    reader, found = FrameReader(limit), []
    for start, end in pairwise([0, *cuts, len(data)]):
        reader.feed(data[start:end])
        while (content := reader.next()) is not None:
            found.append(content)
    assert not reader.pending
    return found


@given(st.lists(CONTENT, max_size=4), st.data())
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    contents: list[bytes], data: st.DataObject
) -> None:
    """Where one read of a socket ends does not matter."""
    stream = b"".join(map(frame, contents))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    assert read(stream, cuts) == contents
    assert read(stream, list(range(1, len(stream)))) == contents


def test_what_careless_senders_put_between_frames_is_skipped() -> None:
    """Line ends, blanks and zeros around a frame are nobody's message."""
    assert read(b"\r\n" + frame(b"A") + b"\n\x00 " + frame(b"B") + b"\r\n", [1]) == [b"A", b"B"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"MSH|", "no_frame"),
        (b"GET / HTTP/1.1\r\n", "no_frame"),
        (b"\x16\x03\x01", "no_frame"),
        (b"\x0bA\x1cB", "frame_not_ended"),
        (b"\x0bA\x0bB", "frame_in_frame"),
        (b"\x0bA\x0bB\x1c\r", "frame_in_frame"),
        (b"\x0b" + b"A" * 101, "frame_too_long"),
        (b"\x0b" + b"A" * 101 + b"\x1c\r", "frame_too_long"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, reason: str) -> None:
    """Garbage, another protocol, a frame begun twice and one that is too long are told apart."""
    for cuts in ([], list(range(1, len(data)))):
        with pytest.raises(FrameError, match=reason):
            read(data, cuts)


def test_a_message_of_just_the_limit_is_read() -> None:
    """The limit counts the message, not its frame."""
    assert read(frame(b"A" * 100), [50]) == [b"A" * 100]


def test_no_more_than_the_limit_is_collected() -> None:
    """An endless frame is refused as soon as it is one, not when memory ends."""
    reader = FrameReader(1000)
    reader.feed(b"\x0b")
    with pytest.raises(FrameError, match="frame_too_long"):
        for _ in range(1001):
            assert reader.next() is None
            reader.feed(b"A")
        reader.next()


@pytest.mark.parametrize("byte", [b"\x0b", b"\x1c"])
def test_a_message_that_would_end_its_frame_is_not_sent(byte: bytes) -> None:
    """Nobody could read it as one."""
    with pytest.raises(FrameError, match="control_byte_in_message"):
        frame(b"A" + byte)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_messages_or_refused(data: bytes, step: int) -> None:
    """Within the limit, and without a byte of the frame."""
    reader = FrameReader(20)
    try:
        for start in range(0, len(data), step):
            reader.feed(data[start : start + step])
            while (content := reader.next()) is not None:
                assert len(content) <= 20
                assert not {0x0B, 0x1C} & set(content)
    except FrameError:
        pass
