"""The soak itself: a short one passes, and what it counts and judges is right."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from soak.content import LOCAL, PATIENT_MARK, Plan
from soak.faults import fill
from soak.report import Report, percentile
from soak.watch import growth

TREE = Path(__file__).parents[2]
SOURCES = ["north", "south", "east"]


def test_same_seed_makes_the_same_plan() -> None:
    """Processes share a seed and nothing else, and mean the same bytes by the same UID."""
    one, other, different = Plan(1, SOURCES), Plan(1, SOURCES), Plan(2, SOURCES)
    assert one.studies == other.studies
    assert one.studies != different.studies
    uid = one.instances(one.studies)[0]
    assert one.data(uid) == other.data(uid)


def test_plan_gives_every_archive_studies_and_every_patient_a_local_one() -> None:
    """Nobody runs empty, and some studies have a second holder."""
    plan = Plan(1, SOURCES)
    assert all(plan.held_by(name) for name in (LOCAL, *SOURCES))
    for studies in plan.patients.values():
        assert sum(study.holders == (LOCAL,) for study in studies) == 1
    assert any(len(study.holders) == 2 for study in plan.studies)


def test_check_tells_instances_apart() -> None:
    """Each instance has content of its own, with a patient value that a log can be searched for."""
    plan = Plan(1, SOURCES)
    uids = plan.instances(plan.studies[:4])
    checks = [plan.check(uid) for uid in uids]
    assert len(set(checks)) == len(uids)
    assert PATIENT_MARK.encode("ascii") in plan.data(uids[0])
    assert plan.check("1.2.3") is None


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([7.0], 0.95, 7.0), ([3.0, 1.0, 2.0], 0.5, 2.0), (range(1, 101), 0.95, 95)],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    """The smallest value that so many do not exceed."""
    assert percentile(list(values), share) == expected


@pytest.mark.parametrize(
    ("samples", "grown"),
    [
        ([], 0),
        ([100.0] * 100, 0),
        ([*range(50), *[50.0] * 50], 0),  # warming up is no growth
        ([*[50.0] * 80, 500.0, *[50.0] * 19], 0),  # nor is a peak
        (list(range(100)), 25),
    ],
    ids=["none", "flat", "warming up", "a peak", "a leak"],
)
def test_growth(samples: list[float], grown: float) -> None:
    """Only a level that rises in the second half counts."""
    assert growth(samples)[0] == grown


def test_any_violation_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The table names it with how often it was seen, and its details are printed at once."""
    report = Report()
    report.operations["query", "0000"] += 2
    assert report.passed
    assert report.table().endswith("passed")
    report.violation("a row came twice", "READING1")
    report.violation("a row came twice", "READING2")
    assert not report.passed
    assert "a row came twice  2" in report.table()
    assert report.table().endswith("FAILED")
    assert "READING2" in capsys.readouterr().err


def test_violations_of_many_kinds_are_counted_and_not_kept() -> None:
    """A run of hours that goes wrong in many ways ends with a table all the same."""
    report = Report()
    for number in range(1000):
        report.violation(f"kind {number}")
    assert len(report.violations) < 50
    assert report.violations.total() == 1000


@pytest.mark.slow
def test_fill_leaves_no_byte(tmp_path: Path) -> None:
    """After it, one more byte finds no room; with the filler gone there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "soak", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        fill(disk / "filler")
        with pytest.raises(OSError) as caught:
            (disk / "one").write_bytes(b"x")
        assert caught.value.errno == errno.ENOSPC
        (disk / "filler").unlink()
        (disk / "one").write_bytes(b"x")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
