"""The door for instances: who is let in, who is turned away, with which status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dicomproxy.dataset.header import EXPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.dataset.levels import Level
from dicomproxy.ports import RetrieveOrder
from dicomproxy.retrieval.holder import Holder
from dicomproxy.retrieval.selection import Selection
from dicomproxy.retrieval.subscription import FlightRequest
from tests.retrieval.fakes import CT, STUDY, Archive, World, encoded, study
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch

FIRST = f"{STUDY}.1.1"


class Scene:
    """A flight whose source has been asked and sends nothing by itself."""

    def __init__(self) -> None:
        self.north, self.south = Archive("north", study(2)), Archive("south", study(2))
        self.gate = asyncio.Event()
        self.north.gate = lambda uid: self.gate
        self.world = World(self.north, self.south)

    async def send(
        self,
        source: str = "north",
        uid: str = FIRST,
        study_uid: str = STUDY,
        patient_id: str = PATIENT_ID,
        data: bytes | None = None,
    ) -> int:
        arrival = self.world.arrivals.receive(source, CT, uid, EXPLICIT_VR_LITTLE_ENDIAN)
        given = data or encoded(study_uid, f"{STUDY}.1", uid, patient_id)
        arrival.write([memoryview(given)], lambda: None)
        return await arrival.finish()

    @property
    def order(self) -> RetrieveOrder:
        return self.north.orders[0]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    request = FlightRequest(
        STUDY, Selection(), (Holder(made.north, PATIENT_ID),), frozenset({"north"}), PATIENT_ID
    )
    async with made.world.flights.join(request):
        async with asyncio.timeout(60):
            while not made.north.orders:  # noqa: ASYNC110 (the fake has no event for it)
                await asyncio.sleep(0)
        yield made
    await made.world.close()


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        ({}, 0x0000, None),
        ({"patient_id": ""}, 0x0000, None),
        ({"source": "south"}, 0x0124, "no_flight"),
        ({"study_uid": "1.9"}, 0xC001, "other_study"),
        ({"patient_id": "OTHER1"}, 0xC001, "identity_conflict"),
        ({"data": encoded(STUDY, f"{STUDY}.1", "1.7", PATIENT_ID)}, 0xA900, None),
        ({"data": b"\x08\x00\x16\x00UI"}, 0xC000, "unreadable_header"),
    ],
)
async def test_who_is_let_in(
    scene: Scene, log_watch: LogWatch, given: dict[str, str], status: int, reason: str | None
) -> None:
    """Only what a flight asked that source for, of the agreed patient, is stored."""
    assert await scene.send(**given) == status  # type: ignore[arg-type]
    held = scene.world.store.studies[STUDY].instances
    assert (FIRST in held) is (status == 0)
    refusals = log_watch.named("store_refused")
    assert bool(refusals) is (status != 0)
    if reason is not None:
        assert refusals[0]["reason"] == reason


async def test_same_bytes_again_are_a_success(scene: Scene) -> None:
    """A duplicate is as good as stored."""
    assert [await scene.send(), await scene.send()] == [0, 0]


async def test_store_without_room_refuses(scene: Scene) -> None:
    """No room is Out of Resources, so that the source may try again."""
    scene.world.store.full_for = {FIRST}
    assert await scene.send() == 0xA700


async def test_bytes_are_a_sign_of_life_of_the_order(scene: Scene) -> None:
    """Each write moves the order's last activity on, each instance its count."""
    order = scene.order
    order.last_activity = 0.0
    arrival = scene.world.arrivals.receive("north", CT, FIRST, EXPLICIT_VR_LITTLE_ENDIAN)
    arrival.write([memoryview(b"12")], lambda: None)
    assert order.last_activity > 0.0
    arrival.discard()
    assert order.arrived == 0
    await scene.send()
    assert order.arrived == 1


async def test_sender_is_the_source_that_was_asked(scene: Scene) -> None:
    """Of sources that share an address, the one being retrieved from is meant."""
    assert scene.world.arrivals.source_for(["south", "north"]) == "north"
    assert scene.world.arrivals.source_for(["south"]) is None


async def test_latecomer_of_an_ended_flight_is_refused(log_watch: LogWatch) -> None:
    """What still arrives after the last one left is refused, but blamed on nobody's identity."""
    scene = Scene()
    request = FlightRequest(
        STUDY, Selection(), (Holder(scene.north, PATIENT_ID),), frozenset({"north"}), PATIENT_ID
    )
    async with scene.world.flights.join(request):
        pass
    assert await scene.send() == 0x0124
    assert not log_watch.named("identity_conflict")
    await scene.world.close()


OTHER = "1.9"


async def test_another_studys_bytes_do_not_keep_a_stalled_order_alive(scene: Scene) -> None:
    """What is not known to be of an order is doubtful until its header is read, and then is not."""
    scene.world.flights.order_started("north", RetrieveOrder(Level.STUDY, (OTHER,)))
    order = scene.order
    order.last_activity = before = order.last_activity or 1.0
    arrival = scene.world.arrivals.receive("north", CT, "1.9.1", EXPLICIT_VR_LITTLE_ENDIAN)
    arrival.write([memoryview(encoded(OTHER, "1.9.2", "1.9.1", PATIENT_ID))], lambda: None)
    assert order.last_activity == before
    assert list(order.doubtful) == [arrival]
    assert await arrival.finish() == 0xC001
    assert order.last_activity == before
    assert order.doubtful == {}


async def test_own_bytes_count_once_they_are_known(scene: Scene) -> None:
    """Beside another study's order, an instance is a sign of life once it is known whose it is."""
    other = RetrieveOrder(Level.STUDY, (OTHER,), last_activity=1.0)
    scene.world.flights.order_started("north", other)
    scene.order.last_activity = before = 1.0
    assert await scene.send() == 0
    assert scene.order.last_activity > before
    assert (other.last_activity, other.doubtful, scene.order.doubtful) == (1.0, {}, {})


async def test_aborted_transfer_is_doubtful_no_more(scene: Scene) -> None:
    """What will never be known to be of an order holds up its deadline no longer."""
    scene.world.flights.order_started("north", RetrieveOrder(Level.STUDY, (OTHER,)))
    scene.order.last_activity = 1.0
    arrival = scene.world.arrivals.receive("north", CT, FIRST, EXPLICIT_VR_LITTLE_ENDIAN)
    arrival.write([memoryview(b"12")], lambda: None)
    assert list(scene.order.doubtful) == [arrival]
    arrival.discard()
    assert scene.order.doubtful == {}
