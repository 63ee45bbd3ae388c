"""Which archives hold what a retrieve asks for.

First the memory of where studies were seen, narrowed to what this caller may
see; a study that is not in it, and every PATIENT level request, is located by
C-FIND at the local PACS and all visible sources at once. A source that could not
be asked is not asked the same again for a while, however often somebody tries:
it counts as unreachable. Holders that name another patient than was asked for,
or than the first holder names, are left out: each names them by its own IDs,
which are turned into local ones first. One of whose patient that cannot be found
out counts as unreachable too.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import PATIENT_ID, STUDY_INSTANCE_UID, Level
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.reports import report_conflict, report_unresolved
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    LOCAL,
    Caller,
    CrossReferenceError,
    Failure,
    Location,
    Locations,
    Source,
    SourceError,
)
from dicomproxy.retrieval.holder import Holder
from dicomproxy.retrieval.manifest import closing, query_for
from dicomproxy.retrieval.persons import Persons
from dicomproxy.retrieval.request import RetrieveRequest

_log = get_logger()

_PARALLEL_STUDIES: Final = 4
_MAX_REMEMBERED: Final = 1000
_SAYS_NOTHING: Final = frozenset({Failure.BUSY, Failure.BREAKER})
"""Failures that cost the source nothing, and may be over in a moment."""


@dataclass(frozen=True, slots=True)
class LocatedStudy:
    """A study and who has it, in order of precedence, the local PACS first.

    ``patient_id`` is the local one, those of ``holders`` are their own. ``left_out`` have it
    as somebody else's, or nobody can tell whose; of the latter are ``unidentified``.
    """

    study_instance_uid: str
    patient_id: str
    holders: tuple[Holder, ...]
    left_out: frozenset[str] = frozenset()
    unidentified: frozenset[str] = frozenset()

    @property
    def local(self) -> bool:
        """Whether the local PACS holds it."""
        return any(holder.name == LOCAL for holder in self.holders)

    @property
    def remote_holders(self) -> tuple[Holder, ...]:
        """Everyone but the local PACS."""
        return tuple(holder for holder in self.holders if holder.name != LOCAL)


@dataclass(frozen=True, slots=True)
class _Named:
    """A source that has a study, and the patient whose study it says that is."""

    source: Source
    study_instance_uid: str
    patient: PatientId | None


@dataclass(slots=True)
class Located:
    """The studies found, and whom we could not ask, so that there may be more.

    ``withheld`` are studies that somebody has and of whose patient nobody here is
    known; one of them may be found all the same, at another holder.
    """

    studies: list[LocatedStudy] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)
    not_found: list[str] = field(default_factory=list)
    withheld: set[str] = field(default_factory=set)


class Locator:
    """Finds holders.

    Args:
        locations: where studies were seen.
        sources: in order of precedence, without the local PACS.
        local_source: the local PACS.
        persons: who the patients are whom sources name.
        pause_seconds: how long a source that failed to say what it holds is not
            asked the same again.
    """

    def __init__(
        self,
        locations: Locations,
        sources: Mapping[str, Source],
        local_source: Source,
        persons: Persons | None = None,
        *,
        pause_seconds: float = 30.0,
    ) -> None:
        self._locations = locations
        self._sources = sources
        self._local = local_source
        self._persons = persons or Persons()
        self._pause_seconds = pause_seconds
        self._failed: OrderedDict[tuple[str, str], float] = OrderedDict()

    def visible(self, caller: Caller) -> tuple[Source, ...]:
        """Return whom *caller* may be served from, in order of precedence."""
        if caller.is_source:
            return (self._local,)
        remote = [self._sources[name] for name in self._sources if name in caller.sources]
        return (self._local, *remote)

    async def locate(self, request: RetrieveRequest, caller: Caller) -> Located:
        """Find the studies of *request* and their holders."""
        located = Located()
        visible = self.visible(caller)
        if request.level is Level.PATIENT:
            await self._patient(request.patient_id, visible, located)
            return located
        found: dict[str, LocatedStudy | None] = dict.fromkeys(request.study_instance_uids)
        slots = asyncio.Semaphore(_PARALLEL_STUDIES)

        async def one(uid: str) -> None:
            async with slots:
                patient, unreachable = request.patient_id, located.unreachable
                study = await self._remembered(uid, patient, visible, unreachable)
                if study is None:
                    study = await self.ask(uid, patient, visible, unreachable, located.withheld)
                found[uid] = study

        async with asyncio.TaskGroup() as group:
            for uid in found:
                group.create_task(one(uid), name="locate")
        located.studies = [study for study in found.values() if study is not None]
        located.not_found = [uid for uid, study in found.items() if study is None]
        return located

    async def ask(
        self,
        study_instance_uid: str,
        patient_id: str,
        visible: Iterable[Source],
        unreachable: set[str],
        withheld: set[str] | None = None,
    ) -> LocatedStudy | None:
        """Ask every visible archive for a study; those that could not be asked are added.

        So is the study to *withheld* where an archive names a patient who is nobody here.
        """
        keys = {STUDY_INSTANCE_UID: study_instance_uid}
        rows = await self._find([(source, keys) for source in visible], unreachable)
        holders = [row for row in rows if row.study_instance_uid == study_instance_uid]
        return await self._study(study_instance_uid, patient_id, holders, unreachable, withheld)

    async def _remembered(
        self,
        uid: str,
        patient_id: str,
        visible: tuple[Source, ...],
        unreachable: set[str],
    ) -> LocatedStudy | None:
        known = {location.source: location for location in await self._locations.find(uid)}
        holders = [
            _Named(source, uid, self._persons.of_value(known[source.name].patient_id, source.name))
            for source in visible
            if source.name in known
        ]
        return await self._study(uid, patient_id, holders, unreachable)

    async def _patient(
        self, patient_id: str, visible: tuple[Source, ...], located: Located
    ) -> None:
        asked: dict[str, tuple[str, ...]] = {}

        async def translate(source: Source) -> None:
            try:
                asked[source.name] = await self._persons.elsewhere(patient_id, source.name)
            except CrossReferenceError as error:
                self._not_identified(source, error)
                located.unreachable.add(source.name)

        async with asyncio.TaskGroup() as group:
            for source in visible:
                group.create_task(translate(source), name=f"identify:{source.name}")
        questions = [
            (source, {PATIENT_ID: named})
            for source in visible
            for named in asked.get(source.name, ())
        ]
        rows = await self._find(questions, located.unreachable)
        holders: dict[str, list[_Named]] = {}
        for row in rows:
            # Archives match without regard to case, or overlook the key.
            if row.patient is not None and row.patient.value in asked[row.source.name]:
                holders.setdefault(row.study_instance_uid, []).append(row)
        for uid, held in holders.items():
            study = await self._study(uid, patient_id, held, located.unreachable)
            if study is not None:
                located.studies.append(study)

    async def _find(
        self, questions: Sequence[tuple[Source, Mapping[int, str]]], unreachable: set[str]
    ) -> list[_Named]:
        """Ask all at once; what they have, by precedence."""
        found: list[list[_Named]] = [[] for _ in questions]

        async def ask(source: Source, keys: Mapping[int, str], rows: list[_Named]) -> None:
            (wanted,) = keys.values()
            if self._failed_lately(wanted, source.name):
                unreachable.add(source.name)
                return
            returned = (STUDY_INSTANCE_UID, PATIENT_ID, *self._persons.returned(source.name))
            try:
                async with closing(source.find(query_for(Level.STUDY, keys, returned))) as matches:
                    async for match in matches:
                        uid = match.text(STUDY_INSTANCE_UID)
                        if uid and (row := self._named(source, uid, match)) is not None:
                            rows.append(row)
            except SourceError as error:
                unreachable.add(source.name)
                if error.failure not in _SAYS_NOTHING:
                    self._note_failure(wanted, source.name)
                _log.warning(
                    "source_query_failed",
                    source=source.name,
                    failure=str(error.failure),
                    status=error.status,
                    query_level="STUDY",
                )
            except Exception as error:
                unreachable.add(source.name)
                _log.error("source_query_failed", source=source.name, **error_fields(error))

        async with asyncio.TaskGroup() as group:
            for (source, keys), into in zip(questions, found, strict=True):
                group.create_task(ask(source, keys, into), name=f"locate:{source.name}")
        rows = [row for of_one in found for row in of_one]
        self._locations.remember(
            [
                Location(
                    row.study_instance_uid,
                    row.source.name,
                    self._persons.usual_id(row.patient, row.source.name),
                )
                for row in rows
            ]
        )
        return rows

    def _named(self, source: Source, uid: str, match: Identifier) -> _Named | None:
        try:
            return _Named(source, uid, self._persons.of_answer(match, source.name))
        except IdentityUnresolved as unresolved:
            report_unresolved(source.name, unresolved, study_instance_uid=uid)
            return None

    def _not_identified(
        self, source: Source, error: CrossReferenceError, study_instance_uid: str = ""
    ) -> None:
        """Say that a source is done without, since nobody can tell whose its studies are."""
        _log.warning(
            "source_not_identified",
            source=source.name,
            failure=str(error.failure),
            reason=error.reason,
            study_instance_uid=study_instance_uid,
        )

    def _note_failure(self, wanted: str, source: str) -> None:
        if source == LOCAL:
            return  # of the house itself, and what it holds must be there again at once
        self._failed[wanted, source] = asyncio.get_running_loop().time()
        self._failed.move_to_end((wanted, source))
        if len(self._failed) > _MAX_REMEMBERED:
            self._failed.popitem(last=False)

    def _failed_lately(self, wanted: str, source: str) -> bool:
        failed_at = self._failed.get((wanted, source))
        if failed_at is None:
            return False
        if asyncio.get_running_loop().time() - failed_at < self._pause_seconds:
            return True
        del self._failed[wanted, source]
        return False

    async def _study(
        self,
        uid: str,
        patient_id: str,
        holders: Collection[_Named],
        unreachable: set[str],
        withheld: set[str] | None = None,
    ) -> LocatedStudy | None:
        """Keep the holders that agree on the patient; None if there is none."""
        local_ids: dict[int, str] = {}
        unidentified: set[str] = set()

        async def identify(number: int, holder: _Named) -> None:
            try:
                local_ids[number] = await self._local_id(holder)
            except CrossReferenceError as error:
                self._not_identified(holder.source, error, uid)
                unreachable.add(holder.source.name)
                unidentified.add(holder.source.name)
            except IdentityUnresolved as unresolved:
                report_unresolved(holder.source.name, unresolved, study_instance_uid=uid)
                if withheld is not None:
                    withheld.add(uid)

        # Together, since each answer may take as long as its deadline.
        async with asyncio.TaskGroup() as group:
            for number, holder in enumerate(holders):
                group.create_task(identify(number, holder), name="identify")
        agreed = patient_id or next((one for _, one in sorted(local_ids.items()) if one), "")
        kept: dict[str, Holder] = {}
        for number, holder in enumerate(holders):
            local = local_ids.get(number)
            if local is None:
                continue
            source = holder.source
            if agreed and local and local != agreed:
                reason = "holders_disagree" if not patient_id else "request_disagrees"
                report_conflict(source.name, reason, study_instance_uid=uid)
                continue
            value = holder.patient.value if holder.patient is not None else ""
            kept.setdefault(source.name, Holder(source, value))
        if not kept:
            return None
        left_out = frozenset(holder.source.name for holder in holders) - kept.keys()
        return LocatedStudy(uid, agreed, tuple(kept.values()), left_out, left_out & unidentified)

    async def _local_id(self, named: _Named) -> str:
        if named.patient is None:
            return ""
        return await self._persons.here(named.patient, named.source.name)
