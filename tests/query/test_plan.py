"""The region sees the questions that a patient's care needs, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    INSTANCE_AVAILABILITY,
    PATIENT_ID,
    RETRIEVE_AE_TITLE,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    SPECIFIC_CHARACTER_SET,
    STUDY_INSTANCE_UID,
    Root,
)
from dicomproxy.ports import Location
from dicomproxy.query.plan import QueryRefused, plan, source_identifier, validate
from tests.query.builders import caller, identifier, request

SOURCES = ("north", "south")
NAME = 0x00100010


@pytest.mark.parametrize(
    ("level", "keys", "asked"),
    [
        ("STUDY", {"PatientID": "P1"}, True),
        ("STUDY", {"PatientID": " P1 "}, True),
        ("STUDY", {"PatientID": "P1", "PatientName": "D*"}, True),
        ("STUDY", {"PatientID": "P1", "AccessionNumber": "A1"}, True),
        ("STUDY", {"StudyInstanceUID": "1.2"}, True),
        ("STUDY", {"StudyInstanceUID": ["1.2", "1.3"]}, True),
        ("STUDY", {"StudyInstanceUID": "1.2", "PatientID": "*"}, True),
        ("STUDY", {}, False),
        ("STUDY", {"PatientID": ""}, False),
        ("STUDY", {"PatientID": "*"}, False),
        ("STUDY", {"PatientID": "P?"}, False),
        ("STUDY", {"PatientID": "P1*"}, False),
        ("STUDY", {"PatientID": ["P1", "P2"]}, False),
        ("STUDY", {"StudyInstanceUID": "1.2.*"}, False),
        ("STUDY", {"StudyInstanceUID": "*"}, False),
        ("STUDY", {"PatientName": "DOE^JOHN"}, False),
        ("STUDY", {"AccessionNumber": "A1"}, False),
        ("STUDY", {"StudyDate": "20200101", "ModalitiesInStudy": "CT"}, False),
        ("PATIENT", {"PatientID": "P1"}, True),
        ("PATIENT", {"PatientName": "DOE*"}, False),
        ("PATIENT", {"PatientID": "*"}, False),
        ("PATIENT", {}, False),
        ("SERIES", {"StudyInstanceUID": "1.2"}, True),
        ("SERIES", {"PatientID": "P1"}, False),
        ("SERIES", {"SeriesInstanceUID": "1.2.3"}, False),
        ("SERIES", {"StudyInstanceUID": "*", "PatientID": "P1"}, False),
        ("IMAGE", {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3"}, True),
        ("IMAGE", {"SOPInstanceUID": "1.2.3.4"}, False),
    ],
)
@pytest.mark.parametrize("root", list(Root))
def test_who_is_asked(root: Root, level: str, keys: dict[str, Any], asked: bool) -> None:
    """One patient or named studies go to every visible source; all else stays in the house."""
    root = Root.PATIENT if level == "PATIENT" else root
    decided = plan(request(root, level, **keys), caller(), SOURCES)
    assert [leg.source for leg in decided.legs] == (list(SOURCES) if asked else [])
    assert bool(decided.local_only) is not asked


@pytest.mark.parametrize(
    ("changes", "available", "asked"),
    [
        ({"sources": ("south", "north")}, SOURCES, ["south", "north"]),
        ({"sources": ("south",)}, SOURCES, ["south"]),
        ({"sources": ("south", "gone")}, SOURCES, ["south"]),
        ({"sources": ("local", "south")}, ("local", *SOURCES), ["south"]),
        ({"sources": ()}, SOURCES, []),
        ({"is_source": True}, SOURCES, []),
        ({}, (), []),
    ],
)
def test_a_caller_reaches_only_its_own_sources(
    changes: dict[str, Any], available: tuple[str, ...], asked: list[str]
) -> None:
    """Sources are asked in the caller's order; a caller that is a source reaches none."""
    decided = plan(request(PatientID="P1"), caller(**changes), available)
    assert [leg.source for leg in decided.legs] == asked


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        ([], ["north", "south"]),
        ([("north", "P1")], ["north"]),
        ([("local", "P1"), ("south", "P1")], ["south"]),
        ([("local", "P1")], []),
        ([("hidden", "P1")], ["north", "south"]),
        ([("hidden", "P1"), ("local", "P1")], []),
        ([("local", "P1"), ("north", "P2"), ("south", "")], ["south"]),
    ],
)
def test_series_are_asked_for_where_the_study_is(
    known: list[tuple[str, str]], asked: list[str]
) -> None:
    """Holders that the caller may see are asked; one that contradicts the patient is not."""
    seen = {"1.2": [Location("1.2", source, patient) for source, patient in known]}
    decided = plan(request(level="SERIES", StudyInstanceUID="1.2"), caller(), SOURCES, seen)
    assert [leg.source for leg in decided.legs] == asked
    contradicted = [("1.2", "north")] if ("north", "P2") in known else []
    assert list(decided.conflicts) == contradicted


def test_series_of_several_studies_are_asked_for_one_by_one() -> None:
    """Above the level an archive takes one value, so each study is a question of its own."""
    seen = {"1.2": [Location("1.2", "north", "P1")]}
    asked = request(level="SERIES", StudyInstanceUID=["1.2", "1.3", "1.2"])
    north, south = plan(asked, caller(), SOURCES, seen).legs
    assert (north.study_instance_uids, south.study_instance_uids) == (("1.2", "1.3"), ("1.3",))
    questions = [query.identifier.values(STUDY_INSTANCE_UID) for query in north.queries]
    assert questions == [("1.2",), ("1.3",)]
    # A patient has fewer studies than a study has images, of which none may be cut off.
    assert all((query.max_matches or 0) > 10_000 for query in north.queries)
    assert plan(request(PatientID="P1"), caller(), SOURCES).legs[0].queries[0].max_matches is None


@pytest.mark.parametrize(
    ("root", "level", "message"),
    [
        (Root.STUDY, None, "missing"),
        (Root.STUDY, "", "missing"),
        (Root.STUDY, "PATIENT", "not one of this model"),
        (Root.PATIENT, "study", "not one of this model"),
        (Root.PATIENT, "WORKLIST", "not one of this model"),
    ],
)
def test_a_request_without_a_level_is_refused(root: Root, level: str | None, message: str) -> None:
    """A900 names Query/Retrieve Level as what offends."""
    keys = {} if level is None else {"QueryRetrieveLevel": level}
    with pytest.raises(QueryRefused, match=message) as refused:
        validate(root, identifier(PatientID="P1", **keys))
    assert (refused.value.status, refused.value.offending_element) == (0xA900, 0x00080052)


@pytest.mark.parametrize(
    ("root", "level", "keys", "hierarchical"),
    [
        (Root.STUDY, "STUDY", {}, True),
        (Root.PATIENT, "STUDY", {}, False),
        (Root.PATIENT, "STUDY", {"PatientID": "P1"}, True),
        (Root.PATIENT, "STUDY", {"PatientID": "P*"}, False),
        (Root.STUDY, "SERIES", {"StudyInstanceUID": "1.2"}, True),
        (Root.STUDY, "SERIES", {"StudyInstanceUID": ["1.2", "1.3"]}, False),
        (Root.STUDY, "IMAGE", {"StudyInstanceUID": "1.2"}, False),
    ],
)
def test_a_request_is_hierarchical_if_each_key_above_has_one_value(
    root: Root, level: str, keys: dict[str, Any], hierarchical: bool
) -> None:
    """What breaks the baseline is recognised, and still not refused."""
    assert request(root, level, **keys).hierarchical is hierarchical


def test_sources_are_asked_for_what_the_merge_needs() -> None:
    """Unique keys and the patient are requested; what is ours to say is not."""
    asked = source_identifier(
        request(
            PatientID="P1", RetrieveAETitle="", InstanceAvailability="", SpecificCharacterSet=""
        )
    )
    assert STUDY_INSTANCE_UID in asked
    assert asked.text(PATIENT_ID) == "P1"
    for tag in (RETRIEVE_AE_TITLE, INSTANCE_AVAILABILITY, SPECIFIC_CHARACTER_SET):
        assert tag not in asked


def test_a_study_uid_alone_asks_for_its_patient() -> None:
    """The identity check needs the Patient ID even where nobody asked for it."""
    asked = source_identifier(request(StudyInstanceUID="1.2"))
    assert PATIENT_ID in asked
    assert asked.is_empty(PATIENT_ID)


def test_each_level_asks_for_its_unique_keys() -> None:
    """Below STUDY level the keys above are filled in or requested."""
    asked = source_identifier(request(level="IMAGE", StudyInstanceUID=["1.2", "1.3"]), "1.3")
    assert asked.values(STUDY_INSTANCE_UID) == ("1.3",)
    assert SERIES_INSTANCE_UID in asked
    assert SOP_INSTANCE_UID in asked
    assert PATIENT_ID not in asked


def test_keys_beyond_ascii_are_not_matched_at_sources() -> None:
    """A name in a character set that an archive may not know is requested, not matched there."""
    asked = request(
        PatientID="P1",
        SpecificCharacterSet="ISO_IR 100",
        PatientName="Grün*",
        StudyDescription="HEAD*",
        RequestAttributesSequence=[],
    )
    before = asked.identifier.copy()
    sent = source_identifier(asked)
    assert NAME in sent
    assert sent.is_empty(NAME)
    assert sent.text(0x00081030) == "HEAD*"
    assert sent.specific_character_set == ("ISO_IR 100",)
    assert Identifier.decode(sent.encode("1.2.840.10008.1.2"), "1.2.840.10008.1.2") is not None
    assert asked.identifier == before


def test_an_issuer_is_not_matched_at_sources() -> None:
    """Many archives leave the issuer empty; a row that names another one is withheld here."""
    sent = source_identifier(request(PatientID="P1", IssuerOfPatientID="HOSPITAL"))
    assert sent.is_empty(0x00100021)
    assert 0x00100021 in sent


def test_a_refusal_shows_no_value() -> None:
    """What is refused may hold anything; the exception repeats none of it."""
    with pytest.raises(QueryRefused) as refused:
        validate(Root.STUDY, identifier(QueryRetrieveLevel="SENTINELID4711"))
    assert "SENTINEL" not in str(refused.value)
