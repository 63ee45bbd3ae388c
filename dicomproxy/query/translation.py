"""One C-FIND between this site's patients and orders and those of a source, both ways.

Rules kept: a source is asked by its own ID of the patient and not at all where
it has none; that this cannot be found out is an error, never an empty answer.
What identifies a patient or an order is never matched there but here, after an
answer has been made local. Every answer carries the local patient or is
withheld: one about somebody else, one that contradicts the local patient, and
one whose ID leads to no one local ID. The cross-reference is asked for every
batch, so that records merged meanwhile count at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Final

from dicomproxy.dataset.accession import AccessionsUnavailable, Origin
from dicomproxy.dataset.charset import UTF8
from dicomproxy.dataset.identifier import CannotEncode, Identifier
from dicomproxy.dataset.levels import PATIENT_ID, STUDY_INSTANCE_UID, Level
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import ACCESSION_NUMBER, Shown
from dicomproxy.identity.coercion import (
    CoercionSettings,
    LocalPatient,
    accession_numbers,
    coerce_answer,
)
from dicomproxy.identity.coercion_patient import PATIENT_TAGS
from dicomproxy.identity.coercion_request import REQUEST_TAGS
from dicomproxy.identity.coercion_rules import needed_by
from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.domains import (
    ISSUER_OF_PATIENT_ID,
    ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE,
    OTHER_PATIENT_IDS_SEQUENCE,
    issuer_of,
    resolve,
)
from dicomproxy.identity.reports import report, report_conflict, report_unresolved
from dicomproxy.identity.safety import (
    PATIENT_BIRTH_DATE,
    PATIENT_NAME,
    PATIENT_SEX,
    Comparison,
    Demographics,
    compare,
    demographics_of,
)
from dicomproxy.identity.safety import Verdict as Judgement
from dicomproxy.identity.service import IdentityService, SourceIdentity
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import LOCAL, CrossReferenceError, Location, Source, SourceQuery
from dicomproxy.query.merge import Verdict
from dicomproxy.query.plan import QueryRequest

_STUDY_ID: Final = 0x00200010
_MODALITY: Final = 0x00080060
_MODALITIES_IN_STUDY: Final = 0x00080061
_DESCRIPTIONS: Final = frozenset({0x00081030, 0x00321060})  # of the study, of the procedure
_CODES: Final = frozenset({0x00081032, 0x00321064})
_DEMOGRAPHICS: Final = (PATIENT_NAME, PATIENT_BIRTH_DATE, PATIENT_SEX)
_COMPARED: Final = (*_DEMOGRAPHICS, ISSUER_OF_PATIENT_ID)
_OURS: Final = (
    PATIENT_ID,
    ISSUER_OF_PATIENT_ID,
    ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE,
    OTHER_PATIENT_IDS_SEQUENCE,
)
_SOMEBODY_ELSE: Final = "\\"
"""In place of a local ID that is not the one asked for: no ID has it (PS3.5 6.2)."""

_LOCATE_SECONDS: Final = 1.0
_MOST_REPORTED: Final = 1_000
_MOST_FAILURES: Final = 3
"""Lookups that may fail for one batch of rows, each perhaps after its deadline."""

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Local:
    """A source's answer made local, or why it is kept back.

    ``foreign_id`` is the patient's ID at the source, empty if that is not known, or if
    somebody else issued the one it gave. ``failure`` is why nobody can tell whom it is about.
    """

    row: Identifier | None
    foreign_id: str = ""
    verdict: Verdict = Verdict.ACCEPTED
    failure: CrossReferenceError | None = None


class Translation:
    """What one operation has to be translated by.

    Args:
        identity: of the site.
        request: as the workstation made it.
        sources: the archives of the region.
        caller_ae_title: whose answers these are.
        local_seconds: how long the local PACS has to say who the patient is in its answer
            to this query, before it is asked.
    """

    def __init__(
        self,
        identity: IdentityService,
        request: QueryRequest,
        sources: Mapping[str, Source],
        caller_ae_title: str,
        local_seconds: float,
    ) -> None:
        self._identity = identity
        self._request = request
        self._sources = sources
        self._caller = caller_ae_title
        self._local_taken = asyncio.Event()
        self.origin: Origin | None = None
        self._known: Mapping[str, Sequence[Location]] = {}
        self._studies: dict[tuple[str, str], Identifier | None] = {}
        self._reported: set[tuple[str, str, str]] = set()
        self._untold: set[PatientId] = set()
        self.patient = self._asked_for()
        keys = request.identifier
        told = self.patient is not None and all(tag in keys for tag in _DEMOGRAPHICS)
        self._local_seconds = local_seconds if told else 0.0

    # ----------------------------------------------------------------- planning

    def _asked_for(self) -> PatientId | None:
        """Return the local patient asked for, if it is exactly one."""
        value = self._request.patient_id
        if not value:
            return None
        domains = self._identity.domains
        named = issuer_of(self._request.identifier)
        if "*" in named.namespace or "?" in named.namespace:
            named = replace(named, namespace="")
        return domains.canonical_id(PatientId(value, resolve(named, domains.local)))

    @property
    def of_another_domain(self) -> bool:
        """Whether the ID asked for is none of this site's: sources are not asked by it."""
        return self.patient is not None and not self._identity.domains.is_local(self.patient.domain)

    def local_has_told(self) -> None:
        """Say that all that the local PACS answers has been learnt."""
        self._local_taken.set()

    async def resolve_accession(self) -> Collection[str]:
        """Return the sources that may be asked by the accession number alone.

        That is the one whose order a number made up here stands for; of any other
        number those that have theirs from the same system as this site.
        """
        values = self._request.identifier.values(ACCESSION_NUMBER)
        if len(values) != 1 or not values[0] or set(values[0]) & {"*", "?"}:
            return ()
        try:
            self.origin = await self._identity.accessions.resolve(values[0])
        except AccessionsUnavailable as error:
            _log.warning("accessions_unavailable", **error_fields(error))
        if self.origin is not None:
            return (self.origin.source,)
        if not values[0].isascii():
            return ()  # as a key it would be left out (see source_identifier), which asks for all
        judged = {name: self._identity.of(name) for name in self._sources}
        return [name for name, one in judged.items() if one is not None and one.keeps_accessions]

    async def known_here(
        self, known: Mapping[str, Sequence[Location]]
    ) -> Mapping[str, tuple[Location, ...]]:
        """Return where studies were seen, under the IDs that their patients have here.

        What cannot be found out in time is left open: answers are judged one by one.
        """
        self._known = known
        made: dict[str, tuple[Location, ...]] = {}
        here: dict[tuple[str, str], str] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOCATE_SECONDS):
                for one in (one for locations in known.values() for one in locations):
                    key = (one.source, one.patient_id)
                    if one.source != LOCAL and one.patient_id and key not in here:
                        here[key] = await self._id_here(one)
        for study, locations in known.items():
            made[study] = tuple(
                one
                if one.source == LOCAL
                else replace(one, patient_id=here.get((one.source, one.patient_id), ""))
                for one in locations
            )
        return made

    async def _id_here(self, location: Location) -> str:
        foreign = self._identity.foreign(location.source, location.patient_id)
        try:
            local = await self._local_of(foreign, location.source)
        except CrossReferenceError:
            return ""
        except IdentityUnresolved:
            return _SOMEBODY_ELSE
        return _SOMEBODY_ELSE if local is None else local.value

    # ------------------------------------------------------------------- asking

    async def questions(
        self, source: str, queries: Sequence[SourceQuery], studies: Sequence[str]
    ) -> list[tuple[SourceQuery, str]]:
        """Return what *source* is asked in place of *queries*, each with the study it is about.

        None where it does not know the patient, or the order is another source's.

        Raises:
            CrossReferenceError: it could not be found out who the patient is there.
        """
        judged = self._identity.of(source)
        if judged is None:
            return list(zip(queries, studies, strict=True))
        if self.origin is not None and self.origin.source != source and not judged.keeps_accessions:
            return []
        patients: Sequence[str] = ("",)
        if self.patient is not None:
            found = await self._identity.identities.elsewhere(self.patient, source)
            patients = [one.value for one in found]
        return [
            (replace(query, identifier=self._question(query, source, judged, patient)), study)
            for query, study in zip(queries, studies, strict=True)
            for patient in patients
        ]

    def _question(
        self, query: SourceQuery, source: str, judged: SourceIdentity, patient: str
    ) -> Identifier:
        asked = query.identifier.copy()
        for tag in _matched_here(judged):
            if tag in asked:
                asked.set_empty(tag)
        if query.level in (Level.PATIENT, Level.STUDY):
            for tag in _COMPARED:
                asked.set_empty(tag)
        if ACCESSION_NUMBER in asked and not judged.keeps_accessions:
            ours = self.origin is not None and self.origin.source == source
            _put(asked, ACCESSION_NUMBER, self.origin.number if self.origin and ours else "")
        modality = _MODALITIES_IN_STUDY if query.level is Level.STUDY else _MODALITY
        if query.level is Level.PATIENT:
            modality = 0
        for tag in needed_by(judged.coercion.rules, {one.tag for one in asked}, modality):
            asked.set_empty(tag)
        if patient:
            try:
                asked.set_text(PATIENT_ID, patient)
            except CannotEncode:
                asked = asked.with_character_set(UTF8)
                asked.set_text(PATIENT_ID, patient)
        elif PATIENT_ID in asked:
            asked.set_empty(PATIENT_ID)
        return asked

    # ---------------------------------------------------------------- answering

    async def localise(self, source: str, rows: Sequence[tuple[Identifier, str]]) -> list[Local]:
        """Make answers local, or say why they are kept back.

        Args:
            source: who gave them.
            rows: each with the study that was asked about, if it was one.

        Raises:
            SourceError: the source does not say whose study it is.
        """
        judged = self._identity.of(source)
        if judged is None:
            return [Local(row, row.text(PATIENT_ID)) for row, _ in rows]
        judgements: list[tuple[LocalPatient | Verdict | CrossReferenceError, str]] = []
        failures: list[CrossReferenceError] = []
        for row, study in rows:
            if len(failures) >= _MOST_FAILURES:
                judgements.append((failures[-1], ""))
                continue
            try:
                judgements.append(await self._judge(source, judged, row, study))
            except CrossReferenceError as error:
                failures.append(error)
                judgements.append((error, ""))
        # Together, since numbers that are new cost a write to the disk.
        numbers: dict[str, Domain] = {}
        for (row, _), (verdict, _) in zip(rows, judgements, strict=True):
            if isinstance(verdict, LocalPatient):
                for number, issuer in accession_numbers(row).items():
                    if issuer.is_named or number not in numbers:
                        numbers[number] = issuer
        shown = await self._identity.shown_numbers(source, numbers)
        made = []
        for (row, _), (verdict, foreign_id) in zip(rows, judgements, strict=True):
            if isinstance(verdict, LocalPatient):
                made.append(self._coerced(row, verdict, foreign_id, judged, shown))
            elif isinstance(verdict, CrossReferenceError):
                made.append(Local(None, failure=verdict))
            else:
                made.append(Local(None, foreign_id, verdict))
        return made

    async def _judge(
        self, source: str, judged: SourceIdentity, row: Identifier, study: str
    ) -> tuple[LocalPatient | Verdict, str]:
        """Return who a row is about here, or why it is kept back; and the patient's ID there."""
        request = self._request
        given = row.text(STUDY_INSTANCE_UID)
        wanted = (study,) if study else request.study_instance_uids
        if given and wanted and given not in wanted:
            # Of a study that nobody asked about: nobody is asked whose it is.
            return Verdict.MALFORMED, ""
        study = given or study
        speaks: Identifier | None = row
        if request.level not in (Level.PATIENT, Level.STUDY):
            # Such rows need not say whose they are; that of their study does.
            speaks = await self._row_of_study(source, study)
        domains = self._identity.domains
        foreign = None
        if speaks is not None:
            foreign = domains.patient_of(speaks, source)
        if foreign is None or speaks is None:
            return Verdict.WITHHELD, ""
        named = foreign if row.is_empty(PATIENT_ID) else domains.patient_of(row, source)
        if named != foreign:
            return Verdict.WITHHELD, ""
        # What another domain issued means somebody else there, once it stands without its issuer.
        theirs = foreign.value if foreign.domain == domains.of(source) else ""
        try:
            patient = await self._local_of(foreign, source)
        except IdentityUnresolved as unresolved:
            if self._first(source, study, unresolved.reason):
                report_unresolved(source, unresolved, study_instance_uid=study)
            return Verdict.WITHHELD, theirs
        if patient is None:
            return Verdict.WITHHELD, theirs
        if self._contradicts_local(study, patient):
            if self._first(source, study, "holders_disagree"):
                report_conflict(source, "holders_disagree", study_instance_uid=study)
            return Verdict.CONFLICT, theirs
        demographics = await self._demographics(patient)
        comparison = compare(demographics, demographics_of(speaks))
        shown = comparison.permits(judged.unverified)
        self._report(source, study, comparison, shown)
        if not shown:
            conflict = comparison.verdict is Judgement.CONFLICT
            return Verdict.CONFLICT if conflict else Verdict.WITHHELD, theirs
        return LocalPatient(patient, demographics), theirs

    def _coerced(
        self,
        row: Identifier,
        patient: LocalPatient,
        foreign_id: str,
        judged: SourceIdentity,
        shown: Mapping[str, Shown] | None,
    ) -> Local:
        try:
            completed = self._completed(row, patient.demographics)
            local = coerce_answer(completed, patient, judged.coercion, shown, self._caller)
        except CannotEncode:
            return Local(None, foreign_id, Verdict.MALFORMED)
        return Local(local, foreign_id)

    async def _local_of(self, foreign: PatientId, source: str) -> PatientId | None:
        """Return who *foreign* is here; None where it is not who was asked for."""
        if self.patient is None:
            return await self._identity.identities.here(foreign, source)
        asked = await self._identity.identities.elsewhere(self.patient, source)
        return self.patient if foreign in asked else None

    def _contradicts_local(self, study: str, patient: PatientId) -> bool:
        """Tell whether the local PACS has the study under another patient, as far as was seen."""
        return any(
            one.source == LOCAL and one.patient_id and one.patient_id != patient.value
            for one in self._known.get(study, ())
        )

    async def _demographics(self, patient: PatientId) -> Demographics | None:
        # Whatever is remembered: it may have been corrected, and remote rows wait anyway.
        half = self._local_seconds / 2
        if half and not await self._told_within(half):
            if self._identity.known.of(patient) is not None:
                await self._told_within(half)
            else:
                # Slow, or down: asked something smaller, and no longer than rows are held.
                with suppress(TimeoutError):
                    async with asyncio.timeout(half):
                        await self._identity.demographics(patient)
                self._untold.add(patient)
        self._local_seconds = 0.0
        if patient in self._untold and self._identity.known.of(patient) is None:
            # A local PACS that hangs costs its deadline once an operation, not once a row.
            return None
        demographics = await self._identity.demographics(patient)
        if demographics is None:
            self._untold.add(patient)
        return demographics

    async def _told_within(self, seconds: float) -> bool:
        """Wait for all that the local PACS answers; whether it came."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._local_taken.wait()
        return self._local_taken.is_set()

    async def _row_of_study(self, source: str, study: str) -> Identifier | None:
        """Return what *source* says of a study and its patient; None if it says nothing."""
        key = (source, study)
        if not study:
            return None
        if key not in self._studies:
            keys = Identifier()
            keys.set_text(STUDY_INSTANCE_UID, study)
            for tag in (PATIENT_ID, *_COMPARED):
                keys.set_empty(tag)
            found = None
            query = SourceQuery(Level.STUDY, keys)
            async with aclosing(self._sources[source].find(query)) as rows:
                async for row in rows:
                    if row.text(STUDY_INSTANCE_UID) == study:
                        found = row
                        break
            self._studies[key] = found
        return self._studies[key]

    def _completed(self, row: Identifier, demographics: Demographics | None) -> Identifier:
        """Return *row* with what was asked for and is this site's to say, whoever gave the row."""
        work = row.copy()
        tags = _OURS if demographics is None else (*_OURS, *_DEMOGRAPHICS)
        for tag in tags:
            if tag in self._request.identifier and tag not in work:
                work.set_empty(tag)
        return work

    def _report(self, source: str, study: str, comparison: Comparison, shown: bool) -> None:
        said = "name" if shown else "withheld"
        if (not shown or comparison.name_differs) and self._first(source, study, said):
            report(source, comparison, shown=shown, study_instance_uid=study)

    def _first(self, source: str, study: str, what: str) -> bool:
        """Tell whether something is to be reported that was not yet; once a study is enough."""
        key = (source, study, what)
        if key in self._reported or len(self._reported) >= _MOST_REPORTED:
            return False
        self._reported.add(key)
        return True


def _matched_here(judged: SourceIdentity) -> frozenset[int]:
    """Return the keys that a source has otherwise than answers show them."""
    settings: CoercionSettings = judged.coercion
    tags = set(PATIENT_TAGS) - {PATIENT_ID}
    if not judged.keeps_accessions:
        tags |= REQUEST_TAGS - {ACCESSION_NUMBER} - _DESCRIPTIONS - _CODES
    if settings.study_description_prefix or settings.descriptions:
        tags |= _DESCRIPTIONS
    if settings.procedure_codes:
        tags |= _CODES
    if not settings.keep_study_id:
        tags.add(_STUDY_ID)
    tags |= {rule.tag for rule in settings.rules}
    return frozenset(tags)


def _put(asked: Identifier, tag: int, value: str) -> None:
    if value:
        asked.set_text(tag, value)
    else:
        asked.set_empty(tag)
