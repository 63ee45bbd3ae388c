"""Text becomes Unicode where it stands, and all that is around it keeps its bytes."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, Sequence, dcmread
from pydicom.uid import UID

from dicomproxy.dataset.header import (
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import Element
from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.dataset.splice import Edits, SpliceError, scan, splice
from tests.support.datasets import data_set_bytes, instance

SYNTAXES = (IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN)
CHARSET = 0x00080005
UNICODE: Edits = {CHARSET: Element(CHARSET, "CS", b"ISO_IR 192")}
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


def converted(data: bytes, syntax: str = EXPLICIT_VR_LITTLE_ENDIAN) -> bytes:
    header = scan(lambda at, size: data[at : at + size], len(data), syntax, {CHARSET})
    made = splice(header, UNICODE, unicode=True)
    result = b"".join(made.chunks())
    assert len(result) == made.total_bytes
    return result


# ------------------------------------------------------------------- any data set

ALPHABETS = {
    "ISO_IR 100": "abc ÄöüßéÑ",
    "ISO_IR 144": "abc АбвгдЖЯ",
    "GB18030": "abc 王小东",
}


@st.composite
def items(draw: st.DrawFn, alphabet: str, depth: int) -> Dataset:
    """Draw an item with text, other values and items of its own, lengths defined or not."""
    made = Dataset()
    text = st.text(alphabet, max_size=20)
    elements: dict[str, st.SearchStrategy[Any]] = {
        "PatientComments": text,
        "CodeMeaning": text,
        "PatientName": text,
        "Modality": st.just("CT"),
        "Rows": st.integers(0, 65535),
        "TextValue": text,
    }
    for keyword in draw(st.sets(st.sampled_from(sorted(elements)))):
        setattr(made, keyword, draw(elements[keyword]))
    if draw(st.booleans()):
        made.private_block(0x0011, "TEST", create=True).add_new(1, "LO", draw(text))
    if depth and draw(st.booleans()):
        inner = Sequence(draw(st.lists(items(alphabet, depth - 1), max_size=2)))
        keyword = draw(st.sampled_from(["ProcedureCodeSequence", "ContentSequence"]))
        setattr(made, keyword, inner)
        made[keyword].is_undefined_length = draw(st.booleans())
    made.is_undefined_length_sequence_item = draw(st.booleans())  # type: ignore[attr-defined]
    return made


@given(st.data())
def test_every_text_is_converted_at_every_depth(data: st.DataObject) -> None:
    """Whatever the lengths and the nesting, another toolkit reads the same values."""
    charset = data.draw(st.sampled_from(sorted(ALPHABETS)))
    syntax = data.draw(st.sampled_from(SYNTAXES))
    drawn = data.draw(items(ALPHABETS[charset], 3))
    dataset = instance(SpecificCharacterSet=charset, rows=2, columns=2)
    dataset.update(drawn)
    dataset.Rows = 2
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    original = data_set_bytes(dataset)

    result = converted(original, syntax)

    assert texts(read(dataset, result)) == texts(read(dataset, original))
    assert read(dataset, result).SpecificCharacterSet == "ISO_IR 192"
    assert converted(result, syntax) == result


def read(dataset: Dataset, data: bytes) -> Dataset:
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    head = build_file_meta(dataset.SOPClassUID, dataset.SOPInstanceUID, syntax)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dcmread(io.BytesIO(head + data))
        for _ in found.iterall():
            pass
    return found


def texts(dataset: Dataset) -> list[Any]:
    found: list[Any] = []
    for element in dataset:
        if element.tag == CHARSET:
            continue
        if element.VR == "SQ":
            found.append((int(element.tag), [texts(item) for item in element.value]))
        elif element.tag.is_private and element.VR == "UN":
            found.append((int(element.tag), "whatever it is"))
        else:
            found.append((int(element.tag), str(element.value).rstrip(" ")))
    return found


# ------------------------------------------------------------------- single cases


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    if vr in (b"SQ", b"UN", b"OB", b"OW", b"UT"):
        return struct.pack("<HH2sxxL", tag >> 16, tag & 0xFFFF, vr, size) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, size) + value


def implicit(tag: int, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, size) + value


LATIN = element(CHARSET, b"CS", b"ISO_IR 100")
UTF8 = element(CHARSET, b"CS", b"ISO_IR 192")
OLD, NEW = "äö".encode("latin-1"), "äö".encode()
CODES, MEANING, COMMENTS = 0x00081032, 0x00080104, 0x00104000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Odd growth is padded.
        (element(MEANING, b"LO", b"\xe4x"), element(MEANING, b"LO", "äx ".encode())),
        # What is ASCII stays as it is, odd lengths too.
        (element(MEANING, b"LO", b"a"), element(MEANING, b"LO", b"a")),
        # Lengths around it grow with it, defined ones.
        (
            element(CODES, b"SQ", implicit(ITEM, element(MEANING, b"LO", OLD))),
            element(CODES, b"SQ", implicit(ITEM, element(MEANING, b"LO", NEW))),
        ),
        (
            element(
                CODES,
                b"SQ",
                implicit(ITEM, element(MEANING, b"LO", OLD) + implicit(ITEM_END, b""), UNDEFINED)
                + implicit(SEQUENCE_END, b""),
                UNDEFINED,
            ),
            element(
                CODES,
                b"SQ",
                implicit(ITEM, element(MEANING, b"LO", NEW) + implicit(ITEM_END, b""), UNDEFINED)
                + implicit(SEQUENCE_END, b""),
                UNDEFINED,
            ),
        ),
        # A group length in an item goes where its group changes, else it stays.
        (
            element(
                CODES,
                b"SQ",
                implicit(
                    ITEM,
                    element(0x00080000, b"UL", b"\x0a\0\0\0")
                    + element(MEANING, b"LO", OLD)
                    + element(0x00400000, b"UL", b"\x0a\0\0\0")
                    + element(0x00400009, b"SH", b"1 "),
                ),
            ),
            element(
                CODES,
                b"SQ",
                implicit(
                    ITEM,
                    element(MEANING, b"LO", NEW)
                    + element(0x00400000, b"UL", b"\x0a\0\0\0")
                    + element(0x00400009, b"SH", b"1 "),
                ),
            ),
        ),
        # And at the top, before and behind where stepping ended.
        (
            element(0x00100000, b"UL", b"\x0a\0\0\0") + element(COMMENTS, b"LT", OLD),
            element(COMMENTS, b"LT", NEW),
        ),
        # An item's own character set holds for it, and goes.
        (
            element(
                CODES,
                b"SQ",
                implicit(
                    ITEM,
                    element(CHARSET, b"CS", b"ISO_IR 144")
                    + element(MEANING, b"LO", "да".encode("iso8859_5")),
                ),
            ),
            element(CODES, b"SQ", implicit(ITEM, element(MEANING, b"LO", "да".encode()))),
        ),
        # A UN is implicit within, and its text is text.
        (
            element(CODES, b"UN", implicit(ITEM, implicit(MEANING, OLD))),
            element(CODES, b"UN", implicit(ITEM, implicit(MEANING, NEW))),
        ),
        (element(MEANING, b"UN", OLD), element(MEANING, b"UN", NEW)),
        # Or explicit against the rule, as its first element shows.
        (
            element(
                CODES,
                b"UN",
                implicit(ITEM, element(MEANING, b"LO", OLD) + implicit(ITEM_END, b""), UNDEFINED)
                + implicit(SEQUENCE_END, b""),
                UNDEFINED,
            ),
            element(
                CODES,
                b"UN",
                implicit(ITEM, element(MEANING, b"LO", NEW) + implicit(ITEM_END, b""), UNDEFINED)
                + implicit(SEQUENCE_END, b""),
                UNDEFINED,
            ),
        ),
        # A length that looks like a VR is a length where it fits.
        (
            element(
                CODES,
                b"UN",
                implicit(ITEM, implicit(0x00091001, bytes(20300)) + implicit(MEANING, OLD)),
            ),
            element(
                CODES,
                b"UN",
                implicit(ITEM, implicit(0x00091001, bytes(20300)) + implicit(MEANING, NEW)),
            ),
        ),
        # What is not text, or what nobody knows, or cannot be read, stays.
        (element(0x7FE00010, b"OW", OLD), element(0x7FE00010, b"OW", OLD)),
        (element(0x00091001, b"UN", OLD), element(0x00091001, b"UN", OLD)),
        (element(CODES, b"UN", b"\xe4" * 12), element(CODES, b"UN", b"\xe4" * 12)),
        (element(CODES, b"SQ", b"\xe4" * 12), element(CODES, b"SQ", b"\xe4" * 12)),
        (
            element(CODES, b"SQ", implicit(ITEM, element(MEANING, b"LO", OLD), 30)),
            element(CODES, b"SQ", implicit(ITEM, element(MEANING, b"LO", OLD), 30)),
        ),
        # Behind the pixels, and behind fragments.
        (
            element(0x7FE00010, b"OB", implicit(ITEM, OLD) + implicit(SEQUENCE_END, b""), UNDEFINED)
            + element(0x7FE11001, b"LO", OLD),
            element(0x7FE00010, b"OB", implicit(ITEM, OLD) + implicit(SEQUENCE_END, b""), UNDEFINED)
            + element(0x7FE11001, b"LO", NEW),
        ),
        # Cut off at the end: what is whole is converted.
        (
            element(MEANING, b"LO", OLD) + element(0x7FE00010, b"OW", OLD, 100),
            element(MEANING, b"LO", NEW) + element(0x7FE00010, b"OW", OLD, 100),
        ),
        # Too long for its VR's length field.
        (
            element(COMMENTS, b"LT", b"\xe4" * 40_000),
            element(COMMENTS, b"UN", "ä".encode() * 40_000),
        ),
    ],
)
def test_text_is_converted_in_place(before: bytes, after: bytes) -> None:
    """Byte for byte what is expected, and nothing else is touched."""
    assert converted(LATIN + before) == UTF8 + after


def test_what_is_edited_is_not_converted_again() -> None:
    """New elements come in Unicode already."""
    data = LATIN + element(COMMENTS, b"LT", OLD)
    header = scan(
        lambda at, size: data[at : at + size], len(data), EXPLICIT_VR_LITTLE_ENDIAN, {CHARSET}
    )
    edits = {**UNICODE, COMMENTS: Element(COMMENTS, "LT", "ß".encode())}

    made = splice(header, edits, unicode=True)

    assert b"".join(made.chunks()) == UTF8 + element(COMMENTS, b"LT", "ß".encode())


def test_bytes_without_a_meaning_are_marked() -> None:
    """What nobody could read does not keep the rest from being converted."""
    declared = element(CHARSET, b"CS", b"ISO_IR 192")
    data = declared + element(COMMENTS, b"LT", b"\xff\xc3\xa4 ")
    assert converted(data) == declared + element(COMMENTS, b"LT", "\ufffdä ".encode())


def test_a_text_that_is_too_long_is_refused() -> None:
    """No data set decides how much is held in memory."""
    data = LATIN + element(COMMENTS, b"UT", b"\xe4" * (16 * 1024 * 1024 + 2))
    with pytest.raises(SpliceError):
        converted(data)


def test_thousands_of_texts_take_no_more_memory_than_they_are_long() -> None:
    """What is held while text is converted is the new text, not a note for each of its parts."""
    item = implicit(ITEM, element(0x00209157, b"UL", b"1234") + element(COMMENTS, b"LT", OLD * 20))
    count = 20_000
    groups = element(0x52009230, b"SQ", item * count)
    data = LATIN + groups
    new = implicit(ITEM, element(0x00209157, b"UL", b"1234") + element(COMMENTS, b"LT", NEW * 20))
    expected = UTF8 + element(0x52009230, b"SQ", new * count)
    header = scan(
        lambda at, size: data[at : at + size], len(data), EXPLICIT_VR_LITTLE_ENDIAN, {CHARSET}
    )

    tracemalloc.start()
    try:
        made = splice(header, UNICODE, unicode=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert b"".join(made.chunks()) == expected
    assert peak < 3 * len(expected)
