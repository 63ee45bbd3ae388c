"""Identifiers of C-MOVE and C-GET, as asked and as refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.header import EXPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.dataset.identifier import Identifier, IdentifierError
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
    Root,
)
from dicomproxy.retrieval.request import RetrieveRefused, RetrieveRequest, parse_request
from tests.sentinel import PATIENT_ID as SENTINEL


def identifier(level: str, **values: str) -> Identifier:
    tags = {
        "patient": PATIENT_ID,
        "study": STUDY_INSTANCE_UID,
        "series": SERIES_INSTANCE_UID,
        "instance": SOP_INSTANCE_UID,
    }
    made = Identifier()
    made.set_text(QUERY_RETRIEVE_LEVEL, level)
    for name, value in values.items():
        made.set_text(tags[name], value.split("\\"))
    return made


@pytest.mark.parametrize(
    ("root", "given_identifier", "request_made"),
    [
        (
            Root.STUDY,
            identifier("STUDY", study="1.2\\1.3\\1.2"),
            RetrieveRequest(Root.STUDY, Level.STUDY, "", ("1.2", "1.3")),
        ),
        (
            Root.STUDY,
            identifier("SERIES", study="1.2", series="1.2.1\\1.2.2"),
            RetrieveRequest(Root.STUDY, Level.SERIES, "", ("1.2",), ("1.2.1", "1.2.2")),
        ),
        (
            Root.STUDY,
            identifier("IMAGE", study="1.2", series="1.2.1", instance="1.2.1.1\\1.2.1.2"),
            RetrieveRequest(
                Root.STUDY, Level.IMAGE, "", ("1.2",), ("1.2.1",), ("1.2.1.1", "1.2.1.2")
            ),
        ),
        (
            Root.PATIENT,
            identifier("PATIENT", patient=SENTINEL),
            RetrieveRequest(Root.PATIENT, Level.PATIENT, SENTINEL),
        ),
        (
            Root.PATIENT,
            identifier("STUDY", patient=SENTINEL, study="1.2"),
            RetrieveRequest(Root.PATIENT, Level.STUDY, SENTINEL, ("1.2",)),
        ),
        (  # workstations leave it out
            Root.PATIENT,
            identifier("STUDY", study="1.2"),
            RetrieveRequest(Root.PATIENT, Level.STUDY, "", ("1.2",)),
        ),
        (  # not a unique key here, thus of no consequence
            Root.STUDY,
            identifier("STUDY", patient=SENTINEL, study="1.2"),
            RetrieveRequest(Root.STUDY, Level.STUDY, "", ("1.2",)),
        ),
    ],
)
def test_requests(root: Root, given_identifier: Identifier, request_made: RetrieveRequest) -> None:
    """Unique keys are taken over, each UID once."""
    assert parse_request(root, given_identifier) == request_made


@pytest.mark.parametrize(
    ("root", "given_identifier", "offending"),
    [
        (Root.STUDY, Identifier(), QUERY_RETRIEVE_LEVEL),
        (Root.STUDY, identifier("PATIENT", patient=SENTINEL), QUERY_RETRIEVE_LEVEL),
        (Root.STUDY, identifier("study", study="1.2"), QUERY_RETRIEVE_LEVEL),
        (Root.PATIENT, identifier("PATIENT"), PATIENT_ID),
        (Root.PATIENT, identifier("PATIENT", patient=f"{SENTINEL}\\X"), PATIENT_ID),
        (Root.PATIENT, identifier("PATIENT", patient="SENT*"), PATIENT_ID),
        (Root.STUDY, identifier("STUDY"), STUDY_INSTANCE_UID),
        (Root.STUDY, identifier("STUDY", study="*"), STUDY_INSTANCE_UID),
        (Root.STUDY, identifier("STUDY", study="1" * 65), STUDY_INSTANCE_UID),
        (Root.STUDY, identifier("SERIES", series="1.2.1"), STUDY_INSTANCE_UID),
        (Root.STUDY, identifier("SERIES", study="1.2\\1.3", series="1.2.1"), STUDY_INSTANCE_UID),
        (Root.STUDY, identifier("SERIES", study="1.2"), SERIES_INSTANCE_UID),
        (Root.STUDY, identifier("IMAGE", study="1.2", instance="1.2.1.1"), SERIES_INSTANCE_UID),
        (Root.STUDY, identifier("IMAGE", study="1.2", series="1.2.1"), SOP_INSTANCE_UID),
    ],
)
def test_refusals(root: Root, given_identifier: Identifier, offending: int) -> None:
    """What is missing, superfluous or malformed is A900, naming the element but no value."""
    with pytest.raises(RetrieveRefused) as caught:
        parse_request(root, given_identifier)
    assert (caught.value.status, caught.value.offending_element) == (0xA900, offending)
    assert len(caught.value.comment) <= 64
    assert SENTINEL not in str(caught.value)


@given(st.sampled_from(Root), st.binary(max_size=200))
def test_any_identifier_is_a_request_or_refused(root: Root, data: bytes) -> None:
    """Whatever was sent, there is a request or a refusal, never another exception."""
    try:
        parse_request(root, Identifier.decode(data, EXPLICIT_VR_LITTLE_ENDIAN))
    except (IdentifierError, RetrieveRefused):
        pass
