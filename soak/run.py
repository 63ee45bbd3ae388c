"""The order of a soak: storm, calm, rest, end.

In the storm everything is hurt while everybody works. In the calm that follows
nothing is, and everything must work: every patient's studies are found, every
study opens whole. Then the peers go, and nothing may be left of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dicomproxy.dimse.layer import Timers, UpperLayer
from soak.content import Plan, Study
from soak.faults import Faults
from soak.reading import work
from soak.region import Region, region
from soak.report import Report
from soak.watch import Watch
from soak.workstation import Broken, Workstation

_RECOVERY_SECONDS: Final = 10.0
"""Longer than a breaker's pause, a study's pause after it failed, and a lowered ceiling's probe."""
_REST_SECONDS: Final = 45.0
_AT_ONCE: Final = 4  # of the calm: more studies than that do not fit into the cache together
_PROGRESS_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """What may be chosen; *seconds* is how long the storm lasts."""

    seconds: float = 180.0
    seed: int = 1
    workstations: int = 8
    directory: Path | None = None
    """Where the proxy's log and configuration stay; default a temporary one."""


async def soak(options: Options) -> Report:
    """Run it; the report says what was found."""
    report = Report()
    began = time.monotonic()
    async with _directory(options) as directory:
        async with region(directory, options.seed, options.workstations) as made:
            await _soak(made, options, report)
        report.figures["took"] = f"{time.monotonic() - began:.0f} s"
    return report


@contextlib.asynccontextmanager
async def _directory(options: Options) -> AsyncIterator[Path]:
    if options.directory is not None:
        options.directory.mkdir(parents=True)
        yield options.directory
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        yield Path(name)


async def _soak(made: Region, options: Options, report: Report) -> None:
    # More patient than the proxy, whose deadlines are what is looked at.
    layer = UpperLayer(Timers(response=120, idle=120, stall=120))
    workstations = [
        Workstation(title, port, made.proxy.port, made.plan, report, layer)
        for title, port in made.workstations.items()
    ]
    for workstation in workstations:
        await workstation.start()
    watch = Watch(made.proxy, report)
    await watch.baseline()
    report.figures["cache"] = "on a tmpfs of its own" if made.disk else "in a directory"
    report.figures["sources"] = ", ".join(sorted(made.sources))
    loop = asyncio.get_running_loop()
    watching = loop.create_task(watch.run(), name="watch")
    progress = loop.create_task(_progress(report), name="progress")
    try:
        until = loop.time() + options.seconds
        async with asyncio.TaskGroup() as group:
            for number, workstation in enumerate(workstations):
                chance = random.Random(f"{options.seed} {number}")
                group.create_task(work(workstation, made.plan, chance, until), name="work")
            faults = Faults(made, workstations, report, options.seed)
            group.create_task(faults.run(until), name="faults")
        if made.proxy.running:
            await asyncio.sleep(_RECOVERY_SECONDS)
            began = loop.time()
            await _calm(made.plan, workstations, report, random.Random(options.seed))
            report.figures["every study found and opened in"] = f"{loop.time() - began:.1f} s"
    finally:
        progress.cancel()
        watching.cancel()
        await asyncio.gather(watching, progress, return_exceptions=True)
    await _end(made, workstations, watch, report)
    await layer.close(5)


async def _progress(report: Report) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        print(
            f"{time.monotonic() - began:.0f} s: {sum(report.operations.values()):,} operations, "
            f"{report.instances:,} instances, {sum(report.faults.values()):,} faults, "
            f"{len(report.violations)} kinds of violation",
            file=sys.stderr,
            flush=True,
        )


# ------------------------------------------------------------------------- calm


async def _calm(
    plan: Plan, workstations: list[Workstation], report: Report, chance: random.Random
) -> None:
    """Find every patient's studies, and open each."""
    turn = asyncio.Semaphore(_AT_ONCE)

    async def find(patient: str, workstation: Workstation) -> None:
        async with turn:
            studies = plan.patients[patient]
            found = await workstation.query("STUDY", studies[0])
            missing = [study for study in studies if study.uid not in found]
            for study in missing:
                report.violation(f"calm: a study of {study.holders} was not found")

    async def retrieve(study: Study, workstation: Workstation) -> None:
        async with turn:
            answer = await workstation.open(study)
            if answer is None or answer.status != 0x0000:
                status = "none" if answer is None else f"{answer.status:04X}"
                report.violation(f"calm: a study of {study.holders} ended with {status}")

    try:
        async with asyncio.TaskGroup() as group:
            for patient in plan.patients:
                group.create_task(find(patient, chance.choice(workstations)), name="find")
        async with asyncio.TaskGroup() as group:
            for study in plan.studies:
                group.create_task(retrieve(study, chance.choice(workstations)), name="open")
    except* Broken:
        pass  # it is in the report


# -------------------------------------------------------------------------- end


async def _end(made: Region, workstations: list[Workstation], watch: Watch, report: Report) -> None:
    for workstation in workstations:
        await workstation.leave()
    for peer in made.everyone:
        await peer.kill()
    proxy = made.proxy
    if not proxy.running:
        report.violation(f"the proxy ended by itself, exit {await proxy.ended()}")
        watch.read_log()
        return
    await watch.judge_at_rest(_REST_SECONDS)
    try:
        code = await proxy.stop()
    except TimeoutError:
        code = None
    except Exception as error:  # a deadline of the process's own kind
        report.violation(f"SIGTERM: {type(error).__name__}")
        code = None
    report.figures["exit after SIGTERM"] = str(code)
    if code != 0:
        report.violation(f"exit {code} after SIGTERM")
    watch.read_log()
