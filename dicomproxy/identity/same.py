"""The cross-reference of a domain with itself: a source that numbers patients as this site does."""

from __future__ import annotations

from dicomproxy.dataset.patient import Domain, PatientId


class SameDomain:
    """Implements :class:`dicomproxy.ports.CrossReference` for one shared domain."""

    async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
        """Return the ID itself if *domain* issued it, else none: it means nothing elsewhere."""
        if patient.domain == domain or patient.domain.matches(domain):
            return (PatientId(patient.value, domain),)
        return ()

    def forget(self, patient: PatientId) -> None:
        """Do nothing: nothing is remembered."""
