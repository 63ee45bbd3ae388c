"""Runs the benchmark: ``python -m bench [--quick | --full] [--only NAME ...]``.

The table goes to standard output when all is done, every figure of every round
to ``bench/results.json``, progress to standard error. Exit status 1 says that a
row could not be measured; an aim that is missed is a result like any other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench import bounds, coercing, querying, receiving, retrieving
from bench.stage import Stage, sizes
from bench.subjects import MissingPeer
from bench.table import Failure, Row, render
from dicomproxy import __version__

_PREFIX: Final = "dicomproxy-bench-"
_ROOM_BYTES: Final = 8_000_000_000
RESULTS: Final = Path(__file__).parent / "results.json"
ROWS: Final[dict[str, Callable[[Stage], Awaitable[list[Row]]]]] = {
    "receive-mr": receiving.receive_mr,
    "receive-ct": receiving.receive_ct,
    "send-fast": receiving.send_fast,
    "send-ordinary": receiving.send_ordinary,
    "cold-near": retrieving.cold_near,
    "other-proxy": retrieving.other_proxy,
    "cold-capped": retrieving.cold_capped,
    "cold-coerced": retrieving.cold_coerced,
    "far-ct": retrieving.far_ct,
    "far-mr": retrieving.far_mr,
    "warm": retrieving.warm,
    "find": querying.find,
    "find-silent": querying.find_silent,
    "coerce": coercing.coerce,
    "memory": bounds.memory,
    "crowd-near": retrieving.crowd_near,
    "crowd-far": retrieving.crowd_far,
}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the proxy.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one round, little data: a smoke test")
    size.add_argument("--full", action="store_true", help="2 GB in the memory rows, not 300 MB")
    parser.add_argument(
        "--only", action="append", choices=ROWS, metavar="NAME", help=f"of: {', '.join(ROWS)}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures go")
    parser.add_argument(
        "--directory", type=Path, default=_usual_directory(), help="where data and caches are kept"
    )
    return parser.parse_args(arguments)


def _usual_directory() -> Path:
    """Return a place in memory where there is room, so that it is not the disk that is measured.

    ext4 looks at every inode of a group that was deleted lately before it takes a
    free one: where many files come and go, as here, creating one takes up to a
    hundred times longer, by turns for us and for the baseline.
    """
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= _ROOM_BYTES:
        return memory
    return Path(tempfile.gettempdir())


def creation_seconds(directory: Path, count: int = 200) -> float:
    """Return how long creating a file takes there; whoever receives pays it for each instance."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as name:
        began = time.monotonic()
        for number in range(count):
            (Path(name) / str(number)).touch(exist_ok=False)
        return (time.monotonic() - began) / count


def _machine(directory: Path) -> dict[str, Any]:
    return {
        "create_file_seconds": creation_seconds(directory),
        "load": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "dicomproxy": __version__,
    }


async def run(options: argparse.Namespace) -> tuple[list[Row], list[Failure]]:
    """Measure the rows that were asked for, one after the other."""
    rows: list[Row] = []
    failures: list[Failure] = []
    what = sizes(quick=options.quick, full=options.full)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=options.directory) as memory,
        tempfile.TemporaryDirectory(prefix=_PREFIX) as disk,
    ):
        async with Stage(Path(memory), Path(disk), what) as stage:
            for row, measure in ROWS.items():
                if options.only and row not in options.only:
                    continue
                began = time.monotonic()
                try:
                    rows.extend(await measure(stage))
                    said = "done"
                except MissingPeer as error:
                    failures.append(Failure(row, str(error), skipped=True))
                    said = "skipped"
                except Exception as error:
                    failures.append(Failure(row, _reason(error)))
                    said = "FAILED"
                print(f"{row}: {said}, {time.monotonic() - began:.1f} s", file=sys.stderr)
    return rows, failures


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; return the exit status."""
    options = _options(arguments)
    started = datetime.now(UTC)
    machine = _machine(options.directory)
    rows, failures = asyncio.run(run(options))
    print(
        f"dicomproxy {machine['dicomproxy']}, Python {machine['python']}, "
        f"{machine['cpus']} CPUs, load {machine['load']:.1f} at the start, {machine['system']}, "
        f"creating a file takes {machine['create_file_seconds'] * 1e6:.0f} us"
        f"{', quick: not to be quoted' if options.quick else ''}\n"
    )
    print(render(rows, failures))
    options.results.write_text(
        json.dumps(
            {
                "started": started.isoformat(timespec="seconds"),
                "quick": options.quick,
                "machine": machine,
                "rows": [row.as_json() for row in rows],
                "failures": [{"name": one.name, "reason": one.reason} for one in failures],
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return int(any(not one.skipped for one in failures))


if __name__ == "__main__":
    sys.exit(main())
