"""How one row of an answer is written for the workstation that asked.

A local row is relayed as its own bytes unless something in it must change. A
remote row is pruned to what was asked for, says that it comes from us, and is
written in a character set that the workstation reads (PS3.4 C.4.1.1.3.2).
Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from dicomproxy.dataset import charset
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
    levels_above,
)
from dicomproxy.ports import LocalAnswer
from dicomproxy.query.plan import QueryRequest

PENDING: Final = 0xFF00
PENDING_KEYS_UNSUPPORTED: Final = 0xFF01

_TIMEZONE_OFFSET_FROM_UTC: Final = 0x00080201
_OURS_TO_SAY: Final = frozenset(
    {
        SPECIFIC_CHARACTER_SET,
        QUERY_RETRIEVE_LEVEL,
        RETRIEVE_AE_TITLE,
        INSTANCE_AVAILABILITY,
    }
)

_PATIENT_NAME: Final = 0x00100010
_REQUIRED: Final = MappingProxyType(
    {
        Level.PATIENT: frozenset({_PATIENT_NAME, PATIENT_ID}),
        # Study Date, Study Time, Accession Number, Study ID
        Level.STUDY: frozenset(
            {0x00080020, 0x00080030, 0x00080050, 0x00200010, _PATIENT_NAME, PATIENT_ID}
        ),
        Level.SERIES: frozenset({0x00080060, 0x00200011}),  # Modality, Series Number
        Level.IMAGE: frozenset({0x00200013}),  # Instance Number
    }
)
"""Required keys (PS3.4 C.6.1.1, C.6.2.1): returned without a value where it is unknown."""

COUNTS: Final = frozenset(
    {
        0x00201200,  # Number of Patient Related Studies
        0x00201202,  # Number of Patient Related Series
        0x00201204,  # Number of Patient Related Instances
        0x00201206,  # Number of Study Related Series
        0x00201208,  # Number of Study Related Instances
        0x00201209,  # Number of Series Related Instances
    }
)
"""What one holder cannot know of something that another holds too."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One C-FIND response to the workstation; the one that is not pending is final.

    ``data`` is the identifier in the transfer syntax of the request, empty in a
    final response; ``offending_element`` are tags for (0000,0901).
    """

    status: int
    data: bytes = b""
    error_comment: str = ""
    offending_element: tuple[int, ...] = ()

    @property
    def pending(self) -> bool:
        return self.status in (PENDING, PENDING_KEYS_UNSUPPORTED)


def batch_of(answers: Iterable[Answer], most: int, most_bytes: int) -> tuple[Answer, ...]:
    """Take up to *most* answers; the one that exceeds *most_bytes* together is the last."""
    taken: list[Answer] = []
    size = 0
    for answer in answers:
        taken.append(answer)
        size += len(answer.data)
        if len(taken) >= most or size >= most_bytes:
            break
    return tuple(taken)


@dataclass(frozen=True, slots=True)
class Style:
    """What every row of one operation has in common.

    Args:
        request: the question.
        transfer_syntax_uid: in which the workstation asked.
        retrieve_ae_title: the title it called, under which it will retrieve.
        charset: defined terms that its answers are written in, none for what fits.
    """

    request: QueryRequest
    transfer_syntax_uid: str
    retrieve_ae_title: str
    charset: tuple[str, ...] = ()


def local_row(style: Style, answer: LocalAnswer, row: Identifier) -> bytes:
    """Return the identifier of a local row: its own bytes if nothing has to change.

    Args:
        style: of the operation.
        answer: as the local PACS gave it.
        row: its identifier, decoded; it may be changed.
    """
    changed = None
    title = style.retrieve_ae_title
    names_another = not row.is_empty(RETRIEVE_AE_TITLE) and row.values(RETRIEVE_AE_TITLE) != (
        title,
    )
    # Many archives leave it empty above IMAGE level; what was called retrieves it all the same.
    names_none = row.is_empty(RETRIEVE_AE_TITLE) and (
        RETRIEVE_AE_TITLE in row or RETRIEVE_AE_TITLE in style.request.identifier
    )
    if title and (names_another or names_none):
        changed = row
        changed.put(_constant(RETRIEVE_AE_TITLE, "AE", title))
    if INSTANCE_AVAILABILITY in row and row.is_empty(INSTANCE_AVAILABILITY):
        # Never of zero length (PS3.4 C.4.1.1.3.2): an archive that does not know says nothing.
        changed = row
        changed.remove(INSTANCE_AVAILABILITY)
    if style.charset and row.specific_character_set != style.charset and _has_text(row):
        changed = (changed or row).with_character_set(style.charset, replace=True)
    if changed is None and answer.transfer_syntax_uid in ("", style.transfer_syntax_uid):
        return answer.data
    return (changed or row).encode(style.transfer_syntax_uid)


def remote_row(
    style: Style,
    row: Identifier,
    *,
    study_instance_uid: str = "",
    availability: str = "",
    shared: bool = False,
) -> Answer:
    """Return a source's row as the workstation gets it.

    Args:
        style: of the operation.
        row: as the source gave it.
        study_instance_uid: the study asked about, for a row that does not say it.
        availability: Instance Availability to report, none to report nothing.
        shared: others hold it too, so the counts of one are left out.
    """
    request = style.request
    made, complete = _pruned(row, request.identifier, _REQUIRED[request.level])
    for level in (*levels_above(request.root, request.level), request.level):
        _complete_unique_key(made, row, request, UNIQUE_KEY[level], study_instance_uid)
    if shared:
        for tag in COUNTS:
            if tag in made:
                made.set_empty(tag)
    made.put(_constant(QUERY_RETRIEVE_LEVEL, "CS", request.level.value))
    if style.retrieve_ae_title and (
        request.level is not Level.PATIENT or RETRIEVE_AE_TITLE in request.identifier
    ):
        made.put(_constant(RETRIEVE_AE_TITLE, "AE", style.retrieve_ae_title))
    if availability and request.level is not Level.PATIENT:
        made.put(_constant(INSTANCE_AVAILABILITY, "CS", availability))
    made = _in_readable_character_set(style, made)
    status = PENDING if complete else PENDING_KEYS_UNSUPPORTED
    return Answer(status, made.encode(style.transfer_syntax_uid))


@lru_cache(maxsize=256)
def _constant(tag: int, vr: str, text: str) -> Element:
    """Return an element that row after row has alike."""
    made = Identifier()
    made.set_text(tag, text, vr)
    return next(iter(made))


def _pruned(
    row: Identifier, asked: Identifier, required: Iterable[int] = ()
) -> tuple[Identifier, bool]:
    """Return what of *row* was asked for, and whether all of it is supported there.

    What the source left out is unsupported, and left out here too, unless it is
    a required key, whose value is then merely unknown (PS3.4 C.2.2.1).
    """
    kept = []
    complete = True
    for tag, vr, value in asked:
        if tag in _OURS_TO_SAY:
            continue
        found = row.element(tag)
        if tag == _TIMEZONE_OFFSET_FROM_UTC and row.is_empty(tag):
            continue  # present only with a value
        if found is None:
            if tag in required:
                kept.append(Element(tag, vr, b""))
            else:
                complete = False
        elif isinstance(found.value, tuple) and isinstance(value, tuple) and value and value[0]:
            items = tuple(_pruned(item, value[0])[0] for item in found.value)
            kept.append(found._replace(value=items))
        else:
            kept.append(found)
    return Identifier(kept, inherited=row.specific_character_set), complete


def _complete_unique_key(
    made: Identifier, row: Identifier, request: QueryRequest, tag: int, study_instance_uid: str
) -> None:
    """Have a unique key in the answer: from the row, else the single value asked for."""
    if not made.is_empty(tag):
        return
    found = row.element(tag)
    if found is not None and not row.is_empty(tag):
        made.put(found)
        return
    if tag == STUDY_INSTANCE_UID and study_instance_uid:
        made.set_text(tag, study_instance_uid, "UI")
        return
    asked = request.identifier.values(tag)
    if len(asked) == 1 and not set(asked[0]) & {"*", "?"}:
        if tag == PATIENT_ID and not asked[0].isascii():
            made.set_empty(tag)  # in another character set, maybe; and the workstation knows it
            return
        made.set_text(tag, asked[0])
        return
    made.set_empty(tag)


def _has_text(row: Identifier) -> bool:
    return next(row.texts(), None) is not None


def _in_readable_character_set(style: Style, row: Identifier) -> Identifier:
    """Write *row* in the character set the site set, the request's, or UTF-8, if any is needed."""
    texts = list(row.texts())
    if not texts:
        if SPECIFIC_CHARACTER_SET not in row and not any(element.vr == "SQ" for element in row):
            return row  # as it is: nothing in it declares one
        return row.with_character_set(())
    if style.charset:
        return row.with_character_set(style.charset, replace=True)
    terms = charset.choose(style.request.identifier.specific_character_set, texts)
    return row.with_character_set(terms)
