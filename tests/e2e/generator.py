"""A region that keeps nothing, run as a process: what it sends is made while it is sent.

    python -m tests.e2e.generator SETTINGS     (JSON; see ``Settings``)

Three application entities, told apart by their ports: an archive holding one
study whose pixel data is computed, a local PACS that holds nothing, and a
workstation that counts and checks what it receives and throws it away. It is
built on the upper layer under test, since no other peer here sends or takes
gigabytes without holding them.

The workstation's tally is printed as a JSON object a line after each association.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO

from pydicom import Dataset
from pynetdicom.dsutils import decode, encode

from dicomproxy.dimse import operations
from dicomproxy.dimse.association import Association, BytesSink, Message, Sink
from dicomproxy.dimse.command import Command, CommandField, request, response
from dicomproxy.dimse.errors import AssociationError
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    Context,
    Supported,
    acceptance,
    first_of,
    negotiate,
)
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest
from tests.support.datasets import instance

_SYNTAXES = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)
_PIXEL_DATA = bytes.fromhex("e07f1000") + b"OW\0\0"
_CYCLE = bytes(range(251)) * 4200  # a prime: no block boundary hides a shift


@dataclass(frozen=True, slots=True)
class Settings:
    """What is held, and the ports of all; sizes in bytes.

    ``stall_after``: the archive sends so many instances in all, and then no more;
    by the last of them it has listed all that it has.
    """

    archive_port: int
    local_port: int
    workstation_port: int
    proxy_port: int
    instances: int
    pixel_bytes: int
    study_instance_uid: str = "2.25.1"
    series_instance_uid: str = "2.25.1.1"
    stall_after: int = 0


def sop_instance_uid(number: int) -> str:
    """Return UIDs of one length, so that headers differ in nothing else."""
    return f"2.25.1.2.{number + 100000}"


def pattern(offset: int, count: int) -> bytes:
    """Return bytes *offset* to *offset* + *count* of the pixel data, which repeats."""
    first = offset % 251
    return _CYCLE[first : first + count]


class Generated:
    """The data set of one instance: a header, and pixel data that is computed."""

    def __init__(self, header: bytes, pixel_bytes: int) -> None:
        self._header = header
        self.size = len(header) + pixel_bytes

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        done = 0
        for buffer in buffers:
            filled = 0
            while filled < len(buffer):
                at = offset + done + filled
                left = len(buffer) - filled
                if at < len(self._header):
                    piece = self._header[at : at + left]
                else:
                    piece = pattern(at - len(self._header), min(left, 1024 * 1024))
                buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
            done += filled
        return done


class Checking:
    """Takes a data set, compares its pixel data with the pattern, and keeps none of it."""

    def __init__(self, pixel_bytes: int) -> None:
        self.received = 0
        self.faults = 0
        self._pixel_bytes = pixel_bytes
        self._header = 0
        self._begin = b""

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        for segment in segments:
            self._take(segment)
        release()

    def _take(self, segment: memoryview) -> None:
        at = self.received
        self.received += len(segment)
        if not self._header:
            # Pixel data comes last: its head is looked for in what came first.
            self._begin += bytes(segment)
            found = self._begin.find(_PIXEL_DATA)
            if found < 0 or found + 12 > len(self._begin):
                return
            self._header = found + 12
            at, segment = self._header, memoryview(self._begin)[self._header :]
        offset = at - self._header
        for start in range(0, len(segment), 1024 * 1024):
            piece = segment[start : start + 1024 * 1024]
            self.faults += piece != pattern(offset + start, len(piece))

    def discard(self) -> None:
        self.faults += 1

    @property
    def whole(self) -> bool:
        return not self.faults and self.received == self._header + self._pixel_bytes


@dataclass(slots=True)
class Tally:
    """What the workstation received."""

    instances: int = 0
    faulty: int = 0
    bytes: int = 0


class Region:
    """Answers on all three ports."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.layer = UpperLayer()
        self.tally = Tally()
        self._sent = 0
        self._listed = asyncio.Event()
        # A header that fits every instance once its UID is put in.
        self._template = instance(
            study_instance_uid=settings.study_instance_uid,
            series_instance_uid=settings.series_instance_uid,
            SOPInstanceUID=sop_instance_uid(0),
        )
        self.sop_class_uid = str(self._template.SOPClassUID)
        del self._template.PixelData
        header = encode(self._template, False, True)
        assert header is not None
        size = settings.pixel_bytes.to_bytes(4, "little")
        self._header = header + _PIXEL_DATA + size

    def data(self, number: int) -> Generated:
        uid, template = sop_instance_uid(number).encode(), sop_instance_uid(0).encode()
        return Generated(self._header.replace(template, uid), self.settings.pixel_bytes)

    async def negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        association.sink_for = self._sink
        negotiated = negotiate(request, lambda _uid: Supported(first_of(_SYNTAXES)))
        return acceptance(request, negotiated, max_length=128 * 1024), negotiated.contexts

    def _sink(self, association: Association, context: Context, command: Command) -> Sink:
        if command.field == CommandField.C_STORE_RQ:
            return Checking(self.settings.pixel_bytes)
        return BytesSink(1024 * 1024)

    async def serve(self, association: Association) -> None:
        received = self.tally.instances
        try:
            while True:
                message = await association.receive(600)
                await self._handle(association, message)
        except AssociationError:
            pass
        if self.tally.instances > received:
            print(json.dumps(asdict(self.tally)), flush=True)

    async def _handle(self, association: Association, message: Message) -> None:
        command, context = message.command, message.context
        empty = association.called_ae_title == "LOCALPACS"
        level = ""
        match command.field:
            case CommandField.C_STORE_RQ:
                sink = message.sink
                assert isinstance(sink, Checking)
                self.tally.instances += 1
                self.tally.faulty += not sink.whole
                self.tally.bytes += sink.received
            case CommandField.C_FIND_RQ if not empty:
                level = await self._find(association, message)
            case CommandField.C_MOVE_RQ if not empty:
                await self._move(association, message)
                return
            case _:
                pass
        await association.send(context, response(command, 0x0000))
        if level == "IMAGE":
            self._listed.set()

    # ----------------------------------------------------------------- archive

    def _wanted(self, asked: Dataset) -> list[int]:
        named = asked.get("SOPInstanceUID") or []
        listed = {str(named)} if isinstance(named, str) else {str(one) for one in named}
        return [
            number
            for number in range(self.settings.instances)
            if not listed or sop_instance_uid(number) in listed
        ]

    async def _find(self, association: Association, message: Message) -> str:
        implicit = message.context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
        asked = decode(BytesIO(message.data), implicit, True)
        numbers = self._wanted(asked) if asked.QueryRetrieveLevel == "IMAGE" else [0]
        for number in numbers:
            row = Dataset()
            self._template.SOPInstanceUID = sop_instance_uid(number)
            for element in asked:
                held = self._template.get(element.tag)
                row.add_new(element.tag, element.VR, None if held is None else held.value)
            row.QueryRetrieveLevel = asked.QueryRetrieveLevel
            await association.send(
                message.context,
                response(message.command, 0xFF00, data_set=True),
                encode(row, implicit, True),
            )
        return str(asked.QueryRetrieveLevel)

    async def _move(self, association: Association, message: Message) -> None:
        implicit = message.context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
        numbers = self._wanted(decode(BytesIO(message.data), implicit, True))
        target = Target("127.0.0.1", self.settings.proxy_port, "DICOMPROXY", "NORTH")
        out = await self.layer.request(
            target, Proposal(((self.sop_class_uid, (EXPLICIT_VR_LITTLE_ENDIAN,)),))
        )
        context = out.context_for(self.sop_class_uid)
        sent = 0
        for number in numbers:
            if self.settings.stall_after and self._sent >= self.settings.stall_after:
                await asyncio.Event().wait()
            self._sent += 1
            if self._sent == self.settings.stall_after:
                await self._listed.wait()
            store = request(
                CommandField.C_STORE_RQ,
                self.sop_class_uid,
                number % 60000 + 1,
                data_set=True,
                priority=0,
                affected_sop_instance_uid=sop_instance_uid(number),
            )
            answer = await operations.store(out, context, store, self.data(number), 120)
            sent += answer.status == 0x0000
        await out.release(10)
        await association.send(
            message.context,
            response(
                message.command,
                0x0000 if sent == len(numbers) else 0xB000,
                completed=sent,
                failed=len(numbers) - sent,
                warning=0,
            ),
        )


async def main(settings: Settings) -> None:
    region = Region(settings)
    for port in (settings.archive_port, settings.local_port, settings.workstation_port):
        await Listener(region.layer, region, max_associations=50).start("127.0.0.1", port)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Settings(**json.loads(sys.argv[1]))))
