"""Rows about one half of the way: taking instances in, and sending them from the cache."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.data import Study
from bench.stage import Stage
from bench.subjects import BenchProxy, measured
from bench.table import Row, at_most, faster


async def _take_in(stage: Stage, proxy: BenchProxy, study: Study, row: Row) -> float:
    """Have the proxy fetch *study* while its workstation lets nobody in; seconds of sending.

    What is measured so is receiving, checking and writing; the delivery, which
    would share the processors, follows when the sender is done.
    """
    archive, waiting = await stage.archive(), await stage.workstation("ordinary")
    await proxy.evict(study)
    await archive.ask("forget")
    await waiting.ask("hold")
    try:
        async with asyncio.TaskGroup() as group:
            moving = group.create_task(stage.proxied(proxy, [study], arrives=False), name="move")
            async with measured(proxy, row):
                took: float = await archive.ask("sent_seconds")
            await waiting.ask("let_in")
            await moving
    finally:
        await waiting.ask("let_in")
    return took


async def receive_mr(stage: Stage) -> list[Row]:
    """Many small instances from DCMTK's storescu as it is shipped: do both sides wait?"""
    study = stage.sizes.mr
    row = Row(
        "receive-mr",
        f"receive {study.instances} MR from storescu",
        "storescu, start to end",
        "sink",
        at_most(1.5),
    )
    await stage.files(study)
    archive = await stage.archive()
    await stage.workstation()
    async with stage.proxy(stage.generated(), reading="ordinary") as proxy:
        for _ in range(stage.rounds(5)):
            row.baseline.append(
                await archive.ask(
                    "storescu",
                    port=stage.ports["fast"],
                    called="READING",
                    study=study.study_instance_uid,
                )
            )
            row.ours.append(await _take_in(stage, proxy, study, row))
    return [row]


async def receive_ct(stage: Stage) -> list[Row]:
    """Receive and write a CT, beside a pynetdicom SCP that writes files."""
    study = stage.sizes.ct
    row = Row(
        "receive-ct",
        f"receive and write {study.instances} CT",
        "sending",
        "pynetdicom SCP",
        faster(5),
    )
    archive, peer = await stage.archive(), await stage.pynetdicom()
    async with stage.proxy(stage.generated(), reading="ordinary") as proxy:
        await _take_in(stage, proxy, stage.sizes.crowd[0], Row("", "", "", "", at_most(1)))
        for _ in range(stage.rounds(5)):
            await peer.ask("clear")
            row.baseline.append(
                await archive.ask(
                    "send",
                    port=stage.ports["pynetdicom"],
                    called="PYNETDICOM",
                    study=study.study_instance_uid,
                )
            )
            row.ours.append(await _take_in(stage, proxy, study, row))
        await peer.ask("clear")
    return [row]


async def _send(stage: Stage, kind: str, usual: int) -> list[Row]:
    study = stage.sizes.ct
    receiver = "a fast receiver" if kind == "fast" else "an ordinary receiver"
    row = Row(
        f"send-{kind}",
        f"send {study.instances} CT from cache to {receiver}",
        "first to last arrival",
        "pynetdicom SCU",
        faster(5),
    )
    files = str(await stage.files(study))
    peer, receiving = await stage.pynetdicom(), await stage.workstation(kind)
    async with stage.proxy(stage.generated(), reading=kind, on_disk=True) as proxy:
        ours: dict[str, Any] = {"arrives": kind == "fast"}
        await stage.proxied(proxy, [study], **ours)
        for _ in range(stage.rounds(usual)):
            await receiving.ask("reset")
            await peer.ask("send", port=stage.ports[kind], files=files)
            row.baseline.append((await receiving.ask("tally"))["span"])
            await receiving.ask("reset")
            async with measured(proxy, row):
                await stage.proxied(proxy, [study], **ours)
            tally = await receiving.ask("tally")
            assert tally["instances"] == study.instances, "the receiver lacks instances"
            row.ours.append(tally["span"])
    return [row]


async def send_fast(stage: Stage) -> list[Row]:
    """Send from the cache to a receiver that acknowledges at once."""
    return await _send(stage, "fast", 5)


async def send_ordinary(stage: Stage) -> list[Row]:
    """Send from the cache to a receiver that leaves acknowledgements delayed."""
    return await _send(stage, "ordinary", 3)
