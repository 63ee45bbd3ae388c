"""DCMTK and Orthanc as peers: started, asked, silenced, killed and ended."""

from __future__ import annotations

import pytest

from tests.peers import dcmtk
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.peers.process import find_program, listening, require
from tests.support.datasets import data_set_bytes, part10, study

pytestmark = pytest.mark.peers


async def test_dcmqrscp_answers_moves_and_gives() -> None:
    """An archive of DCMTK's lists, delivers and gives what it was filled with."""
    held = study(series=2, instances=2)
    key = {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": held[0].StudyInstanceUID}
    async with (
        dcmtk.StoreScp("STORE") as store,
        dcmtk.Dcmqrscp("QR", [store.node], instances=map(part10, held)) as archive,
    ):
        found = await dcmtk.findscu(archive.port, key, called="QR")
        moved = await dcmtk.movescu(archive.port, key, "STORE", called="QR")
        got = await dcmtk.getscu(archive.port, key, called="QR")
        arrived = {one.SOPInstanceUID: one for one in store.datasets()}

    assert (found.final.status, len(found.datasets)) == (0x0000, 1)
    assert (moved.final.status, moved.final.completed, moved.final.failed) == (0x0000, 4, 0)
    assert len(got.datasets) == 4
    assert set(arrived) == {one.SOPInstanceUID for one in held}


async def test_storescp_keeps_bytes_as_they_came() -> None:
    """What storescu sends, storescp holds with the same data set bytes."""
    held = study(instances=2)
    async with dcmtk.StoreScp("STORE") as store:
        sent = await dcmtk.storescu(store.port, map(part10, held))
        contents = [path.read_bytes() for path in store.files()]

    assert sent.final.status == 0x0000
    assert all(any(one.endswith(data_set_bytes(made)) for one in contents) for made in held)


async def test_nobody_listening_is_no_response() -> None:
    """An SCU that reaches nobody ends with an error and without a response."""
    result = await dcmtk.echoscu(free_port())

    assert result.exit_code != 0
    assert result.responses == ()
    assert not result.rejected


async def test_paused_peer_is_silent_and_resumes() -> None:
    """A paused server leaves connections open and silent; resumed, it answers."""
    async with dcmtk.StoreScp("STORE") as store:
        store.pause()
        with pytest.raises(TimeoutError):
            await dcmtk.echoscu(store.port, seconds=0.5)
        store.resume()
        answered = await dcmtk.echoscu(store.port)

    assert answered.final.status == 0x0000


async def test_killed_peer_comes_back_on_its_port() -> None:
    """A killed server refuses connections until it is started again, on the same port."""
    async with dcmtk.StoreScp("STORE") as store:
        port = store.port
        store.kill()
        assert not listening(port)
        store.start()

        assert store.port == port
        assert (await dcmtk.echoscu(port)).final.status == 0x0000
    assert not listening(port)


async def test_orthanc_holds_lists_and_delivers() -> None:
    """Orthanc takes files by REST, answers C-FIND, delivers by C-MOVE and counts requests."""
    held = study(instances=3)
    key = {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": held[0].StudyInstanceUID}
    async with (
        dcmtk.StoreScp("STORE") as store,
        Orthanc("ORTHANC", {"store": store.node}) as archive,
    ):
        await archive.upload(map(part10, held))
        found = await dcmtk.findscu(archive.port, key, called="ORTHANC")
        moved = await dcmtk.movescu(archive.port, key, "STORE", called="ORTHANC")
        uids = await archive.sop_instance_uids()
        first = await archive.instance_file(held[0].SOPInstanceUID)
        served = archive.served("Find"), archive.served("Move")
        await archive.delete_study(held[0].StudyInstanceUID)
        left = await archive.statistics()
        count = len(store.files())

    assert len(found.datasets) == 1
    assert (moved.final.status, moved.final.completed, count) == (0x0000, 3, 3)
    assert uids == {one.SOPInstanceUID for one in held}
    assert first.endswith(data_set_bytes(held[0]))
    assert served == (1, 1)
    assert left["CountInstances"] == 0


async def test_orthanc_keeps_its_studies_over_a_restart() -> None:
    """Stopped and started again, Orthanc has its ports and what was stored."""
    held = study(instances=1)
    async with Orthanc("ORTHANC") as archive:
        await archive.upload(map(part10, held))
        ports = archive.port, archive.http_port
        await archive.stop()
        await archive.start()

        assert (archive.port, archive.http_port) == ports
        assert await archive.sop_instance_uids() == {held[0].SOPInstanceUID}


def test_missing_program_skips_here_and_fails_where_all_must_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that is not installed skips a test, unless CI=true."""
    monkeypatch.setenv("CI", "false")
    with pytest.raises(pytest.skip.Exception):
        require("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception):
        require("no-such-program")
    assert find_program("no-such-program") is None


def test_node_is_a_tuple_with_names() -> None:
    """A node goes wherever AE title, host and port are wanted in a row."""
    ae_title, host, port = Node("A", "127.0.0.1", 104)

    assert (ae_title, host, port) == ("A", "127.0.0.1", 104)
