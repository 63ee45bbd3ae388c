"""Catches file and database work done on an event loop's thread by our own code.

An audit hook cannot be removed again, so it is installed once and switched on
and off. ``cli`` and ``config`` may read files when they like: they run before
the loop has anything to serve. Imports are not counted either.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import dicomproxy

BLOCKING_EVENTS = frozenset(
    {
        "open",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.truncate",
        "sqlite3.connect",
    }
)

_OWN_CODE = Path(dicomproxy.__file__).resolve().parent
_EXEMPT = tuple(str(_OWN_CODE / room) + "/" for room in ("cli", "config"))
_OWN_PREFIX = str(_OWN_CODE) + "/"


class LoopGuard:
    """Records what blocking work our code did on a running loop's thread."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.enabled = False
        self._installed = False

    def install(self) -> None:
        if not self._installed:
            self._installed = True
            sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.enabled or event not in BLOCKING_EVENTS:
            return
        if asyncio._get_running_loop() is None:
            return
        if event == "open" and isinstance(args[0], int):
            return  # wraps a descriptor that is open already
        where = _own_frame(sys._getframe(1))
        if where is not None:
            self.violations.append(f"{event} on the loop's thread, from {where}")


def _own_frame(frame: FrameType | None) -> str | None:
    """Return the innermost frame of ours that is answerable for the event."""
    found = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib"):
            return None
        if found is None and name.startswith(_OWN_PREFIX) and not name.startswith(_EXEMPT):
            found = f"{name[len(_OWN_PREFIX) :]}:{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return found


GUARD = LoopGuard()
