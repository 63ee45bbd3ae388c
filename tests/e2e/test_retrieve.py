"""Retrieves: each instance leaves its source once, and every way to fail says what is missing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import register_uid

from tests.e2e.conftest import MakeProxy
from tests.e2e.generator import Settings, sop_instance_uid
from tests.e2e.scene import contents, figures, generator, setup, the_study
from tests.e2e.support import (
    PROXY_TITLE,
    collect,
    identifier,
    received,
    uids,
)
from tests.peers.archive import Archive
from tests.peers.dcmtk import Dcmqrscp, Response, StoreScp
from tests.peers.entity import STORAGE, WAIT_SECONDS
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.peers.workstation import Workstation
from tests.support.datasets import instance, part10, study

NOWHERE = "2.25.123456789"
PATIENT = {"query_timeout": "60s"}
"""For a source that is held back until everybody has asked."""


class Dying(Archive):
    """An archive that breaks off after it has sent some instances, and then is gone.

    It has said which there are by then: one that has not is another matter.
    """

    after = 5

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._listed = threading.Event()

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        yield from super()._find(event)
        if event.identifier.QueryRetrieveLevel == "IMAGE":
            self._listed.set()

    def _send(self, event: Any, found: list[Dataset], service: Any) -> Iterator[Any]:
        for answer in super()._send(event, found, service):
            # What is about to leave is counted already; the first answer is only a number.
            if self.reject or (isinstance(answer, tuple) and sum(self.sent.values()) > self.after):
                assert self._listed.wait(WAIT_SECONDS)
                self.reject = "permanent"
                event.assoc.abort()
                raise ConnectionError
            yield answer


# ------------------------------------------------------------------ all at once


async def test_twenty_workstations_open_one_study_and_it_is_fetched_once(
    start: MakeProxy,
) -> None:
    """All twenty get every instance; each leaves the source once."""
    held = study(2, 6, rows=64, columns=64)
    async with setup(start, held, count=20, north=PATIENT) as made:
        [north] = made.archives
        # Nothing is answered before all have asked.
        north.hold()
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(workstation.move(the_study(held)))
                for workstation in made.workstations
            ]
            await made.proxy.until(lambda: made.proxy.retrieves_running() == 20, "asked by all")
            north.release()

        assert {figures(one.result().final) for one in asked} == {(0x0000, 12, 0, 0)}
        for workstation in made.workstations:
            assert received(workstation.received) == contents(held)
        assert north.sent == dict.fromkeys(uids(held), 1)
        disclosed = {
            line["destination_ae_title"]
            for line in made.proxy.audit()
            if line["event"] == "disclosure" and line["outcome"] == "success"
        }
        assert disclosed == {workstation.ae_title for workstation in made.workstations}


async def test_twenty_series_and_their_study_are_fetched_once(start: MakeProxy) -> None:
    """Requests for parts and for the whole share one fetching."""
    held = study(20, 3)
    series = sorted({str(one.SeriesInstanceUID) for one in held})
    async with setup(start, held, count=2, north=PATIENT) as made:
        [north] = made.archives
        north.hold()
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            parts = [
                tasks.create_task(
                    made.workstations[0].move(
                        identifier(
                            "SERIES",
                            StudyInstanceUID=held[0].StudyInstanceUID,
                            SeriesInstanceUID=uid,
                        )
                    )
                )
                for uid in series
            ]
            whole = tasks.create_task(made.workstations[1].move(the_study(held)))
            await made.proxy.until(lambda: made.proxy.retrieves_running() == 21, "asked for all")
            north.release()

        assert [figures(one.result().final) for one in parts] == [(0x0000, 3, 0, 0)] * 20
        assert figures(whole.result().final) == (0x0000, 60, 0, 0)
        for workstation in made.workstations:
            assert received(workstation.received) == contents(held)
        assert north.sent == dict.fromkeys(uids(held), 1)


# ---------------------------------------------------------------- what is asked


async def test_series_and_images_alone_are_fetched_and_delivered(start: MakeProxy) -> None:
    """Levels below the study bring what they name; the study then brings the rest."""
    held = study(3, 3)
    uid = held[0].StudyInstanceUID
    async with setup(start, held) as made:
        [north] = made.archives
        one_series = await made.reading.move(
            identifier("SERIES", StudyInstanceUID=uid, SeriesInstanceUID=held[0].SeriesInstanceUID)
        )
        assert sorted(made.reading.uids()) == uids(held[:3])
        two_images = await made.reading.move(
            identifier(
                "IMAGE",
                StudyInstanceUID=uid,
                SeriesInstanceUID=held[3].SeriesInstanceUID,
                SOPInstanceUID=[held[3].SOPInstanceUID, held[5].SOPInstanceUID],
            )
        )
        assert sorted(made.reading.uids()) == uids([*held[:3], held[3], held[5]])
        assert sum(north.sent.values()) == 5
        made.reading.received.clear()
        rest = await made.reading.move(the_study(held), message_id=77)

        assert figures(one_series.final) == (0x0000, 3, 0, 0)
        assert figures(two_images.final) == (0x0000, 2, 0, 0)
        assert figures(rest.final) == (0x0000, 9, 0, 0)
        assert received(made.reading.received) == contents(held)
        assert north.sent == dict.fromkeys(uids(held), 1)
        # As the local PACS would: under the title that was called, on behalf of who asked.
        assert {one.calling_ae_title for one in made.reading.received} == {PROXY_TITLE}
        assert {one.originator_ae_title for one in made.reading.received} == {"READING1"}
        assert {one.originator_message_id for one in made.reading.received} == {77}


async def test_a_study_held_in_two_places_is_united(start: MakeProxy) -> None:
    """What each holder has of a study comes from it; what both have comes once."""
    held = study(3, 2)
    async with setup(start, held[:4], held[2:]) as made:
        north, south = made.archives
        series = await made.reading.find(
            identifier("SERIES", StudyInstanceUID=held[0].StudyInstanceUID, SeriesInstanceUID="")
        )
        result = await made.reading.move(the_study(held))

        assert len(series.rows) == 3
        assert figures(result.final) == (0x0000, 6, 0, 0)
        assert received(made.reading.received) == contents(held)
        assert north.sent + south.sent == dict.fromkeys(uids(held), 1)


async def test_a_study_that_exists_nowhere_ends_with_success_and_no_suboperation(
    start: MakeProxy,
) -> None:
    """No match is no failure."""
    async with setup(start, study(1, 1)) as made:
        result = await made.reading.move(identifier("STUDY", StudyInstanceUID=NOWHERE))

        assert figures(result.final) == (0x0000, 0, 0, 0)
        assert made.reading.received == []
        assert len(made.archives[0].asked("move")) == 0


async def test_an_unknown_destination_is_a801(start: MakeProxy) -> None:
    """A title that nobody is configured with is refused, and nothing is fetched for it."""
    held = study(1, 2)
    async with setup(start, held) as made:
        result = await made.reading.move(the_study(held), "NOBODY")

        assert result.final.status == 0xA801
        assert made.archives[0].asked("move") == []


async def test_deliver_proxy_fetches_local_studies_like_any_other(start: MakeProxy) -> None:
    """A local PACS that knows no workstation sends to the proxy, which delivers."""
    here, there = study(1, 3), study(1, 2)
    async with setup(start, there, here=here, local={"deliver": "proxy"}) as made:
        for workstation in made.workstations:
            made.local.destinations.pop(workstation.ae_title)
        result = await made.reading.move(
            identifier(
                "STUDY", StudyInstanceUID=[here[0].StudyInstanceUID, there[0].StudyInstanceUID]
            )
        )
        unknown = await made.reading.move(the_study(here), "NOBODY")

        assert figures(result.final) == (0x0000, 5, 0, 0)
        assert received(made.reading.received) == contents(here + there)
        assert unknown.final.status == 0xA801


async def test_a_patients_studies_come_in_one_request_from_wherever_they_are(
    start: MakeProxy,
) -> None:
    """A retrieve at PATIENT level brings local and remote studies alike."""
    here, there, elsewhere = study(1, 2), study(1, 2), study(2, 1)
    async with setup(start, there, elsewhere, here=here) as made:
        result = await made.reading.move(
            identifier("PATIENT", PatientID=here[0].PatientID), root="P"
        )

        assert figures(result.final) == (0x0000, 6, 0, 0)
        assert received(made.reading.received) == contents(here + there + elsewhere)


async def test_deliveries_bear_the_title_that_was_called(start: MakeProxy) -> None:
    """A workstation that calls the proxy by the local PACS's title is called by it."""
    held = study(1, 2)
    async with setup(start, held, count=2, proxy={"aliases": ["LOCALPACS"]}) as made:
        proxy = made.proxy
        made.reading.server = proxy.node._replace(ae_title="LOCALPACS")
        proxy.settings["workstations"][1]["deliver_as"] = "OTHERNAME"
        proxy.write()
        proxy.signal(signal.SIGHUP)
        await proxy.until(lambda: bool(proxy.named("reloaded")), "reloaded")
        for workstation in made.workstations:
            assert (await workstation.move(the_study(held))).final.status == 0x0000

        titles = [
            {one.calling_ae_title for one in workstation.received}
            for workstation in made.workstations
        ]
        assert titles == [{"LOCALPACS"}, {"OTHERNAME"}]


async def test_more_kinds_of_objects_than_one_association_has_contexts_for(
    start: MakeProxy,
) -> None:
    """A study of 132 pairs of class and syntax, a private class among them, arrives whole."""
    private = "1.2.826.0.1.3680043.9.3811.1"
    register_uid(private, "PrivateImageStorage", StorageServiceClass)
    uids_of_both: dict[str, Any] = {
        "study_instance_uid": generate_uid(),
        "series_instance_uid": generate_uid(),
    }
    held = [
        instance(number, sop_class_uid=sop_class, transfer_syntax_uid=syntax, **uids_of_both)
        for number, (sop_class, syntax) in enumerate(
            (sop_class, syntax)
            for sop_class in (*STORAGE[:43], private)
            for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless)
        )
    ]
    async with setup(start, held[:66], held[66:]) as made:
        result = await made.reading.move(the_study(held))

        assert figures(result.final) == (0x0000, 132, 0, 0)
        assert received(made.reading.received) == contents(held)


async def test_what_a_workstation_does_not_accept_is_decoded_or_said_to_be_missing(
    start: MakeProxy,
) -> None:
    """Compressed pixels that can be decoded arrive plain; those that cannot are Failed."""
    held = study(1, 2, transfer_syntax_uid=RLELossless)
    held.append(
        instance(
            9,
            study_instance_uid=held[0].StudyInstanceUID,
            transfer_syntax_uid=JPEG2000Lossless,  # which no decoder takes
        )
    )
    async with setup(start, held, transfer_syntaxes=[ExplicitVRLittleEndian]) as made:
        result = await made.reading.move(the_study(held))

        assert figures(result.final) == (0xB000, 2, 1, 0)
        assert result.failed_sop_instance_uids == (str(held[2].SOPInstanceUID),)
        arrived = {one.sop_instance_uid: one for one in made.reading.received}
        for one in held[:2]:
            got = arrived[str(one.SOPInstanceUID)]
            plain = instance(int(one.InstanceNumber))
            assert got.transfer_syntax_uid == ExplicitVRLittleEndian
            assert got.dataset().PixelData == plain.PixelData
        # The decoder complains on stderr, where only lines of the log may be.
        assert made.proxy.named("instance_not_deliverable")


# ------------------------------------------------------------------- it goes wrong


async def test_cancel_reaches_the_source_and_ends_with_fe00(start: MakeProxy) -> None:
    """C-CANCEL in the middle of a study stops the fetching; the counts say how far it came."""
    held = study(1, 60)
    async with setup(start, held) as made:
        [north] = made.archives
        # It would take half a minute.
        north.delay_seconds = 0.5
        result = await made.reading.move(the_study(held), cancel_after=3)

        final = result.final
        assert final.status == 0xFE00
        assert final.completed is not None
        assert final.failed == final.warning == 0
        assert 0 < final.completed < 60
        assert final.completed == len(made.reading.received)
        await made.proxy.until(lambda: north.cancelled > 0, "cancelled at the source")
        assert sum(north.sent.values()) < 60


async def test_the_rest_of_a_study_comes_from_the_next_holder(start: MakeProxy) -> None:
    """A source that is gone in the middle of a study is replaced by another that holds it."""
    held = study(1, 12)
    async with setup(start, held, held, kind=Dying) as made:
        north, south = made.archives
        assert isinstance(south, Dying)
        south.after = 1000
        result = await made.reading.move(the_study(held))

        assert figures(result.final) == (0x0000, 12, 0, 0)
        assert received(made.reading.received) == contents(held)
        assert north.sent
        assert 0 < sum(south.sent.values()) < 12


async def test_a_source_gone_in_the_middle_leaves_b000_and_a_list(start: MakeProxy) -> None:
    """What nobody delivers any more is Failed and listed, and asked for again the next time."""
    held = study(1, 12)
    async with setup(start, held, kind=Dying, retrieve={"retry_pause": "0s"}) as made:
        [north] = made.archives
        result = await made.reading.move(the_study(held))

        status, completed, failed, _ = figures(result.final)
        assert status == 0xB000
        assert 0 < (completed or 0) < 12
        assert (completed or 0) + (failed or 0) == 12
        assert len(made.reading.received) == completed
        assert received(made.reading.received).items() <= contents(held).items()
        missing = set(uids(held)) - set(made.reading.uids())
        assert set(result.failed_sop_instance_uids) == missing
        assert made.proxy.named("flight_incomplete")

        assert isinstance(north, Dying)
        north.after, north.reject = 1000, None
        made.reading.received.clear()
        again = await made.reading.move(the_study(held))

        assert figures(again.final) == (0x0000, 12, 0, 0)
        assert received(made.reading.received) == contents(held)


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_a_source_process_that_dies_or_falls_silent_costs_what_it_had_not_sent(
    start: MakeProxy, tmp_path: Path, how: str
) -> None:
    """Four of ten instances came before the process was killed, or said no more."""
    port = free_port()
    settings = Settings(free_port(), free_port(), free_port(), port, 10, 65536, stall_after=4)
    async with (
        generator(settings, tmp_path) as process,
        Archive("LOCALPACS") as local,
        Workstation("READING1", Node(PROXY_TITLE, "127.0.0.1", port)) as reading,
    ):
        proxy = await start(
            pacs=local.node,
            sources={"north": Node("NORTH", "127.0.0.1", settings.archive_port)},
            workstations=[reading.node],
            port=port,
            proxy={"pending_interval": "1s"},
            north={"stall_timeout": "5s", "first_instance_timeout": "5s"},
            retrieve={"attempts": 1},
        )

        def on_response(response: Response) -> None:
            # All are listed, and nothing is sent any more.
            counts = response.completed, response.remaining
            if how == "killed" and counts == (4, 6) and process.alive:
                process.kill()

        result = await reading.move(
            identifier("STUDY", StudyInstanceUID=settings.study_instance_uid),
            on_response=on_response,
        )

        assert figures(result.final) == (0xB000, 4, 6, 0)
        everything = {sop_instance_uid(number) for number in range(10)}
        assert set(result.failed_sop_instance_uids) == everything - set(reading.uids())
        assert len(received(reading.received)) == 4
        assert proxy.named("flight_incomplete")


async def test_an_instance_that_its_source_cannot_send_is_listed(start: MakeProxy) -> None:
    """One missing instance does not keep the others back, and is named."""
    held = study(1, 5)
    async with setup(start, held) as made:
        made.archives[0].withhold.add(str(held[2].SOPInstanceUID))
        result = await made.reading.move(the_study(held))

        assert figures(result.final) == (0xB000, 4, 1, 0)
        assert result.failed_sop_instance_uids == (str(held[2].SOPInstanceUID),)
        assert sorted(made.reading.uids()) == uids(held[:2] + held[3:])


async def test_a_dead_destination_is_a702(start: MakeProxy) -> None:
    """A workstation that cannot be reached gets A702, with every instance Failed."""
    held = study(1, 3)
    async with setup(start, held, count=2, retrieve={"destination_retry": "1s"}) as made:
        made.workstations[1].stop()
        result = await made.reading.move(the_study(held), "READING2")

        assert figures(result.final) == (0xA702, 0, 3, 0)
        assert sorted(result.failed_sop_instance_uids) == uids(held)
        assert made.proxy.named("delivery_failed")


async def test_a_workstations_refusals_and_warnings_are_counted(start: MakeProxy) -> None:
    """Statuses of C-STORE become the counts of C-MOVE (PS3.4 C.4.2.3.1)."""
    held = study(1, 5)
    statuses = {str(held[1].SOPInstanceUID): 0xA700, str(held[3].SOPInstanceUID): 0xB006}
    async with setup(start, held) as made:
        made.reading.answer = lambda uid: statuses.get(uid, 0x0000)
        result = await made.reading.move(the_study(held))

        assert figures(result.final) == (0xB000, 3, 1, 1)
        assert result.failed_sop_instance_uids == (str(held[1].SOPInstanceUID),)


async def test_another_patients_instance_is_never_delivered(start: MakeProxy) -> None:
    """What names another patient than was agreed is Failed, logged, and shown to nobody."""
    held = study(1, 4)
    async with setup(start, held) as made:
        # The archive lists it as this patient's and sends it as somebody else's.
        held[2].PatientID = "SOMEBODY ELSE"
        result = await made.reading.move(the_study(held))

        assert figures(result.final) == (0xB000, 3, 1, 0)
        assert result.failed_sop_instance_uids == (str(held[2].SOPInstanceUID),)
        assert str(held[2].SOPInstanceUID) not in made.reading.uids()
        assert made.proxy.named("identity_conflict")
        assert "SOMEBODY ELSE" not in made.proxy.log


async def test_the_local_pacs_being_down_does_not_keep_remote_studies_back(
    start: MakeProxy,
) -> None:
    """Remote studies are opened without the local PACS."""
    held = study(1, 3)
    async with setup(start, held) as made:
        found = await made.reading.find(
            identifier("STUDY", PatientID=held[0].PatientID, StudyInstanceUID="")
        )
        made.local.stop()
        result = await made.reading.move(the_study(held))

        assert len(found.rows) == 1
        assert result.final.completed == 3
        assert received(made.reading.received) == contents(held)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("spool", ["64MB", "0B"])
async def test_a_full_disk_degrades_the_cache_and_nothing_else(
    start: MakeProxy, tmp_path: Path, spool: str
) -> None:
    """With no room on disk a study passes through memory, or it is said what is missing."""
    held = study(1, 24, rows=1024, columns=1024)
    later = study(1, 2)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        cache = {
            "directory": str(small / "cache"),
            "max_size": "100MB",
            "memory_spool": spool,
        }
        async with setup(start, held + later, cache=cache) as made:
            result = await made.reading.move(the_study(held))

            status, completed, failed, _ = figures(result.final)
            if spool == "0B":
                assert status == 0xB000
                assert 0 < (completed or 0) < 24
            else:
                assert status == 0x0000
            assert (completed or 0) + (failed or 0) == 24
            assert made.proxy.named("cache_degraded")
            delivered = received(made.reading.received)
            assert delivered.items() <= contents(held).items()
            assert len(delivered) == completed
            assert len(result.failed_sop_instance_uids) == failed
            assert made.proxy.http("/health/ready")[0] == 200
            made.reading.received.clear()
            again = await made.reading.move(the_study(later))
            assert figures(again.final) == (0x0000, 2, 0, 0)
            assert await made.proxy.stop() == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


async def test_an_instance_that_nobody_asked_for_is_refused(start: MakeProxy) -> None:
    """What a source sends without a retrieve under way goes nowhere, and is logged."""
    async with setup(start, study(1, 1)) as made:
        north = Workstation("NORTH", made.proxy.node)
        [status] = await north.store(study(1, 1))

        assert status != 0x0000
        assert made.proxy.named("store_refused")
        assert made.reading.received == []
        assert made.local.asked("store") == []


# ------------------------------------------------------------- other archives


async def test_c_get_from_an_orthanc_that_cannot_connect_back(
    start: MakeProxy, tmp_path: Path
) -> None:
    """An archive that knows nobody is fetched from on our own association."""
    held = study(2, 4)
    async with (
        Orthanc("NORTH") as north,
        Archive("LOCALPACS") as local,
        StoreScp("READING1") as storescp,
    ):
        await north.upload(map(part10, held))
        proxy = await start(
            pacs=local.node,
            sources={"north": north.node},
            workstations=[storescp.node],
            north={"retrieve": "c-get"},
        )
        result = await proxy.movescu(
            {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": str(held[0].StudyInstanceUID)}
        )

        assert figures(result.final) == (0x0000, 8, 0, 0)
        assert collect(storescp) == contents(held)
        assert north.served("Get") >= 1
        assert north.served("Move") == 0


async def test_dcmqrscp_as_a_source(start: MakeProxy) -> None:
    """DCMTK's archive, which keeps to the hierarchical baseline, is queried and fetched from."""
    held, other = study(2, 4), [instance()]
    port = free_port()
    async with (
        Dcmqrscp(
            "NORTH",
            [Node(PROXY_TITLE, "127.0.0.1", port)],
            instances=[part10(one) for one in held + other],
        ) as north,
        Archive("LOCALPACS") as local,
        StoreScp("READING1") as storescp,
    ):
        proxy = await start(
            pacs=local.node,
            sources={"north": north.node},
            workstations=[storescp.node],
            port=port,
        )
        found = await proxy.findscu(
            {
                "QueryRetrieveLevel": "STUDY",
                "PatientID": str(held[0].PatientID),
                "StudyInstanceUID": "",
            }
        )
        result = await proxy.movescu(
            {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": str(held[0].StudyInstanceUID)}
        )

        assert {row.StudyInstanceUID for row in found.datasets} == {
            held[0].StudyInstanceUID,
            other[0].StudyInstanceUID,
        }
        assert figures(result.final) == (0x0000, 8, 0, 0)
        assert collect(storescp) == contents(held)
