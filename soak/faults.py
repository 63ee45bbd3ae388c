"""What is done to the region: every loop hurts one thing, waits, and makes it whole again.

Everything is in order again when :meth:`Faults.run` returns, however it ends.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from soak.region import OrthancPeer, ProcessPeer, Region
from soak.report import Report
from soak.workstation import Workstation

_CHUNK_BYTES: Final = 256 * 1024
_FILLER: Final = "filler"
_HELLO: Final = (
    b"",  # says nothing, and goes
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x01\x00\x00\x00\x00\xc8" + bytes(40),  # the beginning of an A-ASSOCIATE-RQ
    b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x03",  # P-DATA-TF before anything else
    b"\x01\x00\xff\xff\xff\xff",  # a request of 4 GiB
)


class Faults:
    """Hurts *region* and *workstations* until told to stop; pauses come from *seed*."""

    def __init__(
        self, region: Region, workstations: Sequence[Workstation], report: Report, seed: int
    ) -> None:
        self._region = region
        self._workstations = workstations
        self._report = report
        self._seed = seed
        self._hurt: set[str] = set()

    async def run(self, until: float) -> None:
        """Go on until the loop's clock says *until*, then wait until all is whole."""
        async with asyncio.TaskGroup() as group:
            for number, (fault, gap_seconds) in enumerate(self._loops()):
                chance = random.Random(self._seed * 100 + number)
                group.create_task(self._repeat(fault, gap_seconds, chance, until), name="fault")

    def _loops(self) -> list[tuple[Callable[[random.Random], Awaitable[None]], float]]:
        loops: list[tuple[Callable[[random.Random], Awaitable[None]], float]] = [
            (self._source, 3.0),
            (self._source, 5.0),  # at times two at once
            (self._local, 12.0),
            (self._workstation, 2.0),
            (self._stranger, 2.0),
            (self._reload, 20.0),
        ]
        if self._region.disk is not None:
            loops.append((self._disk, 8.0))
        return loops

    async def _repeat(
        self,
        fault: Callable[[random.Random], Awaitable[None]],
        gap_seconds: float,
        chance: random.Random,
        until: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(chance.uniform(0.3, 1.7) * gap_seconds)
            if loop.time() > until:
                return
            await fault(chance)

    # ----------------------------------------------------------------- archives

    async def _source(self, chance: random.Random) -> None:
        name = chance.choice(sorted(self._region.sources))
        await self._archive(self._region.sources[name], chance, 8.0)

    async def _local(self, chance: random.Random) -> None:
        await self._archive(self._region.local, chance, 4.0)

    async def _archive(
        self, peer: ProcessPeer | OrthancPeer, chance: random.Random, longest_seconds: float
    ) -> None:
        if peer.name in self._hurt:
            return
        self._hurt.add(peer.name)
        kind = "local PACS" if peer is self._region.local else "source"
        seconds = chance.uniform(0.5, longest_seconds)
        try:
            if chance.random() < 0.5:
                self._report.faults[f"{kind} killed"] += 1
                await peer.kill()
                try:
                    await asyncio.sleep(seconds)
                finally:
                    await peer.start()
            else:
                self._report.faults[f"{kind} stalled"] += 1
                peer.pause()
                try:
                    await asyncio.sleep(seconds)
                finally:
                    peer.resume()
        finally:
            self._hurt.discard(peer.name)

    # ------------------------------------------------------------- workstations

    async def _workstation(self, chance: random.Random) -> None:
        one = chance.choice(self._workstations)
        if one.disturbances % 2:
            return
        one.disturbances += 1
        seconds = chance.uniform(0.2, 4.0)
        try:
            match chance.randrange(4):
                case 0:
                    self._report.faults["workstation gone"] += 1
                    await one.leave()
                    try:
                        await asyncio.sleep(seconds)
                    finally:
                        await one.start()
                case 1:
                    self._report.faults["workstation stops reading"] += 1
                    resume = one.pause()
                    try:
                        await asyncio.sleep(seconds)
                    finally:
                        resume()
                case 2:
                    self._report.faults["workstation rejects"] += 1
                    one.rejecting = True
                    try:
                        await asyncio.sleep(seconds)
                    finally:
                        one.rejecting = False
                case _:
                    self._report.faults["workstation aborts deliveries"] += 1
                    one.abort_receiving()
        finally:
            one.disturbances += 1

    # ---------------------------------------------------------------- the proxy

    async def _stranger(self, chance: random.Random) -> None:
        """Connect as nobody should."""
        self._report.faults["stranger"] += 1
        try:
            async with asyncio.timeout(10):
                _, writer = await asyncio.open_connection("127.0.0.1", self._region.proxy.port)
                writer.write(chance.choice(_HELLO))
                await writer.drain()
                await asyncio.sleep(chance.uniform(0.0, 1.0))
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # it may well be shown the door

    async def _reload(self, chance: random.Random) -> None:
        self._report.faults["configuration reloaded"] += 1
        self._region.proxy.signal(signal.SIGHUP)

    async def _disk(self, chance: random.Random) -> None:
        """Fill the cache's file system to its last byte for a while."""
        if self._region.disk is None:
            return
        self._report.faults["disk filled"] += 1
        filler = self._region.disk / _FILLER
        until = asyncio.get_running_loop().time() + chance.uniform(1.0, 5.0)
        try:
            while asyncio.get_running_loop().time() < until:
                # What is evicted meanwhile is taken too.
                await asyncio.to_thread(fill, filler)
                await asyncio.sleep(0.1)
        finally:
            filler.unlink(missing_ok=True)


def fill(path: Path) -> None:
    """Append to *path* until its file system has no byte left.

    Raises:
        OSError: anything but a full file system.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = _CHUNK_BYTES
        while size:
            try:
                if os.write(descriptor, bytes(size)) == size:
                    continue
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            size //= 4
    finally:
        os.close(descriptor)
