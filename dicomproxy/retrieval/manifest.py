"""Which instances of a study a source says exist.

A manifest is what completeness is proven against: one STUDY row (whose patient
it is), SERIES rows, and IMAGE rows for each series. Counts that an archive gives
with a study are no proof and are not asked for. A source that refuses SERIES or
IMAGE level, or seems to have cut its answer, gives a manifest that is not
*verified*.

From a far source each answer costs a round trip: nothing waits there that can be
asked at once, and what has been listed can be read before the listing is complete.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
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
_REPEATED: Final = _REFUSALS | {Failure.BREAKER}
"""Questions asked too early are repeated: of a series that is no more, or beside a probe."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One study at one source.

    ``series`` maps Series Instance UIDs to SOP Instance UIDs to SOP Class UIDs
    (empty where the source did not say). ``held`` is False where the source
    answered that it has no such study. ``row`` is what it said of the study.
    """

    study_instance_uid: str
    patient_id: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    study_date: str = ""
    series: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    verified: bool = True
    held: bool = True
    row: Identifier | None = field(default=None, compare=False, repr=False)

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


Listing = dict[str, dict[str, str]]
"""Series Instance UIDs to SOP Instance UIDs to SOP Class UIDs."""


async def load_manifest(
    source: Source,
    study_instance_uid: str,
    *,
    interactive: bool = True,
    series: Collection[str] = (),
    into: Listing | None = None,
    progress: Callable[[], None] | None = None,
    returned: Collection[int] = (),
    judge: Callable[[Manifest], Awaitable[None]] | None = None,
) -> Manifest:
    """Ask *source* for its manifest of a study.

    Args:
        source: whom to ask.
        study_instance_uid: the study.
        interactive: whether somebody waits for it.
        series: Series Instance UIDs that it probably has: a far source is asked for
            their instances without waiting until it has confirmed them.
        into: is filled in while answers come; only what is returned is a manifest.
        progress: called after each instance that was added to *into*.
        returned: keys of the study's row besides those that a manifest needs.
        judge: is given whose study it is as soon as that is known, nothing listed yet.

    Raises:
        SourceError: it could not be reached or did not answer to the end.
    """
    ask = _Questions(source, study_instance_uid, interactive, {} if into is None else into)
    ask.progress = progress
    ask.returned = tuple(returned)
    ask.judge = judge
    if source.round_trip_seconds >= FAR_SECONDS:
        study, verified = await _ask_at_once(ask, series)
    else:
        study, verified = await _ask_in_turn(ask)
    if isinstance(study, SourceError):
        if study.failure not in _REFUSALS:
            raise study
        return Manifest(study_instance_uid, verified=False)
    if study is None:
        return Manifest(study_instance_uid, held=False)
    if isinstance(verified, SourceError):
        if verified.failure not in _REFUSALS:
            raise verified
        verified = False
    # A study without a single instance does not exist in an archive; this one cannot tell.
    verified = verified and any(ask.listing.values())
    return replace(_whose(study_instance_uid, study), series=ask.listing, verified=verified)


def _whose(study_instance_uid: str, row: Identifier) -> Manifest:
    """Return what a study's row says, nothing listed."""
    return Manifest(
        study_instance_uid=study_instance_uid,
        patient_id=row.text(PATIENT_ID),
        patient_birth_date=row.text(PATIENT_BIRTH_DATE),
        patient_sex=row.text(PATIENT_SEX),
        study_date=row.text(STUDY_DATE),
        row=row,
    )


_Answers = tuple[Identifier | SourceError | None, bool | SourceError]
"""The study's row, and whether all of it has been listed."""


async def _ask_in_turn(ask: _Questions) -> _Answers:
    """Ask one thing after the other, each on the association of the last one."""
    study = await _settled(ask.study_row())
    if study is None or isinstance(study, SourceError):
        return study, False
    return study, await _settled(ask.everything())


async def _ask_at_once(ask: _Questions, series: Collection[str]) -> _Answers:
    """Ask for everything together that does not depend on another answer."""
    async with asyncio.TaskGroup() as group:
        # First, since more depends on it: it gets an association that is there already.
        listing = group.create_task(_settled(ask.everything(series)), name="listing")
        row = group.create_task(_settled(ask.study_row()), name="study")
    study, verified = row.result(), listing.result()
    # A source whose breaker is open takes one question at a time: the other was
    # turned away unasked, and is asked now that the source is known to answer.
    if _turned_away(study) and not isinstance(verified, SourceError):
        study = await _settled(ask.study_row())
    elif _turned_away(verified) and isinstance(study, Identifier):
        ask.listing.clear()
        verified = await _settled(ask.everything())
    return study, verified


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


class _Questions:
    """What is asked about one study; ``listing`` is what has been answered so far."""

    def __init__(
        self, source: Source, study_instance_uid: str, interactive: bool, listing: Listing
    ) -> None:
        self.listing = listing
        self.progress: Callable[[], None] | None = None
        self.returned: tuple[int, ...] = ()
        self.judge: Callable[[Manifest], Awaitable[None]] | None = None
        self._source = source
        self._uid = study_instance_uid
        self._interactive = interactive
        # Archives that do not index it read every file for it.
        self._of_instances: tuple[int, ...] = (SOP_INSTANCE_UID,)
        if source.wants_sop_classes:
            self._of_instances += (SOP_CLASS_UID,)

    def _query(self, level: Level, returned: Collection[int], series: str = "") -> SourceQuery:
        keys = {STUDY_INSTANCE_UID: self._uid}
        if series:
            keys[SERIES_INSTANCE_UID] = series
        return query_for(level, keys, returned, interactive=self._interactive)

    async def study_row(self) -> Identifier | None:
        """Return whose study it is, None if the source has none."""
        returned = (STUDY_DATE, PATIENT_ID, PATIENT_BIRTH_DATE, PATIENT_SEX, *self.returned)
        found: Identifier | None = None
        async with closing(self._source.find(self._query(Level.STUDY, returned))) as rows:
            async for row in rows:
                if found is None and row.text(STUDY_INSTANCE_UID) == self._uid:
                    found = row
        if found is not None and self.judge is not None:
            await self.judge(_whose(self._uid, found))
        return found

    async def everything(self, likely: Collection[str] = ()) -> bool:
        """List series and instances, those of *likely* series without waiting.

        Returns False if there may be more of them.
        """
        ahead: bool | SourceError = True
        try:
            if likely:
                verified, ahead = await self._ahead(likely)
                further = [uid for uid, instances in self.listing.items() if not instances]
                if isinstance(ahead, SourceError) and ahead.failure not in _REPEATED:
                    raise ahead
            else:
                verified = await self._series_rows(self.listing)
                further = list(self.listing)
            if isinstance(ahead, SourceError):
                ahead, further = True, list(self.listing)
            return verified and ahead and await self._instance_rows(further)
        except SourceError:
            # Not to be taken for whole listings later on.
            for instances in self.listing.values():
                instances.clear()
            raise

    async def _ahead(self, likely: Collection[str]) -> tuple[bool, bool | SourceError]:
        """List series, and meanwhile the instances of those that are likely among them."""
        confirmed: Listing = {}
        self.listing.update((uid, {}) for uid in likely)
        async with asyncio.TaskGroup() as group:
            rows = group.create_task(_settled(self._series_rows(confirmed)), name="series")
            ahead = await _settled(self._instance_rows(tuple(likely)))
        for uid in [uid for uid in self.listing if uid not in confirmed]:
            del self.listing[uid]
        for uid in confirmed:
            self.listing.setdefault(uid, {})
        verified = rows.result()
        if isinstance(verified, SourceError):
            raise verified
        return verified, ahead

    async def _series_rows(self, series: Listing) -> bool:
        """Fill in the series; False if there may be more of them."""
        count = 0
        query = self._query(Level.SERIES, (SERIES_INSTANCE_UID,))
        async with closing(self._source.find(query)) as rows:
            async for row in rows:
                count += 1
                uid = row.text(SERIES_INSTANCE_UID)
                if uid and row.text(STUDY_INSTANCE_UID) in ("", self._uid):
                    series.setdefault(uid, {})
        return count < MAX_ROWS

    async def _instance_rows(self, series: Collection[str]) -> bool:
        """Fill in the instances of *series*; False if there may be more of them."""
        waiting = deque(series)
        errors: list[SourceError] = []
        cut = False

        async def work() -> None:
            nonlocal cut
            while waiting and not errors:
                try:
                    cut = not await self._instances_of(waiting.popleft()) or cut
                except SourceError as error:
                    errors.append(error)

        async with asyncio.TaskGroup() as group:
            for number in range(min(_PARALLEL, len(series))):
                group.create_task(work(), name=f"manifest-{number}")
        if errors:
            raise errors[0]
        return not cut

    async def _instances_of(self, series: str) -> bool:
        count = 0
        instances = self.listing[series]
        query = self._query(Level.IMAGE, self._of_instances, series)
        async with closing(self._source.find(query)) as rows:
            async for row in rows:
                count += 1
                uid = row.text(SOP_INSTANCE_UID)
                # Archives that overlook the key answer for other series too.
                if uid and row.text(SERIES_INSTANCE_UID) in ("", series):
                    instances[uid] = row.text(SOP_CLASS_UID)
                    if self.progress is not None:
                        self.progress()
        return count < MAX_ROWS
