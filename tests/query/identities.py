"""A site that knows who patients are elsewhere, made of scripted parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from dicomproxy.dataset.accession import AccessionsUnavailable, Origin, candidates
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain
from dicomproxy.identity.accession import AccessionNumbers, AccessionPolicy, AccessionRule
from dicomproxy.identity.coercion import CoercionSettings
from dicomproxy.identity.crossref import Identities, Provider
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.safety import KnownPatients, Unverified
from dicomproxy.identity.service import IdentityService, SourceIdentity
from dicomproxy.ports import SourceQuery
from tests.identity.providers import HOSPITAL, NORTH, SOUTH, Scripted
from tests.query.builders import identifier

OUR_ORDERS = Domain("DICOMPROXY")
SEX = "F"


class RememberedAccessions:
    """A memory of accession numbers without a file."""

    def __init__(self) -> None:
        self.held: dict[str, Origin] = {}
        self.assigned_together: list[int] = []
        self.failing = False

    async def assign(self, wanted: Sequence[tuple[Origin, str]]) -> list[str]:
        self.assigned_together.append(len(wanted))
        numbers = []
        for origin, prefix in wanted:
            number = next(
                one
                for one in candidates(origin, prefix)
                if self.held.setdefault(one, origin).is_same(origin)
            )
            numbers.append(number)
        return numbers

    async def find(self, number: str) -> Origin | None:
        if self.failing:
            raise AccessionsUnavailable
        return self.held.get(number)


class Site:
    """Its identity service, and all that a test may want to look at or to break."""

    def __init__(
        self,
        *persons: set[Any],
        here: Sequence[Identifier] = (),
        unverified: Unverified = Unverified.SHOW,
        policy: AccessionPolicy = AccessionPolicy.MINT,
        **coercion: Any,
    ) -> None:
        self.manager = Scripted(*persons)
        self.accessions = RememberedAccessions()
        self.here = list(here)
        self.asked: list[SourceQuery] = []
        self.forgotten: list[tuple[str, str]] = []
        self.local_failure: Exception | None = None
        domains = Domains(HOSPITAL, {"north": NORTH, "south": SOUTH})
        chain = [Provider("mpi", self.manager)]
        self.identities = Identities(domains, {"north": chain, "south": chain})
        rule = AccessionRule(policy, "N-" if policy is AccessionPolicy.PREFIX else "")
        self.service = IdentityService(
            self.identities,
            AccessionNumbers(self.accessions, OUR_ORDERS, {"north": rule, "south": rule}),
            KnownPatients(asyncio.get_running_loop().time),
            {
                name: SourceIdentity(
                    CoercionSettings(name.upper(), "DICOMPROXY", domain, **coercion),
                    unverified,
                    policy is AccessionPolicy.KEEP,
                )
                for name, domain in (("north", NORTH), ("south", SOUTH))
            },
            self.ask,
            deadline_seconds=10.0,
            forget_locations=self.forget,
        )

    async def ask(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        """Answer as the local PACS that is asked who a patient is."""
        self.asked.append(query)
        if self.local_failure is not None:
            raise self.local_failure
        for row in self.here:
            yield row

    def forget(self, patients: Collection[tuple[str, str]]) -> None:
        self.forgotten.extend(patients)


def patient_row(value: str, name: str, birth_date: str, sex: str = SEX) -> Identifier:
    """Make what the local PACS says of a patient."""
    return identifier(
        QueryRetrieveLevel="PATIENT",
        PatientID=value,
        PatientName=name,
        PatientBirthDate=birth_date,
        PatientSex=sex,
    )
