"""Starts the peers and the proxy, and knows how to hurt each.

The cache lies on a small tmpfs of its own where that may be mounted (as root),
so that a disk can be filled to its last byte; elsewhere it is merely small. What
is kept for good, the audit trail and the state, lies beside it: it would fill
that disk in an hour.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from soak.content import LOCAL, Plan
from soak.threaded import held
from tests.e2e.support import PROXY_TITLE, Proxy, configuration
from tests.peers.node import Node
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.peers.process import PeerProcess, find_program, listening
from tests.support.datasets import part10

MAX_CACHE_BYTES: Final = 40_000_000
_TMPFS_BYTES: Final = 56 * 1024 * 1024
_TITLES: Final = {LOCAL: "LOCALPACS", "orthanc": "ORTHANC", "threaded": "THREADED"}
_TREE: Final = Path(__file__).parents[1]


class Peer(Protocol):
    """An archive that can be hurt."""

    name: str

    async def start(self) -> None:
        """Start, on the same port each time, and wait until it listens."""
        ...

    async def kill(self) -> None:
        """End it in the middle of whatever is under way."""
        ...

    def pause(self) -> None:
        """Fall silent with every connection open (SIGSTOP)."""
        ...

    def resume(self) -> None: ...


class ProcessPeer:
    """An archive that is a module of this package."""

    def __init__(self, name: str, module: str, settings: dict[str, Any], directory: Path) -> None:
        self.name = name
        self.node = Node(settings["ae_title"], "127.0.0.1", settings["port"])
        self._command = [sys.executable, "-m", module, json.dumps(settings)]
        self._log = directory / f"{name}.log"
        self._process: PeerProcess | None = None

    async def start(self) -> None:
        process = self._process = PeerProcess(self._command, self._log, _TREE)
        ready = await asyncio.to_thread(process.wait_ready, lambda: listening(self.node.port), 30.0)
        if not ready:
            raise RuntimeError(f"{self.name} does not start: {self._log.read_text()[-1000:]}")

    async def kill(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.kill)

    def pause(self) -> None:
        if self._process is not None:
            self._process.pause()

    def resume(self) -> None:
        if self._process is not None:
            self._process.resume()


class OrthancPeer:
    """Orthanc, with its storage kept over its deaths."""

    name = "orthanc"

    def __init__(self, plan: Plan, destinations: dict[str, int], directory: Path) -> None:
        self._plan = plan
        self._filled = False
        known = {title.lower(): (title, "127.0.0.1", port) for title, port in destinations.items()}
        directory.mkdir()
        self._orthanc = Orthanc(_TITLES["orthanc"], known, directory=directory)

    @property
    def node(self) -> Node:
        return self._orthanc.node

    async def start(self) -> None:
        await self._orthanc.start()
        if not self._filled:
            instances = held(self._plan, self.name)
            await self._orthanc.upload([part10(instance) for instance in instances])
            self._filled = True

    async def kill(self) -> None:
        await asyncio.to_thread(self._orthanc.kill)
        # It is talkative, and hours are long.
        os.truncate(self._orthanc.directory / "orthanc.log", 0)

    def pause(self) -> None:
        self._orthanc.pause()

    def resume(self) -> None:
        self._orthanc.resume()


@dataclass
class Region:
    """What runs, and where the cache lies."""

    plan: Plan
    proxy: Proxy
    local: ProcessPeer
    sources: dict[str, ProcessPeer | OrthancPeer]
    workstations: dict[str, int]
    """Ports by AE title."""
    disk: Path | None
    """The file system of the cache, where it is one of its own."""
    everyone: list[ProcessPeer | OrthancPeer] = field(default_factory=list)


@asynccontextmanager
async def region(directory: Path, seed: int, workstations: int) -> AsyncIterator[Region]:
    """Start everything; at the end nothing of it is left."""
    names = ["north", "south", "east", "threaded"]
    if find_program("Orthanc"):
        names.append("orthanc")
    plan = Plan(seed, names)
    titles = {f"READING{number}": free_port() for number in range(1, workstations + 1)}
    proxy_port = free_port()
    with_disk = directory / "cache"
    with_disk.mkdir()
    mounted = _mount(with_disk)
    made: list[ProcessPeer | OrthancPeer] = []
    proxy: Proxy | None = None
    try:
        made.extend(
            _peer(name, plan, seed, names, titles, proxy_port, directory)
            for name in [LOCAL, *names]
        )
        async with asyncio.TaskGroup() as group:
            for peer in made:
                group.create_task(peer.start(), name=peer.name)
        local, sources = made[0], {peer.name: peer for peer in made[1:]}
        assert isinstance(local, ProcessPeer)
        settings = _settings(directory, proxy_port, local.node, sources, titles)
        proxy = Proxy(directory, settings)
        await proxy.start()
        yield Region(plan, proxy, local, sources, titles, with_disk if mounted else None, made)
    finally:
        if proxy is not None:
            proxy.kill()
        for peer in made:
            try:
                await peer.kill()
            except Exception as error:  # not started; what is left must end all the same
                print(f"{peer.name}: {type(error).__name__}", file=sys.stderr)
        if mounted:
            subprocess.run(["umount", "--lazy", str(with_disk)], check=False)


def _mount(directory: Path) -> bool:
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES},mode=0700", "soak"]
    done = subprocess.run([*command, str(directory)], check=False, capture_output=True)
    return done.returncode == 0


def _peer(
    name: str,
    plan: Plan,
    seed: int,
    names: Sequence[str],
    titles: dict[str, int],
    proxy_port: int,
    directory: Path,
) -> ProcessPeer | OrthancPeer:
    destinations = {PROXY_TITLE: proxy_port, **(titles if name == LOCAL else {})}
    if name == "orthanc":
        return OrthancPeer(plan, destinations, directory / "orthanc")
    settings = {
        "seed": seed,
        "sources": list(names),
        "holder": name,
        "ae_title": _TITLES.get(name, name.upper()),
        "port": free_port(),
        "destinations": destinations,
        # East is slow, and takes few at a time: the others are only limited by us.
        "delay_seconds": 0.01 if name == "east" else 0.0,
        "max_associations": 2 if name == "east" else 100,
    }
    module = "soak.threaded" if name == "threaded" else "soak.archive"
    return ProcessPeer(name, module, settings, directory)


def _settings(
    directory: Path,
    port: int,
    local: Node,
    sources: dict[str, ProcessPeer | OrthancPeer],
    titles: dict[str, int],
) -> dict[str, Any]:
    """Return a configuration in which everything that waits for failures is quick."""
    patience = {
        "connect_timeout": "1s",
        "first_instance_timeout": "8s",
        "stall_timeout": "5s",
    }
    made = configuration(
        directory,
        pacs=local,
        sources={name: peer.node for name, peer in sources.items()},
        port=port,
        workstations=[
            {
                "ae_title": title,
                "host": "127.0.0.1",
                "port": at,
                "query_budget": "4s",
            }
            for title, at in titles.items()
        ],
        proxy={"pending_interval": "1s", "shutdown_grace": "10s"},
        local={"query_timeout": "3s", **patience},
        state={"directory": str(directory / "state")},
        cache={"max_size": f"{MAX_CACHE_BYTES}B", "memory_spool": "16MB"},
        retrieve={"retry_pause": "3s", "destination_retry": "5s"},
    )
    for source in made["sources"]:
        source.update(
            patience,
            query_timeout="2s",
            breaker={"pause": "3s"},
            retrieve="c-get" if source["name"] == "south" else "c-move",
        )
    return made
