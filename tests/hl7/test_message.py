"""Reading HL7 v2 messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.hl7.errors import MalformedMessage, UnknownCharacterSet
from dicomproxy.hl7.message import Place, parse, parse_header
from dicomproxy.hl7.writing import segment
from tests.sentinel import PATIENT_ID, PATIENT_NAME, sentinels_in

HEADER = "MSH|^~\\&|REG^1.2^ISO|H|C|D|2024||ADT^A40^ADT_A39|M1|P|2.3.1\r"


def message(*segments: str) -> bytes:
    return (HEADER + "".join(f"{line}\r" for line in segments)).encode()


def test_the_header_tells_type_version_and_control_id() -> None:
    """What is needed to answer a message stands in its header."""
    read = parse(message("PID|1"))
    assert (read.code, read.trigger, read.version, read.control_id) == ("ADT", "A40", "2.3.1", "M1")
    assert read.get("MSH", 3, 2) == "1.2"


def test_values_are_found_by_position() -> None:
    """Repetition, component, subcomponent and occurrence count from 1; what is missing is empty."""
    read = parse(message("PID|1||A^^^N&1.2&ISO~B^^^M", "MRG|O1", "PID|2||C", "MRG|O2"))
    assert read.get("PID", 3) == "A"
    assert read.get("PID", 3, 4, 2) == "1.2"
    assert read.get("PID", 3, repetition=2) == "B"
    assert read.get("PID", 3, 4, 1, repetition=2) == "M"
    assert read.get(Place("PID", 2), 3) == "C"
    assert read.get("PID", 3, 9) == read.get("PID", 30) == read.get("ZZZ", 1) == ""
    assert list(read.segments()) == [
        Place("MSH"),
        Place("PID"),
        Place("MRG"),
        Place("PID", 2),
        Place("MRG", 2),
    ]
    assert read.has("MRG")
    assert not read.has("PV1")


def test_segments_are_found_however_they_are_written() -> None:
    """Small letters are the same name, and a blank before it is none of it."""
    read = parse(message("pid|1||A", "PID|2||B", " PID|3||C", "mrg|O"))
    pids = [Place("PID", number) for number in (1, 2, 3)]
    assert list(read.segments()) == [Place("MSH"), *pids, Place("MRG")]
    assert [read.get(place, 3) for place in pids] == ["A", "B", "C"]
    assert read.get("MRG", 1) == "O"
    assert read.has("MRG")


@pytest.mark.parametrize("line", ["PIDX|3||C", "|", "rest of a text", "X^^^N"])
def test_a_line_that_is_no_segment_costs_the_message(line: str) -> None:
    """A value was torn there, and what is left of it may be half an ID; its header is read."""
    frame = message("PID|1||A", line, "PV1|1")
    with pytest.raises(MalformedMessage, match="no_message"):
        parse(frame)
    assert parse_header(frame).control_id == "M1"


@pytest.mark.parametrize(
    ("field", "count"), [("", 1), ("A", 1), ("A~B", 2), ("A~~B~", 4), ("^^^N~", 2)]
)
def test_empty_repetitions_keep_their_number(field: str, count: int) -> None:
    """An empty repetition between two others is not skipped when they are counted."""
    assert list(parse(message(f"PID|1||{field}|X")).repetitions("PID", 3)) == [*range(1, count + 1)]
    assert not parse(message("PID|1")).repetitions("PID", 3)
    assert parse(message("PID|1||A~B~C")).repetitions("PID", 3, 2) == range(1, 3)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"A\T\B", "A&B"),
        (r"A\F\B\S\C\R\D\E\E", r"A|B^C~D\E"),
        (r"A\X41\B", "AAB"),
        (r"\E\R\E\ ".strip(), "\\R\\"),
        ("A&B", "A&B"),  # not escaped, and not cut short either
        ("A\\", "A\\"),
        (r"A\Q\B", r"A\Q\B"),
    ],
)
def test_escape_sequences_are_undone(written: str, read: str) -> None:
    """Every escaped separator is the character again; what is no escape stays."""
    assert parse(message(f"PID|1||{written}^x")).get("PID", 3) == read


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(HEADER.replace("\r", "\n") + "PID|1||A\nPV1|1\n", id="line feeds"),
        pytest.param(HEADER.replace("\r", "\r\n") + "PID|1||A\r\nPV1|1\r\n", id="both"),
        pytest.param("\r" + HEADER + "\r\rPID|1||A\r\rPV1|1", id="empty lines"),
        pytest.param(HEADER + "ZZZ|what^ever\rPID|1||A|||||\rPV1|1", id="unknown segment"),
        pytest.param(HEADER.replace("|", "$").replace("^", "%") + "PID$1$$A", id="separators"),
    ],
)
def test_what_is_really_sent_is_read(frame: str) -> None:
    """Line ends, empty lines, segments and separators of every taste do not stop a message."""
    read = parse(frame.encode())
    assert (read.control_id, read.trigger, read.get("PID", 3)) == ("M1", "A40", "A")


@pytest.mark.parametrize("frame", [b"", b"\r", b"MSH", b"\x00", b"PID|1", b"<xml/>", b"\xff\xfe"])
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    """The one exception is ours."""
    with pytest.raises(MalformedMessage, match="no_message"):
        parse(frame)


def test_the_header_is_read_whatever_the_rest_is_written_in() -> None:
    """Somebody who writes in an unknown character set is told so, under their control ID."""
    frame = HEADER.replace("\r", "||||||EBCDIC\r").encode() + b"PID|1||\xe9\xff|MSH\r"
    with pytest.raises(UnknownCharacterSet):
        parse(frame)
    header = parse_header(frame)
    assert (header.control_id, header.trigger) == ("M1", "A40")
    assert list(header.segments()) == [Place("MSH")]
    with pytest.raises(MalformedMessage, match="no_message"):
        parse_header(b"\xff")


def test_nothing_of_a_message_is_in_a_text_of_ours() -> None:
    """Neither the error nor the representation shows a value."""
    with pytest.raises(MalformedMessage) as caught:
        parse(f"{PATIENT_NAME}|{PATIENT_ID}".encode())
    assert sentinels_in(str(caught.value)) == []
    assert caught.value.__context__ is None
    assert sentinels_in(repr(parse(message(f"PID|1||{PATIENT_ID}||{PATIENT_NAME}")))) == []


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tail: bytes) -> None:
    """No input raises anything but the refusal, and no position of it either."""
    for frame in (tail, HEADER.encode() + tail, b"MSH" + tail):
        try:
            read = parse(frame)
        except MalformedMessage:
            continue
        for place in read.segments():
            for repetition in read.repetitions(place, 3):
                read.get(place, 3, repetition=repetition)
        assert isinstance(read.control_id + read.code + read.trigger + read.version, str)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=4))
def test_every_value_written_is_read_again(values: list[str]) -> None:
    """Separators, escapes, line ends and control characters within values survive the way."""
    # Something follows: blanks at the end of a segment are taken for none of it.
    frame = (HEADER + segment("PID", "1", "", values, "x") + "\r").encode()
    read = parse(frame)
    assert [read.get("PID", 3, number) for number in range(1, len(values) + 1)] == values
