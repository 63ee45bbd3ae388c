"""One C-FIND under way: what its tasks share, and how its sources fared.

What is reported of a source (log line, metric, audit event) is written here,
so that each failure is reported once however it came about. Used on the event
loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client import Counter, Histogram

from dicomproxy.identity.reports import report_conflict
from dicomproxy.logs import get_logger
from dicomproxy.ports import AuditEvent, Caller, Failure, LocalAnswer, Location
from dicomproxy.query.merge import Merge, Verdict
from dicomproxy.query.plan import QueryRequest, SourceLeg
from dicomproxy.query.translation import Translation

_log = get_logger()

SECONDS = Histogram(
    "dicomproxy_source_query_seconds",
    "How long a source took to answer a query, failures included.",
    ["source"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
_FAILURES = Counter(
    "dicomproxy_source_query_failures_total",
    "Queries that a source did not answer, by reason.",
    ["source", "failure"],
)
WITHHELD = Counter(
    "dicomproxy_source_rows_withheld_total",
    "Rows of a source that were about another patient than the one asked for.",
    ["source"],
)


@dataclass(slots=True)
class QuerySummary:
    """What became of one query, for its log line; filled while it runs.

    ``local_only`` says in a word why no source was asked.
    """

    root: str = ""
    query_level: str = ""
    local_matches: int = 0
    remote_matches: int = 0
    duplicates: int = 0
    withheld: int = 0
    sources: tuple[str, ...] = ()
    failed_sources: tuple[str, ...] = ()
    local_only: str = ""
    local_failed: bool = False
    status: int | None = None


@dataclass(slots=True)
class Leg:
    """One source within one query."""

    plan: SourceLeg
    started: float
    task: asyncio.Task[None] | None = None
    rows: int = 0
    verdicts: dict[Verdict, int] = field(default_factory=dict)
    done: bool = False
    answered: bool = False  # something came, were it that there is nothing
    asked: bool = True  # false if it never left the house
    failure: Failure | None = None
    status: int | None = None
    late: bool = False

    @property
    def source(self) -> str:
        return self.plan.source

    def outcome(self) -> str:
        """Return the outcome for the audit."""
        if self.failure is None:
            return "success" if self.done else "cancelled"
        return "partial" if self.rows else "failure"


class Query:
    """What the tasks of one operation share."""

    def __init__(
        self,
        request: QueryRequest,
        caller: Caller,
        operation_id: str,
        merge: Merge,
        summary: QuerySummary,
        translation: Translation | None = None,
    ) -> None:
        self.request = request
        self.caller = caller
        self.operation_id = operation_id
        self.merge = merge
        self.summary = summary
        self.translation = translation
        self.open = True
        self.planned = False
        self.legs: list[Leg] = []
        self.recording: asyncio.Task[None] | None = None
        self.known: Mapping[str, tuple[Location, ...]] = {}
        self.local_rows: deque[LocalAnswer] = deque()
        self.local_done = False
        self.local_final: LocalAnswer | None = None
        self.changed = asyncio.Event()
        self.room = asyncio.Event()

    @property
    def sources_done(self) -> bool:
        """It is known who is asked, and everybody asked has ended."""
        return self.planned and all(leg.done for leg in self.legs)

    def patient_of(self, study: str, source: str) -> str:
        """Return under which patient a study is known, for a row that does not say it."""
        for location in self.known.get(study, ()):
            if location.source == source and location.patient_id:
                return location.patient_id
        return self.request.patient_id

    def facts(self, leg: Leg) -> dict[str, object]:
        """Return what a log line about *leg* says."""
        return {
            "source": leg.source,
            "operation_id": self.operation_id,
            "query_level": self.request.level.value,
            "matches": leg.rows,
            "duration_seconds": asyncio.get_running_loop().time() - leg.started,
        }

    def failed(
        self,
        leg: Leg,
        failure: Failure,
        *,
        status: int | None = None,
        **fields: object,
    ) -> None:
        """Report a source that did not answer, once."""
        if leg.failure is not None:
            return
        leg.failure, leg.status = failure, status
        self.summary.failed_sources += (leg.source,)
        _FAILURES.labels(leg.source, failure.value).inc()
        facts = {"failure": failure.value, **self.facts(leg), **fields}
        if status is not None:
            facts["status"] = status
        _log.warning("source_query_failed", **facts)

    def not_asked(self, leg: Leg) -> None:
        """Leave out a source that knows nobody by the ID asked for, which is no failure."""
        leg.asked = False
        self.summary.sources = tuple(name for name in self.summary.sources if name != leg.source)
        _log.info("source_not_asked", reason="no_patient_id", **self.facts(leg))

    def report_conflict(self, study: str, source: str) -> None:
        """Report a source that knows a study under another patient."""
        report_conflict(
            source,
            "holders_disagree",
            study_instance_uid=study,
            operation_id=self.operation_id,
            query_level=self.request.level.value,
        )

    def report_dropped(self, leg: Leg) -> None:
        """Report the rows of a source that ended which were not shown, by reason."""
        reasons = (Verdict.WITHHELD, Verdict.MALFORMED, Verdict.TOO_MANY)
        for verdict in reasons:
            if dropped := leg.verdicts.get(verdict, 0):
                _log.warning(
                    "source_rows_dropped",
                    source=leg.source,
                    operation_id=self.operation_id,
                    reason=verdict.value,
                    dropped=dropped,
                )

    def audit_events(self) -> list[AuditEvent]:
        """Return one event for each question that left the house."""
        request = self.request
        return [
            AuditEvent(
                event="query",
                outcome=leg.outcome(),
                caller_ae_title=self.caller.ae_title,
                peer_address=self.caller.peer_address,
                source=leg.source,
                operation_id=self.operation_id,
                level=request.level.value,
                root=request.root.value,
                patient_id=request.patient_id,
                study_instance_uids=tuple(filter(None, leg.plan.study_instance_uids))
                or request.study_instance_uids,
                status=leg.status,
                detail=leg.failure.value if leg.failure is not None else "",
                extra={"matches": leg.rows, "late": leg.late},
            )
            for leg in self.legs
            if leg.asked
        ]
