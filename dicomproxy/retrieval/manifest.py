"""Which instances of a study a source says exist.

A manifest is what completeness is proven against: one STUDY row (whose patient
it is), SERIES rows, and IMAGE rows for each series. Counts that an archive gives
with a study are no proof and are not asked for. A source that refuses SERIES or
IMAGE level, or seems to have cut its answer, gives a manifest that is not
*verified*.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Final, TypeVar

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
)
from dicomproxy.ports import CachedInstance, Failure, Source, SourceError, SourceQuery
from dicomproxy.retrieval.pace import FAR_SECONDS
from dicomproxy.retrieval.selection import Selection

SOP_CLASS_UID: Final = 0x00080016
STUDY_DATE: Final = 0x00080020
PATIENT_BIRTH_DATE: Final = 0x00100030
PATIENT_SEX: Final = 0x00100040

MAX_ROWS: Final = 65_536
"""A listing this long is taken for one that was cut: it is more than a response can count."""

_PARALLEL: Final = 2
_REFUSALS: Final = frozenset({Failure.STATUS, Failure.NO_CONTEXT})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One study at one source.

    ``series`` maps Series Instance UIDs to SOP Instance UIDs to SOP Class UIDs
    (empty where the source did not say). ``held`` is False where the source
    answered that it has no such study.
    """

    study_instance_uid: str
    patient_id: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    study_date: str = ""
    series: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    verified: bool = True
    held: bool = True

    def listed(self, selection: Selection) -> dict[str, str]:
        """Return the selected instances: SOP Instance UID to Series Instance UID."""
        return {
            uid: series
            for series, instances in self.series.items()
            for uid in instances
            if selection.covers(series, uid)
        }

    def is_recent(self, today: date) -> bool:
        """Tell whether the study may still be growing: dated yesterday or later."""
        try:
            dated = date.fromisoformat(self.study_date[:8])
        except ValueError:
            return False
        return dated >= today - timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a manifest differs from what is held.

    ``missing`` are SOP Instance UIDs by series, ``gone`` those that are held
    and that the source no longer lists.
    """

    missing: Mapping[str, tuple[str, ...]]
    gone: tuple[str, ...]


def diff(
    manifest: Manifest,
    cached: Mapping[str, CachedInstance] | Collection[str],
    selection: Selection | None = None,
) -> Difference:
    """Compare *manifest* with what is *cached* (SOP Instance UIDs are what counts).

    *selection* narrows what may be missing; what is gone is told of the whole study.
    """
    chosen = selection or Selection()
    missing: dict[str, tuple[str, ...]] = {}
    listed: set[str] = set()
    for series, instances in manifest.series.items():
        listed.update(instances)
        lacking = tuple(
            uid for uid in instances if uid not in cached and chosen.covers(series, uid)
        )
        if lacking:
            missing[series] = lacking
    return Difference(missing, tuple(uid for uid in cached if uid not in listed))


async def load_manifest(
    source: Source, study_instance_uid: str, *, interactive: bool = True
) -> Manifest:
    """Ask *source* for its manifest of a study.

    Raises:
        SourceError: it could not be reached or did not answer to the end.
    """
    keys = {STUDY_INSTANCE_UID: study_instance_uid}
    series: dict[str, dict[str, str]] = {}
    listing: asyncio.Task[bool | SourceError] | None = None
    async with asyncio.TaskGroup() as group:
        if source.round_trip_seconds >= FAR_SECONDS:
            # Asked for together, since each costs a round trip.
            listing = group.create_task(
                _settled(_series_rows(source, keys, series, interactive)), name="series"
            )
        study = await _settled(_study_row(source, keys, interactive))
    series_first = None
    if listing is not None:
        series_first = listing.result()
        # A source whose breaker is open takes one question at a time: the other was
        # turned away unasked, and is asked now that the source is known to answer.
        if _turned_away(study) and not isinstance(series_first, SourceError):
            study = await _settled(_study_row(source, keys, interactive))
        elif _turned_away(series_first) and not isinstance(study, SourceError):
            listing = None
    if isinstance(study, SourceError):
        if study.failure not in _REFUSALS:
            raise study
        return Manifest(study_instance_uid, verified=False)
    if study is None:
        return Manifest(study_instance_uid, held=False)
    try:
        if listing is None:
            verified = await _series_rows(source, keys, series, interactive)
        elif isinstance(series_first, SourceError):
            raise series_first
        else:
            verified = bool(series_first)
        if verified and series:
            verified = await _instance_rows(source, keys, series, interactive)
    except SourceError as error:
        if error.failure not in _REFUSALS:
            raise
        verified = False
    # A study without a single instance does not exist in an archive; this one cannot tell.
    verified = verified and any(series.values())
    return Manifest(
        study_instance_uid=study_instance_uid,
        patient_id=study.text(PATIENT_ID),
        patient_birth_date=study.text(PATIENT_BIRTH_DATE),
        patient_sex=study.text(PATIENT_SEX),
        study_date=study.text(STUDY_DATE),
        series=series,
        verified=verified,
    )


def _turned_away(answer: object) -> bool:
    return isinstance(answer, SourceError) and answer.failure is Failure.BREAKER


async def _settled(answer: Coroutine[Any, Any, T]) -> T | SourceError:
    """Return what the source answered, or how it failed."""
    try:
        return await answer
    except SourceError as error:
        return error


def query_for(
    level: Level, keys: Mapping[int, str], returned: Collection[int], *, interactive: bool = True
) -> SourceQuery:
    """Build a query that matches *keys* and has *returned* filled in."""
    identifier = Identifier()
    identifier.set_text(QUERY_RETRIEVE_LEVEL, level.value)
    for tag in returned:
        identifier.set_empty(tag)
    for tag, value in keys.items():
        identifier.set_text(tag, value)
    return SourceQuery(level, identifier, interactive, max_matches=MAX_ROWS)


@asynccontextmanager
async def closing(stream: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close an asynchronous iterator at the end of the block, which cancels at the peer."""
    try:
        yield stream
    finally:
        if (aclose := getattr(stream, "aclose", None)) is not None:
            await aclose()


async def _study_row(
    source: Source, keys: Mapping[int, str], interactive: bool
) -> Identifier | None:
    returned = (STUDY_DATE, PATIENT_ID, PATIENT_BIRTH_DATE, PATIENT_SEX)
    query = query_for(Level.STUDY, keys, returned, interactive=interactive)
    found: Identifier | None = None
    async with closing(source.find(query)) as rows:
        async for row in rows:
            if found is None and row.text(STUDY_INSTANCE_UID) == keys[STUDY_INSTANCE_UID]:
                found = row
    return found


async def _series_rows(
    source: Source,
    keys: Mapping[int, str],
    series: dict[str, dict[str, str]],
    interactive: bool,
) -> bool:
    """Fill in the series; False if there may be more of them."""
    query = query_for(Level.SERIES, keys, (SERIES_INSTANCE_UID,), interactive=interactive)
    count = 0
    async with closing(source.find(query)) as rows:
        async for row in rows:
            count += 1
            uid = row.text(SERIES_INSTANCE_UID)
            if uid and row.text(STUDY_INSTANCE_UID) in ("", keys[STUDY_INSTANCE_UID]):
                series.setdefault(uid, {})
    return count < MAX_ROWS


async def _instance_rows(
    source: Source,
    keys: Mapping[int, str],
    series: dict[str, dict[str, str]],
    interactive: bool,
) -> bool:
    """Fill in the instances of every series; False if there may be more of them."""
    waiting = deque(series)
    errors: list[SourceError] = []
    cut = False

    async def work() -> None:
        nonlocal cut
        while waiting and not errors:
            uid = waiting.popleft()
            query = query_for(
                Level.IMAGE,
                {**keys, SERIES_INSTANCE_UID: uid},
                (SOP_INSTANCE_UID, SOP_CLASS_UID),
                interactive=interactive,
            )
            count = 0
            try:
                async with closing(source.find(query)) as rows:
                    async for row in rows:
                        count += 1
                        instance = row.text(SOP_INSTANCE_UID)
                        # Archives that overlook the key answer for other series too.
                        if instance and row.text(SERIES_INSTANCE_UID) in ("", uid):
                            series[uid][instance] = row.text(SOP_CLASS_UID)
            except SourceError as error:
                errors.append(error)
            cut = cut or count >= MAX_ROWS

    async with asyncio.TaskGroup() as group:
        for number in range(min(_PARALLEL, len(series))):
            group.create_task(work(), name=f"manifest-{number}")
    if errors:
        # Not to be taken for whole listings later on.
        for instances in series.values():
            instances.clear()
        raise errors[0]
    return not cut
