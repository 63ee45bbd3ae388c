"""Real objects of every kind travel unchanged: pydicom's packaged files, from real archives."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

import pytest

from tests.e2e.conftest import MakeProxy
from tests.e2e.support import PROXY_TITLE, Contents, Proxy, a_study, collect
from tests.peers.archive import Archive
from tests.peers.dcmtk import Dcmqrscp, StoreScp, movescu
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.support.datasets import RealFile, real_files

FULL_SIZE = os.environ.get("DICOMPROXY_FULL_SIZE") == "1"


def one_of_each(files: list[RealFile]) -> list[RealFile]:
    """Return one file for each pair of SOP Class and transfer syntax: the smallest."""
    smallest: dict[tuple[str, str], RealFile] = {}
    for one in sorted(files, key=lambda one: one.path.stat().st_size):
        smallest.setdefault((one.sop_class_uid, one.transfer_syntax_uid), one)
    return list(smallest.values())


async def moved(storescp: StoreScp, port: int, studies: list[str]) -> Contents:
    """Have an archive move each study to the workstation; return what arrived."""
    slots = asyncio.Semaphore(4)  # DCMTK waits for most of the time

    async def move(uid: str) -> None:
        async with slots:
            await movescu(port, a_study(uid), "READING1", calling="READING1", called="NORTH")

    async with asyncio.TaskGroup() as tasks:
        for uid in studies:
            tasks.create_task(move(uid))
    return collect(storescp)


# dcmqrscp sends in one syntax only, so what it holds in others does not leave it.
@pytest.mark.parametrize(
    ("archive", "classes", "syntaxes"), [("orthanc", 10, 8), ("dcmqrscp", 10, 1)]
)
@pytest.mark.slow
async def test_every_class_and_syntax_that_an_archive_holds_travels_unchanged(
    start: MakeProxy, archive: str, classes: int, syntaxes: int
) -> None:
    """What the archive sends by itself and what comes through the proxy are the same bytes."""
    files = real_files() if FULL_SIZE else one_of_each(real_files())
    port = free_port()
    us = Node(PROXY_TITLE, "127.0.0.1", port)
    async with AsyncExitStack() as stack:
        storescp = await stack.enter_async_context(StoreScp("READING1"))
        local = await stack.enter_async_context(Archive("LOCALPACS"))
        north: Orthanc | Dcmqrscp
        if archive == "orthanc":
            north = Orthanc("NORTH", {"proxy": us, "reading": storescp.node})
            await stack.enter_async_context(north)
            held = await upload(north, files)
        else:
            north = Dcmqrscp("NORTH", [us, storescp.node], instances=[one.path for one in files])
            await stack.enter_async_context(north)
            held = files
        proxy: Proxy = await start(
            pacs=local.node,
            sources={"north": north.node},
            workstations=[storescp.node],
            port=port,
        )
        studies = sorted({one.study_instance_uid for one in held})
        directly = await moved(storescp, north.port, studies)
        # All in one request: many kinds meet on the same associations.
        result = await proxy.movescu(a_study("\\".join(studies)))
        through = collect(storescp)

        assert result.final.completed == len(directly)
        assert set(through) == set(directly)
        changed = [
            (one.name, one.transfer_syntax_uid)
            for one in held
            if through.get(one.sop_instance_uid) != directly.get(one.sop_instance_uid)
        ]
        assert changed == []
        travelled = [one for one in held if one.sop_instance_uid in through]
        # Enough to mean something.
        assert len({one.sop_class_uid for one in travelled}) >= classes
        assert len({through[one.sop_instance_uid][0] for one in travelled}) >= syntaxes


async def upload(orthanc: Orthanc, files: list[RealFile]) -> list[RealFile]:
    """Store what Orthanc takes; return it."""
    taken = []
    for one in files:
        try:
            await orthanc.upload([one.path])
        except OSError:
            continue  # an answer other than 2xx: it will not hold this one
        taken.append(one)
    return taken
