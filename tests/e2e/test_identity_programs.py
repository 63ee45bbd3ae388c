"""Priors of one person from three archives of different make, asked for by DCMTK's programs.

The north is Orthanc and is translated to by PIX, the south is dcmqrscp and by PIXm,
the east is pynetdicom, by a table and by C-GET; the local PACS is an Orthanc. All hold studies
of people who are easily taken for the person: one of the same name, birth date and
sex, and one whose ID somewhere is the person's elsewhere and of whom nothing else
is known. One region serves all tests of this module.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from pydicom import Dataset, dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tests.e2e.conftest import proxies
from tests.e2e.identities import (
    EAST,
    HOSPITAL,
    NORTH,
    SHOWN,
    SOUTH,
    differences,
    domain,
    loaded,
    restored,
    studies,
    table,
    uid,
)
from tests.e2e.support import PROXY_TITLE, Proxy
from tests.peers.archive import Archive
from tests.peers.dcmtk import Dcmqrscp, Keys, ScuResult, StoreScp
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.pix_manager import pix_manager
from tests.peers.pixm_manager import pixm_manager
from tests.peers.ports import free_port
from tests.peers.process import require, run_program
from tests.sentinel import ACCESSION_NUMBER, PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.datasets import part10, study

pytestmark = pytest.mark.asyncio(loop_scope="module")

IN_NORTH, IN_SOUTH, IN_EAST = "N-0815-A", "S/22-0815", "e.33-0815"
TWIN, TWIN_IN_NORTH = "TWIN-18-HERE", "N-TWIN-4"
OTHER, NOBODY = "OTHER-17-HERE", "NOBODY-19-HERE"
LOCAL_VALUES = dict(zip(SHOWN, (PATIENT_ID, PATIENT_NAME, PATIENT_BIRTH_DATE, "F"), strict=True))
# As the person's ID here is somebody else's in the south, theirs in the north is so in the east.
EAST_TABLE = f"local,east\n{PATIENT_ID},{IN_EAST}\n{OTHER},{IN_NORTH}\n"
HIDDEN = (IN_NORTH, IN_SOUTH, IN_EAST, TWIN, TWIN_IN_NORTH, OTHER, NOBODY, "Pätient")


class Held:
    """What each archive holds; what is the person's is written there as it pleases them."""

    def __init__(self) -> None:
        bare = {"PatientName": "", "PatientBirthDate": "", "PatientSex": ""}
        order = Dataset()
        order.AccessionNumber = ACCESSION_NUMBER
        order.RequestedProcedureID = "RP-77"
        order.ScheduledProcedureStepID = "SPS-77"
        same = {"PatientSex": "F"}
        self.here = study(1, 2, PatientID=PATIENT_ID, **same)
        self.north = study(
            2,
            2,
            PatientID=IN_NORTH,
            PatientName="Sentinel^Pätient^^Dr.",
            PatientSex="",
            StudyDescription="Schädel nativ",
            InstitutionName="Nordklinik",
            RequestAttributesSequence=[order],
            transfer_syntax_uid=JPEG2000Lossless,
        )
        self.south = study(
            1,
            2,
            PatientID=IN_SOUTH,
            PatientName="SENTINEL^P",
            PatientBirthDate="",
            PatientSex="F",
            SpecificCharacterSet=None,
            transfer_syntax_uid=ImplicitVRLittleEndian,
        )
        self.east = study(1, 2, PatientID=IN_EAST, transfer_syntax_uid=RLELossless, **same)
        self.deflated = study(
            1, 1, PatientID=IN_EAST, transfer_syntax_uid=DeflatedExplicitVRLittleEndian, **same
        )
        self.twin = study(1, 1, PatientID=TWIN_IN_NORTH, **same)
        self.other_in_south = study(1, 1, PatientID=PATIENT_ID, **bare)
        self.other_in_east = study(1, 1, PatientID=IN_NORTH, **bare)

    @property
    def remote(self) -> dict[str, list[Dataset]]:
        """The person's studies, by where they are."""
        return {
            "north": self.north,
            "south": self.south,
            "east": self.east,
            "deflated": self.deflated,
        }

    @property
    def mine(self) -> set[str]:
        return {uid(self.here), *map(uid, self.remote.values())}


@dataclass
class World:
    """The region, filled, and the proxy before it."""

    held: Held
    proxy: Proxy
    storescp: StoreScp
    north: Orthanc
    south: Dcmqrscp
    east: Archive

    def finds(self) -> tuple[int, int, int]:
        """Count the questions that each archive was asked."""
        south = self.south.log.count("Received Find")
        return self.north.served("Find"), south, len(self.east.asked("find"))

    async def find(self, level: str = "STUDY", root: str = "-S", **keys: str) -> ScuResult:
        found = await self.proxy.findscu({"QueryRetrieveLevel": level, **keys}, root=root)
        assert found.exit_code == 0
        assert found.final.status == 0x0000
        return found

    async def move(self, keys: Keys, root: str = "-S") -> dict[str, Path]:
        """Retrieve; what arrived, by SOP Instance UID, each once."""
        for path in self.storescp.files():
            path.unlink()
        moved = await self.proxy.movescu(keys, root=root)
        assert moved.exit_code == 0
        assert moved.final.status == 0x0000
        files = self.storescp.files()
        assert moved.final.completed == len(files)
        arrived = {str(dcmread(path).SOPInstanceUID): path for path in files}
        assert len(arrived) == len(files)
        return arrived


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Run it; no log may name anybody's ID."""
    for program in ("findscu", "dcmqrscp", "Orthanc"):
        require(program)
    directory = tmp_path_factory.mktemp("world")
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(24))
    held, port = Held(), free_port()
    us = Node(PROXY_TITLE, "127.0.0.1", port)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        storescp = await enter(StoreScp("READING1"))
        known = {"us": us, "reading": storescp.node}
        local, north = Orthanc("LOCALPACS", known), Orthanc("NORTH", known)
        in_south = [*held.south, *held.other_in_south]
        south = Dcmqrscp("SOUTH", [us], instances=[part10(one) for one in in_south])
        east = Archive("EAST", [*held.east, *held.deflated, *held.other_in_east], [us])
        await asyncio.gather(*(enter(one) for one in (local, north, south, east)))
        await local.upload([part10(one) for one in held.here])
        await north.upload([part10(one) for one in (*held.north, *held.twin)])
        pix = await enter(
            pix_manager(
                [(PATIENT_ID, *HOSPITAL), (IN_NORTH, *NORTH)],
                [(TWIN, *HOSPITAL), (TWIN_IN_NORTH, *NORTH)],
                [(OTHER, *HOSPITAL)],
            )
        )
        oids = f"urn:oid:{HOSPITAL[1]}", f"urn:oid:{SOUTH[1]}"
        pixm = await enter(
            pixm_manager(
                [(oids[0], PATIENT_ID), (oids[1], IN_SOUTH)],
                [(oids[0], OTHER), (oids[1], PATIENT_ID)],
                [(oids[0], TWIN)],
            )
        )
        start = await enter(proxies(directory))
        proxy = await start(
            pacs=local.node,
            sources={"north": north.node, "south": south.node, "east": east.node},
            workstations=[storescp.node],
            port=port,
            local={"patient_id_issuer": domain(HOSPITAL)},
            north={"patient_id_issuer": domain(NORTH), "identity": {"cross_reference": "pix"}},
            south={"patient_id_issuer": domain(SOUTH), "identity": {"cross_reference": "pixm"}},
            east={
                "patient_id_issuer": domain(EAST),
                "identity": {"cross_reference": "east"},
                "retrieve": "c-get",
            },
            cross_references=[
                {"name": "pix", "type": "pix", "host": "127.0.0.1", "port": pix.port},
                {"name": "pixm", "type": "pixm", "url": f"http://127.0.0.1:{pixm.port}/fhir"},
                table(directory, EAST_TABLE, "east"),
            ],
        )
        await loaded(proxy)
        yield World(held, proxy, storescp, north, south, east)
        assert [value for value in HIDDEN if value in proxy.log] == []


ASKED = dict.fromkeys(("StudyInstanceUID", "AccessionNumber", "IssuerOfPatientID", *SHOWN), "")


async def test_only_the_persons_studies_are_found_by_their_id(world: World) -> None:
    """From all archives, every row with the local patient, and nobody else's."""
    found = await world.find(**(ASKED | {"PatientID": PATIENT_ID}))
    assert studies(found.datasets) == world.held.mine
    for row in found.datasets:
        assert {name: str(row[name].value) for name in SHOWN} == LOCAL_VALUES
        if str(row.StudyInstanceUID) != uid(world.held.here):
            assert row.IssuerOfPatientID == HOSPITAL[0]
    # Four archives gave the same number to orders that are not the same.
    numbers = {str(row.AccessionNumber) for row in found.datasets}
    assert len(numbers) == 4  # the east has two studies under one of its own
    assert ACCESSION_NUMBER in numbers
    assert max(map(len, numbers)) <= 16


@pytest.mark.parametrize("root", ["-S", "-P"])
async def test_who_looks_alike_is_found_under_their_own_id_alone(world: World, root: str) -> None:
    """The twin by theirs; and the one who has the person's IDs, but elsewhere, by theirs."""
    held = world.held
    expected = {
        TWIN: {uid(held.twin)},
        OTHER: {uid(held.other_in_south), uid(held.other_in_east)},
        NOBODY: set(),
    }
    for patient, theirs in expected.items():
        found = await world.find(root=root, PatientID=patient, StudyInstanceUID="", PatientName="")
        assert studies(found.datasets) == theirs
        assert {row.PatientID for row in found.datasets} <= {patient}


async def test_ids_of_archives_are_nobodys_here(world: World) -> None:
    """Asked for as if they were local ones, they show nothing of the archives that use them."""
    for foreign in (IN_NORTH, IN_SOUTH, IN_EAST, TWIN_IN_NORTH):
        assert (await world.find(PatientID=foreign, StudyInstanceUID="")).datasets == ()


async def test_nothing_but_one_patient_is_asked_for_elsewhere(world: World) -> None:
    """Names, dates, lists and patterns stay in the house, as does a number not made up here."""
    start = world.finds()
    await world.find(**(ASKED | {"PatientID": PATIENT_ID}))
    before = world.finds()
    assert all(later > earlier for earlier, later in zip(start, before, strict=True))
    for keys in (
        {"PatientName": "SENTINEL*"},
        {"PatientBirthDate": PATIENT_BIRTH_DATE},
        {"StudyDate": "20200101-20200131"},
        {"PatientID": PATIENT_ID[:-1] + "?"},
        {"PatientID": f"{PATIENT_ID}\\{TWIN}"},
        {"AccessionNumber": ACCESSION_NUMBER},
        {"IssuerOfPatientID": HOSPITAL[0]},
    ):
        found = await world.find(**({"StudyInstanceUID": ""} | keys))
        assert studies(found.datasets) <= {uid(world.held.here)}
    assert world.finds() == before


@pytest.mark.parametrize("where", ["north", "south", "east", "deflated"])
async def test_what_is_delivered_is_local_and_can_be_taken_back(
    world: World, where: str, tmp_path: Path
) -> None:
    """As the answers at every level say; pixels as they were; dciodvfy finds nothing new."""
    originals = world.held.remote[where]
    study_uid = uid(originals)
    arrived = await world.move({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": study_uid})
    assert arrived.keys() == {str(one.SOPInstanceUID) for one in originals}
    levels = {"StudyInstanceUID": study_uid}
    rows = [
        *(await world.find(**(ASKED | levels))).datasets,
        *(await world.find("SERIES", **(ASKED | levels), SeriesInstanceUID="")).datasets,
    ]
    for series in {str(one.SeriesInstanceUID) for one in originals}:
        keys = {**ASKED, **levels, "SeriesInstanceUID": series, "SOPInstanceUID": ""}
        rows += (await world.find("IMAGE", **keys)).datasets
    assert len(rows) == 1 + len({one.SeriesInstanceUID for one in originals}) + len(originals)
    assert bool(world.east.asked("get")) or where in ("north", "south")
    for one in originals:
        path = arrived[str(one.SOPInstanceUID)]
        got = dcmread(path)
        if where != "south":  # dcmqrscp sends in what it likes best
            assert got.file_meta.TransferSyntaxUID == one.file_meta.TransferSyntaxUID
        assert {name: str(got[name].value) for name in SHOWN} == LOCAL_VALUES
        assert got.IssuerOfPatientID == HOSPITAL[0]
        (qualifier,) = got.IssuerOfPatientIDQualifiersSequence
        assert qualifier.UniversalEntityID == HOSPITAL[1]
        (also,) = got.OtherPatientIDsSequence
        assert also.PatientID == one.PatientID
        assert got.PixelData == one.PixelData
        for row in rows:
            for name in ("AccessionNumber", *SHOWN):
                if name in row:
                    assert row[name].value == got[name].value
        (record,) = got.OriginalAttributesSequence
        (before,) = record.ModifiedAttributesSequence
        assert (before.PatientID, before.AccessionNumber) == (one.PatientID, ACCESSION_NUMBER)
        assert differences(restored(got), one) == []
        assert await errors(path, tmp_path) - await errors(part10(one), tmp_path) == Counter()


async def errors(instance: Path | bytes, directory: Path) -> Counter[str]:
    path = directory / "judged.dcm"
    path.write_bytes(instance if isinstance(instance, bytes) else instance.read_bytes())
    _, output = await run_program([require("dciodvfy"), str(path)], directory, 60)
    assert output.strip(), "nothing was said"
    return Counter(line for line in output.splitlines() if line.startswith("Error"))


async def test_the_patient_is_one_and_is_the_local_one(world: World) -> None:
    """A question for patients has one answer, that of the local PACS."""
    found = await world.find("PATIENT", "-P", **(dict.fromkeys(SHOWN, "") | {"PatientID": TWIN}))
    (row,) = found.datasets
    assert row.PatientID == TWIN
    keys = dict.fromkeys(SHOWN, "") | {"PatientID": PATIENT_ID}
    (row,) = (await world.find("PATIENT", "-P", **keys)).datasets
    assert {name: str(row[name].value) for name in SHOWN} == LOCAL_VALUES


async def test_a_patient_known_elsewhere_alone_is_found_and_delivered(world: World) -> None:
    """The local PACS has never heard of the twin, whose ID is valid here all the same."""
    arrived = await world.move(
        {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": uid(world.held.twin)}
    )
    (path,) = arrived.values()
    got, (original,) = dcmread(path), world.held.twin
    assert (got.PatientID, got.IssuerOfPatientID) == (TWIN, HOSPITAL[0])
    # Nobody here says otherwise, so the rest stays as its archive has it.
    assert (got.PatientName, got.PatientSex) == (original.PatientName, original.PatientSex)
    assert differences(restored(got), original) == []


async def test_all_of_a_patient_is_theirs(world: World) -> None:
    """Retrieved by Patient ID: every study of the person's, and of nobody else."""
    keys = {"QueryRetrieveLevel": "PATIENT", "PatientID": PATIENT_ID}
    arrived = await world.move(keys, root="-P")
    datasets = [dcmread(path) for path in arrived.values()]
    assert {str(one.StudyInstanceUID) for one in datasets} == world.held.mine
    assert len(arrived) == 2 + sum(map(len, world.held.remote.values()))
    assert {one.PatientID for one in datasets} == {PATIENT_ID}
    assert {str(one.PatientName) for one in datasets} == {PATIENT_NAME}


async def test_one_series_and_one_image_are_local_too(world: World) -> None:
    """Below STUDY level, in either information model, and nothing besides what was asked for."""
    first, *_ = world.held.north
    last = world.held.north[-1]
    keys = {"StudyInstanceUID": str(first.StudyInstanceUID)}
    series = {**keys, "SeriesInstanceUID": str(last.SeriesInstanceUID)}
    image = {
        **keys,
        "SeriesInstanceUID": str(first.SeriesInstanceUID),
        "SOPInstanceUID": str(first.SOPInstanceUID),
    }
    of_series = {one.SOPInstanceUID for one in world.held.north} - {
        one.SOPInstanceUID
        for one in world.held.north
        if one.SeriesInstanceUID != last.SeriesInstanceUID
    }
    for wanted, level, expected in (
        (series, "SERIES", of_series),
        (image, "IMAGE", {first.SOPInstanceUID}),
    ):
        for root, patient in (("-S", {}), ("-P", {"PatientID": PATIENT_ID})):
            arrived = await world.move({"QueryRetrieveLevel": level, **patient, **wanted}, root)
            assert arrived.keys() == set(map(str, expected))
            assert {dcmread(path).PatientID for path in arrived.values()} == {PATIENT_ID}


async def test_others_studies_are_not_had_in_the_persons_name(world: World) -> None:
    """Named as theirs at any level, the studies of those who look alike are withheld."""
    held = world.held
    for others in (held.other_in_south, held.other_in_east, held.twin):
        (one,) = others
        keys = {"PatientID": PATIENT_ID, "StudyInstanceUID": str(one.StudyInstanceUID)}
        series = {**keys, "SeriesInstanceUID": str(one.SeriesInstanceUID)}
        image = {**series, "SOPInstanceUID": str(one.SOPInstanceUID)}
        for level, wanted in (("STUDY", keys), ("SERIES", series), ("IMAGE", image)):
            found = await world.find(level, "-P", **wanted)
            assert found.datasets == ()
            moved = await world.proxy.movescu({"QueryRetrieveLevel": level, **wanted}, root="-P")
            assert not moved.final.completed
        # As whose they are, they are delivered.
        arrived = await world.move(
            {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": str(one.StudyInstanceUID)}
        )
        assert {dcmread(path).PatientID for path in arrived.values()} <= {TWIN, OTHER}
        assert len(arrived) == 1
