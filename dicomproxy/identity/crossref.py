"""Who a patient is at each source, by the cross-references that the site has configured for it.

Rules kept: of a source's cross-references the first that knows an ID answers,
and a source has no ID for a patient only if each of them said so. One that
knows several and is to give none has answered too: no later one chooses between
them. One that fails is an error unless another one answers: an outage is never
taken for "nobody". Answers are remembered for minutes, those without an ID, and those
given in spite of an outage, for a shorter time, errors not at all; lookups of
the same patient under way at the same time are one. What a merge notice
forgets is forgotten whole, by every ID that it hangs together with, and an
answer on its way at that moment is asked for again. The notice may come before
the cross-reference itself has heard it, so that for a while after it nothing is
remembered of those IDs. Everything held is bounded.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from prometheus_client import Counter

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.reports import report_failed
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import CrossReference, CrossReferenceError, Failure
from dicomproxy.tasks import OwnerClosed, TaskOwner

SEVERAL_IDS: Final = "several_ids"
"""The reason of a cross-reference that knows several IDs in one domain, and is to give none."""

UNKNOWN_DOMAIN: Final = "unknown_domain"
"""The reason of a cross-reference that does not know a domain it is asked about."""

_ATTEMPTS: Final = 3
_MOST_LOOKUPS: Final = 256
_MOST_FORGOTTEN: Final = 1_000
_MOST_UNSETTLED: Final = 20_000

_log = get_logger()

_LOOKUPS = Counter(
    "dicomproxy_cross_reference_lookups_total",
    "Questions to a cross-reference, by what came of them: found, none, or why it failed.",
    ["service", "outcome"],
)
_REMEMBERED = Counter(
    "dicomproxy_cross_reference_remembered_total",
    "Questions answered from what was remembered of an earlier one.",
)


class IdentityUnresolved(Exception):
    """A foreign ID does not lead to exactly one local ID; carries no value.

    Args:
        reason: ``no_local_id``, ``several_local_ids``, or ``unknown_issuer`` where its
            data set names a domain that nobody here knows.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Provider:
    """A cross-reference under the name it has in the configuration."""

    name: str
    reference: CrossReference


OnForget = Callable[[frozenset[PatientId] | None], None]
"""Told which IDs were forgotten, None for all of them. Does not block."""


@dataclass(frozen=True, slots=True)
class _Question:
    source: str
    patient: PatientId
    domain: Domain


@dataclass(frozen=True, slots=True)
class _Found:
    """What the cross-references of a source say; ``doubtful``: some could not be asked."""

    ids: tuple[PatientId, ...]
    doubtful: bool = False


@dataclass(slots=True, eq=False)  # by identity: two may ask the same
class _Flight:
    """A lookup under way, and what was forgotten since it began."""

    question: _Question
    task: asyncio.Task[_Found | CrossReferenceError]
    waiters: int = 0
    forgotten: set[PatientId] = field(default_factory=set)
    all_forgotten: bool = False

    def forget(self, patients: Iterable[PatientId]) -> None:
        self.forgotten.update(patients)
        if len(self.forgotten) > _MOST_FORGOTTEN:
            self.all_forgotten = True
            self.forgotten.clear()

    def outdated(self, ids: Iterable[PatientId] = ()) -> bool:
        """Tell whether an answer with *ids* speaks of what was forgotten meanwhile."""
        return self.all_forgotten or not self.forgotten.isdisjoint((self.question.patient, *ids))


class Identities:
    """Maps IDs between this site and its sources. Used from one event loop.

    Args:
        domains: the domain of the site and of each source.
        providers: for each source its cross-references, in the order in which
            they are asked. A source without any is known nobody at.
        remember_seconds: how long an ID found is remembered.
        remember_none_seconds: how long it is remembered that there is none.
        most: answers remembered; beyond it the one not used longest is forgotten.
        deadline_seconds: for one cross-reference to answer, whatever its own deadlines.
        settle_seconds: how long after :meth:`forget` answers about those IDs are not
            remembered.
        clock: seconds that only go forward; the loop's by default.
    """

    def __init__(
        self,
        domains: Domains,
        providers: Mapping[str, Sequence[Provider]],
        *,
        remember_seconds: float = 300.0,
        remember_none_seconds: float = 30.0,
        most: int = 100_000,
        deadline_seconds: float = 5.0,
        settle_seconds: float = 30.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.domains = domains
        self._providers = {source: tuple(chain) for source, chain in providers.items()}
        self._alike = self._first_alike()
        self._remember_seconds = remember_seconds
        self._remember_none_seconds = remember_none_seconds
        self._most = most
        self._deadline_seconds = deadline_seconds
        self._settle_seconds = settle_seconds
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._held: OrderedDict[_Question, tuple[float, tuple[PatientId, ...]]] = OrderedDict()
        self._touching: dict[PatientId, set[_Question]] = {}
        # Forgotten lately, the longest ago first; until when nothing is remembered of them.
        self._unsettled: OrderedDict[PatientId, float] = OrderedDict()
        self._all_settled_at = -math.inf
        self._flights: dict[_Question, _Flight] = {}
        self._running: set[_Flight] = set()
        self._callbacks: list[OnForget] = []
        self._owner = TaskOwner("identities")

    def __repr__(self) -> str:
        return f"<Identities {len(self._held)} remembered, {len(self._flights)} under way>"

    async def close(self) -> None:
        """End what is under way; whoever waits for it gets an error."""
        await self._owner.close()

    # ------------------------------------------------------------------ asking

    async def elsewhere(self, patient: PatientId, source: str) -> tuple[PatientId, ...]:
        """Return the IDs by which *source* knows a local patient; none if it knows them not.

        More than one only where a cross-reference is configured to give several.

        Raises:
            CrossReferenceError: it could not be found out.
        """
        patient = self.domains.canonical_id(patient)
        return await self._lookup(_Question(source, patient, self.domains.of(source)))

    async def here(self, patient: PatientId, source: str) -> PatientId:
        """Return the one local ID of the patient whom *source* calls *patient*.

        Raises:
            IdentityUnresolved: there is none, or more than one: to be withheld.
            CrossReferenceError: it could not be found out: to be withheld as well.
        """
        patient = self.domains.canonical_id(patient)
        if self.domains.is_local(patient.domain):
            return patient
        try:
            found = await self._lookup(_Question(source, patient, self.domains.local))
        except CrossReferenceError as error:
            if error.reason == SEVERAL_IDS:
                raise IdentityUnresolved("several_local_ids") from None
            if error.reason == UNKNOWN_DOMAIN and patient.domain not in tuple(self.domains):
                # Not ours and not the source's: a patient of somebody else, no outage.
                raise IdentityUnresolved("unknown_issuer") from None
            raise
        if len(found) != 1:
            raise IdentityUnresolved("several_local_ids" if found else "no_local_id")
        return found[0]

    def _first_alike(self) -> dict[str, str]:
        """Return for each source the first one with its domain and its cross-references."""
        first: dict[tuple[Domain, tuple[Provider, ...]], str] = {}
        return {
            source: first.setdefault((self.domains.of(source), chain), source)
            for source, chain in self._providers.items()
        }

    async def _lookup(self, question: _Question) -> tuple[PatientId, ...]:
        # What is asked for one source holds for all that would ask the same of the same.
        question = replace(question, source=self._alike.get(question.source, question.source))
        for _ in range(_ATTEMPTS):
            if (held := self._remembered(question)) is not None:
                _REMEMBERED.inc()
                return held
            flight = self._flights.get(question)
            if flight is None or flight.outdated():
                flight = self._begin(question)
            found = await self._join(flight)
            if isinstance(found, CrossReferenceError):
                # A new one for each who waits: a traceback grows with every raise.
                raise CrossReferenceError(found.failure, found.reason)
            if not flight.outdated(found.ids):
                return found.ids
        raise CrossReferenceError(Failure.STATUS, "changes_all_the_time")

    async def _join(self, flight: _Flight) -> _Found | CrossReferenceError:
        flight.waiters += 1
        try:
            # Not awaited itself: one who is cancelled must not cancel the others' answer.
            await asyncio.wait((flight.task,))
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self._running.discard(flight)
                if not flight.task.done():
                    flight.task.cancel()
                    self._remove(flight)
        if flight.task.cancelled():
            return CrossReferenceError(Failure.ABORTED, "closing")
        return flight.task.result()

    def _begin(self, question: _Question) -> _Flight:
        if len(self._running) >= _MOST_LOOKUPS:
            raise CrossReferenceError(Failure.BUSY, "too_many_lookups")
        try:
            task = self._owner.spawn(self._ask_in_turn(question), name="lookup")
        except OwnerClosed:
            raise CrossReferenceError(Failure.ABORTED, "closing") from None
        flight = _Flight(question, task)
        self._flights[question] = flight
        self._running.add(flight)
        task.add_done_callback(lambda _: self._ended(flight))
        return flight

    def _ended(self, flight: _Flight) -> None:
        self._remove(flight)
        if not flight.waiters:
            # Else it is still told what is forgotten, until those have their answer.
            self._running.discard(flight)
        if flight.task.cancelled() or flight.task.exception() is not None:
            return
        found = flight.task.result()
        if isinstance(found, _Found) and not flight.outdated(found.ids):
            self._remember(flight.question, found)

    def _remove(self, flight: _Flight) -> None:
        if self._flights.get(flight.question) is flight:
            del self._flights[flight.question]

    async def _ask_in_turn(self, question: _Question) -> _Found | CrossReferenceError:
        failure: CrossReferenceError | None = None
        for provider in self._providers.get(question.source, ()):
            try:
                ids = await self._ask(provider, question)
            except CrossReferenceError as error:
                if error.reason == SEVERAL_IDS:
                    return error
                # That one does not know a domain hides no outage of another.
                if failure is None or failure.reason == UNKNOWN_DOMAIN:
                    failure = error
                continue
            if ids:
                return _Found(ids, doubtful=failure is not None)
        return _Found(()) if failure is None else failure

    async def _ask(self, provider: Provider, question: _Question) -> tuple[PatientId, ...]:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                found = await provider.reference.lookup(question.patient, question.domain)
        except CrossReferenceError as error:
            failure = error
        except TimeoutError:
            failure = CrossReferenceError(Failure.TIMEOUT, "deadline")
        except Exception as error:
            _log.error("cross_reference_crashed", service=provider.name, **error_fields(error))
            failure = CrossReferenceError(Failure.PROTOCOL, "crashed")
        else:
            ids = tuple(dict.fromkeys(map(self.domains.canonical_id, found)))
            reason = _unusable(ids, question.domain)
            if not reason:
                _LOOKUPS.labels(provider.name, "found" if ids else "none").inc()
                return ids
            failure = CrossReferenceError(Failure.PROTOCOL, reason)
        _LOOKUPS.labels(provider.name, _outcome(failure)).inc()
        report_failed(question.source, provider.name, failure)
        raise failure

    # ----------------------------------------------------------------- memory

    def _remembered(self, question: _Question) -> tuple[PatientId, ...] | None:
        held = self._held.get(question)
        if held is None:
            return None
        if held[0] <= self._clock():
            self._drop(question)
            return None
        self._held.move_to_end(question)
        return held[1]

    def settled(self, *patients: PatientId) -> bool:
        """Tell whether what is found now of *patients* may be remembered."""
        now = self._clock()
        while self._unsettled and next(iter(self._unsettled.values())) <= now:
            self._unsettled.popitem(last=False)
        return now >= self._all_settled_at and self._unsettled.keys().isdisjoint(patients)

    def _remember(self, question: _Question, found: _Found) -> None:
        if not self.settled(question.patient, *found.ids):
            return
        long = found.ids and not found.doubtful
        seconds = self._remember_seconds if long else self._remember_none_seconds
        self._drop(question)
        self._held[question] = (self._clock() + seconds, found.ids)
        for patient in (question.patient, *found.ids):
            self._touching.setdefault(patient, set()).add(question)
        if len(self._held) > self._most:
            self._drop(next(iter(self._held)))

    def _drop(self, question: _Question) -> None:
        held = self._held.pop(question, None)
        if held is None:
            return
        for patient in (question.patient, *held[1]):
            touching = self._touching.get(patient)
            if touching is not None:
                touching.discard(question)
                if not touching:
                    del self._touching[patient]

    # -------------------------------------------------------------- forgetting

    def on_forget(self, callback: OnForget) -> None:
        """Have *callback* told what is forgotten: locations and demographics hang on it."""
        self._callbacks.append(callback)

    def forget(self, *patients: PatientId) -> frozenset[PatientId]:
        """Drop what is remembered of persons whose records were merged, or whose IDs moved.

        Every ID goes that is remembered as theirs, in every domain, by whichever
        of them the person was named. Answers that are on their way now are asked
        for again, and those that come in the next moments serve once.

        Returns:
            All IDs that were forgotten, *patients* among them.
        """
        waiting = [self.domains.canonical_id(patient) for patient in patients]
        gone = set(waiting)
        while waiting:
            for question in list(self._touching.get(waiting.pop(), ())):
                related = {question.patient, *self._held[question][1]} - gone
                gone |= related
                waiting += related
                self._drop(question)
        if not gone:
            return frozenset()
        self._unsettle(gone)
        for flight in self._running:
            flight.forget(gone)
        for reference in self._references():
            for patient in gone:
                reference.forget(patient)
        self._tell(frozenset(gone))
        return frozenset(gone)

    def _unsettle(self, patients: Iterable[PatientId]) -> None:
        until = self._clock() + self._settle_seconds
        for patient in patients:
            self._unsettled[patient] = until
            self._unsettled.move_to_end(patient)
        while len(self._unsettled) > _MOST_UNSETTLED:
            self._unsettled.popitem(last=False)

    def forget_all(self, *, settle: bool = False) -> None:
        """Drop everything remembered: a whole cross-reference is another one now.

        With *settle* nothing is remembered for a while, as after :meth:`forget`: it
        was told of by somebody else.
        """
        if settle:
            self._all_settled_at = self._clock() + self._settle_seconds
        self._held.clear()
        self._touching.clear()
        for flight in self._running:
            flight.all_forgotten = True
        self._tell(None)

    def _references(self) -> Iterable[CrossReference]:
        by_identity = {
            id(provider.reference): provider.reference
            for chain in self._providers.values()
            for provider in chain
        }
        return by_identity.values()

    def _tell(self, gone: frozenset[PatientId] | None) -> None:
        for callback in self._callbacks:
            callback(gone)


def _outcome(failure: CrossReferenceError) -> str:
    """Return a failure as the metric has it: the two that are no outage by their own names."""
    if failure.reason in (SEVERAL_IDS, UNKNOWN_DOMAIN):
        return failure.reason
    return failure.failure.value


def _unusable(ids: Iterable[PatientId], domain: Domain) -> str:
    """Say why an answer cannot be used, nothing where it can."""
    for patient in ids:
        if patient.domain != domain:
            return "id_of_another_domain"
        # As a key it would match other patients as well (PS3.4 C.2.2.2.4).
        if not patient.value or not patient.value.isprintable() or set(patient.value) & set("\\*?"):
            return "id_of_no_use"
    return ""
