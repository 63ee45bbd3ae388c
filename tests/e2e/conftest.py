"""A region of real archives, filled once, and the proxy in front of it as a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydicom import Dataset
from pydicom.uid import JPEG2000Lossless

from tests.e2e.support import PROXY_TITLE, Proxy, configuration
from tests.peers.dcmtk import StoreScp
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.peers.process import require
from tests.peers.workstation import Workstation
from tests.sentinel import sentinels_in
from tests.support.datasets import part10, study

MakeProxy = Callable[..., Awaitable[Proxy]]

_PROGRAMS = ("findscu", "movescu", "storescp", "storescu", "dcmqrscp", "dcmqridx", "Orthanc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs peers."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.peers)


@dataclass(frozen=True)
class Region:
    """Three archives, what they hold, and the ports that they know others by."""

    local: Orthanc
    north: Orthanc
    south: Orthanc
    proxy_port: int
    reading1: int
    reading2: int
    at_local: list[Dataset] = field(repr=False)
    at_north: list[Dataset] = field(repr=False)
    compressed_at_north: list[Dataset] = field(repr=False)
    at_south: list[Dataset] = field(repr=False)
    at_both: list[Dataset] = field(repr=False)
    """Held by north and south."""
    local_too: list[Dataset] = field(repr=False)
    """Held by the local PACS and by north."""

    @property
    def sources(self) -> dict[str, Node]:
        return {"north": self.north.node, "south": self.south.node}

    @property
    def studies(self) -> set[str]:
        held = (self.at_local, self.at_north, self.compressed_at_north, self.at_south)
        return {str(one[0].StudyInstanceUID) for one in (*held, self.at_both, self.local_too)}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def region() -> AsyncIterator[Region]:
    """A local Orthanc and two remote ones, all filled with studies of the sentinel patient."""
    for program in _PROGRAMS:
        require(program)
    proxy_port, reading1, reading2 = free_port(), free_port(), free_port()
    known = {
        title.lower(): (title, "127.0.0.1", port)
        for title, port in (
            (PROXY_TITLE, proxy_port),
            ("READING1", reading1),
            ("READING2", reading2),
        )
    }
    async with AsyncExitStack() as stack:
        local, north, south = [Orthanc(title, known) for title in ("LOCALPACS", "NORTH", "SOUTH")]
        await asyncio.gather(
            *(stack.enter_async_context(orthanc) for orthanc in (local, north, south))
        )
        made = Region(
            local,
            north,
            south,
            proxy_port,
            reading1,
            reading2,
            at_local=study(2, 3, StudyDescription="local"),
            at_north=study(2, 10, rows=128, columns=128, StudyDescription="north"),
            compressed_at_north=study(
                1, 4, transfer_syntax_uid=JPEG2000Lossless, StudyDescription="compressed"
            ),
            at_south=study(1, 3, StudyDescription="south"),
            at_both=study(2, 2, StudyDescription="both"),
            local_too=study(1, 3, StudyDescription="local too"),
        )
        await asyncio.gather(
            _fill(local, made.at_local, made.local_too),
            _fill(north, made.at_north, made.compressed_at_north, made.at_both, made.local_too),
            _fill(south, made.at_south, made.at_both),
        )
        yield made


async def _fill(orthanc: Orthanc, *studies: Iterable[Dataset]) -> None:
    for one in studies:
        await orthanc.upload([part10(instance) for instance in one])


@pytest_asyncio.fixture
async def storescp(region: Region) -> AsyncIterator[StoreScp]:
    """READING1: it takes every SOP Class and syntax, and keeps the bytes."""
    made = StoreScp("READING1")
    made.port = region.reading1
    async with made:
        yield made


@pytest_asyncio.fixture
async def reading2(region: Region) -> AsyncIterator[Workstation]:
    """READING2: made of pynetdicom, at a port that the region knows."""
    made = Workstation("READING2", Node(PROXY_TITLE, "127.0.0.1", region.proxy_port))
    made.port = region.reading2
    async with made:
        yield made


@asynccontextmanager
async def proxies(directory: Path) -> AsyncIterator[MakeProxy]:
    """Start proxies; at the end each must stop with 0, and no log may name the patient."""
    made: list[Proxy] = []

    async def start_proxy(**keys: Any) -> Proxy:
        home = directory / f"proxy{len(made)}"
        home.mkdir()
        proxy = Proxy(home, configuration(home, **keys))
        made.append(proxy)
        await proxy.start()
        return proxy

    try:
        yield start_proxy
        for proxy in made:
            if proxy.running:
                assert await proxy.stop() == 0
    finally:
        for proxy in made:
            proxy.kill()
    for proxy in made:
        assert sentinels_in(proxy.log) == []
        lines = proxy.lines()  # each is JSON
        crashes = {"association_crashed", "task_crashed", "retrieve_failed"}
        assert [line for line in lines if line["event"] in crashes] == []


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[MakeProxy]:
    """As :func:`proxies`, for one test."""
    async with proxies(tmp_path) as start_proxy:
        yield start_proxy


@pytest_asyncio.fixture
async def proxy(region: Region, start: MakeProxy) -> Proxy:
    """The proxy in front of the region, with READING1 and READING2."""
    return await start_in_front(start, region)


async def start_in_front(start: MakeProxy, region: Region, **more: Mapping[str, Any]) -> Proxy:
    """Start the proxy in front of *region*; *more* as for ``configuration``."""
    return await start(
        pacs=region.local.node,
        sources=region.sources,
        workstations=[
            Node("READING1", "127.0.0.1", region.reading1),
            Node("READING2", "127.0.0.1", region.reading2),
        ],
        port=region.proxy_port,
        **more,
    )
