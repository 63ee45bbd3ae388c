"""Counts and final statuses, by table and by property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.ports import Delivered, RetrieveProgress
from dicomproxy.retrieval.tally import Counts, Part, Tally, final_status, is_failure


@pytest.mark.parametrize(
    ("counts", "failure", "cancelled", "status"),
    [
        (Counts(), None, False, 0x0000),  # zero matches
        (Counts(completed=3), None, False, 0x0000),
        (Counts(completed=2, failed=1), None, False, 0xB000),
        (Counts(completed=2, warning=1), None, False, 0xB000),
        (Counts(warning=3), None, False, 0xB000),  # all warned
        (Counts(warning=1, failed=1), None, False, 0xB000),
        (Counts(failed=3), None, False, 0xA702),
        (Counts(failed=3), 0xA801, False, 0xA801),
        (Counts(), 0xA701, False, 0xA701),
        (Counts(completed=3), 0xA701, False, 0xB000),  # something failed uncounted
        (Counts(completed=3), None, True, 0xFE00),
        (Counts(failed=3), 0xA702, True, 0xFE00),
    ],
)
def test_final_status(counts: Counts, failure: int | None, cancelled: bool, status: int) -> None:
    """The status follows from the counts as PS3.4 C.4.2.1.5 has it."""
    assert final_status(counts, failure, cancelled=cancelled) == status


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (0x0000, False),
        (0xB000, False),
        (0xFE00, False),
        (0xFF00, False),
        (0xA701, True),
        (0xA801, True),
        (0xA900, True),
        (0x0122, True),
        (0xC123, True),
    ],
)
def test_which_statuses_are_failures(status: int, failure: bool) -> None:
    """Success, Pending, Cancel and Warning are none."""
    assert is_failure(status) is failure


@given(
    st.lists(st.tuples(st.sampled_from(Delivered), st.integers(0, 5)), max_size=30),
    st.integers(0, 40),
)
def test_counts_always_add_up(outcomes: list[tuple[Delivered, int]], more: int) -> None:
    """Done and remaining are what was expected, and each failed UID is listed once."""
    part = Part()
    total = len(outcomes) + more
    part.expect(total)
    for outcome, number in outcomes:
        part.add(outcome, f"1.{number}")
        assert part.done + part.remaining == total
    failed = {f"1.{number}" for outcome, number in outcomes if outcome is Delivered.FAILED}
    assert set(part.failed_sop_instance_uids) == failed
    tally = Tally([part])
    assert final_status(tally.counts) in (0x0000, 0xB000, 0xA702)
    part.fail_remaining()
    assert (part.remaining, part.done) == (0, total)


@given(st.lists(st.integers(0, 60_000), min_size=1, max_size=5))
def test_counts_never_exceed_what_a_us_holds(numbers: list[int]) -> None:
    """Parts add up, to at most 65,535."""
    tally = Tally([Part(completed=number, failed=number) for number in numbers])
    assert tally.counts.completed == tally.counts.failed == min(65_535, sum(numbers))


def test_local_part_is_merged_with_ours() -> None:
    """What the local PACS reports of its own part adds to ours."""
    tally = Tally()
    relayed, ours = tally.part(), tally.part()
    ours.expect(3)
    ours.add(Delivered.COMPLETED, "1.1")
    ours.add(Delivered.FAILED, "1.2")
    relayed.follow(RetrieveProgress(remaining=4, completed=1))
    assert tally.counts == Counts(remaining=5, completed=2, failed=1)
    relayed.follow(
        RetrieveProgress(
            completed=3,
            failed=2,
            final=True,
            status=0xB000,
            failed_sop_instance_uids=("1.8", "1.9"),
        )
    )
    assert tally.counts == Counts(remaining=1, completed=4, failed=3)
    assert tally.failed_sop_instance_uids == ("1.8", "1.9", "1.2")
    assert tally.failure is None


@pytest.mark.parametrize(
    ("final", "counts", "failure"),
    [
        (RetrieveProgress(final=True, status=0), (0, 3, 0), None),
        (RetrieveProgress(final=True, status=0xA702), (0, 1, 0), 0xA702),
        (RetrieveProgress(final=True, completed=3, status=0), (0, 3, 0), None),
        (RetrieveProgress(final=True, status=0xFE00), (2, 1, 0), None),
    ],
)
def test_final_response_without_counts(
    final: RetrieveProgress, counts: tuple[int, int, int], failure: int | None
) -> None:
    """Where the final response counts nothing, the last Pending one stands."""
    part = Part()
    part.follow(RetrieveProgress(remaining=2, completed=1))
    part.follow(final)
    assert (part.remaining, part.completed, part.failed) == counts
    assert part.failure == failure


def test_forgiven_failures_leave_count_and_list() -> None:
    """A failure that another part makes good is taken back, others stay."""
    part = Part()
    part.fail(["1.1", "1.2", "1.2"])
    part.forgive(["1.2", "1.3"])
    assert part.failed == 1
    assert list(part.failed_sop_instance_uids) == ["1.1"]


@pytest.mark.parametrize(
    ("one", "other", "left"),
    [
        ((2, 1, 0), (3, 0, 0), (0, 0, 0)),
        ((2, 1, 0), (1, 0, 0), (1, 1, 0)),
        ((0, 3, 0), (2, 0, 1), (0, 0, 0)),
        ((1, 1, 1), (2, 0, 0), (0, 1, 0)),
        ((3, 0, 0), (2, 1, 0), (0, 0, 0)),
        ((0, 0, 0), (3, 1, 0), (0, 0, 0)),
    ],
)
def test_what_two_parts_may_both_have_delivered_counts_once(
    one: tuple[int, int, int], other: tuple[int, int, int], left: tuple[int, int, int]
) -> None:
    """(completed, failed, warning): what the second did is taken from the first."""
    first, second = (
        Part(completed=completed, failed=failed, warning=warning)
        for completed, failed, warning in (one, other)
    )
    first.overlap(second)
    assert (first.completed, first.failed, first.warning) == left
