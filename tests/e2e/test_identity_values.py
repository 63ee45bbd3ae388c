"""Answers and objects say the same, attribute by attribute, whatever the site has configured.

A query that asks for all that coercion touches is compared with the objects of the
study, at every level and for two workstations that rules tell apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio
from pydicom import Dataset

from tests.e2e.conftest import proxies
from tests.e2e.identities import (
    NORTH_ID,
    SOUTH_ID,
    Held,
    arrived,
    ct,
    differences,
    loaded,
    plain,
    restored,
    scene,
    table,
    uid,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.e2e.support import identifier
from tests.sentinel import PATIENT_ID
from tests.support.datasets import study

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEQUENCES: Final = (
    "IssuerOfAccessionNumberSequence",
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence",
    "ProcedureCodeSequence",
    "ReferencedRequestSequence",
    "RequestAttributesSequence",
)
ASKED: Final = (
    "AccessionNumber",
    "BodyPartExamined",
    "InstitutionName",
    "InstitutionalDepartmentName",
    "IssuerOfPatientID",
    "OtherPatientIDs",
    "PatientAddress",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "PlacerOrderNumberImagingServiceRequest",
    "ProtocolName",
    "RequestedProcedureDescription",
    "StationName",
    "StudyDescription",
    "StudyID",
)
COERCE: Final[dict[str, Any]] = {
    "study_description_prefix": "[NORTH] ",
    "descriptions": [{"remote": "CT Schädel", "local": "CT Head"}],
    "procedure_codes": [
        {"remote": "77^99NORTH", "local": "CTHEAD^99HERE", "meaning": "CT of the head"}
    ],
    "rules": [
        {
            "action": "map",
            "attribute": "BodyPartExamined",
            "values": [{"remote": "SCHAEDEL", "local": "HEAD"}],
        },
        {"action": "remove", "attribute": "PatientAddress", "destinations": ["READING2"]},
        {"action": "set", "attribute": "ProtocolName", "value": "ELSEWHERE", "modalities": ["CT"]},
        {"action": "set", "attribute": "StationName", "value": "MR1", "modalities": ["MR"]},
        {
            "action": "copy",
            "attribute": "InstitutionalDepartmentName",
            "from_attribute": "InstitutionName",
        },
        {"action": "prefix", "attribute": "InstitutionName", "value": "Nord: "},
    ],
}


def code(value: str, scheme: str, meaning: str) -> Dataset:
    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = value, scheme, meaning
    return made


def foreign(patient: str, modality: str) -> list[Dataset]:
    """Make a study that says all that is coerced."""
    order, other = Dataset(), Dataset()
    order.AccessionNumber = "NORTH-0815-A"
    order.RequestedProcedureID = "RP-0815"
    order.RequestedProcedureDescription = "CT Schädel"
    order.RequestedProcedureCodeSequence = [code("77", "99NORTH", "CT Schädel")]
    other.PatientID, other.TypeOfPatientID = "OLD-0815", "TEXT"
    return study(
        1,
        2,
        Modality=modality,
        PatientID=patient,
        PatientName="Sentinel^Pätient",
        PatientSex="F",
        PatientAddress="Straße 1",
        OtherPatientIDs="ANCIENT-0815",
        OtherPatientIDsSequence=[other],
        AccessionNumber="NORTH-0815-A",
        BodyPartExamined="SCHAEDEL",
        InstitutionName="Klinik Nord",
        ProtocolName="Schädel",
        StationName="S1",
        StudyDescription="CT Schädel",
        RequestedProcedureDescription="CT Schädel",
        PlacerOrderNumberImagingServiceRequest="PL-0815",
        ProcedureCodeSequence=[code("77", "99NORTH", "CT Schädel"), code("5", "99X", "x")],
        RequestAttributesSequence=[order],
        ReferencedRequestSequence=[order],
    )


@pytest.fixture(scope="module")
def held() -> Held:
    """What the archives hold; the same in the south, of which nothing but identity is changed."""
    made = Held()
    made.here = ct(PATIENT_ID, PatientName="SENTINEL^PATIENT=王^小东")
    made.north = foreign(NORTH_ID, "CT")
    made.south = foreign(SOUTH_ID, "MR")
    for one in made.south:
        one.IssuerOfPatientID = "MEANINGLESS"
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(held: Held, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    """Run them, with two workstations."""
    for one in held.here:
        one.SpecificCharacterSet = "ISO_IR 192"
    directory = tmp_path_factory.mktemp("values")
    async with (
        proxies(directory) as start,
        scene(
            start,
            held,
            table(directory),
            count=2,
            north={"coerce": COERCE},
            south={"identity": {"issuer": "ignore"}},
        ) as made,
    ):
        await loaded(made)
        yield made
        hidden = ("-0815", "小东", "Pätient", "Straße")
        assert [value for value in hidden if value in made.proxy.log] == []


def question(level: str, **keys: str) -> Dataset:
    return identifier(level, **(dict.fromkeys(ASKED, "") | dict.fromkeys(SEQUENCES) | keys))


@pytest.mark.parametrize("reader", [0, 1], ids=["reading1", "reading2"])
@pytest.mark.parametrize("where", ["north", "south"])
async def test_answers_say_what_objects_say(it: Setup, held: Held, where: str, reader: int) -> None:
    """At every level, for each workstation; and the original can be had back."""
    workstation = it.workstations[reader]
    originals = {"north": held.north, "south": held.south}[where]
    assert figures((await workstation.move(the_study(originals))).final)[1] == 2
    objects = arrived(workstation)
    for original in originals:
        got = objects[str(original.SOPInstanceUID)]
        assert differences(restored(got), original) == []
        keys = {"StudyInstanceUID": str(original.StudyInstanceUID)}
        series = {**keys, "SeriesInstanceUID": str(original.SeriesInstanceUID)}
        for asked in (
            question("STUDY", **keys),
            question("STUDY", StudyInstanceUID="", PatientID=PATIENT_ID),
            question("SERIES", **series),
            question("IMAGE", **series, SOPInstanceUID=str(original.SOPInstanceUID)),
        ):
            rows = (await workstation.find(asked)).rows
            (row,) = [one for one in rows if one.StudyInstanceUID == uid(originals)]
            said, seen = plain(row), plain(got)
            compared = {*ASKED, *SEQUENCES}
            assert {name: said.get(name) for name in compared} == {
                name: seen.get(name) for name in compared
            }


async def test_values_are_those_that_the_site_has_configured(it: Setup, held: Held) -> None:
    """Each of the rules at work, and none beyond what it is for."""
    for workstation in it.workstations:
        await workstation.move(the_study(held.north))
        for got in arrived(workstation).values():
            assert got.PatientName == "SENTINEL^PATIENT=王^小东"
            assert got.SpecificCharacterSet == "ISO_IR 192"
            assert got.StudyDescription == "[NORTH] CT Head"
            assert got.RequestedProcedureDescription == "CT Head"
            codes = [(one.CodeValue, one.CodeMeaning) for one in got.ProcedureCodeSequence]
            assert codes == [("CTHEAD", "CT of the head"), ("5", "x")]
            assert got.BodyPartExamined == "HEAD"
            assert got.ProtocolName == "ELSEWHERE"
            assert got.StationName == "S1"
            assert got.InstitutionName == "Nord: Klinik Nord"
            assert got.InstitutionalDepartmentName == "Klinik Nord"
            assert not got.StudyID
            assert not got.get("OtherPatientIDs")
            others = {one.PatientID: one.IssuerOfPatientID for one in got.OtherPatientIDsSequence}
            assert others == {"OLD-0815": "NORTH", NORTH_ID: "NORTH"}
            kept = workstation.ae_title == "READING1"
            assert got.get("PatientAddress") == ("Straße 1" if kept else None)
    await it.reading.move(the_study(held.south))
    for got in arrived(it.reading).values():
        assert (got.StudyDescription, got.StationName) == ("CT Schädel", "S1")
        # Who is said there to have issued an ID means nothing, as the site knows.
        others = {one.PatientID: one.IssuerOfPatientID for one in got.OtherPatientIDsSequence}
        assert others == {"OLD-0815": "SOUTH", SOUTH_ID: "SOUTH"}
        assert got.IssuerOfPatientID == "HOSPITAL"


async def test_keys_match_what_is_shown(it: Setup, held: Held) -> None:
    """Local names find studies that are called otherwise where they are."""
    for keyword, shown, theirs in (
        ("StudyDescription", "[NORTH]*Head", "CT Schädel"),
        ("InstitutionName", "Nord: *", "Klinik Nord"),
        ("ProtocolName", "ELSEWHERE", "Schädel"),
        ("BodyPartExamined", "HEAD", "SCHAEDEL"),
        ("PatientName", "sentinel*", "Sentinel^Pätienten"),
        ("PatientBirthDate", "19010203", "19010204"),
    ):
        for value, found in ((shown, True), (theirs, False)):
            asked = question("STUDY", StudyInstanceUID="", PatientID=PATIENT_ID, **{keyword: value})
            asked.SpecificCharacterSet = "ISO_IR 192"
            rows = (await it.reading.find(asked)).rows
            assert (uid(held.north) in {row.StudyInstanceUID for row in rows}) is found, keyword
