"""A spliced data set is what decoding, changing and encoding would have given."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, Sequence

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.splice import (
    Copy,
    Decision,
    Edits,
    Header,
    Rewriter,
    Rewritten,
    Splice,
    SpliceError,
    scan,
    splice,
)
from tests.sentinel import PATIENT_ID, PATIENT_NAME
from tests.support.datasets import data_set_bytes, instance
from tests.support.packaged import PACKAGED, comparable, reading

UNCOMPRESSED = (IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN)
WANTED = frozenset({0x00080005, 0x00100010, 0x00100020, 0x00101002, 0x00400275, 0x04000561})
NOT_DEFLATED = [
    name for name, one in PACKAGED.items() if one.syntax != DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
]
"""Deflated again, a data set has other bytes by nature, though nothing in it is changed."""


def changes() -> Dataset:
    """Make what is to be set: short and long values, deep sequences, new and old elements."""
    new = Dataset()
    new.InstanceCoercionDateTime = "20240101120000"
    new.AccessionNumber = "M123"
    new.PatientName, new.PatientID = PATIENT_NAME, PATIENT_ID
    new.IssuerOfPatientID = "LOCAL"
    qualifiers, other = Dataset(), Dataset()
    qualifiers.UniversalEntityID, qualifiers.UniversalEntityIDType = "1.2.3", "ISO"
    other.PatientID = "FOREIGN"
    other.IssuerOfPatientIDQualifiersSequence = Sequence([qualifiers])
    new.OtherPatientIDsSequence = Sequence([other, Dataset()])
    new.StudyID = ""
    new.RequestAttributesSequence = Sequence([])
    previous, item = Dataset(), Dataset()
    previous.PatientID = "FOREIGN"
    item.ModifiedAttributesSequence = Sequence([previous])
    new.OriginalAttributesSequence = Sequence([item])
    return new


REMOVED = (0x00081030, 0x00081110, 0x00100040, 0x00101000, 0x00400244)


def edits_of(new: Dataset, removed: tuple[int, ...] = ()) -> dict[int, Element | None]:
    edits: dict[int, Element | None] = {one.tag: one for one in Identifier.from_dataset(new)}
    return edits | dict.fromkeys(removed)


def spliced(data: bytes, syntax: str, edits: Edits, *, unicode: bool = False) -> bytes:
    rewriter = Rewriter(WANTED, lambda _: Decision(edits, unicode))
    return whole(rewriter.rewrite(reading(data), len(data), syntax))


def whole(made: Rewritten) -> bytes:
    result = b"".join(made.chunks())
    assert len(result) == made.total_bytes
    return result


@pytest.mark.parametrize("name", PACKAGED)
def test_splicing_equals_decoding_changing_and_encoding(name: str) -> None:
    """For each real file, whatever is odd about it, pydicom finds what it would have written."""
    one = PACKAGED[name]
    new = changes()

    result = spliced(one.data, one.syntax, edits_of(new, REMOVED))

    expected = comparable(one.dataset(one.data))
    for element in new:
        expected[element.tag] = element
    for tag in REMOVED:
        if tag in expected:
            del expected[tag]
    found = comparable(one.dataset(result))
    assert [element.tag for element in found] == [element.tag for element in expected]
    for element in expected:
        assert found[element.tag].value == element.value, element.tag


@pytest.mark.parametrize("name", PACKAGED)
def test_text_is_converted_as_pydicom_reads_it(name: str) -> None:
    """In Unicode all text is what it was, at every depth, and says so in its character set."""
    one = PACKAGED[name]
    new = Dataset()
    new.SpecificCharacterSet, new.PatientID = "ISO_IR 192", PATIENT_ID

    result = spliced(one.data, one.syntax, edits_of(new), unicode=True)

    expected, found = comparable(one.dataset(one.data)), comparable(one.dataset(result))
    for element in new:
        expected[element.tag] = element
    assert texts(found) == texts(expected)


def texts(dataset: Dataset) -> list[tuple[int, str]]:
    """Return every value in order and at every depth, in Unicode, without character sets."""
    found = []
    for element in dataset:
        if element.tag == 0x00080005:
            continue
        if element.VR == "SQ":
            found.append((int(element.tag), f"{len(element.value)} items"))
            for item in element.value:
                found += texts(item)
        elif element.VR in ("PN", "LO", "SH", "ST", "LT", "UT", "UC"):
            found.append((int(element.tag), str(element.value).rstrip(" \0")))
        else:
            found.append((int(element.tag), repr(element.value)))
    return found


@pytest.mark.parametrize("name", NOT_DEFLATED)
def test_what_is_not_edited_keeps_its_bytes(name: str) -> None:
    """Each untouched element is found again byte by byte, head, value and order."""
    one = PACKAGED[name]
    edits = edits_of(changes(), REMOVED)
    result = spliced(one.data, one.syntax, edits)

    assert untouched(result, one.syntax, edits) == untouched(one.data, one.syntax, edits)


def untouched(data: bytes, syntax: str, edits: Edits) -> list[bytes]:
    header = header_of(data, syntax)
    kept = [
        data[header.start(number) : header.start(number + 1)]
        for number, tag in enumerate(header.tags)
        if tag not in edits and tag & 0xFFFF and tag != 0x00080001
    ]
    return [*kept, data[header.end :]]


@pytest.mark.parametrize("name", NOT_DEFLATED)
def test_no_edit_copies_the_whole(name: str) -> None:
    """Without a change the data set is one range of the original."""
    one = PACKAGED[name]

    made = splice(scan(reading(one.data), len(one.data), one.syntax, WANTED), {})

    assert made.segments == (Copy(0, len(one.data)),)


def test_every_real_file_is_compared() -> None:
    """The oracle has not quietly lost its files, those of media directories among them."""
    assert len(PACKAGED) >= 190
    assert sum("dicomdirtests" in name for name in PACKAGED) >= 80
    syntaxes = {one.syntax for one in PACKAGED.values()}
    assert syntaxes > {*UNCOMPRESSED, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN}


# ------------------------------------------------------------------ odd encodings


def header_of(data: bytes, syntax: str, wanted: frozenset[int] = WANTED) -> Header:
    return scan(reading(data), len(data), syntax, wanted)


def explicit(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    if vr in (b"SQ", b"UN", b"OB", b"OW", b"UT"):
        return struct.pack("<HH2sxxL", tag >> 16, tag & 0xFFFF, vr, length) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, length) + value


PATIENT = explicit(0x00100020, b"LO", b"OLD ")
NEW_ID: Edits = {0x00100020: Element(0x00100020, "LO", b"NEW1")}
NEW_PATIENT = explicit(0x00100020, b"LO", b"NEW1")
MODALITY = explicit(0x00080060, b"CS", b"CT")
PIXELS = explicit(0x7FE00010, b"OW", b"\1\2\3\4")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PATIENT + PIXELS, NEW_PATIENT + PIXELS),
        (MODALITY + PIXELS, MODALITY + NEW_PATIENT + PIXELS),
        (MODALITY, MODALITY + NEW_PATIENT),
        (b"", NEW_PATIENT),
        # Out of order, and twice: what a reader would take last must not be the old one.
        (PIXELS + PATIENT, PIXELS + NEW_PATIENT),
        (PATIENT + MODALITY + PATIENT, NEW_PATIENT + MODALITY),
        # A group length in a changed group is dropped, in another one kept.
        (
            explicit(0x00080000, b"UL", b"\x0a\0\0\0")
            + MODALITY
            + explicit(0x00100000, b"UL", b"\x0c\0\0\0")
            + PATIENT,
            explicit(0x00080000, b"UL", b"\x0a\0\0\0") + MODALITY + NEW_PATIENT,
        ),
        # Odd lengths, a VR that is none, one that nobody knows yet, padding at the end.
        (
            explicit(0x00080060, b"CS", b"C") + PATIENT,
            explicit(0x00080060, b"CS", b"C") + NEW_PATIENT,
        ),
        (
            b"\x08\0\x70\0\4\0\0\0ABCD" + PATIENT,
            b"\x08\0\x70\0\4\0\0\0ABCD" + NEW_PATIENT,
        ),
        (
            MODALITY + b"\x09\0\x10\x10ZZ\0\0\2\0\0\0AB" + PATIENT,
            MODALITY + b"\x09\0\x10\x10ZZ\0\0\2\0\0\0AB" + NEW_PATIENT,
        ),
        (PATIENT + bytes(16), NEW_PATIENT + bytes(16)),
        (PATIENT + bytes(3), NEW_PATIENT + bytes(3)),
        # Cut off behind what is edited.
        (PATIENT + PIXELS[:-2], NEW_PATIENT + PIXELS[:-2]),
    ],
)
def test_odd_data_sets_are_spliced(before: bytes, after: bytes) -> None:
    """What is odd stays, and only what is asked for changes."""
    if before.startswith(b"\x08\0\x70\0"):
        before, after = MODALITY + before, MODALITY + after
    assert spliced(before, EXPLICIT_VR_LITTLE_ENDIAN, NEW_ID) == after


def test_an_element_behind_the_pixels_is_found_when_it_was_not_before() -> None:
    """A required tag is looked for to the end, also behind fragments."""
    fragments = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\4\0\0\0" + b"\1\2\3\4"
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    pixels = explicit(0x7FE00010, b"OB", fragments + end, 0xFFFFFFFF)
    data = MODALITY + pixels + PATIENT

    rewriter = Rewriter(WANTED, lambda _: Decision(NEW_ID), required=(0x00100020,))
    made = rewriter.rewrite(reading(data), len(data), "1.2.840.10008.1.2.4.50")

    assert whole(made) == MODALITY + pixels + NEW_PATIENT


@pytest.mark.parametrize("revealed", [True, False])
def test_a_further_element_makes_the_walk_go_to_the_end(revealed: bool) -> None:
    """One is found behind fragments where another one announces it, and not looked for else."""
    announcement = explicit(0x4FFE0001, b"SQ", b"")
    last = explicit(0xFFFAFFFA, b"SQ", b"")
    fragments = b"\xfe\xff\x00\xe0\4\0\0\0" + b"\1\2\3\4" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    pixels = explicit(0x7FE00010, b"OB", fragments, 0xFFFFFFFF)
    data = PATIENT + (announcement if revealed else b"") + pixels + last

    def decide(view: Identifier) -> Decision:
        assert (0xFFFAFFFA in view) is revealed
        return Decision({**NEW_ID, **dict.fromkeys((0x4FFE0001, 0xFFFAFFFA))})

    rewriter = Rewriter(WANTED, decide, further=(0x4FFE0001, 0xFFFAFFFA))
    made = rewriter.rewrite(reading(data), len(data), "1.2.840.10008.1.2.4.50")

    assert whole(made) == NEW_PATIENT + pixels + (b"" if revealed else last)


@pytest.mark.parametrize("declared", UNCOMPRESSED[:2])
@pytest.mark.parametrize("written", UNCOMPRESSED[:2])
def test_vrs_against_the_transfer_syntax_are_followed(declared: str, written: str) -> None:
    """Explicit VRs where implicit ones were announced, and the reverse, are met in practice."""
    dataset = instance(rows=4, columns=4)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(written)
    data = data_set_bytes(dataset)

    result = spliced(data, declared, NEW_ID)

    assert result == spliced(data, written, NEW_ID)
    assert Identifier.decode(result, written).text(0x00100020) == "NEW1"


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("syntax", UNCOMPRESSED)
def test_undefined_lengths_are_stepped_over(syntax: str, inner: bool, outer: bool) -> None:
    """Sequences and items end at their delimiters, however deep."""
    dataset = instance(rows=4, columns=4)
    item, deep = Dataset(), Dataset()
    deep.CodeValue, deep.PatientID = "1", "deep"
    item.ConceptCodeSequence = Sequence([deep, Dataset()])
    dataset.ProcedureCodeSequence = Sequence([item, Dataset(), item])
    for one in (dataset.ProcedureCodeSequence, item.ConceptCodeSequence):
        one.is_undefined_length = outer
    dataset["ProcedureCodeSequence"].is_undefined_length = outer
    item["ConceptCodeSequence"].is_undefined_length = outer
    for one in (item, deep):
        one.is_undefined_length_sequence_item = inner
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data = data_set_bytes(dataset)

    result = Identifier.decode(spliced(data, syntax, NEW_ID), syntax)

    original = Identifier.decode(data, syntax)
    original.put(Element(0x00100020, "LO", b"NEW1"))
    assert result == original


def test_a_view_shows_what_was_asked_for_and_no_more() -> None:
    """Wanted elements are decoded, in every encoding alike."""
    dataset = instance(rows=4, columns=4)
    item = Dataset()
    item.PatientID = "Äther"
    dataset.OtherPatientIDsSequence = Sequence([item])
    views = []
    for syntax in UNCOMPRESSED:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        data = data_set_bytes(dataset)
        views.append(header_of(data, syntax).view())

    assert views[0] == views[1] == views[2]
    assert {element.tag for element in views[0]} == WANTED - {0x00400275, 0x04000561}
    assert views[0].items(0x00101002)[0].text(0x00100020) == "Äther"


def test_a_decision_is_made_once_for_equal_headers() -> None:
    """What the rule is not shown does not matter, what it is shown and the encoding do."""
    asked = []

    def decide(view: Identifier) -> Decision:
        asked.append(view)
        value = view.text(0x00100020).encode() + b"X"
        return Decision({0x00100020: Element(0x00100020, "LO", value)})

    rewriter = Rewriter(WANTED, decide)
    results = []
    for patient_id, number in (("A", 1), ("A", 2), ("B", 1), ("A", 3)):
        dataset = instance(number, PatientID=patient_id, rows=4, columns=4)
        for syntax in UNCOMPRESSED:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
            data = data_set_bytes(dataset)
            made = Identifier.decode(
                whole(rewriter.rewrite(reading(data), len(data), syntax)), syntax
            )
            results.append((made.text(0x00100020), made.text(0x00200013)))

    assert results[::3] == [("AX", "1"), ("AX", "2"), ("BX", "1"), ("AX", "3")]
    assert results[::3] == results[1::3] == results[2::3]
    assert len(asked) == 6


def test_where_edits_go_is_remembered_for_the_same_elements_only() -> None:
    """One rewriter makes of each of many data sets what a new one would, in whatever order."""
    number, unknown = explicit(0x00200013, b"IS", b"1 "), explicit(0x00290010, b"LO", b"X ")
    longer, group = explicit(0x00200013, b"IS", b"1234"), explicit(0x00100000, b"UL", bytes(4))
    undefined = explicit(0x7FE00010, b"OB", b"\xfe\xff\xdd\xe0\0\0\0\0", 0xFFFFFFFF)
    files = [
        before + PATIENT + middle + pixels
        for middle in (number, longer, number + unknown, b"")
        for before in (b"", group)
        for pixels in (PIXELS, undefined, b"")
    ]
    edits = edits_of(changes(), REMOVED)
    kept = Rewriter(WANTED, lambda _: Decision(edits))

    for data in [*files, *reversed(files)]:
        made = kept.rewrite(reading(data), len(data), EXPLICIT_VR_LITTLE_ENDIAN)
        assert whole(made) == spliced(data, EXPLICIT_VR_LITTLE_ENDIAN, edits)


@pytest.mark.parametrize("undefined", [True, False])
def test_items_with_implicit_vrs_are_read_where_explicit_ones_are_due(undefined: bool) -> None:
    """Some writers do that; what they say is shown, and another edit leaves it as it is."""
    inner = struct.pack("<HHL", 0x0010, 0x0020, 2) + b"12"
    items = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
    if undefined:
        items += b"\xfe\xff\xdd\xe0\0\0\0\0"
    sequence = explicit(0x00101002, b"SQ", items, 0xFFFFFFFF if undefined else None)
    data = PATIENT + sequence + PIXELS

    view = header_of(data, EXPLICIT_VR_LITTLE_ENDIAN).view()

    assert [one.text(0x00100020) for one in view.items(0x00101002)] == ["12"]
    assert spliced(data, EXPLICIT_VR_LITTLE_ENDIAN, NEW_ID) == NEW_PATIENT + sequence + PIXELS


@pytest.mark.parametrize("syntax", UNCOMPRESSED[:2])
@pytest.mark.parametrize("delimited", [True, False])
def test_items_with_explicit_vrs_are_stepped_over_where_implicit_ones_are_due(
    delimited: bool, syntax: str
) -> None:
    """As in a UN of undefined length that keeps the VRs of what was there before."""
    inner = explicit(0x00080100, b"SH", b"ABCD") + explicit(0x00080102, b"SH", b"99X ")
    inner += explicit(0x00081199, b"SQ", b"", 0)
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    if delimited:
        items = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + inner
        items += b"\xfe\xff\x0d\xe0\0\0\0\0" + end
    else:
        items = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner + end
    sequence = explicit(0x00091010, b"UN", items, 0xFFFFFFFF)
    before, old, new = MODALITY, PATIENT, NEW_PATIENT
    if syntax == IMPLICIT_VR_LITTLE_ENDIAN:
        sequence = struct.pack("<HHL", 0x0009, 0x1010, 0xFFFFFFFF) + items
        before = struct.pack("<HHL", 0x0008, 0x0060, 2) + b"CT"
        old = struct.pack("<HHL", 0x0010, 0x0020, 4) + b"OLD "
        new = struct.pack("<HHL", 0x0010, 0x0020, 4) + b"NEW1"

    assert spliced(before + sequence + old, syntax, NEW_ID) == before + sequence + new


# ------------------------------------------------------------------ size and bounds


class Counted:
    """Access to a data set that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.bytes_read = 0
        self.largest = 0

    def __call__(self, offset: int, size: int) -> bytes:
        part = self._data[offset : offset + size]
        self.bytes_read += len(part)
        self.largest = max(self.largest, len(part))
        return part


def large_header(undefined: bool) -> bytes:
    """Make 5 MB of per-frame functional groups before the pixels."""
    item = explicit(0x00189074, b"DT", b"20240101120000" + b" " * 100)
    items = struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item
    groups = items * (5_000_000 // len(items))
    if undefined:
        groups += b"\xfe\xff\xdd\xe0\0\0\0\0"
    sequence = explicit(0x52009230, b"SQ", groups, 0xFFFFFFFF if undefined else None)
    return MODALITY + PATIENT + sequence + PIXELS


@pytest.mark.parametrize("undefined", [True, False])
def test_a_large_header_is_neither_read_nor_held(undefined: bool) -> None:
    """Of 5 MB of functional groups only the beginning is looked at."""
    read = Counted(large_header(undefined))
    size = len(read._data)

    made = splice(scan(read, size, EXPLICIT_VR_LITTLE_ENDIAN, WANTED), NEW_ID)

    assert read.bytes_read < 64 * 1024
    assert sum(len(part) for part in made.segments if isinstance(part, bytes)) < 1024
    assert made.total_bytes == size
    assert whole(made) == read._data.replace(PATIENT, NEW_PATIENT)


def test_a_large_element_between_two_edits_is_a_range() -> None:
    """Only what is edited becomes new bytes."""
    private = explicit(0x00091010, b"OB", bytes(3_000_000))
    data = MODALITY + private + PATIENT + PIXELS
    read = Counted(data)
    edits = {0x00080060: None, **NEW_ID}

    made = splice(scan(read, len(data), EXPLICIT_VR_LITTLE_ENDIAN, WANTED), edits)

    assert made.segments == (
        Copy(len(MODALITY), len(private)),
        NEW_PATIENT,
        Copy(len(data) - len(PIXELS), len(PIXELS)),
    )
    assert read.bytes_read < 64 * 1024


@given(st.data())
def test_any_part_of_a_splice_can_be_read(data: st.DataObject) -> None:
    """Reading by offset and size gives the same bytes as reading all."""
    original = MODALITY + explicit(0x00091010, b"OB", bytes(range(256)) * 40) + PATIENT + PIXELS
    made = splice(header_of(original, EXPLICIT_VR_LITTLE_ENDIAN), NEW_ID)
    everything = b"".join(made.chunks(data.draw(st.integers(1, 9000))))
    offset = data.draw(st.integers(0, len(everything) + 10))
    size = data.draw(st.integers(0, len(everything) + 10))

    assert made.read(offset, size) == everything[offset : offset + size]


def test_an_original_that_has_become_shorter_is_noticed() -> None:
    """Bytes are never missing silently."""
    data = bytearray(PATIENT + explicit(0x7FE00010, b"OW", bytes(10_000)))
    made = splice(header_of(bytes(data), EXPLICIT_VR_LITTLE_ENDIAN), NEW_ID)
    shorter = Splice(reading(bytes(data[:-1])), made.segments)

    with pytest.raises(SpliceError):
        list(shorter.chunks())


# ---------------------------------------------------------------------- deflated


def deflated(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


def test_a_deflated_data_set_is_inflated_spliced_and_deflated() -> None:
    """What comes out inflates to what splicing the inflated one gives, of even length."""
    noise = random.Random(1).randbytes(3_000_000)
    data = MODALITY + PATIENT + explicit(0x7FE00010, b"OW", noise)
    held = Counted(deflated(data))

    rewriter = Rewriter(WANTED, lambda _: Decision(NEW_ID))
    made = rewriter.rewrite(held, len(held._data), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
    result = whole(made)

    assert zlib.decompress(result, -zlib.MAX_WBITS) == data.replace(PATIENT, NEW_PATIENT)
    assert len(result) % 2 == 0
    assert result == whole(made)
    assert held.largest <= 64 * 1024


def test_what_is_asked_for_again_further_back_is_inflated_again() -> None:
    """A reader may go back, whatever was let go."""
    from dicomproxy.dataset.splice_deflated import Inflated

    data = random.Random(2).randbytes(5_000_000)
    inflated = Inflated(reading(deflated(data)))

    assert inflated.size_bytes == len(data)
    for offset in (4_900_000, 10, 4_000_000, 2_000_000, 4_999_999, 0):
        assert inflated.read(offset, 100_000) == data[offset : offset + 100_000]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"\xff" + data[1:], lambda data: b""],
)
def test_damaged_deflation_is_refused(damage: Callable[[bytes], bytes]) -> None:
    """Cut off or no deflation at all: one kind of error."""
    data = damage(deflated(PATIENT + explicit(0x7FE00010, b"OW", random.Random(3).randbytes(9000))))
    with pytest.raises(SpliceError):
        spliced(data, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, NEW_ID)


def test_a_deflation_bomb_is_refused() -> None:
    """What inflates beyond the limit is given up, in bounded memory."""
    from dicomproxy.dataset.splice_deflated import Inflated

    with pytest.raises(SpliceError):
        Inflated(reading(deflated(bytes(50_000_000))), limit_bytes=10_000_000)


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        MODALITY + b"\x10\0\x20\0LO",
        MODALITY + explicit(0x00100020, b"LO", b"AB", 100),
        MODALITY + b"\xfe\xff\x00\xe0\0\0\0\0",
        MODALITY + explicit(0x00081032, b"SQ", b"", 0xFFFFFFFF),
        MODALITY + explicit(0x00081032, b"SQ", PATIENT, 0xFFFFFFFF),
        explicit(0x00101002, b"SQ", PATIENT),
        explicit(0x00100020, b"UN", bytes(2_000_000)),
        explicit(
            0x00081032,
            b"SQ",
            b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x08\0\x32\x10SQ\0\0\xff\xff\xff\xff" * 70,
            0xFFFFFFFF,
        ),
    ],
)
def test_what_is_no_data_set_is_refused(data: bytes) -> None:
    """Nonsense before or in what is edited is an error, never a guess."""
    with pytest.raises(SpliceError):
        spliced(data, EXPLICIT_VR_LITTLE_ENDIAN, NEW_ID)


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "garbled",
    [
        explicit(0x00081090, b"L\xff", b""),
        explicit(0x00082112, b"SQ", b"\xac\xff\x00\xe0\0\0\0\0", 0xFFFFFFFF),
        b"\xfe\xff\x00\xe0\0\0\0\0",
    ],
)
def test_what_is_required_is_not_left_behind_where_the_walk_ends(
    garbled: bytes, required: bool
) -> None:
    """An old patient would stay there, beside the new one that is put where nobody was."""
    data = explicit(0x4B081030, b"LO", b"AB") + garbled + PATIENT + PIXELS
    rewriter = Rewriter(WANTED, lambda _: Decision(NEW_ID), (0x00100020,) if required else ())
    if required:
        with pytest.raises(SpliceError):
            rewriter.rewrite(reading(data), len(data), EXPLICIT_VR_LITTLE_ENDIAN)
    else:
        assert whole(rewriter.rewrite(reading(data), len(data), EXPLICIT_VR_LITTLE_ENDIAN))


def test_too_many_elements_are_refused() -> None:
    """What is remembered of a data set has a bound, whatever it consists of."""
    tags = (0x00090000 + number for number in range(300_000))
    data = b"".join(struct.pack("<HHL", tag >> 16, tag & 0xFFFF, 0) for tag in tags)
    with pytest.raises(SpliceError):
        spliced(data, IMPLICIT_VR_LITTLE_ENDIAN, NEW_ID)


SMALL = tuple(f"test_files/{name}.dcm" for name in ("CT_small", "test-SR", "priv_SQ"))


@given(st.data())
def test_any_bytes_give_a_splice_or_an_error(data: st.DataObject) -> None:
    """Mutated headers never raise anything else, and a splice is as long as it says."""
    syntax = data.draw(st.sampled_from(UNCOMPRESSED))
    one = PACKAGED[data.draw(st.sampled_from(SMALL))]
    mutated = bytearray(one.data[:4096])
    for _ in range(data.draw(st.integers(0, 8))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    unicode = data.draw(st.booleans())
    try:
        spliced(bytes(mutated), syntax, edits_of(changes(), REMOVED), unicode=unicode)
    except SpliceError:
        pass


@pytest.mark.parametrize("tag", [0x00020010, 0x00080000])
def test_elements_that_are_none_of_a_data_set_are_not_edited(tag: int) -> None:
    """File meta and group lengths are not for callers."""
    with pytest.raises(ValueError):
        spliced(PATIENT, EXPLICIT_VR_LITTLE_ENDIAN, {tag: None})


def test_an_edit_beyond_what_was_scanned_is_refused() -> None:
    """Where it would go is not known, so it is not put somewhere."""
    header = header_of(large_header(True), EXPLICIT_VR_LITTLE_ENDIAN)
    with pytest.raises(ValueError):
        splice(header, {0x7FE00020: Element(0x7FE00020, "OW", b"")})


def test_errors_carry_no_value() -> None:
    """What is wrong is said without what it is wrong with."""
    data = explicit(0x00100020, b"LO", PATIENT_ID.encode(), 100)
    with pytest.raises(SpliceError) as caught:
        spliced(data, EXPLICIT_VR_LITTLE_ENDIAN, NEW_ID)
    assert PATIENT_ID not in str(caught.value)


def test_a_new_value_beyond_its_vr_is_written_as_unknown() -> None:
    """The length field of a short VR never overflows."""
    long: Any = Element(0x00100020, "LO", b"x" * 70_000)
    result = spliced(PATIENT, EXPLICIT_VR_LITTLE_ENDIAN, {0x00100020: long})
    assert result == explicit(0x00100020, b"UN", b"x" * 70_000)
