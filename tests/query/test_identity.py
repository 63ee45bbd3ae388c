"""Where patients have other IDs elsewhere: theirs are found, only theirs, and they look local."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydicom import Dataset

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import SERIES_INSTANCE_UID
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.accession import AccessionPolicy
from dicomproxy.identity.coercion_rules import Action, Rule
from dicomproxy.identity.safety import Unverified
from dicomproxy.ports import CrossReferenceError, Failure, Location, SourceError, SourceQuery
from dicomproxy.query import merge
from dicomproxy.query.coordinator import QueryCoordinator
from dicomproxy.query.waiting import Waiting
from tests.identity.providers import HOSPITAL, SOUTH, local, north
from tests.query.builders import RememberedLocations, ScriptedLocal, ScriptedSource, identifier
from tests.query.identities import Site, patient_row
from tests.query.test_coordinator import Bench, rows, uids
from tests.sentinel import ACCESSION_NUMBER, PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.log_watch import LogWatch

THERE = "N-0815"
ELSEWHERE = "Patient^Sentinel^Dr."
ME = {local(PATIENT_ID), north(THERE), PatientId("S/22", SOUTH)}
HERE = patient_row(PATIENT_ID, PATIENT_NAME, PATIENT_BIRTH_DATE)
KEYS = {
    "QueryRetrieveLevel": "STUDY",
    "PatientID": PATIENT_ID,
    "IssuerOfPatientID": "",
    "PatientName": "",
    "PatientBirthDate": "",
    "PatientSex": "",
    "OtherPatientIDsSequence": [],
    "AccessionNumber": "",
    "StudyInstanceUID": "",
}
NAME, ID, ISSUER, BIRTH_DATE, SEX = 0x00100010, 0x00100020, 0x00100021, 0x00100030, 0x00100040
OTHER_IDS, ACCESSION = 0x00101002, 0x00080050


class IdentityBench(Bench):
    """A coordinator that knows who patients are elsewhere."""

    def __init__(
        self,
        site: Site,
        here: ScriptedLocal,
        *sources: ScriptedSource,
        locations: RememberedLocations | None = None,
        local_seconds: float = 10.0,
    ) -> None:
        super().__init__(here, *sources, locations=locations)
        self.coordinator = QueryCoordinator(
            here,
            {source.name: source for source in sources},
            self.locations,
            self.audit,
            local_seconds,
            lambda _study: False,
            identity=site.service,
        )


@asynccontextmanager
async def bench(site: Site, *args: Any, **kwargs: Any) -> AsyncIterator[IdentityBench]:
    made = IdentityBench(site, *args, **kwargs)
    try:
        yield made
    finally:
        await made.coordinator.close()
        await site.service.close()


def there(uid: str, patient: str = THERE, **elements: Any) -> Identifier:
    """Make a study as the north has it."""
    given = {
        "PatientName": ELSEWHERE,
        "PatientBirthDate": PATIENT_BIRTH_DATE,
        "PatientSex": "F",
    }
    return identifier(
        QueryRetrieveLevel="STUDY",
        StudyInstanceUID=uid,
        PatientID=patient,
        **(given | elements),
    )


def source(name: str, *script: Any) -> ScriptedSource:
    return ScriptedSource(name, *script)


# --------------------------------------------------------------------- both ways


async def test_a_source_is_asked_by_its_own_id_and_its_answers_look_local() -> None:
    """The question has the ID there and nothing else of the patient; the row has all from here."""
    archive = source("north", there("1.2", IssuerOfPatientID="NORTH"))
    site = Site(ME, here=[HERE])
    async with bench(site, ScriptedLocal(), archive) as it:
        found = await it.answers(**(KEYS | {"PatientName": PATIENT_NAME}))
    (question,) = archive.asked
    assert question.identifier.text(ID) == THERE
    for tag in (NAME, BIRTH_DATE, SEX, ISSUER):
        assert tag in question.identifier
        assert question.identifier.is_empty(tag)
    (row,) = rows(found)
    assert [row.text(tag) for tag in (ID, ISSUER, NAME, BIRTH_DATE, SEX)] == [
        PATIENT_ID,
        HOSPITAL.namespace,
        PATIENT_NAME,
        PATIENT_BIRTH_DATE,
        "F",
    ]
    assert [item.text(ID) for item in row.items(OTHER_IDS)] == [THERE]
    assert it.locations.known["1.2", "north"].patient_id == THERE
    assert it.summary.failed_sources == ()


async def test_what_a_source_leaves_out_of_the_patient_is_this_sites_to_say() -> None:
    """A row that says neither name nor issuer carries those of the local patient."""
    bare = identifier(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2", PatientID=THERE)
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), source("north", bare)) as it:
        (row,) = rows(await it.answers(**KEYS))
    assert row.text(NAME) == PATIENT_NAME
    assert row.text(ISSUER) == HOSPITAL.namespace


async def test_a_source_that_does_not_know_the_patient_is_not_asked() -> None:
    """It is no failure either, and nothing is recorded as disclosed to it."""
    known, unknown = source("north", there("1.2")), source("south", there("1.3"))
    site = Site({local(PATIENT_ID), north(THERE)}, here=[HERE])
    async with bench(site, ScriptedLocal(), known, unknown) as it:
        found = await it.answers(**KEYS)
    assert uids(found) == ["1.2"]
    assert unknown.asked == []
    assert it.summary.failed_sources == ()
    assert it.summary.sources == ("north",)
    assert set(it.audit.outcomes()) == {"north"}


async def test_an_outage_of_the_cross_reference_is_a_failure_of_the_source(
    log_watch: LogWatch,
) -> None:
    """Nobody takes it for a patient without priors, and the local rows are there all the same."""
    archive = source("north", there("1.2"))
    site = Site(ME)
    site.manager.failure = CrossReferenceError(Failure.TIMEOUT, "deadline")
    async with bench(site, ScriptedLocal(there("1.1", PATIENT_ID)), archive) as it:
        found = await it.answers(**KEYS)
    assert uids(found) == ["1.1"]
    assert archive.asked == []
    assert it.summary.failed_sources == ("north",)
    (line,) = log_watch.named("source_query_failed")
    assert (line["source"], line["failure"], line["reason"]) == ("north", "timeout", "deadline")


async def test_several_ids_of_a_patient_are_all_asked_for() -> None:
    """Where the site allows several, what either has is the patient's."""
    archive = source("north", there("1.2"), there("1.3", "N-2"))
    async with bench(Site(ME | {north("N-2")}, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**KEYS)
    assert sorted(query.identifier.text(ID) for query in archive.asked) == [THERE, "N-2"]
    assert sorted(uids(found)) == ["1.2", "1.3"]


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"PatientName": PATIENT_NAME}, True),
        ({"PatientName": "SENTINEL*"}, True),
        ({"PatientName": "Patient*"}, False),  # as it is spelt there only
        ({"PatientBirthDate": PATIENT_BIRTH_DATE}, True),
        ({"PatientBirthDate": "19990101"}, False),
        ({"PatientSex": "M"}, False),
    ],
)
async def test_demographics_are_matched_against_the_local_patient(
    keys: dict[str, str], shown: bool
) -> None:
    """Whatever spelling the source has, and although it ignores keys."""
    archive = source("north", there("1.2"))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**(KEYS | keys))
    assert bool(rows(found)) is shown


async def test_an_id_of_another_domain_is_asked_of_the_local_pacs_alone() -> None:
    """An issuer other than this site's: the number means somebody else."""
    archive = source("north", there("1.2"))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        await it.answers(**(KEYS | {"IssuerOfPatientID": "ELSEWHERE"}))
    assert archive.asked == []
    assert it.summary.local_only == "patient_of_another_domain"


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Ντούμας^Zoë=山"),
    ],
)
@pytest.mark.parametrize("there_in", ["", "ISO_IR 100", "ISO_IR 192"])
async def test_local_names_survive_in_whatever_a_source_writes(
    charset: str, name: str, there_in: str
) -> None:
    """The row has the local name, asked for by it, in a character set that can write it."""
    person = identifier(
        charset,
        PatientID=PATIENT_ID,
        PatientName=name,
        PatientBirthDate=PATIENT_BIRTH_DATE,
        PatientSex="F",
    )
    described = "Schädel" if there_in else "Skull"
    row = identifier(
        there_in,
        QueryRetrieveLevel="STUDY",
        StudyInstanceUID="1.2",
        PatientID=THERE,
        PatientName=ELSEWHERE,
        StudyDescription=described,
    )
    async with bench(Site(ME, here=[person]), ScriptedLocal(), source("north", row)) as it:
        asked = KEYS | {"PatientName": name, "StudyDescription": ""}
        (got,) = rows(await it.answers(charset=charset, **asked))
    assert got.text(NAME) == name
    assert got.text(0x00081030) == described


async def test_other_ids_asked_for_are_those_that_answers_show() -> None:
    """The foreign ID is one of them, whatever the source would make of the key."""
    archive = source("north", there("1.2"))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        for value, shown in ((THERE, True), ("N-9", False)):
            item = Dataset()
            item.PatientID = value
            found = await it.answers(**(KEYS | {"OtherPatientIDsSequence": [item]}))
            assert bool(rows(found)) is shown
    assert all(not query.identifier.items(OTHER_IDS) for query in archive.asked)


async def test_a_caller_that_is_a_source_is_answered_from_here_alone() -> None:
    """Two proxies that face each other ask no cross-reference in a circle either."""
    site, archive = Site(ME, here=[HERE]), source("north", there("1.2"))
    async with bench(site, ScriptedLocal(), archive) as it:
        await it.answers(caller_changes={"is_source": True}, **KEYS)
    assert archive.asked == []
    assert site.manager.asked == []


# --------------------------------------------------------------- wrong patients


@pytest.mark.parametrize(
    "wrong",
    [
        there("1.2", PATIENT_ID),  # somebody whose ID there equals the local one
        there("1.2", "N-9"),
        there("1.2", ""),
        there("1.2", IssuerOfPatientID="SOUTH"),
    ],
    ids=["same number", "another", "none", "another issuer"],
)
async def test_answers_about_somebody_else_are_withheld(wrong: Identifier) -> None:
    """A source that ignores the Patient ID shows nothing of its other patients."""
    archive = source("north", wrong, there("1.3"))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**KEYS)
    assert uids(found) == ["1.3"]
    assert it.summary.withheld == 1
    assert it.locations.holders("1.2") == set()


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"PatientBirthDate": "19990101"}, "birth_date"),
        ({"PatientSex": "M"}, "sex"),
        ({"PatientBirthDate": "19990101", "PatientSex": "M"}, "birth_date_and_sex"),
    ],
)
async def test_a_contradiction_is_withheld_and_reported(
    elements: dict[str, str], reason: str, log_watch: LogWatch
) -> None:
    """Once for the study, without a value; and the study is not located there."""
    archive = source("north", there("1.2", **elements), there("1.2", **elements), there("1.3"))
    seen = RememberedLocations(Location("1.2", "north", THERE))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive, locations=seen) as it:
        # Compared is what the workstation need not have asked for.
        bare = {key: KEYS[key] for key in ("QueryRetrieveLevel", "PatientID", "StudyInstanceUID")}
        found = await it.answers(**bare)
    assert all(tag in archive.asked[0].identifier for tag in (NAME, ISSUER, BIRTH_DATE, SEX))
    assert uids(found) == ["1.3"]
    (line,) = log_watch.named("identity_conflict")
    assert (line["source"], line["reason"], line["study_instance_uid"]) == ("north", reason, "1.2")
    assert it.locations.holders("1.2") == set()
    assert it.summary.withheld == 2


@pytest.mark.parametrize("unverified", list(Unverified))
async def test_a_patient_known_only_elsewhere_is_found_unless_the_site_withholds_them(
    unverified: Unverified,
) -> None:
    """Nothing here to compare with: the row has the local ID, and what the source says else."""
    async with bench(
        Site(ME, unverified=unverified), ScriptedLocal(), source("north", there("1.2"))
    ) as it:
        found = await it.answers(**KEYS)
    shown = [(row.text(ID), row.text(NAME)) for row in rows(found)]
    assert shown == ([(PATIENT_ID, ELSEWHERE)] if unverified is Unverified.SHOW else [])


async def test_a_local_pacs_that_fails_leaves_nothing_to_compare_with() -> None:
    """That is the same to a source as a patient whom it does not know."""
    site = Site(ME)
    site.local_failure = SourceError("local", Failure.UNREACHABLE)
    async with bench(site, ScriptedLocal(), source("north", there("1.2"))) as it:
        assert uids(await it.answers(**KEYS)) == ["1.2"]


@pytest.mark.parametrize("failure", [None, SourceError("local", Failure.TIMEOUT)])
async def test_a_patient_whom_the_local_pacs_does_not_tell_is_asked_about_once_a_query(
    failure: Exception | None,
) -> None:
    """Not for each row: one that hangs would cost its deadline as often."""
    site = Site(ME)
    site.local_failure = failure
    studies = [there(f"1.{number}") for number in range(2, 42)]
    async with bench(site, ScriptedLocal(), source("north", *studies)) as it:
        assert len(uids(await it.answers(**KEYS))) == len(studies)
    assert len(site.asked) == 1


class Silent(Site):
    """Its local PACS does not even say who the patient is."""

    async def ask(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        self.asked.append(query)
        await asyncio.Event().wait()
        yield HERE


async def test_a_silent_local_pacs_holds_remote_rows_for_one_deadline() -> None:
    """Its answer is waited for, then it is asked who the patient is, within the same time."""
    site = Silent(ME)
    local_pacs = ScriptedLocal(asyncio.Event())
    archive = source("north", there("1.2"))
    async with asyncio.timeout(8), bench(site, local_pacs, archive, local_seconds=0.2) as it:
        async for answer in it.find(**KEYS):
            assert uids([answer]) == ["1.2"]
            break
    assert len(site.asked) == 1


async def test_a_local_pacs_that_is_slow_to_answer_is_asked_who_the_patient_is() -> None:
    """What contradicts is withheld all the same, before the local PACS has answered."""
    site = Site(ME, here=[HERE])
    local_pacs = ScriptedLocal(asyncio.Event())
    archive = source("north", there("1.2", PatientSex="M"), there("1.3"))
    async with bench(site, local_pacs, archive, local_seconds=0.2) as it:
        async for answer in it.find(**KEYS):
            assert uids([answer]) == ["1.3"]
            break


async def test_who_the_patient_is_is_learnt_from_the_same_query() -> None:
    """The local PACS is not asked again for what it just said, however fast the source is."""
    answered = asyncio.Event()

    async def answer() -> None:
        answered.set()

    archive = source("north", there("1.2", PatientSex="M"), answer)
    site = Site(ME)
    mine = there("1.1", PATIENT_ID, PatientName=PATIENT_NAME)
    async with bench(site, ScriptedLocal(answered, mine), archive) as it:
        found = await it.answers(**KEYS)
    assert uids(found) == ["1.1"]  # the other one contradicts it
    assert site.asked == []


class Located(RememberedLocations):
    """Says when something was located."""

    def __init__(self) -> None:
        self.located = asyncio.Event()
        super().__init__()

    def remember(self, locations: Sequence[Location]) -> None:
        super().remember(locations)
        if locations:
            self.located.set()


async def test_records_merged_meanwhile_count_at_once() -> None:
    """A notice between two answers of one source: the second is somebody else's by then."""
    gate = asyncio.Event()
    archive = source("north", there("1.2"), gate, there("1.3"))
    site, seen = Site(ME, here=[HERE]), Located()
    async with bench(site, ScriptedLocal(), archive, locations=seen) as it, asyncio.timeout(60):
        answers = asyncio.create_task(it.answers(**KEYS))
        await seen.located.wait()
        site.manager.persons = [{local(PATIENT_ID)}, {local("2"), north(THERE)}]
        site.identities.forget(local(PATIENT_ID))
        gate.set()
        found = await answers
    assert uids(found) == ["1.2"]
    assert ("north", THERE) in site.forgotten
    assert it.summary.withheld == 1


# ------------------------------------------------------ questions without a patient


async def test_an_answer_to_a_query_without_a_patient_is_mapped_back() -> None:
    """The row of a study asked for by its UID carries the local identity."""
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), source("north", there("1.2"))) as it:
        (row,) = rows(await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": "1.2"})))
    assert (row.text(ID), row.text(NAME)) == (PATIENT_ID, PATIENT_NAME)


@pytest.mark.parametrize(
    ("persons", "reason"),
    [
        ({north(THERE)}, "no_local_id"),
        ({north(THERE), local(PATIENT_ID), local("2")}, "several_local_ids"),
    ],
)
async def test_what_leads_to_no_one_local_id_is_withheld(
    persons: set[PatientId], reason: str, log_watch: LogWatch
) -> None:
    """Reported with the reason; shown to nobody."""
    archive = source("north", there("1.2"))
    async with bench(Site(persons), ScriptedLocal(), archive) as it:
        found = await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": "1.2"}))
    assert rows(found) == []
    (line,) = log_watch.named("identity_unresolved")
    assert (line["source"], line["reason"]) == ("north", reason)


async def test_an_outage_while_answers_come_is_a_failure_of_the_source() -> None:
    """Rows whose patient cannot be found out are lost, and that is said."""
    site = Site(ME)
    site.manager.failure = CrossReferenceError(Failure.UNREACHABLE)
    async with bench(site, ScriptedLocal(), source("north", there("1.2"))) as it:
        found = await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": "1.2"}))
    assert rows(found) == []
    assert it.summary.failed_sources == ("north",)


async def test_rows_whose_patient_is_known_survive_an_outage() -> None:
    """What cannot be found out of one row loses that row, and its source has failed."""
    site = Site(ME, {local("2"), north("N-2")}, here=[HERE])
    archive = source("north", there("1.2", "N-2"), there("1.3"), there("1.4", "N-2"))
    async with bench(site, ScriptedLocal(), archive) as it:
        await site.identities.here(north(THERE), "north")  # remembered from now on
        site.manager.failure = CrossReferenceError(Failure.TIMEOUT)
        uid = "1.2\\1.3\\1.4"
        found = await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": uid}))
    assert uids(found) == ["1.3"]
    assert it.summary.failed_sources == ("north",)


async def test_an_outage_is_waited_for_a_few_times_only() -> None:
    """However many rows there are, each of which might wait for its deadline."""
    site = Site(here=[HERE])
    archive = source("north", *(there(f"1.{number}", f"N-{number}") for number in range(1, 9)))
    site.manager.failure = CrossReferenceError(Failure.TIMEOUT)
    uid = "\\".join(f"1.{number}" for number in range(1, 9))
    async with bench(site, ScriptedLocal(), archive) as it:
        found = await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": uid}))
    assert rows(found) == []
    assert len(site.manager.asked) < 8


async def test_of_studies_that_nobody_asked_about_nobody_is_asked() -> None:
    """A source that ignores the UID costs no lookups of its other patients."""
    site, archive = Site(ME, here=[HERE]), source("north", there("1.9", "N-9"), there("1.2"))
    async with bench(site, ScriptedLocal(), archive) as it:
        found = await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": "1.2"}))
    assert uids(found) == ["1.2"]
    assert {patient for patient, _ in site.manager.asked} == {north(THERE)}


async def test_an_id_of_another_issuer_is_not_remembered_as_the_sources_own() -> None:
    """The memory of locations knows no issuers: the same number is somebody else's there."""
    archive = source("north", there("1.2", PATIENT_ID, IssuerOfPatientID="HOSPITAL"))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**(KEYS | {"PatientID": "", "StudyInstanceUID": "1.2"}))
    assert uids(found) == ["1.2"]
    assert it.locations.known["1.2", "north"].patient_id == ""


async def test_a_pattern_of_ids_is_matched_here() -> None:
    """The source is asked for the study; which local IDs match means nothing to it."""
    archive = source("north", there("1.2"))
    keys = KEYS | {"PatientID": "SENT*", "StudyInstanceUID": "1.2"}
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        assert uids(await it.answers(**keys)) == ["1.2"]
        assert rows(await it.answers(**(keys | {"PatientID": "X*"}))) == []
    assert all(query.identifier.is_empty(ID) for query in archive.asked)


async def test_any_issuer_is_this_sites() -> None:
    """A wild card in its place asks for no other domain."""
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), source("north", there("1.2"))) as it:
        assert uids(await it.answers(**(KEYS | {"IssuerOfPatientID": "*"}))) == ["1.2"]


# ------------------------------------------------------------------- accessions


async def test_a_minted_accession_number_leads_back_to_its_source_alone() -> None:
    """A number seen in an answer is asked of its source by the original, and of no other."""
    archive = source("north", there("1.2", AccessionNumber=ACCESSION_NUMBER))
    other = source("south")
    site = Site(ME, here=[HERE])
    async with bench(site, ScriptedLocal(), archive, other) as it:
        (row,) = rows(await it.answers(**KEYS))
        minted = row.text(ACCESSION)
        assert minted not in ("", ACCESSION_NUMBER)
        assert len(minted) <= 16
        asked = len(other.asked)
        by_number = KEYS | {"PatientID": "", "AccessionNumber": minted}
        (again,) = rows(await it.answers(**by_number))
        assert len(other.asked) == asked
        with_patient = KEYS | {"AccessionNumber": minted}
        (once_more,) = rows(await it.answers(**with_patient))
        assert len(other.asked) == asked
    assert again == once_more == row
    assert [query.identifier.text(ACCESSION) for query in archive.asked] == [
        "",
        ACCESSION_NUMBER,
        ACCESSION_NUMBER,
    ]


async def test_accession_numbers_of_rows_that_wait_are_made_up_together() -> None:
    """A new one costs a write to the disk; rows that came while one was written share the next."""
    archive = source(
        "north", *(there(f"1.2.{number}", AccessionNumber=f"A{number}") for number in range(200))
    )
    site = Site(ME, here=[HERE])
    async with bench(site, ScriptedLocal(), archive) as it:
        shown = {row.text(ACCESSION) for row in rows(await it.answers(**KEYS))}
    assert len(shown) == 200
    assert sum(site.accessions.assigned_together) == 200
    assert len(site.accessions.assigned_together) < 20


async def test_an_accession_number_of_this_site_is_asked_of_no_source() -> None:
    """Alone it means nothing elsewhere; with a patient it is compared with what is shown."""
    archive = source("north", there("1.2", AccessionNumber=ACCESSION_NUMBER))
    site = Site(ME, here=[HERE])
    async with bench(site, ScriptedLocal(), archive) as it:
        await it.answers(**(KEYS | {"PatientID": "", "AccessionNumber": ACCESSION_NUMBER}))
        assert archive.asked == []
        assert rows(await it.answers(**(KEYS | {"AccessionNumber": ACCESSION_NUMBER}))) == []
    assert all(query.identifier.is_empty(ACCESSION) for query in archive.asked)


async def test_a_forgetful_disk_costs_the_way_back_and_nothing_else() -> None:
    """A number that cannot be looked up stays here; a patient's studies are found by the rest."""
    archive = source("north", there("1.2", AccessionNumber=ACCESSION_NUMBER))
    site = Site(ME, here=[HERE])
    async with bench(site, ScriptedLocal(), archive) as it:
        (row,) = rows(await it.answers(**KEYS))
        site.accessions.failing = True
        with_patient = KEYS | {"AccessionNumber": row.text(ACCESSION)}
        assert rows(await it.answers(**with_patient)) == [row]
        assert rows(await it.answers(**(with_patient | {"PatientID": ""}))) == []


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        (AccessionPolicy.KEEP, ACCESSION_NUMBER),
        (AccessionPolicy.EMPTY, ""),
        (AccessionPolicy.PREFIX, f"N-{ACCESSION_NUMBER}"),
    ],
)
async def test_accession_numbers_are_shown_by_policy(policy: AccessionPolicy, shown: str) -> None:
    """And one shown is found again."""
    archive = source("north", there("1.2", AccessionNumber=ACCESSION_NUMBER))
    async with bench(Site(ME, here=[HERE], policy=policy), ScriptedLocal(), archive) as it:
        (row,) = rows(await it.answers(**KEYS))
        assert row.text(ACCESSION) == shown
        assert rows(await it.answers(**(KEYS | {"AccessionNumber": shown}))) == [row]


@pytest.mark.parametrize(
    ("number", "asked"),
    [(ACCESSION_NUMBER, True), ("SENT*", False), ("", False), ("A\\B", False), ("Ä1", False)],
)
async def test_a_number_of_a_shared_system_is_asked_of_those_who_share_it(
    number: str, asked: bool
) -> None:
    """Alone, as it is, and only if it is exactly one; the answer is mapped back."""
    archive = source("north", there("1.2", AccessionNumber=ACCESSION_NUMBER))
    site = Site(ME, here=[HERE], policy=AccessionPolicy.KEEP)
    keys = KEYS | {"PatientID": "", "AccessionNumber": number}
    async with bench(site, ScriptedLocal(), archive) as it:
        found = rows(await it.answers(charset="ISO_IR 100", **keys))
    assert [query.identifier.text(ACCESSION) for query in archive.asked] == [number] * asked
    assert [row.text(ID) for row in found] == [PATIENT_ID] * asked


# ------------------------------------------------------------------ below studies


SERIES_KEYS = {
    "QueryRetrieveLevel": "SERIES",
    "PatientID": PATIENT_ID,
    "StudyInstanceUID": "1.2",
    "SeriesInstanceUID": "",
}
SERIES = identifier(QueryRetrieveLevel="SERIES", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.1")


class Hierarchical(ScriptedSource):
    """A source that answers a question about studies with studies, others with series."""

    def __init__(self, name: str, study: Identifier, *series: Any) -> None:
        super().__init__(name, *series)
        self.study = study

    async def find(self, query: Any) -> AsyncIterator[Identifier]:
        if query.level.value == "STUDY":
            yield self.study
            return
        async for row in super().find(query):
            yield row


SERIES_TOO = identifier(
    QueryRetrieveLevel="SERIES", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.2"
)


@pytest.mark.parametrize("named", [True, False], ids=["by patient", "by study"])
async def test_series_of_a_study_seen_under_another_id_are_found(named: bool) -> None:
    """The location's ID is the source's; it is the same person, and no conflict."""
    seen = RememberedLocations(Location("1.2", "north", THERE))
    archive = Hierarchical("north", there("1.2"), SERIES)
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive, locations=seen) as it:
        keys = SERIES_KEYS if named else SERIES_KEYS | {"PatientID": ""}
        (row,) = rows(await it.answers(**keys))
    assert row.text(ID) == PATIENT_ID
    assert seen.known["1.2", "north"].patient_id == THERE
    assert archive.asked[0].identifier.text(ID) == (THERE if named else "")


@pytest.mark.parametrize(
    "study",
    [there("1.2", PATIENT_ID), there("1.2", PatientSex="M"), there("1.9")],
    ids=["somebody else's", "contradicting", "not there"],
)
async def test_series_of_a_study_that_is_not_the_patients_are_withheld(study: Identifier) -> None:
    """Rows below STUDY level need not say whose they are: their study is asked for."""
    archive = Hierarchical("north", study, SERIES)
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        assert rows(await it.answers(**SERIES_KEYS)) == []
    assert it.locations.holders("1.2") == set()


async def test_a_study_seen_under_somebody_elses_id_is_not_asked_for(log_watch: LogWatch) -> None:
    """The ID there equals the local one, and is another person's."""
    seen = RememberedLocations(Location("1.2", "north", PATIENT_ID))
    archive = Hierarchical("north", there("1.2", PATIENT_ID), SERIES)
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive, locations=seen) as it:
        assert rows(await it.answers(**SERIES_KEYS)) == []
    assert archive.asked == []
    assert [line["source"] for line in log_watch.named("identity_conflict")] == ["north"]


async def test_series_that_name_another_patient_than_their_study_are_withheld() -> None:
    """An archive that mixes up two patients is believed about neither."""
    mixed = identifier(
        QueryRetrieveLevel="SERIES",
        StudyInstanceUID="1.2",
        SeriesInstanceUID="1.2.1",
        PatientID="N-9",
    )
    archive = Hierarchical("north", there("1.2"), mixed, SERIES_TOO)
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**SERIES_KEYS)
    assert uids(found, SERIES_INSTANCE_UID) == ["1.2.2"]


async def test_a_study_of_nobody_known_here_is_not_asked_for_where_the_local_pacs_has_it() -> None:
    """Its patient elsewhere leads to no local ID, so that it cannot be the local one."""
    seen = RememberedLocations(Location("1.2", "local", "2"), Location("1.2", "north", "N-9"))
    archive = Hierarchical("north", there("1.2", "N-9"), SERIES)
    keys = SERIES_KEYS | {"PatientID": ""}
    async with bench(Site(ME), ScriptedLocal(), archive, locations=seen) as it:
        assert rows(await it.answers(**keys)) == []
    assert archive.asked == []


async def test_a_study_that_is_somebody_elses_here_is_withheld(log_watch: LogWatch) -> None:
    """The local PACS has it under another patient than the source's leads to, and that is said."""
    seen = RememberedLocations(Location("1.2", "local", "2"), Location("1.2", "north", ""))
    archive = Hierarchical("north", there("1.2"), SERIES)
    keys = SERIES_KEYS | {"PatientID": ""}
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive, locations=seen) as it:
        assert rows(await it.answers(**keys)) == []
    (line,) = log_watch.named("identity_conflict")
    assert (line["source"], line["reason"]) == ("north", "holders_disagree")


# ----------------------------------------------------------------------- the rest


async def test_rules_are_applied_to_answers_and_their_keys_matched_here() -> None:
    """What a rule changes is not matched by the source, which has it otherwise."""
    rule = Rule(Action.PREFIX, 0x00081030, "LO", "EXT ")
    archive = source("north", there("1.2", StudyDescription="CT head"))
    site = Site(ME, here=[HERE], rules=(rule,))
    async with bench(site, ScriptedLocal(), archive) as it:
        (row,) = rows(await it.answers(**(KEYS | {"StudyDescription": "EXT*"})))
    assert row.text(0x00081030) == "EXT CT head"
    assert archive.asked[0].identifier.is_empty(0x00081030)


async def test_what_rules_need_is_asked_for_too() -> None:
    """What is copied, and the modality that decides; neither is shown unless it was asked for."""
    rule = Rule(Action.COPY, 0x00081030, "LO", other=0x00081040, modalities=frozenset({"CT"}))
    row = there("1.2", StudyDescription="there", InstitutionalDepartmentName="CT unit")
    row.set_text(0x00080061, "CT")
    site = Site(ME, here=[HERE], rules=(rule,))
    archive = source("north", row)
    async with bench(site, ScriptedLocal(), archive) as it:
        (got,) = rows(await it.answers(**(KEYS | {"StudyDescription": ""})))
    assert {0x00081040, 0x00080061} <= {element.tag for element in archive.asked[0].identifier}
    assert got.text(0x00081030) == "CT unit"
    assert not {0x00081040, 0x00080061} & {element.tag for element in got}


async def test_what_rules_need_of_one_another_is_asked_for_too() -> None:
    """A study is described in an answer as in its objects, by whatever detour."""
    rules = (
        Rule(Action.COPY, 0x00081010, "SH", other=0x00081040),
        Rule(Action.COPY, 0x00081030, "LO", other=0x00081010),
    )
    row = there("1.2", StudyDescription="there", InstitutionalDepartmentName="CT unit")
    archive = source("north", row)
    site = Site(ME, here=[HERE], rules=rules)
    async with bench(site, ScriptedLocal(), archive) as it:
        (got,) = rows(await it.answers(**(KEYS | {"StudyDescription": ""})))
    assert {0x00081010, 0x00081040} <= {element.tag for element in archive.asked[0].identifier}
    assert got.text(0x00081030) == "CT unit"
    assert not {0x00081010, 0x00081040} & {element.tag for element in got}


async def test_a_source_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound on its rows nothing more is taken of it, and it is told so."""
    monkeypatch.setattr(merge, "MAX_ROWS_PER_SOURCE", 3)
    archive = source("north", *(there(f"1.2.{number}") for number in range(1000)))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**KEYS)
    assert len(uids(found)) == 3
    assert archive.ended == ["closed"]
    assert it.summary.failed_sources == ()


async def test_rows_before_a_failure_count() -> None:
    """A source that breaks off has said what it has said."""
    archive = source("north", there("1.2"), SourceError("north", Failure.ABORTED))
    async with bench(Site(ME, here=[HERE]), ScriptedLocal(), archive) as it:
        found = await it.answers(**KEYS)
    assert uids(found) == ["1.2"]
    assert it.summary.failed_sources == ("north",)


async def test_what_waits_is_bounded_and_taken_together() -> None:
    """Whoever puts waits for room, and hears when no more is wanted."""
    waiting = Waiting()
    row, full = identifier(), asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:

        async def fill() -> int:
            put = 0
            while await waiting.put(row, ""):
                put += 1
                if put == 200:
                    full.set()
            return put

        filling = group.create_task(fill())
        first = await waiting.take()
        await full.wait()
        assert not filling.done()
        assert len(await waiting.take()) == 100
        waiting.stop()
    assert len(first) == 100
    assert filling.result() == 200
    waiting.end()
    assert await waiting.take() == []
