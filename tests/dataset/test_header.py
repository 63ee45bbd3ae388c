"""The identity of an instance is read from its first bytes, as pydicom reads it from all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    HeaderError,
    InstanceHeader,
    read_header,
)
from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.part10 import Part10Error, read_file_meta

SYNTAXES = (
    IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    "1.2.840.10008.1.2.4.50",
    "1.2.3.4",
)


def reading(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: data[offset : offset + size]


def packaged() -> Iterator[tuple[Path, bytes, str]]:
    """Yield the data set and transfer syntax of each packaged file of an instance."""
    # Not by get_testdata_files, which downloads what is not packaged.
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        data = path.read_bytes()
        try:
            meta = read_file_meta(reading(data))
        except Part10Error:
            continue
        yield path, data[meta.data_set_offset :], meta.transfer_syntax_uid


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about what is odd in its files
def test_real_headers_are_read_as_pydicom_reads_them() -> None:
    """Every packaged instance has the identity that another toolkit finds."""
    compared = 0
    for path, data, syntax in packaged():
        try:
            ds = dcmread(path, stop_before_pixels=True)
            expected = [
                str(ds.get(keyword) or "").strip(" \0")
                for keyword in (
                    "SOPClassUID",
                    "SOPInstanceUID",
                    "StudyInstanceUID",
                    "SeriesInstanceUID",
                    "PatientID",
                )
            ]
        except (InvalidDicomError, EOFError, zlib.error, NotImplementedError, ValueError):
            continue
        if not expected[0] or "DIRFILE" in path.name or "DICOMDIR" in path.name:
            continue
        header = read_header(reading(data), syntax)
        assert [
            header.sop_class_uid,
            header.sop_instance_uid,
            header.study_instance_uid,
            header.series_instance_uid,
            header.patient_id,
        ] == expected, path.name
        compared += 1
    assert compared > 50


def instance(*more: Element) -> Identifier:
    identifier = Identifier(more)
    for tag, value in (
        (0x00080016, "1.2.840.10008.5.1.4.1.1.2"),
        (0x00080018, "1.1.1"),
        (0x00100020, "P1"),
        (0x00100030, "20000102"),
        (0x00100040, "F"),
        (0x0020000D, "1.1"),
        (0x0020000E, "1.2"),
    ):
        identifier.set_text(tag, value)
    return identifier


EXPECTED = InstanceHeader(
    "1.2.840.10008.5.1.4.1.1.2", "1.1.1", "1.1", "1.2", "P1", "", "20000102", "F"
)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_header_is_read_in_every_transfer_syntax(syntax: str) -> None:
    """Unknown and compressed syntaxes are Explicit VR Little Endian up to the pixels."""
    item = Identifier([Element(0x00080100, "SH", b"C1")])
    data_set = instance(Element(0x00081110, "SQ", (item, item)))
    assert read_header(reading(data_set.encode(syntax)), syntax) == EXPECTED


def test_implicit_bytes_under_an_explicit_syntax_are_recognised() -> None:
    """Some archives write against the transfer syntax that they name."""
    data = instance().encode(IMPLICIT_VR_LITTLE_ENDIAN)
    assert read_header(reading(data), EXPLICIT_VR_LITTLE_ENDIAN) == EXPECTED


def test_large_values_are_stepped_over() -> None:
    """A private megabyte before the UIDs is not read."""
    asked: list[int] = []
    data = instance(Element(0x00091001, "OB", bytes(1_000_000))).encode(EXPLICIT_VR_LITTLE_ENDIAN)

    def read(offset: int, size: int) -> bytes:
        asked.append(size)
        return data[offset : offset + size]

    assert read_header(read, EXPLICIT_VR_LITTLE_ENDIAN) == EXPECTED
    assert sum(asked) < 50_000


def test_nothing_behind_the_series_is_needed() -> None:
    """A header is complete once Series Instance UID has been read."""
    data = instance().encode(EXPLICIT_VR_LITTLE_ENDIAN) + b"\xff" * 100
    assert read_header(reading(data), EXPLICIT_VR_LITTLE_ENDIAN) == EXPECTED


def test_patient_ids_are_read_in_their_character_set() -> None:
    """A Patient ID beyond ASCII is text, by what the data set declares."""
    data_set = Identifier([Element(0x00080005, "CS", b"ISO_IR 144")])
    data_set.set_text(0x00100020, "Ж1")
    header = read_header(reading(data_set.encode(EXPLICIT_VR_LITTLE_ENDIAN)), SYNTAXES[1])
    assert (header.patient_id, header.specific_character_set) == ("Ж1", ("ISO_IR 144",))


QUALIFIER = Identifier([Element(0x00400032, "UT", b"1.2.3 "), Element(0x00400033, "CS", b"ISO ")])

ITEM = b"\xfe\xff\x00\xe0\x10\x00\x00\x00"


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("before", [0, 8000, 8100, 8192, 20_000])
def test_issuer_is_read_with_its_qualifiers(syntax: str, before: int) -> None:
    """The universal ID of who issued the Patient ID is found, wherever a window ends."""
    data_set = instance(
        Element(0x00091001, "OB", bytes(before)),
        Element(0x00100021, "LO", b"NORTH "),
        Element(0x00100024, "SQ", (QUALIFIER, instance())),
    )
    assert read_header(reading(data_set.encode(syntax)), syntax) == replace(
        EXPECTED,
        issuer_of_patient_id="NORTH",
        issuer_universal_id="1.2.3",
        issuer_universal_id_type="ISO",
    )


def undefined(qualifiers: Sequence[Dataset], *, implicit: bool, before: int = 0) -> bytes:
    """Encode an instance whose qualifiers are of undefined length, item and sequence."""
    ds = instance(Element(0x00091001, "OB", bytes(before))).to_dataset()
    ds.IssuerOfPatientIDQualifiersSequence = qualifiers
    ds["IssuerOfPatientIDQualifiersSequence"].is_undefined_length = True
    for item in qualifiers:
        item.is_undefined_length_sequence_item = True
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, implicit
    write_dataset(buffer, ds)
    return buffer.getvalue()


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
def test_qualifiers_of_undefined_length_are_read(implicit: bool, deflated: bool) -> None:
    """Delimiters instead of lengths make no difference, wherever a window ends."""
    item = Dataset()
    item.LocalNamespaceEntityID = "X"
    item.UniversalEntityID = "1.2.3"
    item.UniversalEntityIDType = "ISO"
    for before in (0, *range(7900, 8200, 2), 20_000):
        data = undefined([item], implicit=implicit, before=before)
        syntax = IMPLICIT_VR_LITTLE_ENDIAN if implicit else EXPLICIT_VR_LITTLE_ENDIAN
        if deflated:
            deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            data, syntax = deflater.compress(data) + deflater.flush(), SYNTAXES[3]
        assert read_header(reading(data), syntax) == replace(
            EXPECTED, issuer_universal_id="1.2.3", issuer_universal_id_type="ISO"
        ), before


@pytest.mark.parametrize(
    "element",
    [
        Element(0x00100024, "SQ", ()),
        Element(0x00100024, "SQ", (Identifier(),)),
        Element(0x00100024, "SQ", (Identifier([Element(0x00400032, "UT", bytes(5000))]),)),
        Element(0x00100024, "OB", b"not items at all"),
        Element(0x00100024, "OB", b"odd"),
        Element(0x00100024, "OB", ITEM + b"\x40\x00\x32\x00UT\x00\x00"),
        Element(0x00100024, "OB", ITEM + b"\x40\x00\x32\x00UT\x00\x00\x99\x00\x00\x001.2."),
        Element(0x00100024, "OB", ITEM + b"\x40\x00\x32\x00\x99\x00\x00\x001.2."),
    ],
)
@pytest.mark.parametrize("syntax", SYNTAXES[:2])
def test_qualifiers_that_say_nothing_are_stepped_over(element: Element, syntax: str) -> None:
    """An empty, endless or broken sequence names no issuer, and costs no instance."""
    assert read_header(reading(instance(element).encode(syntax)), syntax) == EXPECTED


@given(st.binary(max_size=300), st.sampled_from(SYNTAXES))
def test_any_bytes_give_a_header_or_the_one_exception(data: bytes, syntax: str) -> None:
    """Whatever arrives is a header or refused."""
    try:
        header = read_header(reading(data), syntax)
    except HeaderError:
        return
    assert isinstance(header, InstanceHeader)


@given(st.data(), st.sampled_from(SYNTAXES))
def test_damaged_headers_give_a_header_or_the_one_exception(
    data: st.DataObject, syntax: str
) -> None:
    """Nor do bytes fail otherwise that nearly are a data set."""
    odd = Element(0x00081110, "SQ", (instance(),)), Element(0x00100024, "SQ", (QUALIFIER,))
    whole = bytearray(instance(*odd).encode(syntax))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        header = read_header(reading(cut), syntax)
    except HeaderError:
        return
    assert isinstance(header, InstanceHeader)
