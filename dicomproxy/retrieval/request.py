"""What a C-MOVE or C-GET identifier asks for (PS3.4 C.4.2.1.4). Pure.

Only unique keys count. UID lists are allowed at STUDY, SERIES and IMAGE level,
for the key of the level itself; a Patient ID is always one. A Patient Root
request below PATIENT level may leave the Patient ID out: workstations do, and
the Study Instance UID says it all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
    Root,
    levels,
)
from dicomproxy.retrieval.selection import Selection
from dicomproxy.retrieval.tally import IDENTIFIER_MISMATCH

_UID: Final = re.compile(r"[0-9.]{1,64}")


class RetrieveRefused(Exception):
    """The request cannot be carried out as it stands.

    Args:
        status: of the C-MOVE-RSP or C-GET-RSP.
        offending_element: the tag that (0000,0901) names, if one is at fault.
        comment: for (0000,0902); without values, at most 64 characters.
    """

    def __init__(self, status: int, offending_element: int | None, comment: str) -> None:
        self.status = status
        self.offending_element = offending_element
        self.comment = comment
        super().__init__(comment)


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """The unique keys of one retrieve; each UID once, in the order given."""

    root: Root
    level: Level
    patient_id: str = ""
    study_instance_uids: tuple[str, ...] = ()
    series_instance_uids: tuple[str, ...] = ()
    sop_instance_uids: tuple[str, ...] = ()

    @property
    def selection(self) -> Selection:
        """Which instances of each of its studies are asked for."""
        if self.level in (Level.PATIENT, Level.STUDY):
            return Selection()
        return Selection(
            self.level, frozenset(self.series_instance_uids), frozenset(self.sop_instance_uids)
        )


def parse_request(root: Root, identifier: Identifier) -> RetrieveRequest:
    """Read the identifier of a retrieve in the information model *root*.

    Raises:
        RetrieveRefused: A900, naming the element at fault.
    """
    level = _level(root, identifier)
    patient_id = _patient_id(root, level, identifier)
    studies = series = instances = ()  # type: tuple[str, ...]
    if level is not Level.PATIENT:
        studies = _uids(identifier, STUDY_INSTANCE_UID, many=level is Level.STUDY)
    if level in (Level.SERIES, Level.IMAGE):
        series = _uids(identifier, SERIES_INSTANCE_UID, many=level is Level.SERIES)
    if level is Level.IMAGE:
        instances = _uids(identifier, SOP_INSTANCE_UID, many=True)
    return RetrieveRequest(root, level, patient_id, studies, series, instances)


def _level(root: Root, identifier: Identifier) -> Level:
    given = identifier.text(QUERY_RETRIEVE_LEVEL)
    if given not in levels(root):
        raise RetrieveRefused(
            IDENTIFIER_MISMATCH, QUERY_RETRIEVE_LEVEL, "unknown Query/Retrieve Level"
        )
    return Level(given)


def _patient_id(root: Root, level: Level, identifier: Identifier) -> str:
    values = identifier.values(PATIENT_ID) if root is Root.PATIENT else ()
    if len(values) > 1:
        raise RetrieveRefused(IDENTIFIER_MISMATCH, PATIENT_ID, "more than one Patient ID")
    value = values[0] if values else ""
    if level is not Level.PATIENT:
        # A universal key says nothing, and nothing is needed here.
        return "" if "*" in value or "?" in value else value
    if not value or "*" in value or "?" in value:
        raise RetrieveRefused(IDENTIFIER_MISMATCH, PATIENT_ID, "exactly one Patient ID is needed")
    return value


def _uids(identifier: Identifier, tag: int, *, many: bool) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(uid for uid in identifier.values(tag) if uid))
    if not found:
        raise RetrieveRefused(IDENTIFIER_MISMATCH, tag, "a unique key is missing")
    if len(found) > 1 and not many:
        raise RetrieveRefused(IDENTIFIER_MISMATCH, tag, "a list where one UID is needed")
    if not all(_UID.fullmatch(uid) for uid in found):
        raise RetrieveRefused(IDENTIFIER_MISMATCH, tag, "not a UID")
    return found
