"""Gathers what the status page shows from a running application."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dicomproxy import __version__
from dicomproxy.identity.reports import recently_withheld
from dicomproxy.services.operations import Operation, Operations
from dicomproxy.sources.archive import Archive
from dicomproxy.web import (
    CacheStatus,
    FailureStatus,
    Hl7Status,
    OperationStatus,
    SourceStatus,
    StatusSnapshot,
)

if TYPE_CHECKING:
    from dicomproxy.app import Application

_MOST_FAILURES: Final = 20


def snapshot(application: Application) -> StatusSnapshot:
    """Return the state of *application* at this moment; it may be starting still.

    On the event loop only: its tasks are counted.
    """
    proxy = application.settings.proxy
    routing, listener = application.routing, application.listener
    archives = [routing.local_archive, *routing.archives] if routing is not None else []
    stats = application.store.stats()
    return StatusSnapshot(
        version=__version__,
        started_at=application.started_at,
        ready=application.ready,
        draining=application.draining,
        ae_titles=(proxy.ae_title, *proxy.aliases),
        address=f"{proxy.host}:{application.port or proxy.port}",
        associations=len(listener.accepted) if listener is not None else 0,
        max_associations=proxy.max_associations,
        sources=tuple(_source(archive) for archive in archives),
        operations=tuple(
            _operation(operation) for operation in application.operations.running.values()
        ),
        cache=CacheStatus(
            bytes=stats.bytes,
            max_size_bytes=stats.max_size_bytes,
            studies=stats.studies,
            instances=stats.instances,
            pinned=stats.pinned,
            in_use=stats.in_use,
            spooled_bytes=stats.spooled_bytes,
            hits=stats.hits,
            misses=stats.misses,
            evictions=stats.evictions,
        ),
        failures=_failures(application.operations, archives),
        tasks=len(asyncio.all_tasks()),
        hl7=_hl7(application),
    )


def _hl7(application: Application) -> Hl7Status | None:
    hl7, notices = application.hl7, application.identities.stats
    if hl7 is None:
        return None
    section, stats = hl7.section, hl7.stats
    return Hl7Status(
        address=f"{section.host}:{hl7.port or section.port}",
        connections=hl7.connections,
        max_connections=section.max_connections,
        refused_connections=hl7.refused_connections,
        acknowledged=stats.acknowledged,
        refused=stats.refused,
        waiting=stats.waiting,
        set_aside=stats.set_aside,
        merges=notices.merges,
        updates=notices.updates,
        unknown_domain=notices.unknown_domain,
        last_notice_at=notices.last_at,
        last_refused_at=stats.last_refused_at,
    )


def _failures(operations: Operations, archives: Sequence[Archive]) -> tuple[FailureStatus, ...]:
    """Return what failed or was withheld lately, the latest first."""
    failures = [
        FailureStatus(failure.at, failure.event, failure.detail)
        for failure in operations.recent_failures
    ]
    failures.extend(
        FailureStatus(at, f"{archive.settings.name} {operation}", failure)
        for archive in archives
        for at, operation, failure in archive.recent_failures
    )
    failures.extend(
        FailureStatus(one.at, f"{one.source} {one.event}", one.reason)
        for one in recently_withheld()
    )
    return tuple(sorted(failures, key=lambda failure: -failure.at)[:_MOST_FAILURES])


def _source(archive: Archive) -> SourceStatus:
    settings, health = archive.settings, archive.health()
    latencies = health.latencies
    return SourceStatus(
        name=settings.name,
        ae_title=settings.ae_title,
        address=f"{settings.host}:{settings.port}",
        breaker=health.breaker,
        last_success_at=health.last_success_at,
        last_failure_at=health.last_failure_at,
        last_failure=health.last_failure,
        median_seconds=statistics.median(latencies) if latencies else None,
        last_seconds=latencies[-1] if latencies else None,
        in_use=health.in_use,
        idle=health.idle,
        ceiling=health.ceiling,
    )


def _operation(operation: Operation) -> OperationStatus:
    now = time.monotonic()
    return OperationStatus(
        operation_id=operation.operation_id,
        kind=operation.kind,
        caller_ae_title=operation.caller_ae_title,
        peer_address=operation.peer_address,
        query_level=operation.query_level,
        destination_ae_title=operation.destination_ae_title,
        phase=operation.phase(),
        remaining=operation.remaining,
        completed=operation.completed,
        failed=operation.failed,
        warning=operation.warning,
        bytes=operation.bytes,
        duration_seconds=now - operation.started,
        quiet_seconds=now - operation.moved,
    )
