"""The benchmark runs: two cheap rows, as a user starts it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.peers.process import require, run_program

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.peers
async def test_a_quick_run_measures_and_writes_what_it_shows(tmp_path: Path) -> None:
    """A table on standard output, every round in the results file, and exit status 0."""
    require("storescu")
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "--quick", "--results", str(results)]
    command += ["--only", "receive-ct", "--only", "send-fast", "--directory", str(tmp_path)]

    code, output = await run_program(command, ROOT, 60)

    assert code == 0, output
    assert "receive and write 30 CT" in output
    assert "send 30 CT from cache to a fast receiver" in output
    kept = json.loads(await asyncio.to_thread(results.read_text))
    assert [row["name"] for row in kept["rows"]] == ["receive-ct", "send-fast"]
    for row in kept["rows"]:
        assert len(row["ours"]) == len(row["baseline"]) == row["rounds"] == 1
        assert min(row["ours"] + row["baseline"] + row["cpu_seconds"]) >= 0
        assert row["peak_bytes"] > 10_000_000
    assert kept["failures"] == []


async def test_an_unknown_row_is_refused() -> None:
    """A misspelt name is told before anything is measured."""
    code, output = await run_program([sys.executable, "-m", "bench", "--only", "no"], ROOT, 30)

    assert code == 2
    assert "invalid choice: 'no'" in output
