"""What people do at a workstation, and in which proportion."""

from __future__ import annotations

import asyncio
import random

from soak.content import Plan, Study
from soak.workstation import Broken, Workstation


async def work(workstation: Workstation, plan: Plan, chance: random.Random, until: float) -> None:
    """Read studies as people do, and worse, until the loop's clock says *until*."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        study = chance.choice(plan.studies)
        series_uid = chance.choice(list(study.instances))
        images = chance.sample(study.instances[series_uid], chance.randint(1, 3))
        try:
            await _one(workstation, study, series_uid, images, chance)
        except Broken:
            await asyncio.sleep(1)
        await asyncio.sleep(chance.expovariate(4))


async def _one(
    workstation: Workstation,
    study: Study,
    series_uid: str,
    images: list[str],
    chance: random.Random,
) -> None:
    soon = chance.uniform(0.0, 0.3)
    match chance.choices(range(10), (20, 8, 6, 4, 25, 8, 8, 6, 4, 3))[0]:
        case 0:
            await workstation.query("STUDY", study)
        case 1:
            await workstation.query("SERIES", study)
        case 2:
            await workstation.query("IMAGE", study, series_uid=series_uid)
        case 3:
            await workstation.query("STUDY", study, cancel_after=chance.randint(1, 3))
        case 4:
            await workstation.query("STUDY", study)
            await workstation.open(study)
        case 5:
            await workstation.open(study, "SERIES", series_uid=series_uid)
        case 6:
            await workstation.open(study, "IMAGE", series_uid=series_uid, images=images)
        case 7:
            await workstation.open(study, cancel_after_seconds=soon)
        case 8:
            # At times so soon that the proxy reads request and abort together.
            await workstation.open(study, abort_after_seconds=soon * chance.randint(0, 1))
        case _:
            await workstation.open(study)
