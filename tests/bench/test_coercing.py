"""The row about coercion measures what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from bench.coercing import coerce
from bench.stage import Stage, sizes


async def test_headers_are_coerced_and_their_time_taken(tmp_path: Path) -> None:
    """Three rows, one figure a round each, those of large objects beside small ones."""
    stage: Any = SimpleNamespace(directory=tmp_path, sizes=sizes(quick=True, full=False))

    series, alone, large = await coerce(cast(Stage, stage))

    for row in (series, alone, large):
        assert len(row.ours) == 1
        assert 0 < row.ours[0] < 1
    assert len(large.baseline) == 1
    assert series.baseline == alone.baseline == []
