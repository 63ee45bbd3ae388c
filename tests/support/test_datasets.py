"""The builder of test data makes what it says."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tests import sentinel
from tests.support.datasets import data_set_bytes, instance, part10, real_files, study

SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)


def test_study_has_series_and_instances_of_one_patient() -> None:
    """A study is as many series and images as asked for, of the sentinel patient."""
    made = study(series=2, instances=3)

    assert len({one.StudyInstanceUID for one in made}) == 1
    assert len({one.SeriesInstanceUID for one in made}) == 2
    assert len({one.SOPInstanceUID for one in made}) == 6
    assert {one.PatientID for one in made} == {sentinel.PATIENT_ID}


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_part10_reads_back_in_the_syntax_asked_for(syntax: str) -> None:
    """A file holds the same elements and pixels, and ends with the data set's bytes."""
    made = instance(5, transfer_syntax_uid=syntax, frames=2, PatientComments="kept")

    content = part10(made)
    read = dcmread(BytesIO(content))

    assert read.file_meta.TransferSyntaxUID == syntax
    assert read.PatientComments == "kept"
    assert read.PixelData == made.PixelData
    assert content.endswith(data_set_bytes(made))


def test_rle_pixels_decode_to_those_of_the_uncompressed_image() -> None:
    """RLE is really encoded: it decodes to what the uncompressed image holds."""
    compressed = dcmread(BytesIO(part10(instance(3, transfer_syntax_uid=RLELossless))))
    plain = dcmread(BytesIO(part10(instance(3))))

    assert (compressed.pixel_array == plain.pixel_array).all()


def test_an_element_given_as_none_is_left_out() -> None:
    """Absence can be asked for."""
    assert "StudyDate" not in instance(StudyDate=None)


def test_real_files_are_many_and_their_data_sets_begin_where_they_say() -> None:
    """The packaged files cover many classes and syntaxes, and each offset is right."""
    files = real_files()

    assert len(files) > 40
    assert len({one.transfer_syntax_uid for one in files}) > 8
    assert len({one.sop_class_uid for one in files}) > 8
    for one in files:
        head = one.data_set_bytes()[:4]
        # Group 0008 comes first (0004 in a few), little or big endian; deflated data has no groups.
        if one.transfer_syntax_uid != DeflatedExplicitVRLittleEndian:
            assert head[:2] in (b"\x08\x00", b"\x00\x08", b"\x04\x00"), one.name
