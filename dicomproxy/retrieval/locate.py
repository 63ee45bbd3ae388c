"""Which archives hold what a retrieve asks for.

First the memory of where studies were seen, narrowed to what this caller may
see; a study that is not in it, and every PATIENT level request, is located by
C-FIND at the local PACS and all visible sources at once. A source that could not
be asked is not asked the same again for a while, however often somebody tries:
it counts as unreachable. Holders that name another patient than was asked for,
or than the first holder names, are left out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from dicomproxy.dataset.levels import PATIENT_ID, STUDY_INSTANCE_UID, Level
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import LOCAL, Caller, Failure, Location, Locations, Source, SourceError
from dicomproxy.retrieval.holder import Holder
from dicomproxy.retrieval.manifest import closing, query_for
from dicomproxy.retrieval.request import RetrieveRequest

_log = get_logger()

_PARALLEL_STUDIES: Final = 4
_MAX_REMEMBERED: Final = 1000
_SAYS_NOTHING: Final = frozenset({Failure.BUSY, Failure.BREAKER})
"""Failures that cost the source nothing, and may be over in a moment."""


@dataclass(frozen=True, slots=True)
class LocatedStudy:
    """A study and who has it, in order of precedence, the local PACS first."""

    study_instance_uid: str
    patient_id: str
    holders: tuple[Holder, ...]

    @property
    def local(self) -> bool:
        """Whether the local PACS holds it."""
        return any(holder.name == LOCAL for holder in self.holders)

    @property
    def remote_holders(self) -> tuple[Holder, ...]:
        """Everyone but the local PACS."""
        return tuple(holder for holder in self.holders if holder.name != LOCAL)


@dataclass(slots=True)
class Located:
    """The studies found, and whom we could not ask, so that there may be more."""

    studies: list[LocatedStudy] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)
    not_found: list[str] = field(default_factory=list)


class Locator:
    """Finds holders.

    Args:
        locations: where studies were seen.
        sources: in order of precedence, without the local PACS.
        local_source: the local PACS.
        pause_seconds: how long a source that failed to say what it holds is not
            asked the same again.
    """

    def __init__(
        self,
        locations: Locations,
        sources: Mapping[str, Source],
        local_source: Source,
        *,
        pause_seconds: float = 30.0,
    ) -> None:
        self._locations = locations
        self._sources = sources
        self._local = local_source
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
                study = await self._remembered(uid, request.patient_id, visible)
                if study is None:
                    study = await self.ask(uid, request.patient_id, visible, located.unreachable)
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
    ) -> LocatedStudy | None:
        """Ask every visible archive for a study; those that could not be asked are added."""
        keys = {STUDY_INSTANCE_UID: study_instance_uid}
        rows = await self._find(keys, visible, unreachable)
        holders = [
            (source, row_patient) for source, uid, row_patient in rows if uid == study_instance_uid
        ]
        return self._study(study_instance_uid, patient_id, holders)

    async def _remembered(
        self, uid: str, patient_id: str, visible: tuple[Source, ...]
    ) -> LocatedStudy | None:
        known = {location.source: location for location in await self._locations.find(uid)}
        holders = [
            (source, known[source.name].patient_id) for source in visible if source.name in known
        ]
        return self._study(uid, patient_id, holders)

    async def _patient(
        self, patient_id: str, visible: tuple[Source, ...], located: Located
    ) -> None:
        rows = await self._find({PATIENT_ID: patient_id}, visible, located.unreachable)
        holders: dict[str, list[tuple[Source, str]]] = {}
        for source, uid, row_patient in rows:
            # Archives match without regard to case, or overlook the key.
            if row_patient == patient_id:
                holders.setdefault(uid, []).append((source, row_patient))
        for uid, held in holders.items():
            if (study := self._study(uid, patient_id, held)) is not None:
                located.studies.append(study)

    async def _find(
        self, keys: Mapping[int, str], visible: Iterable[Source], unreachable: set[str]
    ) -> list[tuple[Source, str, str]]:
        """Ask all at once; (source, Study Instance UID, Patient ID) by precedence."""
        found: dict[str, list[tuple[Source, str, str]]] = {}
        (wanted,) = keys.values()

        async def ask(source: Source) -> None:
            rows = found.setdefault(source.name, [])
            if self._failed_lately(wanted, source.name):
                unreachable.add(source.name)
                return
            returned = (STUDY_INSTANCE_UID, PATIENT_ID)
            try:
                async with closing(source.find(query_for(Level.STUDY, keys, returned))) as matches:
                    async for match in matches:
                        uid = match.text(STUDY_INSTANCE_UID)
                        if uid:
                            rows.append((source, uid, match.text(PATIENT_ID)))
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

        sources = list(visible)
        async with asyncio.TaskGroup() as group:
            for source in sources:
                group.create_task(ask(source), name=f"locate:{source.name}")
        rows = [row for source in sources for row in found[source.name]]
        self._locations.remember(
            [Location(uid, source.name, patient_id) for source, uid, patient_id in rows]
        )
        return rows

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

    def _study(
        self, uid: str, patient_id: str, holders: list[tuple[Source, str]]
    ) -> LocatedStudy | None:
        """Keep the holders that agree on the patient; None if there is none."""
        agreed = patient_id or next((named for _, named in holders if named), "")
        kept = []
        for source, named in holders:
            if agreed and named and named != agreed:
                _log.warning(
                    "identity_conflict",
                    study_instance_uid=uid,
                    source=source.name,
                    reason="holders_disagree" if not patient_id else "request_disagrees",
                )
                continue
            kept.append(Holder(source, named))
        return LocatedStudy(uid, agreed, tuple(kept)) if kept else None
