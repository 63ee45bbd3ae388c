"""The flights under way, one for each study, and the studies that failed lately.

:meth:`Flights.join` is the one way to get instances: it yields what the store
holds already, then what arrives, each at least once, then exactly one outcome.
Leaving is counted, and the last one to leave ends the flight.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tallies
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

from prometheus_client import Counter, Gauge

from dicomproxy.ports import InstanceStore, Location, Locations, RetrieveOrder, Source
from dicomproxy.retrieval.flight import Flight
from dicomproxy.retrieval.pace import Pace, is_near, orders_at_once, takes_lists
from dicomproxy.retrieval.subscription import FlightRequest, Subscription
from dicomproxy.tasks import OwnerClosed, TaskOwner

_MAX_REMEMBERED: Final = 1000
_NEAR_ORDERS: Final = 4
_RECHECK_SECONDS: Final = 30.0

_UNDER_WAY = Gauge("dicomproxy_flights", "Studies being fetched or delivered.")
_ORDERS = Counter("dicomproxy_retrieve_orders_total", "Retrieves asked of a source.", ["source"])


def _today() -> date:
    return datetime.now(UTC).astimezone().date()


@dataclass(frozen=True, slots=True)
class FlightSettings:
    """How hard is tried.

    Args:
        finish_abandoned: fetch to the end even if nobody waits any more.
        retry_pause_seconds: how long a holder is not asked again for a study
            that it failed to deliver.
        attempts: for each instance and holder within one flight.
        today: the day it is, for studies that may still be growing.
    """

    finish_abandoned: bool = False
    retry_pause_seconds: float = 30.0
    attempts: int = 2
    today: Callable[[], date] = _today


@dataclass(frozen=True, slots=True)
class _Pause:
    until: float
    missing: dict[str, str]
    reached: bool


class Flights:
    """Registry of flights.

    Args:
        store: where instances are held.
        settings: how hard is tried.
        locations: told when a holder no longer has a study, or has it under
            another patient.
    """

    def __init__(
        self, store: InstanceStore, settings: FlightSettings, locations: Locations | None = None
    ) -> None:
        self.store = store
        self._settings = settings
        self._locations = locations
        self._owner = TaskOwner("flights")
        self._closed = False
        self._one_ended = asyncio.Event()
        self._endings: set[asyncio.Task[None]] = set()
        self._pauses: OrderedDict[tuple[str, str], _Pause] = OrderedDict()
        # The store's writer thread reads these; they are plain, and replaced or
        # changed by one operation at a time.
        self._by_study: dict[str, Flight] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, list[RetrieveOrder]] = {}
        self._paces: dict[str, Pace] = {}
        self._served: dict[str, Tallies[Flight]] = {}
        self._series: OrderedDict[tuple[str, str], tuple[str, ...]] = OrderedDict()

    @property
    def retry_pause_seconds(self) -> float:
        """How long nobody is asked again for what could not be had."""
        return self._settings.retry_pause_seconds

    def pace(self, source: str) -> Pace:
        """Return what was seen of *source* so far."""
        return self._paces.setdefault(source, Pace())

    def __len__(self) -> int:
        """Count the studies under way."""
        return len(self._by_study)

    @asynccontextmanager
    async def join(self, request: FlightRequest) -> AsyncIterator[Subscription]:
        """Take part in the flight of a study, beginning it if there is none.

        Raises:
            OSError: the store does not work.
            OwnerClosed: everything is shutting down.
        """
        if self._closed:
            raise OwnerClosed("flights")
        uid = request.study_instance_uid
        flight = self._by_study.get(uid)
        if flight is None:
            flight = self._by_study[uid] = Flight(self, uid, self._settings)
            self._recent.pop(uid, None)
            _UNDER_WAY.inc()
        subscription = flight.subscribe(request)
        try:
            await flight.open()
            flight.begin(subscription)
            yield subscription
        finally:
            if flight.unsubscribe(subscription):
                # Its own task, so that whoever leaves because it was cancelled
                # leaves nothing behind.
                await asyncio.shield(self._end(flight))

    async def close(self) -> None:
        """End every flight; nobody can join any more."""
        self._closed = True
        for flight in list(self._by_study.values()):
            self._end(flight)
        if self._endings:
            # Those too that were ending already: they give their studies back.
            await asyncio.wait(self._endings)
        await self._owner.close()

    def _end(self, flight: Flight) -> asyncio.Task[None]:
        uid = flight.study_instance_uid
        if self._by_study.get(uid) is flight:
            # From now on what still arrives is refused, and who comes begins anew.
            del self._by_study[uid]
            self._one_ended.set()
            self._recent[uid] = None
            if len(self._recent) > _MAX_REMEMBERED:
                self._recent.popitem(last=False)
            _UNDER_WAY.dec()
        if flight.ending is None:
            flight.ending = self._owner.spawn(flight.close(), name="end")
            self._endings.add(flight.ending)
            flight.ending.add_done_callback(self._endings.discard)
        return flight.ending

    async def wait_unused(self, sources: Collection[Source]) -> None:
        """Return once no flight has any of *sources* to ask."""
        while any(flight.may_ask(sources) for flight in self._by_study.values()):
            self._one_ended.clear()
            # Looked at now and then as well: a flight may go on by other sources.
            with suppress(TimeoutError):
                async with asyncio.timeout(_RECHECK_SECONDS):
                    await self._one_ended.wait()

    def spawn(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that may outlive the flight it is for."""
        return self._owner.spawn(coro, name=name)

    def abandoned(self, flight: Flight) -> None:
        """End a flight that was finished although nobody waited for it."""
        self._end(flight)

    # ------------------------------------------------------------- arrivals

    def flight_for(self, study_instance_uid: str, source: str) -> Flight | None:
        """Return the flight that *source* was asked by; safe in any thread."""
        flight = self._by_study.get(study_instance_uid)
        return flight if flight is not None and source in flight.asked else None

    def ended_lately(self, study_instance_uid: str) -> bool:
        """Tell whether a flight of that study has just ended; safe in any thread."""
        return study_instance_uid in self._recent

    def is_asked(self, source: str) -> bool:
        """Tell whether any flight has asked *source* for instances."""
        return bool(self._running.get(source)) or any(
            source in flight.asked for flight in list(self._by_study.values())
        )

    def has_orders(self, source: str) -> bool:
        """Tell whether *source* is sending on an order now; safe in any thread."""
        return bool(self._running.get(source))

    def orders(self, source: str) -> Sequence[RetrieveOrder]:
        """Return the orders that *source* is working on."""
        return self._running.get(source, ())

    def refused(self, source: str, sop_instance_uid: str, reason: str) -> bool:
        """Tell the flights that an instance was refused whose study is not known.

        Returns True if *source* was expected to send it.
        """
        expected = False
        for flight in list(self._by_study.values()):
            if source in flight.asked:
                expected = expected or flight.lists(source, sop_instance_uid)
                flight.refused(source, sop_instance_uid, reason)
        return expected

    # ------------------------------------------------- what flights report

    def order_started(self, source: str, order: RetrieveOrder) -> None:
        """Let arrivals from *source* count for *order*."""
        self._running.setdefault(source, []).append(order)
        _ORDERS.labels(source).inc()

    def order_ended(self, source: str, order: RetrieveOrder) -> None:
        """Undo :meth:`order_started`."""
        running = self._running[source]
        running[:] = [other for other in running if other is not order]

    @contextmanager
    def sharing(self, source: str, flight: Flight) -> Iterator[None]:
        """Count a study among those that are fetched from *source*, once however often."""
        served = self._served.setdefault(source, Tallies())
        served[flight] += 1
        try:
            yield
        finally:
            served[flight] -= 1
            if not served[flight]:
                del served[flight]
                self.let_others_go_on()

    def shared_by(self, source: str) -> int:
        """Return how many studies somebody waits for are fetched from *source* at this moment."""
        return sum(flight.is_wanted() for flight in self._served.get(source, ()))

    def gives_way(self, source: str, flight: Flight) -> bool:
        """Tell whether nothing is to be asked of *source* for a study at this moment.

        So it is while nobody waits for that study and somebody does for another.
        """
        return not flight.is_wanted() and self.shared_by(source) > 0

    def let_others_go_on(self) -> None:
        """Let those decide anew that may have given way."""
        for flight in self._by_study.values():
            if not flight.is_wanted():
                flight.wake()

    def orders_at_once(self, source: Source) -> int:
        """Return how many orders of one study *source* is to have under way.

        Studies that are fetched from it at the same time share its ceiling: many
        short lists of each would cost more round trips than they hide.
        """
        return orders_at_once(
            source.round_trip_seconds,
            self.pace(source.name).seconds_per_instance,
            max(1, source.parallel_retrieves // max(1, self.shared_by(source.name))),
        )

    def spread_over(self, source: Source) -> int:
        """Return over how many orders a study is spread; 0 where one is asked for all of it."""
        return self.orders_at_once(source) if takes_lists(source) else 0

    def orders_limit(self, source: Source) -> int:
        """Return how many orders of one study there may be, a near source being asked coarsely."""
        return _NEAR_ORDERS if is_near(source) else self.orders_at_once(source)

    def remember_series(
        self, study_instance_uid: str, source: str, series_instance_uids: Iterable[str]
    ) -> None:
        """Remember what a source listed, so that less need be asked in turn next time."""
        key = study_instance_uid, source
        self._series[key] = tuple(series_instance_uids)
        self._series.move_to_end(key)
        if len(self._series) > _MAX_REMEMBERED:
            self._series.popitem(last=False)

    def listed_series(self, study_instance_uid: str, source: str) -> tuple[str, ...]:
        """Return the series that a source listed lately; there may be others by now."""
        return self._series.get((study_instance_uid, source), ())

    def pause(
        self, study_instance_uid: str, source: str, missing: dict[str, str], *, reached: bool
    ) -> None:
        """Do not ask *source* for the study again for a while.

        Args:
            missing: maps the SOP Instance UIDs that it did not deliver to their series.
            reached: whether it answered at all.
        """
        until = asyncio.get_running_loop().time() + self._settings.retry_pause_seconds
        key = study_instance_uid, source
        self._pauses[key] = _Pause(until, missing, reached)
        self._pauses.move_to_end(key)
        if len(self._pauses) > _MAX_REMEMBERED:
            self._pauses.popitem(last=False)

    def paused(self, study_instance_uid: str, source: str) -> dict[str, str] | None:
        """Return what a source lately failed to deliver of a study, None if it may be asked."""
        key = study_instance_uid, source
        pause = self._pauses.get(key)
        if pause is None:
            return None
        if pause.until <= asyncio.get_running_loop().time():
            del self._pauses[key]
            return None
        return dict(pause.missing)

    def reached_lately(self, study_instance_uid: str, source: str) -> bool:
        """Tell whether a source that is paused had answered at all."""
        pause = self._pauses.get((study_instance_uid, source))
        return pause is None or pause.reached

    def seen(self, study_instance_uid: str, source: str, patient_id: str) -> None:
        """Remember that *source* has the study under *patient_id*."""
        if self._locations is not None:
            self._locations.remember([Location(study_instance_uid, source, patient_id)])

    def unseen(self, study_instance_uid: str, source: str) -> None:
        """Remember that *source* has the study no more."""
        if self._locations is not None:
            self._locations.forget(study_instance_uid, source)
