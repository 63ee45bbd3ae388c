"""A circuit breaker: a peer that keeps failing is left alone for a while.

Pure but for the clock it is given. Closed, everything passes. After so many
failures in a row it opens: nothing passes until the pause is over. Then it is
half open: one exchange at a time is let through, and decides. A person who
waits for a study may probe before the pause is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Counts failures in a row.

    Args:
        failures: so many in a row open it.
        pause_seconds: how long it stays open before a probe.
        on_change: told of every change of state.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        pause_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[BreakerState], None] | None = None,
    ) -> None:
        self._limit = failures
        self._pause_seconds = pause_seconds
        self._clock = clock
        self._on_change = on_change
        self._in_a_row = 0
        self._opened_at = 0.0
        self._probing = False
        self._shown = BreakerState.CLOSED

    def __repr__(self) -> str:
        return f"<Breaker {self.state} failures={self._in_a_row}>"

    @property
    def state(self) -> BreakerState:
        if self._in_a_row < self._limit:
            return BreakerState.CLOSED
        if self._probing or self._clock() - self._opened_at >= self._pause_seconds:
            return BreakerState.HALF_OPEN
        return BreakerState.OPEN

    @property
    def probing(self) -> bool:
        """Whether somebody is finding out at this moment."""
        return self._probing

    def allow(self, *, probe: bool = False) -> bool:
        """Ask whether an exchange may be tried; *probe* may also try while open.

        Every exchange allowed must be followed by :meth:`success`,
        :meth:`failure` or :meth:`inconclusive`.
        """
        state = self.state
        if state is BreakerState.CLOSED:
            return True
        if self._probing:
            return False
        if state is BreakerState.HALF_OPEN or probe:
            self._probing = True
            self._tell()
            return True
        return False

    def success(self) -> None:
        """The peer answered, be it with a failure status: it is alive."""
        self._in_a_row = 0
        self._probing = False
        self._tell()

    def failure(self) -> None:
        """No connection, no association, no answer, or garbage."""
        self._in_a_row += 1
        self._probing = False
        if self._in_a_row >= self._limit:
            self._opened_at = self._clock()
        self._tell()

    def inconclusive(self) -> None:
        """The exchange was given up for reasons of our own, or the peer is merely busy."""
        self._probing = False
        self._tell()

    def _tell(self) -> None:
        state = self.state
        if state is not self._shown:
            self._shown = state
            if self._on_change is not None:
                self._on_change(state)
