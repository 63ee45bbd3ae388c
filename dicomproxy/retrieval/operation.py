"""One C-MOVE or C-GET, from located studies to the final status.

The local part of a C-MOVE, under relay, is left to the local PACS, which is
told to send to the workstation itself; what it lacks is fetched from elsewhere
and delivered by us. Both run at once and their counts add up. Rules kept: every
disclosure is recorded before the outcome is returned, and whichever way the
operation ends, no flight is left joined and no association open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dicomproxy.dataset.levels import Level
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    LOCAL,
    Caller,
    Destination,
    Originator,
    SourceError,
)
from dicomproxy.retrieval.delivery import Outlet, deliver_study
from dicomproxy.retrieval.disclosure import Disclosure, Relayed, disclosure_events
from dicomproxy.retrieval.localize import Localizer
from dicomproxy.retrieval.locate import LocatedStudy
from dicomproxy.retrieval.manifest import Manifest, load_manifest
from dicomproxy.retrieval.relay import Relay
from dicomproxy.retrieval.request import RetrieveRequest
from dicomproxy.retrieval.selection import Selection
from dicomproxy.retrieval.subscription import FlightRequest, Subscription
from dicomproxy.retrieval.tally import (
    CANCELLED,
    DESTINATION_UNKNOWN,
    NUMBER_OF_MATCHES_UNKNOWN,
    SUB_OPERATIONS_FAILED,
    UNABLE_TO_PROCESS,
    WARNING,
    Counts,
    Part,
    Tally,
    final_status,
)
from dicomproxy.tasks import OwnerClosed

if TYPE_CHECKING:
    from dicomproxy.retrieval.coordinator import RetrieveCoordinator

_log = get_logger()

_PARALLEL_STUDIES: Final = 4
_AUDIT_SECONDS: Final = 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DestinationPlan:
    """Where instances are to go.

    ``known`` is False for a title that no workstation is configured with; then
    ``open`` is never called.
    """

    ae_title: str
    known: bool
    open: Callable[[], Destination]


@dataclass(frozen=True, slots=True)
class RetrieveOutcome:
    """What the final response says; the failed list may exceed what its VR can hold."""

    status: int
    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0
    failed_sop_instance_uids: tuple[str, ...] = ()
    error_comment: str = ""


class _Cancelled(Exception):
    """A C-CANCEL ended a step that was under way."""


class RetrieveOperation:
    """One retrieve; made by :meth:`RetrieveCoordinator.start`, then :meth:`run` once.

    ``tally`` is live, ``bytes`` counts data set bytes delivered by us,
    ``last_progress`` is the loop time of the last change. ``changed`` is called
    synchronously after each change of the tally.
    """

    def __init__(
        self,
        coordinator: RetrieveCoordinator,
        request: RetrieveRequest,
        *,
        caller: Caller,
        originator: Originator,
        destination: DestinationPlan,
        operation_id: str,
        local_calling_ae_title: str,
    ) -> None:
        self._coordinator = coordinator
        self.request = request
        self.caller = caller
        self.originator = originator
        self.destination = destination
        self.operation_id = operation_id
        self.tally = Tally()
        self.phase = "waiting"
        self.last_progress = asyncio.get_running_loop().time()
        self.changed: Callable[[], None] | None = None
        self._local_calling_ae_title = local_calling_ae_title
        self._outlet = Outlet(destination.open, destination.ae_title)
        self._cancelled = False
        self._subscriptions: set[Subscription] = set()
        self._steps: dict[asyncio.Task[Any], Callable[[], bool] | None] = {}
        self._disclosures: list[Disclosure] = []
        self._undelivered: set[str] = set()
        self._delivered = asyncio.Event()
        self._relay: Relay | None = None
        self._refusal: int | None = None
        self._slots = asyncio.Semaphore(_PARALLEL_STUDIES)

    @property
    def bytes(self) -> int:
        return sum(disclosure.report.delivered_bytes for disclosure in self._disclosures)

    @property
    def counts(self) -> Counts:
        """The counts of a Pending response."""
        return self.tally.counts

    def cancel(self) -> None:
        """End the operation as a C-CANCEL asks: the instance being sent is finished, no more.

        What the local PACS sends itself ends by its own final response.
        """
        self._cancelled = self._outlet.stopped = True
        for subscription in self._subscriptions:
            subscription.stop()
        for step, told_to_end in self._steps.items():
            if told_to_end is None or not told_to_end():
                step.cancel()

    async def run(self) -> RetrieveOutcome:
        """Carry the operation out. Cancelling it leaves nothing behind either."""
        status = UNABLE_TO_PROCESS
        try:
            try:
                await self._work()
                status = self._status()
            except _Cancelled:
                status = self._status()
            except asyncio.CancelledError:
                status = CANCELLED
                raise
            except Exception as error:
                # Nothing that a peer does ends here; a fault of ours must still be answered.
                _log.error("retrieve_failed", operation_id=self.operation_id, **error_fields(error))
            finally:
                self._phase("closing")
                await self._outlet.close()
        finally:
            await self._record(status)
            self._phase("done")
        counts = self.tally.counts
        return RetrieveOutcome(
            status=status,
            remaining=counts.remaining,
            completed=counts.completed,
            failed=counts.failed,
            warning=counts.warning,
            failed_sop_instance_uids=self.tally.failed_sop_instance_uids,
            error_comment=_COMMENTS.get(status, ""),
        )

    # ------------------------------------------------------------ the steps

    async def _work(self) -> None:
        coordinator = self._coordinator
        known = self.destination.known
        if not known and not coordinator.relay_local:
            self._refusal = DESTINATION_UNKNOWN
            return
        self._phase("locating")
        located = await self._interruptible(
            coordinator.locator.locate(self.request, self.caller), "locate"
        )
        relayed = [study for study in located.studies if study.local and coordinator.relay_local]
        ours = [
            study
            for study in located.studies
            if (study.remote_holders if study.local and coordinator.relay_local else study.holders)
        ]
        if not known:
            if not relayed or not await self._all_local(ours):
                self._refusal = DESTINATION_UNKNOWN
                return
            ours = []
        if located.unreachable and (located.not_found or self.request.level is Level.PATIENT):
            # There may be more, and nobody can tell how much.
            self.tally.part().failure = NUMBER_OF_MATCHES_UNKNOWN
        elif not located.withheld.isdisjoint(located.not_found):
            # Success would say that there is no such study.
            self.tally.part().failure = SUB_OPERATIONS_FAILED
        elif any(study.unidentified and not study.remote_holders for study in relayed):
            # The local PACS has it, somebody else may have more of it.
            self.tally.part().failure = NUMBER_OF_MATCHES_UNKNOWN
        self._phase("retrieving")
        self._undelivered = {study.study_instance_uid for study in ours}
        if not ours:
            self._delivered.set()
        async with asyncio.TaskGroup() as group:
            if relayed:
                self._relay = Relay(relayed, self.tally.part())
                self._outlet.occupied = self._relay.quiet
                group.create_task(self._run_relay(self._relay), name="relay")
            for study in ours:
                disclosure = Disclosure(study)
                self._disclosures.append(disclosure)
                group.create_task(self._guard(disclosure), name="study")
        if self._relay is not None and not self._relay.part.failed:
            left = {study.study_instance_uid for study in relayed} - self._relay.covered
            if not left:
                # Every study was had from elsewhere, whole as far as can be known.
                self._relay.part.failure = None
        if self._cancelled:
            raise _Cancelled

    async def _all_local(self, ours: list[LocatedStudy]) -> bool:
        """Tell whether the local PACS has all that other holders list of these studies."""
        selection = self.request.selection
        for study in ours:
            if not study.local:
                return False
            local = await self._interruptible(self._local_manifest(study), "manifest")
            if local is None:
                return False
            has = local.listed(selection)
            for holder in study.remote_holders:
                try:
                    theirs = await self._interruptible(
                        load_manifest(holder.source, study.study_instance_uid), "manifest"
                    )
                except SourceError:
                    return False
                if not theirs.listed(selection).keys() <= has.keys():
                    return False
        return True

    async def _run_relay(self, relay: Relay) -> None:
        """Have the local PACS send its part; whatever goes wrong with it stays with it."""
        try:
            await self._interruptible(self._relayed(relay), "relay", relay.cancel)
        except _Cancelled:
            pass
        except Exception as error:
            relay.break_off(error, self.operation_id)
        finally:
            relay.quiet.set()
            relay.ended.set()
        self._progressed()

    async def _relayed(self, relay: Relay) -> None:
        """Follow the local PACS; ask it again, once, if we were in its way.

        Many workstations serve one association at a time. The PACS gives up on
        one that is busy with ours, so that it is asked again when ours is over.
        """
        await self._follow(relay)
        relay.quiet.set()
        if relay.was_kept_out and self._outlet.was_open:
            await self._delivered.wait()
            _log.info(
                "local_retrieve_repeated",
                operation_id=self.operation_id,
                destination_ae_title=self.destination.ae_title,
                status=relay.status,
            )
            relay.begin_anew()
            await self._follow(relay)

    async def _follow(self, relay: Relay) -> None:
        await relay.follow(
            self._coordinator.local,
            self.request,
            self.originator,
            destination_ae_title=self.destination.ae_title,
            calling_ae_title=self._local_calling_ae_title,
            progressed=self._progressed,
        )

    # ------------------------------------------------------------ our part

    async def _guard(self, disclosure: Disclosure) -> None:
        """Deliver one study; whatever goes wrong with it stays with it."""
        part = self.tally.part()
        try:
            await self._study(disclosure, part)
        except _Cancelled:
            pass
        except Exception as error:
            part.fail_remaining()
            part.failure = UNABLE_TO_PROCESS
            _log.error(
                "retrieve_failed",
                operation_id=self.operation_id,
                study_instance_uid=disclosure.study.study_instance_uid,
                **error_fields(error),
            )
            self._progressed()
        finally:
            await self._delivered_all(disclosure.study)

    async def _delivered_all(self, study: LocatedStudy) -> None:
        """Note that nothing more of *study* is sent, unless the local PACS leaves something.

        After the last one the workstation is let go: the PACS may be waiting for it.
        """
        self._undelivered.discard(study.study_instance_uid)
        if self._undelivered or self._delivered.is_set():
            return
        if self._relay is not None and not self._relay.ended.is_set():
            await self._outlet.close()
        self._delivered.set()

    async def _study(self, disclosure: Disclosure, part: Part) -> None:
        study = disclosure.study
        relay = self._relay
        selection = self.request.selection
        async with self._slots:
            if self._cancelled:
                return
            if relay is None or not study.local:
                await self._deliver(disclosure, part, study.holders, selection)
                await self._elsewhere(disclosure, part)
                return
            local = await self._interruptible(self._local_manifest(study), "manifest")
            exclude = local.listed(selection) if local is not None else {}
            series = frozenset(local.series) if local is not None and not local.verified else None
            await self._deliver(disclosure, part, study.remote_holders, selection, exclude, series)
        if local is None:
            relay.covered.add(study.study_instance_uid)
            return
        await self._delivered_all(study)
        # Without a slot: the local PACS may wait for studies that have not had theirs yet.
        await relay.ended.wait()
        lacking = {
            uid: of
            for uid, of in exclude.items()
            if relay.broken or uid in relay.part.failed_sop_instance_uids
        }
        if not lacking:
            return
        async with self._slots:
            if not self._cancelled and self._outlet.lost is None:
                # What one holder could not deliver is asked of the next.
                await self._instead_of_local(disclosure, relay, lacking)

    async def _instead_of_local(
        self, disclosure: Disclosure, relay: Relay, lacking: dict[str, str]
    ) -> None:
        """Deliver what the local PACS listed and failed to send.

        Where it broke off, that is all it listed: a count is all it gave of what it
        had sent, and that an instance comes twice is better than that one is missing.
        """
        study = disclosure.study
        attempt = self.tally.part()
        selection = Selection(Level.IMAGE, frozenset(lacking.values()), frozenset(lacking))
        await self._deliver(disclosure, attempt, study.remote_holders, selection)
        outcome = disclosure.report.outcome
        if outcome is None or outcome.stopped:
            return
        if relay.broken:
            relay.part.overlap(attempt)
        else:
            relay.part.forgive(lacking)
        if attempt.done >= len(lacking) or not relay.broken:
            # Else: no other holder has these, so the local PACS's failure stands for them.
            relay.covered.add(study.study_instance_uid)

    async def _elsewhere(self, disclosure: Disclosure, part: Part) -> None:
        """Look for a study again that no remembered holder has any more, or can be asked for."""
        outcome = disclosure.report.outcome
        if outcome is None or outcome.stopped or part.done or self._cancelled:
            return
        if outcome.held and outcome.reached:
            return
        study = disclosure.study
        unreachable: set[str] = set()
        locator = self._coordinator.locator
        sources = locator.visible(self.caller)
        if outcome.held:
            asked = {holder.name for holder in study.holders}
            sources = tuple(source for source in sources if source.name not in asked)
        found = await self._interruptible(
            locator.ask(
                study.study_instance_uid,
                self.request.patient_id or study.patient_id,
                sources,
                unreachable,
            ),
            "locate",
        )
        if found is not None:
            disclosure.study = found
            part.failure = None
            await self._deliver(disclosure, part, found.holders, self.request.selection)
        elif unreachable:
            part.failure = NUMBER_OF_MATCHES_UNKNOWN

    async def _deliver(
        self,
        disclosure: Disclosure,
        part: Part,
        holders: tuple[Any, ...],
        selection: Selection,
        exclude: dict[str, str] | None = None,
        exclude_series: frozenset[str] | None = None,
    ) -> None:
        # What was cached from a holder that is left out must not come by this way either.
        visible = {source.name for source in self._coordinator.locator.visible(self.caller)}
        visible -= disclosure.study.left_out
        request = FlightRequest(
            study_instance_uid=disclosure.study.study_instance_uid,
            selection=selection,
            holders=holders,
            visible=frozenset(visible),
            patient_id=disclosure.study.patient_id,
            exclude=exclude or {},
            exclude_series=exclude_series or frozenset(),
            persons=self._coordinator.persons,
        )
        async with self._coordinator.flights.join(request) as subscription:
            self._subscriptions.add(subscription)
            if self._cancelled:
                subscription.stop()
            try:
                await deliver_study(
                    subscription,
                    self._outlet,
                    self._coordinator.store,
                    part,
                    disclosure.report,
                    self._progressed,
                    Localizer(
                        self._coordinator.persons,
                        self._coordinator.splicing,
                        subscription,
                        self.destination.ae_title,
                    ),
                )
            finally:
                self._subscriptions.discard(subscription)

    async def _local_manifest(self, study: LocatedStudy) -> Manifest | None:
        """Return what the local PACS lists of a study, None if it cannot be asked."""
        try:
            return await load_manifest(self._coordinator.local_source, study.study_instance_uid)
        except SourceError as error:
            _log.warning(
                "manifest_unverified",
                source=LOCAL,
                study_instance_uid=study.study_instance_uid,
                failure=str(error.failure),
            )
            return None

    # -------------------------------------------------------------- the end

    def _status(self) -> int:
        relay = self._relay
        if relay is not None and len(self.tally.parts) == 1 and relay.status is not None:
            # Wholly local: the local PACS has judged, a C-CANCEL that came too late included.
            return relay.status
        if self._cancelled:
            return CANCELLED
        if self._refusal is not None:
            return self._refusal
        return final_status(self.tally.counts, self.tally.failure)

    async def _record(self, status: int) -> None:
        """Record who was given what, even if the operation is being cancelled."""
        relayed = None
        if (relay := self._relay) is not None:
            relayed = Relayed(tuple(relay.studies), relay.part)
        events = disclosure_events(
            self.request,
            self._disclosures,
            relayed,
            caller=self.caller,
            operation_id=self.operation_id,
            destination_ae_title=self.destination.ae_title,
            status=status,
        )
        audit = self._coordinator.audit
        try:
            async with asyncio.timeout(_AUDIT_SECONDS):
                await asyncio.shield(self._coordinator.spawn(audit.record(*events), "audit"))
        except OwnerClosed:
            await audit.record(*events)
        except TimeoutError:
            _log.error("audit_failed", operation_id=self.operation_id, reason="timeout")

    def _phase(self, phase: str) -> None:
        self.phase = phase
        self.last_progress = asyncio.get_running_loop().time()

    def _progressed(self) -> None:
        self.last_progress = asyncio.get_running_loop().time()
        if self.changed is not None:
            self.changed()

    async def _interruptible(
        self,
        coro: Coroutine[Any, Any, T],
        name: str,
        told_to_end: Callable[[], bool] | None = None,
    ) -> T:
        """Await *coro*, which a C-CANCEL ends.

        Args:
            told_to_end: asks it to end by itself, soon; False if it has to be cancelled.

        Raises:
            _Cancelled: it did.
            OwnerClosed: everything is shutting down.
        """
        if self._cancelled:
            coro.close()
            raise _Cancelled
        try:
            step = self._coordinator.spawn(_settled(coro), name)
        except OwnerClosed:
            coro.close()
            raise
        # A step that is cancelled before it has begun never gets to *coro*.
        step.add_done_callback(lambda _: coro.close())
        self._steps[step] = told_to_end
        try:
            await asyncio.wait([step])
        finally:
            self._steps.pop(step, None)
            if not step.done():
                # We are being cancelled ourselves: the step ends by itself, with its owner.
                step.cancel()
        if step.cancelled():
            self._cancelled = True
            raise _Cancelled
        result, error = step.result()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


async def _settled(coro: Coroutine[Any, Any, T]) -> tuple[T | None, Exception | None]:
    """Return the result or the exception, which the one who waits will deal with."""
    try:
        return await coro, None
    except Exception as error:
        return None, error


_COMMENTS: Final = {
    WARNING: "Some sub-operations failed or have warnings",
    NUMBER_OF_MATCHES_UNKNOWN: "No archive with this study can be reached",
    SUB_OPERATIONS_FAILED: "Unable to perform sub-operations",
    DESTINATION_UNKNOWN: "Move destination unknown",
    UNABLE_TO_PROCESS: "Unable to process",
}
