"""Rows of the benchmark: medians, aims, and the table they make."""

from __future__ import annotations

import pytest

from bench.table import (
    NO_AIM,
    Aim,
    Failure,
    Row,
    at_most,
    faster,
    later_by,
    render,
    seconds,
    under_bytes,
    under_seconds,
)


def a_row(aim: Aim, ours: list[float], baseline: list[float], unit: str = "s") -> Row:
    made = Row("name", "a case", "total", "direct", aim, "B" if unit == "B" else "s")
    made.ours, made.baseline = ours, baseline
    return made


@pytest.mark.parametrize(
    ("aim", "ours", "baseline", "met"),
    [
        (at_most(1.5), 1.5, 1.0, True),
        (at_most(1.5), 1.51, 1.0, False),
        (faster(5), 0.2, 1.0, True),
        (faster(5), 0.21, 1.0, False),
        (later_by(0.02), 0.025, 0.005, True),
        (later_by(0.02), 0.026, 0.005, False),
        (under_seconds(0.01), 0.009, 5.0, True),
        (under_seconds(0.01), 0.011, 5.0, False),
        (NO_AIM, 100.0, 1.0, None),
    ],
)
def test_an_aim_bounds_our_figure_by_the_baseline_s(
    aim: Aim, ours: float, baseline: float, met: bool | None
) -> None:
    """Met at the bound, missed above it, and never met where there is none."""
    assert a_row(aim, [ours], [baseline]).met is met


def test_an_aim_for_memory_needs_no_baseline() -> None:
    """Bytes are compared with a fixed bound."""
    assert a_row(under_bytes(150_000_000), [149e6], [], "B").met is True
    assert a_row(under_bytes(150_000_000), [151e6], [], "B").met is False


def test_one_slow_round_does_not_decide() -> None:
    """Medians are compared, of ours and of the baseline's alike."""
    row = a_row(at_most(1.5), [1.0, 9.0, 1.1], [1.0, 1.0, 0.1])

    assert (row.median, row.baseline_median) == (1.1, 1.0)
    assert row.ratio == pytest.approx(1.1)
    assert row.met is True


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0041, "4.1 ms"),
        (0.38, "380 ms"),
        (0.9994, "999 ms"),
        (1.0, "1.00 s"),
        (9.824, "9.82 s"),
        (120.4, "120 s"),
    ],
)
def test_durations_show_three_digits(value: float, text: str) -> None:
    """Short ones in milliseconds, long ones in seconds."""
    assert seconds(value) == text


def test_the_table_is_aligned_and_names_what_failed() -> None:
    """Every column begins and ends where its heading does; failures follow in words."""
    slow = a_row(at_most(1), [2.0], [1.0])
    slow.cpu_seconds, slow.peak_bytes = [0.5], 113_000_000
    memory = a_row(under_bytes(150_000_000), [112e6], [], "B")
    text = render(
        [slow, memory],
        [Failure("far-ct", "it broke"), Failure("find", "no Orthanc", skipped=True)],
    )

    lines = text.splitlines()
    assert lines[0].split()[:3] == ["case", "measure", "ours"]
    cells = "a case total 2.00 s 1.00 s direct 2.00 <= 1 x NO 1 0.50 113"
    assert lines[2].split() == cells.split()
    assert "112 MB" in lines[3]
    assert "yes" in lines[3]
    end = lines[0].index("ours") + len("ours")
    assert lines[2][:end].endswith("2.00 s")
    assert lines[3][:end].endswith("112 MB")
    assert lines[4:] == ["FAILED: far-ct: it broke", "skipped: find: no Orthanc"]


def test_results_keep_every_round() -> None:
    """The file holds what the table leaves out, and its ratio is the table's."""
    kept = a_row(at_most(2), [1.0, 3.0, 2.0], [1.0, 1.0, 1.0]).as_json()

    assert kept["ours"] == [1.0, 3.0, 2.0]
    assert (kept["median"], kept["ratio"], kept["met"], kept["rounds"]) == (2.0, 2.0, True, 3)
