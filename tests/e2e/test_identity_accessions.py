"""One accession number that four archives and the local PACS use, each for an order of its own.

Each archive is treated by another policy. What a workstation is shown leads back to
the order it stands for, and to no other, also after a restart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from pydicom import Dataset

from tests.e2e.conftest import proxies
from tests.e2e.identities import (
    EAST,
    HOSPITAL,
    NORTH,
    SOUTH,
    Listing,
    Since,
    ct,
    differences,
    domain,
    loaded,
    mine,
    restored,
    studies,
    table,
    uid,
)
from tests.e2e.scene import Setup, figures, setup, the_study
from tests.e2e.support import identifier
from tests.peers.workstation import Result
from tests.sentinel import ACCESSION_NUMBER, PATIENT_ID

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEST = ("WEST", "1.2.5")
TABLE = f"local,north,south,east,west\n{PATIENT_ID},N-0815,S-0815,E-0815,W-0815\n"
LONG = "SENTACC4711-LONG"  # with a prefix longer than an SH may be
POLICIES: dict[str, dict[str, Any]] = {
    "north": {"accession": "mint"},
    "south": {"accession": "prefix", "accession_prefix": "S-"},
    "east": {"accession": "empty"},
    "west": {"accession": "keep"},
}
ISSUERS = {"north": NORTH, "south": SOUTH, "east": EAST, "west": WEST}


def order(number: str) -> Dataset:
    made = Dataset()
    made.AccessionNumber = number
    made.RequestedProcedureID = "RP-7"
    made.ScheduledProcedureStepID = "SPS-7"
    return made


def reference(number: str) -> Dataset:
    made = Dataset()
    made.StudyInstanceUID = "1.2.3"
    made.ReferencedStudySequence = []
    made.AccessionNumber = number
    made.PlacerOrderNumberImagingServiceRequest = "P-7"
    made.FillerOrderNumberImagingServiceRequest = "F-7"
    made.RequestedProcedureID = "RP-7"
    made.RequestedProcedureDescription = "CT"
    made.RequestedProcedureCodeSequence = []
    return made


def ordered(patient: str, number: str = ACCESSION_NUMBER) -> list[Dataset]:
    return ct(
        patient,
        AccessionNumber=number,
        RequestAttributesSequence=[order(number)],
        ReferencedRequestSequence=[reference(number)],
    )


class Held:
    """The same number everywhere, and a long one in the south."""

    def __init__(self) -> None:
        self.here = ct(PATIENT_ID)
        self.of = {name: ordered(f"{name[0].upper()}-0815") for name in ISSUERS}
        self.long = ordered("S-0815", LONG)

    @property
    def mine(self) -> set[str]:
        return {uid(self.here), uid(self.long), *map(uid, self.of.values())}


@pytest.fixture(scope="module")
def held() -> Held:
    """What all archives hold."""
    return Held()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(held: Held, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    """Run them all."""
    directory = tmp_path_factory.mktemp("accessions")
    sources: dict[str, Any] = {
        name: {
            "patient_id_issuer": domain(ISSUERS[name]),
            "identity": {"cross_reference": "regional", **policy},
        }
        for name, policy in POLICIES.items()
    }
    async with (
        proxies(directory) as start,
        setup(
            start,
            held.of["north"],
            [*held.of["south"], *held.long],
            held.of["east"],
            held.of["west"],
            here=held.here,
            kind=Listing,
            proxy={"accession_issuer": {"namespace": "MADE-UP"}},
            local={"patient_id_issuer": domain(HOSPITAL)},
            cross_references=[table(directory, TABLE)],
            **sources,
        ) as made,
    ):
        await loaded(made)
        yield made


async def listed(it: Setup) -> dict[str, Dataset]:
    """Return the person's studies, each with all that is said of its order."""
    result = await mine(it, IssuerOfAccessionNumberSequence=[])
    return {str(row.StudyInstanceUID): row for row in result.rows}


async def by_number(it: Setup, number: str, **keys: Any) -> Result:
    asked = identifier(
        "STUDY", **({"StudyInstanceUID": "", "PatientID": "", "AccessionNumber": number} | keys)
    )
    return await it.reading.find(asked)


def asked_of(it: Setup) -> list[int]:
    return [len(archive.asked("find")) for archive in it.archives]


async def test_numbers_are_shown_by_policy_and_lead_back(it: Setup, held: Held) -> None:
    """The same in answers and objects; found by what was shown, and by nothing that was not."""
    rows = await listed(it)
    assert rows.keys() == held.mine
    shown = {name: str(rows[uid(one)].AccessionNumber) for name, one in held.of.items()}
    long = str(rows[uid(held.long)].AccessionNumber)
    assert shown["south"] == f"S-{ACCESSION_NUMBER}"
    assert (shown["east"], shown["west"]) == ("", ACCESSION_NUMBER)
    assert all(len(number) == 14 for number in (shown["north"], long))
    assert shown["north"] != long
    for name, one in (*held.of.items(), ("south", held.long)):
        row = rows[uid(one)]
        issuers = [item.LocalNamespaceEntityID for item in row.IssuerOfAccessionNumberSequence]
        assert issuers == (["MADE-UP"] if name in ("north", "south") else [])
        await delivered_alike(it, one, row, name)
    # What was shown leads back to its order alone.
    for number, name, one in (
        (shown["north"], "north", held.of["north"]),
        (shown["south"], "south", held.of["south"]),
        (long, "south", held.long),
    ):
        before = asked_of(it)
        assert studies(await by_number(it, number)) - {uid(held.here)} == {uid(one)}
        more = [now - then for now, then in zip(asked_of(it), before, strict=True)]
        assert [bool(count) for count in more] == [source == name for source in ISSUERS]
        found = await by_number(it, number, PatientID=PATIENT_ID)
        assert studies(found) - {uid(held.here)} == {uid(one)}
        nobodys = await by_number(it, number, PatientID="SOMEBODY-ELSE")
        assert studies(nobodys) == set()
    # What was not is the local PACS's own, or a source's that has the numbers of this site.
    before = asked_of(it)
    for number in (ACCESSION_NUMBER, LONG, f"{shown['north'][:-1]}?", f"{shown['north']}*"):
        result = await by_number(it, number)
        assert studies(result) <= {uid(held.here), uid(held.of["west"])}
    assert asked_of(it)[:3] == before[:3]


async def delivered_alike(it: Setup, instances: list[Dataset], row: Dataset, name: str) -> None:
    """Retrieve, and see the order named as in the answer, wherever it is named."""
    it.reading.received.clear()
    assert figures((await it.reading.move(the_study(instances))).final)[1] == len(instances)
    originals = {str(one.SOPInstanceUID): one for one in instances}
    for received in it.reading.received:
        got, original = received.dataset(), originals[received.sop_instance_uid]
        assert got.AccessionNumber == row.AccessionNumber
        assert [
            item.LocalNamespaceEntityID for item in got.get("IssuerOfAccessionNumberSequence", [])
        ] == [item.LocalNamespaceEntityID for item in row.IssuerOfAccessionNumberSequence]
        (requested,) = got.ReferencedRequestSequence
        assert requested.AccessionNumber == row.AccessionNumber
        kept = name == "west"
        for keyword in (
            "PlacerOrderNumberImagingServiceRequest",
            "FillerOrderNumberImagingServiceRequest",
            "RequestedProcedureID",
        ):
            assert bool(requested.get(keyword)) is kept
        for attributes in got.get("RequestAttributesSequence", []):
            assert attributes.AccessionNumber == row.AccessionNumber
            assert ("RequestedProcedureID" in attributes) is kept
            assert ("ScheduledProcedureStepID" in attributes) is kept
        assert differences(restored(got), original) == []


async def test_numbers_mean_the_same_after_a_crash(it: Setup, held: Held) -> None:
    """What a workstation wrote down leads to its order, before anything else is asked."""
    rows = await listed(it)
    numbers = {study: str(row.AccessionNumber) for study, row in rows.items()}
    since = Since(it)
    it.proxy.kill()
    await it.proxy.start()
    await it.proxy.until(lambda: bool(since.named("cross_reference_table_loaded")), "loaded")
    for one in (held.of["north"], held.of["south"], held.long):
        result = await by_number(it, numbers[uid(one)])
        assert studies(result) - {uid(held.here)} == {uid(one)}
        (row,) = [row for row in result.rows if row.StudyInstanceUID == uid(one)]
        assert row.PatientID == PATIENT_ID
        it.reading.received.clear()
        assert figures((await it.reading.move(the_study(one))).final)[1] == len(one)
        assert {got.dataset().AccessionNumber for got in it.reading.received} == {numbers[uid(one)]}
    again = await listed(it)
    assert {study: str(row.AccessionNumber) for study, row in again.items()} == numbers
