"""The orders under way at one holder: what they cover, and what they came to.

An order's claim stands until it has ended: whatever it covers is asked for by no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from typing import Final

from dicomproxy.dataset.levels import Level
from dicomproxy.ports import Failure, RetrieveOrder, RetrieveProgress, Source
from dicomproxy.retrieval.manifest import Manifest
from dicomproxy.retrieval.selection import Selection

_FINAL_SECONDS: Final = 5.0
"""How long after its last instance an order may take to say that it is over."""

# Failures that a second attempt at the same holder would only repeat.
HOPELESS: Final = frozenset(
    {Failure.UNREACHABLE, Failure.REJECTED, Failure.NO_CONTEXT, Failure.BREAKER}
)


@dataclass(slots=True, eq=False)
class Running:
    """An order under way at *source*, and which instances it has brought."""

    order: RetrieveOrder
    selection: Selection
    source: Source
    progress: RetrieveProgress = field(default_factory=RetrieveProgress)
    arrived: set[str] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Unit:
    """A study or series fetched from a holder that cannot list its instances."""

    attempts: int = 0
    complete: bool = False


class Orders(list[Running]):
    """Those under way, in the order in which they were placed."""

    def cover(self, series_instance_uid: str, sop_instance_uid: str) -> bool:
        """Tell whether an instance is being asked for."""
        return any(one.selection.covers(series_instance_uid, sop_instance_uid) for one in self)

    def cover_series(self, series_instance_uid: str) -> bool:
        """Tell whether the whole of a series is being asked for."""
        return any(one.selection.covers_series(series_instance_uid) for one in self)

    def outstanding(self) -> int:
        """Return how many instances lists have still to bring."""
        return sum(len(one.selection.sop_instance_uids - one.arrived) for one in self)

    def said_to_come(self) -> int:
        """Return how many instances the holder says that they bring, in all."""
        return sum(
            (one.progress.remaining or 0)
            + one.progress.completed
            + one.progress.failed
            + one.progress.warning
            for one in self
        )

    def cancel(self, but: Collection[Running] = ()) -> list[asyncio.Task[None]]:
        """Cancel all *but* some; return the tasks that end so."""
        tasks = [one.task for one in self if one.task is not None and one not in but]
        for task in tasks:
            task.cancel()
        return tasks


async def final_response(order: asyncio.Task[None]) -> None:
    """Let an order end by itself that has brought everything; in the end, cancel it.

    It lacks only its final response, and its archive is not told to cancel what is done.
    """
    try:
        async with asyncio.timeout(_FINAL_SECONDS):
            await asyncio.wait([order])
    except TimeoutError:
        pass
    finally:
        order.cancel()


def has_brought_all(running: Running, manifest: Manifest | None, refused: Container[str]) -> bool:
    """Tell whether nothing more is to come but what would be refused again."""
    expected: Collection[str] = running.order.sop_instance_uids
    if not expected and manifest is not None:
        expected = manifest.listed(running.selection)
    return bool(expected) and all(uid in running.arrived or uid in refused for uid in expected)


def brought_what_it_says(running: Running, final: RetrieveProgress | None) -> bool:
    """Tell whether an order ended in Success, and its counts with what arrived."""
    return (
        final is not None
        and final.status == 0
        and final.failed == 0
        and final.completed + final.warning == len(running.arrived)
    )


def was_refused(running: Running, failure: Failure | None, final: RetrieveProgress | None) -> bool:
    """Tell whether an order below STUDY level was answered with nothing but a failure."""
    if running.order.level is Level.STUDY or running.arrived:
        return False
    if final is not None and (final.failed or final.failed_sop_instance_uids):
        return False  # it was understood: these instances could not be sent
    return failure is Failure.STATUS or (
        final is not None and final.status >> 12 in (0x0, 0xA, 0xC) and final.status != 0
    )
