"""From a flight to one destination.

An :class:`Outlet` is one request's way to its destination, opened when the
first instance is there and shared by the deliveries of its studies, one
instance at a time. A delivery never holds up a flight: what it has not sent yet
waits in the store, as its source has sent it; it becomes local on its way out.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tallies
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter

from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    CachedInstance,
    Delivered,
    Destination,
    DestinationError,
    Failure,
    InstanceReader,
    InstanceStore,
    Refused,
)
from dicomproxy.retrieval.localize import Localizer, Withheld
from dicomproxy.retrieval.subscription import FlightOutcome, Subscription
from dicomproxy.retrieval.tally import (
    NUMBER_OF_MATCHES_UNKNOWN,
    SUB_OPERATIONS_FAILED,
    Part,
)
from dicomproxy.tasks import TaskOwner

_log = get_logger()

_CLOSE_SECONDS: Final = 10.0
_OPEN_AHEAD: Final = 4
_MAY_BE_OCCUPIED: Final = frozenset({Failure.TIMEOUT, Failure.BUSY})

_SUB_OPERATIONS = Counter(
    "dicomproxy_suboperations_total", "Instances delivered, by outcome.", ["outcome"]
)
_BYTES = Counter("dicomproxy_delivered_bytes_total", "Data set bytes delivered.")


class Outlet:
    """One request's destination.

    Args:
        open: makes the destination; it may raise DestinationError.
        ae_title: of the destination, for logs.
    """

    def __init__(self, open: Callable[[], Destination], ae_title: str) -> None:
        self._open = open
        self._ae_title = ae_title
        self._destination: Destination | None = None
        self._turn = asyncio.Lock()
        self._expected: dict[tuple[str, str], None] = {}
        self.lost: DestinationError | None = None
        self.stopped = False
        self.was_open = False
        """The destination has had an association of ours, or was asked for one."""
        self.occupied: asyncio.Event | None = None
        """Set once whoever else sends to the same destination has ended."""

    def expect(self, pairs: dict[tuple[str, str], None]) -> None:
        """Say which SOP Classes will be sent, in which transfer syntaxes; see the port."""
        self._expected |= pairs
        if self._destination is not None:
            self._destination.expect(pairs)

    async def send(
        self, instance: CachedInstance, ahead: Ahead, localizer: Localizer
    ) -> Delivered | None:
        """Deliver an instance in its turn; None if the outlet is lost or stopped.

        Raises:
            FileNotFoundError, Refused: the store does not hold it whole any more.
            Withheld: it is not for this destination.
        """
        async with self._turn:
            if self.stopped or self.lost is not None:
                return None
            reader = await ahead.open(instance)
            try:
                return await self._deliver(instance, await localizer.open(instance, reader))
            except DestinationError as error:
                self.lost = error
                _log.warning(
                    "delivery_failed",
                    destination_ae_title=self._ae_title,
                    failure=str(error.failure),
                )
                return None
            finally:
                await reader.close()

    async def _deliver(self, instance: CachedInstance, reader: InstanceReader) -> Delivered:
        if self._destination is None:
            self._destination = self._open()
            self.was_open = True
            self._destination.expect(self._expected)
        try:
            return await self._destination.deliver(instance, reader)
        except DestinationError as error:
            occupied, self.occupied = self.occupied, None
            if occupied is None or error.failure not in _MAY_BE_OCCUPIED:
                raise
            # The local PACS sends to it meanwhile, and it takes one association at a time.
            _log.info("delivery_waits", destination_ae_title=self._ae_title)
            await occupied.wait()
            return await self._destination.deliver(instance, reader)

    async def close(self) -> None:
        """Let the destination go, until something is sent again. Never raises."""
        destination, self._destination = self._destination, None
        if destination is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await destination.close()
        except Exception as error:
            _log.warning(
                "destination_close_failed",
                destination_ae_title=self._ae_title,
                **error_fields(error),
            )


class Ahead:
    """Opens the next instances of a study, a few together, while one is being sent.

    Args:
        head_bytes: of each, which are wanted before any of it is sent.
    """

    def __init__(
        self, subscription: Subscription, store: InstanceStore, head_bytes: int = 0
    ) -> None:
        self._subscription = subscription
        self._store = store
        self._head_bytes = head_bytes
        self._owner = TaskOwner("ahead")
        self._opening: asyncio.Task[None] | None = None
        self._wanted: dict[str, CachedInstance] = {}
        self._open: dict[str, tuple[CachedInstance, InstanceReader]] = {}
        self._closed = False

    async def open(self, instance: CachedInstance) -> InstanceReader:
        """Return a reader for *instance*, and see to those that come after it.

        Raises:
            FileNotFoundError, Refused: as :meth:`InstanceStore.open`.
        """
        uid = instance.sop_instance_uid
        if self._opening is not None and self._wanted.get(uid) is instance:
            await asyncio.wait([self._opening])
        opened = self._open.pop(uid, None)
        if opened is not None and opened[0] is not instance:
            # Fetched again since.
            await opened[1].close()
            opened = None
        reader = opened[1] if opened is not None else await self._store.open(instance)
        if self._opening is None and (opened is None or len(self._open) <= _OPEN_AHEAD // 2):
            await self._look()
        return reader

    async def _look(self) -> None:
        upcoming = self._subscription.upcoming(_OPEN_AHEAD)
        coming = {one.sop_instance_uid for one in upcoming}
        for uid in [uid for uid in self._open if uid not in coming]:
            # Passed over: removed since it was opened, or had from elsewhere.
            await self._open.pop(uid)[1].close()
        # An instance that came twice is there twice; the later one is what is held.
        self._wanted = {
            one.sop_instance_uid: one for one in upcoming if one.sop_instance_uid not in self._open
        }
        if self._wanted:
            wanted = list(self._wanted.values())
            self._opening = self._owner.spawn(self._open_wanted(wanted), name="open")

    async def _open_wanted(self, wanted: list[CachedInstance]) -> None:
        try:
            readers = await self._store.open_several(wanted, self._head_bytes)
        finally:
            self._opening = None
            self._wanted = {}
        for instance, reader in zip(wanted, readers, strict=True):
            if reader is None:
                continue
            if self._closed or instance.sop_instance_uid in self._open:
                await reader.close()
            else:
                self._open[instance.sop_instance_uid] = (instance, reader)

    async def close(self) -> None:
        """Let go of what was opened in vain."""
        self._closed = True
        opened, self._open = list(self._open.values()), {}
        try:
            for _, reader in opened:
                await reader.close()
        finally:
            await self._owner.close()


@dataclass(slots=True)
class DeliveryReport:
    """What one study's delivery came to; numbers of instances by source for the audit."""

    delivered: Tallies[str] = field(default_factory=Tallies)
    failed: Tallies[str] = field(default_factory=Tallies)
    delivered_bytes: int = 0
    outcome: FlightOutcome | None = None


async def deliver_study(
    subscription: Subscription,
    outlet: Outlet,
    store: InstanceStore,
    part: Part,
    report: DeliveryReport,
    progressed: Callable[[], None],
    localizer: Localizer,
) -> None:
    """Send what *subscription* yields, until it ends or the destination is lost.

    *part* and *report* are kept true all along, *progressed* is called after
    each change of *part*. A crash or cancellation leaves them as they are then.
    """

    def revise() -> None:
        before = part.remaining
        part.expect(subscription.expected)
        if part.remaining != before:
            progressed()

    subscription.on_change = revise
    revise()
    ahead = Ahead(subscription, store, localizer.head_bytes)
    told: set[tuple[str, str]] = set()
    try:
        async for item in subscription:
            if isinstance(item, FlightOutcome):
                _conclude(item, subscription, part, report)
                progressed()
                return
            if (pair := (item.sop_class_uid, item.transfer_syntax_uid)) not in told:
                pairs = {pair: None, **subscription.pairs()}
                told.update(pairs)
                outlet.expect(pairs)
            sent = await _send(item, subscription, outlet, ahead, localizer)
            if sent is None:
                if outlet.lost is None:
                    if outlet.stopped:
                        # Not sent, so still remaining.
                        report.outcome = FlightOutcome(stopped=True)
                        return
                    continue  # it will come again, in one piece
                # Instances come before all are listed, and each one is to be counted.
                await subscription.until_listed()
                _lose(item, subscription, part, report)
                progressed()
                return
            part.add(sent, item.sop_instance_uid)
            part.expect(subscription.expected)
            _SUB_OPERATIONS.labels(str(sent)).inc()
            if sent is Delivered.FAILED:
                report.failed[item.source] += 1
            else:
                report.delivered[item.source] += 1
                report.delivered_bytes += item.size
                _BYTES.inc(item.size)
            progressed()
    finally:
        subscription.on_change = None
        await ahead.close()


async def _send(
    instance: CachedInstance,
    subscription: Subscription,
    outlet: Outlet,
    ahead: Ahead,
    localizer: Localizer,
) -> Delivered | None:
    """Deliver one instance; None if it was to be fetched again, once, and comes later.

    That is done for one that is damaged, and for a cached one that is not the patient's.
    """
    try:
        await localizer.ready(instance)
        return await outlet.send(instance, ahead, localizer)
    except Withheld as withheld:
        uid = instance.sop_instance_uid
        again = withheld.may_be_outdated and subscription.was_cached(uid)
        # Its source may have corrected it since it was cached.
        again = again and await subscription.replace(instance)
        _log.warning(
            "instance_withheld",
            study_instance_uid=instance.study_instance_uid,
            sop_instance_uid=uid,
            source=instance.source,
            reason=withheld.reason,
            result="fetched_again" if again else "failed",
        )
        return None if again else Delivered.FAILED
    except (FileNotFoundError, Refused):
        again = await subscription.replace(instance)
        if again and subscription.is_gone(instance.sop_instance_uid):
            return None  # dropped meanwhile: it comes only from a holder that still has it
        _log.warning(
            "instance_damaged",
            study_instance_uid=instance.study_instance_uid,
            sop_instance_uid=instance.sop_instance_uid,
            source=instance.source,
            result="fetched_again" if again else "failed",
        )
        return None if again else Delivered.FAILED
    except Exception as error:
        _log.error(
            "instance_not_delivered",
            study_instance_uid=instance.study_instance_uid,
            sop_instance_uid=instance.sop_instance_uid,
            **error_fields(error),
        )
        return Delivered.FAILED


def _conclude(
    outcome: FlightOutcome, subscription: Subscription, part: Part, report: DeliveryReport
) -> None:
    report.outcome = outcome
    if outcome.stopped:
        return
    before = part.failed
    part.fail(outcome.failed)
    missed = part.failed - before
    _SUB_OPERATIONS.labels(str(Delivered.FAILED)).inc(missed)
    if missed:
        holder = subscription.holders[0].name if subscription.holders else ""
        report.failed[holder] += missed
    part.expect(part.done)
    if not outcome.complete:
        part.failure = SUB_OPERATIONS_FAILED if outcome.reached else NUMBER_OF_MATCHES_UNKNOWN


def _lose(
    instance: CachedInstance, subscription: Subscription, part: Part, report: DeliveryReport
) -> None:
    """Count as Failed what the destination will not get, known to exist or about to come."""
    before = part.failed
    part.failure = SUB_OPERATIONS_FAILED
    part.fail([instance.sop_instance_uid])
    part.fail(uid for uid in subscription.undelivered())
    part.expect(subscription.expected)
    part.fail_remaining()
    _SUB_OPERATIONS.labels(str(Delivered.FAILED)).inc(part.failed - before)
    report.failed[instance.source] += part.failed - before
