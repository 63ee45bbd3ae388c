"""The header of what arrives is read whatever its syntax, its length and the way it is cut."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from dicomproxy.cache import DiskInstanceStore
from dicomproxy.dataset.header import WINDOW_BYTES, InstanceHeader
from dicomproxy.ports import StudyLease
from tests.cache.support import CT, EXPLICIT, opened, read_instance
from tests.sentinel import PATIENT_ID

BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
UID = "1.2.3.1.1"


def encoded(filler_bytes: int, syntax: str) -> bytes:
    """A data set with a private value of *filler_bytes* before its Study Instance UID."""
    order = "big" if syntax == BIG_ENDIAN else "little"

    def tag(group: int, number: int) -> bytes:
        return group.to_bytes(2, order) + number.to_bytes(2, order)

    def short(group: int, number: int, vr: str, value: str) -> bytes:
        data = value.encode() + (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
        return tag(group, number) + vr.encode() + len(data).to_bytes(2, order) + data

    def long(group: int, number: int, vr: str, data: bytes) -> bytes:
        return tag(group, number) + vr.encode() + b"\0\0" + len(data).to_bytes(4, order) + data

    # What deflates badly, so that the deflated header is longer than a window too.
    noise = b"".join(
        zlib.crc32(number.to_bytes(4, "big")).to_bytes(4, "big")
        for number in range(filler_bytes // 4)
    )
    data = (
        short(0x0008, 0x0016, "UI", CT)
        + short(0x0008, 0x0018, "UI", UID)
        + long(0x0009, 0x1001, "OB", noise)
        + short(0x0010, 0x0020, "LO", PATIENT_ID)
        + short(0x0020, 0x000D, "UI", "1.2.3")
        + short(0x0020, 0x000E, "UI", "1.2.3.1")
        + long(0x7FE0, 0x0010, "OW", bytes(1000))
    )
    if syntax != DEFLATED:
        return data
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflater.compress(data) + deflater.flush()
    return deflated + b"\0" * (len(deflated) % 2)


@pytest.mark.parametrize("piece", [1 << 20, 1000, 37])
@pytest.mark.parametrize("filler", [0, 7000, WINDOW_BYTES - 100, 8176, 40_000])
@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN, DEFLATED])
@pytest.mark.parametrize("where", ["file", "memory"])
async def test_header_is_read_from_what_arrived(
    tmp_path: Path, where: str, syntax: str, filler: int, piece: int
) -> None:
    """Within the first bytes or beyond them, on disk or in memory, the identity is found."""
    # A limit that nothing fits under sends what arrives to memory.
    limit = 100_000_000 if where == "file" else 100
    store = await opened(tmp_path, max_size_bytes=limit, memory_spool_bytes=1_000_000)
    lease = await store.lease("1.2.3")
    data = encoded(filler, syntax)
    headers: list[InstanceHeader] = []

    def admit(header: InstanceHeader) -> StudyLease:
        headers.append(header)
        return lease

    await received(store, data, syntax, piece, admit)
    (header,) = headers
    assert (header.sop_instance_uid, header.patient_id) == (UID, PATIENT_ID)
    assert (header.study_instance_uid, header.series_instance_uid) == ("1.2.3", "1.2.3.1")
    instance = lease.instances[UID]
    assert (instance.file_name == "") is (where == "memory")
    assert (instance.size, instance.crc32) == (len(data), zlib.crc32(data))
    assert await read_instance(store, instance) == data
    lease.release()
    await store.close()


async def received(
    store: DiskInstanceStore, data: bytes, syntax: str, piece: int, admit: object
) -> None:
    writer = store.receive(CT, UID, syntax, "north")
    view = memoryview(data)
    for at in range(0, len(view), piece):
        writer.write([view[at : at + piece]], lambda: None)
    await writer.commit(admit)  # type: ignore[arg-type]
