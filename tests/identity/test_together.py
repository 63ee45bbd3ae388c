"""Three domains, look-alike IDs, a table and a manager: only the same person is ever found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.crossref import Identities, IdentityUnresolved, Provider
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.safety import Demographics, KnownPatients, Verdict, compare
from dicomproxy.identity.table import TableCrossReference
from dicomproxy.ports import CrossReferenceError, Failure
from tests.identity.providers import HOSPITAL, NORTH, SOUTH, Scripted, local, north
from tests.sentinel import PATIENT_ID

# The first person's ID here is another person's in the north, and the other way round.
TABLE = f"local,north,south\n{PATIENT_ID},2,3\n2,{PATIENT_ID},4\n"
ME, OTHER = local(PATIENT_ID), local("2")


class Scene:
    """A site with a table for the north, and a table and a manager for the south."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "ids.csv"
        self.write(TABLE)
        self.domains = Domains(HOSPITAL, {"north": NORTH, "south": SOUTH})
        self.manager = Scripted({local("9"), PatientId("90", SOUTH)})
        self.table = TableCrossReference(
            "regional",
            self.file,
            directory,
            self.domains,
            on_change=lambda: self.identities.forget_all(),
            look_seconds=0.05,
        )
        table, manager = Provider("regional", self.table), Provider("mpi", self.manager)
        self.identities = Identities(self.domains, {"north": [table], "south": [table, manager]})
        self.known = KnownPatients(asyncio.get_running_loop().time)
        self.identities.on_forget(self._forget)

    def write(self, text: str) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.file)

    async def look(self) -> None:
        async with asyncio.timeout(10):
            await self.table.look()

    def _forget(self, patients: frozenset[PatientId] | None) -> None:
        if patients is None:
            self.known.forget_all()
        else:
            self.known.forget(patients)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    await scene.table.start()
    await scene.look()
    yield scene
    await scene.identities.close()
    await scene.table.close()


def row(patient_id: str, issuer: str = "") -> Identifier:
    made = Identifier()
    made.set_text(0x00100020, patient_id)
    if issuer:
        made.set_text(0x00100021, issuer)
    return made


async def test_each_person_has_their_own_ids_everywhere(scene: Scene) -> None:
    """Equal IDs in two domains are two persons, there and back."""
    ids = scene.identities

    assert await ids.elsewhere(ME, "north") == (north("2"),)
    assert await ids.elsewhere(OTHER, "north") == (north(PATIENT_ID),)
    assert await ids.elsewhere(ME, "south") == (PatientId("3", SOUTH),)
    for source, patient_id, expected in (
        ("north", "2", ME),
        ("north", PATIENT_ID, OTHER),
        ("south", "3", ME),
        ("south", "4", OTHER),
    ):
        patient = scene.domains.patient_of(row(patient_id), source)
        assert patient is not None
        assert await ids.here(patient, source) == expected


async def test_row_of_another_issuer_is_withheld(scene: Scene) -> None:
    """A source that also holds patients of somebody else shows none of them as ours."""
    patient = scene.domains.patient_of(row("2", "ELSEWHERE"), "north")
    assert patient == PatientId("2", Domain("ELSEWHERE"))
    with pytest.raises(IdentityUnresolved, match="unknown_issuer"):
        await scene.identities.here(patient, "north")


async def test_missing_column_is_an_outage_and_not_somebody_else(scene: Scene) -> None:
    """A table that does not know a domain of the site's own is at fault, not the patient."""
    scene.write(f"local,north\n{PATIENT_ID},2\n")
    await scene.look()
    for reason in ("unknown_domain", "late"):
        scene.manager.failure = CrossReferenceError(Failure.STATUS, reason)
        with pytest.raises(CrossReferenceError, match=reason):
            await scene.identities.here(PatientId("3", SOUTH), "south")


async def test_manager_is_asked_where_the_table_has_nobody(scene: Scene) -> None:
    """The table comes first; its gaps are the manager's; an outage of it is no absence."""
    assert await scene.identities.elsewhere(local("9"), "south") == (PatientId("90", SOUTH),)
    assert await scene.identities.elsewhere(ME, "south") == (PatientId("3", SOUTH),)
    scene.manager.failure = CrossReferenceError(Failure.TIMEOUT, "late")
    assert await scene.identities.elsewhere(OTHER, "south") == (PatientId("4", SOUTH),)
    with pytest.raises(CrossReferenceError, match="late"):
        await scene.identities.elsewhere(local("10"), "south")


async def test_corrected_table_counts_at_once(scene: Scene) -> None:
    """Two persons whose IDs were mixed up are told apart by the next question."""
    assert await scene.identities.elsewhere(ME, "north") == (north("2"),)
    scene.known.learn(ME, Demographics(sex="F"))
    scene.write(f"local,north,south\n{PATIENT_ID},7,3\n")
    await scene.look()

    assert await scene.identities.elsewhere(ME, "north") == (north("7"),)
    assert scene.known.of(ME) is None
    with pytest.raises(IdentityUnresolved, match="no_local_id"):
        await scene.identities.here(north("2"), "north")


async def test_merge_drops_demographics_with_the_ids(scene: Scene) -> None:
    """What was learnt of a patient is compared with nothing once their record was merged."""
    await scene.identities.elsewhere(ME, "north")
    scene.known.learn(ME, Demographics("A^B", "19500101", "F"))
    scene.known.learn(OTHER, Demographics("C^D", "19600101", "M"))
    remote = Demographics("A^B", "19600101", "F")
    assert compare(scene.known.of(ME), remote).verdict is Verdict.CONFLICT

    scene.identities.forget(PatientId("2", Domain("NORTH")))
    assert compare(scene.known.of(ME), remote).verdict is Verdict.UNVERIFIED
    assert scene.known.of(OTHER) is not None
