"""The proxy killed while it fetches: its cache opens, is whole, and only what is missing travels.

``DICOMPROXY_FULL_SIZE=1`` kills it fifty times instead of eight.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from dicomproxy.dimse.errors import AssociationError
from tests.e2e.support import Proxy
from tests.resilience.archive import Archive
from tests.resilience.reading import Reading
from tests.resilience.region import peers, uid_of, uids
from tests.support.datasets import study
from tests.support.stand_in import SECONDS

ROUNDS = 50 if os.environ.get("DICOMPROXY_FULL_SIZE") == "1" else 8
_INSTANCES = 12
_STEPS = 3 * _INSTANCES
"""Each instance is sent in two blocks or more: before it, between them, and after it."""


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * ROUNDS)
async def test_killed_while_it_fetches(tmp_path: Path) -> None:
    """After each kill the study is completed, and nothing stored before is fetched again."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    studies = [study(2, _INSTANCES // 2, rows=700, columns=512) for _ in range(ROUNDS)]
    north, reading = Archive("NORTH"), Reading("READING1")
    keys = {
        "retrieve": {"retry_pause": "0s"},
        # One list at a time, however far the archive may seem to be.
        "north": {"parallel_associations": 2},
    }
    async with peers(tmp_path, [north], [reading], **keys) as (_, content):
        proxy, interrupted = Proxy(tmp_path, content), 0
        try:
            await proxy.start()
            for number, held in enumerate(studies):
                # A step at which it may have begun anything, and then any moment within it.
                step, moment = chance.randrange(_STEPS), chance.choice((0, chance.random() / 200))
                told = f"seed {seed}, round {number}, step {step}, {moment:.4f} s into it"
                north.held = Archive("NORTH", held).held
                await _killed_at(proxy, north, reading, uid_of(held), step, moment)
                stored = list(north.acknowledged)
                interrupted += len(stored) < _INSTANCES
                for peer in (north.sent, north.acknowledged, reading.arrived, reading.times):
                    peer.clear()

                await proxy.start()
                answer = await reading.move(uid_of(held))

                assert (answer.status, answer.completed) == (0x0000, _INSTANCES), told
                assert reading.arrived == {uid: one.data for uid, one in north.held.items()}, told
                assert set(reading.times.values()) == {1}, told
                # Whether the last one on its way had been stored only the proxy knew.
                missing = uids(held) - set(stored)
                assert set(north.sent) <= missing, told
                assert len(missing) - 1 <= len(north.sent), told
                assert set(north.sent.values()) <= {1}, told
                for peer in (north.sent, north.acknowledged, reading.arrived, reading.times):
                    peer.clear()
            assert interrupted > ROUNDS // 2, f"seed {seed}"
            assert await proxy.stop() == 0
            assert "cache_degraded" not in proxy.events()
            assert (await proxy.command("cache", "verify", "--config", str(proxy.config)))[0] == 0
        finally:
            proxy.kill()


async def _killed_at(
    proxy: Proxy, north: Archive, reading: Reading, study_uid: str, step: int, moment: float
) -> None:
    """Have the study fetched, and kill the proxy at one step of it."""
    reached, steps = asyncio.Event(), 0

    async def script(phase: str) -> None:
        nonlocal steps
        if phase in ("store", "middle", "stored"):
            steps += 1
            if steps > step:
                reached.set()

    async def killer() -> None:
        async with asyncio.timeout(SECONDS):
            await reached.wait()
        if moment:
            await asyncio.sleep(moment)
        proxy.kill()

    north.at = script
    async with asyncio.TaskGroup() as group:
        group.create_task(killer())
        try:
            await reading.move(study_uid)
        except AssociationError:
            pass  # else it was over before the kill
    north.at = _as_usual
    # Peers notice one after the other; what they were doing is over by then.
    async with asyncio.timeout(SECONDS):
        while north.open or north.moving or reading.open:  # noqa: ASYNC110  (they have no event)
            await asyncio.sleep(0.005)


async def _as_usual(_phase: str) -> None:
    return
