"""Whether what a source says of a patient may be the local patient. Pure.

Rules kept: a contradiction is two present, valid, different values of Patient's
Birth Date, or M against F of Patient's Sex; it blocks, and nothing else does.
Names are spelt in too many ways for that: a difference is only reported.
Demographics never link two records, they can only keep them apart. Nothing here
ends in a log or an exception but the names of what differs.
"""

from __future__ import annotations

import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Final

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import PatientId

PATIENT_NAME: Final = 0x00100010
PATIENT_BIRTH_DATE: Final = 0x00100030
PATIENT_SEX: Final = 0x00100040


@dataclass(frozen=True, slots=True)
class Demographics:
    """What a data set says of its patient; empty where it says nothing.

    ``name`` is a PN with its component groups, as text.
    """

    name: str = ""
    birth_date: str = ""
    sex: str = ""

    def __repr__(self) -> str:
        # Values stay out: a representation may end in a log.
        return "<Demographics>"

    @property
    def comparable(self) -> bool:
        """Whether anything could contradict it."""
        return valid_birth_date(self.birth_date) is not None or binary_sex(self.sex) is not None


def demographics_of(identifier: Identifier) -> Demographics:
    """Read what an answer says of its patient."""
    return Demographics(
        identifier.text(PATIENT_NAME),
        identifier.text(PATIENT_BIRTH_DATE),
        identifier.text(PATIENT_SEX),
    )


def demographics_of_header(header: InstanceHeader) -> Demographics:
    """Read what an instance says of its patient; its name is not among what is read."""
    return Demographics("", header.patient_birth_date, header.patient_sex)


# ------------------------------------------------------------------- comparing


class Verdict(StrEnum):
    """What comparing two records of a patient comes to."""

    AGREES = "agrees"  # something could be compared, and nothing contradicts
    CONFLICT = "conflict"
    UNVERIFIED = "unverified"  # nothing could be compared


class Unverified(StrEnum):
    """What becomes of an answer that could not be compared; a site's choice for each source."""

    SHOW = "show"
    WITHHOLD = "withhold"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome, in words that may be logged: never a value.

    ``contradictions`` names what differs, ``birth_date`` or ``sex``, and
    ``name_differs`` is for the report only.
    """

    verdict: Verdict
    contradictions: tuple[str, ...] = ()
    name_differs: bool = False

    def permits(self, unverified: Unverified) -> bool:
        """Tell whether the answer may be shown."""
        if self.verdict is Verdict.UNVERIFIED:
            return unverified is Unverified.SHOW
        return self.verdict is Verdict.AGREES


def compare(local: Demographics | None, remote: Demographics) -> Comparison:
    """Compare what *remote* says with the local patient, of whom nothing may be known."""
    if local is None:
        return Comparison(Verdict.UNVERIFIED)
    pairs = {
        "birth_date": (valid_birth_date(local.birth_date), valid_birth_date(remote.birth_date)),
        "sex": (binary_sex(local.sex), binary_sex(remote.sex)),
    }
    compared = {name: pair for name, pair in pairs.items() if None not in pair}
    contradictions = tuple(name for name, (ours, theirs) in compared.items() if ours != theirs)
    if contradictions:
        verdict = Verdict.CONFLICT
    else:
        verdict = Verdict.AGREES if compared else Verdict.UNVERIFIED
    return Comparison(verdict, contradictions, not names_agree(local.name, remote.name))


def valid_birth_date(value: str) -> date | None:
    """Return a DA as a date (PS3.5 6.2), the old form with dots too; None where it is none."""
    text = value.strip(" \0")
    if len(text) == 10 and text[4] == text[7] == ".":
        text = text[:4] + text[5:7] + text[8:]
    if len(text) != 8 or not (text.isascii() and text.isdecimal()):
        return None
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None


def binary_sex(value: str) -> str | None:
    """Return M or F; None for O, for what is no code of PS3.3 C.7.1.1, and for nothing."""
    text = value.strip(" \0").upper()
    return text if text in ("M", "F") else None


# ----------------------------------------------------------------------- names

_EXPANSIONS: Final = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae", "œ": "oe"}
)
_WITHOUT_MARKS: Final = str.maketrans(
    {"ø": "o", "æ": "ae", "œ": "oe", "ł": "l", "đ": "d", "ı": "i", "ð": "d", "þ": "th"}
)
_VOICED: Final = "\u3099\u309a"  # marks that make another kana, unlike an accent
_IDEOGRAPHIC: Final = 1
_COMPARED_COMPONENTS: Final = 3  # family, given, middle; titles come and go


def names_agree(ours: str, theirs: str) -> bool:
    """Tell whether two person names may be one, spelt differently (PS3.5 6.2.1).

    Case, accents, width, punctuation, titles and empty components do not count,
    and a middle name only where both have one. Of the component groups
    (alphabetic, ideographic, phonetic) those count that both have. The ideographic
    one decides, since names that sound the same are many; else one that agrees is
    enough, and where they have none in common there is no difference.
    """
    common = {
        at: (mine, other)
        for at, (mine, other) in enumerate(zip(_groups(ours), _groups(theirs), strict=False))
        if any(mine) and any(other)
    }
    if _IDEOGRAPHIC in common:
        return _group_agrees(*common[_IDEOGRAPHIC])
    return not common or any(_group_agrees(mine, other) for mine, other in common.values())


def _groups(name: str) -> list[list[str]]:
    return [
        [component.strip() for component in group.split("^")[:_COMPARED_COMPONENTS]]
        for group in name.split("=")[:3]
    ]


def _group_agrees(ours: list[str], theirs: list[str]) -> bool:
    mine = (*ours, "", "")[:_COMPARED_COMPONENTS]
    other = (*theirs, "", "")[:_COMPARED_COMPONENTS]
    for position, pair in enumerate(zip(mine, other, strict=True)):
        middle = position == 2
        if middle and not all(pair):
            continue
        if not _spellings(pair[0]) & _spellings(pair[1]):
            return False
    return True


def _spellings(component: str) -> set[str]:
    """Return the forms in which a component may be written: accents dropped, or written out."""
    composed = unicodedata.normalize("NFKC", component).casefold()
    return {
        _letters(form)
        for form in (composed.translate(_EXPANSIONS), composed.translate(_WITHOUT_MARKS))
    }


def _letters(text: str) -> str:
    """Return letters, digits and marks that matter, everything else gone."""
    bare = "".join(
        character
        for character in unicodedata.normalize("NFD", text)
        if character.isalnum()
        or character in _VOICED
        or unicodedata.category(character) == "Mc"  # a vowel, in the scripts of India
    )
    return unicodedata.normalize("NFC", bare)


# ---------------------------------------------------------------------- memory


class KnownPatients:
    """What the local PACS lately said of its patients; bounded, and in memory only.

    Args:
        most: patients remembered; beyond it the one not used longest is forgotten.
        seconds: for how long what was learnt holds, since the local PACS may correct it.
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float], *, most: int = 20_000, seconds: float = 600.0):
        self._clock = clock
        self._most = most
        self._seconds = seconds
        self._known: OrderedDict[PatientId, tuple[float, Demographics]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, patient: PatientId, demographics: Demographics) -> None:
        """Remember what the local PACS says of *patient*; what it leaves out unsays nothing."""
        if (held := self.of(patient)) is not None:
            demographics = Demographics(
                demographics.name or held.name,
                demographics.birth_date or held.birth_date,
                demographics.sex or held.sex,
            )
        self._known[patient] = (self._clock() + self._seconds, demographics)
        self._known.move_to_end(patient)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def of(self, patient: PatientId) -> Demographics | None:
        """Return what is known of *patient*; None where it has to be asked for."""
        held = self._known.get(patient)
        if held is None:
            return None
        if held[0] <= self._clock():
            del self._known[patient]
            return None
        self._known.move_to_end(patient)
        return held[1]

    def forget(self, patients: Iterable[PatientId]) -> None:
        """Drop what is known of *patients*: their records were merged or changed."""
        for patient in patients:
            self._known.pop(patient, None)

    def forget_all(self) -> None:
        """Drop everything."""
        self._known.clear()
