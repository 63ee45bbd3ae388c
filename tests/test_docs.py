"""The operator's tables say what the program says: every log event and every metric, no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
SECURITY = (ROOT / "docs" / "security.md").read_text("utf-8")

LEVELS = {"debug", "info", "warning", "error", "critical"}
NAMED_BY_VALUE = {"association", "query", "retrieve", "foreign_log"}
"""Events whose level, or whose name, is chosen when they are logged."""


def calls() -> Iterator[ast.Call]:
    for path in sorted((ROOT / "dicomproxy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield node


def first_text(call: ast.Call) -> str:
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def logged_events() -> set[str]:
    found = set(NAMED_BY_VALUE)
    for call in calls():
        function = call.func
        if not isinstance(function, ast.Attribute) or function.attr not in LEVELS:
            continue
        if "log" in ast.unparse(function.value).lower() and first_text(call):
            found.add(first_text(call))
    return found


def levels_of_events() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for call in calls():
        function = call.func
        if isinstance(function, ast.Attribute) and function.attr in LEVELS and first_text(call):
            found.setdefault(first_text(call), set()).add(function.attr)
    return found


def declared_metrics() -> set[str]:
    found = set()
    for call in calls():
        function = ast.unparse(call.func)
        if function in ("Counter", "Gauge", "Histogram", "GaugeMetricFamily") and first_text(call):
            found.add(first_text(call))
        elif function in ("_gauge", "_labelled"):
            found.add(f"dicomproxy_{first_text(call)}")
    return found


def rows(text: str) -> Iterator[str]:
    """Yield the first cell of each row of each table."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            yield line.split("|")[1]


def test_every_log_event_is_in_the_tables_and_no_other() -> None:
    """Somebody who finds an event in a log finds it in the page."""
    _, _, section = OPERATIONS.partition("\n## Log\n")
    section = section.partition("\n## The cache\n")[0]
    shown = {name for cell in rows(section) for name in re.findall(r"`([a-z_]+)`", cell)}
    assert shown == logged_events()


def test_each_log_event_has_a_level_at_which_it_is_logged() -> None:
    """The level beside an event is one of those that the program logs it with."""
    known = levels_of_events()
    wrong = [
        (name, level)
        for names, level in re.findall(
            r"^\| (`[a-z_`, ]+`) \| ([a-z]+) \|", OPERATIONS, re.MULTILINE
        )
        for name in re.findall(r"`([a-z_]+)`", names)
        if level not in known.get(name, LEVELS)
    ]
    assert wrong == []


def test_every_metric_is_in_the_table_and_no_other() -> None:
    """Somebody who finds a metric finds its meaning."""
    _, _, section = OPERATIONS.partition("\n## Metrics\n")
    section = section.partition("\n## Log\n")[0]
    shown = {name for cell in rows(section) for name in re.findall(r"`(dicomproxy_\w+)`", cell)}
    assert shown == declared_metrics()


def test_metrics_named_in_prose_exist() -> None:
    """A metric that a page tells to watch is one that there is."""
    named = set(re.findall(r"\bdicomproxy_[a-z]\w+", OPERATIONS + SECURITY))
    assert named <= declared_metrics()
