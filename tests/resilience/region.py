"""A whole region in one process: scripted archives, accounting workstations, the proxy itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import yaml
from pydicom import Dataset

from dicomproxy.app import Application
from dicomproxy.config import load
from dicomproxy.dimse.pool import AssociationPool
from tests.e2e.support import PROXY_TITLE, configuration
from tests.resilience.archive import Archive
from tests.resilience.reading import Answer, Reading
from tests.support.stand_in import SECONDS

NORTH, SOUTH = "north", "south"


@dataclass(frozen=True, slots=True)
class Region:
    """The proxy, running, and everybody around it."""

    application: Application
    local: Archive
    archives: Sequence[Archive]
    readings: Sequence[Reading]

    @property
    def north(self) -> Archive:
        return self.archives[0]

    @property
    def south(self) -> Archive:
        return self.archives[1]

    @property
    def reading(self) -> Reading:
        return self.readings[0]


def written(directory: Path, content: dict[str, Any]) -> Path:
    path = directory / "dicomproxy.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@asynccontextmanager
async def peers(
    directory: Path,
    archives: Sequence[Archive],
    readings: Sequence[Reading],
    *,
    distant: int = 0,
    **more: Any,
) -> AsyncIterator[tuple[Archive, dict[str, Any]]]:
    """Start everybody but the proxy; the local PACS, which holds nothing, and a configuration.

    Args:
        distant: the port at which the proxy is to look for the first archive, if not its own.
        more: keys by section or source.
    """
    local = Archive("LOCALPACS")
    async with AsyncExitStack() as stack:
        for peer in (local, *archives, *readings):
            await peer.start()
            stack.push_async_callback(peer.stop)
        places = [archive.port for archive in archives]
        if distant:
            places[0] = distant
        content = configuration(
            directory,
            pacs=("LOCALPACS", "127.0.0.1", local.port),
            sources={
                name: (archive.title, "127.0.0.1", place)
                for name, archive, place in zip((NORTH, SOUTH), archives, places, strict=False)
            },
            workstations=[
                {"ae_title": one.title, "host": "127.0.0.1", "port": one.port} for one in readings
            ],
            **more,
        )
        for archive in archives:
            archive.destinations.setdefault(PROXY_TITLE, content["proxy"]["port"])
        for reading in readings:
            reading.proxy_port = content["proxy"]["port"]
        yield local, content


@asynccontextmanager
async def region(
    directory: Path,
    *archives: Archive,
    readings: Iterable[Reading] = (),
    **more: Any,
) -> AsyncIterator[Region]:
    """Run the proxy before *archives*; afterwards nothing of it is left over.

    All are near, however long a busy machine takes for an answer, unless the
    first is to be *distant*.

    Args:
        readings: the workstations; one, if none is given.
        more: as for :func:`peers`.
    """
    stations = list(readings) or [Reading("READING1")]
    near: AbstractContextManager[object] = nullcontext() if more.get("distant") else _all_near()
    async with peers(directory, archives, stations, **more) as (local, content):
        settings = await asyncio.to_thread(load, written(directory, content))
        application = Application(settings)
        async with asyncio.timeout(SECONDS):
            await application.start()
        try:
            with near:
                yield Region(application, local, archives, stations)
                async with asyncio.timeout(SECONDS):
                    await application.operations.wait_idle()
            assert len(application.flights) == 0
        finally:
            async with asyncio.timeout(SECONDS):
                await application.close()
        assert application.layer.associations == set()
        assert application.layer.receive_pool.lent == 0
        assert application.layer.send_pool.lent == 0


def _all_near() -> AbstractContextManager[object]:
    return patch.object(AssociationPool, "round_trip_seconds", PropertyMock(return_value=0.0005))


def uid_of(instances: Sequence[Dataset]) -> str:
    return str(instances[0].StudyInstanceUID)


def uids(instances: Iterable[Dataset]) -> set[str]:
    return {str(one.SOPInstanceUID) for one in instances}


def assert_true(answer: Answer, reading: Reading, expected: Collection[str]) -> None:
    """What *reading* was told of a retrieve of *expected* is what happened, to the instance."""
    arrived = set(reading.arrived)
    assert arrived <= set(expected)
    assert answer.completed == len(arrived)
    assert answer.failed == len(expected) - len(arrived)
    assert answer.warning == 0
    assert sorted(answer.listed) == sorted(set(expected) - arrived)
    short = 0xB000 if arrived else 0xA702
    assert answer.status == (short if answer.failed else 0x0000)
    assert all(times == 1 for times in reading.times.values())
    assert all(done <= len(arrived) for _, done, _ in answer.pending)


def assert_whole(answer: Answer, reading: Reading, *archives: Archive) -> None:
    """Success, and all that *archives* hold has arrived once, byte for byte."""
    held = {uid: one.data for archive in archives for uid, one in archive.held.items()}
    assert (answer.status, answer.completed, answer.failed) == (0x0000, len(held), 0)
    assert reading.arrived == held
    assert all(times == 1 for times in reading.times.values())
