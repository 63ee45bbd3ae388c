"""Whose studies and instances these are: what a source says of a patient, in local terms.

A flight agrees on one local patient, and every name that a holder, a listing or
a header gives is first turned into the local ID it stands for. Rules kept: each
retrieve asks anew, and nothing counts longer than the site has cross-references
remembered; what was found last is at hand for a minute for instances' headers,
which are read where nobody can wait, and is forgotten with every merge notice;
an ID that leads to no one local ID is nobody agreed on; an outage is never
taken for either. A source that the site has told nothing about is taken at its
word: its IDs are local ones.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Final, Protocol

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import PATIENT_ID
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import CoercionSettings
from dicomproxy.identity.crossref import Identities, IdentityUnresolved
from dicomproxy.identity.domains import (
    ISSUER_OF_PATIENT_ID,
    ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE,
    Domains,
)
from dicomproxy.identity.safety import Comparison, Demographics, Unverified, Verdict, compare
from dicomproxy.retrieval.manifest import Manifest

_AT_HAND_SECONDS: Final = 60.0
_MOST_REMEMBERED: Final = 20_000
_MOST_NOTICES: Final = 1_000


class Policy(Protocol):
    """What the site has decided about the patients and objects of one source."""

    @property
    def coercion(self) -> CoercionSettings: ...

    @property
    def unverified(self) -> Unverified: ...


class Identification(Protocol):
    """Who patients are, as far as retrieves ask."""

    @property
    def identities(self) -> Identities: ...

    def of(self, source: str) -> Policy | None:
        """Return what was decided about a source; None if its objects are left as they are."""
        ...

    async def demographics(self, patient: PatientId) -> Demographics | None:
        """Return what the local PACS says of its patient, None if nothing; never raises."""
        ...

    async def shown_numbers(
        self, source: str, numbers: Mapping[str, Domain]
    ) -> Mapping[str, Shown] | None:
        """Return what accession numbers of *source* become; None if they stay."""
        ...


class Persons:
    """Turns patients that sources name into local ones; without settings they are the same.

    Its methods are for the event loop but for :meth:`of_header` and :meth:`at_once`,
    which any thread may call.
    """

    def __init__(self, identification: Identification | None = None) -> None:
        self.identification = identification
        self._remembered: dict[tuple[str, PatientId], tuple[float, str]] = {}
        self.version = 0
        """Grows when something is forgotten; whom it concerns, :meth:`concerned` tells."""
        self._gone: deque[frozenset[PatientId] | None] = deque(maxlen=_MOST_NOTICES)
        if identification is not None:
            identification.identities.on_forget(self._forget)

    def __repr__(self) -> str:
        return f"<Persons {len(self._remembered)} remembered>"

    def policy(self, source: str) -> Policy | None:
        """Return what was decided about *source*; None for one that is taken at its word."""
        return self.identification.of(source) if self.identification is not None else None

    def domains(self, source: str) -> Domains | None:
        """Return the domains to read IDs of *source* by; None where its IDs are local ones."""
        if self.identification is None or self.identification.of(source) is None:
            return None
        return self.identification.identities.domains

    # ------------------------------------------------------------- who is named

    def of_value(self, patient_id: str, source: str) -> PatientId | None:
        """Qualify an ID that *source* is known to use; None if there is none."""
        if not patient_id:
            return None
        domains = self.domains(source)
        if domains is None:
            return PatientId(patient_id)
        return domains.canonical_id(PatientId(patient_id, domains.of(source)))

    def of_answer(self, answer: Identifier, source: str) -> PatientId | None:
        """Qualify the ID in an answer of *source*; None if it names nobody.

        Raises:
            IdentityUnresolved: it names several.
        """
        domains = self.domains(source)
        if domains is None:
            return self.of_value(answer.text(PATIENT_ID), source)
        if len(answer.values(PATIENT_ID)) > 1:
            raise IdentityUnresolved("several_ids")
        return domains.patient_of(answer, source)

    def of_header(self, header: InstanceHeader, source: str) -> PatientId | None:
        """Qualify the ID in an instance's header; None if it names nobody. For any thread."""
        domains = self.domains(source)
        if domains is None:
            return self.of_value(header.patient_id, source)
        return domains.patient_of_header(header, source)

    def usual_id(self, patient: PatientId | None, source: str) -> str:
        """Return an ID as the memory of locations may keep it, which knows no issuers."""
        if patient is None:
            return ""
        domains = self.domains(source)
        return patient.value if domains is None or patient.domain == domains.of(source) else ""

    def returned(self, source: str) -> tuple[int, ...]:
        """Return the keys, besides Patient ID, by which *source* says whose a study is."""
        if self.domains(source) is None:
            return ()
        return ISSUER_OF_PATIENT_ID, ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE

    # -------------------------------------------------------------- who that is

    def at_once(self, patient: PatientId, source: str) -> str | None:
        """Return the local ID of a patient of *source* as it was found last. For any thread.

        None where it was not, or not within a minute. Whoever delivers asks :meth:`here`.
        """
        if self.domains(source) is None:
            return patient.value
        held = self._remembered.get((source, patient))
        return held[1] if held is not None and held[0] > time.monotonic() else None

    async def here(self, patient: PatientId, source: str) -> str:
        """Return the local ID of a patient of *source*.

        Raises:
            IdentityUnresolved: there is not exactly one.
            CrossReferenceError: it could not be found out.
        """
        settings = self.identification
        if settings is None or self.domains(source) is None:
            return patient.value
        try:
            local = (await settings.identities.here(patient, source)).value
        except IdentityUnresolved:
            self._remembered.pop((source, patient), None)
            raise
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered = {}
        self._remembered[source, patient] = time.monotonic() + _AT_HAND_SECONDS, local
        return local

    async def elsewhere(self, local_id: str, source: str) -> tuple[str, ...]:
        """Return the IDs by which *source* knows a local patient; none if it does not.

        Raises:
            CrossReferenceError: it could not be found out.
        """
        settings = self.identification
        if settings is None or self.domains(source) is None:
            return (local_id,)
        domains = settings.identities.domains
        found = await settings.identities.elsewhere(PatientId(local_id, domains.local), source)
        return tuple(patient.value for patient in found)

    def local(self, local_id: str) -> PatientId:
        """Qualify a local ID."""
        if self.identification is None:
            return PatientId(local_id)
        return PatientId(local_id, self.identification.identities.domains.local)

    async def demographics(self, local_id: str) -> Demographics | None:
        """Return what the local PACS says of its patient; None if it says nothing."""
        if self.identification is None or not local_id:
            return None
        return await self.identification.demographics(self.local(local_id))

    def of_manifest(self, manifest: Manifest, source: str) -> PatientId | None:
        """Qualify the ID in what *source* lists; None if it names nobody.

        Raises:
            IdentityUnresolved: it names several.
        """
        if manifest.row is None:
            return self.of_value(manifest.patient_id, source)
        return self.of_answer(manifest.row, source)

    async def compare_listed(self, manifest: Manifest, local_id: str, source: str) -> Comparison:
        """Compare what *source* lists with the local patient, where it says anything."""
        theirs = Demographics("", manifest.patient_birth_date, manifest.patient_sex)
        if not local_id or not theirs.comparable or self.policy(source) is None:
            return Comparison(Verdict.UNVERIFIED)
        return compare(await self.demographics(local_id), theirs)

    def concerned(self, patients: Collection[PatientId], since: int) -> bool:
        """Tell whether anything was forgotten of *patients* since that version: then what was
        decided about them no longer holds. In doubt it was.
        """
        count = self.version - since
        if count > len(self._gone):
            return True
        latest = islice(reversed(self._gone), count)
        return any(gone is None or not gone.isdisjoint(patients) for gone in latest)

    def _forget(self, gone: frozenset[PatientId] | None) -> None:
        """Forget everything at hand: it is soon found again."""
        self._remembered = {}
        self.version += 1
        self._gone.append(gone)
