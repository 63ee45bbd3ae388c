"""Who is asked, and how (PS3.4 C.4.1).

Rule kept: nothing leaves the house that a patient's care does not need. Sources
are asked only for exactly one Patient ID without wild cards, for Study Instance
UIDs, or for an accession number that was made up for an order of theirs or that
they have from the same system as this site; every other question, a name or any
other accession number alone among them, is put to the local PACS only. Pure: no
clock, no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.levels import (
    INSTANCE_AVAILABILITY,
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    RETRIEVE_AE_TITLE,
    SPECIFIC_CHARACTER_SET,
    STUDY_INSTANCE_UID,
    UNIQUE_KEY,
    Level,
    Root,
    levels,
    levels_above,
)
from dicomproxy.ports import LOCAL, Caller, Location, SourceQuery

ISSUER_OF_PATIENT_ID: Final = 0x00100021

IDENTIFIER_DOES_NOT_MATCH: Final = 0xA900

_MAX_MATCHES_OF_ONE_STUDY: Final = 20_000  # a list of images that is cut would hide some

_UID: Final = re.compile(r"[0-9.]{1,64}")
_WILD_CARDS: Final = re.compile(r"[*?]")
_NOT_ASKED_OF_SOURCES: Final = (RETRIEVE_AE_TITLE, INSTANCE_AVAILABILITY)


class QueryRefused(Exception):
    """A request that nobody can answer; carries the response, and no value of the request.

    Args:
        status: the DIMSE status of the final response.
        offending_element: its tag for (0000,0901), if it is one element.
        comment: for (0000,0902).
    """

    def __init__(self, status: int, offending_element: int | None, comment: str) -> None:
        self.status = status
        self.offending_element = offending_element
        self.comment = comment
        super().__init__(comment)


@dataclass(frozen=True, slots=True)
class QueryRequest:
    """A C-FIND request whose level is known.

    ``hierarchical``: each unique key above the level has exactly one value, as
    the baseline demands (PS3.4 C.4.1.3.1). Many workstations leave one out; the
    local PACS is then left to judge.
    """

    root: Root
    level: Level
    identifier: Identifier
    hierarchical: bool = True

    @property
    def patient_id(self) -> str:
        """The one Patient ID asked for; ``""`` if it is none, several or a pattern."""
        return _one_patient_id(self.identifier)

    @property
    def study_instance_uids(self) -> tuple[str, ...]:
        """The studies asked for, each once; none if any value is not a UID."""
        return _study_instance_uids(self.identifier)


@dataclass(frozen=True, slots=True)
class SourceLeg:
    """What one source is asked, one question after the other.

    A question below STUDY level names one study; ``study_instance_uids`` has it
    at the same place, and ``""`` for a question that names none or several.
    """

    source: str
    queries: tuple[SourceQuery, ...]
    study_instance_uids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """Which sources are asked; the local PACS always is.

    Args:
        legs: in the order of precedence.
        local_only: why no source is asked, as a word for the log; else empty.
        conflicts: (study, source) pairs left out since the source knows the
            study under a patient other than the local PACS does.
    """

    legs: tuple[SourceLeg, ...] = ()
    local_only: str = ""
    conflicts: tuple[tuple[str, str], ...] = ()


def validate(root: Root, identifier: Identifier) -> QueryRequest:
    """Find out what is asked for (PS3.4 C.4.1.2.2, C.4.1.3).

    Raises:
        QueryRefused: no level, or one that *root* does not have.
    """
    asked = identifier.text(QUERY_RETRIEVE_LEVEL)
    if not asked:
        raise QueryRefused(
            IDENTIFIER_DOES_NOT_MATCH, QUERY_RETRIEVE_LEVEL, "Query/Retrieve Level is missing"
        )
    level = next((known for known in levels(root) if known == asked), None)
    if level is None:
        raise QueryRefused(
            IDENTIFIER_DOES_NOT_MATCH,
            QUERY_RETRIEVE_LEVEL,
            "Query/Retrieve Level is not one of this model",
        )
    hierarchical = all(
        _has_one_value(identifier, UNIQUE_KEY[above]) for above in levels_above(root, level)
    )
    return QueryRequest(root, level, identifier, hierarchical)


def plan(
    request: QueryRequest,
    caller: Caller,
    available: Collection[str],
    known: Mapping[str, Sequence[Location]] | None = None,
    accession_sources: Collection[str] = (),
) -> QueryPlan:
    """Decide which sources are asked what.

    Below STUDY level the question goes to those that are known to hold the
    study; one that was never seen is looked for at every source. What only the
    local PACS is known to hold stays with it.

    Args:
        request: as :func:`validate` made it.
        caller: only its sources are asked, in its order.
        available: the sources there are.
        known: where each study asked for was seen, under the patient's ID here.
        accession_sources: those to whom the accession number asked for means the same
            as here, since this proxy made it up for an order of theirs, or they share the
            system that issues such numbers.
    """
    if caller.is_source:
        return QueryPlan(local_only="caller_is_source")
    visible = [name for name in caller.sources if name in available and name != LOCAL]
    if not visible:
        return QueryPlan(local_only="no_source")
    studies = request.study_instance_uids
    if request.level in (Level.SERIES, Level.IMAGE):
        if not studies:
            return QueryPlan(local_only="study_not_named")
        return _routed(request, visible, studies, known or {})
    if request.level is Level.PATIENT and not request.patient_id:
        return QueryPlan(local_only="patient_not_named")
    if not (request.patient_id or studies):
        visible = [name for name in visible if name in accession_sources]
        if not visible:
            return QueryPlan(local_only="patient_not_named")
    query = SourceQuery(request.level, source_identifier(request))
    return QueryPlan(tuple(SourceLeg(name, (query,), ("",)) for name in visible))


def _routed(
    request: QueryRequest,
    visible: Sequence[str],
    studies: Sequence[str],
    known: Mapping[str, Sequence[Location]],
) -> QueryPlan:
    questions: dict[str, list[str]] = {name: [] for name in visible}
    conflicts: list[tuple[str, str]] = []
    for study in studies:
        patients = {location.source: location.patient_id for location in known.get(study, ())}
        holders = [name for name in visible if name in patients]
        if not holders and LOCAL not in patients:
            holders = list(visible)
        local_patient = patients.get(LOCAL) or request.patient_id
        for name in holders:
            patient = patients.get(name, "")
            if local_patient and patient and patient != local_patient:
                conflicts.append((study, name))
            else:
                questions[name].append(study)
    # One question a study: above the level an archive takes a single value (PS3.4 C.4.1.3.1).
    queries = {
        study: SourceQuery(
            request.level,
            source_identifier(request, study),
            max_matches=_MAX_MATCHES_OF_ONE_STUDY,
        )
        for study in studies
    }
    legs = tuple(
        SourceLeg(name, tuple(queries[study] for study in asked), tuple(asked))
        for name, asked in questions.items()
        if asked
    )
    return QueryPlan(legs, "" if legs else "held_locally", tuple(conflicts))


def source_identifier(request: QueryRequest, study_instance_uid: str = "") -> Identifier:
    """Return the question as sources are asked it.

    It requests what merging, the identity check and locating need, and leaves
    out what is ours to say. A key beyond ASCII is requested but not matched:
    archives differ in the character sets they understand, so answers are
    filtered here. Likewise Issuer of Patient ID, which many leave empty.

    Args:
        request: what the workstation asked.
        study_instance_uid: the one study this question is about, if it is one.
    """
    asked = request.identifier.copy()
    for tag in _NOT_ASKED_OF_SOURCES:
        asked.remove(tag)
    # Kept even though the keys become plain, since archives tend to answer in what
    # was declared; but it is never of zero length (PS3.3 C.12.1.1.2).
    if asked.is_empty(SPECIFIC_CHARACTER_SET):
        asked.remove(SPECIFIC_CHARACTER_SET)
    for element in list(asked):
        if element.tag != SPECIFIC_CHARACTER_SET and _beyond_ascii(element):
            asked.set_empty(element.tag)
    if ISSUER_OF_PATIENT_ID in asked:
        asked.set_empty(ISSUER_OF_PATIENT_ID)
    for level in (*levels_above(request.root, request.level), request.level):
        if UNIQUE_KEY[level] not in asked:
            asked.set_empty(UNIQUE_KEY[level])
    if request.level is Level.STUDY and PATIENT_ID not in asked:
        asked.set_empty(PATIENT_ID)
    if study_instance_uid:
        asked.set_text(STUDY_INSTANCE_UID, study_instance_uid)
    asked.set_text(QUERY_RETRIEVE_LEVEL, request.level.value)
    return asked


def _beyond_ascii(element: Element) -> bool:
    value = element.value
    if isinstance(value, bytes):
        return not value.isascii() or b"\x1b" in value
    return any(_beyond_ascii(inner) for item in value for inner in item)


def _one_patient_id(identifier: Identifier) -> str:
    values = identifier.values(PATIENT_ID)
    if len(values) != 1 or _WILD_CARDS.search(values[0]):
        return ""
    return values[0]


def _study_instance_uids(identifier: Identifier) -> tuple[str, ...]:
    values = [value for value in identifier.values(STUDY_INSTANCE_UID) if value]
    if not all(_UID.fullmatch(value) for value in values):
        return ()
    return tuple(dict.fromkeys(values))


def _has_one_value(identifier: Identifier, tag: int) -> bool:
    values = identifier.values(tag)
    return len(values) == 1 and not _WILD_CARDS.search(values[0])
