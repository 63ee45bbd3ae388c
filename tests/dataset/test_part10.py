"""The head of a DICOM file is built as other toolkits read it, and read as they build it."""

from __future__ import annotations

import io
from collections.abc import Callable

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomproxy.dataset.part10 import (
    IMPLEMENTATION_CLASS_UID,
    FileMeta,
    Part10Error,
    build_file_meta,
    read_file_meta,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


def reading(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: data[offset : offset + size]


@pytest.mark.parametrize("sop_instance_uid", ["1.2.3", "1.2.34", "1" * 64])
@pytest.mark.parametrize("ae_title", ["", "NORTH", "NORTHPACS1234567"])
def test_pydicom_reads_what_is_built(sop_instance_uid: str, ae_title: str) -> None:
    """Another toolkit finds our UIDs, our group length, and the data set behind them."""
    head = build_file_meta(CT, sop_instance_uid, EXPLICIT, ae_title)
    data_set = bytes.fromhex("08006000 4353 0200") + b"CT"
    ds = pydicom.dcmread(io.BytesIO(head + data_set))
    assert ds.file_meta.MediaStorageSOPClassUID == CT
    assert ds.file_meta.MediaStorageSOPInstanceUID == sop_instance_uid
    assert ds.file_meta.TransferSyntaxUID == EXPLICIT
    assert ds.file_meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert ds.file_meta.get("SourceApplicationEntityTitle", "") == ae_title
    assert ds.file_meta.FileMetaInformationGroupLength == len(head) - 132 - 12
    assert ds.Modality == "CT"


def test_what_is_built_is_read_back() -> None:
    """Reading gives what building was given, and where the data set begins."""
    head = build_file_meta(CT, "1.2.3", EXPLICIT, "NORTH")
    assert read_file_meta(reading(head + b"rest")) == FileMeta(
        EXPLICIT, len(head), CT, "1.2.3", "NORTH"
    )


def test_what_pydicom_writes_is_read() -> None:
    """A file with private file meta elements and another implementation is understood."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CT, "1.2.3.4", "CT"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.PrivateInformationCreatorUID = "1.2.3.9"
    ds.file_meta.PrivateInformation = b"\1\2\3\4"
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    data = file.getvalue()
    meta = read_file_meta(reading(data))
    assert (meta.sop_class_uid, meta.sop_instance_uid) == (CT, "1.2.3.4")
    assert data[meta.data_set_offset : meta.data_set_offset + 4] == bytes.fromhex("08001600")


def test_wrong_group_length_does_not_mislead() -> None:
    """The elements say where the group ends, whatever its length element claims."""
    head = bytearray(build_file_meta(CT, "1.2.3", EXPLICIT))
    head[140:144] = b"\x01\0\0\0"
    assert read_file_meta(reading(bytes(head))).data_set_offset == len(head)


@pytest.mark.parametrize("uid", ["", "1" * 65, "1.2\\3", "1.2\0", "1.2.\u00fc", "1.2\n"])
def test_uid_that_cannot_be_written_is_refused(uid: str) -> None:
    """No UID may break the file it names, and the refusal does not repeat it."""
    with pytest.raises(ValueError) as caught:
        build_file_meta(CT, uid, EXPLICIT)
    assert str(caught.value) == "not a UID"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(132),
        bytes(128) + b"DICM",
        build_file_meta(CT, "1.2.3", EXPLICIT)[:-3],
        bytes(128) + b"DICM" + bytes.fromhex("0200 0100 4f42 0000 ffffffff"),
        bytes(128) + b"DICM" + bytes.fromhex("0200 0100 4f42 0000 00"),
    ],
)
def test_what_is_no_file_is_refused(data: bytes) -> None:
    """Missing prefix, cut-off or endless elements and a missing syntax are one error."""
    with pytest.raises(Part10Error):
        read_file_meta(reading(data))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_result_or_the_one_error(data: bytes) -> None:
    """Nothing but FileMeta or Part10Error ever comes out."""
    try:
        meta = read_file_meta(reading(bytes(128) + b"DICM" + data))
    except Part10Error:
        return
    assert meta.data_set_offset <= 132 + len(data)
