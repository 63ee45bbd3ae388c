"""Queries: what a workstation sees while sources fail, and what the region sees of its queries."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.e2e.conftest import MakeProxy
from tests.e2e.support import PROXY_TITLE, Proxy, identifier
from tests.peers.archive import Archive
from tests.peers.entity import Root
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.peers.workstation import Result, Workstation
from tests.sentinel import ACCESSION_NUMBER, PATIENT_ID, PATIENT_NAME
from tests.support.datasets import part10, study

BUDGET_SECONDS = 5.0
SILENT_SECONDS = 15.0


@asynccontextmanager
async def silent_node() -> AsyncIterator[Node]:
    """Accept connections, and never answer."""
    with socket.create_server(("127.0.0.1", free_port()), backlog=16) as server:
        yield Node("SILENT", "127.0.0.1", server.getsockname()[1])


def asks(proxy: Proxy) -> Workstation:
    return Workstation("READING1", proxy.node)


async def query_studies(proxy: Proxy) -> Result:
    return await asks(proxy).find(
        identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID="", StudyDescription="")
    )


def reading(**keys: object) -> dict[str, object]:
    return {"ae_title": "READING1", "host": "127.0.0.1", "port": free_port(), **keys}


async def test_a_dead_and_a_silent_source_cost_no_more_than_the_budget(start: MakeProxy) -> None:
    """With every breaker closed, the query ends with Success, local rows and the good source's."""
    here, there = study(1, 1), study(1, 1)
    async with (
        Orthanc("LOCALPACS") as local,
        Orthanc("KILLED") as killed,
        Orthanc("NORTH") as north,
        silent_node() as silent,
    ):
        await local.upload(map(part10, here))
        await north.upload(map(part10, there))
        await killed.upload(map(part10, study(1, 1)))
        proxy = await start(
            pacs=local.node,
            sources={"killed": killed.node, "silent": silent, "north": north.node},
            workstations=[reading(query_budget=f"{BUDGET_SECONDS:g}s")],
            silent={"query_timeout": f"{SILENT_SECONDS:g}s"},
        )
        killed.kill()
        began = time.monotonic()
        result = await query_studies(proxy)
        took = time.monotonic() - began

        assert result.final.status == 0x0000
        assert [row.StudyInstanceUID for row in result.rows] == [
            here[0].StudyInstanceUID,
            there[0].StudyInstanceUID,
        ]
        # Nothing but the budget ended it: it was there before the silent one's own deadline.
        assert BUDGET_SECONDS <= took < SILENT_SECONDS
        failed = {line["source"] for line in proxy.named("source_query_failed")}
        assert "killed" in failed
        # The silent one is known to have failed once its own deadline has passed.
        await proxy.until(
            lambda: (
                "silent"
                in {
                    line["source"]
                    for event in ("source_query_failed", "source_query_late")
                    for line in proxy.named(event)
                }
            ),
            "told of the silent source",
        )


async def test_local_rows_arrive_before_any_source_has_answered(start: MakeProxy) -> None:
    """Sources are held back until the local row has reached the workstation."""
    here, there = study(1, 1), study(1, 1)
    async with Archive("LOCALPACS", here) as local, Archive("NORTH", there) as north:
        proxy = await start(
            pacs=local.node,
            sources={"north": north.node},
            workstations=[reading(query_budget="60s")],
        )
        north.hold()
        seen: list[str] = []
        loop = asyncio.get_running_loop()
        first = asyncio.Event()

        def ask() -> int:
            workstation = asks(proxy)
            association = workstation._associate([_find_context()])
            try:
                answers = association.send_c_find(
                    identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID=""), _FIND
                )
                status = -1
                for answer, row in answers:
                    status = int(answer.Status)
                    if row is not None:
                        seen.append(str(row.StudyInstanceUID))
                        loop.call_soon_threadsafe(first.set)
                return status
            finally:
                association.release()

        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(asyncio.to_thread(ask))
            await north.held()
            await first.wait()
            assert seen == [here[0].StudyInstanceUID]
            north.release()

        assert asking.result() == 0x0000
        assert seen == [here[0].StudyInstanceUID, there[0].StudyInstanceUID]


async def test_local_pacs_down_gives_remote_rows_then_c001(start: MakeProxy) -> None:
    """Remote rows still come, and the final status says that local ones are missing."""
    there = study(1, 1)
    async with Archive("NORTH", there) as north:
        proxy = await start(
            pacs=Node("LOCALPACS", "127.0.0.1", free_port()),
            sources={"north": north.node},
            workstations=[reading()],
        )
        result = await query_studies(proxy)

    assert result.final.status == 0xC001
    assert [row.StudyInstanceUID for row in result.rows] == [there[0].StudyInstanceUID]
    assert proxy.named("local_query_failed")


SCOPES = [
    ("STUDY", {}, False),
    ("STUDY", {"PatientName": PATIENT_NAME}, False),
    ("PATIENT", {"PatientName": "SENT*"}, False),
    ("STUDY", {"PatientID": "SENT*"}, False),
    ("STUDY", {"PatientID": PATIENT_ID[:-1] + "?"}, False),
    ("STUDY", {"PatientID": f"{PATIENT_ID}\\OTHER"}, False),
    ("STUDY", {"AccessionNumber": ACCESSION_NUMBER}, False),
    ("STUDY", {"StudyDate": "20200101-20201231"}, False),
    ("PATIENT", {"PatientID": PATIENT_ID}, True),
    ("STUDY", {"PatientID": PATIENT_ID}, True),
    ("STUDY", {"PatientID": PATIENT_ID, "PatientName": PATIENT_NAME}, True),
]
"""Level, keys, and whether sources are asked."""


async def test_the_region_sees_only_queries_that_name_one_patient(start: MakeProxy) -> None:
    """A broad query stays in the house; one for a Patient ID is asked of every source."""
    here, there = study(1, 1), study(1, 1)
    async with (
        Archive("LOCALPACS", here) as local,
        Archive("NORTH", there) as north,
        Archive("SOUTH", there) as south,
    ):
        proxy = await start(
            pacs=local.node,
            sources={"north": north.node, "south": south.node},
            workstations=[reading()],
        )
        for number, (level, keys, asked) in enumerate(SCOPES):
            request = identifier(level, **{"PatientID": "", "StudyInstanceUID": "", **keys})
            if level == "PATIENT":
                del request.StudyInstanceUID
            root: Root = "P" if level == "PATIENT" else "S"
            directly = await Workstation("READING1", local.node).find(request, root=root)
            for archive in (local, north, south):
                archive.requests.clear()
            recorded = len(proxy.audit()) if number else 0

            result = await asks(proxy).find(request, root=root)

            assert result.final.status == 0x0000, number
            assert len(local.asked("find")) == 1, number
            assert [len(one.asked("find")) for one in (north, south)] == [asked] * 2, number
            if level == "STUDY":
                remote = {there[0].StudyInstanceUID} if asked else set()
                expected = {row.StudyInstanceUID for row in directly.rows} | remote
                assert {row.StudyInstanceUID for row in result.rows} == expected, number
            else:
                assert len(result.rows) == len(directly.rows), number
            sources = {line["source"] for line in proxy.audit()[recorded:]} - {"local"}
            assert sources == ({"north", "south"} if asked else set()), number


async def test_a_query_that_names_only_a_study_finds_it_anywhere(start: MakeProxy) -> None:
    """A Study Instance UID is enough, also for series and images, which go to the holder alone."""
    here, there = study(1, 1), study(2, 2)
    uid = there[0].StudyInstanceUID
    async with (
        Archive("LOCALPACS", here) as local,
        Archive("NORTH", there) as north,
        Archive("SOUTH") as south,
    ):
        proxy = await start(
            pacs=local.node,
            sources={"north": north.node, "south": south.node},
            workstations=[reading()],
        )
        workstation = asks(proxy)
        studies = await workstation.find(identifier("STUDY", StudyInstanceUID=uid, PatientID=""))
        series = await workstation.find(
            identifier("SERIES", StudyInstanceUID=uid, SeriesInstanceUID="", Modality="")
        )
        images = await workstation.find(
            identifier(
                "IMAGE",
                StudyInstanceUID=uid,
                SeriesInstanceUID=there[0].SeriesInstanceUID,
                SOPInstanceUID="",
                RetrieveAETitle="",
            )
        )

        assert [row.PatientID for row in studies.rows] == [PATIENT_ID]
        assert {row.SeriesInstanceUID for row in series.rows} == {
            one.SeriesInstanceUID for one in there
        }
        assert {row.SOPInstanceUID for row in images.rows} == {
            one.SOPInstanceUID for one in there[:2]
        }
        assert {row.RetrieveAETitle for row in images.rows} == {PROXY_TITLE}
        assert all(one.final.status == 0x0000 for one in (studies, series, images))
        # Both were asked where it is; then only who has it.
        assert len(south.asked("find")) == 1
        assert len(north.asked("find")) == 3


async def test_a_caller_that_is_itself_a_source_is_answered_from_local_alone(
    start: MakeProxy,
) -> None:
    """Two proxies that are each other's source cannot ask in a circle."""
    here, there = study(1, 1), study(1, 1)
    async with Archive("LOCALPACS", here) as local, Archive("NORTH", there) as north:
        proxy = await start(
            pacs=local.node, sources={"north": north.node}, workstations=[reading()]
        )
        result = await Workstation("NORTH", proxy.node).find(
            identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID="")
        )

        assert result.final.status == 0x0000
        assert [row.StudyInstanceUID for row in result.rows] == [here[0].StudyInstanceUID]
        assert north.asked("find") == []


_FIND = "1.2.840.10008.5.1.4.1.2.2.1"


def _find_context() -> object:
    from pynetdicom import build_context

    return build_context(_FIND, ["1.2.840.10008.1.2"])
