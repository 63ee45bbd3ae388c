"""What one delivery sees of a flight.

The flight's list of what has come is shared; a subscription is a place in it,
and the rules that decide which of its entries are for this caller: asked for,
not had from elsewhere, still held, and from a source that the caller may see.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final

from dicomproxy.ports import CachedInstance
from dicomproxy.retrieval.holder import Holder
from dicomproxy.retrieval.persons import Persons
from dicomproxy.retrieval.selection import Selection

if TYPE_CHECKING:
    from dicomproxy.retrieval.flight import Flight

_LOOK_AHEAD: Final = 4


@dataclass(frozen=True, slots=True)
class FlightRequest:
    """What one delivery wants of one study.

    Args:
        study_instance_uid: the study.
        selection: which of its instances.
        holders: whom to ask, in this order.
        visible: sources whose instances this caller may be given.
        patient_id: the local patient agreed on; empty if no holder names one.
        exclude: SOP Instance UIDs had from elsewhere, with their series.
        persons: who the patients are whom sources name.
    """

    study_instance_uid: str
    selection: Selection
    holders: tuple[Holder, ...]
    visible: frozenset[str]
    patient_id: str = ""
    exclude: dict[str, str] = field(default_factory=dict)
    exclude_series: frozenset[str] = frozenset()
    persons: Persons = field(default_factory=Persons)


@dataclass(frozen=True, slots=True)
class FlightOutcome:
    """How a flight ended for one subscriber.

    ``failed`` are the instances known to exist that nobody delivered.
    ``complete`` is False if there may be more than those. ``reached`` tells
    whether any holder could be asked, ``held`` whether any has the study.
    """

    failed: tuple[str, ...] = ()
    complete: bool = True
    reached: bool = True
    held: bool = True
    stopped: bool = False


class Subscription:
    """One delivery's view of a flight; iterate it to the :class:`FlightOutcome` that ends it."""

    def __init__(self, flight: Flight, request: FlightRequest) -> None:
        self._flight = flight
        self.selection = request.selection
        self.holders = request.holders
        self.visible = request.visible
        self.patient_id = request.patient_id
        self.exclude = request.exclude
        self.exclude_series = request.exclude_series
        self.wake = asyncio.Event()
        self.news = asyncio.Event()
        self.on_change: Callable[[], None] | None = None
        self.listed: dict[str, str] = {}
        self.also: dict[str, str] = {}
        self.pending: set[str] = set()
        self.satisfied = False
        self.outcome: FlightOutcome | None = None
        self.walk: asyncio.Task[None] | None = None
        self.abandoned = False
        self._served: set[str] = set()
        self._unlisted = 0
        self._cursor = 0
        self._cached_until = 0
        self._hits = 0
        self._stopped = False
        self._finished = False

    @property
    def expected(self) -> int:
        """How many instances this delivery will be given, as far as is known."""
        known = len(self.listed) + self._unlisted
        if not self.listed and self.outcome is None:
            return max(known, self._flight.best_total(self))
        return known

    def __aiter__(self) -> AsyncIterator[CachedInstance | FlightOutcome]:
        return self

    async def __anext__(self) -> CachedInstance | FlightOutcome:
        """Return the next instance, as soon as there is one; last, the outcome."""
        if self._finished:
            raise StopAsyncIteration
        while True:
            self.news.clear()
            if self._stopped:
                self._finished = True
                return FlightOutcome(stopped=True)
            log = self._flight.log
            while self._cursor < len(log):
                instance = log[self._cursor]
                self._cursor += 1
                if self._takes(instance):
                    return instance
            if self.outcome is not None:
                self._finished = True
                self._flight.count_hits(self._hits)
                # What came after nothing more was expected has been handed out.
                failed = tuple(uid for uid in self.outcome.failed if uid not in self._served)
                return replace(self.outcome, failed=failed)
            await self.news.wait()

    def upcoming(self, most: int) -> list[CachedInstance]:
        """Return what would be yielded next, as things stand, without yielding it."""
        log = self._flight.log
        # Bounded: most of what follows may be for others.
        ahead = range(self._cursor, min(self._cursor + _LOOK_AHEAD * most, len(log)))
        return list(islice((log[at] for at in ahead if self._wants(log[at])), most))

    def pairs(self) -> dict[tuple[str, str], None]:
        """Return the SOP Classes and transfer syntaxes of what is there to be yielded, in order."""
        found: dict[tuple[str, str], None] = {}
        for instance in islice(self._flight.log, self._cursor, None):
            pair = (instance.sop_class_uid, instance.transfer_syntax_uid)
            if pair not in found and self._wants(instance):
                found[pair] = None
        return found

    def _wants(self, instance: CachedInstance) -> bool:
        uid = instance.sop_instance_uid
        wanted = self.selection.covers(instance.series_instance_uid, uid) or uid in self.also
        if not wanted or uid in self._served:
            return False
        if self.is_excluded(instance.series_instance_uid, uid):
            return False
        return self._flight.available(self, uid)

    def _takes(self, instance: CachedInstance) -> bool:
        if not self._wants(instance):
            return False
        uid = instance.sop_instance_uid
        self._served.add(uid)
        if uid not in self.listed:
            self._unlisted += 1
        if self._cursor <= self._cached_until:
            self._hits += 1
        return True

    def undelivered(self) -> Iterator[str]:
        """Yield what is known to exist, or has come, and was not handed out."""
        for uid in self.listed:
            if uid not in self._served:
                yield uid
        for instance in self._flight.log[self._cursor :]:
            if self._takes(instance):
                yield instance.sop_instance_uid

    async def until_listed(self) -> None:
        """Return once every holder has said what it has, or it is known that it will not."""
        while not self._stopped and self.outcome is None and self._flight.is_listing(self):
            self.news.clear()
            await self.news.wait()

    def begin(self, cached: int) -> None:
        """Note how much of the flight's list was there from the start."""
        self._cached_until = cached

    def relist(self, listed: dict[str, str]) -> None:
        """Replace what is known to exist for this subscriber."""
        self.listed = listed
        self._unlisted = sum(1 for uid in self._served if uid not in listed)
        self.news.set()
        self.changed()

    def changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def is_excluded(self, series_instance_uid: str, sop_instance_uid: str) -> bool:
        """Tell whether an instance is had from elsewhere."""
        return sop_instance_uid in self.exclude or series_instance_uid in self.exclude_series

    def source_of(self, instance: CachedInstance) -> str:
        """Return the source that an instance is had from, one that this caller may see."""
        return self._flight.source_of(self, instance)

    async def until_judged(self, source: str, deadline: float | None = None) -> bool:
        """Return once a source has said whose study it has; False if it is not the patient's.

        Args:
            deadline: loop time until which that is waited for; what is not known then is
                no objection.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while not self._stopped and self.outcome is None:
                    if not self._flight.is_judging(source):
                        break
                    self.news.clear()
                    await self.news.wait()
        return not self._flight.conflicts(source)

    def was_cached(self, sop_instance_uid: str) -> bool:
        """Tell whether an instance was held before this flight began."""
        return sop_instance_uid in self._flight.initial

    def agrees(self, patient_id: str) -> bool:
        """Tell whether a local patient is the one agreed on, who is if nobody was yet."""
        return self._flight.agrees(patient_id)

    @property
    def study_instance_uid(self) -> str:
        """The study."""
        return self._flight.study_instance_uid

    @property
    def agreed(self) -> str:
        """The local patient whose study this is, empty while nobody has been named."""
        return self._flight.patient_id

    @property
    def is_narrowed(self) -> bool:
        """Whether anything is had from elsewhere."""
        return bool(self.exclude or self.exclude_series)

    def stop(self) -> None:
        """Have the iteration end at once, with an outcome that says so."""
        self._stopped = True
        self.news.set()

    def is_gone(self, sop_instance_uid: str) -> bool:
        """Tell whether an instance was dropped because its source no longer has it."""
        return sop_instance_uid in self._flight.gone

    async def replace(self, instance: CachedInstance) -> bool:
        """Have an instance fetched again that was handed out and proved damaged, or gone.

        Returns False if that was done before; it then stays failed. The new
        copy is yielded later, before the outcome.
        """
        uid = instance.sop_instance_uid
        if uid in self.also:
            return False
        self.also[uid] = instance.series_instance_uid
        self._served.discard(uid)
        if uid not in self.listed:
            self._unlisted -= 1
            self.changed()
        await self._flight.replace(self, uid, newer_than=self._cursor)
        return True
