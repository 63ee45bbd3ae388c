"""One person under three IDs, among others who look like them: only theirs, and made local."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeProxy
from tests.e2e.identities import (
    NORTH_ID,
    PERSONS,
    SOUTH_ID,
    Held,
    loaded,
    mine,
    scene,
    studies,
    table,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.peers.mllp_server import Caller
from tests.peers.pix_manager import Reply, pix_manager
from tests.peers.pixm_manager import Question, pixm_manager, response
from tests.sentinel import ACCESSION_NUMBER, PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME


@pytest.mark.parametrize("careless", [False, True], ids=["exact", "careless"])
async def test_only_the_persons_studies_are_found_and_all_look_local(
    start: MakeProxy, tmp_path: Path, careless: bool
) -> None:
    """By the local ID, from three archives, whoever else they hold and show."""
    held = Held()
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        it.archives[0].careless = careless  # type: ignore[attr-defined]
        result = await mine(it)
        assert result.final.status == 0x0000
        assert studies(result) == held.mine
        for row in result.rows:
            assert row.PatientID == PATIENT_ID
            assert row.PatientName == PATIENT_NAME
            assert row.PatientBirthDate == PATIENT_BIRTH_DATE
            assert row.PatientSex == "F"
        remote = [row for row in result.rows if row.AccessionNumber != ACCESSION_NUMBER]
        assert len({row.AccessionNumber for row in remote}) == 2
        assert {row.IssuerOfPatientID for row in remote} == {"HOSPITAL"}
        # Of the patient a source hears its own ID, and nothing else.
        asked = it.archives[0].asked("find")[0].identifier
        assert asked.PatientID == NORTH_ID
        assert not asked.PatientName
        # One that an answer showed leads back to its study, alone.
        again = await mine(it, PatientID="", AccessionNumber=remote[0].AccessionNumber)
        here = {str(held.here[0].StudyInstanceUID)}  # whose archive knows no such key
        assert studies(again) - here == {remote[0].StudyInstanceUID}


async def test_what_is_delivered_is_the_local_patients(start: MakeProxy, tmp_path: Path) -> None:
    """Same values as in the answers, the pixels as they were, the originals on record."""
    held = Held()
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        rows = {str(row.StudyInstanceUID): row for row in (await mine(it)).rows}
        for original in (held.north, held.south):
            result = await it.reading.move(the_study(original))
            assert figures(result.final) == (0x0000, 2, 0, 0)
            row = rows[str(original[0].StudyInstanceUID)]
            arrived = {one.sop_instance_uid: one.dataset() for one in it.reading.received}
            for one in original:
                got = arrived[str(one.SOPInstanceUID)]
                for keyword in ("PatientID", "PatientName", "PatientBirthDate", "AccessionNumber"):
                    assert got[keyword].value == row[keyword].value
                assert got.PixelData == one.PixelData
                (record,) = got.OriginalAttributesSequence
                (before,) = record.ModifiedAttributesSequence
                assert before.PatientID == one.PatientID
                assert before.AccessionNumber == ACCESSION_NUMBER


async def test_others_studies_are_not_delivered_as_the_persons(
    start: MakeProxy, tmp_path: Path
) -> None:
    """Asked for with the local ID, the study of somebody whose ID there is the same stays there."""
    held = Held()
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        wanted = the_study(held.third)
        wanted.PatientID = PATIENT_ID
        result = await it.reading.move(wanted, root="P")
        assert not result.final.completed
        assert it.reading.received == []
        # They have an ID of their own here, under which it is delivered.
        assert figures((await it.reading.move(the_study(held.third))).final) == (0x0000, 2, 0, 0)
        assert {one.dataset().PatientID for one in it.reading.received} == {"17"}


async def test_a_table_that_changes_counts_for_the_next_query(
    start: MakeProxy, tmp_path: Path
) -> None:
    """Whom the table no longer links is not found there any more."""
    held = Held()
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        assert studies(await mine(it)) == held.mine
        await asyncio.to_thread(table, tmp_path, f"local,north,south\n{PATIENT_ID},,{SOUTH_ID}\n")
        await loaded(it, 2)
        result = await mine(it)
        assert studies(result) == held.mine - {str(held.north[0].StudyInstanceUID)}
        assert it.proxy.named("source_query_failed") == []


async def test_a_manager_is_asked_and_its_outage_is_the_sources(start: MakeProxy) -> None:
    """By PIX: found as by a table; an error is no empty answer, and is not remembered as one."""
    held = Held()
    async with pix_manager(*PERSONS) as manager:
        reference = {"name": "mpi", "type": "pix", "host": "127.0.0.1", "port": manager.port}
        async with scene(start, held, reference) as it:
            manager.decide = lambda _question: Reply("AE", "AE")
            await nothing_but_local(it, held)
            manager.decide = manager.honest
            assert studies(await mine(it)) == held.mine


async def test_a_manager_that_is_late_costs_its_sources_alone(start: MakeProxy) -> None:
    """Local rows come, and when it is back, so do the others'."""
    held = Held()
    back = asyncio.Event()

    async def be_late(_caller: Caller, _content: bytes) -> None:
        await back.wait()

    async with pix_manager(*PERSONS) as manager:
        reference = {
            "name": "mpi",
            "type": "pix",
            "host": "127.0.0.1",
            "port": manager.port,
            "timeout": "500ms",
        }
        async with scene(start, held, reference) as it:
            manager.behave = be_late
            await nothing_but_local(it, held)
            manager.behave = None
            back.set()
            assert studies(await mine(it)) == held.mine


async def test_pixm_finds_the_same(start: MakeProxy) -> None:
    """By ITI-83, where domains are OIDs; what it answers with an error is an outage, too."""
    held = Held()

    async def fail(_question: Question, writer: asyncio.StreamWriter) -> None:
        writer.write(response(500))

    persons = [[(f"urn:oid:{oid}", value) for value, _, oid in person] for person in PERSONS]
    async with pixm_manager(*persons) as manager:
        url = f"http://127.0.0.1:{manager.port}/fhir"
        reference = {"name": "mpi", "type": "pixm", "url": url}
        async with scene(start, held, reference) as it:
            manager.behave = fail
            await nothing_but_local(it, held)
            manager.behave = None
            assert studies(await mine(it)) == held.mine


async def nothing_but_local(it: Setup, held: Held) -> None:
    """Query, and see both sources fail without having been asked."""
    result = await mine(it)
    assert result.final.status == 0x0000
    assert studies(result) == {str(held.here[0].StudyInstanceUID)}
    failed = {line["source"] for line in it.proxy.named("source_query_failed")}
    assert failed == {"north", "south"}
    assert [one.asked("find") for one in it.archives] == [[], []]


async def test_a_contradiction_is_withheld(start: MakeProxy, tmp_path: Path) -> None:
    """The cross-reference is wrong: who it leads to was born on another day."""
    held = Held()
    wrong = f"local,north,south\n{PATIENT_ID},{PATIENT_ID},{SOUTH_ID}\n"
    async with scene(start, held, table(tmp_path, wrong)) as it:
        await loaded(it)
        result = await mine(it)
        assert studies(result) == held.mine - {str(held.north[0].StudyInstanceUID)}
        (line,) = it.proxy.named("identity_conflict")
        assert (line["source"], line["reason"]) == ("north", "birth_date")
        assert line["study_instance_uid"] == held.third[0].StudyInstanceUID
        _, page = await asyncio.to_thread(it.proxy.http, "/")
        assert "north identity_conflict" in page
        withheld = "dicomproxy_identity_withheld_total"
        assert await it.proxy.metric(withheld, source="north", reason="birth_date") == 1
