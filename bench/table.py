"""What a row of the benchmark says, and how rows are shown. Pure.

A row holds the figures of all rounds, ours and the baseline's; what is shown
and compared with the aim is their medians. Figures are seconds, or bytes where
memory is measured; smaller is better everywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

_MEGABYTE: Final = 1_000_000
_HEADINGS: Final = (
    "case",
    "measure",
    "ours",
    "baseline",
    "ratio",
    "aim",
    "met",
    "n",
    "CPU s",
    "MB",
)
_LEFT: Final = 2
"""Columns that hold words; the others are set flush right."""


@dataclass(frozen=True, slots=True)
class Aim:
    """An upper bound on our figure: *factor* times the baseline, plus *plus*.

    ``Aim(text)`` alone bounds nothing: the row is there to be read.
    """

    text: str
    factor: float | None = None
    plus: float = 0.0

    def bound(self, baseline: float) -> float | None:
        """Return the largest figure that meets it."""
        return None if self.factor is None else self.factor * baseline + self.plus


def at_most(factor: float) -> Aim:
    """Our time is at most *factor* times the baseline's."""
    return Aim(f"<= {factor:g} x", factor)


def faster(times: float) -> Aim:
    """Our throughput is at least *times* the baseline's."""
    return Aim(f">= {times:g} x faster", 1 / times)


def later_by(seconds: float, text: str = "") -> Aim:
    """Ours comes at most *seconds* after the baseline's."""
    return Aim(text or f"<= + {seconds * 1000:g} ms", 1.0, seconds)


def under_seconds(seconds: float) -> Aim:
    """Ours takes at most *seconds*, whatever the baseline."""
    return Aim(f"<= {seconds * 1000:g} ms", 0.0, seconds)


def under_bytes(count: int) -> Aim:
    """Ours takes at most *count* bytes, whatever the baseline."""
    return Aim(f"<= {count / _MEGABYTE:g} MB", 0.0, count)


NO_AIM: Final = Aim("-")


@dataclass(slots=True)
class Row:
    """One comparison.

    Args:
        case: what is done.
        measure: what of it is measured.
        baseline_name: beside what.
        ours: one figure a round.
        baseline: likewise.
        cpu_seconds: of the proxy, one a round.
        peak_bytes: the proxy's largest resident memory so far.
    """

    name: str
    case: str
    measure: str
    baseline_name: str
    aim: Aim
    unit: Literal["s", "B"] = "s"
    ours: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.ours)

    @property
    def baseline_median(self) -> float | None:
        return statistics.median(self.baseline) if self.baseline else None

    @property
    def ratio(self) -> float | None:
        """Ours over the baseline's; None where there is none."""
        baseline = self.baseline_median
        return self.median / baseline if baseline else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where there is none."""
        bound = self.aim.bound(self.baseline_median or 0.0)
        return None if bound is None else self.median <= bound

    def as_json(self) -> dict[str, Any]:
        """Return it for the results file: every round, in seconds or bytes."""
        return {
            "name": self.name,
            "case": self.case,
            "measure": self.measure,
            "baseline_name": self.baseline_name,
            "unit": self.unit,
            "rounds": len(self.ours),
            "ours": self.ours,
            "baseline": self.baseline,
            "median": self.median,
            "baseline_median": self.baseline_median,
            "ratio": self.ratio,
            "aim": self.aim.text,
            "met": self.met,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that came to no figure: a name, and why."""

    name: str
    reason: str
    skipped: bool = False


def seconds(value: float) -> str:
    """Write a duration with three digits that count: ``4.1 ms``, ``380 ms``, ``9.82 s``."""
    if value < 0.01:
        return f"{value * 1000:.1f} ms"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 99.5 else f"{value:.0f} s"


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value / _MEGABYTE:.0f} MB" if unit == "B" else seconds(value)


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    baseline = _figure(row.baseline_median, row.unit)
    return (
        row.case,
        row.measure,
        _figure(row.median, row.unit),
        f"{baseline} {row.baseline_name}".strip(),
        ratio,
        row.aim.text,
        {True: "yes", False: "NO", None: ""}[row.met],
        str(len(row.ours)),
        f"{statistics.median(row.cpu_seconds):.2f}" if row.cpu_seconds else "",
        f"{row.peak_bytes / _MEGABYTE:.0f}" if row.peak_bytes else "",
    )


def render(rows: Sequence[Row], failures: Sequence[Failure] = ()) -> str:
    """Return the table as plain text, a line a row; failures stand below it."""
    body = [_cells(row) for row in rows]
    widths = [max(len(line[at]) for line in [_HEADINGS, *body]) for at in range(len(_HEADINGS))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if at < _LEFT else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    lines = [line(_HEADINGS), line(["-" * width for width in widths]), *map(line, body)]
    lines += [
        f"{'skipped' if one.skipped else 'FAILED'}: {one.name}: {one.reason}" for one in failures
    ]
    return "\n".join(lines)
