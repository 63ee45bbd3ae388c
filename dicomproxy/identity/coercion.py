"""Making a foreign object, or an answer about it, look local. Pure.

The same decisions serve C-FIND answers and delivered objects: the patient
module, accession numbers and request identifiers, descriptions and codes, and a
site's own rules. Rules kept: UIDs are never touched; whatever is changed or
removed is found again in Original Attributes Sequence (PS3.3 C.12.1.1.9); the
same input gives the same output, the time included, which is an argument.
Values stay in the object's own character set where they fit; where one does
not, everything becomes ISO_IR 192.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Final

from dicomproxy.dataset.charset import UTF8
from dicomproxy.dataset.identifier import CannotEncode, Element, Identifier
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.dataset.splice import Decision, Rewriter
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion_patient import (
    PATIENT_TAGS,
    make_patient_local,
)
from dicomproxy.identity.coercion_record import RECORD_TAGS, record
from dicomproxy.identity.coercion_request import (
    REQUEST_TAGS,
    Code,
    accession_numbers,
    make_requests_local,
    map_codes,
    map_descriptions,
)
from dicomproxy.identity.coercion_rules import Action, Rule, prefixed
from dicomproxy.identity.coercion_values import put
from dicomproxy.identity.safety import Demographics

__all__ = [
    "Action",
    "Code",
    "Coercer",
    "CoercionSettings",
    "LocalPatient",
    "Rule",
    "accession_numbers",
    "coerce",
    "coerce_answer",
]

_MODALITY: Final = 0x00080060
_MODALITIES_IN_STUDY: Final = 0x00080061
_STUDY_DESCRIPTION: Final = 0x00081030
_STUDY_ID: Final = 0x00200010
_PATIENT_ID: Final = 0x00100020
SIGNATURES: Final = frozenset({0x4FFE0001, 0xFFFAFFFA})
"""MAC Parameters Sequence and Digital Signatures Sequence (PS3.3 C.12.1.1.3)."""


@dataclass(frozen=True, slots=True)
class LocalPatient:
    """Who the patient is here.

    Args:
        patient_id: the local ID, in the local domain.
        demographics: name, birth date and sex as the local PACS has them, empty
            values included; None where they are not known, and then those of the
            object are kept.

    Raises:
        ValueError: the ID is empty, which would leave an object without a patient.
    """

    patient_id: PatientId
    demographics: Demographics | None = None

    def __post_init__(self) -> None:
        if not self.patient_id.value:
            raise ValueError("a local patient has an ID")

    def __repr__(self) -> str:
        # Values stay out: a representation may end in a log.
        return "<LocalPatient>"


@dataclass(frozen=True)
class CoercionSettings:
    """How objects of one source are made local.

    Args:
        source: its name, recorded as the source of previous values.
        modifying_system: what is recorded as having changed them.
        domain: what an ID without an issuer belongs to there.
        ignore_issuers: its objects name issuers of patient IDs that mean nothing.
        study_description_prefix: marks studies of this source for their readers.
        descriptions: local names of its studies and procedures, by its own.
        procedure_codes: local codes by (value, scheme) of its own.
        rules: what else is changed.
        keep_study_id: whether Study ID is left as it is; else it is emptied.
    """

    source: str
    modifying_system: str
    domain: Domain = Domain()  # noqa: RUF009  (frozen)
    ignore_issuers: bool = False
    study_description_prefix: str = ""
    descriptions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    procedure_codes: Mapping[tuple[str, str], Code] = field(
        default_factory=lambda: MappingProxyType({})
    )
    rules: tuple[Rule, ...] = ()
    keep_study_id: bool = False

    @cached_property
    def tags(self) -> frozenset[int]:
        """All that is looked at or changed: what a header must be read for, a query ask for."""
        ruled = {rule.tag for rule in self.rules} | {rule.other for rule in self.rules}
        own = {
            SPECIFIC_CHARACTER_SET,
            _MODALITY,
            _MODALITIES_IN_STUDY,
            _STUDY_DESCRIPTION,
            _STUDY_ID,
        }
        return frozenset(own | PATIENT_TAGS | REQUEST_TAGS | RECORD_TAGS | (ruled - {0}))


def coerce(
    view: Identifier,
    patient: LocalPatient | None,
    settings: CoercionSettings,
    accessions: Mapping[str, Shown] | None,
    at: datetime,
    destination: str = "",
) -> Decision:
    """Decide what is changed in an object.

    Args:
        view: the elements of :attr:`CoercionSettings.tags` that the object has, and
            of :data:`SIGNATURES`.
        patient: who the patient is here; None leaves the patient as they are.
        accessions: what to show for each foreign accession number that
            :func:`accession_numbers` finds; one without an entry is emptied. None
            keeps accession numbers and the identifiers of requests, for a source
            whose orders are those of this site.
        at: when; recorded, with a time zone.
        destination: AE title to which the object goes, for rules about it.

    Returns:
        The edits, none where nothing is to be changed, and whether every other
        text of the object has to become Unicode.

    Raises:
        CannotEncode: a value cannot be written in any character set.
    """
    before = view
    try:
        work = _coerced(view, patient, settings, accessions, destination)
    except CannotEncode:
        before = view.with_character_set(UTF8)
        work = _coerced(before, patient, settings, accessions, destination)
    edits = dict(_differences(before, work))
    if not edits:
        return Decision({})
    # They would not hold for what is delivered; the record keeps them for what came.
    edits.update((tag, None) for tag in SIGNATURES if tag in view)
    unicode = before is not view
    if unicode:
        edits[SPECIFIC_CHARACTER_SET] = work.element(SPECIFIC_CHARACTER_SET)
    record(edits, view, before, settings.source, settings.modifying_system, at)
    return Decision(edits, unicode)


def coerce_answer(
    row: Identifier,
    patient: LocalPatient | None,
    settings: CoercionSettings,
    accessions: Mapping[str, Shown] | None,
    destination: str = "",
) -> Identifier:
    """Return an answer to a query as the object would say it once it is coerced.

    Only keys that the row has are changed; one that an object would lose stays,
    without a value. What a rule copies from has to be among the keys.

    Args:
        row: an answer of the source; it is left as it is.
        destination: AE title of the caller.

    Raises:
        CannotEncode: a value cannot be written in any character set.
    """
    try:
        work = _coerced(row, patient, settings, accessions, destination)
    except CannotEncode:
        unicode = row.with_character_set(UTF8)
        work = _coerced(unicode, patient, settings, accessions, destination)
    for element in list(work):
        if element.tag not in row and element.tag != SPECIFIC_CHARACTER_SET:
            work.remove(element.tag)
    for element in row:
        if element.tag not in work and element.tag != SPECIFIC_CHARACTER_SET:
            empty: bytes | tuple[Identifier, ...] = () if element.vr == "SQ" else b""
            work.put(Element(element.tag, element.vr, empty))
    return work


class Coercer(Rewriter):
    """Rewrites the instances of one delivery; see :func:`coerce` for its arguments.

    Several threads may use it. Its :meth:`rewrite` raises CannotEncode too.
    """

    def __init__(
        self,
        patient: LocalPatient | None,
        settings: CoercionSettings,
        accessions: Mapping[str, Shown] | None,
        at: datetime,
        destination: str = "",
    ) -> None:
        def decide(view: Identifier) -> Decision:
            return coerce(view, patient, settings, accessions, at, destination)

        super().__init__(settings.tags, decide, required=(_PATIENT_ID,), further=SIGNATURES)


# ---------------------------------------------------------------------- deciding


def _coerced(
    view: Identifier,
    patient: LocalPatient | None,
    settings: CoercionSettings,
    accessions: Mapping[str, Shown] | None,
    destination: str,
) -> Identifier:
    work = view.copy()
    if settings.descriptions:
        map_descriptions(work, settings.descriptions)
    if settings.procedure_codes:
        map_codes(work, settings.procedure_codes)
    if settings.rules:
        modalities = view.values(_MODALITY) or view.values(_MODALITIES_IN_STUDY)
        for rule in settings.rules:
            if rule.concerns(modalities, destination):
                rule.apply(work)
    if prefix := settings.study_description_prefix:
        put(work, _STUDY_DESCRIPTION, prefixed(prefix, work.text(_STUDY_DESCRIPTION), "LO"))
    if not settings.keep_study_id:
        put(work, _STUDY_ID, "")
    if patient is not None:
        make_patient_local(
            work,
            patient.patient_id,
            patient.demographics,
            settings.domain,
            settings.ignore_issuers,
        )
    if accessions is not None:
        make_requests_local(work, accessions)
    return work


def _differences(before: Identifier, after: Identifier) -> Iterator[tuple[int, Element | None]]:
    for element in after:
        if before.element(element.tag) != element:
            yield element.tag, element
    for element in before:
        if element.tag not in after:
            yield element.tag, None
