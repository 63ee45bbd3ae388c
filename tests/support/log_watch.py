"""The stream that tests log to: it remembers what was written, even where a test reads stderr."""

from __future__ import annotations

import json
import sys
from typing import Any


class LogWatch:
    """Passes lines on to the present stderr, and keeps them until the test has ended."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return False

    @property
    def text(self) -> str:
        return "".join(self.written)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Every line logged so far, decoded."""
        return [json.loads(line) for line in self.text.splitlines()]

    def named(self, event: str) -> list[dict[str, Any]]:
        """Every line logged so far under one event name."""
        return [entry for entry in self.entries if entry["event"] == event]
