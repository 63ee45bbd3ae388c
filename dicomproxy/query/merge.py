"""One answer out of many: local rows at once, remote rows once they may (PS3.4 C.2.2.1.1).

Two rows of an answer never share the unique key of the query's level. The local
row wins; among sources the first to arrive gives the row. Remote rows are held
until the local PACS has finished or had its time, since a row that was sent
cannot be taken back. Pure: no clock, no I/O; memory is bounded by the caps here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from dicomproxy.dataset.identifier import Identifier, IdentifierError
from dicomproxy.dataset.levels import PATIENT_ID, STUDY_INSTANCE_UID, UNIQUE_KEY, Level
from dicomproxy.ports import LocalAnswer
from dicomproxy.query.match import Keys
from dicomproxy.query.rows import Answer, Style, local_row, remote_row

MAX_ROWS_PER_SOURCE: Final = 20_000
"""Rows that one source may add to one answer: a backstop behind the source's own cap."""

_MAX_KEYS: Final = 100_000  # some 15 MB; an answer that long no longer needs merging

ONLINE: Final = "ONLINE"


class Verdict(StrEnum):
    """What became of a remote row."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # another row has its key; its source is a holder all the same
    NOT_MATCHING = "not_matching"  # the source ignored a key; it holds the study nevertheless
    WITHHELD = "withheld"  # about another patient, or about none
    CONFLICT = "conflict"  # a study known under another patient
    MALFORMED = "malformed"  # without its unique key, or of a study nobody asked about
    TOO_MANY = "too_many"  # beyond the cap

    @property
    def locates(self) -> bool:
        """The row shows that its source holds the study."""
        return self in (Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.NOT_MATCHING)


@dataclass(frozen=True, slots=True)
class LocalRow:
    """A local row: what to send, if anything, and what it taught.

    ``conflicts`` are sources that gave the same study under another patient;
    ``row`` is what the local PACS said, where it can be read.
    """

    answer: Answer | None
    study_instance_uid: str = ""
    patient_id: str = ""
    readable: bool = True
    conflicts: tuple[str, ...] = ()
    row: Identifier | None = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class _Held:
    row: Identifier
    study_instance_uid: str
    holders: list[str] = field(default_factory=list)


class Merge:
    """The rows of one operation.

    Args:
        style: how rows are written.
        availability: Instance Availability of what is only held remotely.
        cached: tells whether a study is held completely in the cache.
    """

    def __init__(self, style: Style, availability: str, cached: Callable[[str], bool]) -> None:
        self._style = style
        self._level = style.request.level
        self._unique_key = UNIQUE_KEY[self._level]
        self._keys = Keys(style.request.identifier, self._level)
        self._availability = availability
        self._cached = cached
        self._sent: dict[str, bool] = {}  # by unique key: by the local PACS
        self._held: dict[str, _Held] = {}
        self._patients: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self.duplicates = 0

    def __repr__(self) -> str:
        return f"<Merge {self._level}, {len(self._sent)} sent, {len(self._held)} held>"

    @property
    def holding(self) -> bool:
        """Remote rows wait to be released."""
        return bool(self._held)

    def local(self, answer: LocalAnswer) -> LocalRow:
        """Take a pending answer of the local PACS.

        One that cannot be read is relayed as it is: judging it is not ours.
        Patients are not merged with one another, since one Patient ID of two
        issuers makes two rows.
        """
        try:
            row = Identifier.decode(answer.data, answer.transfer_syntax_uid)
        except IdentifierError:
            if answer.transfer_syntax_uid not in ("", self._style.transfer_syntax_uid):
                return LocalRow(None, readable=False)  # nor could anybody else read it
            return LocalRow(Answer(answer.status, answer.data), readable=False)
        key = row.text(self._unique_key)
        study = row.text(STUDY_INSTANCE_UID)
        patient = row.text(PATIENT_ID)
        conflicts: tuple[str, ...] = ()
        if key:
            held = self._held.pop(key, None)
            if held is not None:
                self.duplicates += 1
                if _contradict(patient, held.row.text(PATIENT_ID)):
                    conflicts = tuple(held.holders)
            by_local = self._sent.get(key)
            if by_local is False or (by_local and self._level is not Level.PATIENT):
                self.duplicates += 1
                return LocalRow(None, study, patient, row=row)
            self._remember(key, study, patient, by_local=True)
        sent = Answer(answer.status, local_row(self._style, answer, row))
        return LocalRow(sent, study, patient, conflicts=conflicts, row=row)

    def remote(self, source: str, row: Identifier, study_instance_uid: str = "") -> Verdict:
        """Take a row of a source, to be released later.

        Args:
            source: who gave it.
            row: what it gave.
            study_instance_uid: the study it was asked about, if it was one.
        """
        key = row.text(self._unique_key)
        study = row.text(STUDY_INSTANCE_UID) or study_instance_uid
        if not key or (study_instance_uid and study != study_instance_uid):
            return Verdict.MALFORMED
        if not self._keys.same_patient(row):
            return Verdict.WITHHELD
        patient = row.text(PATIENT_ID)
        if study and _contradict(patient, self._patients.get(study, "")):
            return Verdict.CONFLICT
        if not self._keys.matches(row):
            return Verdict.NOT_MATCHING
        held = self._held.get(key)
        if held is not None or key in self._sent:
            self.duplicates += 1
            if held is not None and source not in held.holders:
                held.holders.append(source)
            return Verdict.DUPLICATE
        if self._rows.get(source, 0) >= MAX_ROWS_PER_SOURCE:
            return Verdict.TOO_MANY
        self._rows[source] = self._rows.get(source, 0) + 1
        self._held[key] = _Held(row, study, [source])
        if study and patient:
            self._patients.setdefault(study, patient)
        return Verdict.ACCEPTED

    def release(self) -> Iterator[Answer]:
        """Yield the rows held, in the order in which they came, each once."""
        while self._held:
            key = next(iter(self._held))
            held = self._held.pop(key)
            self._remember(key, held.study_instance_uid, "", by_local=False)
            yield remote_row(
                self._style,
                held.row,
                study_instance_uid=held.study_instance_uid,
                availability=self._available(held.study_instance_uid),
                shared=len(held.holders) > 1,
            )

    def _available(self, study_instance_uid: str) -> str:
        if study_instance_uid and self._cached(study_instance_uid):
            return ONLINE
        return self._availability

    def _remember(self, key: str, study: str, patient: str, *, by_local: bool) -> None:
        if len(self._sent) >= _MAX_KEYS:
            return
        self._sent[key] = by_local
        # Only a study's own row is sure to name its patient.
        if study and patient and self._level is Level.STUDY:
            self._patients[study] = patient


def _contradict(one: str, other: str) -> bool:
    return bool(one and other) and one != other
