"""What is recorded of a retrieve."""

from __future__ import annotations

from dicomproxy.ports import Caller
from dicomproxy.retrieval.disclosure import Relayed, disclosure_events
from dicomproxy.retrieval.locate import LocatedStudy
from dicomproxy.retrieval.tally import Part
from tests.retrieval.fakes import study_request
from tests.sentinel import PATIENT_ID


def test_studies_of_several_patients_are_not_recorded_under_one() -> None:
    """What the local PACS delivers together is recorded for each patient it was of."""
    studies = (
        LocatedStudy("1.1", PATIENT_ID, ()),
        LocatedStudy("1.2", "another", ()),
        LocatedStudy("1.3", PATIENT_ID, ()),
    )
    events = disclosure_events(
        study_request("1.1", "1.2", "1.3"),
        [],
        Relayed(studies, Part(completed=7)),
        caller=Caller("READING1"),
        operation_id="op-1",
        destination_ae_title="READING1",
        status=0,
    )
    assert {event.patient_id: event.study_instance_uids for event in events} == {
        PATIENT_ID: ("1.1", "1.3"),
        "another": ("1.2",),
    }
    assert {(event.instances, event.outcome) for event in events} == {(7, "success")}
    assert all(event.extra == {"instances_of_patients": 2} for event in events)
