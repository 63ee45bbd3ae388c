"""Two archives that number patients in their own way: what a workstation really gets."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO

from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.crossref import Identities
from dicomproxy.ports import CrossReferenceError
from tests.resilience.archive import Archive, Held
from tests.resilience.reading import Answer, Reading
from tests.resilience.region import Region, region, uid_of, uids
from tests.sentinel import ACCESSION_NUMBER, PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.datasets import study
from tests.support.log_watch import LogWatch
from tests.support.stand_in import SECONDS, anything

NORTH_ID, SOUTH_ID = "N-0815", "S/22"
TABLE = f"local,north,south\n{PATIENT_ID},{NORTH_ID},{SOUTH_ID}\n17,{PATIENT_ID},\n"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"


def settings(directory: Path) -> dict[str, Any]:
    file = directory / "ids.csv"
    file.write_text(TABLE, encoding="utf-8")
    return {
        "local": {"patient_id_issuer": "HOSPITAL"},
        "north": {"patient_id_issuer": "NORTH", "identity": {"cross_reference": "regional"}},
        "south": {"patient_id_issuer": "SOUTH", "identity": {"cross_reference": "regional"}},
        "cross_references": [{"name": "regional", "type": "table", "file": str(file)}],
        "retrieve": {"retry_pause": "0s"},
    }


def ct(count: int, patient_id: str, **more: Any) -> list[Dataset]:
    return study(1, count, PatientID=patient_id, **{"PatientSex": "F", **more})


def under(patient_id: str, held: Collection[Dataset]) -> list[Dataset]:
    """Return copies of instances as another archive has them."""
    copies = copy.deepcopy(list(held))
    for one in copies:
        one.PatientID = patient_id
    return copies


def identities_of(here: Region) -> Identities:
    routing = here.application.routing
    assert routing is not None
    assert routing.identity is not None
    return routing.identity.identities


async def ready(here: Region) -> None:
    """Have the local PACS know the patient, by another study, and the table read."""
    own = ct(1, PATIENT_ID, AccessionNumber="LOCAL1")
    here.local.held = {str(one.SOPInstanceUID): Held(one) for one in own}
    identities, read = identities_of(here), asyncio.Event()
    identities.on_forget(lambda _: read.set())
    async with asyncio.timeout(SECONDS):
        try:
            await identities.elsewhere(PatientId("17", identities.domains.local), "north")
        except CrossReferenceError:
            await read.wait()


def arrived(reading: Reading, held: Collection[Dataset]) -> list[tuple[Dataset, Dataset]]:
    """Return what has come, decoded, each beside what the archive has."""
    by_uid = {str(one.SOPInstanceUID): one for one in held}
    pairs = []
    for uid, data in reading.arrived.items():
        one = by_uid[uid]
        syntax = str(one.file_meta.TransferSyntaxUID)
        meta = build_file_meta(str(one.SOPClassUID), uid, syntax)
        pairs.append((dcmread(DicomBytesIO(meta + data)), one))
    return pairs


def assert_local(reading: Reading, held: Collection[Dataset], patient_ids: set[str]) -> None:
    """Everything is the local patient's, its pixels are untouched, and who it was is recorded."""
    accessions, originals = set(), set()
    for came, sent in arrived(reading, held):
        assert (came.PatientID, came.IssuerOfPatientID) == (PATIENT_ID, "HOSPITAL")
        assert (came.PatientName, came.PatientSex) == (PATIENT_NAME, "F")
        assert came.PatientBirthDate == PATIENT_BIRTH_DATE
        assert came.PixelData == sent.PixelData
        assert came.StudyInstanceUID == sent.StudyInstanceUID
        accessions.add(came.AccessionNumber)
        before = came.OriginalAttributesSequence[0].ModifiedAttributesSequence[0]
        assert before.AccessionNumber == ACCESSION_NUMBER
        assert before.PatientName == sent.PatientName
        originals.add(before.PatientID)
        assert before.PatientID in {one.PatientID for one in came.OtherPatientIDsSequence}
    assert originals == patient_ids
    assert ACCESSION_NUMBER not in accessions
    assert all(0 < len(number) <= 16 for number in accessions)


def told(answer: Answer) -> tuple[int, int, int]:
    return answer.status, answer.completed, answer.failed


@pytest.mark.parametrize("syntax", [None, DEFLATED, RLE])
async def test_one_study_from_two_archives_under_two_ids(
    tmp_path: Path, syntax: str | None
) -> None:
    """What one archive lost comes from the other; all of it is the local patient's.

    So it is whether fetched or cached, and pixels are as they were.
    """
    more = {"transfer_syntax_uid": syntax} if syntax else {}
    held = ct(4, NORTH_ID, PatientName="Sentinel^P", **more)
    theirs = under(SOUTH_ID, held)
    north, south = Archive("NORTH", held), Archive("SOUTH", theirs)
    north.lost = uids(held[2:])
    readings = [Reading("READING1"), Reading("READING2")]
    if syntax:
        for reading in readings:
            reading.supported = anything(syntax)
    async with region(tmp_path, north, south, readings=readings, **settings(tmp_path)) as here:
        await ready(here)
        assert told(await readings[0].move(uid_of(held))) == (0x0000, 4, 0)
        assert_local(readings[0], held, {NORTH_ID, SOUTH_ID})
        assert set(south.sent) == uids(held[2:])

        sent = north.sent + south.sent
        assert told(await readings[1].move(uid_of(held))) == (0x0000, 4, 0)
        assert north.sent + south.sent == sent, "from the cache"
        assert_local(readings[1], held, {NORTH_ID, SOUTH_ID})
        numbers = {one.AccessionNumber for reading in readings for one, _ in arrived(reading, held)}
        assert len(numbers) == 2, "one for each archive, and the same again"


async def test_what_is_converted_is_local_as_well(tmp_path: Path) -> None:
    """A workstation that takes no RLE gets the same local patient, with the pixels decoded."""
    held = ct(2, NORTH_ID, PatientName="Sentinel^P", transfer_syntax_uid=RLE)
    async with region(
        tmp_path, Archive("NORTH", held), Archive("SOUTH"), **settings(tmp_path)
    ) as here:
        await ready(here)
        assert told(await here.reading.move(uid_of(held))) == (0x0000, 2, 0)
        plain = copy.deepcopy(held)
        for one in plain:
            one.decompress(generate_instance_uid=False)
        assert_local(here.reading, plain, {NORTH_ID})


async def test_study_of_somebody_with_the_local_id(tmp_path: Path) -> None:
    """Whoever has the patient's ID in the north is somebody else here, and named so."""
    held = ct(2, PATIENT_ID, PatientName="Other^Person", PatientBirthDate="19800101")
    north = Archive("NORTH", held)
    async with region(tmp_path, north, Archive("SOUTH"), **settings(tmp_path)) as here:
        await ready(here)
        assert told(await here.reading.move(uid_of(held))) == (0x0000, 2, 0)
        assert {str(one.PatientID) for one, _ in arrived(here.reading, held)} == {"17"}
        assert {str(one.PatientName) for one, _ in arrived(here.reading, held)} == {"Other^Person"}


async def test_instance_of_another_person_among_the_patients(
    tmp_path: Path, log_watch: LogWatch
) -> None:
    """Misfiled in the archive, it is turned away, counted as failed, and not in the cache."""
    held = ct(3, NORTH_ID)
    held[1].PatientID = PATIENT_ID
    held[2].PatientBirthDate = "19800101"
    wrong = uids(held[1:])
    north = Archive("NORTH", held)
    async with region(tmp_path, north, Archive("SOUTH"), **settings(tmp_path)) as here:
        await ready(here)
        answer = await here.reading.move(uid_of(held))
        assert told(answer) == (0xB000, 1, 2)
        assert set(answer.listed) == wrong
        assert set(here.reading.arrived) == uids(held[:1])
        assert north.refused[str(held[1].SOPInstanceUID)] == 0xC001
        assert log_watch.named("identity_conflict")


async def test_mapping_that_changes_between_two_retrieves(tmp_path: Path) -> None:
    """Once the table says that the ID is somebody else's, so are the cached objects."""
    held = ct(2, NORTH_ID)
    north, south = Archive("NORTH", held), Archive("SOUTH")
    readings = [Reading("READING1"), Reading("READING2")]
    async with region(tmp_path, north, south, readings=readings, **settings(tmp_path)) as here:
        await ready(here)
        assert told(await readings[0].move(uid_of(held))) == (0x0000, 2, 0)
        changed = asyncio.Event()
        identities_of(here).on_forget(lambda _: changed.set())
        fresh = tmp_path / "ids.new"
        fresh.write_text(f"local,north,south\n17,{NORTH_ID},\n", encoding="utf-8")
        fresh.replace(tmp_path / "ids.csv")
        async with asyncio.timeout(SECONDS):
            await changed.wait()
        assert told(await readings[1].move(uid_of(held))) == (0x0000, 2, 0)
        assert {str(one.PatientID) for one, _ in arrived(readings[1], held)} == {"17"}
