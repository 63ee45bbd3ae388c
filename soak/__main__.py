"""``python -m soak``: run it, print the table, exit 1 where something was violated."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from pathlib import Path

from dicomproxy import logs
from soak.run import Options, soak


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long (default: 3)")
    parser.add_argument("--seed", type=int, help="of everything random (default: another each run)")
    parser.add_argument("--workstations", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--keep", type=Path, help="a new directory for the log and what else stays")
    given = parser.parse_args()
    seed = random.randrange(100_000) if given.seed is None else given.seed
    print(f"seed {seed}, {given.minutes:g} minutes", flush=True)
    logs.configure("critical", stream=sys.stderr, hooks=False)
    options = Options(60 * given.minutes, seed, given.workstations, given.keep)
    report = asyncio.run(soak(options))
    print(report.table())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
