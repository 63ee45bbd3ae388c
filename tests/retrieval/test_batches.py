"""From what is missing to orders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.levels import Level
from dicomproxy.retrieval.batches import MAX_UIDS, orders_for_missing, orders_for_selection
from dicomproxy.retrieval.selection import Selection, selection_of

LISTED = {"1": {"1.1": "CT", "1.2": "CT"}, "2": {"2.1": "SR"}, "3": {}}


@pytest.mark.parametrize(
    ("missing", "finest", "orders"),
    [
        ({}, Level.IMAGE, []),
        ({"1": []}, Level.IMAGE, []),
        ({"1": ["1.1", "1.2"], "2": ["2.1"]}, Level.IMAGE, [(Level.STUDY, (), ())]),
        ({"1": ["1.1", "1.2"]}, Level.IMAGE, [(Level.SERIES, ("1",), ())]),
        ({"1": ["1.2"]}, Level.IMAGE, [(Level.IMAGE, ("1",), ("1.2",))]),
        (
            {"1": ["1.2"], "2": ["2.1"]},
            Level.IMAGE,
            [(Level.IMAGE, ("1",), ("1.2",)), (Level.SERIES, ("2",), ())],
        ),
        ({"1": ["1.2"]}, Level.SERIES, [(Level.SERIES, ("1",), ())]),
        ({"1": ["1.2"]}, Level.STUDY, [(Level.STUDY, (), ())]),
        ({"9": ["9.1"]}, Level.IMAGE, [(Level.IMAGE, ("9",), ("9.1",))]),
    ],
)
def test_orders_for_missing(
    missing: dict[str, list[str]],
    finest: Level,
    orders: list[tuple[Level, tuple[str, ...], tuple[str, ...]]],
) -> None:
    """The study if all is missing, a whole series as such, else instances by name."""
    made = orders_for_missing("0", missing, LISTED, finest=finest)
    assert [
        (order.level, order.series_instance_uids, order.sop_instance_uids) for order in made
    ] == orders
    assert all(order.study_instance_uids == ("0",) for order in made)


def test_orders_name_the_classes_to_expect() -> None:
    """Each order carries the SOP Classes of what it asks for, once each."""
    study, series = (
        orders_for_missing("0", {s: list(u) for s, u in LISTED.items()}, LISTED)[0],
        orders_for_missing("0", {"1": ["1.1", "1.2"]}, LISTED)[0],
    )
    assert study.sop_classes == ("CT", "SR")
    assert series.sop_classes == ("CT",)


LISTINGS = st.dictionaries(
    st.integers(1, 6), st.integers(0, 2 * MAX_UIDS + 5), min_size=1, max_size=5
).map(
    lambda sizes: {
        str(series): {f"{series}.{n}": "" for n in range(size)} for series, size in sizes.items()
    }
)


@given(LISTINGS, st.data())
def test_orders_cover_exactly_what_is_missing(
    listed: dict[str, dict[str, str]], data: st.DataObject
) -> None:
    """Of all that is listed, every missing instance is asked for once, and no other one."""
    everything = [(series, uid) for series, uids in listed.items() for uid in uids]
    chosen = data.draw(st.sets(st.sampled_from(everything))) if everything else set()
    whole = data.draw(st.sets(st.sampled_from(sorted(listed))))
    chosen |= {(series, uid) for series, uid in everything if series in whole}
    missing: dict[str, list[str]] = {}
    for series, uid in sorted(chosen):
        missing.setdefault(series, []).append(uid)
    orders = orders_for_missing("0", missing, listed)
    asked = [
        (series, uid)
        for order in orders
        for series, uid in everything
        if selection_of(order).covers(series, uid)
    ]
    assert sorted(asked) == sorted(chosen)
    assert all(len(order.sop_instance_uids) <= MAX_UIDS for order in orders)
    assert all(
        len(order.series_instance_uids) == 1 for order in orders if order.level is Level.IMAGE
    )


def test_orders_for_a_selection() -> None:
    """What the holder has not being known, a selection is ordered as it stands."""
    assert [o.level for o in orders_for_selection("0", Selection())] == [Level.STUDY]
    series = orders_for_selection("0", Selection(Level.SERIES, frozenset({"2", "1"})))
    assert [order.series_instance_uids for order in series] == [("1",), ("2",)]
    uids = frozenset(f"1.{n}" for n in range(MAX_UIDS + 1))
    images = orders_for_selection("0", Selection(Level.IMAGE, frozenset({"1"}), uids))
    assert [len(order.sop_instance_uids) for order in images] == [MAX_UIDS, 1]
    assert orders_for_selection("0", Selection(Level.IMAGE, frozenset({"1", "2"}), uids)) == []
