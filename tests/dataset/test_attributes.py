"""Attributes are found by name, and their values have a form."""

from __future__ import annotations

import pytest

from dicomproxy.dataset.attributes import LONGEST, attribute, fits, may_be_changed


@pytest.mark.parametrize(
    "name", ["InstitutionName", "00080080", "0008,0080", "(0008,0080)", "(0008,0080"]
)
def test_an_attribute_is_found_by_keyword_or_tag(name: str) -> None:
    """Each of the usual spellings names it."""
    assert attribute(name) == (0x00080080, "LO", "InstitutionName")


@pytest.mark.parametrize(
    "name", ["", "institutionname", "Institution", "00090010", "00080000F", "99990000"]
)
def test_what_is_no_attribute_of_the_standard_is_not_found(name: str) -> None:
    """Private elements and misspelt keywords are none."""
    assert attribute(name) is None


@pytest.mark.parametrize(
    ("vr", "text", "fitting"),
    [
        ("LO", "x" * 64, True),
        ("LO", "x" * 65, False),
        ("LO", "x" * 64 + "\\" + "y" * 64, True),
        ("LO", "tab\there", False),
        ("ST", "a\\" + "b" * 70, True),
        ("SH", "x" * 17, False),
        ("CS", "CHEST", True),
        ("CS", "Chest", False),
        ("CS", "", True),
        ("DA", "20240131", True),
        ("DA", "2024-01-31", False),
        ("TM", "0930", True),
        ("TM", "9:30", False),
        ("IS", "-12", True),
        ("IS", "1.5", False),
        ("DS", "1.5e3", True),
        ("DS", "x", False),
        ("AS", "012Y", True),
        ("AS", "12", False),
        ("PN", "A^B^C^D^E=A^B=A", True),
        ("PN", "x" * 64 + "=" + "y" * 64, True),
        ("PN", "x" * 65, False),
        ("PN", "A=B=C=D", False),
        ("PN", "A^B^C^D^E^F", False),
        ("AE", "READING 1", True),
        ("AE", "RÖNTGEN", False),
        ("US", "1", False),
        ("SQ", "", False),
    ],
)
def test_a_value_fits_its_vr_or_does_not(vr: str, text: str, fitting: bool) -> None:
    """Length, characters and form are those of PS3.5 6.2, value by value."""
    assert fits(vr, text) is fitting


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("InstitutionName", True),
        ("StudyDescription", True),
        ("BodyPartExamined", True),
        ("PatientComments", True),
        ("PatientID", False),
        ("PatientName", False),
        ("IssuerOfPatientID", False),
        ("AccessionNumber", False),
        ("SpecificCharacterSet", False),
        ("StudyInstanceUID", False),
        ("SOPClassUID", False),
        ("Rows", False),
        ("Laterality", False),
        ("ImageOrientationPatient", False),
        ("SliceThickness", False),
        ("PatientPosition", False),
        ("PhotometricInterpretation", False),
        ("PixelData", False),
        ("ProcedureCodeSequence", False),
        ("ModifyingSystem", False),
    ],
)
def test_rules_stay_off_identity_and_pixels(name: str, allowed: bool) -> None:
    """What tells patients or objects apart, or describes pixels, is not for a site's rules."""
    found = attribute(name)
    assert found is not None
    assert may_be_changed(found.tag, found.vr) is allowed


def test_all_vrs_of_text_have_a_length() -> None:
    """A rule can cut every value it writes."""
    assert min(LONGEST.values()) > 0
