"""The status page: a snapshot as one self-contained HTML document. Pure.

Rule kept: every value passes :func:`_text` on its way in, whoever it came
from; AE titles are chosen by peers. The page loads nothing, runs nothing, and
asks for itself again every few seconds.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from dicomproxy.ports import LOCAL
from dicomproxy.web.status import (
    CacheStatus,
    FailureStatus,
    Hl7Status,
    OperationStatus,
    SourceStatus,
    StatusSnapshot,
)
from dicomproxy.web.style import STYLE

REFRESH_SECONDS: Final = 5
MOST_OPERATIONS: Final = 100
MOST_FAILURES: Final = 20

_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Lets the page use its own style sheet and nothing else at all."""

_STATE_CLASS: Final = {"ready": "good", "starting": "warn", "draining": "warn"}
_BREAKER_CLASS: Final = {"closed": "good", "half_open": "warn", "open": "bad"}
_UNKNOWN: Final = '<span class="soft">–</span>'


def render_page(snapshot: StatusSnapshot, now: float) -> str:
    """Return the page for *snapshot* at *now*, in seconds since 1970.

    Stuck operations come first, then the oldest.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<title>dicomproxy: {_text(snapshot.state)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>dicomproxy</h1>{_marked(snapshot.state, _STATE_CLASS)}
<span class="soft">version {_text(snapshot.version)}</span></header>
<main>
{_overview(snapshot, now)}
{_sources(snapshot.sources, now)}
{_operations(snapshot.operations)}
{_cache(snapshot.cache)}
{_hl7(snapshot.hl7, now)}
{_failures(snapshot.failures)}
</main>
<footer>As of {_moment(now)}; renewed every {REFRESH_SECONDS} seconds.</footer>
</body>
</html>
"""


# -------------------------------------------------------------------- sections


def _overview(snapshot: StatusSnapshot, now: float) -> str:
    titles = ", ".join(snapshot.ae_titles)
    listening = f"{titles} on {snapshot.address}" if snapshot.address else titles
    return _section(
        "Overview",
        _facts(
            ("Listening as", _text(listening)),
            ("Uptime", _duration(now - snapshot.started_at)),
            ("Associations", _of(snapshot.associations, snapshot.max_associations)),
            ("Operations", _text(len(snapshot.operations))),
        ),
    )


def _sources(sources: Sequence[SourceStatus], now: float) -> str:
    rows = [
        _row(
            _text(source.name) + _aside("local PACS" if source.name == LOCAL else ""),
            _text(source.ae_title) + _aside(source.address),
            _reachable(source),
            _marked(source.breaker, _BREAKER_CLASS),
            _ago(source.last_success_at, now),
            _last_failure(source, now),
            f"{source.in_use} / {source.idle} / {source.ceiling}",
            _latency(source.median_seconds),
            _latency(source.last_seconds),
        )
        for source in sources
    ]
    heads = (
        "Name",
        "AE title",
        "Reachable",
        "Breaker",
        "Last success",
        "Last failure",
        "Associations in use / idle / most",
        "Query median",
        "Query last",
    )
    return _section("Sources", _table(heads, rows, "No sources are configured."))


def _operations(operations: Sequence[OperationStatus]) -> str:
    ordered = sorted(operations, key=lambda each: (not each.stuck, -each.duration_seconds))
    rows = [
        _row(
            _text(each.operation_id),
            _text(each.kind),
            _text(each.caller_ae_title) + _aside(each.peer_address),
            _or_unknown(each.destination_ae_title),
            _or_unknown(each.query_level),
            _state(each),
            _counts(each),
            _size(each.bytes),
            _duration(each.duration_seconds),
            stuck=each.stuck,
        )
        for each in ordered[:MOST_OPERATIONS]
    ]
    heads = (
        "Operation",
        "Kind",
        "Caller",
        "Destination",
        "Level",
        "Phase",
        "Done",
        "Bytes",
        "Duration",
    )
    more = len(ordered) - MOST_OPERATIONS
    rest = f'<p class="soft">and {more} more</p>' if more > 0 else ""
    return _section("Operations", _table(heads, rows, "Nothing is running.") + rest)


def _cache(cache: CacheStatus) -> str:
    most = max(cache.max_size_bytes, 1)
    used = min(cache.bytes, most)
    bar = (
        f'<meter min="0" max="{most}" high="{int(most * 0.95)}" value="{used}"'
        f' aria-label="Cache in use">{_size(cache.bytes)}</meter>'
    )
    asked = cache.hits + cache.misses
    ratio = f" ({cache.hits * 100 // asked} %)" if asked else ""
    spool = _size(cache.spooled_bytes)
    if cache.spooled_bytes:
        spool = f'<span class="bad">{spool}: the disk takes none</span>'
    return _section(
        "Cache",
        bar
        + _facts(
            ("Used", f"{_size(cache.bytes)} of {_size(cache.max_size_bytes)}"),
            ("Studies", _text(cache.studies)),
            ("Instances", _text(cache.instances)),
            ("In use / pinned", f"{cache.in_use} / {cache.pinned}"),
            ("Hits / misses", f"{cache.hits} / {cache.misses}{ratio}"),
            ("Evictions", _text(cache.evictions)),
            ("Memory spool", spool),
        ),
    )


def _hl7(hl7: Hl7Status | None, now: float) -> str:
    if hl7 is None:
        return ""
    refused = _text(hl7.refused)
    if hl7.refused:
        refused = f'<span class="warn">{refused}</span>, the last {_ago(hl7.last_refused_at, now)}'
    unheeded = _text(hl7.set_aside)
    if hl7.set_aside:
        unheeded = f'<span class="bad">{unheeded}, until the next start</span>'
    foreign = _text(hl7.unknown_domain)
    if hl7.unknown_domain:
        foreign = f'<span class="warn">{foreign}: everything was forgotten</span>'
    return _section(
        "HL7 messages",
        _facts(
            ("Listening on", _text(hl7.address)),
            ("Connections", _of(hl7.connections, hl7.max_connections)),
            ("Connections refused", _text(hl7.refused_connections)),
            ("Messages acknowledged", _text(hl7.acknowledged)),
            ("Messages refused", refused),
            ("Waiting", _text(hl7.waiting)),
            ("Failed", unheeded),
            ("Merges / updates heeded", f"{hl7.merges} / {hl7.updates}"),
            ("Of an unknown domain", foreign),
            ("Last notice", _ago(hl7.last_notice_at, now)),
        ),
    )


def _failures(failures: Sequence[FailureStatus]) -> str:
    latest = sorted(failures, key=lambda each: each.at, reverse=True)[:MOST_FAILURES]
    rows = [_row(_moment(each.at), _text(each.event), _or_unknown(each.detail)) for each in latest]
    return _section(
        "Recent failures", _table(("When", "What", "Detail"), rows, "None since the start.")
    )


# ---------------------------------------------------------------------- pieces


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{content}</section>"


def _facts(*facts: tuple[str, str]) -> str:
    shown = "".join(f"<div><dt>{_text(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{shown}</dl>'


def _table(heads: Iterable[str], rows: Sequence[str], empty: str) -> str:
    if not rows:
        return f'<p class="soft">{_text(empty)}</p>'
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    body = "\n".join(rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _row(*cells: str, stuck: bool = False) -> str:
    """Return a table row of *cells*, which are HTML already."""
    mark = ' class="stuck"' if stuck else ""
    return f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _state(operation: OperationStatus) -> str:
    if not operation.stuck:
        return _or_unknown(operation.phase)
    since = _duration(operation.quiet_seconds)
    return f'{_text(operation.phase)} <span class="warn">stuck: no progress for {since}</span>'


def _counts(operation: OperationStatus) -> str:
    done = operation.completed + operation.warning + operation.failed
    shown = _text(operation.completed)
    if operation.remaining:
        shown += f" of {done + operation.remaining}"
    if operation.warning:
        shown += f' <span class="warn">{operation.warning} warnings</span>'
    if operation.failed:
        shown += f' <span class="bad">{operation.failed} failed</span>'
    return shown


def _reachable(source: SourceStatus) -> str:
    if source.reachable is None:
        return '<span class="soft">not asked yet</span>'
    return '<span class="good">yes</span>' if source.reachable else '<span class="bad">no</span>'


def _last_failure(source: SourceStatus, now: float) -> str:
    if not source.last_failure_at:
        return _UNKNOWN
    return f"{_text(source.last_failure)} {_ago(source.last_failure_at, now)}"


def _marked(word: str, classes: dict[str, str]) -> str:
    return f'<span class="{classes.get(word, "soft")}">{_text(word.replace("_", " "))}</span>'


def _aside(value: str) -> str:
    return f' <span class="soft">{_text(value)}</span>' if value else ""


def _or_unknown(value: str) -> str:
    return _text(value) if value else _UNKNOWN


def _text(value: object) -> str:
    # A lone surrogate would keep the whole page from being encoded.
    shown = str(value).encode(errors="replace").decode()
    return html.escape(shown, quote=True)


def _of(value: int, limit: int) -> str:
    return f"{value} of {limit}" if limit else str(value)


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ago(at: float, now: float) -> str:
    return f"{_duration(now - at)} ago" if at else _UNKNOWN


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    """Return the two largest units of a duration, such as ``3 h 12 min``."""
    whole = max(0, int(seconds))  # clocks may have been set back
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3_600} h {whole % 3_600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3_600} h"


def _size(count: int) -> str:
    """Return bytes in decimal units, as disks are sold and the configuration counts."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
