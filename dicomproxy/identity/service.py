"""What a site knows of identity, in one hand: for queries and retrieves to share.

Rules kept: whatever is forgotten of an ID is forgotten everywhere at once. The
local PACS is asked who a patient is at most once at a time, with a deadline;
that it does not say is nothing to compare with, and never an error. Sources
that are not in here are left exactly as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Protocol

from dicomproxy.dataset.accession import Origin
from dicomproxy.dataset.charset import UTF8
from dicomproxy.dataset.identifier import CannotEncode, Identifier
from dicomproxy.dataset.levels import PATIENT_ID, Level
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import AccessionNumbers, Shown
from dicomproxy.identity.coercion import CoercionSettings
from dicomproxy.identity.crossref import Identities
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.safety import (
    PATIENT_BIRTH_DATE,
    PATIENT_NAME,
    PATIENT_SEX,
    Demographics,
    KnownPatients,
    Unverified,
    Verdict,
    compare,
    demographics_of,
)
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import LOCAL, SourceQuery
from dicomproxy.tasks import OwnerClosed, TaskOwner

_DEMOGRAPHICS: Final = (PATIENT_NAME, PATIENT_BIRTH_DATE, PATIENT_SEX)
_ISSUER_OF_PATIENT_ID: Final = 0x00100021
_MOST_ASKED: Final = 64
_MOST_ASKED_ONLY: Final = 1_000
_ATTEMPTS: Final = 3

_log = get_logger()


class _Outdated(Enum):
    """In place of an answer that was forgotten before it came."""

    OUTDATED = auto()


_Asked = Demographics | None | _Outdated


class Part(Protocol):
    """Something that runs while identities are looked up."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """How answers and objects of one source are judged and made local.

    Args:
        coercion: what is made of them.
        unverified: what becomes of those that could not be compared with the local patient.
        keeps_accessions: its accession numbers are those of this site.
    """

    coercion: CoercionSettings
    unverified: Unverified = Unverified.SHOW
    keeps_accessions: bool = False


AskLocal = Callable[[SourceQuery], AsyncIterator[Identifier]]
"""Puts a question to the local PACS; closing the iterator cancels."""


class IdentityService:
    """Who patients are here and elsewhere, and how that is shown. Used from one event loop.

    Args:
        identities: maps IDs.
        accessions: maps accession numbers.
        known: what the local PACS said of its patients.
        sources: those that are judged and made local, by name.
        ask_local: how the local PACS is asked.
        deadline_seconds: for the local PACS to say who a patient is.
        parts: closed with this, in the order given, after the identities.
        forget_locations: told at which sources, under which IDs, nobody is known any more.
    """

    def __init__(
        self,
        identities: Identities,
        accessions: AccessionNumbers,
        known: KnownPatients,
        sources: Mapping[str, SourceIdentity],
        ask_local: AskLocal,
        *,
        deadline_seconds: float = 10.0,
        parts: Iterable[Part] = (),
        forget_locations: Callable[[Collection[tuple[str, str]]], None] | None = None,
    ) -> None:
        self.domains: Domains = identities.domains
        self.identities = identities
        self.accessions = accessions
        self.known = known
        self._sources = dict(sources)
        self._ask_local = ask_local
        self._deadline_seconds = deadline_seconds
        self._parts = tuple(parts)
        self._forget_locations = forget_locations
        self._asking: dict[PatientId, asyncio.Task[_Asked]] = {}
        # Local patients of whom rows of the local PACS say one thing and another.
        self._asked_only: dict[PatientId, None] = {}
        self._owner = TaskOwner("identity")
        identities.on_forget(self._forgotten)

    def __repr__(self) -> str:
        return f"<IdentityService {len(self._sources)} sources, {len(self.known)} patients known>"

    async def close(self) -> None:
        """End what is being asked."""
        await self._owner.close()
        await self.identities.close()
        for part in self._parts:
            await part.close()

    # ----------------------------------------------------------------- patients

    def of(self, source: str) -> SourceIdentity | None:
        """Return how *source* is judged; None where nothing of it is touched."""
        return self._sources.get(source)

    def foreign(self, source: str, value: str) -> PatientId:
        """Return the patient who has an ID at *source*."""
        return self.domains.canonical_id(PatientId(value, self.domains.of(source)))

    def learn(self, row: Identifier) -> None:
        """Remember what an answer of the local PACS says of its patient, if it says all.

        One with nothing to compare is taken only for a patient who is known already: an
        archive that returns these keys empty below PATIENT level knows them all the same.
        Where one contradicts another, or has another name, the local PACS is asked who the
        patient is: now, and from then on, until a notice comes. Else the study that came
        last would decide, and answers and objects might differ.
        """
        patient = self.domains.patient_of(row, LOCAL)
        if patient is None or not self.domains.is_local(patient.domain):
            return
        if not all(tag in row for tag in _DEMOGRAPHICS):
            return
        patient = self.domains.canonical_id(patient)
        said, known = demographics_of(row), self.known.of(patient)
        if known is not None and compare(known, said).verdict is Verdict.CONFLICT:
            # Corrected, or a study that keeps what its patient was called when it was made.
            if patient not in self._asked_only:
                _log.warning("local_patient_contradicts_itself")
            self._ask_only(patient)
        elif patient in self._asked_only:
            return
        elif known is not None and _renamed(known.name, said.name):
            self._ask_only(patient)
        elif said.comparable or known is not None:
            self.known.learn(patient, said)

    def _ask_only(self, patient: PatientId) -> None:
        self.known.forget((patient,))
        self._asked_only[patient] = None
        if len(self._asked_only) > _MOST_ASKED_ONLY:
            del self._asked_only[next(iter(self._asked_only))]

    async def demographics(self, patient: PatientId) -> Demographics | None:
        """Return who a local patient is, as remembered or as the local PACS says now.

        None where it does not know them, or does not say in time. Never raises for a peer.
        """
        for _ in range(_ATTEMPTS):
            if (known := self.known.of(patient)) is not None:
                return known
            task = self._asking.get(patient) or self._begin(patient)
            if task is None:
                return None
            # Not awaited itself: one who is cancelled must not cancel the others' answer.
            await asyncio.wait((task,))
            if task.cancelled():
                return None
            if not isinstance(result := task.result(), _Outdated):
                return result
        _log.warning("local_patient_unknown", reason="changes_all_the_time")
        return None

    def _begin(self, patient: PatientId) -> asyncio.Task[_Asked] | None:
        if len(self._asking) >= _MOST_ASKED:
            _log.warning("local_patient_unknown", reason="too_many_lookups")
            return None
        try:
            task = self._owner.spawn(self._ask(patient), name="demographics")
        except OwnerClosed:
            return None
        self._asking[patient] = task
        task.add_done_callback(lambda _: self._asked(patient, task))
        return task

    def _asked(self, patient: PatientId, task: asyncio.Task[_Asked]) -> None:
        if self._asking.get(patient) is task:
            del self._asking[patient]

    async def _ask(self, patient: PatientId) -> _Asked:
        keys = Identifier()
        try:
            keys.set_text(PATIENT_ID, patient.value)
        except CannotEncode:
            keys = keys.with_character_set(UTF8)
            keys.set_text(PATIENT_ID, patient.value)
        for tag in (*_DEMOGRAPHICS, _ISSUER_OF_PATIENT_ID):
            keys.set_empty(tag)
        rows = self._ask_local(SourceQuery(Level.PATIENT, keys, True))
        found: Demographics | None = None
        try:
            async with asyncio.timeout(self._deadline_seconds):
                try:
                    async for row in rows:
                        if self.domains.patient_of(row, LOCAL) == patient:
                            found = demographics_of(row)
                            break
                finally:
                    await _closed(rows)
        except Exception as error:
            _log.warning("local_patient_unknown", **error_fields(error))
            return None
        if self._asking.get(patient) is not asyncio.current_task():
            return _Outdated.OUTDATED  # forgotten while it was on its way
        if found is not None:
            self.known.learn(patient, found)
        return found

    def _forgotten(self, patients: frozenset[PatientId] | None) -> None:
        if patients is None:
            self.known.forget_all()
            self._asking.clear()
            self._asked_only.clear()
            return
        self.known.forget(patients)
        for patient in patients:
            self._asking.pop(patient, None)
            self._asked_only.pop(patient, None)
        if self._forget_locations is not None:
            self._forget_locations(self.domains.at_sources(patients))

    # --------------------------------------------------------------- accessions

    async def shown_numbers(
        self, source: str, numbers: Mapping[str, Domain]
    ) -> Mapping[str, Shown] | None:
        """Return what to show for each accession number of *source*, given with its issuer.

        None where the source keeps its own.
        """
        judged = self._sources.get(source)
        if judged is None or judged.keeps_accessions:
            return None
        origins = [Origin(source, number, issuer) for number, issuer in numbers.items()]
        shown = await self.accessions.shown(origins)
        return dict(zip(numbers, shown, strict=True))


def _renamed(known: str, said: str) -> bool:
    """Tell whether two names are not written alike, where both are there."""
    ours, theirs = (name.rstrip("^= ") for name in (known, said))
    return bool(ours and theirs) and ours != theirs


async def _closed(rows: AsyncIterator[Identifier]) -> None:
    close: Callable[[], Awaitable[None]] | None = getattr(rows, "aclose", None)
    if close is not None:
        await close()
