"""Identifiers keep what peers sent, agree with pydicom, and fail in one way only."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import DataElement, Dataset, dcmread
from pydicom.data import get_charset_files, get_testdata_file
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import CannotEncode, Element, Identifier, IdentifierError
from tests.sentinel import PATIENT_ID, SENTINEL

SYNTAXES = (
    IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
)
PACKAGED = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "rtplan.dcm",
    "rtdose.dcm",
    "test-SR.dcm",
    "nested_priv_SQ.dcm",
    "waveform_ecg.dcm",
    "chrFren.dcm",
    "chrH31.dcm",
    "chrRuss.dcm",
    "chrX1.dcm",
)
NAME = 0x00100010
CHARACTER_SET = 0x00080005
SEQUENCE = 0x00400275


def packaged(name: str) -> Dataset:
    """Return a packaged file without what no identifier holds: pixels, overlays, group lengths."""
    found = get_charset_files(name) if name.startswith("chr") else [_testdata(name)]
    ds = dcmread(found[0])
    for element in list(ds):
        if element.tag.element == 0 or element.tag.group >= 0x5000:
            del ds[element.tag]
    return Dataset(dict(ds.items()))


def _testdata(name: str) -> str:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return path


def written(ds: Dataset, syntax: str) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = syntax == IMPLICIT_VR_LITTLE_ENDIAN
    buffer.is_little_endian = syntax != EXPLICIT_VR_BIG_ENDIAN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dataset(buffer, ds)
    return buffer.getvalue()


# ------------------------------------------------------------------- as bytes


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_real_data_sets_survive_every_transfer_syntax(name: str, syntax: str) -> None:
    """What is written is read back equal, private elements and nested sequences included."""
    given = Identifier.decode(
        written(packaged(name), EXPLICIT_VR_LITTLE_ENDIAN), EXPLICIT_VR_LITTLE_ENDIAN
    )
    # Written once, so that values of odd length have their padding.
    given = Identifier.decode(given.encode(EXPLICIT_VR_LITTLE_ENDIAN), EXPLICIT_VR_LITTLE_ENDIAN)
    encoded = given.encode(syntax)
    read = Identifier.decode(encoded, syntax)
    assert [element.tag for element in read] == [element.tag for element in given]
    assert read.encode(syntax) == encoded or syntax == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
    if syntax != IMPLICIT_VR_LITTLE_ENDIAN:  # which does not tell private VRs
        assert read == given


@pytest.mark.parametrize("name", [name for name in PACKAGED if "priv" not in name])
@pytest.mark.parametrize("syntax", [IMPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN])
def test_pydicom_reads_the_same_values(name: str, syntax: str) -> None:
    """Text values are what another toolkit finds in the same bytes."""
    ds = packaged(name)
    identifier = Identifier.decode(written(ds, syntax), syntax)
    compared = 0
    for element in ds:
        if element.VR not in ("CS", "UI", "DA", "TM", "LO", "SH", "AE", "IS", "US"):
            continue
        if element.tag.is_private:
            continue
        value = element.value
        values = [] if element.is_empty else list(value) if element.VM > 1 else [value]
        shown = [getattr(one, "original_string", str(one)).strip(" \0") for one in values]
        assert [str(one) for one in identifier.values(element.tag)] == shown, element.keyword
        compared += 1
    assert compared > 0


@pytest.mark.parametrize(
    ("syntax", "data", "values"),
    [
        (EXPLICIT_VR_LITTLE_ENDIAN, "08005200 4353 0600 535455445920", {0x00080052: ("STUDY",)}),
        (EXPLICIT_VR_BIG_ENDIAN, "00080052 4353 0006 535455445920", {0x00080052: ("STUDY",)}),
        (IMPLICIT_VR_LITTLE_ENDIAN, "08005200 06000000 535455445920", {0x00080052: ("STUDY",)}),
        # a group length is dropped, an odd length is understood
        (
            EXPLICIT_VR_LITTLE_ENDIAN,
            "08000000 554c 0400 0a000000 08005200 4353 0500 5354554459",
            {0x00080052: ("STUDY",)},
        ),
        # zeros behind the last element
        (
            EXPLICIT_VR_LITTLE_ENDIAN,
            "08005200 4353 0600 535455445920 0000000000000000",
            {0x00080052: ("STUDY",)},
        ),
        (EXPLICIT_VR_BIG_ENDIAN, "00280010 5553 0002 0200", {0x00280010: ("512",)}),
        (EXPLICIT_VR_LITTLE_ENDIAN, "", {}),
    ],
)
def test_bytes_are_read(syntax: str, data: str, values: dict[int, tuple[str, ...]]) -> None:
    """Hand-written data sets, each with one thing that peers do."""
    identifier = Identifier.decode(bytes.fromhex(data), syntax)
    assert {element.tag: identifier.values(element.tag) for element in identifier} == values


@pytest.mark.parametrize(
    "data",
    [
        "08005200",  # truncated element
        "08005200 4353 0a00 5354",  # value beyond the end
        "08005200 3131 0200 5354",  # not a VR
        "40007502 5351 0000 ffffffff",  # sequence without an end
        "40007502 5351 0000 08000000 08005200 00000000",  # not an item
        "40007502 5351 0000 08000000 feff00e0 10000000",  # item beyond the end
        "08005200 4353 ffff 5354",
        "feff00e0 00000000",  # item without a sequence
    ],
)
def test_what_is_no_data_set_is_refused(data: str) -> None:
    """Damaged bytes raise the one exception, and it carries no value."""
    with pytest.raises(IdentifierError):
        Identifier.decode(bytes.fromhex(data), EXPLICIT_VR_LITTLE_ENDIAN)


def test_deep_nesting_is_refused() -> None:
    """A data set cannot exhaust the stack."""
    data = b""
    for _ in range(200):
        item = b"\xfe\xff\x00\xe0" + struct.pack("<L", len(data)) + data
        data = struct.pack("<HH2sHL", 0x0040, 0x0275, b"SQ", 0, len(item)) + item
    with pytest.raises(IdentifierError, match="nested"):
        Identifier.decode(data, EXPLICIT_VR_LITTLE_ENDIAN)


def test_inflating_is_bounded() -> None:
    """A deflated data set that grows beyond the limit is refused."""
    bomb = Identifier([Element(0x00104000, "LT", b" " * 20_000_000)])
    with pytest.raises(IdentifierError):
        Identifier.decode(
            bomb.encode(DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
        )


@given(st.binary(max_size=300), st.sampled_from(SYNTAXES))
def test_any_bytes_give_an_identifier_or_the_one_exception(data: bytes, syntax: str) -> None:
    """What was read can be read from, written, and read again."""
    try:
        identifier = Identifier.decode(data, syntax)
    except IdentifierError:
        return
    use_all(identifier)
    again = Identifier.decode(identifier.encode(syntax), syntax)
    assert [element.tag for element in again] == [element.tag for element in identifier]


@given(st.data())
def test_damaged_data_sets_give_an_identifier_or_the_one_exception(data: st.DataObject) -> None:
    """The same for bytes that nearly are a data set: mutated, cut and spliced."""
    whole = bytearray(ROW)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        identifier = Identifier.decode(cut, EXPLICIT_VR_LITTLE_ENDIAN)
    except IdentifierError:
        return
    use_all(identifier)


def use_all(identifier: Identifier) -> None:
    for element in identifier:
        identifier.values(element.tag)
        identifier.text(element.tag)
        identifier.is_empty(element.tag)
        for item in identifier.items(element.tag):
            use_all(item)
    list(identifier.texts())
    assert identifier.copy() == identifier


def _row() -> bytes:
    ds, item = Dataset(), Dataset()
    item.ScheduledProcedureStepID = "S1"
    ds.SpecificCharacterSet = "ISO_IR 100"
    for keyword, value in SENTINEL.items():
        setattr(ds, keyword, value)
    ds.StudyInstanceUID, ds.Rows = "1.2.3", 512
    ds.ModalitiesInStudy = ["CT", "MR"]
    ds.RequestAttributesSequence = [item]
    return written(ds, EXPLICIT_VR_LITTLE_ENDIAN)


ROW = _row()

# -------------------------------------------------------------------- as values


@pytest.mark.parametrize(
    ("vr", "value", "values"),
    [
        ("LO", b"A \\ B ", ("A", "B")),
        ("LO", b"", ()),
        ("LO", b"  ", ()),
        ("LO", b"A\\", ("A", "")),
        ("UI", b"1.2\0", ("1.2",)),
        ("LT", b" a\\b ", (" a\\b",)),
        ("US", b"\x01\x00\x02\x00\x03", ("1", "2")),
        ("AT", b"\x08\x00\x52\x00", ("00080052",)),
        ("OB", b"\x01\x02", ()),
        ("UN", b"AB", ()),
    ],
)
def test_values_are_read_by_vr(vr: str, value: bytes, values: tuple[str, ...]) -> None:
    """Padding goes, several values part, and bytes without a meaning have none."""
    identifier = Identifier([Element(0x00091001, vr, value)])
    assert identifier.values(0x00091001) == values
    assert identifier.text(0x00091001) == (values[0] if values else "")


def test_elements_are_kept_in_order() -> None:
    """However they are added, elements are yielded and written by ascending tag."""
    identifier = Identifier()
    for tag in (0x0020000D, 0x00080052, 0x00100020):
        identifier.set_text(tag, "1")
    assert [element.tag for element in identifier] == [0x00080052, 0x00100020, 0x0020000D]
    identifier.remove(0x00100020)
    identifier.remove(0x00100020)
    assert len(identifier) == 2


def test_a_copy_changes_by_itself() -> None:
    """Items of a copy are its own."""
    item = Identifier([Element(0x00400009, "SH", b"S1")])
    one = Identifier()
    one.set_items(SEQUENCE, [item])
    two = one.copy()
    two.items(SEQUENCE)[0].set_text(0x00400009, "S2")
    assert one.items(SEQUENCE)[0].text(0x00400009) == "S1"
    assert one != two


def test_a_representation_shows_no_value() -> None:
    """What may end in a log names tags only."""
    shown = repr(Identifier.decode(ROW, EXPLICIT_VR_LITTLE_ENDIAN))
    assert "00100020" in shown
    assert PATIENT_ID not in shown


def test_pydicom_data_sets_are_taken_over_and_given_back() -> None:
    """To a pydicom data set and back again is the same identifier."""
    identifier = Identifier.decode(ROW, EXPLICIT_VR_LITTLE_ENDIAN)
    assert Identifier.from_dataset(identifier.to_dataset()) == identifier
    assert identifier.to_dataset().Rows == 512


# ------------------------------------------------------------- character sets


def named(terms: str, name: str) -> Identifier:
    ds = Dataset()
    ds.SpecificCharacterSet = terms
    ds.add(DataElement(NAME, "PN", name))
    return Identifier.from_dataset(ds)


def test_text_changes_its_character_set_items_included() -> None:
    """Every text beyond ASCII is written anew; what was plain stays as it is."""
    item = Identifier([Element(0x00321060, "LO", "Schädel".encode("latin_1"))])
    given = named("ISO_IR 100", "Grün^A")
    given.set_items(SEQUENCE, [item])
    made = given.with_character_set(("ISO_IR 192",))
    assert made.specific_character_set == ("ISO_IR 192",)
    assert made.text(NAME) == "Grün^A"
    assert made.items(SEQUENCE)[0].text(0x00321060) == "Schädel"
    again = Identifier.decode(made.encode(IMPLICIT_VR_LITTLE_ENDIAN), IMPLICIT_VR_LITTLE_ENDIAN)
    assert again.items(SEQUENCE)[0].text(0x00321060) == "Schädel"
    assert sorted(text.strip() for text in again.texts()) == ["Grün^A", "Schädel"]


def test_what_does_not_fit_raises_or_is_replaced() -> None:
    """Encoding is strict unless asked otherwise; the exception shows no value."""
    given = named("ISO_IR 192", "Люкс^A")
    with pytest.raises(CannotEncode) as refused:
        given.with_character_set(("ISO_IR 100",))
    assert "Люкс" not in str(refused.value)
    assert given.with_character_set(("ISO_IR 100",), replace=True).text(NAME) == "????^A"
    assert CHARACTER_SET not in named("ISO_IR 192", "A^B").with_character_set(())


@pytest.mark.parametrize(
    ("tag", "value", "vr"),
    [(0x00280010, "x", None), (0x00280010, "70000", None), (NAME, "ü", None)],
)
def test_a_value_that_does_not_fit_its_vr_is_refused(tag: int, value: str, vr: str | None) -> None:
    """Neither letters nor too large a number fit US, nor does an umlaut fit ASCII."""
    setting: Callable[..., Any] = Identifier().set_text
    with pytest.raises(CannotEncode) as refused:
        setting(tag, value, vr)
    assert refused.value.__cause__ is None
