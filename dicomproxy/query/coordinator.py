"""Puts one C-FIND to the local PACS and to the sources, and merges what comes.

Rules kept: the local PACS never waits for anybody and its rows are passed on
the moment they arrive; a source costs at most the caller's budget; the query
ends as the local PACS ended it. A source that is too late goes on being
listened to up to its own deadline, since where it saw a study serves the next
query.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final, TypeVar

from dicomproxy.dataset.identifier import Identifier, IdentifierError
from dicomproxy.dataset.levels import PATIENT_ID, STUDY_INSTANCE_UID, Level, Root
from dicomproxy.identity.service import IdentityService
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    LOCAL,
    Audit,
    Caller,
    CrossReferenceError,
    Failure,
    LocalAnswer,
    LocalArchive,
    Location,
    Locations,
    Source,
    SourceError,
    SourceQuery,
)
from dicomproxy.query.merge import Merge, Verdict
from dicomproxy.query.operation import SECONDS, WITHHELD, Leg, Query, QuerySummary
from dicomproxy.query.plan import QueryPlan, QueryRefused, QueryRequest, plan, validate
from dicomproxy.query.rows import Answer, Style, batch_of
from dicomproxy.query.translation import Local, Translation
from dicomproxy.query.waiting import Waiting
from dicomproxy.tasks import OwnerClosed, TaskOwner

__all__ = ["Answer", "Answers", "QueryCoordinator", "QuerySummary"]

Answers = tuple[Answer, ...]
"""Answers that were ready at the same time, to be sent together; never empty."""

SUCCESS: Final = 0x0000
UNABLE_TO_PROCESS: Final = 0xC000
LOCAL_FAILED: Final = 0xC001
"""The final status where the local PACS gave none."""

_MAX_LEGS: Final = 256  # asked at the same time, over all queries
_MAX_LATE_LEGS: Final = 32  # listened to after their query has ended
_LEG_SECONDS: Final = 60.0  # a backstop: a source has its own deadlines
_LOCAL_SILENCE_SECONDS: Final = 300.0  # likewise: the local PACS's are shorter
_LOCATE_SECONDS: Final = 1.0  # what the memory of locations may cost
_AUDIT_SECONDS: Final = 15.0  # a backstop: the trail has deadlines of its own
_WIND_UP_SECONDS: Final = 5.0  # for a leg that was told to end
_MAX_WAITING_LOCAL_ROWS: Final = 32
_BATCH_ROWS: Final = 32
_BATCH_BYTES: Final = 128 * 1024  # a batch is closed by the row that exceeds it
_MAX_STUDIES_LOCATED: Final = 100

_log = get_logger()

T = TypeVar("T")


class QueryCoordinator:
    """Answers the queries of workstations.

    Args:
        local: the local PACS.
        sources: the archives of the region by name, in order of precedence.
        locations: where studies were seen.
        audit: where each question that leaves the house is recorded.
        local_query_timeout_seconds: how long remote rows are held for the local
            PACS at most; it may answer later all the same.
        cached: tells whether a study is held completely in the cache.
        identity: who patients are elsewhere; None where each has one ID everywhere.
    """

    def __init__(
        self,
        local: LocalArchive,
        sources: Mapping[str, Source],
        locations: Locations,
        audit: Audit,
        local_query_timeout_seconds: float,
        cached: Callable[[str], bool],
        *,
        identity: IdentityService | None = None,
    ) -> None:
        self._local = local
        self._sources = sources
        self._locations = locations
        self._audit = audit
        self._local_query_timeout_seconds = local_query_timeout_seconds
        self._cached = cached
        self._identity = identity
        self._tasks = TaskOwner("query")
        self._legs = 0
        self._late_legs = 0

    def __repr__(self) -> str:
        return f"<QueryCoordinator {self._legs} legs, {self._late_legs} late>"

    async def close(self) -> None:
        """End every leg, late ones included."""
        await self._tasks.close()

    async def wait_idle(self) -> None:
        """Return once nothing is being asked, late legs included."""
        await self._tasks.wait_idle()

    async def find(
        self,
        *,
        sop_class_uid: str,
        root: Root,
        transfer_syntax_uid: str,
        data: bytes,
        caller: Caller,
        operation_id: str,
        local_calling_ae_title: str,
        priority: int = 0,
        summary: QuerySummary | None = None,
    ) -> AsyncGenerator[Answers, None]:
        """Yield the answers to one C-FIND, the last one final (PS3.4 C.4.1).

        The first row comes alone, at once; what is ready later comes together.
        Closing the iterator before its last answer cancels: the local PACS is
        sent a C-CANCEL and so is every source. It must be closed in either case
        (``aclosing``), and never raises for what a peer does.

        Args:
            sop_class_uid: of the request, with which the local PACS is asked.
            root: the information model of *sop_class_uid*.
            transfer_syntax_uid: of *data* and of every answer.
            data: the identifier as it came.
            caller: who asks.
            operation_id: for log and audit.
            local_calling_ae_title: as whom the local PACS is asked.
            priority: of the request.
            summary: filled while the query runs.
        """
        summary = QuerySummary() if summary is None else summary
        summary.root = root.value
        try:
            request = validate(root, Identifier.decode(data, transfer_syntax_uid))
        except IdentifierError:
            _log.warning(
                "protocol_error", operation_id=operation_id, reason="unreadable_identifier"
            )
            summary.status = UNABLE_TO_PROCESS
            yield (Answer(UNABLE_TO_PROCESS, error_comment="Identifier cannot be read"),)
            return
        except QueryRefused as refused:
            summary.status = refused.status
            element = refused.offending_element
            yield (
                Answer(
                    refused.status,
                    error_comment=refused.comment,
                    offending_element=() if element is None else (element,),
                ),
            )
            return
        summary.query_level = request.level.value
        style = Style(request, transfer_syntax_uid, caller.called_ae_title, caller.charset)
        merge = Merge(style, caller.availability, self._cached)
        translation = None
        if self._identity is not None:
            translation = Translation(
                self._identity,
                request,
                self._sources,
                caller.ae_title,
                self._local_query_timeout_seconds,
            )
        query = Query(request, caller, operation_id, merge, summary, translation)
        local = self._local.find(
            sop_class_uid,
            transfer_syntax_uid,
            data,
            calling_ae_title=local_calling_ae_title,
            priority=priority,
        )
        tasks: list[asyncio.Task[None]] = []
        try:
            tasks.append(self._tasks.spawn(self._ask_local(query, local), name="local"))
            tasks.append(self._tasks.spawn(self._fan_out(query), name="fan_out"))
            async with aclosing(self._merged(query)) as merged:
                async for batch in merged:
                    yield batch
            await self._record(query)
            final = self._final(query)
            summary.status = final.status
            yield (final,)
        finally:
            await self._end(query, tasks)

    # ---------------------------------------------------------------- merging

    async def _merged(self, query: Query) -> AsyncGenerator[Answers, None]:
        """Yield pending answers until the local PACS has ended and so have sources, or time."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        release_at = started + self._local_query_timeout_seconds
        end_at = started + query.caller.query_budget_seconds
        most = 1  # the first row is not to wait for the writing of others
        while True:
            query.changed.clear()
            while query.local_rows:
                if batch := self._local_batch(query, most):
                    query.summary.local_matches += len(batch)
                    most = _BATCH_ROWS
                    yield batch
            if query.local_done and query.translation is not None:
                query.translation.local_has_told()
            now = loop.time()
            if query.local_done or now >= release_at:
                # Local rows that came meanwhile go before the next batch.
                while query.merge.holding and not query.local_rows:
                    batch = batch_of(query.merge.release(), most, _BATCH_BYTES)
                    query.summary.remote_matches += len(batch)
                    most = _BATCH_ROWS
                    yield batch
            if query.local_rows or (query.merge.holding and now >= release_at):
                continue
            if query.local_done and (query.sources_done or now >= end_at):
                if query.merge.holding:
                    continue
                return
            if query.local_done:
                deadline = end_at
            elif now < release_at:
                deadline = release_at
            else:
                deadline = now + _LOCAL_SILENCE_SECONDS
            try:
                async with asyncio.timeout_at(deadline):
                    await query.changed.wait()
            except TimeoutError:
                if not query.local_done and deadline > release_at:
                    self._local_failed(query, started, {"failure": Failure.TIMEOUT.value})
                    return

    def _local_batch(self, query: Query, most: int) -> Answers:
        """Take local rows that wait; what is returned may be fewer, or none."""
        located: list[Location] = []
        taken = (self._take_local(query, located) for _ in range(len(query.local_rows)))
        batch = batch_of((answer for answer in taken if answer is not None), most, _BATCH_BYTES)
        if located:
            # Below STUDY level a study is named by each of its rows.
            self._locations.remember(list(dict.fromkeys(located)))
        return batch

    def _take_local(self, query: Query, located: list[Location]) -> Answer | None:
        row = query.merge.local(query.local_rows.popleft())
        query.room.set()
        if self._identity is not None and row.row is not None:
            self._identity.learn(row.row)
        if not row.readable:
            _log.warning(
                "local_answer_unreadable",
                operation_id=query.operation_id,
                reason="relayed" if row.answer is not None else "dropped",
            )
        for source in row.conflicts:
            query.report_conflict(row.study_instance_uid, source)
            self._locations.forget(row.study_instance_uid, source)
        if row.study_instance_uid:
            patient = row.patient_id or query.patient_of(row.study_instance_uid, LOCAL)
            located.append(Location(row.study_instance_uid, LOCAL, patient))
        return row.answer

    def _final(self, query: Query) -> Answer:
        query.summary.duplicates = query.merge.duplicates
        if query.local_final is None:
            return Answer(LOCAL_FAILED, error_comment="Local archive gave no answer")
        return Answer(query.local_final.status, error_comment=query.local_final.error_comment)

    # ------------------------------------------------------------------ local

    async def _ask_local(self, query: Query, answers: AsyncIterator[LocalAnswer]) -> None:
        started = asyncio.get_running_loop().time()
        fields: dict[str, object] = {"failure": Failure.PROTOCOL.value}
        first = True
        try:
            async with _closing(answers):
                async for answer in answers:
                    if not answer.pending:
                        query.local_final = answer
                        break
                    while len(query.local_rows) >= _MAX_WAITING_LOCAL_ROWS:
                        # Ended by whoever reads the answers, by going on or by closing.
                        query.room.clear()
                        await query.room.wait()
                    query.local_rows.append(answer)
                    query.changed.set()
                    if first:
                        # Others may have come with it: this one is on its way before they are read.
                        first = False
                        await asyncio.sleep(0)
        except SourceError as error:
            fields = {"failure": error.failure.value, "status": error.status}
        except Exception as error:
            fields |= error_fields(error)
        finally:
            query.local_done = True
            query.changed.set()
        if query.local_final is None:
            self._local_failed(query, started, fields)

    def _local_failed(self, query: Query, started: float, fields: Mapping[str, object]) -> None:
        query.summary.local_failed = True
        _log.error(
            "local_query_failed",
            operation_id=query.operation_id,
            query_level=query.request.level.value,
            duration_seconds=asyncio.get_running_loop().time() - started,
            **fields,
        )

    # ---------------------------------------------------------------- sources

    async def _fan_out(self, query: Query) -> None:
        """Decide who is asked, and ask; apart from the local leg, which must not wait for it."""
        try:
            query.known = await self._locate(query.request, query.caller)
            decided = await self._plan(query)
            query.summary.local_only = decided.local_only
            query.summary.sources = tuple(leg.source for leg in decided.legs)
            for study, source in decided.conflicts:
                query.report_conflict(study, source)
            started = asyncio.get_running_loop().time()
            for part in decided.legs:
                leg = Leg(part, started)
                query.legs.append(leg)
                if self._legs >= _MAX_LEGS:
                    leg.asked = False
                    query.failed(leg, Failure.BUSY)
                    leg.done = True
                    continue
                self._legs += 1
                leg.task = self._tasks.spawn(self._ask(query, leg), name=part.source)
                leg.task.add_done_callback(lambda _task: self._leg_ended())
        except OwnerClosed:
            pass  # shutting down
        finally:
            query.planned = True
            query.changed.set()
            self._sources_may_have_ended(query)

    async def _plan(self, query: Query) -> QueryPlan:
        translation = query.translation
        if translation is None or query.caller.is_source:
            return plan(query.request, query.caller, self._sources, query.known)
        if translation.of_another_domain:
            return QueryPlan(local_only="patient_of_another_domain")
        accession_sources = await translation.resolve_accession()
        known = await translation.known_here(query.known)
        return plan(query.request, query.caller, self._sources, known, accession_sources)

    def _sources_may_have_ended(self, query: Query) -> None:
        """Begin to record as soon as all is known, while rows are still being sent."""
        if query.open and query.sources_done:
            with suppress(OwnerClosed):
                self._start_recording(query)

    def _leg_ended(self) -> None:
        self._legs -= 1

    async def _locate(
        self, request: QueryRequest, caller: Caller
    ) -> Mapping[str, tuple[Location, ...]]:
        """Look up the studies of a question below STUDY level; a failing memory knows nothing."""
        if request.level not in (Level.SERIES, Level.IMAGE) or caller.is_source:
            return {}
        known: dict[str, tuple[Location, ...]] = {}
        try:
            async with asyncio.timeout(_LOCATE_SECONDS):
                for study in request.study_instance_uids[:_MAX_STUDIES_LOCATED]:
                    known[study] = tuple(await self._locations.find(study))
        except Exception as error:
            _log.warning("locations_unavailable", **error_fields(error))
        return known

    async def _ask(self, query: Query, leg: Leg) -> None:
        """Put the questions of one leg to its source. Fails nobody else."""
        try:
            async with asyncio.timeout(_LEG_SECONDS):
                if query.translation is None:
                    await self._ask_as_it_is(query, leg)
                else:
                    await self._ask_translated(query, leg, query.translation)
        except SourceError as error:
            leg.asked = leg.answered or error.failure is not Failure.BREAKER
            query.failed(leg, error.failure, status=error.status)
        except CrossReferenceError as error:
            leg.asked = leg.answered
            query.failed(leg, error.failure, reason=error.reason)
        except TimeoutError:
            query.failed(leg, Failure.TIMEOUT)
        except Exception as error:
            query.failed(leg, Failure.PROTOCOL, **error_fields(error))
        else:
            if leg.late:
                _log.info("source_query_late", **query.facts(leg))
        # Not reached by a leg that is cancelled: it has said nothing of its source.
        leg.done = True
        SECONDS.labels(leg.source).observe(asyncio.get_running_loop().time() - leg.started)
        query.report_dropped(leg)
        query.changed.set()
        self._sources_may_have_ended(query)

    async def _ask_as_it_is(self, query: Query, leg: Leg) -> None:
        """Ask as the workstation did."""
        source = self._sources[leg.source]
        for question, study in zip(leg.plan.queries, leg.plan.study_instance_uids, strict=True):
            async with _closing(source.find(question)) as rows:
                async for row in rows:
                    leg.answered = True
                    leg.rows += 1
                    if self._take_remote(query, leg, row, study) is Verdict.TOO_MANY:
                        break
            leg.answered = True

    async def _ask_translated(self, query: Query, leg: Leg, translation: Translation) -> None:
        """Ask by the source's own IDs, and make local what it answers while it answers."""
        questions = await translation.questions(
            leg.source, leg.plan.queries, leg.plan.study_instance_uids
        )
        if not questions:
            query.not_asked(leg)
            return
        waiting = Waiting()
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._localise(query, leg, translation, waiting))
                try:
                    await self._read(leg, questions, waiting)
                except Exception as error:
                    failure = error  # what came before it counts
                finally:
                    waiting.end()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if failure is not None:
            raise failure

    async def _read(
        self, leg: Leg, questions: Sequence[tuple[SourceQuery, str]], waiting: Waiting
    ) -> None:
        source = self._sources[leg.source]
        for question, study in questions:
            async with _closing(source.find(question)) as rows:
                async for row in rows:
                    leg.answered = True
                    leg.rows += 1
                    if not await waiting.put(row, study):
                        return
            leg.answered = True

    async def _localise(
        self, query: Query, leg: Leg, translation: Translation, waiting: Waiting
    ) -> None:
        """Take rows as they wait, together; those whose patient cannot be found out are lost."""
        while rows := await waiting.take():
            made = await translation.localise(leg.source, rows)
            for local, (row, study) in zip(made, rows, strict=True):
                if local.failure is not None:
                    query.failed(leg, local.failure.failure, reason=local.failure.reason)
                    continue
                if self._take_local_form(query, leg, local, row, study) is Verdict.TOO_MANY:
                    waiting.stop()
                    return

    def _take_local_form(
        self, query: Query, leg: Leg, local: Local, row: Identifier, study: str
    ) -> Verdict:
        if local.row is not None:
            return self._take_remote(query, leg, local.row, study, local.foreign_id)
        leg.verdicts[local.verdict] = leg.verdicts.get(local.verdict, 0) + 1
        query.summary.withheld += 1
        WITHHELD.labels(leg.source).inc()
        if local.verdict is Verdict.CONFLICT:
            self._locations.forget(row.text(STUDY_INSTANCE_UID) or study, leg.source)
        return local.verdict

    def _take_remote(
        self, query: Query, leg: Leg, row: Identifier, study: str, foreign_id: str | None = None
    ) -> Verdict:
        """Merge a row; of one that has been made local, *foreign_id* is the ID at its source."""
        verdict = query.merge.remote(leg.source, row, study)
        leg.verdicts[verdict] = leg.verdicts.get(verdict, 0) + 1
        seen = row.text(STUDY_INSTANCE_UID) or study
        if verdict is Verdict.CONFLICT:
            query.report_conflict(seen, leg.source)
        elif verdict is Verdict.WITHHELD:
            query.summary.withheld += 1
            WITHHELD.labels(leg.source).inc()
        elif verdict.locates and seen:
            # Unknown it stays unknown: what else is at hand are IDs of this site.
            patient = foreign_id
            if patient is None:
                patient = row.text(PATIENT_ID) or query.patient_of(seen, leg.source)
            self._locations.remember([Location(seen, leg.source, patient)])
        if query.open:
            query.changed.set()
        return verdict

    # ----------------------------------------------------------------- ending

    async def _record(self, query: Query, *, cancelled: bool = False) -> None:
        """Record each question that left the house; those not answered yet are late."""
        for leg in query.legs:
            if not leg.done and not cancelled:
                leg.late = True
                query.failed(leg, Failure.TIMEOUT)
        query.open = False
        try:
            self._start_recording(query)
        except OwnerClosed:  # shutting down, which leaves nothing unrecorded
            await self._audit.record(*query.audit_events())
        if query.recording is None:
            return
        # The waiting may be cut short, by C-CANCEL for one; the recording never is.
        await asyncio.wait([query.recording], timeout=_AUDIT_SECONDS)
        if not query.recording.done():
            _log.error("audit_failed", operation_id=query.operation_id, reason="timeout")

    def _start_recording(self, query: Query) -> None:
        """Have the disclosures written, unless they are already.

        Raises:
            OwnerClosed: everything is shutting down.
        """
        if query.recording is None and (events := query.audit_events()):
            query.recording = self._tasks.spawn(self._audit.record(*events), name="audit")

    async def _end(self, query: Query, tasks: list[asyncio.Task[None]]) -> None:
        """End what must end; after a full answer, late legs may go on.

        All is told to end, and recorded, before anything is awaited: a C-CANCEL and
        the end of the association right behind it cancel twice.
        """
        cancelled = query.open
        query.open = False
        # First, since it could still start legs.
        ending = [task for task in tasks if not task.done()]
        for task in ending:
            task.cancel()
        for leg in query.legs:
            if leg.task is None or leg.task.done():
                continue
            if not cancelled and self._late_legs < _MAX_LATE_LEGS:
                self._late_legs += 1
                leg.task.add_done_callback(lambda _task: self._late_leg_ended())
                continue
            leg.task.cancel()
            ending.append(leg.task)
        if cancelled:
            with suppress(OwnerClosed):
                self._start_recording(query)
        if ending:
            await asyncio.wait(ending, timeout=_WIND_UP_SECONDS)
        if cancelled:
            await self._record(query, cancelled=True)

    def _late_leg_ended(self) -> None:
        self._late_legs -= 1


@asynccontextmanager
async def _closing(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close *iterator* in the end, which is how a port is told to cancel."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
