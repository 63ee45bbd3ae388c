"""The patient module of a foreign object in local words (PS3.3 C.7.1.1). Pure.

The foreign ID moves into Other Patient IDs Sequence with its issuer and type. Other IDs
that the object names stay, those without an issuer get that of their source,
since an unqualified number may be somebody else's here; one that claims to be
of the local domain goes, because only this site says what its IDs are. Retired
Other Patient IDs (0010,1000) cannot name an issuer, and goes as well.
"""

from __future__ import annotations

from typing import Final

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.coercion_values import item_within, put, put_items, universal
from dicomproxy.identity.domains import issuer_of, resolve
from dicomproxy.identity.safety import Demographics

_NAME: Final = 0x00100010
_ID: Final = 0x00100020
_ISSUER: Final = 0x00100021
_TYPE: Final = 0x00100022
_QUALIFIERS: Final = 0x00100024
_BIRTH_DATE: Final = 0x00100030
_SEX: Final = 0x00100040
_OTHER_IDS: Final = 0x00101000
_OTHER_IDS_SEQUENCE: Final = 0x00101002

PATIENT_TAGS: Final = frozenset(
    {
        _NAME,
        _ID,
        _ISSUER,
        _TYPE,
        _QUALIFIERS,
        _BIRTH_DATE,
        _SEX,
        _OTHER_IDS,
        _OTHER_IDS_SEQUENCE,
    }
)


def make_patient_local(
    work: Identifier,
    local: PatientId,
    demographics: Demographics | None,
    source: Domain,
    ignore_issuer: bool = False,
) -> None:
    """Give *work* the local patient.

    Args:
        source: the domain of an ID that names no issuer.
        ignore_issuer: what is named as the issuer of the ID means nothing.

    Raises:
        CannotEncode: a value does not fit into the character set of *work*.
    """
    domain = source if ignore_issuer else resolve(issuer_of(work), source)
    foreign = PatientId(work.text(_ID), domain)
    if not _is_same(foreign, local):
        _other_ids(work, foreign, local, source)
    if local.domain.is_named or foreign.value != local.value:
        _issuer(work, local.domain)
    if foreign.value != local.value:
        work.remove(_TYPE)
    put(work, _ID, local.value)
    if demographics is not None:
        put(work, _NAME, demographics.name)
        put(work, _BIRTH_DATE, demographics.birth_date)
        put(work, _SEX, demographics.sex)


def _is_same(one: PatientId, other: PatientId) -> bool:
    if one.value != other.value:
        return False
    return one.domain.matches(other.domain) or not (one.domain.is_named and other.domain.is_named)


def _issuer(work: Identifier, domain: Domain) -> None:
    if domain.namespace:
        put(work, _ISSUER, domain.namespace)
    else:
        work.remove(_ISSUER)
    qualifiers = []
    if domain.universal_id:
        qualifier = item_within(work)
        universal(qualifier, domain)
        qualifiers.append(qualifier)
    put_items(work, _QUALIFIERS, qualifiers)


def _other_ids(work: Identifier, foreign: PatientId, local: PatientId, source: Domain) -> None:
    kept: list[Identifier] = []
    known: list[PatientId] = []
    for item in work.items(_OTHER_IDS_SEQUENCE):
        named = issuer_of(item)
        other = PatientId(item.text(_ID), resolve(named, source))
        if other.domain.matches(local.domain):
            continue
        if not named.is_named and other.domain.is_named:
            item = item.copy()
            _issuer(item, other.domain)
        kept.append(item)
        known.append(other)
    if foreign.value and not any(_is_same(foreign, other) for other in known):
        item = item_within(work)
        put(item, _ID, foreign.value)
        _issuer(item, foreign.domain)
        put(item, _TYPE, work.text(_TYPE) or "TEXT")
        kept.append(item)
    put_items(work, _OTHER_IDS_SEQUENCE, kept)
    work.remove(_OTHER_IDS)
