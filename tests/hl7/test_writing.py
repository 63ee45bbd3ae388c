"""Writing HL7 v2 messages and acknowledgements."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.hl7.errors import MalformedMessage
from dicomproxy.hl7.message import parse
from dicomproxy.hl7.writing import Header, Repeated, acknowledgement, escape, message, segment

AT = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
HEADER = Header(("US", ""), (["THEM", "1.2", "ISO"], "F"), ("QBP", "Q23", "QBP_Q21"), "C1", AT)


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ((), "PID"),
        (("1", "", "A"), "PID|1||A"),
        (("1", ["A", "", "", ["N", "1.2", "ISO"]]), "PID|1|A^^^N&1.2&ISO"),
        (("1", ["", "", "", ["", "1.2", "ISO"]]), "PID|1|^^^&1.2&ISO"),
        (("1", "", ["", ""]), "PID|1"),
        ((Repeated(["A", ["B", "", "C"]]),), "PID|A~B^^C"),
        (("A|B^C~D&E\\F",), r"PID|A\F\B\S\C\R\D\T\E\E\F"),
        (("A\rB\x0b\x1c",), r"PID|A\X0D\B\X0B\\X1C" + "\\"),
    ],
)
def test_segments_are_written_by_position(fields: tuple[object, ...], written: str) -> None:
    """Values are escaped, separators stand between pieces, and no empty piece trails."""
    assert segment("PID", *fields) == written  # type: ignore[arg-type]


@given(st.text())
def test_an_escaped_value_has_no_separator(value: str) -> None:
    """Nothing in a value can end it."""
    assert not set(escape(value)) & set("|^~&\r\n\x0b\x1c\x00")


def test_a_message_declares_its_character_set_only_where_it_needs_one() -> None:
    """ASCII is read by everybody; what goes beyond is named in MSH-18 and written in that set."""
    assert message(HEADER, [segment("QPD", "A")]) == (
        b"MSH|^~\\&|US||THEM^1.2^ISO|F|20240506070809+0000||QBP^Q23^QBP_Q21|C1|P|2.5\rQPD|A\r"
    )
    written = message(HEADER, [segment("QPD", "é")], charset="8859/1")
    assert written.endswith(b"|2.5||||||8859/1\rQPD|\xe9\r")
    assert parse(written).get("QPD", 1) == "é"
    with pytest.raises(MalformedMessage, match="not_in_character_set"):
        message(HEADER, [segment("QPD", "王")], charset="8859/1")


def received(header: str) -> bytes:
    return f"MSH|^~\\&|{header}\rPID|1\r".encode()


def test_an_acknowledgement_goes_back_where_the_message_came_from() -> None:
    """Sender and receiver change places, and MSA-2 is the control ID that came."""
    answer = acknowledgement(
        parse(received("REG^1.2^ISO|H|WE|OURS|2024||ADT^A40^ADT_A39|M\\T\\1|T|2.5.1")),
        "AA",
        control_id="K9",
        at=AT,
    )
    assert answer == (
        b"MSH|^~\\&|WE|OURS|REG^1.2^ISO|H|20240506070809+0000||ACK^A40^ACK|K9|T|2.5.1\r"
        b"MSA|AA|M\\T\\1\r"
    )


@pytest.mark.parametrize(
    ("version", "error"),
    [("2.3.1", b""), ("2.4", b""), ("2.5", b"ERR||MRG^1^1|101^^HL70357|E\r"), ("2.10", None)],
)
def test_an_error_is_told_in_the_segment_that_the_version_has(
    version: str, error: bytes | None
) -> None:
    """ERR-3 exists since v2.5; before, the code of MSA-1 has to do."""
    answer = acknowledgement(
        parse(received(f"A|B|C|D|2024||ADT^A40|M1|P|{version}")),
        "AE",
        control_id="K",
        at=AT,
        error=101,
        location=("MRG", "1", "1"),
    )
    shown = b"ERR||MRG^1^1|101^^HL70357|E\r" if error is None else error
    assert answer.endswith(b"MSA|AE|M1\r" + shown)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_whatever_a_header_holds_it_is_answered(control_id: str, version: str) -> None:
    """The answer reads as a message, and names the control ID that came."""
    frame = b"MSH|^~\\&||||||||%b||%b\r" % (
        escape(control_id).encode(),
        escape(version).encode(),
    )
    answer = acknowledgement(parse(frame), "AR", control_id="K", at=AT, error=200)
    assert parse(answer).get("MSA", 1) == "AR"
    assert f"\r{segment('MSA', 'AR', control_id)}\r".encode() in answer
