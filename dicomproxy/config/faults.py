"""What is wrong with a configuration file, in words for the person who wrote it.

Rule kept: the value of a key that the model does not know is never shown, since
it may be a password written under the wrong name, nor is any text with an @.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

_TYPE_WORDS: Final = {dict: "a mapping", list: "a list", type(None): "nothing"}

YamlPath = tuple[str | int, ...]
"""Where a node is: keys and list positions from the top."""

_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LONGEST_SHOWN: Final = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to correct; ``line`` and ``column`` count from 1, 0 where there is no line."""

    file: str
    line: int
    column: int
    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        path = f"{self.path}: " if self.path else ""
        return f"{place}: {path}found {self.found}, expected {self.expected}"


class ConfigError(Exception):
    """The configuration cannot be used; *faults* lists everything wrong, in file order."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = sorted(faults, key=lambda fault: (fault.line, fault.column, fault.path))
        super().__init__("\n".join(map(str, self.faults)))


def show_path(path: YamlPath) -> str:
    """Write a path as ``sources[1].port``; the top of the file is the empty string."""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        else:
            shown += f"{'.' if shown else ''}{show_key(step)}"
    return shown


def show_key(key: str) -> str:
    """Write a key as it stands, or quoted and cut where it is no plain word."""
    return key if _PLAIN_KEY.fullmatch(key) else show_text(key)


def show_text(text: str) -> str:
    """Quote a value: one line, control characters escaped, cut at 60 characters."""
    if len(text) > _LONGEST_SHOWN:
        text = text[:_LONGEST_SHOWN] + "..."
    return repr(text)


def show_value(value: object) -> str:
    """Describe what stands in the file: a scalar as it is written, anything else by its kind."""
    if isinstance(value, str) and "@" in value:
        # No value of ours has one, but https://user:password@host does.
        return "text with an @ (not shown, it may hold a password)"
    return _TYPE_WORDS.get(type(value)) or show_text(str(value))


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that *word* most likely stands for, if there is one."""
    by_folded = {_folded(candidate): candidate for candidate in known}
    matches = get_close_matches(_folded(word), by_folded, n=1, cutoff=0.7)
    return by_folded[matches[0]] if matches else None


def _folded(word: str) -> str:
    # Cut first: comparing is quadratic, and no key of ours is this long.
    return word[:_LONGEST_SHOWN].lower().replace("-", "").replace("_", "")
