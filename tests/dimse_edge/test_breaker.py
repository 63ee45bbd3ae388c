"""The breaker, step by step against a clock that stands still unless told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dimse.breaker import Breaker, BreakerState

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
PAUSE = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def play(steps: str) -> tuple[list[bool], Breaker, list[BreakerState]]:
    """Play *steps* and return what was allowed, the breaker, and its changes.

    f failure, s success, i inconclusive, a ask, p ask as a probe, W wait out
    the pause, w wait just short of it.
    """
    clock = Clock()
    changes: list[BreakerState] = []
    allowed: list[bool] = []
    breaker = Breaker(failures=3, pause_seconds=PAUSE, clock=clock, on_change=changes.append)
    for step in steps:
        match step:
            case "f":
                breaker.failure()
            case "s":
                breaker.success()
            case "i":
                breaker.inconclusive()
            case "a":
                allowed.append(breaker.allow())
            case "p":
                allowed.append(breaker.allow(probe=True))
            case "W":
                clock.now += PAUSE
            case "w":
                clock.now += PAUSE - 0.001
    return allowed, breaker, changes


@pytest.mark.parametrize(
    ("steps", "allowed", "state", "changes"),
    [
        pytest.param("aaa", [1, 1, 1], CLOSED, [], id="closed lets everything through"),
        pytest.param("ffa", [1], CLOSED, [], id="fewer failures than the limit"),
        pytest.param("fffa", [0], OPEN, [OPEN], id="opens at the limit"),
        pytest.param("ffsffa", [1], CLOSED, [], id="only failures in a row count"),
        pytest.param("ffififa", [0], OPEN, [OPEN], id="inconclusive is no success"),
        pytest.param("iiiia", [1], CLOSED, [], id="inconclusive is no failure"),
        pytest.param("fffwa", [0], OPEN, [OPEN], id="just short of the pause"),
        pytest.param("fffWaa", [1, 0], HALF_OPEN, [OPEN, HALF_OPEN], id="one probe at a time"),
        pytest.param("fffWap", [1, 0], HALF_OPEN, [OPEN, HALF_OPEN], id="nor a second by a person"),
        pytest.param("fffWasaa", [1, 1, 1], CLOSED, [OPEN, HALF_OPEN, CLOSED], id="probe succeeds"),
        pytest.param(
            "fffWafa", [1, 0], OPEN, [OPEN, HALF_OPEN, OPEN], id="probe fails: a new pause"
        ),
        pytest.param("fffWafwa", [1, 0], OPEN, [OPEN, HALF_OPEN, OPEN], id="the new one is whole"),
        pytest.param("fffWafWa", [1, 1], HALF_OPEN, [OPEN, HALF_OPEN, OPEN, HALF_OPEN], id="again"),
        pytest.param("fffWaia", [1, 1], HALF_OPEN, [OPEN, HALF_OPEN], id="probe given up: next"),
        pytest.param("fffp", [1], HALF_OPEN, [OPEN, HALF_OPEN], id="a person may probe at once"),
        pytest.param("fffpp", [1, 0], HALF_OPEN, [OPEN, HALF_OPEN], id="but one person only"),
        pytest.param("fffpia", [1, 0], OPEN, [OPEN, HALF_OPEN, OPEN], id="early probe given up"),
        pytest.param(
            "fffpsa", [1, 1], CLOSED, [OPEN, HALF_OPEN, CLOSED], id="early probe succeeds"
        ),
        pytest.param("ffffffWa", [1], HALF_OPEN, [OPEN, HALF_OPEN], id="late failures add nothing"),
    ],
)
def test_breaker_step_by_step(
    steps: str, allowed: list[int], state: BreakerState, changes: list[BreakerState]
) -> None:
    """What is let through, where it ends, and which changes are told, each once."""
    got, breaker, told = play(steps)
    assert (got, breaker.state, told) == ([bool(one) for one in allowed], state, changes)
    assert state.value in repr(breaker)


@given(steps=st.text("fsiapWw", max_size=40))
def test_half_open_never_has_two_probes(steps: str) -> None:
    """Whatever happens, between two answers at most one exchange passes an open breaker."""
    clock = Clock()
    breaker = Breaker(failures=3, pause_seconds=PAUSE, clock=clock)
    probing = False
    for step in steps:
        match step:
            case "a" | "p":
                was_closed = breaker.state is CLOSED
                if breaker.allow(probe=step == "p") and not was_closed:
                    assert not probing
                    probing = True
            case "f" | "s" | "i":
                {"f": breaker.failure, "s": breaker.success, "i": breaker.inconclusive}[step]()
                probing = False
            case _:
                clock.now += PAUSE if step == "W" else PAUSE / 3


def test_success_is_told_to_nobody_if_nobody_listens() -> None:
    """The listener is optional."""
    breaker = Breaker(failures=1, pause_seconds=PAUSE)
    breaker.failure()
    assert breaker.state is OPEN
    breaker.success()
    assert breaker.state is CLOSED
