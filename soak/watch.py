"""The proxy seen from outside: memory, descriptors, metrics, its log, what it leaves on disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from soak.content import PATIENT_MARK
from soak.region import MAX_CACHE_BYTES
from soak.report import Report
from tests.e2e.support import Proxy

_FORBIDDEN: Final = frozenset(
    {
        "association_crashed",
        "flight_failed",
        "foreign_log",
        "foreign_warning",
        "query_failed",
        "retrieve_failed",
        "start_failed",
        "task_crashed",
        "unhandled_error",
        "unnamed_event",
    }
)
_LEAST_SAMPLES: Final = 60
"""Memory is judged only by a run that is long enough to have a level.

In its first two or three minutes a proxy grows by some 10 MB: blocks for data in
flight are made when first needed, and the allocator keeps what it was given. A
short run shows that as a slope; over minutes that follow there is none, and the
number of objects stays what it was.
"""
_GROWTH_BYTES: Final = 16_000_000
_PEAK_BYTES: Final = 200_000_000
_IN_FLIGHT_BYTES: Final = 16_000_000
_SAMPLE: Final = re.compile(r"([a-z_]+)(?:\{[^}]*\})? ([0-9.e+-]+)")
_MOST_SAMPLES: Final = 20_000


class Watch:
    """Samples a running proxy once a second, and judges it at the end."""

    def __init__(self, proxy: Proxy, report: Report) -> None:
        self._proxy = proxy
        self._report = report
        self._resident: list[int] = []
        self._descriptors: list[int] = []
        self._log_offset = 0
        self._sockets = 0
        self._tasks = self._last_tasks = 0.0

    # ------------------------------------------------------------------- during

    async def baseline(self) -> None:
        """Note what is open before anybody has come."""
        self._tasks = (await self.metrics()).get("dicomproxy_tasks", 0)
        names = self._open_files()
        self._descriptors.append(len(names))
        self._sockets = sum(name.startswith("socket:") for name in names)
        self._resident.append(self._resident_bytes())

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(1)
            if not self._proxy.running:
                self._report.violation("the proxy has ended by itself")
                return
            self.read_log()
            if len(self._resident) < _MOST_SAMPLES:
                self._resident.append(self._resident_bytes())
            metrics = await self.metrics()
            if not metrics:
                self._report.violation("the metrics page did not answer")
            if metrics.get("dicomproxy_cache_bytes", 0) > MAX_CACHE_BYTES + _IN_FLIGHT_BYTES:
                self._report.violation("the cache is larger than its limit and what is in flight")

    async def metrics(self) -> dict[str, float]:
        """Return the sum of each metric over its labels; nothing where it does not answer."""
        status, page = await asyncio.to_thread(self._proxy.http, "/metrics")
        found: dict[str, float] = {}
        for line in page.splitlines() if status == 200 else ():
            if match := _SAMPLE.fullmatch(line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def read_log(self) -> None:
        """Count what was logged since the last call, and look for what must not be."""
        with self._proxy.log_path.open("rb") as log:
            log.seek(self._log_offset)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._log_offset += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                event, level = entry["event"], entry["level"]
            except (ValueError, KeyError, TypeError):
                self._report.violation("a line of the log is no JSON object")
                continue
            if level not in ("info", "debug"):
                self._report.events[event] += 1
            if event in _FORBIDDEN:
                facts = {
                    key: entry[key]
                    for key in ("error_type", "errno", "task", "stack", "reason")
                    if key in entry
                }
                self._report.violation(f"logged: {event} {json.dumps(facts)}")
            if PATIENT_MARK.encode("ascii") in line:
                self._report.violation(f"a patient value in the log, event {event}")

    def _resident_bytes(self) -> int:
        process = self._proxy.process
        if process is None:
            return 0
        pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _open_files(self) -> list[str]:
        process = self._proxy.process
        if process is None:
            return []
        names = []
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                names.append(os.readlink(descriptor))
            except FileNotFoundError:
                continue  # closed meanwhile
        return names

    # ------------------------------------------------------------------- at rest

    async def judge_at_rest(self, seconds: float) -> None:
        """Look for what is left once every peer has gone; wait *seconds* for it to go."""
        began = asyncio.get_running_loop().time()
        deadline = began + seconds
        while left := await self._left():
            if asyncio.get_running_loop().time() > deadline:
                for text in left:
                    self._report.violation(f"left at the end: {text}")
                break
            await asyncio.sleep(0.2)
        took = asyncio.get_running_loop().time() - began
        self._report.figures["at rest after"] = f"{took:.1f} s"
        self._descriptors.append(len(self._open_files()))
        self._judge_memory()

    async def _left(self) -> list[str]:
        metrics = await self.metrics()
        if not metrics:
            return ["a proxy that does not answer"]
        left = [
            f"{name} {metrics.get(name, 0):g}"
            for name in (
                "dicomproxy_associations_open",
                "dicomproxy_flights",
                "dicomproxy_operations_running",
                "dicomproxy_cache_spooled_bytes",
                "dicomproxy_source_associations_in_use",
            )
            if metrics.get(name, 0)
        ]
        self._last_tasks = metrics.get("dicomproxy_tasks", 0)
        if self._last_tasks > self._tasks:
            left.append(f"{self._last_tasks - self._tasks:g} tasks")
        names = self._open_files()
        sockets = sum(name.startswith("socket:") for name in names)
        if sockets > self._sockets:
            left.append(f"{sockets - self._sockets} sockets")
        if len(names) > self._descriptors[0] + 4:
            left.append(f"{len(names) - self._descriptors[0]} descriptors")
        left.extend(
            f"an open file of {where}/"
            for name in names
            for where in ("incoming", "studies", "trash")
            if f"/cache/{where}/" in name
        )
        for where in ("incoming", "trash"):
            directory = self._proxy.cache_directory / where
            if directory.is_dir() and (count := sum(1 for _ in directory.iterdir())):
                left.append(f"{count} files in {where}/")
        return left

    def _judge_memory(self) -> None:
        resident = self._resident
        peak = self._proxy.peak_bytes()
        grown, slope = growth(resident)
        figures = self._report.figures
        figures["resident memory first / last / peak"] = " / ".join(
            f"{value / 1e6:.0f} MB" for value in (resident[0], resident[-1], peak)
        )
        if len(resident) >= _LEAST_SAMPLES:
            figures["resident memory, slope of the second half"] = f"{slope * 60 / 1e6:+.2f} MB/min"
        figures["tasks first / last"] = f"{self._tasks:g} / {self._last_tasks:g}"
        figures["descriptors first / last"] = f"{self._descriptors[0]} / {self._descriptors[-1]}"
        if peak > _PEAK_BYTES:
            self._report.violation(f"memory peak {peak / 1e6:.0f} MB")
        if len(resident) >= _LEAST_SAMPLES and grown > _GROWTH_BYTES:
            self._report.violation(f"memory grows, {slope * 60 / 1e6:+.2f} MB/min")


def growth(samples: Sequence[float]) -> tuple[float, float]:
    """Return by how much the second half of *samples* grew, and the slope of its line.

    By the medians of its quarters: a peak is none, a level that rises is one.
    The slope is per sample, by least squares.
    """
    half = samples[len(samples) // 2 :]
    if len(half) < 4:
        return 0.0, 0.0
    middle = len(half) // 2
    grown = statistics.median(half[middle:]) - statistics.median(half[:middle])
    slope, _ = statistics.linear_regression(range(len(half)), half)
    return grown, slope
