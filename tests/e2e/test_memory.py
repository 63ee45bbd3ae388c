"""Memory is a function of the configuration: gigabytes pass through, and little is held."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeProxy
from tests.e2e.generator import Settings
from tests.e2e.scene import generator
from tests.e2e.support import a_study
from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.process import PeerProcess

MEGABYTE = 1_000_000
LIMIT_BYTES = 150 * MEGABYTE
FULL_SIZE = os.environ.get("DICOMPROXY_FULL_SIZE") == "1"
TOTAL_BYTES = 2000 * MEGABYTE if FULL_SIZE else 300 * MEGABYTE
SMALL_BYTES = 512 * 1024


def tally(process: PeerProcess) -> dict[str, Any]:
    """Return what the workstation has received since it started; its log has other lines too."""
    lines = process.log.read_text().splitlines()
    tallies = [line for line in lines if line.startswith('{"instances"')]
    return dict(json.loads(tallies[-1])) if tallies else {"instances": 0, "faulty": 0}


def has_received(process: PeerProcess, instances: int) -> bool:
    return bool(tally(process)["instances"] == instances)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("instances", "pixel_bytes"),
    [(1, TOTAL_BYTES), (TOTAL_BYTES // SMALL_BYTES, SMALL_BYTES)],
    ids=["one multi-frame object", "many small instances"],
)
async def test_memory_does_not_grow_with_what_is_moved(
    start: MakeProxy, tmp_path: Path, instances: int, pixel_bytes: int
) -> None:
    """Fetched and delivered whole and unchanged, and again from the cache, within 150 MB."""
    settings = Settings(free_port(), free_port(), free_port(), free_port(), instances, pixel_bytes)
    async with generator(settings, tmp_path) as peers:
        proxy = await start(
            pacs=Node("LOCALPACS", "127.0.0.1", settings.local_port),
            sources={"north": Node("NORTH", "127.0.0.1", settings.archive_port)},
            workstations=[Node("READING1", "127.0.0.1", settings.workstation_port)],
            port=settings.proxy_port,
        )
        for run in (1, 2):
            result = await proxy.movescu(a_study(settings.study_instance_uid), seconds=400)

            final = result.final
            assert (final.status, final.completed, final.failed) == (0x0000, instances, 0)
            # The last association may end a moment after the last response.
            expected = run * instances
            await proxy.until(partial(has_received, peers, expected), "received")
            assert tally(peers)["faulty"] == 0
            assert await proxy.fetched() == instances
            assert proxy.peak_bytes() <= LIMIT_BYTES
        print(f"peak {proxy.peak_bytes() / MEGABYTE:.0f} MB")
