"""What was counted, what was found wrong, and the table of both."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

_MOST_SHOWN: Final = 40
_MOST_DETAILS: Final = 5
_MOST_KEPT: Final = 20_000


@dataclass
class Report:
    """Filled during a run; it holds no more the longer the run is."""

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind, and status or other outcome."""
    faults: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    """Warnings and errors in the proxy's log, by event."""
    instances: int = 0
    bytes: int = 0
    deliveries: Counter[str] = field(default_factory=Counter)
    """Associations on which workstations received, by how they ended."""
    _query_seconds: list[float] = field(default_factory=list)
    _queries: int = 0

    def violation(self, text: str, detail: str = "") -> None:
        """Note something that must not happen; equal texts are counted, not repeated.

        What *detail* says helps to find it in the proxy's log, and is printed at once.
        """
        if self.violations[text] < _MOST_DETAILS:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            print(f"{now} VIOLATION: {text} {detail}", file=sys.stderr, flush=True)
        if text in self.violations or len(self.violations) < _MOST_SHOWN:
            self.violations[text] += 1
        else:
            self.violations["further ones"] += 1

    def query_took(self, seconds: float) -> None:
        self._queries += 1
        if len(self._query_seconds) < _MOST_KEPT:
            self._query_seconds.append(seconds)
        else:
            # In turn over the oldest: what stays is the latest many.
            self._query_seconds[self._queries % _MOST_KEPT] = seconds

    @property
    def passed(self) -> bool:
        return not self.violations

    def table(self) -> str:
        """Return everything, for people."""
        lines: list[str] = []
        _section(lines, "Operations", self._operation_rows())
        figures = {
            "instances verified": f"{self.instances:,}",
            "bytes verified": f"{self.bytes / 1e6:,.0f} MB",
            "associations of deliveries": ", ".join(
                f"{outcome} {count:,}" for outcome, count in sorted(self.deliveries.items())
            ),
            "query time p50 / p95": " / ".join(
                f"{1000 * percentile(self._query_seconds, share):.0f} ms" for share in (0.5, 0.95)
            ),
            **self.figures,
        }
        _section(lines, "Figures", list(figures.items()))
        _section(lines, "Faults injected", _counted(self.faults))
        _section(lines, "Warnings and errors logged", _counted(self.events))
        if self.violations:
            _section(lines, "VIOLATIONS", _counted(self.violations))
        lines.append("FAILED" if self.violations else "passed")
        return "\n".join(lines)

    def _operation_rows(self) -> list[tuple[str, str]]:
        kinds: dict[str, list[str]] = {}
        for (kind, outcome), count in sorted(self.operations.items()):
            kinds.setdefault(kind, []).append(f"{outcome} {count:,}")
        return [(kind, ", ".join(outcomes)) for kind, outcomes in kinds.items()]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that *share* of *values* do not exceed; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _counted(counts: Counter[str]) -> list[tuple[str, str]]:
    return [(name, f"{count:,}") for name, count in sorted(counts.items())]


def _section(lines: list[str], title: str, rows: Sequence[tuple[str, str]]) -> None:
    lines.append(title)
    width = max((len(name) for name, _ in rows), default=0)
    lines.extend(f"  {name:<{width}}  {value}" for name, value in rows)
    if not rows:
        lines.append("  none")
    lines.append("")
