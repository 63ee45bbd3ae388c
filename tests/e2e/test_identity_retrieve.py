"""Retrieves across domains: whoever asks, from cache or not, in whatever syntax, and strays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from tests.e2e.conftest import MakeProxy
from tests.e2e.identities import (
    HOSPITAL,
    NAMESAKE,
    NORTH_ID,
    SHOWN,
    SOUTH_ID,
    Held,
    ct,
    differences,
    domain,
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
from tests.peers.workstation import Workstation
from tests.sentinel import PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.datasets import instance

LOCAL_VALUES = dict(zip(SHOWN, (PATIENT_ID, PATIENT_NAME, PATIENT_BIRTH_DATE, "F"), strict=True))


def arrived(workstation: Workstation) -> dict[str, Dataset]:
    """Return what came since the last call, each once."""
    with workstation.lock:
        received, workstation.received = workstation.received, []
    found = {one.sop_instance_uid: one.dataset() for one in received}
    assert len(found) == len(received)
    return found


def assert_local(got: Dataset, original: Dataset) -> None:
    assert {name: str(got[name].value) for name in SHOWN} == LOCAL_VALUES
    assert differences(restored(got), original) == []


async def test_what_is_cached_is_for_whom_its_archive_is(start: MakeProxy, tmp_path: Path) -> None:
    """A caller who may not see the archive gets nothing of it, however often others did."""
    held = Held()
    restricted = Workstation("READING2", accept=[str(held.north[0].SOPClassUID)])
    async with restricted, scene(start, held, table(tmp_path)) as it:
        restricted.server = it.proxy.node
        it.proxy.settings["workstations"].append(
            {**restricted.node._asdict(), "query_budget": "60s", "sources": ["south"]}
        )
        await restart(it)
        assert studies(await mine(it)) == held.mine
        for _ in range(2):  # cold, and from the cache
            assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
            for got in arrived(it.reading).values():
                assert got.PatientID == PATIENT_ID
        found = await restricted.find(the_question())
        assert studies(found) == held.mine - {uid(held.north)}
        for level, keys in below(held.north):
            moved = await restricted.move(identifier(level, **keys))
            assert not moved.final.completed
            assert (await restricted.find(identifier(level, **keys))).rows == ()
        assert arrived(restricted) == {}
        # Nor does anybody's question reveal it by the number that was made up for it.
        (row,) = [row for row in (await mine(it)).rows if row.StudyInstanceUID == uid(held.north)]
        asked = identifier("STUDY", AccessionNumber=row.AccessionNumber, StudyInstanceUID="")
        assert uid(held.north) in studies(await it.reading.find(asked))
        assert uid(held.north) not in studies(await restricted.find(asked))
        # What it may see, it is given as everybody is.
        assert figures((await restricted.move(the_study(held.south))).final)[1] == 2
        for got in arrived(restricted).values():
            assert got.PatientID == PATIENT_ID


async def restart(it: Setup) -> None:
    """Have the proxy read its configuration anew."""
    assert await it.proxy.stop() == 0
    it.proxy.write()
    await it.proxy.start()
    await loaded(it, 2)


def the_question() -> Dataset:
    return identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID="", PatientName="")


def below(instances: list[Dataset]) -> list[tuple[str, dict[str, str]]]:
    """Name a study, its series and an image, each at its level."""
    one = instances[0]
    study = {"StudyInstanceUID": str(one.StudyInstanceUID)}
    series = {**study, "SeriesInstanceUID": str(one.SeriesInstanceUID)}
    image = {**series, "SOPInstanceUID": str(one.SOPInstanceUID)}
    return [("STUDY", study), ("SERIES", series), ("IMAGE", image)]


SYNTAXES = (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)


async def test_every_syntax_is_delivered_as_it_is_and_local(
    start: MakeProxy, tmp_path: Path
) -> None:
    """By C-MOVE and by C-GET from the archive, cold and from the cache."""
    held = Held()
    held.north = [one for syntax in SYNTAXES for one in ct(NORTH_ID, transfer_syntax_uid=syntax)]
    held.south = [one for syntax in SYNTAXES for one in ct(SOUTH_ID, transfer_syntax_uid=syntax)]
    everything = {str(one.SOPInstanceUID): one for one in (*held.north, *held.south)}
    of_studies = {str(one.StudyInstanceUID): one for one in everything.values()}
    async with scene(start, held, table(tmp_path), south={"retrieve": "c-get"}) as it:
        await loaded(it)
        for _ in range(2):
            wanted = identifier("STUDY", StudyInstanceUID=list(of_studies))
            moved = await it.reading.move(wanted)
            assert figures(moved.final) == (0x0000, len(everything), 0, 0)
            syntaxes = {
                one.sop_instance_uid: one.transfer_syntax_uid for one in it.reading.received
            }
            got = arrived(it.reading)
            assert got.keys() == everything.keys()
            for one, original in everything.items():
                assert syntaxes[one] == original.file_meta.TransferSyntaxUID
                assert got[one].PixelData == original.PixelData
                assert_local(got[one], original)
        assert await it.proxy.fetched() == len(everything)


async def test_what_has_to_be_decoded_is_local_too(start: MakeProxy, tmp_path: Path) -> None:
    """The workstation takes nothing but Implicit VR Little Endian."""
    held = Held()
    kinds = (RLELossless, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian)
    held.north = [one for syntax in kinds for one in ct(NORTH_ID, transfer_syntax_uid=syntax)]
    originals = {str(one.SOPInstanceUID): one for one in held.north}
    wanted = identifier("STUDY", StudyInstanceUID=[*{str(x.StudyInstanceUID) for x in held.north}])
    async with scene(
        start, held, table(tmp_path), transfer_syntaxes=[ImplicitVRLittleEndian]
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


STRAYS: dict[str, dict[str, Any]] = {
    "namesake": {"PatientID": NAMESAKE},
    "as_here": {"PatientID": PATIENT_ID},  # there it is another person's
    "unknown": {"PatientID": "N-UNKNOWN"},
    "other_domain": {"PatientID": NORTH_ID, "IssuerOfPatientID": "ELSEWHERE"},
    "other_birth_date": {"PatientBirthDate": "19550505"},
    "other_sex": {"PatientSex": "M"},
}


async def test_strays_among_the_instances_are_not_delivered(
    start: MakeProxy, tmp_path: Path
) -> None:
    """Whoever else an instance names, it fails alone, is listed and is never sent."""
    held = Held()
    series = str(held.north[0].SeriesInstanceUID)
    strays = {
        kind: instance(
            7,
            study_instance_uid=uid(held.north),
            series_instance_uid=series,
            **{"PatientID": NORTH_ID, "PatientSex": "F", **values},
        )
        for kind, values in STRAYS.items()
    }
    good = list(held.north)
    held.north += strays.values()
    # Listed as the patient's: the archive says so of the study, by its first instance.
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        for turn in range(2):
            moved = await it.reading.move(the_study(held.north))
            assert sorted(arrived(it.reading)) == uids(good)
            assert figures(moved.final)[:3] == (0xB000, len(good), len(strays)), turn
            assert sorted(moved.failed_sop_instance_uids) == uids(strays.values())
        for stray in strays.values():
            one = identifier(
                "IMAGE",
                StudyInstanceUID=uid(held.north),
                SeriesInstanceUID=series,
                SOPInstanceUID=str(stray.SOPInstanceUID),
            )
            moved = await it.reading.move(one)
            assert moved.final.status != 0x0000
            assert not moved.final.completed
        assert arrived(it.reading) == {}
        told = {line["event"] for line in it.proxy.lines() if "identity" in line["event"]}
        assert {"identity_conflict", "identity_unresolved"} <= told


async def test_instances_that_name_nobody_or_a_known_other_id_are_the_patients(
    start: MakeProxy, tmp_path: Path
) -> None:
    """No ID, or one of another domain that leads to the same person, is no stray."""
    held = Held()
    series = {"study_instance_uid": uid(held.north), "series_instance_uid": generate_uid()}
    unnamed = instance(8, **series, PatientID="", PatientSex="F")
    by_south = instance(9, **series, PatientID=SOUTH_ID, IssuerOfPatientID="SOUTH", PatientSex="F")
    held.north += [unnamed, by_south]
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        moved = await it.reading.move(the_study(held.north))
        assert figures(moved.final) == (0x0000, 4, 0, 0)
        got = arrived(it.reading)
        assert sorted(got) == uids(held.north)
        for one in held.north:
            assert_local(got[str(one.SOPInstanceUID)], one)


async def test_local_studies_pass_as_they_are(start: MakeProxy, tmp_path: Path) -> None:
    """What the local PACS sends, relayed or delivered by the proxy, is not touched."""
    held = Held()
    for how in ("relay", "proxy"):
        local = {"patient_id_issuer": domain(HOSPITAL), "deliver": how}
        async with scene(start, held, table(tmp_path), local=local) as it:
            await loaded(it)
            assert figures((await it.reading.move(the_study(held.here))).final)[1] == 2
            got = arrived(it.reading)
            for one in held.here:
                assert differences(got[str(one.SOPInstanceUID)], one) == []
                assert "OriginalAttributesSequence" not in got[str(one.SOPInstanceUID)]


@pytest.mark.parametrize("level", ["SERIES", "IMAGE"])
async def test_a_study_of_two_holders_is_one_persons(
    start: MakeProxy, tmp_path: Path, level: str
) -> None:
    """Part here and part there under each holder's own ID: together, and local alike."""
    held = Held()
    shared = ct(NORTH_ID, study_instance_uid=uid(held.south))
    held.north += shared
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        assert studies(await mine(it)) == held.mine
        found = await it.reading.find(
            identifier(
                "SERIES", StudyInstanceUID=uid(held.south), SeriesInstanceUID="", PatientID=""
            )
        )
        assert len(found.rows) == 2
        assert {row.PatientID for row in found.rows} == {PATIENT_ID}
        both = [*shared, *held.south]
        for one in both:
            keys = {
                "StudyInstanceUID": uid(both),
                "SeriesInstanceUID": str(one.SeriesInstanceUID),
            }
            if level == "IMAGE":
                keys["SOPInstanceUID"] = str(one.SOPInstanceUID)
            await it.reading.move(identifier(level, **keys))
            got = arrived(it.reading)
            assert_local(got[str(one.SOPInstanceUID)], one)
