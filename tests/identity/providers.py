"""Cross-references that do as they are told, for tests."""

from __future__ import annotations

import asyncio

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.ports import CrossReferenceError

HOSPITAL = Domain("HOSPITAL", "1.2.1", "ISO")
NORTH = Domain("NORTH", "1.2.2", "ISO")
SOUTH = Domain("SOUTH", "1.2.3", "ISO")


def local(value: str) -> PatientId:
    return PatientId(value, HOSPITAL)


def north(value: str) -> PatientId:
    return PatientId(value, NORTH)


class Scripted:
    """Knows persons as sets of IDs; fails, waits or crashes when told to.

    ``asked`` lists every lookup. While ``gate`` is there, a lookup that has read
    its answer waits for it, as one does whose answer is on its way.
    """

    def __init__(self, *persons: set[PatientId]) -> None:
        self.persons = list(persons)
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.asked: list[tuple[PatientId, Domain]] = []
        self.forgotten: list[PatientId] = []
        self.cancelled = 0

    async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
        self.asked.append((patient, domain))
        failure = self.failure
        answer = tuple(
            sorted(
                (
                    known
                    for person in self.persons
                    if patient in person
                    for known in person
                    if known.domain == domain
                ),
                key=lambda known: known.value,
            )
        )
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if isinstance(failure, CrossReferenceError):
            raise CrossReferenceError(failure.failure, failure.reason)
        if failure is not None:
            raise failure
        return answer

    def forget(self, patient: PatientId) -> None:
        self.forgotten.append(patient)
