"""One person under three IDs, among others who look like them: only theirs, and made local.

Who is who stands in a table. One region serves all tests of this module; each that
changes something has a person of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydicom import Dataset

from tests.e2e.conftest import proxies
from tests.e2e.identities import (
    NAMESAKE,
    NORTH_ID,
    TABLE,
    Held,
    Listing,
    Since,
    arrived,
    ct,
    loaded,
    mine,
    scene,
    studies,
    table,
    uid,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.sentinel import ACCESSION_NUMBER, PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Somebody whose record is corrected; of whom elsewhere little is said; whom nobody here knows;
# whose link is wrong; and whose link goes.
PEOPLE = ("MENDED", "BARE", "STRANGER", "WRONG", "LEAVING")
ROWS = "".join(f"{name}-HERE,N-{name},S-{name}\n" for name in PEOPLE)


class Region(Held):
    """As usual, and studies of the others by name and archive."""

    def __init__(self) -> None:
        super().__init__()
        unsaid = {"PatientBirthDate": "", "PatientSex": "O"}
        others: dict[tuple[str, str], dict[str, Any]] = {
            (name, archive): {}
            for name in PEOPLE
            for archive in ("local", "north", "south")
            if (name, archive) != ("STRANGER", "local")
        }
        others["BARE", "north"] = others["BARE", "south"] = unsaid
        others["WRONG", "north"] = {"PatientBirthDate": "19550505"}
        others["WRONG", "south"] = {"PatientSex": "M"}
        self.of: dict[tuple[str, str], list[Dataset]] = {}
        for (name, archive), values in others.items():
            patient = f"{name}-HERE" if archive == "local" else f"{archive[0].upper()}-{name}"
            number = f"{name}-{archive}"
            self.of[name, archive] = ct(patient, AccessionNumber=number, **values)
            self.more[archive] += self.of[name, archive]

    def studies_of(self, name: str, *archives: str) -> set[str]:
        return {uid(self.of[name, archive]) for archive in archives}


@pytest.fixture(scope="module")
def held() -> Region:
    """What all archives hold."""
    return Region()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the table is."""
    return tmp_path_factory.mktemp("identity")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(held: Region, directory: Path) -> AsyncIterator[Setup]:
    """Run it; no log may name anybody's ID."""
    reference = table(directory, TABLE + ROWS)
    north = {"identity": {"unverified": "withhold"}}
    async with proxies(directory) as start, scene(start, held, reference, north=north) as made:
        await loaded(made)
        yield made
        hidden = [NORTH_ID, "-HERE", *(f"{where}-{name}" for where in "NS" for name in PEOPLE)]
        assert [value for value in hidden if value in made.proxy.log] == []


@pytest.mark.parametrize("careless", [False, True], ids=["exact", "careless"])
async def test_only_the_persons_studies_are_found_and_all_look_local(
    it: Setup, held: Region, careless: bool
) -> None:
    """By the local ID, from three archives, whoever else they hold and show."""
    north = it.archives[0]
    assert isinstance(north, Listing)
    north.careless = careless
    result = await mine(it)
    north.careless = False
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
    asked = north.asked("find")[-1].identifier
    assert asked.PatientID == NORTH_ID
    assert not asked.PatientName
    # One that an answer showed leads back to its study, alone.
    again = await mine(it, PatientID="", AccessionNumber=remote[0].AccessionNumber)
    here = {str(one.StudyInstanceUID) for one in it.local.instances}  # which knows no such key
    assert studies(again) - here == {remote[0].StudyInstanceUID}


async def test_what_is_delivered_is_the_local_patients(it: Setup, held: Region) -> None:
    """Same values as in the answers, the pixels as they were, the originals on record."""
    rows = {str(row.StudyInstanceUID): row for row in (await mine(it)).rows}
    for original in (held.north, held.south):
        result = await it.reading.move(the_study(original))
        assert figures(result.final) == (0x0000, 2, 0, 0)
        row = rows[uid(original)]
        received = arrived(it.reading)
        for one in original:
            got = received[str(one.SOPInstanceUID)]
            for keyword in ("PatientID", "PatientName", "PatientBirthDate", "AccessionNumber"):
                assert got[keyword].value == row[keyword].value
            assert got.PixelData == one.PixelData
            (record,) = got.OriginalAttributesSequence
            (before,) = record.ModifiedAttributesSequence
            assert before.PatientID == one.PatientID
            assert before.AccessionNumber == ACCESSION_NUMBER


async def test_others_studies_are_not_delivered_as_the_persons(it: Setup, held: Region) -> None:
    """Asked for with the local ID, the study of somebody whose ID there is the same stays there."""
    for others, local_id in ((held.third, "17"), (held.namesake, "18")):
        wanted = the_study(others)
        wanted.PatientID = PATIENT_ID
        assert not (await it.reading.move(wanted, root="P")).final.completed
        assert arrived(it.reading) == {}
        # They have an ID of their own here. Nobody here knows them, and so the north keeps them.
        moved = await it.reading.move(the_study(others))
        assert {one.PatientID for one in arrived(it.reading).values()} <= {local_id}
        assert not moved.final.completed


async def test_ids_of_sources_and_of_nobody_find_nothing(it: Setup) -> None:
    """Their own IDs mean nothing here, whoever else has them here or there."""
    for foreign in (NORTH_ID, NAMESAKE, "N-BARE", "NOBODY"):
        result = await mine(it, PatientID=foreign)
        assert (result.final.status, studies(result)) == (0x0000, set())


async def test_an_issuer_in_the_question_says_whose_the_id_is(it: Setup, held: Region) -> None:
    """With the local issuer it is a local ID; with any other it is somebody else's."""
    assert studies(await mine(it, IssuerOfPatientID="HOSPITAL")) >= held.mine - {uid(held.here)}
    asked = [len(one.requests) for one in it.archives]
    for patient, issuer in (
        (PATIENT_ID, "NORTH"),
        (NORTH_ID, "NORTH"),
        (NORTH_ID, "SOUTH"),
        (PATIENT_ID, "UNKNOWN"),
    ):
        found = studies(await mine(it, PatientID=patient, IssuerOfPatientID=issuer))
        assert found <= {uid(held.here)}  # an archive that overlooks the issuer
    assert [len(one.requests) for one in it.archives] == asked


async def test_a_contradiction_is_withheld(it: Setup, held: Region) -> None:
    """The cross-reference is wrong: who it leads to is of another age, or of another sex."""
    since = Since(it)
    result = await mine(it, PatientID="WRONG-HERE")
    assert studies(result) == held.studies_of("WRONG", "local")
    _, page = await asyncio.to_thread(it.proxy.http, "/")
    for source, reason in (("north", "birth_date"), ("south", "sex")):
        (line,) = (one for one in since.named("identity_conflict") if one["source"] == source)
        assert line["reason"] == reason
        assert line["study_instance_uid"] == uid(held.of["WRONG", source])
        assert f"{source} identity_conflict" in page
        withheld = "dicomproxy_identity_withheld_total"
        assert await it.proxy.metric(withheld, source=source, reason=reason) == 1
        # Nor by its UID, which somebody may have noted.
        moved = await it.reading.move(the_study(held.of["WRONG", source]))
        assert moved.final.status != 0x0000
        assert not moved.final.completed
    assert arrived(it.reading) == {}


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [("PatientBirthDate", "19010204", "birth_date"), ("PatientSex", "M", "sex")],
)
async def test_what_the_local_pacs_corrects_counts_for_what_was_shown_before(
    it: Setup, held: Region, keyword: str, value: str, reason: str
) -> None:
    """A contradiction withholds what was located, and what was cached and delivered."""
    everywhere = held.studies_of("MENDED", "local", "north", "south")
    cached, known = held.of["MENDED", "north"], held.of["MENDED", "south"]
    assert studies(await mine(it, PatientID="MENDED-HERE")) == everywhere
    assert figures((await it.reading.move(the_study(cached))).final)[1] == 2
    arrived(it.reading)
    since, before = Since(it), getattr(held.of["MENDED", "local"][0], keyword)
    for one in held.of["MENDED", "local"]:
        setattr(one, keyword, value)
    # Even where it answers last.
    asked = [len(one.asked("find")) for one in it.archives]
    it.local.hold()
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(mine(it, PatientID="MENDED-HERE"))
        await it.proxy.until(
            lambda: all(
                len(one.asked("find")) > count
                for one, count in zip(it.archives, asked, strict=True)
            ),
            "asked",
        )
        it.local.release()
    assert studies(asking.result()) == held.studies_of("MENDED", "local")
    for instances in (cached, known):
        moved = await it.reading.move(the_study(instances))
        assert moved.final.status != 0x0000
        assert not moved.final.completed
    assert arrived(it.reading) == {}
    lines = since.named("identity_conflict")
    assert {(one["study_instance_uid"], one["reason"]) for one in lines} == {
        (uid(cached), reason),
        (uid(known), reason),
    }
    _, page = await asyncio.to_thread(it.proxy.http, "/")
    assert PATIENT_BIRTH_DATE not in page
    assert "19010204" not in it.proxy.log + page
    # Put right again, it is as before.
    for one in held.of["MENDED", "local"]:
        setattr(one, keyword, before)
    assert studies(await mine(it, PatientID="MENDED-HERE")) == everywhere
    assert figures((await it.reading.move(the_study(known))).final)[1] == 2
    assert {one.PatientID for one in arrived(it.reading).values()} == {"MENDED-HERE"}


async def test_what_cannot_be_compared_is_shown_or_withheld_as_the_site_says(
    it: Setup, held: Region
) -> None:
    """Nothing said there, nobody known here, or no local PACS to ask: each source by its policy."""
    since = Since(it)
    bare, stranger = held.of["BARE", "north"], held.of["STRANGER", "north"]
    found = studies(await mine(it, PatientID="BARE-HERE"))
    assert found == held.studies_of("BARE", "local", "south")
    found = studies(await mine(it, PatientID="STRANGER-HERE"))
    assert found == held.studies_of("STRANGER", "south")
    for withheld in (bare, stranger):
        moved = await it.reading.move(the_study(withheld))
        assert moved.final.status != 0x0000
        assert not moved.final.completed
    assert arrived(it.reading) == {}
    lines = since.named("identity_unverified")
    assert {(one["source"], one["study_instance_uid"]) for one in lines} == {
        ("north", uid(bare)),
        ("north", uid(stranger)),
    }
    for name in ("BARE", "STRANGER"):
        shown = held.of[name, "south"]
        assert figures((await it.reading.move(the_study(shown))).final)[1] == 2
        assert {one.PatientID for one in arrived(it.reading).values()} == {f"{name}-HERE"}
    it.local.stop()
    result = await mine(it, PatientID="STRANGER-HERE")
    it.local.start()
    assert result.final.status == 0xC001
    assert studies(result) == held.studies_of("STRANGER", "south")


async def test_a_table_that_changes_counts_for_the_next_query(
    it: Setup, held: Region, directory: Path
) -> None:
    """Whom the table no longer links is not found there any more, nor had from the cache."""
    leaving, since = held.of["LEAVING", "north"], Since(it)
    found = studies(await mine(it, PatientID="LEAVING-HERE"))
    assert found == held.studies_of("LEAVING", "local", "north", "south")
    assert figures((await it.reading.move(the_study(leaving))).final)[1] == 2
    arrived(it.reading)
    rows = ROWS.replace("LEAVING-HERE,N-LEAVING,", "LEAVING-HERE,,")
    await asyncio.to_thread(table, directory, TABLE + rows)
    await it.proxy.until(lambda: bool(since.named("cross_reference_table_loaded")), "loaded")
    found = studies(await mine(it, PatientID="LEAVING-HERE"))
    assert found == held.studies_of("LEAVING", "local", "south")
    assert since.named("source_query_failed") == []
    assert not (await it.reading.move(the_study(leaving))).final.completed
    assert arrived(it.reading) == {}
    assert {one["reason"] for one in since.named("identity_unresolved")} == {"no_local_id"}
