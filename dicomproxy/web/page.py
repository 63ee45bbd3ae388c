"""The status page: HTML made on the server, without scripts or anything from elsewhere.

Every value is escaped where it enters the page. It reloads itself every five seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Final

from dicomproxy.web.status import (
    CacheStatus,
    FailureStatus,
    OperationStatus,
    SourceStatus,
    StatusSnapshot,
)

STUCK_SECONDS: Final = 30.0
"""After which an operation in which nothing moves is shown as stuck."""

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a7f37;
  --bad: #cf222e; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149;
  --warn: #d29922; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px;
  padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.35rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
header { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: baseline; }
.facts { color: GrayText; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; color: GrayText; }
.number { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.badge { font-weight: 600; }
.bar { background: var(--soft); border-radius: 4px; height: .7rem; max-width: 30rem; }
.bar div { background: var(--good); border-radius: 4px; height: 100%; min-width: 2px; }
.bar div.full { background: var(--warn); }
.none { color: GrayText; }
"""


def render(status: StatusSnapshot) -> str:
    """Return the page."""
    state, kind = ("ready", "good") if status.ready else ("not ready", "bad")
    if status.draining:
        state, kind = "draining", "warn"
    now = time.time()
    facts = (
        f"version {escape(status.version)}",
        f"up {_duration(now - status.started_at)}",
        f"{escape(', '.join(status.ae_titles))} at {escape(status.address)}",
        f"{status.associations} of {status.max_associations} associations",
    )
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="refresh" content="5"><title>dicomproxy</title>',
            f"<style>{_STYLE}</style></head><body>",
            f'<header><h1>dicomproxy</h1><span class="badge {kind}">{state}</span>',
            *(f'<span class="facts">{fact}</span>' for fact in facts),
            "</header>",
            "<h2>Archives</h2>",
            _sources(status.sources, now),
            "<h2>Under way</h2>",
            _operations(status.operations),
            "<h2>Cache</h2>",
            _cache(status.cache),
            "<h2>Lately failed</h2>",
            _failures(status.failures),
            "</body></html>",
        )
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], none: str) -> str:
    """Build a table of cells that are HTML already; a heading with ``#`` is of numbers."""
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_number(heading)}>{cell}</td>"
            for heading, cell in zip(headings, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    if not body:
        return f'<p class="none">{none}</p>'
    head = "".join(
        f"<th{_number(heading)}>{escape(heading.lstrip('#'))}</th>" for heading in headings
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _number(heading: str) -> str:
    return ' class="number"' if heading.startswith("#") else ""


def _sources(sources: Sequence[SourceStatus], now: float) -> str:
    return _table(
        (
            "Name",
            "AE title",
            "Address",
            "State",
            "Last answer",
            "Last failure",
            "#Median",
            "#Last",
            "#In use",
            "#Idle",
            "#At most",
        ),
        (
            (
                escape(source.name),
                escape(source.ae_title),
                escape(source.address),
                _state(source),
                _ago(source.last_success_at, now),
                (
                    f"{escape(source.last_failure)}, {_ago(source.last_failure_at, now)}"
                    if source.last_failure_at
                    else _ago(0, now)
                ),
                _milliseconds(source.median_seconds),
                _milliseconds(source.last_seconds),
                str(source.in_use),
                str(source.idle),
                str(source.ceiling),
            )
            for source in sources
        ),
        "None is configured.",
    )


def _state(source: SourceStatus) -> str:
    if source.breaker == "open":
        return '<span class="badge bad">left alone</span>'
    if source.breaker == "half_open":
        return '<span class="badge warn">being tried</span>'
    if source.last_failure_at > source.last_success_at:
        return '<span class="badge warn">failing</span>'
    if not source.last_success_at:
        return '<span class="none">not asked yet</span>'
    return '<span class="badge good">answers</span>'


def _operations(operations: Sequence[OperationStatus]) -> str:
    return _table(
        (
            "Operation",
            "Kind",
            "Caller",
            "Level",
            "To",
            "Phase",
            "#Remaining",
            "#Completed",
            "#Failed",
            "#Warning",
            "#Bytes",
            "#For",
            "Moving",
        ),
        (
            (
                escape(operation.operation_id),
                escape(operation.kind),
                f"{escape(operation.caller_ae_title)} ({escape(operation.peer_address)})",
                escape(operation.query_level),
                escape(operation.destination_ae_title),
                escape(operation.phase),
                str(operation.remaining),
                str(operation.completed),
                str(operation.failed),
                str(operation.warning),
                size(operation.bytes),
                _duration(operation.duration_seconds),
                (
                    f'<span class="badge bad">stuck for {_duration(operation.quiet_seconds)}</span>'
                    if operation.quiet_seconds > STUCK_SECONDS
                    else '<span class="good">yes</span>'
                ),
            )
            for operation in operations
        ),
        "Nothing.",
    )


def _cache(cache: CacheStatus) -> str:
    share = min(1.0, cache.bytes / cache.max_size_bytes) if cache.max_size_bytes else 1.0
    asked = cache.hits + cache.misses
    hit_rate = f", {cache.hits / asked:.0%} of {asked} instances were held" if asked else ""
    spool = (
        f' <span class="badge bad">{size(cache.spooled_bytes)} in memory: the disk takes none'
        "</span>"
        if cache.spooled_bytes
        else ""
    )
    return (
        f'<div class="bar"><div class="{"full" if share > 0.95 else ""}" '
        f'style="width:{share:.1%}"></div></div>'
        f"<p>{size(cache.bytes)} of {size(cache.max_size_bytes)} ({share:.0%}): "
        f"{cache.studies} studies, {cache.instances} instances, {cache.in_use} in use, "
        f"{cache.pinned} pinned, {cache.evictions} evicted{hit_rate}.{spool}</p>"
    )


def _failures(failures: Sequence[FailureStatus]) -> str:
    return _table(
        ("When (UTC)", "What", "Detail"),
        (
            (
                datetime.fromtimestamp(failure.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
                escape(failure.event),
                escape(failure.detail),
            )
            for failure in failures
        ),
        "Nothing.",
    )


def size(amount: float) -> str:
    """Write a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"


def _ago(moment: float, now: float) -> str:
    if not moment:
        return '<span class="none">never</span>'
    return f"{_duration(now - moment)} ago"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f} ms"
