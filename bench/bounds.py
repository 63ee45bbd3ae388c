"""Rows about memory: the proxy's peak, whatever is moved."""

from __future__ import annotations

from bench.data import Study
from bench.stage import Stage
from bench.subjects import measured
from bench.table import Row, under_bytes

_MEGABYTE = 1_000_000


def _case(study: Study) -> str:
    total = study.instances * study.pixel_bytes / _MEGABYTE
    if study.instances == 1:
        return f"one object of {total:.0f} MB, cold and warm"
    return f"{study.instances} instances, {total:.0f} MB, cold and warm"


async def memory(stage: Stage) -> list[Row]:
    """One object, a study of small ones and a CT; each by a proxy of its own.

    A peak is no matter of chance: one round.
    """
    rows = []
    for study in stage.memory_studies():
        row = Row("memory", _case(study), "peak memory", "", under_bytes(150 * _MEGABYTE), "B")
        async with stage.proxy(stage.generated()) as proxy:
            async with measured(proxy, row):
                await stage.proxied(proxy, [study])
                await stage.proxied(proxy, [study])
            row.ours.append(float(proxy.peak_bytes()))
        rows.append(row)
    return rows
