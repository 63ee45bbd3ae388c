"""Instances for the cache's tests, as bytes, and the dialogue that stores them."""

from __future__ import annotations

from dicomproxy.cache import CacheSettings, DiskInstanceStore
from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.ports import CachedInstance, InstanceReader, Stored, StudyLease
from tests.sentinel import PATIENT_ID, PATIENT_NAME

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT = "1.2.840.10008.1.2.1"


def element(group: int, number: int, vr: str, value: str) -> bytes:
    data = value.encode("ascii")
    if len(data) % 2:
        data += b"\0" if vr == "UI" else b" "
    head = group.to_bytes(2, "little") + number.to_bytes(2, "little") + vr.encode()
    return head + len(data).to_bytes(2, "little") + data


def data_set(
    sop_instance_uid: str,
    study: str = "1.2.3",
    *,
    size: int = 1000,
    sop_class_uid: str = CT,
    fill: int = 7,
) -> bytes:
    """An Explicit VR Little Endian data set with pixel data of about *size* bytes."""
    size += size % 2
    return (
        element(0x0008, 0x0016, "UI", sop_class_uid)
        + element(0x0008, 0x0018, "UI", sop_instance_uid)
        + element(0x0010, 0x0010, "PN", PATIENT_NAME)
        + element(0x0010, 0x0020, "LO", PATIENT_ID)
        + element(0x0020, 0x000D, "UI", study)
        + element(0x0020, 0x000E, "UI", study + ".1")
        + bytes.fromhex("e07f1000 4f57 0000")
        + size.to_bytes(4, "little")
        + bytes([fill]) * size
    )


def settings(directory, **changes) -> CacheSettings:
    values = {"directory": directory, "max_size_bytes": 100_000_000, "min_free_bytes": 0}
    return CacheSettings(**{**values, **changes})


async def opened(directory, **changes) -> DiskInstanceStore:
    store = DiskInstanceStore(settings(directory, **changes))
    await store.start()
    return store


async def store_bytes(
    store: DiskInstanceStore,
    lease: StudyLease,
    sop_instance_uid: str,
    data: bytes,
    *,
    sop_class_uid: str = CT,
    piece: int = 65536,
) -> Stored:
    writer = store.receive(sop_class_uid, sop_instance_uid, EXPLICIT, "north")
    view = memoryview(data)
    for offset in range(0, len(view), piece):
        writer.write([view[offset : offset + piece]], lambda: None)

    def admit(_header: InstanceHeader) -> StudyLease:
        return lease

    return await writer.commit(admit)


async def fill(store: DiskInstanceStore, study: str, count: int, *, size: int = 1000) -> None:
    """Store a complete study of *count* instances and let it go."""
    lease = await store.lease(study)
    for number in range(1, count + 1):
        uid = f"{study}.1.{number}"
        await store_bytes(store, lease, uid, data_set(uid, study, size=size))
    await lease.set_complete(True)
    lease.touch()
    lease.release()


async def read_all(reader: InstanceReader) -> bytes:
    buffer = bytearray(reader.size)
    half = len(buffer) // 2
    view = memoryview(buffer)
    try:
        assert await reader.read_into([view[:half], view[half:]], 0) == reader.size
    finally:
        await reader.close()
    return bytes(buffer)


async def read_instance(store: DiskInstanceStore, instance: CachedInstance) -> bytes:
    return await read_all(await store.open(instance))
