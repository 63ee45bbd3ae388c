"""Matching follows PS3.4 C.2.2.2, is lenient where archives are, and never fails."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.levels import Level
from dicomproxy.query.match import like, matches, same_patient
from tests.query.builders import identifier


def item(**elements: Any) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    ("keyword", "key", "value", "expected"),
    [
        # single value
        ("Modality", "CT", "CT", True),
        ("Modality", "CT", "MR", False),
        ("StudyID", "abc", "ABC", False),
        ("StudyDescription", "HEAD", "HEAD ", True),
        ("AccessionNumber", "A1", "", False),
        ("SeriesNumber", "7", "07", True),
        ("SeriesNumber", "7", "70", False),
        ("Rows", 512, 512, True),
        # universal
        ("StudyID", "", "X", True),
        ("StudyID", "*", "", True),
        ("PatientName", "**", "DOE", True),
        # list of UID
        ("StudyInstanceUID", ["1.2", "1.3"], "1.3", True),
        ("StudyInstanceUID", ["1.2", "1.3"], "1.4", False),
        ("StudyInstanceUID", "1.2", "1.23", False),
        # wild card
        ("StudyDescription", "HE*", "HEAD", True),
        ("StudyDescription", "H?AD", "HEAD", True),
        ("StudyDescription", "H?", "HEAD", False),
        ("StudyDescription", "*EA?*", "HEAD", True),
        ("StudyDescription", "[HEAD]", "HEAD", False),
        # several values: any of them
        ("ModalitiesInStudy", "CT", ["PT", "CT"], True),
        ("ModalitiesInStudy", ["CT", "MR"], ["SR", "MR"], True),
        ("ModalitiesInStudy", ["CT", "MR"], ["US"], False),
        # names, in any case and with any accents
        ("PatientName", "doe^john", "DOE^JOHN", True),
        ("PatientName", "DOE^JOHN", "DOE^JOHN^^^", True),
        ("PatientName", "DOE", "DOE^JOHN", False),
        ("PatientName", "DOE*", "DOE^JOHN", True),
        ("PatientName", "*^JOHN", "DOE^JOHN", True),
        ("PatientName", "DOE^J?", "DOE^JOHN", False),
        ("PatientName", "Muller*", "MÜLLER^A", True),
        # dates
        ("StudyDate", "20200131", "20200131", True),
        ("StudyDate", "20200131", "20200130", False),
        ("StudyDate", "20200101-20200131", "20200131", True),
        ("StudyDate", "20200101-20200131", "20200201", False),
        ("StudyDate", "20200101-", "20200101", True),
        ("StudyDate", "20200102-", "20200101", False),
        ("StudyDate", "-20200101", "19990101", True),
        ("StudyDate", "-20200101", "20200102", False),
        ("StudyDate", "-", "20200102", True),
        ("StudyDate", "20200101-", "", False),
        # times
        ("StudyTime", "1030", "103000", True),
        ("StudyTime", "103000", "103000.000", True),
        ("StudyTime", "1030", "103001", False),
        ("StudyTime", "10-12", "125959.5", True),
        ("StudyTime", "10-12", "130000", False),
        ("StudyTime", "2200-0200", "230000", False),
        # date-times
        ("AcquisitionDateTime", "20200101120000", "20200101120000", True),
        ("AcquisitionDateTime", "2020", "20200630", True),
        ("AcquisitionDateTime", "20200101-20200131", "20200131235959.9", True),
        ("AcquisitionDateTime", "20200101-20200131", "20200201", False),
        ("AcquisitionDateTime", "20200101-", "20200101", True),
        ("AcquisitionDateTime", "-202001", "20200131", True),
        ("AcquisitionDateTime", "20200101120000+0100", "20200101110000+0000", True),
        ("AcquisitionDateTime", "20200101120000-0500", "20200101170000+0000", True),
        ("AcquisitionDateTime", "20200101120000-0500", "20200101120000+0000", False),
        ("AcquisitionDateTime", "00020101+1400-", "00020101", True),
    ],
)
def test_matching(keyword: str, key: Any, value: Any, expected: bool) -> None:
    """One key against one attribute, by the kind of matching that its VR allows."""
    keys, answer = identifier(**{keyword: key}), identifier(**{keyword: value})
    assert matches(answer, keys, Level.SERIES) is expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("Yamada*", "Yamada^Tarou=山田^太郎", True),
        ("山田^太郎", "Yamada^Tarou=山田^太郎", True),
        ("=山田*", "Yamada^Tarou=山田^太郎", True),
        ("Yamada*=田*", "Yamada^Tarou=山田^太郎", False),
        ("=山田*", "Yamada^Tarou", False),
    ],
)
def test_names_match_by_component_group(key: str, value: str, expected: bool) -> None:
    """A name may be known in several scripts, and the sides may differ in character set."""
    keys = identifier("ISO_IR 192", PatientName=key)
    answer = identifier("ISO_IR 192", PatientName=value)
    assert matches(answer, keys, Level.SERIES) is expected


def test_names_match_across_character_sets() -> None:
    """Each side is read in its own character set."""
    keys = identifier("ISO_IR 100", PatientName="GRÜN*")
    assert matches(identifier("ISO_IR 192", PatientName="Grün^A"), keys, Level.SERIES)


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        ([], [item(ScheduledProcedureStepID="1")], True),
        ([item(ScheduledProcedureStepID="")], [], True),
        ([item(ScheduledProcedureStepID="1")], [], False),
        (
            [item(ScheduledProcedureStepID="1")],
            [item(ScheduledProcedureStepID="2"), item(ScheduledProcedureStepID="1")],
            True,
        ),
        (
            [item(ScheduledProcedureStepID="1", RequestedProcedureID="9")],
            [
                item(ScheduledProcedureStepID="1", RequestedProcedureID="8"),
                item(ScheduledProcedureStepID="2", RequestedProcedureID="9"),
            ],
            False,
        ),
    ],
)
def test_sequences_match_if_one_item_matches_every_key(
    asked: list[Dataset], found: list[Dataset], expected: bool
) -> None:
    """A sequence without keys is universal; all keys must match within one item."""
    keys = identifier(RequestAttributesSequence=asked)
    answer = identifier(RequestAttributesSequence=found)
    assert matches(answer, keys, Level.SERIES) is expected


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ({"PatientID": "P1"}, True),
        ({"PatientID": "P1 "}, True),
        ({"PatientID": "p1"}, False),
        ({"PatientID": "P2"}, False),
        ({"PatientID": ""}, None),
        ({}, None),
        ({"PatientID": "P1", "IssuerOfPatientID": "A"}, True),
        ({"PatientID": "P1", "IssuerOfPatientID": ""}, True),
        ({"PatientID": "P1", "IssuerOfPatientID": "B"}, False),
    ],
)
def test_nothing_vouches_for_a_patient_who_is_not_named(
    level: Level, answer: dict[str, str], known: bool | None
) -> None:
    """A Patient ID is compared exactly; above SERIES it has to be there."""
    keys = identifier(PatientID="P1", IssuerOfPatientID="A")
    expected = level in (Level.SERIES, Level.IMAGE) if known is None else known
    assert same_patient(identifier(**answer), keys, level) is expected
    assert matches(identifier(**answer), keys, level) is expected


def test_what_an_archive_does_not_support_is_not_held_against_it() -> None:
    """An attribute that is not in the answer was ignored as a key; the row stands."""
    keys = identifier(StudyDescription="HEAD", RetrieveAETitle="X", QueryRetrieveLevel="STUDY")
    assert matches(identifier(RetrieveAETitle="Y"), keys, Level.STUDY)


@given(st.text("ab", max_size=12), st.text("ab*?", max_size=12))
def test_wild_cards_match_as_a_plain_definition_does(value: str, pattern: str) -> None:
    """The scan agrees with the definition, written as recursion."""

    def defined(pattern: str, value: str) -> bool:
        if not pattern:
            return not value
        if pattern[0] == "*":
            return any(defined(pattern.lstrip("*"), value[at:]) for at in range(len(value) + 1))
        return bool(value) and pattern[0] in ("?", value[0]) and defined(pattern[1:], value[1:])

    assert like(pattern, value) is defined(pattern, value)


def test_a_pattern_of_stars_takes_no_time() -> None:
    """A hostile pattern costs a product of lengths, not an exponential."""
    assert not like("a*" * 200 + "b", "a" * 4000)


ANY_ELEMENT = st.builds(
    lambda tag_vr, value: Element(*tag_vr, value),
    st.sampled_from(
        [
            (0x00080020, "DA"),
            (0x00080030, "TM"),
            (0x0008002A, "DT"),
            (0x00100010, "PN"),
            (0x00100020, "LO"),
            (0x0020000D, "UI"),
            (0x00200011, "IS"),
            (0x00280010, "US"),
            (0x00080061, "CS"),
            (0x00091001, "UN"),
            (0x00080005, "CS"),
        ]
    ),
    st.binary(max_size=24) | st.from_regex(rb"[0-9.+\-*?^=\\ ]{0,24}", fullmatch=True),
)


@given(st.lists(ANY_ELEMENT), st.lists(ANY_ELEMENT), st.sampled_from(Level))
def test_any_values_whatever_give_an_answer(
    asked: list[Element], found: list[Element], level: Level
) -> None:
    """Matching returns true or false for whatever archives and workstations send."""
    assert matches(Identifier(found), Identifier(asked), level) in (True, False)


@given(st.lists(ANY_ELEMENT), st.lists(ANY_ELEMENT))
def test_universal_keys_match_everything(asked: list[Element], found: list[Element]) -> None:
    """Keys without values only request; they never hide a row."""
    keys = Identifier([element._replace(value=b"") for element in asked])
    assert matches(Identifier(found), keys, Level.STUDY)
