"""How many orders hide a distance, and what they look like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.levels import Level
from dicomproxy.retrieval.batches import (
    FIRST_UIDS,
    MAX_UIDS,
    early_length,
    list_length,
    orders_for_missing,
)
from dicomproxy.retrieval.pace import FAR_SECONDS, Pace, orders_at_once


@pytest.mark.parametrize(
    ("round_trip", "per_instance", "ceiling", "orders"),
    [
        (0.0, 0.001, 8, 1),  # never measured
        (0.0019, 0.0001, 8, 1),  # in the house
        (FAR_SECONDS, 0.001, 8, 3),
        (0.030, 0.001, 8, 8),
        (0.030, 0.001, 3, 3),
        (0.030, 0.001, 1, 1),
        (0.030, 0.010, 8, 4),  # large instances hide part of it themselves
        (0.030, 1.0, 8, 2),
        (0.030, 0.0, 100, 100),
    ],
)
def test_orders_at_once(round_trip: float, per_instance: float, ceiling: int, orders: int) -> None:
    """One near, as many as keep an instance under way far, never above the ceiling."""
    assert orders_at_once(round_trip, per_instance, ceiling) == orders


def test_pace_follows_what_instances_take() -> None:
    """Neither round trips nor what runs beside it are counted; a few instances say nothing."""
    pace = Pace()
    pace.observe(4, 400.0, 0.03)
    assert pace.seconds_per_instance == 0.001
    for _ in range(40):
        pace.observe(100, 3 * 0.03 + 100 * 0.05, 0.03)
    assert pace.seconds_per_instance == pytest.approx(0.02, rel=0.01)
    for _ in range(40):
        pace.observe(100, 3 * 0.03 + 100 * 0.05, 0.03, at_once=4)
    assert pace.seconds_per_instance == pytest.approx(0.005, rel=0.01)
    for _ in range(80):
        pace.observe(100, 1.0, 0.03)  # faster than its round trip allows: it pipelines
    assert 0 < pace.seconds_per_instance < 0.001


SERIES = st.lists(st.integers(1, 2 * MAX_UIDS + 30), min_size=1, max_size=6)


@given(sizes=SERIES, at_once=st.integers(1, 16))
def test_lists_ask_for_everything_once(sizes: list[int], at_once: int) -> None:
    """Each instance is on exactly one list, each list in one series and of legal length."""
    listed = {
        str(series): {f"{series}.{number}": "CT" for number in range(size)}
        for series, size in enumerate(sizes)
    }
    missing = {series: list(uids) for series, uids in listed.items()}
    orders = orders_for_missing("0", missing, listed, spread_over=at_once)
    assert {order.level for order in orders} == {Level.IMAGE}
    asked = [uid for order in orders for uid in order.sop_instance_uids]
    assert sorted(asked) == sorted(uid for uids in missing.values() for uid in uids)
    for order in orders:
        assert 1 <= len(order.sop_instance_uids) <= MAX_UIDS
        [series] = order.series_instance_uids
        assert set(order.sop_instance_uids) <= set(listed[series])
        assert order.sop_classes == ("CT",)


def test_one_series_is_spread_evenly() -> None:
    """Three associations get a third each, so that they end together."""
    uids = {f"1.{number}": "CT" for number in range(300)}
    orders = orders_for_missing("0", {"1": list(uids)}, {"1": uids}, spread_over=3)
    assert [len(order.sop_instance_uids) for order in orders] == [100, 100, 100]


@pytest.mark.parametrize(
    ("unclaimed", "outstanding", "at_once", "length"),
    [
        (300, 0, 3, 100),
        (300, 0, 7, 43),
        (1000, 0, 7, 72),  # two turns each
        (496, 6 * 4, 7, 75),  # the second turn begins
        (90, 2 * 91, 3, 91),  # one has done a short list, the others are busy with long ones
        (12, 2 * 60, 3, 44),  # all that is left
        (5, 0, 7, 1),
        (1, 0, 1, 1),
        (100, 0, 1, 100),
        (101, 0, 1, 51),
        (0, 50, 4, 13),
    ],
)
def test_list_length(unclaimed: int, outstanding: int, at_once: int, length: int) -> None:
    """Orders end together, in as few lists as the longest list allows."""
    assert list_length(unclaimed, outstanding, at_once) == length


@given(st.integers(0, 5000), st.integers(0, 2000), st.integers(1, 20))
def test_list_length_is_legal(unclaimed: int, outstanding: int, at_once: int) -> None:
    """Never empty, never longer than a list may be, never so short that it takes a turn more."""
    length = list_length(unclaimed, outstanding, at_once)
    assert 1 <= length <= MAX_UIDS
    share = -(-(unclaimed + outstanding) // at_once)
    assert length * -(-share // MAX_UIDS) >= share


@pytest.mark.parametrize(
    ("listed", "running", "at_once", "length"),
    [
        (0, 0, 3, 0),
        (1, 0, 3, 1),
        (50, 0, 3, FIRST_UIDS),
        (50, 1, 3, 0),
        (299, 1, 3, 0),
        (300, 1, 3, MAX_UIDS),
        (300, 1, 7, 0),
    ],
)
def test_early_length(listed: int, running: int, at_once: int, length: int) -> None:
    """While a study is listed a short list is sent off, and full ones if there is plenty."""
    assert early_length(listed, running, at_once) == length


def test_whoever_has_done_a_short_list_gets_the_rest() -> None:
    """Those that begin now are given what it takes until all end, and it a little less."""
    uids = {f"1.{number}": "CT" for number in range(295)}
    orders = orders_for_missing("0", {"1": list(uids)}, {"1": uids}, spread_over=3, outstanding=5)
    assert [len(order.sop_instance_uids) for order in orders] == [100, 100, 95]


def test_small_series_are_not_split() -> None:
    """Where there are series enough for all associations, each is one list."""
    listed = {str(s): {f"{s}.{n}": "" for n in range(10)} for s in range(8)}
    missing = {series: list(uids) for series, uids in listed.items()}
    assert len(orders_for_missing("0", missing, listed, spread_over=4)) == 8


def test_an_archive_without_uid_lists_is_asked_as_it_can_be() -> None:
    """Below its finest level nothing is asked for, however far it is."""
    listed = {"1": {"1.1": "", "1.2": ""}, "2": {"2.1": ""}}
    orders = orders_for_missing(
        "0", {"1": ["1.1", "1.2"]}, listed, finest=Level.SERIES, spread_over=4
    )
    assert [(order.level, order.series_instance_uids) for order in orders] == [
        (Level.SERIES, ("1",))
    ]


def test_what_was_refused_is_remembered_for_an_hour() -> None:
    """A refusal for the moment is not held against an archive for ever."""
    pace = Pace()
    assert pace.finest(0.0) is Level.IMAGE
    pace.refuses_below(Level.SERIES, 100.0)
    assert pace.finest(3699.0) is Level.SERIES
    assert pace.finest(3701.0) is Level.IMAGE
