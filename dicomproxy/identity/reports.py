"""What is said of an answer or an instance that is kept from a workstation, or looks odd.

Log and metric, never a value. Whoever withholds something says so here, so that
it reads the same wherever it is found out.
"""

from __future__ import annotations

from prometheus_client import Counter

from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.safety import Comparison, Verdict
from dicomproxy.logs import get_logger

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
            _log.warning("identity_conflict", **fields)
        else:
            _log.info("identity_unverified", **fields)
    elif comparison.name_differs:
        _NAMES.labels(source).inc()
        _log.info("identity_name_differs", source=source, study_instance_uid=study_instance_uid)


def report_unresolved(
    source: str, unresolved: IdentityUnresolved, *, study_instance_uid: str = ""
) -> None:
    """Say that what a source has is withheld, since its ID leads to no one local ID."""
    _WITHHELD.labels(source, unresolved.reason).inc()
    _log.warning(
        "identity_unresolved",
        source=source,
        reason=unresolved.reason,
        study_instance_uid=study_instance_uid,
    )
