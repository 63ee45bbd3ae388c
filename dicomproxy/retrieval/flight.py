"""A flight: one study being fetched, for however many wait for it.

What has come is one list, in order; each subscriber reads it at its own pace,
so that a slow one holds up nobody, and whether an instance is for a subscriber
is decided when it reads: it was asked for, it is still held, and it came from a
source that this caller may see. The patient agreed on is the local one. One walk
for each subscriber leads it from holder to holder; what two walks want of the
same holder is claimed once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import TYPE_CHECKING, Any, Final

from dicomproxy.dataset.header import HeaderError, Read, read_header
from dicomproxy.dataset.levels import Level
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.reports import report_conflict, report_unresolved
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    CachedInstance,
    CrossReferenceError,
    Refused,
    Source,
    Stored,
    StudyLease,
)
from dicomproxy.retrieval.holder import Holder, Standing
from dicomproxy.retrieval.leg import Leg
from dicomproxy.retrieval.persons import Persons
from dicomproxy.retrieval.selection import Selection
from dicomproxy.retrieval.subscription import FlightOutcome, FlightRequest, Subscription
from dicomproxy.tasks import TaskOwner

if TYPE_CHECKING:
    from dicomproxy.retrieval.flights import Flights, FlightSettings

_log = get_logger()

_HEAD_BYTES: Final = (64 * 1024, 4 * 1024 * 1024)


class Flight:
    """One study under way; made, opened and closed by :class:`~.flights.Flights`."""

    def __init__(self, flights: Flights, study_instance_uid: str, settings: FlightSettings) -> None:
        self.flights = flights
        self.study_instance_uid = study_instance_uid
        self.settings = settings
        self.patient_id = ""
        """The local patient agreed on."""
        self.persons = Persons()
        self.lease: StudyLease
        self.asked: set[str] = set()
        self.log: list[CachedInstance] = []
        self.initial: frozenset[str] = frozenset()
        self.was_complete = False
        self.doubtful: set[str] = set()
        self._taken_back: set[str] = set()
        """Instances let in whose patient is still being found out; for any thread."""
        self.gone: set[str] = set()
        """Instances dropped because their source no longer lists them."""
        self.subscriptions: list[Subscription] = []
        self.closed = False
        self.ending: asyncio.Task[None] | None = None
        self._owner = TaskOwner(f"flight:{study_instance_uid}")
        self._opening: asyncio.Task[None] | None = None
        self._opened = False
        self._legs: dict[str, Leg] = {}
        self._vouched: dict[str, set[str]] = {}
        self._latest: dict[str, int] = {}

    def __repr__(self) -> str:
        return (
            f"<Flight {self.study_instance_uid} {len(self.subscriptions)} subscribed,"
            f" {len(self.log)} arrived>"
        )

    def spawn(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that ends with the flight at the latest."""
        return self._owner.spawn(coro, name=name)

    # ------------------------------------------------------------ lifetime

    async def open(self) -> None:
        """Lease the study and see whose it is; once, for all who come meanwhile.

        Raises:
            OSError: the store does not work.
        """
        if self._opening is None:
            self._opening = self.spawn(self._open(), "open")
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        lease = await self.flights.store.lease(self.study_instance_uid)
        self.lease = lease
        self._opened = True
        lease.touch()
        if not await self._cached_patient_agrees():
            report_conflict("cache", "patient_changed", study_instance_uid=self.study_instance_uid)
            await self._drop()
        for instance in list(self.lease.instances.values()):
            self._append(instance)
        self.initial = frozenset(self._latest)
        self.was_complete = self.lease.complete and bool(self.initial)

    async def _cached_patient_agrees(self) -> bool:
        """Read the header of one held instance of each source.

        The store keeps no patient, so that only the instances themselves can
        say whose study this was when it was fetched.
        """
        seen: set[str] = set()
        for instance in list(self.lease.instances.values()):
            if not self.patient_id or instance.source in seen:
                continue
            try:
                patient_id = await self._patient_of(instance)
            except (OSError, Refused):
                continue  # found out, and fetched again, when it is to be delivered
            except CrossReferenceError:
                continue  # asked again when it is to be delivered
            except IdentityUnresolved as unresolved:
                report_unresolved(
                    instance.source, unresolved, study_instance_uid=self.study_instance_uid
                )
                return False
            if patient_id is None or not self.agrees(patient_id):
                return False
            seen.add(instance.source)
        return True

    async def _patient_of(self, instance: CachedInstance) -> str | None:
        """Return the local ID of the patient in an instance's header, None if it has no end.

        Raises:
            IdentityUnresolved, CrossReferenceError: there is no one local ID, or no telling.
        """
        reader = await self.flights.store.open(instance)
        try:
            for limit in _HEAD_BYTES:
                head = bytearray(min(limit, reader.size))
                count = await reader.read_into([memoryview(head)], 0)
                try:
                    header = read_header(
                        _reading(bytes(head[:count])), instance.transfer_syntax_uid
                    )
                except HeaderError:
                    continue
                named = self.persons.of_header(header, instance.source)
                return await self.local_id(named, instance.source)
            return None
        finally:
            await reader.close()

    async def close(self) -> None:
        """Cancel what is under way at every holder and give the study back."""
        self.closed = True
        orders = [task for leg in self._legs.values() for task in leg.leave()]
        await self._owner.close()  # whoever still listens hears of it as its walk ends
        if orders:
            await asyncio.wait(orders)
        if self._opened:
            self.lease.release()

    def may_ask(self, sources: Collection[Source]) -> bool:
        """Tell whether any of *sources* serves this flight."""
        return any(leg.uses(sources) for leg in self._legs.values())

    def subscribe(self, request: FlightRequest) -> Subscription:
        """Add a subscriber; it counts from now on, its walk begins with :meth:`begin`."""
        if not self.patient_id:
            self.patient_id = request.patient_id
        # The latest ones stand: after a reload, others may be asked who somebody is.
        self.persons = request.persons
        subscription = Subscription(self, request)
        self.subscriptions.append(subscription)
        return subscription

    def begin(self, subscription: Subscription) -> None:
        """Let a subscriber have what is held, and fetch what is not."""
        subscription.begin(len(self.log))
        if subscription.patient_id and not self.agrees(subscription.patient_id):
            first = next((holder.name for holder in subscription.holders), "cache")
            report_conflict(first, "request_disagrees", study_instance_uid=self.study_instance_uid)
            subscription.visible = frozenset()
            subscription.outcome = FlightOutcome(complete=False)
            return
        self._walk_again(subscription)

    def unsubscribe(self, subscription: Subscription) -> bool:
        """Remove a subscriber; True if it was the last one."""
        walk = subscription.walk
        if self.settings.finish_abandoned and walk is not None and not walk.done():
            subscription.abandoned = True
            self.flights.let_others_go_on()
            return False
        if walk is not None:
            walk.cancel()
        self.subscriptions.remove(subscription)
        self.flights.let_others_go_on()
        return not self.subscriptions

    def is_wanted(self) -> bool:
        """Tell whether anybody waits for what is fetched."""
        return any(not subscription.abandoned for subscription in self.subscriptions)

    # ------------------------------------------------------------- the walk

    def _walk_again(self, subscription: Subscription) -> None:
        subscription.outcome = None
        # At once: what is cached must not go out before it is known that somebody is asked.
        for holder in subscription.holders:
            self._leg(holder).prepare(subscription.selection.series_instance_uids)
        walk = self.spawn(self._walk(subscription), "walk")
        walk.add_done_callback(lambda ended: self._walked(subscription, ended))
        subscription.walk = walk

    def _walked(self, subscription: Subscription, walk: asyncio.Task[None]) -> None:
        if subscription.walk is not walk:
            return
        if subscription.outcome is None:  # crashed; whoever waits must not wait for ever
            subscription.outcome = FlightOutcome(complete=False)
        subscription.news.set()
        if subscription.abandoned and subscription in self.subscriptions:
            self.subscriptions.remove(subscription)
            if not self.subscriptions:
                self.flights.abandoned(self)

    async def _walk(self, subscription: Subscription) -> None:
        """Go from holder to holder until nothing more can be had for *subscription*."""
        standings: dict[str, Standing] = {}
        legs = [self._leg(holder) for holder in subscription.holders]
        for leg in legs:
            leg.prepare(subscription.selection.series_instance_uids)
        self.relist()
        for number, leg in enumerate(legs):
            last = number == len(legs) - 1
            standing = await leg.serve(subscription, last=last)
            standings[leg.name] = standing
            if standing in (Standing.PROVEN, Standing.ASSUMED):
                subscription.satisfied = True
        # What was handed out and is gone since, and listed nowhere, is nobody's failure.
        also = {uid: at for uid, at in subscription.also.items() if uid not in self.gone}
        failed = tuple(
            uid
            for uid, series in {**subscription.listed, **also}.items()
            if not subscription.is_excluded(series, uid) and not self.available(subscription, uid)
        )
        for leg in legs:
            if leg.blamed and standings[leg.name] in (Standing.SHORT, Standing.UNREACHABLE):
                listed = leg.manifest.listed(Selection()) if leg.manifest is not None else {}
                lacking = {uid: listed[uid] for uid in failed if uid in listed}
                reached = standings[leg.name] is not Standing.UNREACHABLE
                self.flights.pause(self.study_instance_uid, leg.name, lacking, reached=reached)
        found = set(standings.values())
        absent = found <= {Standing.ABSENT}
        complete = subscription.satisfied or absent
        try:
            if subscription.satisfied and not failed:
                await self._mark_complete(subscription, standings)
            elif self.lease.complete and any(uid not in self.lease.instances for uid in failed):
                await self.lease.set_complete(False)
        except Exception as error:  # a disk that fails now takes nothing from what was delivered
            _log.error(
                "cache_degraded",
                study_instance_uid=self.study_instance_uid,
                **error_fields(error),
            )
        if any(
            uid not in failed and uid not in self.gone and not self.available(subscription, uid)
            for uid in subscription.also
        ):
            # Found damaged after it had been decided that nothing more is to be had.
            await self._walk(subscription)
            return
        subscription.pending.clear()
        subscription.outcome = FlightOutcome(
            failed=failed,
            complete=complete,
            reached=not found <= {Standing.UNREACHABLE, Standing.ABSENT} or absent,
            held=not absent,
        )
        subscription.changed()

    async def _mark_complete(
        self, subscription: Subscription, standings: dict[str, Standing]
    ) -> None:
        """Tell the store whether it holds the whole study now."""
        held = self.lease.instances
        manifests = [leg.manifest for leg in self._legs.values() if leg.verified]
        whole = bool(manifests) and all(
            uid in held
            for manifest in manifests
            if manifest is not None
            for instances in manifest.series.values()
            for uid in instances
        )
        if not manifests:
            whole = subscription.selection.level is Level.STUDY and not subscription.is_narrowed
        elif not any(standing is Standing.PROVEN for standing in standings.values()):
            return
        if whole != self.lease.complete:
            await self.lease.set_complete(whole)

    def _leg(self, holder: Holder) -> Leg:
        leg = self._legs.get(holder.name)
        if leg is None:
            paused = self.flights.paused(self.study_instance_uid, holder.name)
            leg = self._legs[holder.name] = Leg(self, holder, paused)
        # The latest one stands: after a reload, what the first came by is soon closed.
        leg.holder = holder
        return leg

    # --------------------------------------------------------- what is held

    def agrees(self, patient_id: str) -> bool:
        """Tell whether *patient_id* may be the patient agreed on; unknown ones may.

        The first one that is named is agreed on if there was none.
        """
        if patient_id and not self.patient_id:
            self.patient_id = patient_id
        return not patient_id or patient_id == self.patient_id

    async def local_id(self, patient: PatientId | None, source: str) -> str:
        """Return the local ID of a patient that *source* names, empty for nobody.

        Raises:
            IdentityUnresolved, CrossReferenceError: there is no one local ID, or no telling.
        """
        return "" if patient is None else await self.persons.here(patient, source)

    def available(self, subscription: Subscription, sop_instance_uid: str) -> bool:
        """Tell whether an instance is held and may be given to this subscriber."""
        instance = self.lease.instances.get(sop_instance_uid)
        if instance is None or sop_instance_uid in self.doubtful | self._taken_back:
            return False
        if instance.source in subscription.visible:
            return True
        # The same bytes came from a source that this caller may see.
        return not subscription.visible.isdisjoint(self._vouched.get(sop_instance_uid, ()))

    def is_judging(self, source: str) -> bool:
        """Tell whether *source* is still to say whose study it has."""
        leg = self._legs.get(source)
        return leg is not None and leg.is_listing and not leg.catalogue.is_judged

    def conflicts(self, source: str) -> bool:
        """Tell whether *source* has said that its study is not that of the patient."""
        leg = self._legs.get(source)
        return leg is not None and leg.catalogue.conflict

    def tell(self) -> None:
        """Have every subscriber look again."""
        for subscription in self.subscriptions:
            subscription.news.set()

    def source_of(self, subscription: Subscription, instance: CachedInstance) -> str:
        """Return the source from which this subscriber is given an instance."""
        if instance.source in subscription.visible:
            return instance.source
        vouched = self._vouched.get(instance.sop_instance_uid, set())
        return next(iter(sorted(vouched & subscription.visible)), instance.source)

    def was_whole_for(self, subscription: Subscription) -> bool:
        """Tell whether the study was held whole when this began, and all may be given on."""
        return self.was_complete and all(
            self.available(subscription, uid) for uid in list(self.lease.instances)
        )

    def best_total(self, subscription: Subscription) -> int:
        """Return how many instances are said to come, before any manifest is there."""
        legs = (self._legs.get(holder.name) for holder in subscription.holders)
        return max((leg.best_total() for leg in legs if leg is not None), default=0)

    def is_listing(self, subscription: Subscription) -> bool:
        """Tell whether any holder is still to say what it has."""
        legs = [self._legs.get(holder.name) for holder in subscription.holders]
        return any(leg is None or leg.is_listing for leg in legs)

    def relist(self) -> None:
        """Tell every subscriber what is known to exist for it."""
        for subscription in self.subscriptions:
            listed: dict[str, str] = {}
            for holder in subscription.holders:
                leg = self._legs.get(holder.name)
                if leg is None:
                    continue
                if leg.verified and leg.manifest is not None:
                    listed.update(leg.manifest.listed(subscription.selection))
                elif leg.paused_missing is not None:
                    listed.update(
                        (uid, series)
                        for uid, series in leg.paused_missing.items()
                        if subscription.selection.covers(series, uid)
                    )
                elif leg.manifest is not None and subscription.selection.level is Level.IMAGE:
                    series_uid = next(iter(subscription.selection.series_instance_uids), "")
                    for uid in subscription.selection.sop_instance_uids:
                        listed.setdefault(uid, series_uid)
            if subscription.is_narrowed:
                listed = {
                    uid: series
                    for uid, series in listed.items()
                    if not subscription.is_excluded(series, uid)
                }
            subscription.relist(listed)

    def wake(self) -> None:
        """Let every walk decide anew."""
        for subscription in self.subscriptions:
            subscription.wake.set()

    def changed(self) -> None:
        """Tell every subscriber that there is progress."""
        for subscription in self.subscriptions:
            subscription.changed()

    def count_hits(self, count: int) -> None:
        if count:
            self.flights.store.count_hits(count)

    def stored(self, source: str, stored: Stored, patient_id: str = "") -> None:
        """Take in an instance that *source* sent, whose header means local *patient_id*."""
        instance = stored.instance
        uid = instance.sop_instance_uid
        if not self.agrees(patient_id):
            # Two that contradict each other came before any patient was agreed on.
            report_conflict(
                source,
                "headers_disagree",
                study_instance_uid=self.study_instance_uid,
                sop_instance_uid=uid,
            )
            self.refused(source, uid, "identity_conflict")
            self.take_back(source, stored)
            return
        if stored.conflict:
            _log.warning(
                "instance_conflict",
                study_instance_uid=self.study_instance_uid,
                sop_instance_uid=uid,
                source=source,
                holder=instance.source,
            )
            if instance.source != source:
                self._refuse(source, uid, "conflict")
        self.gone.discard(uid)
        leg = self._legs.get(source)
        if leg is not None:
            leg.stored(instance)
        if not stored.duplicate and not stored.conflict:
            self.flights.store.count_misses(1)
        elif instance.source != source and not stored.conflict:
            self._vouched.setdefault(uid, set()).add(source)
        self._append(instance)
        for subscription in self.subscriptions:
            if uid in subscription.pending and self.available(subscription, uid):
                subscription.pending.discard(uid)
                if not subscription.pending:
                    subscription.wake.set()
            subscription.news.set()

    def take_back(self, source: str, stored: Stored) -> None:
        """Drop an instance that was let in and should not have been."""
        if stored.conflict or stored.instance.source != source:
            return  # what is held came from somebody else
        # Until it is gone it is nobody's: it must not pass for an instance that is there.
        self._taken_back.add(stored.instance.sop_instance_uid)
        self.spawn(self._remove(stored.instance.sop_instance_uid), "remove")

    async def _remove(self, sop_instance_uid: str) -> None:
        await self.lease.remove([sop_instance_uid])
        self._taken_back.discard(sop_instance_uid)

    def refused(self, source: str, sop_instance_uid: str, reason: str) -> None:
        """Note that an instance from *source* was not let in; it counts as Failed."""
        self._refuse(source, sop_instance_uid, reason)
        self.wake()

    def _refuse(self, source: str, sop_instance_uid: str, reason: str) -> None:
        leg = self._legs.get(source)
        if leg is not None:
            leg.refused(sop_instance_uid, reason)

    def lists(self, source: str, sop_instance_uid: str) -> bool:
        """Tell whether *source* is known to hold that instance in this study."""
        leg = self._legs.get(source)
        return leg is not None and leg.catalogue.lists(sop_instance_uid)

    def _append(self, instance: CachedInstance) -> None:
        self._latest[instance.sop_instance_uid] = len(self.log)
        self.log.append(instance)

    # ------------------------------------------------------- what is dropped

    async def remove(self, sop_instance_uids: list[str]) -> None:
        """Drop instances that their source no longer has."""
        _log.info(
            "study_shrunk",
            study_instance_uid=self.study_instance_uid,
            dropped=len(sop_instance_uids),
        )
        self.gone.update(sop_instance_uids)
        await self.lease.remove(sop_instance_uids)

    async def replace(
        self, subscription: Subscription, sop_instance_uid: str, *, newer_than: int
    ) -> None:
        """Fetch a damaged instance anew, unless that has been done already."""
        # The store may have dropped it already; then another copy may be coming.
        held = sop_instance_uid in self.lease.instances
        if held and self._latest.get(sop_instance_uid, -1) < newer_than:
            await self.lease.remove([sop_instance_uid])
        for leg in self._legs.values():
            leg.again(sop_instance_uid)
        if subscription.walk is not None and subscription.walk.done():
            self._walk_again(subscription)
        else:
            subscription.wake.set()

    async def patient_changed(self, source: str, patient: PatientId | None) -> None:
        """Drop the study: *source* says that it is another patient's than was agreed.

        Args:
            patient: whom it names, as it names them.
        """
        report_conflict(source, "patient_changed", study_instance_uid=self.study_instance_uid)
        self.asked.discard(source)
        self._legs[source].stop()
        usual = self.persons.usual_id(patient, source)
        self.flights.seen(self.study_instance_uid, source, usual)
        await self._drop()

    async def contradicted(self, source: str) -> None:
        """Drop what came from *source*, which describes the patient as somebody else."""
        self.asked.discard(source)
        self._legs[source].stop()
        held = list(self.lease.instances.values())
        await self.lease.remove([one.sop_instance_uid for one in held if one.source == source])

    def not_held(self, source: str) -> None:
        """Forget that *source* holds the study."""
        self.flights.unseen(self.study_instance_uid, source)

    async def _drop(self) -> None:
        store = self.flights.store
        await store.drop(self.study_instance_uid)
        dropped, self.lease = self.lease, await store.lease(self.study_instance_uid)
        dropped.release()
        self.was_complete = False
        self._vouched.clear()


def _reading(held: bytes) -> Read:
    return lambda offset, size: held[offset : offset + size]
