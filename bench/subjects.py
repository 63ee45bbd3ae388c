"""What is measured, the proxy, and what it is measured beside, Orthanc: each a process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from bench.data import Study
from bench.table import Row
from dicomproxy.cache.requests import ask_to_evict
from tests.e2e.support import Proxy
from tests.peers.orthanc import Orthanc
from tests.peers.ports import free_port
from tests.peers.process import PeerFailed, PeerProcess, find_program

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_EVICT_SECONDS: Final = 15.0


class MissingPeer(RuntimeError):
    """A program that a row needs is not installed."""


class WrongOutcome(RuntimeError):
    """A transfer did not do what was asked, so its time says nothing."""


class BenchOrthanc(Orthanc):
    """Orthanc as it is shipped: not verbose, and with threads for everybody who calls."""

    def __init__(
        self, ae_title: str, port: int, modalities: dict[str, tuple[str, str, int]], directory: Path
    ) -> None:
        if find_program("Orthanc") is None:
            raise MissingPeer("Orthanc is not installed")
        directory.mkdir(parents=True)
        # By default four associations are served at a time, and others wait.
        super().__init__(
            ae_title, modalities, directory=directory, settings={"DicomThreadsCount": 50}
        )
        self.port, self.http_port = port, free_port()

    def _start(self) -> None:
        self._process = PeerProcess(
            [self._program, str(self._write_configuration())],
            self.directory / "orthanc.log",
            self.directory,
        )
        if not self._process.wait_ready(self._ready):
            raise PeerFailed(f"Orthanc does not start, see {self._process.log.name}")

    async def __aexit__(self, *_: object) -> None:
        if self._process:
            await asyncio.to_thread(self._process.kill)  # an orderly end takes seconds


class BenchProxy(Proxy):
    """The proxy under measurement."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        directory.mkdir(parents=True)
        super().__init__(directory, settings)
        self.fetched_studies: set[str] = set()

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used so far, all threads."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        fields = text[text.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    async def evict(self, *studies: Study) -> None:
        """Have it forget studies; those it was never asked for cost no time.

        Raises:
            WrongOutcome: it does not.
        """
        async with asyncio.TaskGroup() as group:
            for study in studies:
                uid = study.study_instance_uid
                if uid in self.fetched_studies:
                    group.create_task(self._evict(uid), name="evict")

    async def _evict(self, study_instance_uid: str) -> None:
        requests = self.cache_directory / "requests"
        for _ in range(50):
            said = await asyncio.to_thread(
                ask_to_evict, requests, study_instance_uid, _EVICT_SECONDS
            )
            if said in ("evicted", "not_held"):
                return
            if said != "in_use":
                break
            await asyncio.sleep(0.1)  # a delivery is just ending
        raise WrongOutcome(f"evicting a study: {said}")


@asynccontextmanager
async def measured(proxy: BenchProxy, row: Row) -> AsyncIterator[None]:
    """Add to *row* the processor time that the proxy uses meanwhile, and its peak memory."""
    before = proxy.cpu_seconds()
    yield
    row.cpu_seconds.append(round(proxy.cpu_seconds() - before, 3))
    row.peak_bytes = max(row.peak_bytes, proxy.peak_bytes())
