"""Archives and workstations made of pynetdicom, with the proxy as a process between them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydicom import Dataset

from tests.e2e.conftest import MakeProxy
from tests.e2e.generator import Settings
from tests.e2e.support import PROXY_TITLE, Contents, Proxy, identifier
from tests.peers.archive import Archive
from tests.peers.dcmtk import Response
from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.process import PeerProcess
from tests.peers.workstation import Workstation
from tests.support.datasets import data_set_bytes


class Setup:
    """Archives of pynetdicom, workstations, and the proxy between them."""

    def __init__(self, local: Archive, archives: list[Archive], workstations: list[Workstation]):
        self.local, self.archives, self.workstations = local, archives, workstations
        self.proxy: Proxy

    @property
    def reading(self) -> Workstation:
        return self.workstations[0]


@asynccontextmanager
async def setup(
    start: MakeProxy,
    *held: list[Dataset],
    here: Sequence[Dataset] = (),
    count: int = 1,
    kind: type[Archive] = Archive,
    transfer_syntaxes: Iterable[str] = (),
    entries: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> AsyncIterator[Setup]:
    """Run archives north, south, ... that hold what is *held*, and *count* workstations.

    Args:
        here: what the local PACS holds.
        kind: of the remote archives.
        transfer_syntaxes: in which the workstations take what is held; default: as it is held.
        entries: further keys of workstations in the configuration, by their titles.
        more: as for ``configuration``.
    """
    names = ("north", "south", "east", "west")[: len(held)]
    port = free_port()
    us = Node(PROXY_TITLE, "127.0.0.1", port)
    everything = [one for instances in (here, *held) for one in instances]
    # Offering every standard class would cost pynetdicom much time for each association.
    accept = sorted({str(one.SOPClassUID) for one in everything})
    native = sorted({str(one.file_meta.TransferSyntaxUID) for one in everything})
    workstations = [
        Workstation(
            f"READING{number}",
            us,
            accept=accept,
            transfer_syntaxes=list(transfer_syntaxes) or native,
        )
        for number in range(1, count + 1)
    ]
    archives = [kind(name.upper(), one, [us]) for name, one in zip(names, held, strict=True)]
    local = Archive("LOCALPACS", here, [us])
    entities = [*workstations, *archives, local]
    made = Setup(local, archives, workstations)
    # Each request of pynetdicom's takes a thread; by default there are few on a small machine.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(count + 24))
    try:
        for entity in entities:
            await asyncio.to_thread(entity.start)
        for workstation in workstations:
            local.destinations[workstation.ae_title] = workstation.node
        made.proxy = await start(
            pacs=local.node,
            sources={name: archive.node for name, archive in zip(names, archives, strict=True)},
            workstations=[
                {**one.node._asdict(), **(entries or {}).get(one.ae_title, {})}
                for one in workstations
            ],
            port=port,
            **more,
        )
        yield made
    finally:
        # Together, since each takes its time to end.
        await asyncio.gather(*(asyncio.to_thread(entity.stop) for entity in entities))


def contents(instances: list[Dataset]) -> Contents:
    """Return what must arrive of *instances*."""
    return {
        str(one.SOPInstanceUID): (str(one.file_meta.TransferSyntaxUID), data_set_bytes(one))
        for one in instances
    }


def the_study(instances: list[Dataset]) -> Dataset:
    """Name the study of *instances* in a request."""
    return identifier("STUDY", StudyInstanceUID=instances[0].StudyInstanceUID)


def figures(response: Response) -> tuple[int, int | None, int | None, int | None]:
    """Return status, completed, failed and warning."""
    return response.status, response.completed, response.failed, response.warning


@asynccontextmanager
async def generator(settings: Settings, directory: Path) -> AsyncIterator[PeerProcess]:
    """Run the region that keeps nothing."""
    log = directory / "generator.log"
    process = PeerProcess(
        [sys.executable, "-m", "tests.e2e.generator", json.dumps(asdict(settings))],
        log,
        Path(__file__).parents[2],
    )
    try:
        ready = await asyncio.to_thread(process.wait_ready, lambda: "ready" in log.read_text())
        assert ready, log.read_text()[-2000:]
        yield process
    finally:
        await asyncio.to_thread(process.kill)
