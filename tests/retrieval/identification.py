"""A site with two foreign domains: who is who, and what is made of their objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import CoercionSettings
from dicomproxy.identity.crossref import Identities, Provider
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.safety import Demographics, Unverified
from tests import sentinel
from tests.identity.providers import HOSPITAL, NORTH, SOUTH, Scripted, local, north

ME = Demographics(sentinel.PATIENT_NAME, sentinel.PATIENT_BIRTH_DATE, "F")


def south(value: str) -> PatientId:
    return PatientId(value, SOUTH)


@dataclass(frozen=True)
class Judged:
    """How one source is judged."""

    coercion: CoercionSettings
    unverified: Unverified = Unverified.SHOW


class Site:
    """Implements :class:`~dicomproxy.retrieval.persons.Identification` as it is told.

    The sentinel patient is N1 in the north and S1 in the south. Another person has
    the sentinel's ID in the north, and is OTHER here.
    """

    def __init__(self, *, unverified: Unverified = Unverified.SHOW) -> None:
        self.reference = Scripted(
            {local(sentinel.PATIENT_ID), north("N1"), south("S1")},
            {local("OTHER"), north(sentinel.PATIENT_ID), south("S9")},
        )
        domains = Domains(HOSPITAL, {"north": NORTH, "south": SOUTH})
        chain = [Provider("regional", self.reference)]
        self.identities = Identities(
            domains, {"north": chain, "south": chain}, remember_none_seconds=0
        )
        self.known: dict[str, Demographics] = {sentinel.PATIENT_ID: ME}
        self.judged: dict[str, Judged] = {
            name: Judged(CoercionSettings(name.upper(), "PROXY", domains.of(name)), unverified)
            for name in ("north", "south")
        }
        self.numbers: list[tuple[str, str]] = []

    def of(self, source: str) -> Judged | None:
        return self.judged.get(source)

    async def demographics(self, patient: PatientId) -> Demographics | None:
        assert patient.domain == HOSPITAL
        return self.known.get(patient.value)

    async def shown_numbers(
        self, source: str, numbers: Mapping[str, Domain]
    ) -> Mapping[str, Shown] | None:
        self.numbers += [(source, number) for number in numbers]
        return {number: Shown(f"X{number[::-1]}"[:16], HOSPITAL) for number in numbers}
