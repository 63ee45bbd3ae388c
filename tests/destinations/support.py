"""A workstation that stands in, and deliveries to it of instances held in memory."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from dicomproxy.destinations.workstation import (
    Workstation,
    WorkstationDelivery,
    WorkstationSettings,
)
from dicomproxy.dimse.layer import UpperLayer
from dicomproxy.ports import CachedInstance, Delivered, Originator
from tests.dimse_edge.harness import layer_left_clean
from tests.support.stand_in import SECONDS, StandIn, serving

CT: Final = "1.2.840.10008.5.1.4.1.1.2"
MR: Final = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT: Final = "1.2.840.10008.1.2.1"
IMPLICIT: Final = "1.2.840.10008.1.2"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
RLE: Final = "1.2.840.10008.1.2.5"
JPEG: Final = "1.2.840.10008.1.2.4.50"
JPEG_LOSSLESS: Final = "1.2.840.10008.1.2.4.70"

ASKED = Originator("READING2", 77, 1)


class Held:
    """Bytes as the store's reader gives them; ``broken`` makes reading fail."""

    arrived = 0

    def __init__(self, data: bytes, *, broken: bool = False) -> None:
        self._data = memoryview(data)
        self._broken = broken

    @property
    def size(self) -> int:
        return len(self._data)

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        if self._broken:
            raise OSError("unreadable")
        at = offset
        for buffer in buffers:
            piece = self._data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return at - offset

    async def close(self) -> None:
        return


@dataclass
class Item:
    """An instance and its bytes."""

    sop_class_uid: str = CT
    transfer_syntax_uid: str = EXPLICIT
    data: bytes = b"\x08\x00\x60\x00CS\x02\x00CT"
    uid: str = "1.2.3.1"
    broken: bool = False
    instance: CachedInstance = field(init=False)

    def __post_init__(self) -> None:
        self.instance = CachedInstance(
            self.sop_class_uid,
            self.uid,
            "1.2.3",
            "1.2.3.4",
            self.transfer_syntax_uid,
            "north",
            "1",
            0,
            len(self.data),
            zlib.crc32(self.data),
        )


@dataclass(slots=True)
class Desk:
    """A workstation as the proxy sees it."""

    workstation: Workstation
    peer: StandIn
    port: int

    def open(self, calling: str = "DICOMPROXY", originator: Originator = ASKED) -> Delivering:
        return Delivering(self.workstation.open(calling, originator, "op-1"))


class Delivering:
    """One delivery; closed at the end of the block."""

    def __init__(self, delivery: WorkstationDelivery) -> None:
        self.delivery = delivery

    async def __aenter__(self) -> Delivering:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with asyncio.timeout(SECONDS):
            await self.delivery.close()

    async def send(self, *items: Item) -> list[Delivered]:
        """Deliver one after the other."""
        outcomes = []
        async with asyncio.timeout(SECONDS):
            for item in items:
                held = Held(item.data, broken=item.broken)
                outcomes.append(await self.delivery.deliver(item.instance, held))
        return outcomes


@asynccontextmanager
async def desk(
    peer: StandIn, *, max_associations: int = 20, **settings: Any
) -> AsyncIterator[Desk]:
    """Yield a workstation that is *peer*; no association and no block is left behind."""
    async with (
        layer_left_clean() as layer,
        serving(layer, peer, max_associations=max_associations) as port,
    ):
        yield Desk(Workstation(layer, settings_for(port, **settings)), peer, port)


def settings_for(port: int, **more: Any) -> WorkstationSettings:
    given: dict[str, Any] = {"response_timeout": SECONDS, "retry_seconds": 0.0}
    return WorkstationSettings("READING1", "127.0.0.1", port, **(given | more))


def workstation(layer: UpperLayer, port: int, **more: Any) -> Workstation:
    return Workstation(layer, settings_for(port, **more))
