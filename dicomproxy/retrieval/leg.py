"""One study at one holder: what is claimed of what it lists, and the orders under way.

Rules kept: deciding is synchronous, so that no two subscribers claim the same
instance; an order's claim stands until the order has ended. Nothing is waited
for that no running order covers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from dicomproxy.dataset.levels import Level
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    CachedInstance,
    Failure,
    RetrieveOrder,
    RetrieveProgress,
    Source,
    SourceError,
)
from dicomproxy.retrieval.batches import (
    early_orders,
    orders_for_missing,
    orders_for_selection,
)
from dicomproxy.retrieval.catalogue import Catalogue
from dicomproxy.retrieval.holder import Holder, Standing
from dicomproxy.retrieval.manifest import Manifest, closing
from dicomproxy.retrieval.orders import (
    HOPELESS,
    Orders,
    Running,
    Unit,
    brought_what_it_says,
    final_response,
    has_brought_all,
    was_refused,
)
from dicomproxy.retrieval.pace import takes_lists
from dicomproxy.retrieval.selection import Selection, selection_of

if TYPE_CHECKING:
    from dicomproxy.retrieval.flight import Flight
    from dicomproxy.retrieval.subscription import Subscription

_log = get_logger()

_WHOLE_STUDY: Final = ""


class Leg:
    """The fetching of one study from one holder, shared by all who want it from there."""

    def __init__(self, flight: Flight, holder: Holder, paused_missing: dict[str, str] | None):
        self._flight = flight
        self._settings = flight.settings
        self.holder = holder
        self.paused_missing = paused_missing
        self.catalogue = Catalogue(
            flight,
            holder.name,
            listed=self._listed,
            is_begun=lambda: bool(self._orders or self._fetched),
        )
        self._failed_at: float | None = None
        self._unreachable: Failure | None = None
        self._orders = Orders()
        self._unsettled: list[Running] = []
        self._attempts: dict[str, int] = {}
        self._units: dict[str, Unit] = {}
        self._refused: dict[str, str] = {}
        now = asyncio.get_running_loop().time()
        self._finest = flight.flights.pace(holder.name).finest(now)
        self._gave_up = self._stalled = False
        self._fetched = self._told_unverified = False

    @property
    def name(self) -> str:
        return self.holder.name

    @property
    def manifest(self) -> Manifest | None:
        """The last one that has come."""
        return self.catalogue.manifest

    @property
    def verified(self) -> bool:
        """Whether the manifest, if there is one, lists every instance."""
        return self.catalogue.verified

    @property
    def blamed(self) -> bool:
        """Whether the holder itself failed, so that it is left alone for a while."""
        return self._failed_at is not None

    def uses(self, sources: Collection[Source]) -> bool:
        """Tell whether any of *sources* is asked, or would be next."""
        asked = (self.holder.source, self.catalogue.loading, *(one.source for one in self._orders))
        return any(source in sources for source in asked)

    @property
    def is_listing(self) -> bool:
        """Whether it will be known what the holder has, and is not yet."""
        return self.catalogue.is_first

    def best_total(self) -> int:
        """Return how many instances the running orders are said to bring."""
        return self._orders.said_to_come()

    def prepare(self, likely: Collection[str] = ()) -> None:
        """Ask for the manifest unless it is being asked for or was just given.

        *likely* are Series Instance UIDs that somebody believes are there.
        """
        now = asyncio.get_running_loop().time()
        pause = self._settings.retry_pause_seconds
        if self._failed_at is not None and not self._orders and now - self._failed_at >= pause:
            self.paused_missing = None
            self._failed_at = self._unreachable = None
            self._gave_up = self._stalled = False
            self._attempts.clear()
            self._units.clear()
        if self.paused_missing is not None:
            # A flight may last longer than the pause in which it began.
            study = self._flight.study_instance_uid
            self.paused_missing = self._flight.flights.paused(study, self.name)
        catalogue = self.catalogue
        if self.paused_missing is None and not (
            catalogue.loading or catalogue.conflict or catalogue.is_fresh
        ):
            self._load(likely)

    async def serve(self, subscription: Subscription, *, last: bool) -> Standing:
        """Return once nothing more can be had from this holder for *subscription*.

        ``last`` says that no other holder is left, so that one which stalled is
        tried again.
        """
        if self.paused_missing is not None:
            return self._paused(subscription)
        with self._flight.flights.sharing(self.name, self._flight):
            while True:
                subscription.wake.clear()
                step = self._decide(subscription, last)
                if isinstance(step, Standing):
                    return step
                if not self._flight.flights.gives_way(self.name, self._flight):
                    limit = self._flight.flights.orders_limit(self.holder.source)
                    for order in step[: max(0, limit - len(self._orders))]:
                        self._start(order)
                # Orders and manifests end by the source's own deadlines, and wake us.
                await subscription.wake.wait()

    def _paused(self, subscription: Subscription) -> Standing:
        """Serve from what is held, since this holder failed a moment ago."""
        if self._flight.was_whole_for(subscription):
            self._tell_unverified("retry_pause")
            return Standing.ASSUMED
        study = self._flight.study_instance_uid
        reached = self._flight.flights.reached_lately(study, self.name)
        return Standing.SHORT if reached else Standing.UNREACHABLE

    def _decide(self, subscription: Subscription, last: bool) -> list[RetrieveOrder] | Standing:
        """Return orders to place now, none to wait, or how it ended. Never awaits."""
        if self.catalogue.conflict:
            return Standing.CONFLICT
        if self.catalogue.is_first:
            return self._at_once(subscription)
        if self.manifest is not None and not self.manifest.held:
            return [] if self.catalogue.loading or self._orders else Standing.ABSENT
        limit = 1 if self._stalled and not last else self._settings.attempts
        if self._gave_up:
            limit = 0
        if self.manifest is not None and self.manifest.verified:
            return self._decide_proven(subscription, self.manifest, limit)
        return self._decide_unproven(subscription, limit)

    def _at_once(self, subscription: Subscription) -> list[RetrieveOrder]:
        """Order what can be ordered before the manifest is known: what is surely not here."""
        if self._gave_up:
            return []
        if takes_lists(self.holder.source):
            return self._listed_so_far(subscription)
        wanted = subscription.selection
        if subscription.is_narrowed or subscription.listed or self.holder.source.wants_sop_classes:
            return []  # better ordered once the instances are known
        held = self._flight.lease.instances
        if wanted.level is Level.STUDY:
            if held or self._orders or self._units or self._attempts:
                return []
            return self._for_selection(wanted)
        if wanted.level is Level.SERIES:
            begun = {instance.series_instance_uid for instance in list(held.values())}
            begun.update(self._units)
            series = frozenset(
                uid
                for uid in wanted.series_instance_uids
                if uid not in begun and not self._orders.cover_series(uid)
            )
            if not series or _WHOLE_STUDY in self._units:
                return []
            return self._for_selection(Selection(Level.SERIES, series))
        series_uid = next(iter(wanted.series_instance_uids), "")
        missing = frozenset(
            uid
            for uid in wanted.sop_instance_uids
            if not self._flight.available(subscription, uid)
            and uid not in self._attempts
            and not self._orders.cover(series_uid, uid)
        )
        if not missing or self._units:
            return []
        return self._for_selection(Selection(Level.IMAGE, wanted.series_instance_uids, missing))

    def _listed_so_far(self, subscription: Subscription) -> list[RetrieveOrder]:
        """Order some of what has been listed while more is being listed."""
        fetchable = self._fetchable(
            {
                uid: series
                for series, uids in self.catalogue.so_far.items()
                for uid in uids
                if subscription.selection.covers(series, uid)
                and not subscription.is_excluded(series, uid)
                and not self._flight.available(subscription, uid)
            },
            limit=1,
        )
        if self._finest is not Level.IMAGE:
            return []
        return early_orders(
            self._flight.study_instance_uid,
            fetchable,
            self.catalogue.so_far,
            running=len(self._orders),
            at_once=self._flight.flights.orders_at_once(self.holder.source),
            patient_id=self.holder.patient_id,
        )

    def _decide_proven(
        self, subscription: Subscription, manifest: Manifest, limit: int
    ) -> list[RetrieveOrder] | Standing:
        wanted = manifest.listed(subscription.selection)
        wanted.update(
            (uid, series)
            for uid, series in subscription.also.items()
            if uid in manifest.series.get(series, ())
        )
        orders, waiting, missing = self._missing(subscription, wanted, limit)
        if orders:
            return orders
        if waiting or self.catalogue.loading:
            return []
        if self._fetched and manifest.is_recent(self._settings.today()):
            # It may have grown while it was fetched.
            self._load()
            return []
        if missing:
            return self._short(Standing.SHORT, missing)
        return Standing.PROVEN

    def _decide_unproven(
        self, subscription: Subscription, limit: int
    ) -> list[RetrieveOrder] | Standing:
        """Go by what the holder says of its own orders, where it cannot list instances."""
        explicit = {**subscription.selection.named(), **subscription.also}
        if self._unreachable in HOPELESS:
            limit = 0
        orders, waiting, missing = self._missing(subscription, explicit, limit)
        incomplete: list[str] = []
        above_instances = subscription.selection.level is not Level.IMAGE
        if above_instances and not self._flight.was_whole_for(subscription):
            for key in self._units_for(subscription):
                unit = self._units.get(key) or Unit()
                if unit.complete or self._is_complete(_WHOLE_STUDY):
                    continue
                if self._orders.cover_series(key):
                    waiting = True
                elif unit.attempts < limit:
                    level = Level.SERIES if key else Level.STUDY
                    orders += self._for_selection(Selection(level, frozenset({key} - {""})))
                else:
                    incomplete.append(key)
        if orders:
            return orders
        if waiting or self.catalogue.loading:
            return []
        if not missing and not incomplete:
            self._tell_unverified("unreachable" if self.manifest is None else "not_listed")
            return Standing.ASSUMED
        if self._unreachable is not None and not self._fetched:
            return self._short(Standing.UNREACHABLE, [*missing, *incomplete])
        return self._short(Standing.SHORT, [*missing, *incomplete])

    def _short(self, standing: Standing, missing: Collection[str]) -> Standing:
        """Blame the holder, unless all that lacks is what we refused to take."""
        if self._failed_at is None and any(uid not in self._refused for uid in missing):
            self._failed_at = asyncio.get_running_loop().time()
        return standing

    def _missing(
        self, subscription: Subscription, wanted: dict[str, str], limit: int
    ) -> tuple[list[RetrieveOrder], bool, dict[str, str]]:
        """Sort *wanted*: orders for what may be asked for, whether to wait, what is lacking."""
        missing = {
            uid: series
            for uid, series in wanted.items()
            if not subscription.is_excluded(series, uid)
            and not self._flight.available(subscription, uid)
        }
        subscription.pending = set(missing)
        waiting = any(
            self._orders.cover(series, uid)
            for uid, series in missing.items()
            if uid not in self._refused
        )
        orders = orders_for_missing(
            self._flight.study_instance_uid,
            self._fetchable(missing, limit),
            self.manifest.series if self.manifest is not None else {},
            patient_id=self.holder.patient_id,
            finest=self._finest,
            spread_over=self._flight.flights.spread_over(self.holder.source),
            outstanding=self._orders.outstanding(),
        )
        return orders, waiting, missing

    def _fetchable(self, missing: dict[str, str], limit: int) -> dict[str, list[str]]:
        """Return what of *missing* may be asked for now, by series."""
        fetchable: dict[str, list[str]] = {}
        for uid, series in missing.items():
            if uid in self._refused or self._orders.cover(series, uid):
                continue
            if self._attempts.get(uid, 0) < limit:
                fetchable.setdefault(series, []).append(uid)
        return fetchable

    def _units_for(self, subscription: Subscription) -> list[str]:
        """Return what has to be fetched whole: Series Instance UIDs, or "" for the study."""
        if subscription.selection.level is Level.SERIES:
            return sorted(subscription.selection.series_instance_uids - subscription.exclude_series)
        series = set(self.manifest.series) if self.manifest is not None else set()
        if subscription.satisfied or subscription.is_narrowed:
            # The rest is had from elsewhere; only series that are not are of interest.
            elsewhere = subscription.exclude_series | set(subscription.listed.values())
            return sorted(series - elsewhere)
        if series and any(self._orders.cover_series(uid) or uid in self._units for uid in series):
            return sorted(series)
        return [_WHOLE_STUDY]

    def _is_complete(self, key: str) -> bool:
        unit = self._units.get(key)
        return unit is not None and unit.complete

    def _for_selection(self, selection: Selection) -> list[RetrieveOrder]:
        return orders_for_selection(
            self._flight.study_instance_uid, selection, patient_id=self.holder.patient_id
        )

    def _start(self, order: RetrieveOrder) -> None:
        order.wanted = self._flight.is_wanted
        running = Running(order, selection_of(order), self.holder.source)
        self._orders.append(running)
        self._flight.asked.add(self.name)
        if order.level is Level.STUDY:
            self._units.setdefault(_WHOLE_STUDY, Unit())
        elif order.level is Level.SERIES:
            for uid in order.series_instance_uids:
                self._units.setdefault(uid, Unit())
        running.task = self._flight.flights.spawn(self._run(running), f"order:{self.name}")

    async def _run(self, running: Running) -> None:
        order = running.order
        started = asyncio.get_running_loop().time()
        if self._stalled:
            order.last_activity = started  # no tape is waited for a second time
        failure: Failure | None = None
        final: RetrieveProgress | None = None
        self._flight.flights.order_started(self.name, order)
        at_once = len(self._flight.flights.orders(self.name))
        try:
            async with closing(running.source.retrieve(order)) as steps:
                async for progress in steps:
                    running.progress = progress
                    self._flight.changed()
                    if progress.final:
                        final = progress
        except SourceError as error:
            failure = error.failure
        except Exception as error:
            _log.error("flight_failed", source=self.name, **error_fields(error))
            failure = Failure.PROTOCOL
        finally:
            at_once = max(at_once, len(self._flight.flights.orders(self.name)))
            self._flight.flights.order_ended(self.name, order)
            self._orders.remove(running)
        self._flight.flights.pace(self.name).observe(
            len(running.arrived),
            asyncio.get_running_loop().time() - started,
            running.source.round_trip_seconds,
            at_once,
        )
        if self._flight.closed:
            return  # nobody waits for what it was short of
        try:
            self._ended(running, failure, final)
        except Exception as error:  # a fault of ours; nobody may wait for ever
            _log.error("flight_failed", source=self.name, **error_fields(error))
            self._gave_up = True
            self._flight.wake()

    def _ended(
        self, running: Running, failure: Failure | None, final: RetrieveProgress | None
    ) -> None:
        order = running.order
        self._fetched = self._fetched or bool(running.arrived) or failure is None
        if failure is None and final is None:
            failure = Failure.PROTOCOL
        whole = failure is None and brought_what_it_says(running, final)
        keys = order.series_instance_uids if order.level is not Level.STUDY else (_WHOLE_STUDY,)
        if order.level is not Level.IMAGE:
            for key in keys:
                unit = self._units.setdefault(key, Unit())
                unit.attempts += 1
                unit.complete = unit.complete or whole
        if failure in HOPELESS:
            self._gave_up = True
            self._unreachable = failure
        elif failure is Failure.TIMEOUT:
            self._stalled = True
        refused = was_refused(running, failure, final)
        if refused and self._finest is not Level.STUDY:
            # Perhaps it takes no UID lists, or nothing below a study. No attempt
            # is counted: each level can be found out about but once.
            self._finest = Level.SERIES if order.level is Level.IMAGE else Level.STUDY
            self._flight.wake()
            return
        if not self.verified and order.level is not Level.IMAGE:
            self._unsettled.append(running)  # what it should have brought will be known later
        missing = self._settle(running)
        if failure is not None:
            self._failed_at = asyncio.get_running_loop().time()
        if failure is not None or missing:
            _log.warning(
                "flight_incomplete",
                source=self.name,
                study_instance_uid=self._flight.study_instance_uid,
                query_level=str(order.level),
                failure=str(failure) if failure is not None else None,
                status=final.status if final is not None else None,
                arrived=len(running.arrived),
                missing=missing if self.verified else None,
            )
        self._flight.wake()

    def _settle(self, running: Running) -> int:
        """Count an attempt for whatever *running* should have brought; how much it did not."""
        expected: set[str] = set(running.order.sop_instance_uids)
        if self.verified and self.manifest is not None:
            expected |= set(self.manifest.listed(running.selection))
        lacking = expected - running.arrived
        for uid in lacking:
            self._attempts[uid] = self._attempts.get(uid, 0) + 1
        held = self._flight.lease.instances
        return sum(1 for uid in lacking if uid not in held)

    def stop(self) -> None:
        """Cancel every order at the holder."""
        self._orders.cancel()

    def leave(self) -> list[asyncio.Task[None]]:
        """Cancel what is still to bring anything, and return the tasks that end so."""
        manifest = self.manifest if self.verified else None
        done = [one for one in self._orders if has_brought_all(one, manifest, self._refused)]
        for running in done:
            if running.task is not None:
                self._flight.flights.spawn(final_response(running.task), f"final:{self.name}")
        return self._orders.cancel(done)

    def again(self, sop_instance_uid: str) -> None:
        """Allow an instance to be asked for again: what came was damaged since."""
        self._attempts.pop(sop_instance_uid, None)

    def stored(self, instance: CachedInstance) -> None:
        """Note that an instance has come from this holder."""
        uid = instance.sop_instance_uid
        # Said at once: all may be here before the order's final response is.
        self._fetched = True
        for running in self._orders:
            if running.selection.covers(instance.series_instance_uid, uid):
                running.arrived.add(uid)
                running.order.arrived += 1
                if Level.IMAGE not in (running.order.level, self._finest):
                    # What it refused is known for certain, now that it took something
                    # coarser. The flight may be over before the order is.
                    now = asyncio.get_running_loop().time()
                    self._flight.flights.pace(self.name).refuses_below(self._finest, now)

    def refused(self, sop_instance_uid: str, reason: str) -> None:
        """Note that an instance came and was not let in: it is not waited for again."""
        self._refused[sop_instance_uid] = reason

    def _load(self, likely: Collection[str] = ()) -> None:
        self._fetched = False
        self.catalogue.load(self.holder.source, likely)

    def _listed(self, failure: Failure | None) -> None:
        """Go by a manifest that has come, or by why none has."""
        catalogue = self.catalogue
        if failure is not None and catalogue.manifest is None:
            self._unreachable = failure
        elif failure is not None:
            self._tell_unverified("unreachable")
        elif not catalogue.conflict:
            for running in self._unsettled if catalogue.verified else ():
                self._settle(running)
            self._unsettled.clear()

    def _tell_unverified(self, reason: str) -> None:
        if not self._told_unverified:
            self._told_unverified = True
            _log.warning(
                "manifest_unverified",
                source=self.name,
                study_instance_uid=self._flight.study_instance_uid,
                reason=reason,
            )
