"""The main job on real archives: an unchanged workstation sees remote priors and opens them."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import MakeProxy, Region, start_in_front
from tests.e2e.support import PROXY_TITLE, Contents, Proxy, a_study, collect, uids
from tests.peers.dcmtk import StoreScp, movescu
from tests.sentinel import PATIENT_ID

KEYS = {
    "QueryRetrieveLevel": "STUDY",
    "PatientID": PATIENT_ID,
    "StudyInstanceUID": "",
    "StudyDescription": "",
    "RetrieveAETitle": "",
}


async def directly(storescp: StoreScp, port: int, uid: str) -> Contents:
    """Return what an archive sends to the workstation when it is asked itself."""
    result = await movescu(port, a_study(uid), "READING1", calling="READING1")
    assert result.final.status == 0x0000
    return collect(storescp)


@pytest.mark.parametrize("called", [PROXY_TITLE, "LOCALPACS"])
async def test_findscu_sees_each_study_once_wherever_it_is(
    region: Region, start: MakeProxy, called: str
) -> None:
    """A patient's studies come once each, local and remote, under the title that was called."""
    proxy = await start_in_front(start, region, proxy={"aliases": ["LOCALPACS"]})

    result = await proxy.findscu(KEYS, called=called)

    assert result.final.status == 0x0000
    found = [str(row.StudyInstanceUID) for row in result.datasets]
    assert len(found) == len(set(found))
    assert set(found) == region.studies
    assert {str(row.RetrieveAETitle) for row in result.datasets} == {called}


@pytest.mark.parametrize(
    ("called", "which"), [(PROXY_TITLE, "compressed_at_north"), ("LOCALPACS", "at_north")]
)
async def test_movescu_of_a_remote_study_gives_what_its_archive_would(
    region: Region, storescp: StoreScp, start: MakeProxy, called: str, which: str
) -> None:
    """Every instance arrives with the bytes and syntax of a direct C-MOVE; then from the cache."""
    proxy = await start_in_front(start, region, proxy={"aliases": ["LOCALPACS"]})
    held = getattr(region, which)
    uid = str(held[0].StudyInstanceUID)
    expected = await directly(storescp, region.north.port, uid)
    assert sorted(expected) == uids(held)
    moves = region.north.served("Move")

    first = await proxy.movescu(a_study(uid), called=called)

    assert first.final.status == 0x0000
    final = first.final
    assert (final.completed, final.failed, final.warning) == (len(held), 0, 0)
    assert final.remaining is None
    assert any(one.pending for one in first.responses)
    assert collect(storescp) == expected
    assert await proxy.fetched() == len(held)
    assert region.north.served("Move") > moves

    moves = region.north.served("Move")
    again = await proxy.movescu(a_study(uid), called=called)

    assert (again.final.status, again.final.completed) == (0x0000, len(held))
    assert collect(storescp) == expected
    assert await proxy.fetched() == len(held)
    assert region.north.served("Move") == moves


async def test_movescu_of_a_local_study_is_left_to_the_local_pacs(
    region: Region, storescp: StoreScp, proxy: Proxy
) -> None:
    """The local PACS sends its own study to the workstation, which hears its counts."""
    uid = str(region.at_local[0].StudyInstanceUID)

    result = await proxy.movescu(a_study(uid))

    assert (result.final.status, result.final.completed) == (0x0000, len(region.at_local))
    assert sorted(collect(storescp)) == uids(region.at_local)
    assert await proxy.fetched() == 0


async def test_local_and_remote_studies_in_one_request(
    region: Region, storescp: StoreScp, proxy: Proxy
) -> None:
    """A list of studies, some local and some remote, arrives whole with one sum of counts."""
    wanted = region.at_local + region.at_south + region.at_both
    listed = "\\".join(sorted({str(one.StudyInstanceUID) for one in wanted}))

    result = await proxy.movescu(a_study(listed))

    assert (result.final.status, result.final.completed) == (0x0000, len(wanted))
    assert sorted(collect(storescp)) == uids(wanted)
