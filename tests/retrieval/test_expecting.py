"""A destination is told beforehand what kinds of instances will come."""

from __future__ import annotations

from typing import Any, cast

from dicomproxy.ports import CachedInstance, Delivered, Destination, InstanceReader, InstanceStore
from dicomproxy.retrieval.delivery import DeliveryReport, Outlet, deliver_study
from dicomproxy.retrieval.flight import Flight
from dicomproxy.retrieval.localize import Localizer
from dicomproxy.retrieval.persons import Persons
from dicomproxy.retrieval.selection import Selection
from dicomproxy.retrieval.spliced import Splicing
from dicomproxy.retrieval.subscription import FlightOutcome, FlightRequest, Subscription
from dicomproxy.retrieval.tally import Part
from tests.retrieval.fakes import CT, STUDY
from tests.retrieval.fakes import Workstation as Receiver

SR = "1.2.840.10008.5.1.4.1.1.88.11"
EXPLICIT = "1.2.840.10008.1.2.1"
RLE = "1.2.840.10008.1.2.5"


def instance(number: int, sop_class: str, syntax: str, series: str = "1") -> CachedInstance:
    return CachedInstance(
        sop_class, f"1.2.3.{number}", STUDY, series, syntax, "north", f"{number}", 0, 10, 0
    )


class Arrived:
    """The part of a flight that a subscription looks at; ``lacking`` are held no more."""

    def __init__(self, *log: CachedInstance) -> None:
        self.log = list(log)
        self.lacking: set[str] = set()

    def available(self, _subscription: Subscription, uid: str) -> bool:
        return uid not in self.lacking

    def best_total(self, _subscription: Subscription) -> int:
        return 0

    def count_hits(self, _hits: int) -> None:
        return


class Reader:
    size = 10

    async def read_into(self, buffers: Any, _offset: int) -> int:
        return sum(map(len, buffers))

    async def close(self) -> None:
        return


class Store:
    async def open(self, _instance: CachedInstance) -> InstanceReader:
        return cast(InstanceReader, Reader())

    async def open_several(self, instances: Any, head_bytes: int = 0) -> list[None]:
        return [None] * len(instances)


def subscribed(flight: Arrived, selection: Selection) -> Subscription:
    request = FlightRequest(STUDY, selection, (), frozenset({"north"}))
    return Subscription(cast(Flight, cast(Any, flight)), request)


def test_pairs_are_those_of_what_will_be_yielded() -> None:
    """Each once, in order; not those of what is not asked for, excluded or no longer held."""
    flight = Arrived(
        instance(1, CT, RLE),
        instance(2, CT, EXPLICIT, series="2"),
        instance(3, SR, EXPLICIT),
        instance(4, CT, RLE),
        instance(5, CT, "1.2.840.10008.1.2"),
    )
    flight.lacking.add("1.2.3.5")
    whole = subscribed(flight, Selection())
    assert list(whole.pairs()) == [(CT, RLE), (CT, EXPLICIT), (SR, EXPLICIT)]
    whole.exclude_series = frozenset({"2"})
    assert list(whole.pairs()) == [(CT, RLE), (SR, EXPLICIT)]


async def test_destination_is_told_before_the_first_instance_and_of_news_only() -> None:
    """A cached study's kinds are known at once; one that arrives later is added when it comes."""
    flight = Arrived(instance(1, CT, RLE), instance(2, SR, EXPLICIT), instance(3, CT, RLE))
    subscription = subscribed(flight, Selection())
    told: list[tuple[int, set[tuple[str, str]]]] = []

    class Told(Receiver):
        def expect(self, pairs: Any) -> None:
            told.append((len(self.received), set(pairs)))

        async def deliver(self, one: CachedInstance, reader: InstanceReader) -> Delivered:
            if one.sop_instance_uid == "1.2.3.3":
                flight.log.append(instance(4, CT, EXPLICIT))
                subscription.outcome = FlightOutcome()
            return await super().deliver(one, reader)

    workstation = Told()
    outlet = Outlet(lambda: cast(Destination, workstation), "READING1")
    await deliver_study(
        subscription,
        outlet,
        cast(InstanceStore, cast(Any, Store())),
        Part(),
        DeliveryReport(),
        lambda: None,
        Localizer(Persons(), Splicing(), subscription, "READING1"),
    )
    assert len(workstation.received) == 4
    assert told == [
        (0, {(CT, RLE), (SR, EXPLICIT)}),
        (3, {(CT, EXPLICIT)}),
    ]
