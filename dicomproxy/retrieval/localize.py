"""Instances of foreign sources as they go to a destination: of the right patient, and local.

What an instance says of its patient is checked here once more, whether it has
come a moment ago or lay in the cache: one of another patient, of one who cannot
be identified now, or whose birth date or sex contradicts the local patient's is
withheld. The rest gets the local values on its way. Rules kept: everything that
must be asked of somebody is asked on the event loop, and then remembered for
this delivery alone; what a merge notice changes is asked again. Instances of
sources that the site has told nothing about are handed on untouched.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import Final

from prometheus_client import Counter

from dicomproxy.dataset.identifier import CannotEncode, Identifier
from dicomproxy.dataset.levels import PATIENT_ID
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.dataset.splice import Decision, Rewriter, SpliceError
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import SIGNATURES, LocalPatient, accession_numbers, coerce
from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.reports import report, report_conflict, report_unresolved
from dicomproxy.identity.safety import Comparison, Verdict, compare, demographics_of
from dicomproxy.logs import get_logger
from dicomproxy.ports import CachedInstance, CrossReferenceError, InstanceReader
from dicomproxy.retrieval.persons import Identification, Persons, Policy
from dicomproxy.retrieval.spliced import HEAD_BYTES, Splicing
from dicomproxy.retrieval.subscription import Subscription

_ATTEMPTS: Final = 8
"""How often it is decided again: for the patient, for accession numbers, after merges."""

_CACHED_WAITS_SECONDS: Final = 1.0
"""How long cached instances wait for their source to say whose study it has."""

_MOST_REWRITERS: Final = 4
"""Seconds in which instances came, for each of which headers and decisions are remembered."""

_log = get_logger()

_COERCED: Final = Counter(
    "dicomproxy_instances_coerced_total",
    "Instances made local on their way to a destination, or withheld, by what came of it.",
    ["source", "outcome"],
)


_OUTDATED: Final = frozenset({"identity_conflict", "identity_unresolved"})


class Withheld(Exception):
    """An instance is not to be delivered; ``reason`` is a log-safe word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    @property
    def may_be_outdated(self) -> bool:
        """Whether its source, asked again, might say otherwise: it may have been corrected."""
        return self.reason in _OUTDATED


class Localizer:
    """Makes the instances of one study local for one destination.

    Args:
        persons: who patients are.
        splicing: rewrites instances.
        subscription: knows which patient was agreed on.
        destination_ae_title: for rules about it.
        at: when this is, for instances of which nobody knows when they came; now by default.

    What is recorded as the time of a change is when the instance came, so that a
    destination to which it is delivered twice gets the same bytes.
    """

    def __init__(
        self,
        persons: Persons,
        splicing: Splicing,
        subscription: Subscription,
        destination_ae_title: str,
        at: datetime | None = None,
    ) -> None:
        self._persons = persons
        self._splicing = splicing
        self._subscription = subscription
        self._destination = destination_ae_title
        self._at = at or datetime.now(UTC).replace(microsecond=0)
        self._sources: dict[str, _Source] = {}
        self._silent_after: dict[str, float] = {}

    @property
    def head_bytes(self) -> int:
        """How much of each instance is looked at before it is sent."""
        return HEAD_BYTES if self._persons.identification is not None else 0

    async def ready(self, instance: CachedInstance) -> None:
        """Return once it is known whose study the instance's source has, as it lists it.

        That may be another patient's by now, though headers still name this one. What is
        cached waits a moment only: a source that does not answer must not hold it up, and
        its header has been compared.

        Raises:
            Withheld: it is.
        """
        identification = self._persons.identification
        if identification is None:
            return
        name = self._subscription.source_of(instance)
        if identification.of(name) is None:
            return
        deadline = None
        if self._subscription.was_cached(instance.sop_instance_uid):
            now = asyncio.get_running_loop().time()
            deadline = self._silent_after.setdefault(name, now + _CACHED_WAITS_SECONDS)
        if not await self._subscription.until_judged(name, deadline):
            raise Withheld("identity_conflict")

    async def open(self, instance: CachedInstance, reader: InstanceReader) -> InstanceReader:
        """Return a reader of what is to be sent, which closes *reader* in its turn.

        Raises:
            Withheld: nothing is to be sent.
            OSError: it cannot be read.
        """
        identification = self._persons.identification
        if identification is None:
            return reader
        name = self._subscription.source_of(instance)
        policy = identification.of(name)
        if policy is None:
            return reader
        syntax = instance.transfer_syntax_uid
        try:
            opened = await self._open(name, syntax, reader, identification, policy)
        except Withheld as withheld:
            _COERCED.labels(name, withheld.reason).inc()
            raise
        except (SpliceError, CannotEncode) as error:
            reason = "cannot_encode" if isinstance(error, CannotEncode) else "cannot_splice"
            _COERCED.labels(name, reason).inc()
            raise Withheld(reason) from None
        _COERCED.labels(name, "coerced").inc()
        return opened

    async def _open(
        self,
        name: str,
        transfer_syntax_uid: str,
        reader: InstanceReader,
        identification: Identification,
        policy: Policy,
    ) -> InstanceReader:
        for _ in range(_ATTEMPTS):
            source = self._sources.get(name)
            if source is None or source.is_outdated():
                source = self._sources[name] = _Source(
                    name, policy, self._persons, self._destination, self._at
                )
            opened: InstanceReader | None = None
            needed: _Needed | None = None
            try:
                await source.prepare(identification, self._subscription)
                rewriter = source.rewriter(reader.arrived)
                opened = await self._splicing.open(reader, transfer_syntax_uid, rewriter)
            except _Needed as what:
                needed = what
            except _Unfit as unfit:
                source.tell(unfit.comparison, self._subscription, shown=False)
                raise Withheld(
                    "identity_conflict"
                    if unfit.comparison.verdict is Verdict.CONFLICT
                    else "identity_unverified"
                ) from None
            except IdentityUnresolved as unresolved:
                raise source.unresolved(unresolved, self._subscription) from None
            if needed is not None:
                await source.learn(needed, identification, self._subscription)
            elif opened is not None and not source.is_outdated():
                if source.comparison is not None:
                    source.tell(source.comparison, self._subscription, shown=True)
                return opened
        raise Withheld("identity_changes")


class _Needed(Exception):
    """Something has to be asked before it can be decided."""

    def __init__(self, named: PatientId | None, numbers: dict[str, Domain]) -> None:
        self.named = named
        self.numbers = numbers
        super().__init__("something has to be asked")


class _Unfit(Exception):
    """What an instance says of its patient forbids that it is shown."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        super().__init__(str(comparison.verdict))


class _Source:
    """What is known, for one delivery, of what one source's instances become."""

    def __init__(
        self, name: str, policy: Policy, persons: Persons, destination: str, at: datetime
    ) -> None:
        self.name = name
        self.comparison: Comparison | None = None
        """Of an instance that may be shown, if it is worth telling."""
        self._policy = policy
        self._persons = persons
        self._destination = destination
        self._at = at
        self._patient: LocalPatient | None = None
        self._met: dict[PatientId | None, str] = {}
        """Whom instances name, and why nothing of theirs is sent, if it is not."""
        self._shown: dict[str, Shown] | None = None
        self._prepared = False
        self._told: set[Comparison] = set()
        self._rewriters: dict[int, Rewriter] = {}
        self._version = persons.version

    def is_outdated(self) -> bool:
        """Tell whether anybody of whom something is known here was named by a notice since."""
        concerned = {named for named in self._met if named is not None}
        if self._patient is not None:
            concerned.add(self._patient.patient_id)
        # Always since the beginning: another delivery's question may be on its way still.
        return self._persons.concerned(concerned, self._version)

    def rewriter(self, arrived: int) -> Rewriter:
        """Return what rewrites instances that came in that second."""
        known = self._rewriters.get(arrived)
        if known is None:
            at = datetime.fromtimestamp(arrived, UTC) if arrived > 0 else self._at
            if len(self._rewriters) >= _MOST_REWRITERS:
                self._rewriters.clear()
            known = self._rewriters[arrived] = Rewriter(
                self._policy.coercion.tags,
                partial(self._decide, at),
                required=(PATIENT_ID,),
                further=SIGNATURES,
            )
        return known

    # ------------------------------------------------------------- on the loop

    async def prepare(self, identification: Identification, subscription: Subscription) -> None:
        """Find out what does not depend on the instance."""
        if not self._prepared:
            shown = await identification.shown_numbers(self.name, {})
            self._shown = dict(shown) if shown is not None else None
            self._prepared = True
        agreed = subscription.agreed
        if self._patient is None and agreed:
            demographics = await self._persons.demographics(agreed)
            self._patient = LocalPatient(self._persons.local(agreed), demographics)

    async def learn(
        self, needed: _Needed, identification: Identification, subscription: Subscription
    ) -> None:
        """Ask for what is needed.

        Raises:
            Withheld: it is no instance of the patient agreed on, or nobody can tell.
        """
        if needed.named not in self._met:
            self._met[needed.named] = await self._meet(needed.named, subscription)
        if reason := self._met[needed.named]:
            raise Withheld(reason)
        numbers = needed.numbers
        if self._shown is not None and numbers:
            self._shown.update(await identification.shown_numbers(self.name, numbers) or {})

    async def _meet(self, named: PatientId | None, subscription: Subscription) -> str:
        """Find out whether somebody is the patient agreed on; why not, if so."""
        if named is None:
            # If nobody says whose it is, it cannot be made anybody's.
            return "" if subscription.agreed else "identity_unresolved"
        study = subscription.study_instance_uid
        try:
            local_id = await self._persons.here(named, self.name)
        except IdentityUnresolved as unresolved:
            return self.unresolved(unresolved, subscription).reason
        except CrossReferenceError as error:
            _log.warning(
                "source_not_identified",
                source=self.name,
                failure=str(error.failure),
                reason=error.reason,
                study_instance_uid=study,
            )
            return "identity_unknown"
        if subscription.agrees(local_id):
            return ""
        report_conflict(self.name, "other_patient", study_instance_uid=study)
        return "identity_conflict"

    def unresolved(self, unresolved: IdentityUnresolved, subscription: Subscription) -> Withheld:
        """Report an ID that leads to no one local patient."""
        report_unresolved(self.name, unresolved, study_instance_uid=subscription.study_instance_uid)
        return Withheld("identity_unresolved")

    def tell(self, comparison: Comparison, subscription: Subscription, *, shown: bool) -> None:
        """Report what a comparison came to, once for a study rather than for each instance."""
        if comparison not in self._told:
            self._told.add(comparison)
            uid = subscription.study_instance_uid
            report(self.name, comparison, shown=shown, study_instance_uid=uid)

    # ------------------------------------------------------------ in any thread

    def _decide(self, at: datetime, view: Identifier) -> Decision:
        """Say what becomes of an instance with the header *view*; asks nobody."""
        named = self._persons.of_answer(view, self.name)
        numbers: dict[str, Domain] = {}
        if self._shown is not None:
            numbers = {
                number: issuer
                for number, issuer in accession_numbers(view).items()
                if number not in self._shown
            }
        patient = self._patient
        if patient is None or numbers or self._met.get(named, "unknown"):
            raise _Needed(named, numbers)
        comparison = compare(patient.demographics, demographics_of(view))
        if not comparison.permits(self._policy.unverified):
            raise _Unfit(comparison)
        if comparison.name_differs:
            self.comparison = comparison
        return coerce(view, patient, self._policy.coercion, self._shown, at, self._destination)
