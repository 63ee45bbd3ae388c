"""Rows are written once each, pruned, and in words that the workstation understands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    INSTANCE_AVAILABILITY,
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    RETRIEVE_AE_TITLE,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    SPECIFIC_CHARACTER_SET,
    STUDY_INSTANCE_UID,
    Root,
)
from dicomproxy.ports import LocalAnswer
from dicomproxy.query.merge import Merge, Verdict
from dicomproxy.query.rows import COUNTS, Answer, Style, remote_row
from tests.query.builders import (
    EXPLICIT,
    IMPLICIT,
    identifier,
    local_answer,
    request,
    study_row,
)

NAME = 0x00100010
STUDY_DATE = 0x00080020
STUDY_DESCRIPTION = 0x00081030
INSTANCES = 0x00201208
RESERVED = {QUERY_RETRIEVE_LEVEL, RETRIEVE_AE_TITLE, INSTANCE_AVAILABILITY}


def style(charset: tuple[str, ...] = (), syntax: str = EXPLICIT, **asked: Any) -> Style:
    root, level = asked.pop("root", Root.STUDY), asked.pop("level", "STUDY")
    return Style(request(root, level, **asked), syntax, "DICOMPROXY", charset)


def merge(**asked: Any) -> Merge:
    return Merge(style(**(asked or {"StudyInstanceUID": ""})), "NEARLINE", lambda _study: False)


def read(answer: Answer | None, syntax: str = EXPLICIT) -> Identifier:
    assert answer is not None
    return Identifier.decode(answer.data, syntax)


def tags(row: Identifier) -> set[int]:
    return {element.tag for element in row}


# ---------------------------------------------------------------- remote rows


def test_a_remote_row_holds_what_was_asked_for_and_no_more() -> None:
    """Attributes nobody asked for are pruned; unique keys and origin are added."""
    row = study_row("1.2", PatientName="A^B", StudyDescription="HEAD", InstitutionName="X")
    made = read(remote_row(style(StudyDescription=""), row, availability="NEARLINE"))
    assert tags(made) == {STUDY_INSTANCE_UID, STUDY_DESCRIPTION} | RESERVED
    assert made.text(QUERY_RETRIEVE_LEVEL) == "STUDY"
    assert made.text(RETRIEVE_AE_TITLE) == "DICOMPROXY"


@pytest.mark.parametrize(
    ("root", "level", "unique"),
    [
        (Root.PATIENT, "PATIENT", {PATIENT_ID}),
        (Root.PATIENT, "STUDY", {PATIENT_ID, STUDY_INSTANCE_UID}),
        (Root.STUDY, "SERIES", {STUDY_INSTANCE_UID, SERIES_INSTANCE_UID}),
        (Root.STUDY, "IMAGE", {STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SOP_INSTANCE_UID}),
    ],
)
def test_every_unique_key_down_to_the_level_is_returned(
    root: Root, level: str, unique: set[int]
) -> None:
    """Unique keys are there whether or not they were asked for."""
    row = identifier(
        PatientID="P1", StudyInstanceUID="1", SeriesInstanceUID="1.1", SOPInstanceUID="1.1.1"
    )
    made = read(remote_row(style(root=root, level=level), row))
    assert tags(made) - RESERVED == unique
    assert not any(made.is_empty(tag) for tag in unique)
    # A patient is retrieved from nowhere in particular.
    assert (RETRIEVE_AE_TITLE in made) is (level != "PATIENT")


def test_unique_keys_that_a_source_leaves_out_are_those_asked_for() -> None:
    """Below STUDY level archives often answer without the keys above."""
    asked = style(root=Root.PATIENT, level="SERIES", PatientID="P1", StudyInstanceUID=["1", "2"])
    made = read(remote_row(asked, identifier(SeriesInstanceUID="2.1"), study_instance_uid="2"))
    assert made.text(PATIENT_ID) == "P1"
    assert made.text(STUDY_INSTANCE_UID) == "2"


def test_required_keys_are_empty_and_unsupported_ones_absent() -> None:
    """What a source left out: a required key is unknown, an optional one unsupported (FF01)."""
    answer = remote_row(style(StudyDate="", StudyDescription=""), study_row("1.2"))
    made = read(answer)
    assert made.is_empty(STUDY_DATE)
    assert STUDY_DATE in made
    assert STUDY_DESCRIPTION not in made
    assert answer.status == 0xFF01
    assert remote_row(style(StudyDate=""), study_row("1.2")).status == 0xFF00


def test_sequences_are_pruned_item_by_item() -> None:
    """A request for one key of a sequence does not return its neighbours."""
    asked, found = Dataset(), Dataset()
    asked.ScheduledProcedureStepID = ""
    found.ScheduledProcedureStepID, found.RequestedProcedureID = "S1", "R1"
    row = identifier(SeriesInstanceUID="1.1", RequestAttributesSequence=[found])
    made = read(
        remote_row(
            style(level="SERIES", StudyInstanceUID="1", RequestAttributesSequence=[asked]), row
        )
    )
    (item,) = made.items(0x00400275)
    assert tags(item) == {0x00400009}
    assert item.text(0x00400009) == "S1"


@pytest.mark.parametrize(
    ("request_terms", "site_terms", "name", "written"),
    [
        ("", (), "PLAIN^A", ()),
        ("ISO_IR 100", (), "PLAIN^A", ()),
        ("ISO_IR 100", (), "Grün^A", ("ISO_IR 100",)),
        ("ISO_IR 100", (), "Люкс^Б", ("ISO_IR 192",)),
        ("", (), "Grün^A", ("ISO_IR 192",)),
        ("ISO_IR 192", ("ISO_IR 100",), "Grün^A", ("ISO_IR 100",)),
    ],
)
def test_remote_text_is_written_where_every_value_fits(
    request_terms: str, site_terms: tuple[str, ...], name: str, written: tuple[str, ...]
) -> None:
    """The request's character set, else UTF-8, unless the site sets one; none if none is needed."""
    row = study_row("1.2", charset="ISO_IR 192", PatientName=name)
    made = read(
        remote_row(
            style(charset=site_terms, PatientName="", SpecificCharacterSet=request_terms), row
        )
    )
    assert made.values(SPECIFIC_CHARACTER_SET) == written
    assert (SPECIFIC_CHARACTER_SET in made) is bool(written)
    assert made.text(NAME) == name


def test_what_a_workstation_without_unicode_cannot_read_is_replaced() -> None:
    """A site's character set is kept to, even where a letter gets lost."""
    row = study_row("1.2", charset="ISO_IR 192", PatientName="Grün^Л")
    made = read(remote_row(style(charset=("ISO_IR 100",), PatientName=""), row))
    assert made.text(NAME) == "Grün^?"


def test_a_remote_row_is_written_in_the_transfer_syntax_of_the_request() -> None:
    """Whatever the source used, the workstation gets what it negotiated."""
    made = read(remote_row(style(syntax=IMPLICIT), study_row("1.2")), IMPLICIT)
    assert made.text(STUDY_INSTANCE_UID) == "1.2"


# ----------------------------------------------------------------- local rows


def test_a_local_row_is_relayed_as_bytes() -> None:
    """Nothing in it has to change, so nothing does, odd as its encoding may be."""
    data = local_answer(study_row("1.2", RetrieveAETitle="DICOMPROXY")).data
    odd = data + identifier(InstitutionName="X").encode(EXPLICIT)  # out of order
    for status in (0xFF00, 0xFF01):
        sent = merge().local(LocalAnswer(status, odd, EXPLICIT)).answer
        assert sent == Answer(status, odd)


def test_a_local_row_has_no_empty_instance_availability() -> None:
    """The element is never of zero length, so an archive that does not know says nothing."""
    given = identifier(StudyInstanceUID="1.2", InstanceAvailability="")
    made = read(merge().local(local_answer(given)).answer)
    assert INSTANCE_AVAILABILITY not in made
    held = identifier(StudyInstanceUID="1.3", InstanceAvailability="ONLINE")
    assert read(merge().local(local_answer(held)).answer).text(INSTANCE_AVAILABILITY) == "ONLINE"


@pytest.mark.parametrize(
    ("level", "row", "shown"),
    [
        ("STUDY", {"RetrieveAETitle": "LOCALPACS"}, "DICOMPROXY"),
        ("STUDY", {"RetrieveAETitle": ["DICOMPROXY", "LOCALPACS"]}, "DICOMPROXY"),
        ("STUDY", {"RetrieveAETitle": ""}, "DICOMPROXY"),
        ("IMAGE", {"RetrieveAETitle": ""}, "DICOMPROXY"),
    ],
)
def test_a_local_row_is_retrieved_through_the_called_title(
    level: str, row: dict[str, Any], shown: str
) -> None:
    """Only Retrieve AE Title changes, and it is never empty."""
    unique = {"StudyInstanceUID": "1.2", "SOPInstanceUID": "1.2.3"}
    given = identifier(**unique, **row, InstitutionName="X")
    made = read(merge(level=level).local(local_answer(given)).answer)
    assert made.text(RETRIEVE_AE_TITLE) == shown
    made.remove(RETRIEVE_AE_TITLE)
    given.remove(RETRIEVE_AE_TITLE)
    assert made == given


def test_local_text_is_rewritten_only_where_the_site_says_so() -> None:
    """A workstation's own character set holds for local rows too."""
    given = study_row("1.2", charset="ISO_IR 192", PatientName="Grün^A")
    one = merge(charset=("ISO_IR 100",)).local(local_answer(given)).answer
    assert read(one).values(SPECIFIC_CHARACTER_SET) == ("ISO_IR 100",)
    assert read(one).text(NAME) == "Grün^A"
    assert merge().local(local_answer(given)).answer == Answer(0xFF00, given.encode(EXPLICIT))


@pytest.mark.parametrize(("syntax", "relayed"), [(EXPLICIT, True), (IMPLICIT, False)])
def test_a_local_row_that_cannot_be_read_is_relayed_as_it_is(syntax: str, relayed: bool) -> None:
    """What is wrong with it is between the workstation and its PACS."""
    row = merge().local(LocalAnswer(0xFF00, b"\xff" * 9, syntax))
    assert not row.readable
    assert row.answer == (Answer(0xFF00, b"\xff" * 9) if relayed else None)


# ------------------------------------------------------------------- merging


def test_local_wins_over_a_row_that_is_held() -> None:
    """A local row takes the place of the remote one and keeps its own values."""
    it = merge(StudyDescription="")
    assert it.remote("north", study_row("1.2", StudyDescription="north")) is Verdict.ACCEPTED
    sent = it.local(local_answer(study_row("1.2", StudyDescription="local")))
    assert read(sent.answer).text(STUDY_DESCRIPTION) == "local"
    assert list(it.release()) == []
    assert it.remote("south", study_row("1.2")) is Verdict.DUPLICATE


def test_what_was_sent_cannot_be_taken_back() -> None:
    """A local row that comes after the remote one went out would be a second of its kind."""
    it = merge()
    it.remote("north", study_row("1.2"))
    assert len(list(it.release())) == 1
    assert it.local(local_answer(study_row("1.2"))).answer is None
    assert list(it.release()) == []


def test_counts_of_what_two_sources_hold_are_left_out() -> None:
    """Workstations take the count as proof of completeness, and neither source knows it."""
    it = merge(NumberOfStudyRelatedInstances="", StudyInstanceUID="")
    it.remote("north", study_row("1.2", NumberOfStudyRelatedInstances="10"))
    it.remote("north", study_row("1.3", NumberOfStudyRelatedInstances="10"))
    it.remote("south", study_row("1.2", NumberOfStudyRelatedInstances="12"))
    shared, alone = (read(answer) for answer in it.release())
    assert INSTANCES in COUNTS
    assert INSTANCES in shared
    assert shared.is_empty(INSTANCES)
    assert alone.text(INSTANCES) == "10"


def test_one_patient_is_shown_once_with_the_local_record() -> None:
    """At PATIENT level a remote record of a known patient is no second patient."""
    it = merge(root=Root.PATIENT, level="PATIENT", PatientID="P1")
    it.remote("north", identifier(PatientID="P1", PatientName="NORTH"))
    local = [identifier(PatientID="P1", IssuerOfPatientID=issuer) for issuer in ("A", "B")]
    assert all(it.local(local_answer(row)).answer is not None for row in local)
    assert list(it.release()) == []


@pytest.mark.parametrize(
    ("asked", "row", "study", "verdict"),
    [
        ({"PatientID": "P1"}, {"StudyInstanceUID": "1", "PatientID": "P1"}, "", Verdict.ACCEPTED),
        ({"PatientID": "P1"}, {"StudyInstanceUID": "1", "PatientID": "P2"}, "", Verdict.WITHHELD),
        ({"PatientID": "P1"}, {"StudyInstanceUID": "1"}, "", Verdict.WITHHELD),
        ({"PatientID": "P1"}, {"PatientID": "P1"}, "", Verdict.MALFORMED),
        (
            {"PatientID": "P1", "ModalitiesInStudy": "CT"},
            {"StudyInstanceUID": "1", "PatientID": "P1", "ModalitiesInStudy": "MR"},
            "",
            Verdict.NOT_MATCHING,
        ),
        ({"StudyInstanceUID": "1"}, {"StudyInstanceUID": "2"}, "", Verdict.NOT_MATCHING),
        (
            {"level": "SERIES", "StudyInstanceUID": "1"},
            {"SeriesInstanceUID": "1.1"},
            "1",
            Verdict.ACCEPTED,
        ),
        (
            {"level": "SERIES", "StudyInstanceUID": "1"},
            {"SeriesInstanceUID": "1.1", "StudyInstanceUID": "2"},
            "1",
            Verdict.MALFORMED,
        ),
    ],
)
def test_remote_rows_are_judged(
    asked: dict[str, Any], row: dict[str, Any], study: str, verdict: Verdict
) -> None:
    """What a source gives is taken, filtered or withheld by what was asked."""
    it = merge(**asked)
    assert it.remote("north", identifier(**row), study) is verdict
    assert len(list(it.release())) == (verdict is Verdict.ACCEPTED)


def test_two_sources_that_disagree_about_the_patient_are_a_conflict() -> None:
    """The second one is not shown as a holder of the first one's study."""
    it = merge(StudyInstanceUID="1.2")
    assert it.remote("north", study_row("1.2", patient="P1")) is Verdict.ACCEPTED
    assert it.remote("south", study_row("1.2", patient="P2")) is Verdict.CONFLICT
    assert not Verdict.CONFLICT.locates
    assert len(list(it.release())) == 1


ROWS = st.lists(
    st.tuples(st.sampled_from(["local", "north", "south", "release"]), st.sampled_from("12345")),
    max_size=20,
)


@given(ROWS)
def test_every_study_is_sent_exactly_once_whatever_the_order(
    events: list[tuple[str, str]],
) -> None:
    """Any interleaving of rows and releases gives each study that anybody has, once."""
    it = merge(PatientID="P1", StudyInstanceUID="")
    sent: list[Answer | None] = []
    for who, number in events:
        row = study_row(f"1.{number}", patient="P1")
        if who == "release":
            sent.extend(it.release())
        elif who == "local":
            sent.append(it.local(local_answer(row)).answer)
        else:
            it.remote(who, row)
    sent.extend(it.release())
    shown = [read(answer).text(STUDY_INSTANCE_UID) for answer in sent if answer is not None]
    assert sorted(shown) == sorted({f"1.{number}" for who, number in events if who != "release"})


@given(st.binary(max_size=200))
def test_any_local_bytes_give_a_row(data: bytes) -> None:
    """Whatever the local PACS sends passes through without an error."""
    row = merge().local(LocalAnswer(0xFF00, data, EXPLICIT))
    assert row.answer is not None
