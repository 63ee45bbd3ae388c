"""What is said of an answer or an instance that is kept from a workstation, or looks odd.

Log, metric and status page, never a value. Whoever withholds something says so here, so that
it reads the same wherever it is found out; so does a cross-reference that fails, on the
status page, since then a source is not asked.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client import Counter

from dicomproxy.identity.safety import Comparison, Verdict
from dicomproxy.logs import get_logger
from dicomproxy.ports import CrossReferenceError

if TYPE_CHECKING:
    from dicomproxy.identity.crossref import IdentityUnresolved

_log = get_logger()

_WITHHELD = Counter(
    "dicomproxy_identity_withheld_total",
    "Answers and instances withheld because of whom they may be about.",
    ["source", "reason"],
)
_NAMES = Counter(
    "dicomproxy_identity_name_differs_total",
    "Answers shown although their patient's name is another one.",
    ["source"],
)


class Withheld(NamedTuple):
    """Something that was withheld, or a source not asked; *at* in seconds since 1970."""

    at: float
    source: str
    event: str
    reason: str


_MOST_RECENT: Final = 20
_recent: deque[Withheld] = deque(maxlen=_MOST_RECENT)


def recently_withheld() -> tuple[Withheld, ...]:
    """Return what was withheld lately, or not asked, because of an ID; the latest last."""
    return tuple(_recent)


def remember(source: str, event: str, reason: str) -> None:
    """Keep it, the same thing once: what fails all the time must not crowd out the rest."""
    for held in _recent:
        if held[1:] == (source, event, reason):
            _recent.remove(held)
            break
    _recent.append(Withheld(time.time(), source, event, reason))


def report_failed(source: str, service: str, failure: CrossReferenceError) -> None:
    """Say that a cross-reference did not tell who somebody is at *source*."""
    _log.warning(
        "cross_reference_failed",
        service=service,
        source=source,
        failure=failure.failure,
        reason=failure.reason,
    )
    remember(source, "cross_reference_failed", f"{service}: {failure}")


def report(
    source: str, comparison: Comparison, *, shown: bool, study_instance_uid: str = ""
) -> None:
    """Say what comparing an answer with the local patient came to, if that is worth saying."""
    if not shown:
        conflict = comparison.verdict is Verdict.CONFLICT
        reason = "_and_".join(comparison.contradictions) if conflict else "unverified"
        _WITHHELD.labels(source, reason).inc()
        fields = {"source": source, "reason": reason, "study_instance_uid": study_instance_uid}
        if conflict:
            remember(source, "identity_conflict", reason)
            _log.warning("identity_conflict", **fields)
        else:
            _log.info("identity_unverified", **fields)
    elif comparison.name_differs:
        _NAMES.labels(source).inc()
        _log.info("identity_name_differs", source=source, study_instance_uid=study_instance_uid)


def report_conflict(source: str, reason: str, **fields: object) -> None:
    """Say that what a source has is withheld, since it names another patient, or another study.

    Args:
        reason: in which way, in a word.
        fields: what else the log line says.
    """
    _WITHHELD.labels(source, reason).inc()
    remember(source, "identity_conflict", reason)
    _log.warning("identity_conflict", source=source, reason=reason, **fields)


def report_unresolved(source: str, unresolved: IdentityUnresolved, **fields: object) -> None:
    """Say that what a source has is withheld, since its ID leads to no one local ID.

    Args:
        fields: what the log line says besides source and reason.
    """
    reason = unresolved.reason
    _WITHHELD.labels(source, reason).inc()
    remember(source, "identity_unresolved", reason)
    _log.warning("identity_unresolved", source=source, reason=reason, **fields)
