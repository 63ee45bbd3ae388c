"""Which domain a patient ID belongs to: what the data set says, else what is configured. Pure.

Rules kept: an issuer that a data set names is believed over the one configured
for its source; one that means the same comes out as the configured domain,
whole, so that equal domains are equal values everywhere. A source without a
domain of its own shares the local one. Where the site has named no domain for a
source at all, there is nothing that an issuer could be compared with, and every
ID from there counts as one of the only domain there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import PATIENT_ID
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.ports import LOCAL

ISSUER_OF_PATIENT_ID: Final = 0x00100021
ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE: Final = 0x00100024
OTHER_PATIENT_IDS_SEQUENCE: Final = 0x00101002
LOCAL_NAMESPACE_ENTITY_ID: Final = 0x00400031
UNIVERSAL_ENTITY_ID: Final = 0x00400032
UNIVERSAL_ENTITY_ID_TYPE: Final = 0x00400033


def issuer_of(identifier: Identifier) -> Domain:
    """Return the issuer that a data set, or an item of Other Patient IDs, names (PS3.3 10.14).

    Unnamed where it names none. Of several qualifiers the first counts; the
    sequence may have one item only.
    """
    qualifiers = identifier.items(ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE)
    qualifier = qualifiers[0] if qualifiers else Identifier()
    return Domain(
        identifier.text(ISSUER_OF_PATIENT_ID),
        qualifier.text(UNIVERSAL_ENTITY_ID),
        qualifier.text(UNIVERSAL_ENTITY_ID_TYPE),
    )


def accession_issuer_of(items: Iterable[Identifier]) -> Domain:
    """Return the issuer in the items of Issuer of Accession Number Sequence (PS3.3 10.17)."""
    for item in items:
        return Domain(
            item.text(LOCAL_NAMESPACE_ENTITY_ID),
            item.text(UNIVERSAL_ENTITY_ID),
            item.text(UNIVERSAL_ENTITY_ID_TYPE),
        )
    return Domain()


def resolve(named: Domain, default: Domain) -> Domain:
    """Return the domain that *named* means where *default* is what belongs there."""
    if not named.is_named or not default.is_named or named.matches(default):
        return default
    return named


class Domains:
    """The domain of this site and of each of its sources.

    Args:
        local: the domain in which the local PACS numbers its patients.
        sources: by source name; one whose domain is unnamed has the local one.
        ignore_issuers: sources whose data sets name issuers that mean nothing.
    """

    def __init__(
        self,
        local: Domain,
        sources: Mapping[str, Domain] | None = None,
        ignore_issuers: Iterable[str] = (),
    ) -> None:
        self.local = local
        self._names = frozenset(sources or ())
        self._sources: dict[str, Domain] = {}
        for name, domain in (sources or {}).items():
            if domain.is_named:
                self._sources[name] = self.canonical(domain)
        self._ignored = frozenset(ignore_issuers)

    def of(self, source: str) -> Domain:
        """Return the domain of *source*; the local one for ``local``."""
        return self._sources.get(source, self.local)

    def __iter__(self) -> Iterator[Domain]:
        """Yield every domain once, the local one first."""
        yield from dict.fromkeys((self.local, *self._sources.values()))

    def named(self, name: str) -> Domain | None:
        """Return the domain of the source *name*, or whose namespace or universal ID that is."""
        if name == LOCAL or name in self._names:
            return self.of(name)
        names = ((one, (one.namespace, one.universal_id)) for one in self)
        return next((one for one, known in names if name and name in known), None)

    def shares_local(self, source: str) -> bool:
        """Tell whether IDs of *source* are local IDs."""
        return self.is_local(self.of(source))

    def is_local(self, domain: Domain) -> bool:
        """Tell whether *domain* is the local one."""
        return domain == self.local or domain.matches(self.local)

    def at_sources(self, patients: Iterable[PatientId]) -> set[tuple[str, str]]:
        """Return where *patients* are known by these very IDs: each a source and the ID there."""
        return {
            (source, patient.value)
            for patient in map(self.canonical_id, patients)
            for source in self._names
            if self.of(source) == patient.domain
        }

    def canonical(self, domain: Domain) -> Domain:
        """Return the configured domain that *domain* means, itself where none is meant."""
        return next((known for known in self if domain == known or domain.matches(known)), domain)

    def canonical_id(self, patient: PatientId) -> PatientId:
        """Return *patient* with its domain as configured; spaces around an ID mean nothing."""
        return PatientId(patient.value.strip(" "), self.canonical(patient.domain))

    def patient_of(self, identifier: Identifier, source: str = LOCAL) -> PatientId | None:
        """Return the qualified ID in an answer of *source*; None where it has not exactly one."""
        values = identifier.values(PATIENT_ID)
        return self._qualify(values, issuer_of(identifier), source)

    def patient_of_header(self, header: InstanceHeader, source: str = LOCAL) -> PatientId | None:
        """Return the qualified ID in the header of an instance from *source*."""
        values = (header.patient_id,) if header.patient_id else ()
        named = Domain(
            header.issuer_of_patient_id,
            header.issuer_universal_id,
            header.issuer_universal_id_type,
        )
        return self._qualify(values, named, source)

    def other_ids_of(self, identifier: Identifier) -> tuple[PatientId, ...]:
        """Return the other IDs that an answer names (0010,1002), as far as each has an issuer."""
        found = []
        for item in identifier.items(OTHER_PATIENT_IDS_SEQUENCE):
            values, issuer = item.values(PATIENT_ID), issuer_of(item)
            if len(values) == 1 and values[0] and issuer.is_named:
                found.append(PatientId(values[0], self.canonical(issuer)))
        return tuple(dict.fromkeys(found))

    def _qualify(self, values: tuple[str, ...], named: Domain, source: str) -> PatientId | None:
        if len(values) != 1 or not values[0]:
            return None
        default = self.of(source)
        domain = default if source in self._ignored else resolve(named, default)
        return PatientId(values[0], self.canonical(domain))
