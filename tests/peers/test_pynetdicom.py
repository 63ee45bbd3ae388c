"""The pynetdicom peers do what tests rely on, with each other and with DCMTK."""

from __future__ import annotations

import asyncio

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from tests.peers import dcmtk
from tests.peers.archive import Archive
from tests.peers.process import PeerFailed
from tests.peers.workstation import Workstation
from tests.support.datasets import data_set_bytes, instance, study


def identifier(level: str, **keys: str | None) -> Dataset:
    made = Dataset()
    made.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(made, keyword, value)
    return made


def pair(archive: Archive) -> Workstation:
    """Return a workstation that asks *archive*."""
    return Workstation("READING1", archive.node)


@pytest.mark.parametrize(
    ("level", "expected"), [("PATIENT", 1), ("STUDY", 2), ("SERIES", 3), ("IMAGE", 6)]
)
async def test_archive_answers_once_for_each_entity_of_a_level(level: str, expected: int) -> None:
    """A query gives one row for each entity, whatever the level."""
    held = study(series=2, instances=2) + study(series=1, instances=2)
    key = {"PATIENT": "PatientID", "STUDY": "StudyInstanceUID"}.get(level, "SOPInstanceUID")
    async with Archive("ARCHIVE", held) as archive:
        root = "P" if level == "PATIENT" else "S"
        result = await pair(archive).find(identifier(level, **{key: None}), root=root)

    assert result.final.status == 0x0000
    assert len(result.rows) == expected
    assert archive.asked("find", level)[0].calling_ae_title == "READING1"


async def test_moved_instances_arrive_as_they_are_held() -> None:
    """C-MOVE delivers every instance in its own syntax with the same bytes, and says who asked."""
    held = [*study(instances=2), instance(transfer_syntax_uid=JPEG2000Lossless)]
    held[2].StudyInstanceUID = held[0].StudyInstanceUID
    async with Archive("ARCHIVE", held) as archive, pair(archive) as workstation:
        archive.destinations["READING1"] = workstation.node
        result = await workstation.move(
            identifier("STUDY", StudyInstanceUID=held[0].StudyInstanceUID), message_id=9
        )

    assert (result.final.status, result.final.completed) == (0x0000, 3)
    arrived = {one.sop_instance_uid: one for one in workstation.received}
    for one in held:
        got = arrived[one.SOPInstanceUID]
        assert got.transfer_syntax_uid == one.file_meta.TransferSyntaxUID
        assert got.data_set == data_set_bytes(one)
        assert got.originator_message_id == 9
        assert got.dataset().PatientID == one.PatientID
    assert archive.sent == {one.SOPInstanceUID: 1 for one in held}


async def test_get_brings_instances_over_the_same_association() -> None:
    """C-GET delivers without a destination being known."""
    held = study(instances=3)
    async with Archive("ARCHIVE", held) as archive:
        workstation = pair(archive)
        result = await workstation.get(
            identifier("STUDY", StudyInstanceUID=held[0].StudyInstanceUID), [held[0].SOPClassUID]
        )

    assert (result.final.status, result.final.completed) == (0x0000, 3)
    assert sorted(workstation.uids()) == sorted(one.SOPInstanceUID for one in held)


async def test_instance_that_cannot_be_sent_is_counted_and_listed() -> None:
    """A withheld instance makes the move end with B000 and is named."""
    held = study(instances=3)
    async with Archive("ARCHIVE", held) as archive, pair(archive) as workstation:
        archive.destinations["READING1"] = workstation.node
        archive.withhold.add(held[1].SOPInstanceUID)
        result = await workstation.move(
            identifier("STUDY", StudyInstanceUID=held[0].StudyInstanceUID)
        )

    assert (result.final.status, result.final.completed, result.final.failed) == (0xB000, 2, 1)
    assert result.failed_sop_instance_uids == (held[1].SOPInstanceUID,)
    assert held[1].SOPInstanceUID not in archive.sent


async def test_gate_holds_answers_until_it_opens() -> None:
    """Nothing is answered while the gate is closed, and everything after."""
    async with Archive("ARCHIVE", study()) as archive:
        archive.hold()
        asking = asyncio.create_task(pair(archive).find(identifier("STUDY")))
        await archive.held()
        assert not asking.done()
        archive.release()
        async with asyncio.timeout(60):
            result = await asking

    assert len(result.rows) == 1


@pytest.mark.parametrize("how", ["transient", "permanent"])
async def test_archive_rejects_as_told_and_recovers(how: str) -> None:
    """A rejection holds for new associations until it is lifted."""
    async with Archive("ARCHIVE", study()) as archive:
        archive.reject = how  # type: ignore[assignment]
        with pytest.raises(PeerFailed, match="rejected"):
            await pair(archive).echo()
        shown = await dcmtk.echoscu(archive.port)
        archive.reject = None
        assert await pair(archive).echo() == 0x0000

    assert shown.rejected
    assert how in shown.output.lower()


async def test_failure_statuses_are_sent_as_told() -> None:
    """A failure set for a service is its final status."""
    async with Archive("ARCHIVE", study()) as archive, pair(archive) as workstation:
        archive.destinations["READING1"] = workstation.node
        archive.fail = {"find": 0xA700, "move": 0xC123, "store": 0xA900}
        asked = identifier("STUDY", StudyInstanceUID=archive.instances[0].StudyInstanceUID)
        found = await workstation.find(asked)
        moved = await workstation.move(asked)
        stored = await workstation.store(archive.instances[:1])

    assert (found.final.status, moved.final.status, stored) == (0xA700, 0xC123, [0xA900])


async def test_cancelled_move_ends_with_fe00() -> None:
    """C-CANCEL reaches the archive while it sends."""
    held = study(instances=5)
    async with Archive("ARCHIVE", held) as archive, pair(archive) as workstation:
        archive.destinations["READING1"] = workstation.node
        archive.delay_seconds = 0.05
        result = await workstation.move(
            identifier("STUDY", StudyInstanceUID=held[0].StudyInstanceUID), cancel_after=1
        )

    assert result.final.status == 0xFE00
    assert archive.cancelled == 1
    assert len(workstation.received) < 5


async def test_stored_instance_is_held_and_found() -> None:
    """What is stored to the archive is among what it answers with."""
    new = instance()
    async with Archive("ARCHIVE") as archive:
        workstation = pair(archive)
        assert await workstation.store([new]) == [0x0000]
        result = await workstation.find(identifier("STUDY", StudyInstanceUID=new.StudyInstanceUID))

    assert len(result.rows) == 1


async def test_workstation_takes_only_what_it_accepts() -> None:
    """A workstation of one syntax and one status per instance behaves so."""
    held = study(instances=2)
    async with Workstation("READING1", transfer_syntaxes=[ExplicitVRLittleEndian]) as workstation:
        sender = Workstation("SENDER", workstation.node)
        workstation.answer = lambda uid: 0xA700 if uid == held[1].SOPInstanceUID else 0x0000
        statuses = await sender.store(held)
        with pytest.raises(PeerFailed, match=r"not accepted|no association"):
            await sender.store([instance(transfer_syntax_uid=JPEG2000Lossless)])

    assert statuses == [0x0000, 0xA700]
    assert workstation.uids() == [held[0].SOPInstanceUID]


@pytest.mark.peers
async def test_dcmtk_retrieves_from_the_archive() -> None:
    """The archive is one to DCMTK as well: found, moved to storescp, and got."""
    held = study(instances=3)
    key = {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": held[0].StudyInstanceUID}
    async with dcmtk.StoreScp("STORE") as scp, Archive("ARCHIVE", held, [scp.node]) as archive:
        found = await dcmtk.findscu(archive.port, key)
        moved = await dcmtk.movescu(archive.port, key, "STORE")
        got = await dcmtk.getscu(archive.port, key)
        files = scp.files()

    assert len(found.datasets) == 1
    assert (moved.final.status, moved.final.completed, len(files)) == (0x0000, 3, 3)
    assert len(got.datasets) == 3
