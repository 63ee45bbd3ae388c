"""Names and descriptions in the character sets of the world, from here and from elsewhere.

One scene serves all: for each pair of a character set of the local PACS and one of
the archive elsewhere there is a patient, with a study here and one there, and a
description there that only its own character set can write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

import pytest
import pytest_asyncio
from pydicom import Dataset

from tests.e2e.conftest import proxies
from tests.e2e.identities import (
    HOSPITAL,
    NORTH,
    Listing,
    differences,
    domain,
    loaded,
    restored,
    studies,
    table,
    uid,
)
from tests.e2e.scene import Setup, figures, setup, the_study
from tests.e2e.support import identifier
from tests.support.datasets import study

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Writing(NamedTuple):
    """A character set, and what is written in it; ``pattern`` is for a part of the name."""

    terms: str
    name: str
    description: str
    pattern: str


WRITINGS: Final = {
    "ascii": Writing("", "Plain^Penny", "head, plain", "Plain*"),
    "latin": Writing("ISO_IR 100", "Müßig^Åse^^Dr.", "Schädel nativ übersicht", "Mü*"),
    "cyrillic": Writing("ISO_IR 144", "Иванова^Анна", "голова без контраста", "Иван*"),
    "kanji": Writing(
        "\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう", "頭部 単純 CT", "*=山田*"
    ),
    "gb18030": Writing("GB18030", "Zhang^XiaoDong=张^小东=", "颅脑平扫 㐂", "*=张*"),
    "utf8": Writing("ISO_IR 192", "Łukasz^Ő=王^小東=홍^길동", "głowa καὶ голова", "Łuk*"),
}
PAIRS: Final = [(here, there) for here in WRITINGS for there in WRITINGS]


def made(where: str, patient: str, writing: Writing) -> list[Dataset]:
    return study(
        1,
        1,
        SpecificCharacterSet=writing.terms.split("\\") if "\\" in writing.terms else writing.terms,
        PatientID=patient,
        PatientName=writing.name,
        PatientSex="F",
        StudyDescription=writing.description,
        InstitutionName=writing.description,
        AccessionNumber=f"ACC-{where}-{patient}"[:16],
    )


class Patient(NamedTuple):
    """One patient, here and there."""

    here_id: str
    there_id: str
    here: list[Dataset]
    there: list[Dataset]


@pytest.fixture(scope="module")
def patients() -> dict[tuple[str, str], Patient]:
    """One for each pair."""
    made_of = {}
    for number, (here, there) in enumerate(PAIRS):
        ids = f"HERE-{number:04}", f"THERE-{number:04}"
        made_of[here, there] = Patient(
            *ids, made("H", ids[0], WRITINGS[here]), made("N", ids[1], WRITINGS[there])
        )
    # Nor are IDs always ASCII.
    ids = "HÉRE-0077", "ЯTHERE-0077"
    made_of["ids", "ids"] = Patient(
        *ids, made("H", ids[0], WRITINGS["latin"]), made("N", ids[1], WRITINGS["cyrillic"])
    )
    return made_of


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(
    tmp_path_factory: pytest.TempPathFactory, patients: dict[tuple[str, str], Patient]
) -> AsyncIterator[Setup]:
    """All patients, here and elsewhere; no log may name any of them."""
    directory = tmp_path_factory.mktemp("charsets")
    lines = [f"{one.here_id},{one.there_id}" for one in patients.values()]
    async with (
        proxies(directory) as start,
        setup(
            start,
            [one for patient in patients.values() for one in patient.there],
            here=[one for patient in patients.values() for one in patient.here],
            kind=Listing,
            local={"patient_id_issuer": domain(HOSPITAL)},
            north={
                "patient_id_issuer": domain(NORTH),
                "identity": {"cross_reference": "regional"},
                "coerce": {"study_description_prefix": "[N] "},
            },
            cross_references=[table(directory, "\n".join(["local,north", *lines, ""]))],
        ) as made_setup,
    ):
        await loaded(made_setup)
        yield made_setup
        hidden = ["HERE-0", "HÉRE-0", "H\\u00c9RE-0"]
        for one in WRITINGS.values():
            hidden += filter(None, one.name.split("="))
        log = made_setup.proxy.log
        assert [value for value in hidden if value in log] == []


def question(patient: str, terms: str, **keys: str) -> Dataset:
    asked = identifier(
        "STUDY", PatientID=patient, StudyInstanceUID="", StudyDescription="", PatientName=""
    )
    for keyword in ("AccessionNumber", "PatientBirthDate", "PatientSex"):
        setattr(asked, keyword, "")
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    if terms:
        asked.SpecificCharacterSet = terms.split("\\")
    return asked


@pytest.mark.parametrize(("here", "there"), PAIRS, ids=lambda one: one)
async def test_names_survive_query_and_delivery(
    it: Setup, patients: dict[tuple[str, str], Patient], here: str, there: str
) -> None:
    """The local name, the foreign description, and everything back as it was."""
    patient, writing = patients[here, there], WRITINGS[there]
    described = f"[N] {writing.description}"
    rows = {}
    for terms in {"ISO_IR 192", WRITINGS[here].terms}:
        result = await it.reading.find(question(patient.here_id, terms))
        assert studies(result) == {uid(patient.here), uid(patient.there)}
        rows = {str(row.StudyInstanceUID): row for row in result.rows}
        row = rows[uid(patient.there)]
        assert str(row.PatientName) == WRITINGS[here].name.rstrip("=")
        assert row.StudyDescription == described
    asked = it.archives[0].asked("find")[-1].identifier
    assert (asked.PatientID, asked.PatientName or "") == (patient.there_id, "")
    it.reading.received.clear()
    moved = await it.reading.move(the_study(patient.there))
    assert figures(moved.final) == (0x0000, 1, 0, 0)
    (received,) = it.reading.received
    got, (original,) = received.dataset(), patient.there
    assert str(got.PatientName) == WRITINGS[here].name.rstrip("=")
    assert got.PatientID == patient.here_id
    assert (got.StudyDescription, got.InstitutionName) == (described, writing.description)
    if here in ("ascii", there):
        # What fits is no reason to convert an object.
        assert got.get("SpecificCharacterSet") == original.get("SpecificCharacterSet")
    assert got.PixelData == original.PixelData
    assert differences(restored(got), original) == []
    assert got.AccessionNumber == rows[uid(patient.there)].AccessionNumber


@pytest.mark.parametrize("here", WRITINGS)
async def test_names_as_keys_are_those_of_the_local_patient(
    it: Setup, patients: dict[tuple[str, str], Patient], here: str
) -> None:
    """Matched in whatever character set the question is written, and not sent elsewhere."""
    wanted = WRITINGS[here]
    for there in ("ascii", "kanji", "utf8"):
        patient = patients[here, there]
        for terms in {"ISO_IR 192", wanted.terms}:
            for key in (wanted.pattern, wanted.name):
                result = await it.reading.find(question(patient.here_id, terms, PatientName=key))
                assert uid(patient.there) in studies(result)
            other = next(one for one in WRITINGS.values() if one.name != wanted.name)
            unlike = question(patient.here_id, "ISO_IR 192", PatientName=other.name)
            assert uid(patient.there) not in studies(await it.reading.find(unlike))
    names = {str(one.identifier.get("PatientName", "")) for one in it.archives[0].asked("find")}
    assert names == {""}


async def test_ids_beyond_ascii_find_and_stay(
    it: Setup, patients: dict[tuple[str, str], Patient]
) -> None:
    """Asked for here in one writing and there in another; shown, delivered and kept as they are."""
    patient = patients["ids", "ids"]
    for terms in ("ISO_IR 100", "ISO_IR 192"):
        result = await it.reading.find(question(patient.here_id, terms))
        assert studies(result) == {uid(patient.here), uid(patient.there)}
        assert {row.PatientID for row in result.rows} == {patient.here_id}
    assert it.archives[0].asked("find")[-1].identifier.PatientID == patient.there_id
    it.reading.received.clear()
    assert figures((await it.reading.move(the_study(patient.there))).final)[1] == 1
    (received,) = it.reading.received
    got = received.dataset()
    assert got.PatientID == patient.here_id
    (other,) = got.OtherPatientIDsSequence
    assert other.PatientID == patient.there_id
    assert differences(restored(got), patient.there[0]) == []


async def test_descriptions_as_keys_are_those_shown(
    it: Setup, patients: dict[tuple[str, str], Patient]
) -> None:
    """A foreign description is matched as the workstation sees it, in any writing."""
    for there, writing in WRITINGS.items():
        patient = patients["utf8", there]
        for asked, found in ((f"[N] {writing.description}", True), (writing.description, False)):
            wanted = question(patient.here_id, "ISO_IR 192", StudyDescription=asked)
            result = await it.reading.find(wanted)
            assert (uid(patient.there) in studies(result)) is found
