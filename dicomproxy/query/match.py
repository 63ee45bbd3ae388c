"""Attribute matching, applied to answers of archives that ignore keys (PS3.4 C.2.2.2).

Rule kept: an attribute that an answer lacks was not supported there, and is
not held against it; but nothing vouches for a patient who is not named. Where
un-negotiated behaviour is undefined (several values in a key that is no UID),
any of them may match, as archives in the field do. Pure; any values whatever
give an answer, and no pattern takes exponential time.
"""

from __future__ import annotations

import re
import unicodedata
from calendar import monthrange
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final

from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.levels import (
    INSTANCE_AVAILABILITY,
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    RETRIEVE_AE_TITLE,
    SPECIFIC_CHARACTER_SET,
    Level,
)

_NEVER_MATCHED: Final = frozenset(
    {
        SPECIFIC_CHARACTER_SET,
        QUERY_RETRIEVE_LEVEL,
        RETRIEVE_AE_TITLE,
        INSTANCE_AVAILABILITY,
        0x00080201,  # Timezone Offset From UTC tells how to read the others
    }
)
_ISSUER_OF_PATIENT_ID: Final = 0x00100021
_IDENTITY: Final = frozenset({PATIENT_ID, _ISSUER_OF_PATIENT_ID})  # judged by same_patient
_WILD_CARD_VRS: Final = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_NUMBER_VRS: Final = frozenset(
    {"DS", "IS", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"}
)  # compared as numbers: 1 is 01 is 1.0
_BYTES_VRS: Final = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})

_DATE_TIME: Final = r"\d{4,14}(?:\.\d{1,6})?(?:[+-](?:0\d|1[0-4])\d\d)?"
_DATE_TIME_ALONE: Final = re.compile(_DATE_TIME)
_DATE_TIME_RANGE: Final = re.compile(rf"({_DATE_TIME})?-({_DATE_TIME})?")
_DATE_TIME_PARTS: Final = re.compile(r"(\d{4,14})(?:\.(\d{1,6}))?(?:([+-])(\d\d)(\d\d))?")
_NOT_A_DIGIT: Final = re.compile(r"[^0-9]")
_LONGEST_TIME: Final = 12  # HHMMSSFFFFFF
_LONGEST_DATE: Final = 8


def same_patient(answer: Identifier, keys: Identifier, level: Level) -> bool:
    """Tell whether *answer* is about the patient that *keys* name, if they name one.

    At PATIENT and STUDY level an answer without a Patient ID is about nobody.
    Issuers are compared where both sides give one.
    """
    if not keys.is_empty(PATIENT_ID):
        if answer.is_empty(PATIENT_ID):
            if level in (Level.PATIENT, Level.STUDY) and keys.values(PATIENT_ID) != ("*",):
                return False
        elif not _key_matches(keys, answer, PATIENT_ID):
            return False
    if keys.is_empty(_ISSUER_OF_PATIENT_ID) or answer.is_empty(_ISSUER_OF_PATIENT_ID):
        return True
    return _key_matches(keys, answer, _ISSUER_OF_PATIENT_ID)


def matches(answer: Identifier, keys: Identifier, level: Level) -> bool:
    """Tell whether *answer* satisfies every matching key of *keys*.

    Args:
        answer: a row as an archive gave it, in its own character set.
        keys: the workstation's request, in its own character set.
        level: of the query; it decides whether a Patient ID has to be there.
    """
    prepared = Keys(keys, level)
    return prepared.same_patient(answer) and prepared.matches(answer)


class Keys:
    """What one operation asks for, prepared once: most keys of a request match anything.

    Args:
        identifier: the workstation's request, in its own character set.
        level: of the query.
    """

    def __init__(self, identifier: Identifier, level: Level) -> None:
        self._identifier = identifier
        self._level = level
        patients = identifier.values(PATIENT_ID)
        self._patient = patients if len(patients) == 1 and not _has_wild_card(patients[0]) else ()
        self._issued = not identifier.is_empty(_ISSUER_OF_PATIENT_ID)
        self._matched = tuple(
            element
            for element in identifier
            if element.tag not in _NEVER_MATCHED
            and element.tag not in _IDENTITY
            and not identifier.is_empty(element.tag)
        )

    def same_patient(self, answer: Identifier) -> bool:
        """As :func:`same_patient`."""
        if self._patient and not self._issued and answer.values(PATIENT_ID) == self._patient:
            return True  # by far the most frequent case
        return same_patient(answer, self._identifier, self._level)

    def matches(self, answer: Identifier) -> bool:
        """Tell whether *answer*, about the same patient, satisfies all other keys."""
        return all(_element_matches(self._identifier, key, answer) for key in self._matched)


def _has_wild_card(value: str) -> bool:
    return "*" in value or "?" in value


def _key_matches(keys: Identifier, answer: Identifier, tag: int) -> bool:
    element = keys.element(tag)
    return element is None or _element_matches(keys, element, answer)


def _element_matches(keys: Identifier, element: Element, answer: Identifier) -> bool:
    tag, vr, _ = element
    present = answer.element(tag)
    if present is None or keys.is_empty(tag):
        return True  # not supported there, or universal (C.2.2.2.3)
    if vr == "SQ":
        return _sequence_matches(keys.items(tag), answer.items(tag))
    if vr in _BYTES_VRS or present.vr == "SQ":
        return True  # matching is not defined for these
    asked = [value for value in keys.values(tag) if value]
    found = answer.values(tag)
    return not asked or any(_value_matches(key, found, vr) for key in asked)


def _sequence_matches(asked: Sequence[Identifier], found: Sequence[Identifier]) -> bool:
    """Match a sequence by its one item, key by key, against any item (C.2.2.2.6)."""
    if not asked or _universal(asked[0]):
        return True
    return any(
        all(
            _element_matches(asked[0], element, item)
            for element in asked[0]
            if element.tag != SPECIFIC_CHARACTER_SET
        )
        for item in found
    )


def _universal(item: Identifier) -> bool:
    return all(
        element.tag == SPECIFIC_CHARACTER_SET
        or item.is_empty(element.tag)
        or (element.vr == "SQ" and all(_universal(inner) for inner in item.items(element.tag)))
        for element in item
    )


def _value_matches(key: str, found: Sequence[str], vr: str) -> bool:
    """Match one value of a key; of several values found, any will do (C.2.2.3)."""
    if vr in _WILD_CARD_VRS and not key.strip("*"):
        return True
    if vr == "PN":
        return any(_name_matches(key, value) for value in found)
    if vr in _WILD_CARD_VRS:
        return any(like(key, value) for value in found)
    if vr == "DA":
        return any(_in_range(key, value, _LONGEST_DATE) for value in found if value)
    if vr == "TM":
        return any(_in_range(key, value, _LONGEST_TIME) for value in found if value)
    if vr == "DT":
        return any(_date_time_matches(key, value) for value in found if value)
    if vr in _NUMBER_VRS:
        return any(_same_number(key, value) for value in found)
    return key in found


# ----------------------------------------------------------------------- text


def like(pattern: str, value: str) -> bool:
    """Match ``*`` (any characters) and ``?`` (exactly one) (PS3.4 C.2.2.2.4).

    Not by regular expression: a pattern of many stars would take one ages.
    """
    if not _has_wild_card(pattern):
        return pattern == value
    at = position = 0
    star = resume = -1
    while position < len(value):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, position
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", value[position]):
            at, position = at + 1, position + 1
        elif star >= 0:
            # Let the last star take one character more.
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return not pattern[at:].strip("*")


def _name_matches(pattern: str, value: str) -> bool:
    """Match a person name regardless of case and accents (PS3.4 C.2.2.2.1).

    A pattern of one component group may match any group of the value; one of
    several has each of them matched by the group in the same place.
    """
    wanted = [_component_group(group) for group in pattern.split("=")]
    groups = [_component_group(group) for group in value.split("=")]
    if len(wanted) == 1:
        return any(like(wanted[0], group) for group in groups)
    return all(
        not group or (place < len(groups) and like(group, groups[place]))
        for place, group in enumerate(wanted)
    )


@lru_cache(maxsize=512)
def _folded(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(char for char in decomposed if not unicodedata.combining(char))
    return plain.casefold()


def _component_group(group: str) -> str:
    components = [component.strip() for component in _folded(group).split("^")]
    return "^".join(components).rstrip("^")


def _same_number(key: str, value: str) -> bool:
    try:
        return float(key) == float(value)
    except ValueError:
        return key == value


# ---------------------------------------------------------------- date and time


def _in_range(key: str, value: str, longest: int) -> bool:
    """Match DA or TM, alone or as a range with both ends included (PS3.4 C.2.2.2.5).

    An end of less precision means the whole of its hour or minute.
    """
    start, hyphen, end = key.partition("-")
    found = _digits(value).ljust(longest, "0")
    if not hyphen:
        return found == _digits(start).ljust(longest, "0")
    first, last = _digits(start).ljust(longest, "0"), _digits(end)
    return first <= found and (not last or found <= last.ljust(longest, "9"))


def _digits(text: str) -> str:
    # The ACR-NEMA spellings 1997.04.24 and 14:45:30 are still met.
    return _NOT_A_DIGIT.sub("", text)


def _date_time_matches(key: str, value: str) -> bool:
    if _DATE_TIME_ALONE.fullmatch(key):
        # A hyphen and four digits up to 1400 are an offset, not the end of a range.
        start, end = key, key
    elif ends := _DATE_TIME_RANGE.fullmatch(key):
        start, end = ends[1] or "", ends[2] or ""
    else:
        return key == value
    return (not start or _not_before(value, start)) and (not end or _not_before(end, value, True))


def _not_before(late: str, early: str, inclusive: bool = False) -> bool:
    """Tell whether *late* is not before *early*; in local clocks unless both give an offset."""
    late_moment, late_offset = _moment(late, latest=inclusive)
    early_moment, early_offset = _moment(early, latest=False)
    if late_moment is None or early_moment is None:
        return False
    if late_offset is not None and early_offset is not None:
        return late_moment - late_offset >= early_moment - early_offset
    return late_moment >= early_moment


@lru_cache(maxsize=512)
def _moment(text: str, *, latest: bool) -> tuple[datetime | None, timedelta | None]:
    """Return the first or last moment that *text* covers, and its offset from UTC."""
    parts = _DATE_TIME_PARTS.fullmatch(text)
    if parts is None:
        return None, None
    digits, fraction = parts[1], parts[2] or ""
    year, *rest = int(digits[:4]), *(int(digits[at : at + 2]) for at in range(4, len(digits), 2))
    if not 2 <= year <= 9998:  # an offset must not lead out of the calendar
        return None, None
    month = rest[0] if rest else (12 if latest else 1)
    if not 1 <= month <= 12:
        return None, None
    filler = [monthrange(year, month)[1], 23, 59, 59] if latest else [1, 0, 0, 0]
    day, hour, minute, second = [*rest[1:], *filler[max(0, len(rest) - 1) :]][:4]
    microsecond = int((fraction or ("9" if latest else "0")).ljust(6, "9" if latest else "0"))
    try:
        # Naive on purpose: most date-times in archives give no offset.
        moment = datetime(year, month, day, hour, minute, min(second, 59), microsecond)  # noqa: DTZ001
    except ValueError:
        return None, None
    if parts[3] is None:
        return moment, None
    offset = timedelta(hours=int(parts[4]), minutes=int(parts[5]))
    return moment, -offset if parts[3] == "-" else offset
