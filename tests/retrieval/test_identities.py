"""Retrieves from archives that know the patient by other IDs: only the right person, made local."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from dicomproxy.dataset.header import EXPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import Level, Root
from dicomproxy.identity.coercion import CoercionSettings
from dicomproxy.identity.crossref import Identities, IdentityUnresolved, Provider
from dicomproxy.identity.safety import Demographics, Unverified
from dicomproxy.ports import LOCAL, CrossReferenceError, Failure, RetrieveProgress, SourceQuery
from dicomproxy.retrieval import localize
from dicomproxy.retrieval.coordinator import RetrieveOutcome, RetrieveRequest
from dicomproxy.retrieval.persons import Persons
from tests import sentinel
from tests.identity.providers import HOSPITAL, local, north
from tests.retrieval.fakes import (
    STUDY,
    Archive,
    Lease,
    Reader,
    Workstation,
    World,
    encoded,
    image_request,
    study,
    study_request,
)
from tests.retrieval.identification import Judged, Site
from tests.support.log_watch import LogWatch

NAME, ID, ISSUER = 0x00100010, 0x00100020, 0x00100021
BIRTH_DATE, SEX, OTHER_IDS = 0x00100030, 0x00100040, 0x00101002
ACCESSION, ORIGINALS, MODIFIED = 0x00080050, 0x04000561, 0x04000550
FOREIGN = {NAME: "Sentinel^P", BIRTH_DATE: sentinel.PATIENT_BIRTH_DATE, SEX: "F", ACCESSION: "N77"}

Make = Callable[..., World]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[World] = []

    def one(*sources: Archive, identity: Site | None, **more: object) -> World:
        made.append(World(*sources, identity=identity, **more))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for world in made:
        await world.close()


def held(name: str, patient_id: str, *sizes: int, **values: str) -> Archive:
    one = study(*(sizes or (2,)), patient_id=patient_id)
    one.values = dict(FOREIGN)
    return Archive(name, one)


async def run(
    world: World, workstation: Workstation, request: RetrieveRequest | None = None
) -> RetrieveOutcome:
    async with asyncio.timeout(30):
        return await world.operation(workstation, request).run()


def decoded(workstation: Workstation) -> list[Identifier]:
    return [
        Identifier.decode(data, EXPLICIT_VR_LITTLE_ENDIAN) for data in workstation.data.values()
    ]


def assert_local(workstation: Workstation, foreign: set[str]) -> None:
    """Every object names the local patient, and holds who it was elsewhere."""
    originals = set()
    for one in decoded(workstation):
        assert (one.text(ID), one.text(ISSUER)) == (sentinel.PATIENT_ID, "HOSPITAL")
        assert one.text(NAME) == sentinel.PATIENT_NAME
        assert one.text(BIRTH_DATE) == sentinel.PATIENT_BIRTH_DATE
        assert one.text(ACCESSION) == "X77N"
        assert one.text(0x00204000) == "image", "what nobody changes stays"
        (record,) = one.items(ORIGINALS)
        (modified,) = record.items(MODIFIED)
        assert (modified.text(NAME), modified.text(ACCESSION)) == ("Sentinel^P", "N77")
        originals.add(modified.text(ID))
        assert modified.text(ID) in {other.text(ID) for other in one.items(OTHER_IDS)}
    assert originals == foreign


async def test_objects_arrive_as_those_of_the_local_patient(make: Make) -> None:
    """Patient and accession number are local ones; what came is recorded, and cached as it was."""
    archive = held("north", "N1")
    site = Site()
    world = make(archive, identity=site)
    workstation = Workstation()
    assert await run(world, workstation) == RetrieveOutcome(0x0000, completed=2)
    assert_local(workstation, {"N1"})
    cached = world.store.studies[STUDY]
    uid = f"{STUDY}.1.1"
    assert cached.data[uid] == encoded(STUDY, f"{STUDY}.1", uid, "N1", values=FOREIGN)
    assert site.numbers == [("north", "N77")], "asked for once"
    assert {location.patient_id for location in await world.memory.find(STUDY)} == {"N1"}


async def test_what_is_delivered_twice_is_the_same(make: Make) -> None:
    """What is recorded as the time of the change is when an instance came, not when it goes."""
    world = make(held("north", "N1"), identity=Site())
    world.store.arrived = 1_700_000_000
    first, second = Workstation(), Workstation()

    assert await run(world, first) == RetrieveOutcome(0x0000, completed=2)
    assert await run(world, second) == RetrieveOutcome(0x0000, completed=2)

    assert first.data == second.data
    for one in decoded(first):
        (record,) = one.items(ORIGINALS)
        assert record.text(0x04000562) == one.text(0x00080015) == "20231114221320+0000"


@pytest.mark.parametrize("known", [True, False])
async def test_holders_under_different_ids_of_one_person_serve_one_study(
    make: Make, known: bool
) -> None:
    """What the first has lost comes from the second, which numbers its patients otherwise."""
    one, other = held("north", "N1", 3), held("south", "S1", 3)
    one.withheld = {f"{STUDY}.1.3"}
    world = make(one, other, identity=Site())
    if known:
        world.know(one, other)
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed) == (3, 0)
    assert other.sent[f"{STUDY}.1.3"] == 1
    assert_local(workstation, {"N1", "S1"})


async def test_same_study_of_two_persons_is_served_from_the_first_one_only(
    make: Make, log_watch: LogWatch
) -> None:
    """An archive that has the study under another person is not asked for it."""
    one, other = held("north", "N1", 1), held("south", "S9", 2)
    world = make(one, other, identity=Site())
    workstation = Workstation()
    assert await run(world, workstation) == RetrieveOutcome(0x0000, completed=1)
    assert not other.sent
    (entry,) = log_watch.named("identity_conflict")
    assert (entry["source"], entry["reason"]) == ("south", "holders_disagree")


async def test_local_id_that_is_somebody_elses_in_the_north(
    make: Make, log_watch: LogWatch
) -> None:
    """A study filed there under the very same ID is another person's."""
    archive = held("north", sentinel.PATIENT_ID)
    world = make(archive, identity=Site())
    workstation = Workstation()
    request = RetrieveRequest(Root.PATIENT, Level.STUDY, sentinel.PATIENT_ID, (STUDY,))
    outcome = await run(world, workstation, request)
    assert not workstation.received
    assert not archive.sent
    assert outcome.completed == 0
    assert log_watch.named("identity_conflict")


async def test_all_of_a_patient_is_asked_for_by_the_ids_of_each_source(make: Make) -> None:
    """At PATIENT level each archive is asked for its own ID, and nobody else's studies come."""
    mine, theirs = study(1, patient_id="N1"), study(1, uid="1.2.4", patient_id=sentinel.PATIENT_ID)
    mine.values = dict(FOREIGN)
    archive, other = Archive("north", mine, theirs), held("south", "S1", 1)
    world = make(archive, other, identity=Site())
    workstation = Workstation()
    request = RetrieveRequest(Root.PATIENT, Level.PATIENT, sentinel.PATIENT_ID)
    assert (await run(world, workstation, request)).completed == 1
    assert workstation.received == [f"{STUDY}.1.1"]
    assert_local(workstation, {"N1"})
    assert [query.identifier.text(ID) for query in archive.queries][:1] == ["N1"]
    assert [query.identifier.text(ID) for query in other.queries][:1] == ["S1"]


async def test_source_that_does_not_know_the_patient_is_not_asked(make: Make) -> None:
    """No mapping, no question: PATIENT level asks nobody who has no ID for the patient."""
    site = Site()
    site.reference.persons[0].discard(north("N1"))
    archive = held("north", "N1")
    world = make(archive, identity=site)
    request = RetrieveRequest(Root.PATIENT, Level.PATIENT, sentinel.PATIENT_ID)
    assert (await run(world, Workstation(), request)).completed == 0
    assert not archive.queries


@pytest.mark.parametrize(
    ("patient_id", "issuer"),
    [(sentinel.PATIENT_ID, ""), ("N404", ""), ("N1", "ELSEWHERE"), ("S9", "SOUTH")],
)
async def test_instance_of_somebody_else_is_not_let_in(
    make: Make, patient_id: str, issuer: str, log_watch: LogWatch
) -> None:
    """Another person's, an unknown one's or another domain's ID in a header: not stored, Failed."""
    archive = held("north", "N1")
    uid = f"{STUDY}.1.2"
    archive.headers[uid] = {"patient": patient_id}
    if issuer:
        archive.values[uid] = {ISSUER: issuer}
    world = make(archive, identity=Site())
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed) == (1, 1)
    assert outcome.failed_sop_instance_uids == (uid,)
    assert uid not in workstation.data
    assert uid not in world.store.studies[STUDY].instances
    assert log_watch.named("identity_conflict") or log_watch.named("identity_unresolved")


async def test_header_that_names_the_person_by_the_local_id(make: Make) -> None:
    """An issuer in the header is believed: the local ID may stand in a foreign object."""
    archive = held("north", "N1")
    uid = f"{STUDY}.1.2"
    archive.headers[uid] = {"patient": sentinel.PATIENT_ID}
    archive.values[uid] = {ISSUER: "HOSPITAL"}
    world = make(archive, identity=Site())
    assert (await run(world, Workstation())).completed == 2


@pytest.mark.parametrize("cached", [True, False])
async def test_outage_of_the_cross_reference_is_no_answer(
    make: Make, cached: bool, log_watch: LogWatch
) -> None:
    """Nobody can tell whose it is: nothing is delivered, from the cache neither, and it is said."""
    site, archive = Site(), held("north", "N1")
    world = make(archive, identity=site)
    if cached:
        assert (await run(world, Workstation())).completed == 2
        site.identities.forget_all()
    sent = archive.sent.copy()
    site.reference.failure = CrossReferenceError(Failure.TIMEOUT)
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.status, outcome.completed) == (0xA701, 0)
    assert not workstation.received
    assert archive.sent == sent
    assert log_watch.named("source_not_identified")


async def test_one_holder_is_enough_while_another_cannot_be_identified(make: Make) -> None:
    """An outage for one source keeps nothing from another, and the study is whole."""
    site = Site()
    one, other = held("north", "N1"), held("south", "S1")
    site.judged.pop("south")
    other.studies[STUDY].patient_id = sentinel.PATIENT_ID
    site.reference.failure = CrossReferenceError(Failure.UNREACHABLE)
    world = make(one, other, identity=site)
    workstation = Workstation()
    assert await run(world, workstation) == RetrieveOutcome(0x0000, completed=2)
    assert not one.sent
    assert {one.text(NAME) for one in decoded(workstation)} == {"Sentinel^P"}, "left as it is"


async def test_merge_between_two_retrieves(make: Make) -> None:
    """After the foreign ID has become another person's, what is cached is not the patient's."""
    site, archive = Site(), held("north", "N1")
    world = make(archive, identity=site)
    request = RetrieveRequest(Root.PATIENT, Level.STUDY, sentinel.PATIENT_ID, (STUDY,))
    assert (await run(world, Workstation(), request)).completed == 2
    site.reference.persons = [{local("OTHER"), north("N1")}, {local(sentinel.PATIENT_ID)}]
    site.identities.forget(north("N1"))
    workstation = Workstation()
    assert (await run(world, workstation, request)).completed == 0
    assert not workstation.received


async def test_merge_in_the_middle_of_a_retrieve(make: Make, log_watch: LogWatch) -> None:
    """What comes, or is to be sent, after the merge is withheld, though it was asked for before."""
    site, archive = Site(), held("north", "N1", 4)
    world = make(archive, identity=site)
    workstation = Workstation()
    workstation.gate = asyncio.Event()
    third = asyncio.Event()
    archive.gate = lambda uid: third if uid == f"{STUDY}.1.3" else None
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(world.operation(workstation).run())
        await workstation.waiting.wait()
        site.reference.persons = [{local("OTHER"), north("N1")}]
        site.identities.forget(north("N1"))
        third.set()
        workstation.gate.set()
    outcome = running.result()
    assert (outcome.completed, outcome.failed) == (1, 3)
    assert workstation.received == [f"{STUDY}.1.1"]
    assert log_watch.named("identity_conflict")


@pytest.mark.parametrize("values", [{BIRTH_DATE: "19500101"}, {SEX: "M"}])
async def test_header_that_contradicts_the_local_patient(
    make: Make, values: dict[int, str], log_watch: LogWatch
) -> None:
    """Another birth date or sex in one header: that instance is withheld, the others come."""
    archive = held("north", "N1")
    uid = f"{STUDY}.1.2"
    archive.values[uid] = values
    world = make(archive, identity=Site())
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed) == (1, 1)
    assert uid not in workstation.data
    (entry,) = log_watch.named("identity_conflict")
    assert entry["reason"] == ("sex" if SEX in values else "birth_date")
    (entry,) = log_watch.named("instance_withheld")
    assert (entry["sop_instance_uid"], entry["reason"]) == (uid, "identity_conflict")


async def test_listing_that_contradicts_the_local_patient(make: Make, log_watch: LogWatch) -> None:
    """Another birth date in the archive's own answer: nothing of the study is delivered."""
    archive = held("north", "N1")
    archive.studies[STUDY].values[BIRTH_DATE] = "19500101"
    world = make(archive, identity=Site())
    workstation = Workstation()
    assert (await run(world, workstation)).completed == 0
    assert not workstation.received
    assert log_watch.named("identity_conflict")


@pytest.mark.parametrize("unverified", list(Unverified))
async def test_nothing_to_compare_with(
    make: Make, unverified: Unverified, log_watch: LogWatch
) -> None:
    """Of a patient whom the local PACS does not know, the site decides whether objects are sent."""
    site = Site(unverified=unverified)
    site.known.clear()
    world = make(held("north", "N1"), identity=site)
    workstation = Workstation()
    outcome = await run(world, workstation)
    if unverified is Unverified.SHOW:
        assert outcome.completed == 2
        assert {one.text(NAME) for one in decoded(workstation)} == {"Sentinel^P"}
        assert {one.text(ID) for one in decoded(workstation)} == {sentinel.PATIENT_ID}
    else:
        assert (outcome.completed, outcome.failed) == (0, 2)
        assert log_watch.named("identity_unverified")


async def test_name_that_is_spelt_otherwise_is_told_once(make: Make, log_watch: LogWatch) -> None:
    """A name blocks nothing; that it differs is said once for a study."""
    archive = held("north", "N1", 3)
    archive.studies[STUDY].values[NAME] = "Other^Name"
    world = make(archive, identity=Site())
    assert (await run(world, Workstation())).completed == 3
    assert len(log_watch.named("identity_name_differs")) == 1


async def test_source_without_settings_is_delivered_byte_for_byte(make: Make) -> None:
    """What nothing was decided about arrives as it was sent."""
    archive = held("west", sentinel.PATIENT_ID)
    world = make(archive, identity=Site())
    workstation = Workstation()
    assert (await run(world, workstation, study_request())).completed == 2
    assert workstation.data == world.store.studies[STUDY].data


async def test_header_without_a_patient(make: Make) -> None:
    """An instance that names nobody is its study's patient's, as the archive lists it."""
    archive = held("north", "N1")
    archive.headers[f"{STUDY}.1.2"] = {"patient": ""}
    world = make(archive, identity=Site())
    workstation = Workstation()
    assert (await run(world, workstation)).completed == 2
    assert {one.text(ID) for one in decoded(workstation)} == {sentinel.PATIENT_ID}


async def test_object_that_cannot_be_rewritten_is_not_delivered_as_it_is(
    make: Make, log_watch: LogWatch
) -> None:
    """It is Failed, listed and told of, and the rest of its study comes."""
    archive = held("north", "N1")
    archive.values[f"{STUDY}.1.2"] = {OTHER_IDS: "not a sequence at all"}
    world = make(archive, identity=Site())
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.status, outcome.completed, outcome.failed) == (0xB000, 1, 1)
    assert outcome.failed_sop_instance_uids == (f"{STUDY}.1.2",)
    assert list(workstation.data) == [f"{STUDY}.1.1"]
    assert_local(workstation, {"N1"})
    (told,) = log_watch.named("instance_withheld")
    assert (told["reason"], told["result"]) == ("cannot_splice", "failed")
    assert told["sop_instance_uid"] == f"{STUDY}.1.2"


async def test_stray_that_is_still_being_removed_has_failed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes its time to drop it: the outcome counts it as Failed all the same."""
    archive = held("north", "N1", 1)
    archive.headers[f"{STUDY}.1.1"] = {"patient": "NOBODY"}
    world = make(archive, identity=Site())
    removed, remove = asyncio.Event(), Lease.remove

    async def take_time(lease: Lease, uids: Sequence[str]) -> None:
        await removed.wait()
        await remove(lease, uids)

    monkeypatch.setattr(Lease, "remove", take_time)
    workstation = Workstation()
    outcome = await run(world, workstation, image_request(f"{STUDY}.1", f"{STUDY}.1.1"))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xA702, 0, 1)
    assert outcome.failed_sop_instance_uids == (f"{STUDY}.1.1",)
    assert not workstation.received
    removed.set()


async def test_study_whose_patient_nobody_names(make: Make) -> None:
    """Without an ID in listing and header there is nobody to make it local for."""
    archive = held("north", "")
    world = make(archive, identity=Site())
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed) == (0, 2)
    assert not workstation.received


async def test_value_that_cannot_be_written_fails_that_instance(
    make: Make, log_watch: LogWatch
) -> None:
    """A local name that fits no character set is no reason to deliver the foreign one."""
    site = Site()
    site.known[sentinel.PATIENT_ID] = Demographics("\ud800", sentinel.PATIENT_BIRTH_DATE, "F")
    world = make(held("north", "N1"), identity=site)
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed) == (0, 2)
    assert {entry["reason"] for entry in log_watch.named("instance_withheld")} == {"cannot_encode"}


async def test_cached_object_that_its_archive_has_corrected(make: Make) -> None:
    """What lay in the cache under a wrong birth date is fetched again, and then delivered."""
    archive = held("north", "N1", 3)
    uid = f"{STUDY}.1.2"
    archive.values[uid] = {BIRTH_DATE: "19500101"}
    world = make(archive, identity=Site(), pause=0)
    assert (await run(world, Workstation())).failed == 1
    assert archive.sent[uid] == 1, "what has just come is not asked for again"
    archive.values.clear()
    workstation = Workstation()
    assert await run(world, workstation) == RetrieveOutcome(0x0000, completed=3)
    assert set(archive.sent.values()) == {1, 2}
    assert archive.sent[uid] == 2
    assert_local(workstation, {"N1"})


async def test_cached_object_that_stays_wrong(make: Make) -> None:
    """Fetched again and still somebody else's it fails, and the retrieve ends."""
    archive = held("north", "N1", 2)
    uid = f"{STUDY}.1.2"
    archive.values[uid] = {SEX: "M"}
    world = make(archive, identity=Site(), pause=0)
    await run(world, Workstation())
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed_sop_instance_uids) == (1, (uid,))
    assert archive.sent[uid] == 2


async def test_listing_of_one_holder_spoils_nothing_of_another(make: Make) -> None:
    """A holder that describes somebody else is left out; nothing is fetched twice for it."""
    one, other = held("north", "N1", 3), held("south", "S1", 3)
    other.studies[STUDY].values[SEX] = "M"
    world = make(one, other, identity=Site())
    workstation = Workstation()
    outcome = await run(world, workstation)
    assert (outcome.completed, outcome.failed) == (3, 0)
    assert set(one.sent.values()) == {1}
    assert_local(workstation, {"N1"})


async def test_objects_of_the_local_pacs_are_left_as_they_are(make: Make) -> None:
    """What we deliver for the local PACS is its own, beside what is made local."""
    mine = study(1)
    mine.values = dict(FOREIGN)
    archive = held("north", "N1", 2)
    world = make(archive, identity=Site(), local=Archive("local", mine))
    workstation = Workstation()
    assert (await run(world, workstation)).completed == 2
    own = f"{STUDY}.1.1"
    assert workstation.data[own] == world.store.studies[STUDY].data[own]
    assert world.store.studies[STUDY].instances[own].source == "local"
    assert not archive.sent[own]
    (other,) = (one for one in decoded(workstation) if one.text(0x00080018) != own)
    assert other.text(NAME) == sentinel.PATIENT_NAME


async def test_copy_that_a_caller_may_see_is_made_local_by_its_own_source(make: Make) -> None:
    """Where the same bytes came from two sources, the one that the caller may see is recorded."""
    site = Site()
    for name in ("west", "east"):
        site.judged[name] = Judged(CoercionSettings(name.upper(), "PROXY", HOSPITAL))
    one, other = held("west", sentinel.PATIENT_ID), held("east", sentinel.PATIENT_ID)
    world = make(one, other, identity=site)
    assert (await run(world, Workstation())).completed == 2
    workstation = Workstation()
    async with asyncio.timeout(30):
        operation = world.operation(workstation, caller=world.caller("east"))
        assert (await operation.run()).completed == 2
    for made in decoded(workstation):
        (record,) = made.items(ORIGINALS)
        assert record.text(0x04000564) == "EAST"


async def test_merge_while_cached_objects_are_being_sent(make: Make) -> None:
    """What has not been sent yet when the ID becomes somebody else's is not sent any more."""
    site, archive = Site(), held("north", "N1", 4)
    world = make(archive, identity=site)
    await run(world, Workstation())
    workstation = Workstation()
    workstation.gate = asyncio.Event()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(world.operation(workstation).run())
        await workstation.waiting.wait()
        site.reference.persons = [{local("OTHER"), north("N1")}]
        site.identities.forget(north("N1"))
        workstation.gate.set()
    outcome = running.result()
    assert (outcome.completed, outcome.failed) == (1, 3)
    assert workstation.received == [f"{STUDY}.1.1"]


@pytest.mark.parametrize("patient_id", [sentinel.PATIENT_ID, "N404"])
async def test_listing_under_another_patient_than_was_remembered(
    make: Make, patient_id: str
) -> None:
    """Where the archive lists the study as another's now, its objects' headers do not count."""
    archive = held("north", "N1")
    world = make(archive, identity=Site())
    world.know(archive)
    archive.studies[STUDY].patient_id = patient_id
    for uid in archive.studies[STUDY].instances:
        archive.headers[uid] = {"patient": "N1"}
    workstation = Workstation()
    assert (await run(world, workstation)).completed == 0
    assert not workstation.received


async def test_listing_that_contradicts_counts_though_headers_do_not(make: Make) -> None:
    """Another sex in the archive's answer withholds the study, whatever its objects say."""
    archive = held("north", "N1")
    archive.studies[STUDY].values[SEX] = "M"
    for uid in archive.studies[STUDY].instances:
        archive.values[uid] = {SEX: "F"}
    world = make(archive, identity=Site())
    workstation = Workstation()
    assert (await run(world, workstation)).completed == 0
    assert not workstation.received


async def test_id_of_another_issuer_is_not_remembered_as_the_sources_own(make: Make) -> None:
    """The memory of locations knows no issuers: an ID that is not the archive's is left out."""
    archive = held("north", sentinel.PATIENT_ID)
    archive.studies[STUDY].values[ISSUER] = "HOSPITAL"
    world = make(archive, identity=Site())
    for _ in range(2):
        assert (await run(world, Workstation())).completed == 2
    assert {location.patient_id for location in await world.memory.find(STUDY)} == {""}


async def test_who_somebody_is_counts_no_longer_than_the_site_wants() -> None:
    """Nothing is remembered beyond what is remembered of the cross-reference."""
    site, moment = Site(), 0.0
    chain = [Provider("regional", site.reference)]
    domains = site.identities.domains
    site.identities = Identities(
        domains, {"north": chain}, remember_seconds=10, clock=lambda: moment
    )
    persons = Persons(site)
    patient = persons.of_value("N1", "north")
    assert patient is not None
    assert await persons.here(patient, "north") == sentinel.PATIENT_ID
    site.reference.persons = [{local("OTHER"), north("N1")}]
    assert await persons.here(patient, "north") == sentinel.PATIENT_ID
    moment = 11
    assert await persons.here(patient, "north") == "OTHER"
    assert persons.at_once(patient, "north") == "OTHER"
    site.reference.persons = []
    moment = 22
    with pytest.raises(IdentityUnresolved):
        await persons.here(patient, "north")
    assert persons.at_once(patient, "north") is None
    await site.identities.close()


async def test_who_somebody_was_is_not_at_hand_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that names them later is not refused by what was true then."""
    site = Site()
    persons = Persons(site)
    patient = persons.of_value("N1", "north")
    assert patient is not None
    assert persons.at_once(patient, "north") is None
    await persons.here(patient, "north")
    assert persons.at_once(patient, "north") == sentinel.PATIENT_ID
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert persons.at_once(patient, "north") is None
    monkeypatch.undo()
    await site.identities.close()


async def test_who_somebody_is_is_asked_again_soon_after_a_merge() -> None:
    """What is found out before the cross-reference has heard of it does not last."""
    site = Site()
    persons = Persons(site)
    patient = persons.of_value("N1", "north")
    assert patient is not None
    site.identities.forget(local(sentinel.PATIENT_ID))
    assert await persons.here(patient, "north") == sentinel.PATIENT_ID
    site.reference.persons = [{local("OTHER"), north("N1")}]
    assert await persons.here(patient, "north") == "OTHER"
    await site.identities.close()


async def test_delivery_begins_before_everything_is_listed(make: Make) -> None:
    """Once the archive has said whose study it is, nobody waits for the rest of its answers."""
    listing = asyncio.Event()

    class Slow(Archive):
        async def find(self, query: SourceQuery) -> AsyncIterator[Identifier]:
            if query.level is Level.SERIES:
                await listing.wait()
            async for row in super().find(query):
                yield row

    archive = Slow("north", *held("north", "N1").studies.values())
    world = make(archive, identity=Site())
    workstation = Workstation()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(world.operation(workstation).run())
        await workstation.waiting.wait()
        listing.set()
    assert running.result() == RetrieveOutcome(0x0000, completed=2)


async def test_cached_study_that_its_archive_has_given_to_another(make: Make) -> None:
    """Not one instance goes out before the archive has said whose study it is now."""
    archive = held("north", "N1", 4)
    world = make(archive, identity=Site())
    assert (await run(world, Workstation())).completed == 4
    archive.studies[STUDY].patient_id = sentinel.PATIENT_ID
    request = RetrieveRequest(Root.PATIENT, Level.STUDY, sentinel.PATIENT_ID, (STUDY,))
    for _ in range(2):
        workstation = Workstation()
        assert (await run(world, workstation, request)).completed == 0
        assert workstation.received == []


async def test_cached_study_does_not_wait_for_an_archive_that_is_silent(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its objects have said whose they are, and the cross-reference who that is here."""
    monkeypatch.setattr(localize, "_CACHED_WAITS_SECONDS", 0.01)
    archive = held("north", "N1", 4)
    world = make(archive, identity=Site())
    assert (await run(world, Workstation())).completed == 4
    archive.find_gate = asyncio.Event()
    workstation = Workstation()
    workstation.gate = asyncio.Event()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(world.operation(workstation).run())
        await workstation.waiting.wait()
        workstation.gate.set()
        archive.find_gate.set()
    assert running.result() == RetrieveOutcome(0x0000, completed=4)
    assert_local(workstation, {"N1"})


async def test_study_that_has_gone_is_not_had_as_somebody_elses(make: Make) -> None:
    """Where the holder has lost it, another archive's study of another person is no substitute."""
    one, other = held("north", "N1"), held("south", "S9")
    world = make(one, other, identity=Site())
    world.know(one)
    one.studies.clear()
    workstation = Workstation()
    assert (await run(world, workstation)).completed == 0
    assert workstation.received == []
    assert not other.sent


async def test_what_is_cached_from_a_holder_that_is_left_out_is_left_out_too(make: Make) -> None:
    """An archive that has given the study to another person since serves nothing of it."""
    one, other = held("north", "N1", 1), held("south", "S1", 2)
    world = make(one, other, identity=Site())
    assert (await run(world, Workstation())).completed == 2
    assert other.sent
    other.studies[STUDY].patient_id = "S9"
    world.know(one, other)
    workstation = Workstation()
    assert await run(world, workstation) == RetrieveOutcome(0x0000, completed=1)
    assert workstation.received == [f"{STUDY}.1.1"]


async def test_local_study_of_which_an_archive_may_have_more_is_no_success(make: Make) -> None:
    """Nobody can tell whose the archive's part is: the local PACS's alone may not be all."""
    here, archive = Archive(LOCAL, study(2)), held("north", "N1", 3)
    site = Site()
    site.reference.failure = CrossReferenceError(Failure.TIMEOUT)
    world = make(archive, identity=site, local=here, relay=True)
    world.know(here, archive)
    world.local_pacs.script = [RetrieveProgress(completed=2, final=True, status=0)]
    outcome = await run(world, Workstation())
    assert (outcome.status, outcome.completed) == (0xB000, 2)


async def test_study_whose_patient_is_nobody_here_is_no_success(make: Make) -> None:
    """That nothing is sent of it is said as a failure: it is there, and is withheld."""
    world = make(held("north", "NOBODY"), identity=Site())
    for _ in range(2):
        workstation = Workstation()
        outcome = await run(world, workstation)
        assert (outcome.status, outcome.completed, workstation.received) == (0xA702, 0, [])
    world = make(Archive("north"), identity=Site())
    assert (await run(world, Workstation())).status == 0x0000  # there is none


async def test_merge_of_others_disturbs_nothing(make: Make) -> None:
    """After a notice about somebody else the rest of a study is delivered like its beginning."""
    site, archive = Site(), held("north", "N1", 4)
    world = make(archive, identity=site)
    workstation = Workstation()
    workstation.gate = asyncio.Event()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(world.operation(workstation).run())
        await workstation.waiting.wait()
        site.identities.forget(north("N555"))
        workstation.gate.set()
    assert running.result() == RetrieveOutcome(0x0000, completed=4)
    assert_local(workstation, {"N1"})


async def test_flood_of_notices_about_others_disturbs_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many while a header is read, as when a region is linked anew: nothing is withheld."""
    at_once = Reader.read_into

    async def read_into(self: Reader, buffers: Sequence[memoryview], offset: int) -> int:
        for _ in range(3):
            await asyncio.sleep(0)  # the disk's time
        return await at_once(self, buffers, offset)

    monkeypatch.setattr(Reader, "read_into", read_into)
    site, archive = Site(), held("north", "N1", 8)
    world = make(archive, identity=site)
    workstation = Workstation()

    async def flood() -> None:
        for number in itertools.count():
            site.identities.forget(north(f"N{number + 100}"))
            await asyncio.sleep(0)

    flooding = asyncio.create_task(flood())
    try:
        assert await run(world, workstation) == RetrieveOutcome(0x0000, completed=8)
        assert not flooding.done()
    finally:
        flooding.cancel()
    assert_local(workstation, {"N1"})


async def test_whom_a_notice_concerns_is_told() -> None:
    """Of the latest notices one by one, of earlier ones in doubt; of a whole table everybody."""
    site = Site()
    persons = Persons(site)
    me, other = local(sentinel.PATIENT_ID), local("OTHER")
    assert not persons.concerned({me}, persons.version)
    before = persons.version
    site.identities.forget(me)
    assert persons.concerned({other, me}, before)
    assert not persons.concerned({other}, before)
    assert not persons.concerned(set(), before)
    between = persons.version
    for number in range(1000):
        assert not persons.concerned({me}, between)
        site.identities.forget(local(f"P{number}"))
    assert persons.concerned({other}, before)
    site.identities.forget_all()
    assert persons.concerned({other}, persons.version - 1)
    await site.identities.close()
