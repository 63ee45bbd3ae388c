"""Rows about whole retrieves: cold and warm, near, far and over a narrow link.

Each is compared with the same C-MOVE at Orthanc itself, over the same route,
into the same receiver. The clock starts when the workstation asks for its
association, and a study of its own warms the proxy up beforehand.
"""

from __future__ import annotations

import os
import time
from typing import Any

from bench.data import Study
from bench.stage import CAPPED, CROWD, FAR, NEAR, ORTHANC, Route, Stage
from bench.subjects import BenchProxy, WrongOutcome, measured
from bench.table import NO_AIM, Aim, Row, at_most, later_by, under_seconds

_ROUND_TRIP = 2 * FAR.delay_seconds


def _pair(name: str, case: str, total: Aim, first: Aim, beside: str = "direct") -> tuple[Row, Row]:
    return (
        Row(name, case, "first instance", beside, first),
        Row(name, case, "total", beside, total),
    )


def _add(rows: tuple[Row, Row], ours: bool, result: dict[str, Any]) -> None:
    for row, key in zip(rows, ("first", "total"), strict=True):
        (row.ours if ours else row.baseline).append(result[key])


async def _cold(
    stage: Stage, proxy: BenchProxy, study: Study, rows: tuple[Row, Row]
) -> dict[str, Any]:
    await proxy.evict(study)
    async with measured(proxy, rows[1]):
        result = await stage.proxied(proxy, [study])
    _add(rows, True, result)
    return result


async def _cold_rows(
    stage: Stage, route: Route, study: Study, rows: tuple[Row, Row], usual: int
) -> list[Row]:
    await stage.relay(route)
    await stage.fill(ORTHANC, study, stage.sizes.crowd[0])
    title = f"PROXY1{route.suffix}"
    async with stage.proxy(stage.through(route), title=title) as proxy:
        await stage.proxied(proxy, [stage.sizes.crowd[0]])
        for _ in range(stage.rounds(usual)):
            _add(rows, False, await stage.direct(route, [study]))
            await _cold(stage, proxy, study, rows)
    return list(rows)


async def cold_near(stage: Stage) -> list[Row]:
    """A CT that is not cached, everything on loopback."""
    study = stage.sizes.ct
    case = f"cold C-MOVE, {study.instances} CT, loopback"
    rows = _pair("cold-near", case, at_most(2), later_by(0.020))
    return await _cold_rows(stage, NEAR, study, rows, 5)


async def cold_capped(stage: Stage) -> list[Row]:
    """The same over a link of 1 Gbit/s."""
    study = stage.sizes.ct
    case = f"cold C-MOVE, {study.instances} CT, 1 Gbit/s"
    rows = _pair("cold-capped", case, at_most(1.05), later_by(0.020))
    return await _cold_rows(stage, CAPPED, study, rows, 5)


async def cold_coerced(stage: Stage) -> list[Row]:
    """A cold CT of a patient with another ID there, beside one who has the same everywhere."""
    study, made = stage.sizes.ct, []
    for route in (NEAR, CAPPED):
        where = "loopback" if route is NEAR else "1 Gbit/s"
        case = f"cold C-MOVE, coerced, {study.instances} CT, {where}"
        rows = _pair("cold-coerced", case, at_most(1.05), NO_AIM, "not coerced")
        await stage.relay(route)
        await stage.fill(ORTHANC, study, stage.sizes.crowd[0])
        source = stage.through(route)
        async with (
            stage.proxy(source, title=f"PROXY1{route.suffix}", coerces=True) as coercing,
            stage.proxy(source, title=f"PROXY2{route.suffix}") as plain,
        ):
            for proxy in (coercing, plain):
                await stage.proxied(proxy, [stage.sizes.crowd[0]])
            for _ in range(stage.rounds(7)):
                await plain.evict(study)
                _add(rows, False, await stage.proxied(plain, [study]))
                await _cold(stage, coercing, study, rows)
        made.extend(rows)
    return made


async def _cold_far(stage: Stage, name: str, study: Study, usual: int) -> list[Row]:
    """Two proxies, of which one may use 8 associations and one 4; one direct run for both."""
    made: list[Row] = []
    what = f"cold C-MOVE, {study.instances} {study.modality}, 30 ms"
    first = later_by(_ROUND_TRIP, "<= + 1 round trip")
    await stage.relay(FAR)
    warm_up = stage.sizes.crowd[0]
    await stage.fill(ORTHANC, study, warm_up)
    eight = _pair(name, f"{what}, ceiling 8", at_most(0.2), first)
    four = _pair(name, f"{what}, ceiling 4", at_most(0.35), first)
    source = stage.through(FAR)
    async with (
        stage.proxy(source, title="PROXY1F", ceiling=8) as wide,
        stage.proxy(source, title="PROXY2F", ceiling=4) as narrow,
    ):
        for proxy in (wide, narrow):
            await stage.proxied(proxy, [warm_up])
        for _ in range(stage.rounds(usual)):
            direct = await stage.direct(FAR, [study])
            for proxy, rows in ((wide, eight), (narrow, four)):
                _add(rows, False, direct)
                await _cold(stage, proxy, study, rows)
    for rows in (eight, four):
        made.extend(rows)
    return made


async def far_ct(stage: Stage) -> list[Row]:
    """A CT 30 ms away, where the direct way waits a round trip for each instance."""
    return await _cold_far(stage, "far-ct", stage.sizes.ct, 3)


async def far_mr(stage: Stage) -> list[Row]:
    """Many small instances 30 ms away."""
    return await _cold_far(stage, "far-mr", stage.sizes.mr, 2)


async def warm(stage: Stage) -> list[Row]:
    """A CT that is cached, beside Orthanc asked directly, on loopback."""
    study = stage.sizes.ct
    rows = _pair(
        "warm",
        f"warm C-MOVE, {study.instances} CT, loopback",
        at_most(1.2),
        under_seconds(0.010),
    )
    await stage.fill(ORTHANC, study)
    async with stage.proxy(stage.through(NEAR), on_disk=True) as proxy:
        await stage.proxied(proxy, [study])
        for _ in range(stage.rounds(5)):
            _add(rows, False, await stage.direct(NEAR, [study]))
            async with measured(proxy, rows[1]):
                result = await stage.proxied(proxy, [study])
            _add(rows, True, result)
    return list(rows)


async def other_proxy(stage: Stage) -> list[Row]:
    """A cold CT, beside Orthanc as a proxy: told to fetch the study, then asked for it.

    As shipped: its receiver leaves acknowledgements delayed, and the sender waits, so
    that a ratio proves little. With TCP_NODELAY=1 in the environment the sender does
    not wait, and the aim counts.
    """
    waits = os.environ.get("TCP_NODELAY") != "1"
    study = stage.sizes.ct
    rows = _pair(
        "other-proxy",
        f"cold C-MOVE, {study.instances} CT, loopback",
        NO_AIM if waits else at_most(0.6),
        NO_AIM if waits else later_by(0.0, "sooner"),
        "Orthanc as shipped" if waits else "Orthanc as proxy",
    )
    await stage.fill(ORTHANC, study, stage.sizes.crowd[0])
    other = await stage.orthanc("ORTHANC2")
    order = (
        '{"Level": "Study", "TargetAet": "ORTHANC2", "Timeout": 60, '
        f'"Resources": [{{"StudyInstanceUID": "{study.study_instance_uid}"}}]}}'
    ).encode()
    async with stage.proxy(stage.through(NEAR)) as proxy:
        await stage.proxied(proxy, [stage.sizes.crowd[0]])
        for _ in range(stage.rounds(3)):
            began = time.monotonic()
            await other.request("POST", f"/modalities/{ORTHANC}/move", order)
            fetched = time.monotonic() - began
            if (await other.statistics())["CountInstances"] != study.instances:
                raise WrongOutcome("Orthanc as proxy did not fetch the study")
            result = await stage.retrieve(other.port, "ORTHANC2", [study])
            _add(rows, False, {key: result[key] + fetched for key in ("first", "total")})
            await other.delete_study(study.study_instance_uid)
            await _cold(stage, proxy, study, rows)
    return list(rows)


async def _crowd(stage: Stage, route: Route, ceilings: tuple[int, ...], usual: int) -> list[Row]:
    studies = stage.sizes.crowd
    where = "loopback" if route is NEAR else "30 ms"
    await stage.relay(route)
    await stage.fill(ORTHANC, *studies)
    made = []
    for ceiling in ceilings:
        row = Row(
            f"crowd-{route.name}",
            f"16 workstations, 16 CT of {studies[0].instances}, {where}, ceiling {ceiling}",
            "total",
            "direct",
            at_most(1),
        )
        made.append(row)
        source = stage.through(route)
        async with stage.proxy(source, title=f"PROXY1{route.suffix}", ceiling=ceiling) as proxy:
            for _ in range(stage.rounds(usual)):
                row.baseline.append((await stage.direct(route, studies, CROWD))["total"])
                await proxy.evict(*studies)
                async with measured(proxy, row):
                    row.ours.append((await stage.proxied(proxy, studies, CROWD))["total"])
    return made


async def crowd_near(stage: Stage) -> list[Row]:
    """Sixteen workstations retrieve a study each, at once."""
    return await _crowd(stage, NEAR, (4,), 5)


async def crowd_far(stage: Stage) -> list[Row]:
    """The same 30 ms away, where the direct way uses sixteen associations."""
    return await _crowd(stage, FAR, (4, 20), 2)
