"""The identity of an instance is read from its first bytes, as pydicom reads it from all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

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
    whole = bytearray(instance(Element(0x00081110, "SQ", (instance(),))).encode(syntax))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        header = read_header(reading(cut), syntax)
    except HeaderError:
        return
    assert isinstance(header, InstanceHeader)
