"""Retrieves across domains: whoever asks, from cache or not, in whatever syntax, and strays.

One region serves most tests of this module, each with studies of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tests.e2e.conftest import MakeProxy, proxies
from tests.e2e.identities import (
    NAMESAKE,
    NORTH_ID,
    SHOWN,
    SOUTH_ID,
    TABLE,
    Held,
    Since,
    arrived,
    ct,
    differences,
    loaded,
    mine,
    restored,
    scene,
    studies,
    table,
    uid,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.e2e.support import identifier, uids
from tests.sentinel import PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.datasets import instance

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOCAL_VALUES = dict(zip(SHOWN, (PATIENT_ID, PATIENT_NAME, PATIENT_BIRTH_DATE, "F"), strict=True))
SYNTAXES = (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
STRAYS: dict[str, dict[str, Any]] = {
    "namesake": {"PatientID": NAMESAKE},
    "as_here": {"PatientID": PATIENT_ID},  # there it is another person's
    "unknown": {"PatientID": "N-UNKNOWN"},
    "other_domain": {"PatientID": NORTH_ID, "IssuerOfPatientID": "ELSEWHERE"},
    "other_birth_date": {"PatientBirthDate": "19550505"},
    "other_sex": {"PatientSex": "M"},
}
NUMBERS = {"AccessionNumber": "MORE-0815"}


class Region(Held):
    """As usual, and studies in every syntax, with strays, with odd names and of two holders."""

    def __init__(self) -> None:
        super().__init__()
        self.syntaxes = {
            "north": [ct(NORTH_ID, transfer_syntax_uid=one, **NUMBERS) for one in SYNTAXES],
            "south": [ct(SOUTH_ID, transfer_syntax_uid=one, **NUMBERS) for one in SYNTAXES],
        }
        # Listed as the patient's: the archive says so of the study, by its first instance.
        self.good = ct(NORTH_ID, **NUMBERS)
        self.strays = [among(self.good, **values) for values in STRAYS.values()]
        self.odd = ct(NORTH_ID, **NUMBERS)
        self.odd += [
            among(self.odd, PatientID=""),
            among(self.odd, PatientID=SOUTH_ID, IssuerOfPatientID="SOUTH"),
        ]
        self.two = {"north": ct(NORTH_ID, **NUMBERS)}
        self.two["south"] = ct(SOUTH_ID, study_instance_uid=uid(self.two["north"]), **NUMBERS)
        # A UID that is another person's study in the south, and one that is so here.
        self.twice = {"north": ct(NORTH_ID, **NUMBERS)}
        self.twice["south"] = ct("S-99", study_instance_uid=uid(self.twice["north"]), **NUMBERS)
        self.taken = {"local": ct("LOCAL-98", **NUMBERS)}
        self.taken["north"] = ct(NORTH_ID, study_instance_uid=uid(self.taken["local"]), **NUMBERS)
        self.corrected = ct(NORTH_ID, **NUMBERS)
        self.more["local"] += self.taken["local"]
        self.more["north"] += [*self.taken["north"], *self.corrected]
        for name in ("north", "south"):
            self.more[name] += self.twice[name]
            self.more[name] += [one for study in self.syntaxes[name] for one in study]
            self.more[name] += self.two[name]
        self.more["north"] += [*self.good, *self.strays, *self.odd]

    @property
    def mine(self) -> set[str]:
        more = [study for studies in self.syntaxes.values() for study in studies]
        more += [self.good, self.odd, self.two["north"], self.twice["north"], self.corrected]
        return super().mine | {uid(study) for study in more}


def among(study: list[Dataset], **values: Any) -> Dataset:
    """Make a further instance of a study's series."""
    first = study[0]
    return instance(
        7,
        study_instance_uid=uid(study),
        series_instance_uid=str(first.SeriesInstanceUID),
        **{"PatientID": NORTH_ID, "PatientSex": "F", **NUMBERS, **values},
    )


@pytest.fixture(scope="module")
def held() -> Region:
    """What the archives hold."""
    return Region()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(held: Region, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    """Run it: the south by C-GET, and READING2 may see nothing but the south."""
    directory = tmp_path_factory.mktemp("retrieve")
    async with (
        proxies(directory) as start,
        scene(
            start,
            held,
            table(directory, TABLE + "LOCAL-99,,S-99\nLOCAL-98,N-98,\n"),
            count=2,
            entries={"READING2": {"sources": ["south"]}},
            south={"retrieve": "c-get"},
        ) as made,
    ):
        await loaded(made)
        yield made
        assert [value for value in (NORTH_ID, SOUTH_ID) if value in made.proxy.log] == []


def assert_local(got: Dataset, original: Dataset) -> None:
    assert {name: str(got[name].value) for name in SHOWN} == LOCAL_VALUES
    assert differences(restored(got), original) == []


async def test_what_is_cached_is_for_whom_its_archive_is(it: Setup, held: Region) -> None:
    """A caller who may not see the archive gets nothing of it, however often others did."""
    restricted = it.workstations[1]
    assert studies(await mine(it)) == held.mine | {uid(held.taken["north"])}
    for _ in range(2):  # cold, and from the cache
        assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
        assert {got.PatientID for got in arrived(it.reading).values()} == {PATIENT_ID}
    found = await restricted.find(
        identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID="", PatientName="")
    )
    of_south = [held.here, held.south, held.two["south"], *held.syntaxes["south"]]
    assert studies(found) == {uid(study) for study in of_south}
    for level, keys in at_every_level(held.north):
        assert not (await restricted.move(identifier(level, **keys))).final.completed
        assert (await restricted.find(identifier(level, **keys))).rows == ()
    assert arrived(restricted) == {}
    # Nor does anybody's question reveal it by the number that was made up for it.
    (row,) = [row for row in (await mine(it)).rows if row.StudyInstanceUID == uid(held.north)]
    asked = identifier("STUDY", AccessionNumber=row.AccessionNumber, StudyInstanceUID="")
    assert uid(held.north) in studies(await it.reading.find(asked))
    assert uid(held.north) not in studies(await restricted.find(asked))
    # What it may see, it is given as everybody is.
    assert figures((await restricted.move(the_study(held.south))).final)[1] == 2
    assert {got.PatientID for got in arrived(restricted).values()} == {PATIENT_ID}


def at_every_level(instances: list[Dataset]) -> list[tuple[str, dict[str, str]]]:
    """Name a study, its first series and its first image, each at its level."""
    one = instances[0]
    study = {"StudyInstanceUID": str(one.StudyInstanceUID)}
    series = {**study, "SeriesInstanceUID": str(one.SeriesInstanceUID)}
    image = {**series, "SOPInstanceUID": str(one.SOPInstanceUID)}
    return [("STUDY", study), ("SERIES", series), ("IMAGE", image)]


async def test_every_syntax_is_delivered_as_it_is_and_local(it: Setup, held: Region) -> None:
    """Had by C-MOVE and by C-GET, cold and from the cache."""
    of_studies = [*held.syntaxes["north"], *held.syntaxes["south"]]
    everything = {str(one.SOPInstanceUID): one for study in of_studies for one in study}
    before = await it.proxy.fetched()
    for _ in range(2):
        wanted = identifier("STUDY", StudyInstanceUID=[uid(study) for study in of_studies])
        moved = await it.reading.move(wanted)
        assert figures(moved.final) == (0x0000, len(everything), 0, 0)
        syntaxes = {one.sop_instance_uid: one.transfer_syntax_uid for one in it.reading.received}
        got = arrived(it.reading)
        assert got.keys() == everything.keys()
        for one, original in everything.items():
            assert syntaxes[one] == original.file_meta.TransferSyntaxUID
            assert got[one].PixelData == original.PixelData
            assert_local(got[one], original)
    assert await it.proxy.fetched() == before + len(everything)
    assert it.archives[1].asked("get")


async def test_strays_among_the_instances_are_not_delivered(it: Setup, held: Region) -> None:
    """Whoever else an instance names, it fails alone, is listed, told of, and never sent."""
    since, total = Since(it), "dicomproxy_identity_withheld_total"
    for _ in range(2):
        moved = await it.reading.move(the_study(held.good))
        assert sorted(arrived(it.reading)) == uids(held.good)
        assert figures(moved.final)[:3] == (0xB000, len(held.good), len(held.strays))
        assert sorted(moved.failed_sop_instance_uids) == uids(held.strays)
    for stray in held.strays:
        *_, (level, keys) = at_every_level([stray])
        moved = await it.reading.move(identifier(level, **keys))
        assert moved.final.status != 0x0000
        assert moved.final.failed == 1
        assert not moved.final.completed
    assert arrived(it.reading) == {}
    reasons = {
        (line["event"], line.get("reason"))
        for line in since.lines()
        if line["event"].startswith("identity_")
    }
    told = {
        ("identity_conflict", "other_patient"),
        ("identity_conflict", "birth_date"),
        ("identity_conflict", "sex"),
        ("identity_unresolved", "no_local_id"),
        ("identity_unresolved", "unknown_issuer"),
    }
    assert reasons >= told
    _, page = await asyncio.to_thread(it.proxy.http, "/")
    for event, reason in told:
        assert re.search(f"north {event}<[^a-z]*td[^a-z]*td[^a-z]*>{reason}<", page), reason
        assert await it.proxy.metric(total, source="north", reason=reason) >= 1


async def test_instances_that_name_nobody_or_a_known_other_id_are_the_patients(
    it: Setup, held: Region
) -> None:
    """No ID, or one of another domain that leads to the same person, is no stray."""
    moved = await it.reading.move(the_study(held.odd))
    assert figures(moved.final) == (0x0000, 4, 0, 0)
    got = arrived(it.reading)
    assert sorted(got) == uids(held.odd)
    for one in held.odd:
        assert_local(got[str(one.SOPInstanceUID)], one)


@pytest.mark.parametrize("level", ["SERIES", "IMAGE", "STUDY"])
async def test_a_study_of_two_holders_is_one_persons(it: Setup, held: Region, level: str) -> None:
    """Part here and part there under each holder's own ID: all of it is local alike."""
    both = [*held.two["north"], *held.two["south"]]
    asked = identifier("SERIES", StudyInstanceUID=uid(both), SeriesInstanceUID="", PatientID="")
    rows = (await it.reading.find(asked)).rows
    assert {row.SeriesInstanceUID for row in rows} == {one.SeriesInstanceUID for one in both}
    assert {row.PatientID for row in rows} == {PATIENT_ID}
    got: dict[str, Dataset] = {}
    for one in both:
        keys = dict(at_every_level([one]))[level]
        assert (await it.reading.move(identifier(level, **keys))).final.completed
        got |= arrived(it.reading)
        if level == "STUDY":
            break
    assert sorted(got) == uids(both)
    for one in both:
        assert_local(got[str(one.SOPInstanceUID)], one)


async def test_a_uid_of_two_persons_studies_is_each_ones_own(it: Setup, held: Region) -> None:
    """Under either name only what is theirs; by the UID alone one person's, as theirs."""
    theirs = {PATIENT_ID: held.twice["north"], "LOCAL-99": held.twice["south"]}
    wanted = the_study(held.twice["north"])
    for patient, instances in theirs.items():
        rows = (await mine(it, PatientID=patient)).rows
        (row,) = [one for one in rows if one.StudyInstanceUID == uid(instances)]
        assert row.PatientID == patient
        wanted.PatientID = patient
        for _ in range(2):
            await it.reading.move(wanted, root="P")
            got = arrived(it.reading)
            assert sorted(got) == uids(instances)
            assert {one.PatientID for one in got.values()} == {patient}
    since = Since(it)
    await it.reading.move(the_study(held.twice["north"]))
    got = arrived(it.reading)
    (patient,) = {str(one.PatientID) for one in got.values()}
    assert got.keys() <= set(uids(theirs[patient]))
    assert "holders_disagree" in {one["reason"] for one in since.named("identity_conflict")}


async def test_a_uid_that_is_somebody_elses_study_here_stays_theirs(
    it: Setup, held: Region
) -> None:
    """The local PACS knows best whose it is: by the UID, nothing of the archive's is had."""
    here, north = held.taken["local"], held.taken["north"]
    rows = (await mine(it, PatientID="", StudyInstanceUID=uid(here))).rows
    assert [row.PatientID for row in rows] == ["LOCAL-98"]
    series = identifier("SERIES", StudyInstanceUID=uid(here), SeriesInstanceUID="")
    found = {row.SeriesInstanceUID for row in (await it.reading.find(series)).rows}
    assert found == {here[0].SeriesInstanceUID}
    await it.reading.move(the_study(here))
    assert sorted(arrived(it.reading)) == uids(here)
    for level, keys in at_every_level(north)[1:]:
        await it.reading.move(identifier(level, **keys))
        assert arrived(it.reading) == {}


async def test_what_its_archive_gives_to_another_is_anothers(it: Setup, held: Region) -> None:
    """Cached as one person's and corrected there, it is not delivered as theirs any more."""
    study = held.corrected
    assert uid(study) in studies(await mine(it))
    assert figures((await it.reading.move(the_study(study))).final)[1] == 2
    assert {one.PatientID for one in arrived(it.reading).values()} == {PATIENT_ID}
    for one in study:
        one.PatientID = NAMESAKE
    wanted = the_study(study)
    wanted.PatientID = PATIENT_ID
    for _ in range(2):
        moved = await it.reading.move(wanted, root="P")
        assert not moved.final.completed
        assert arrived(it.reading) == {}
    await it.reading.move(the_study(study))
    assert {one.PatientID for one in arrived(it.reading).values()} <= {"18"}
    assert uid(study) not in studies(await mine(it))
    assert uid(study) in studies(await mine(it, PatientID="18"))
    assert figures((await it.reading.move(the_study(study))).final)[1] == 2
    assert {one.PatientID for one in arrived(it.reading).values()} == {"18"}
    for one in study:
        one.PatientID = NORTH_ID


async def test_local_studies_are_relayed_as_they_are(it: Setup, held: Region) -> None:
    """What the local PACS sends is not touched."""
    await untouched(it, held)


async def untouched(it: Setup, held: Held) -> None:
    assert figures((await it.reading.move(the_study(held.here))).final)[1] == 2
    got = arrived(it.reading)
    for one in held.here:
        assert differences(got[str(one.SOPInstanceUID)], one) == []
        assert "OriginalAttributesSequence" not in got[str(one.SOPInstanceUID)]


async def test_what_has_to_be_decoded_is_local_too(start: MakeProxy, tmp_path: Path) -> None:
    """The workstation takes nothing but Implicit VR Little Endian, and is sent local studies so."""
    held = Held()
    kinds = (RLELossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian)
    held.north = [one for kind in kinds for one in ct(NORTH_ID, transfer_syntax_uid=kind)]
    originals = {str(one.SOPInstanceUID): one for one in held.north}
    wanted = identifier("STUDY", StudyInstanceUID=[*{str(x.StudyInstanceUID) for x in held.north}])
    async with scene(
        start,
        held,
        table(tmp_path),
        transfer_syntaxes=[ImplicitVRLittleEndian],
        local={"deliver": "proxy"},
    ) as it:
        await loaded(it)
        assert figures((await it.reading.move(wanted)).final)[1] == len(originals)
        got = arrived(it.reading)
        assert got.keys() == originals.keys()
        for one, original in originals.items():
            if original.file_meta.TransferSyntaxUID != RLELossless:
                assert got[one].PixelData == original.PixelData
            assert {name: str(got[one][name].value) for name in SHOWN} == LOCAL_VALUES
            assert set(differences(restored(got[one]), original)) <= {"PixelData"}
        await untouched(it, held)
