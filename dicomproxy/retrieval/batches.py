"""What is missing of a study, as orders to its holder. Pure.

The fewest orders that ask for nothing twice: the study where all of it is
missing, a series where all of that is, otherwise instances by lists of UIDs
within one series (PS3.4 C.4.2.1.4.1).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from dicomproxy.dataset.levels import Level
from dicomproxy.ports import RetrieveOrder
from dicomproxy.retrieval.selection import Selection

MAX_UIDS: Final = 100
"""How many instances one order names: archives put them into one database query."""

FIRST_UIDS: Final = 4
"""How many are asked for before the listing is complete: archives look up every UID
of a list before they send anything, and somebody waits for the first instance."""


def list_length(unclaimed: int, outstanding: int, at_once: int) -> int:
    """Return how long the next lists are to be, so that *at_once* orders end together.

    Each further list costs the round trips that set an order up, so that there are
    as few as :data:`MAX_UIDS` allows; and since orders begin at different moments,
    one that begins late gets less.

    Args:
        unclaimed: instances that no order has asked for yet.
        outstanding: instances that orders under way have still to bring.
        at_once: how many orders are to be under way, those included.
    """
    share = max(1, math.ceil((unclaimed + outstanding) / max(1, at_once)))
    turns = math.ceil(share / MAX_UIDS)
    return math.ceil(share / turns)


def early_length(listed: int, running: int, at_once: int) -> int:
    """Return how long a list to make of *listed* instances while more may be listed; 0 for none.

    A first short one is sent off at once. Others wait until it is known how many
    there are, unless there are enough already to give each order a full one.
    """
    if not running:
        return min(listed, FIRST_UIDS)
    return MAX_UIDS if listed >= at_once * MAX_UIDS else 0


def orders_for_missing(
    study_instance_uid: str,
    missing: Mapping[str, Collection[str]],
    listed: Mapping[str, Mapping[str, str]],
    *,
    patient_id: str = "",
    finest: Level = Level.IMAGE,
    spread_over: int = 0,
    outstanding: int = 0,
) -> list[RetrieveOrder]:
    """Return orders that together ask for *missing*, and for nothing else if *finest* allows.

    Args:
        study_instance_uid: the study.
        missing: SOP Instance UIDs by Series Instance UID; series may be unlisted.
        listed: everything the holder has: series to SOP Instance UIDs to SOP
            Class UIDs (empty where unknown).
        patient_id: for holders that want it with every order.
        finest: the lowest level that this holder can be asked at.
        spread_over: how many orders it is to work on at the same time; what is missing
            is spread over as many lists then, even where it is a whole series.
        outstanding: what orders already under way have still to bring.
    """
    wanted = {series: list(dict.fromkeys(uids)) for series, uids in missing.items() if uids}
    if not wanted:
        return []
    if spread_over and finest is Level.IMAGE:
        size = list_length(sum(map(len, wanted.values())), outstanding, spread_over)
        return lists_of(study_instance_uid, wanted, listed, size, patient_id=patient_id)
    whole = {series for series, uids in wanted.items() if set(uids) == set(listed.get(series, ()))}
    everything = {series for series, uids in listed.items() if uids}
    if finest is Level.STUDY or (whole == everything and len(wanted) == len(whole)):
        classes = _classes(uids for uids in listed.values())
        return [_order(Level.STUDY, study_instance_uid, patient_id, classes)]
    orders = []
    for series, uids in wanted.items():
        known = listed.get(series, {})
        if series in whole or finest is Level.SERIES:
            classes = _classes([known])
            orders.append(_order(Level.SERIES, study_instance_uid, patient_id, classes, (series,)))
            continue
        orders.extend(_lists(study_instance_uid, series, uids, known, patient_id, MAX_UIDS))
    return orders


def lists_of(
    study_instance_uid: str,
    wanted: Mapping[str, Sequence[str]],
    listed: Mapping[str, Mapping[str, str]],
    size: int,
    *,
    patient_id: str = "",
) -> list[RetrieveOrder]:
    """Split what is wanted into lists within a series, of about *size* instances each."""
    orders: list[RetrieveOrder] = []
    for series, uids in wanted.items():
        known = listed.get(series, {})
        lists = -(-len(uids) // size)
        if lists > 1 and len(uids) - (lists - 1) * size < size / 4 and size < MAX_UIDS:
            lists -= 1  # a remainder of a few is better spread than asked for by itself
            size_here = min(MAX_UIDS, -(-len(uids) // lists))
        else:
            size_here = size
        orders.extend(_lists(study_instance_uid, series, uids, known, patient_id, size_here))
    # The longest first, so that they do not end long after the others.
    return sorted(orders, key=lambda order: -len(order.sop_instance_uids))


def early_orders(
    study_instance_uid: str,
    missing: Mapping[str, Sequence[str]],
    listed: Mapping[str, Mapping[str, str]],
    *,
    running: int,
    at_once: int,
    patient_id: str = "",
) -> list[RetrieveOrder]:
    """Return orders for some of what is *missing* while more is being listed."""
    length = early_length(sum(map(len, missing.values())), running, at_once)
    if not length:
        return []
    if not running:
        series, uids = next(iter(missing.items()))
        missing = {series: uids[:length]}
    return lists_of(study_instance_uid, missing, listed, length, patient_id=patient_id)


def _lists(
    study_instance_uid: str,
    series: str,
    uids: Sequence[str],
    known: Mapping[str, str],
    patient_id: str,
    size: int,
) -> Iterator[RetrieveOrder]:
    for start in range(0, len(uids), size):
        batch = tuple(uids[start : start + size])
        classes = _classes([{uid: known.get(uid, "") for uid in batch}])
        yield _order(Level.IMAGE, study_instance_uid, patient_id, classes, (series,), batch)


def orders_for_selection(
    study_instance_uid: str, selection: Selection, *, patient_id: str = ""
) -> list[RetrieveOrder]:
    """Return orders for *selection* as it stands, what the holder has not being known.

    None where instances are asked for whose one series is not known.
    """
    series = sorted(selection.series_instance_uids)
    if selection.level is Level.STUDY:
        return [_order(Level.STUDY, study_instance_uid, patient_id, ())]
    if selection.level is Level.SERIES:
        return [
            _order(Level.SERIES, study_instance_uid, patient_id, (), (series_uid,))
            for series_uid in series
        ]
    if len(series) != 1:
        return []
    missing = {series[0]: sorted(selection.sop_instance_uids)}
    # An unlisted instance more, so that no list counts as a whole series.
    return orders_for_missing(
        study_instance_uid, missing, {series[0]: {"": ""}}, patient_id=patient_id
    )


def _order(
    level: Level,
    study_instance_uid: str,
    patient_id: str,
    sop_classes: tuple[str, ...],
    series: tuple[str, ...] = (),
    instances: tuple[str, ...] = (),
) -> RetrieveOrder:
    return RetrieveOrder(
        level=level,
        study_instance_uids=(study_instance_uid,),
        series_instance_uids=series,
        sop_instance_uids=instances,
        patient_id=patient_id,
        sop_classes=sop_classes,
    )


def _classes(listings: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the SOP Classes of several listings, each once, unknown ones left out."""
    found = {sop_class: None for listing in listings for sop_class in listing.values()}
    return tuple(sop_class for sop_class in found if sop_class)
