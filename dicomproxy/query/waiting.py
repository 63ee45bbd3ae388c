"""Rows of one source between its answering and their being made local; bounded.

Rule kept: all that waits is taken together, since what rows have in common then
costs once; nothing waits for others to join it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from dicomproxy.dataset.identifier import Identifier

_MOST: Final = 100

Row = tuple[Identifier, str]
"""An answer, and the study that was asked about, if it was one."""


class Waiting:
    """A queue between two tasks. Whoever puts waits while it is full."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        self._stopped = False

    def __len__(self) -> int:
        return len(self._rows)

    async def put(self, row: Identifier, study: str) -> bool:
        """Add a row; whether more are wanted."""
        while len(self._rows) >= _MOST and not self._stopped:
            self._room.clear()
            await self._room.wait()
        if self._stopped:
            return False
        self._rows.append((row, study))
        self._filled.set()
        return True

    async def take(self) -> list[Row]:
        """Return all that waits, once something does; nothing at the end."""
        while not self._rows and not self._ended:
            self._filled.clear()
            await self._filled.wait()
        rows = list(self._rows)
        self._rows.clear()
        self._room.set()
        return rows

    def end(self) -> None:
        """Say that nothing more comes."""
        self._ended = True
        self._filled.set()

    def stop(self) -> None:
        """Say that nothing more is wanted."""
        self._stopped = True
        self._room.set()
