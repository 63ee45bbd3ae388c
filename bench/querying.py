"""Rows about C-FIND: one patient's studies on three archives, in one answer."""

from __future__ import annotations

from bench.stage import PROXY, READING, Stage
from bench.subjects import BenchProxy, WrongOutcome, measured
from bench.table import NO_AIM, Row, later_by

_NAMES = ("LOCAL", "NORTH", "SOUTH")
_PATIENT = "BENCH-2"


async def _ask(stage: Stage, port: int, called: str, at_least: int) -> dict[str, float]:
    workstation = await stage.workstation()
    result: dict[str, float] = await workstation.ask(
        "find", port=port, called=called, calling=READING, patient_id=_PATIENT
    )
    if result["status"] or result["rows"] < at_least:
        raise WrongOutcome(f"status {int(result['status']):04X}, {result['rows']} rows")
    return result


async def _fill(stage: Stage) -> tuple[tuple[str, str, int], dict[str, tuple[str, str, int]], int]:
    """Spread the studies over three archives; the local one, the sources, how many are local."""
    studies = stage.find_studies()
    for at, name in enumerate(_NAMES):
        await stage.fill(name, *studies[at::3])
    local, *others = ((name, "127.0.0.1", stage.ports[name]) for name in _NAMES)
    return local, {node[0].lower(): node for node in others}, len(studies[::3])


async def _compare(
    stage: Stage, proxy: BenchProxy, first: Row, final: Row, *, usual: int, rows: int
) -> None:
    share = len(stage.find_studies()) // 3
    for _ in range(stage.rounds(usual)):
        alone = [await _ask(stage, stage.ports[name], name, share) for name in _NAMES]
        async with measured(proxy, final):
            merged = await _ask(stage, proxy.port, PROXY, rows)
        first.baseline.append(alone[0]["first"])
        first.ours.append(merged["first"])
        final.baseline.append(max(one["final"] for one in alone))
        final.ours.append(merged["final"])


async def find(stage: Stage) -> list[Row]:
    """Merged, with every archive well."""
    local, sources, _ = await _fill(stage)
    everything = len(stage.find_studies())
    case = f"C-FIND, {everything} studies on three archives"
    first = Row("find", case, "first row", "local alone", later_by(0.003))
    final = Row("find", case, "final", "slowest alone", later_by(0.005))
    async with stage.proxy(sources, local=local) as proxy:
        await _ask(stage, proxy.port, PROXY, everything)
        await _compare(stage, proxy, first, final, usual=15, rows=everything)
    return [first, final]


async def find_silent(stage: Stage) -> list[Row]:
    """Merged, with one more source that takes connections and says nothing.

    Three rounds, in which it is waited for in full: after that its breaker opens.
    """
    local, sources, _ = await _fill(stage)
    everything = len(stage.find_studies())
    case = f"C-FIND, {everything} studies, one more source silent"
    first = Row("find-silent", case, "first row", "local alone", later_by(0.003))
    final = Row("find-silent", case, "final (its deadline is 5 s)", "slowest alone", NO_AIM)
    async with stage.proxy({**sources, "silent": await stage.silent()}, local=local) as proxy:
        await _compare(stage, proxy, first, final, usual=3, rows=everything)
    return [first, final]
