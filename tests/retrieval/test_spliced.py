"""Readers of rewritten instances give what rewriting gives, however they are read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.part10 import read_file_meta
from dicomproxy.dataset.splice import Copy, Decision, Rewriter, Splice, SpliceError
from dicomproxy.ports import InstanceReader
from dicomproxy.retrieval.spliced import HEAD_BYTES, SplicedReader, Splicing
from tests.sentinel import PATIENT_ID, PATIENT_NAME

NAME, ID = 0x00100010, 0x00100020
FILES = (
    "CT_small.dcm",
    "MR_small_bigendian.dcm",
    "rtplan.dcm",
    "image_dfl.dcm",
    "JPEG2000.dcm",
    "test-SR.dcm",
)


class Held:
    """A reader over bytes; ``read`` are the ranges it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.read: list[tuple[int, int]] = []
        self.closed = 0

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        await asyncio.sleep(0)
        begin = offset
        for buffer in buffers:
            part = self.data[offset : offset + buffer.nbytes]
            buffer[: len(part)] = part
            offset += len(part)
        self.read.append((begin, offset - begin))
        return offset - begin

    async def close(self) -> None:
        self.closed += 1


def renamed(_view: Identifier) -> Decision:
    made = Identifier()
    made.set_text(ID, PATIENT_ID)
    made.set_text(NAME, PATIENT_NAME)
    edits: dict[int, Element | None] = {element.tag: element for element in made}
    return Decision(edits)


def rewriter() -> Rewriter:
    return Rewriter({NAME, ID}, renamed)


def expected(data: bytes, syntax: str) -> bytes:
    read: Callable[[int, int], bytes] = lambda at, size: data[at : at + size]  # noqa: E731
    return b"".join(rewriter().rewrite(read, len(data), syntax).chunks())


def packaged(name: str) -> tuple[bytes, str]:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with open(path, "rb") as file:
        whole = file.read()
    meta = read_file_meta(lambda at, size: whole[at : at + size])
    return whole[meta.data_set_offset :], meta.transfer_syntax_uid


def blocks(size: int, seed: int) -> Iterator[list[int]]:
    """Yield the lengths of the buffers of one read after the other, *size* bytes in all."""
    chosen = random.Random(seed)
    while size:
        lengths = []
        for _ in range(chosen.randint(1, 4)):
            length = min(size, chosen.choice((1, 7, 4096, 16384, 100_000)))
            size -= length
            lengths.append(length)
            if not size:
                break
        yield lengths


async def read_all(reader: InstanceReader, seed: int) -> bytes:
    found = bytearray()
    for lengths in blocks(reader.size, seed):
        buffers = [bytearray(length) for length in lengths]
        count = await reader.read_into([memoryview(one) for one in buffers], len(found))
        assert count == sum(lengths)
        found += b"".join(buffers)
    return bytes(found)


async def opened(data: bytes, syntax: str) -> tuple[Held, InstanceReader]:
    held = Held(data)
    return held, await Splicing().open(held, syntax, rewriter())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", [1, 2])
async def test_reading_in_any_blocks_gives_the_rewritten_data_set(name: str, seed: int) -> None:
    """Size and bytes are those of the rewritten data set, twice over, in every transfer syntax."""
    data, syntax = packaged(name)
    wanted = expected(data, syntax)
    assert wanted != data
    async with asyncio.timeout(60):
        held, reader = await opened(data, syntax)
        assert reader.size == len(wanted)
        assert await read_all(reader, seed) == wanted
        assert await read_all(reader, seed + 10) == wanted, "for a second association"
        await reader.close()
    assert held.closed == 1


def long_header(size: int) -> bytes:
    made = Identifier()
    made.put(Element(0x00091010, "OB", bytes(size)))
    made.set_text(NAME, "Foreign")
    made.set_text(ID, "N1")
    made.put(Element(0x7FE00010, "OB", bytes(range(256)) * 2000))
    return made.encode(EXPLICIT_VR_LITTLE_ENDIAN)


def scattered() -> bytes:
    """Make a data set with something to be seen in many places, far from each other."""
    made = Identifier()
    made.set_text(NAME, "Foreign")
    made.set_text(ID, "N1")
    for number in range(10):
        made.put(Element(0x60003000 + (number << 17), "OB", bytes(HEAD_BYTES)))
    return made.encode(EXPLICIT_VR_LITTLE_ENDIAN)


@pytest.mark.parametrize("syntax", [EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN])
@pytest.mark.parametrize("around", [-200, -20, 0, 300, 100_000])
async def test_header_that_ends_behind_what_is_read_first(around: int, syntax: str) -> None:
    """It is read further by a thread, with the same result, wherever the limit falls."""
    data = Identifier.decode(long_header(HEAD_BYTES + around), EXPLICIT_VR_LITTLE_ENDIAN).encode(
        syntax
    )
    async with asyncio.timeout(60):
        _, reader = await opened(data, syntax)
        assert await read_all(reader, 3) == expected(data, syntax)


async def test_ordinary_header_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One read of the beginning is all that is done before the first byte is sent."""

    def forbidden(*_: Any) -> NoReturn:
        raise AssertionError("a thread was asked")

    monkeypatch.setattr(asyncio, "to_thread", forbidden)
    data = long_header(100)
    held, _ = await opened(data, EXPLICIT_VR_LITTLE_ENDIAN)
    assert held.read == [(0, HEAD_BYTES)]


@pytest.mark.parametrize("size", [0, 20, 20_000])
async def test_what_follows_the_pixels_needs_no_thread(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding at the end, as many writers leave it, costs one read of where it begins."""

    def forbidden(*_: Any) -> NoReturn:
        raise AssertionError("a thread was asked")

    monkeypatch.setattr(asyncio, "to_thread", forbidden)
    data = long_header(100)
    padding = Identifier((Element(0xFFFCFFFC, "OB", bytes(size)),))
    padded = data + padding.encode(EXPLICIT_VR_LITTLE_ENDIAN)
    held, reader = await opened(padded, EXPLICIT_VR_LITTLE_ENDIAN)
    assert held.read == [(0, HEAD_BYTES), (len(data), min(size + 12, 16 * 1024))]
    assert await read_all(reader, 5) == expected(padded, EXPLICIT_VR_LITTLE_ENDIAN)


async def test_many_parts_are_a_thread_s_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not go through a long data set from part to part, over and over."""
    asked = []
    real = asyncio.to_thread

    async def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return await real(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    data = scattered()
    async with asyncio.timeout(60):
        _, reader = await opened(data, EXPLICIT_VR_LITTLE_ENDIAN)
        assert len(asked) == 1
        assert await read_all(reader, 6) == expected(data, EXPLICIT_VR_LITTLE_ENDIAN)


async def test_pixels_are_read_into_place_by_one_read() -> None:
    """A block that lies in what nobody changes costs one read of that very range."""
    data = long_header(100)
    held, reader = await opened(data, EXPLICIT_VR_LITTLE_ENDIAN)
    held.read.clear()
    shift = reader.size - len(data)
    buffers = [memoryview(bytearray(1000)) for _ in range(3)]
    assert await reader.read_into(buffers, 200_000) == 3000
    assert held.read == [(200_000 - shift, 3000)]


async def test_original_that_breaks_off_is_an_error_or_a_short_read() -> None:
    """Nothing is made up where the file ends early."""
    data = long_header(100)
    held, reader = await opened(data, EXPLICIT_VR_LITTLE_ENDIAN)
    held.data = data[:-10]
    buffer = memoryview(bytearray(100))
    assert await reader.read_into([buffer], reader.size - 100) == 90
    short = Held(data)
    short.data = data[:100]
    with pytest.raises(OSError, match="broke off"):
        await Splicing().open(short, EXPLICIT_VR_LITTLE_ENDIAN, rewriter())


async def test_deflated_original_that_breaks_off_meanwhile_is_an_unreadable_one() -> None:
    """What happens halfway is what senders are prepared for: the association is given up."""
    made = Identifier()
    made.set_text(ID, "N1")
    made.put(Element(0x7FE00010, "OB", random.Random(5).randbytes(3_000_000)))
    held, reader = await opened(
        made.encode(DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
    )
    buffer = bytearray(100_000)
    assert await reader.read_into([memoryview(buffer)], 0) == 100_000
    held.data = held.data[:1_000_000]
    with pytest.raises(OSError, match="broke off"):
        await reader.read_into([memoryview(bytearray(reader.size))], 100_000)


async def test_piece_being_made_is_ended_before_another_is_begun() -> None:
    """A read that is given up leaves no thread that shares what the next one uses."""
    made = Identifier()
    made.set_text(ID, "N1")
    made.put(Element(0x7FE00010, "OB", random.Random(6).randbytes(6_000_000)))
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Held):
        slow = False

        async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
            if self.slow:
                asked.set()
                await go_on.wait()
            return await super().read_into(buffers, offset)

    data = made.encode(DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)
    held = Slow(data)
    async with asyncio.timeout(60):
        reader = await Splicing().open(held, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, rewriter())
        held.slow = True
        reading = asyncio.ensure_future(reader.read_into([memoryview(bytearray(500_000))], 0))
        await asked.wait()
        reading.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not reading.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await read_all(reader, 4) == expected(data, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)


async def test_data_set_that_does_not_inflate() -> None:
    """Garbage where deflated data was due cannot be rewritten; no thread is left behind."""
    async with asyncio.timeout(60):
        with pytest.raises(SpliceError):
            await opened(b"\xff" * 1000, DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN)


@given(
    segments=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=20), st.tuples(st.integers(0, 40), st.integers(1, 20))
        ),
        max_size=8,
    ),
    lengths=st.lists(st.integers(0, 15), max_size=6),
    offset=st.integers(0, 200),
)
def test_any_range_of_any_segments(
    segments: list[bytes | tuple[int, int]], lengths: list[int], offset: int
) -> None:
    """A read gives just the bytes that were asked for, as far as there are any."""
    original = bytes(range(60))
    made = [one if isinstance(one, bytes) else Copy(*one) for one in segments]
    splice = Splice(lambda at, size: original[at : at + size], made)
    wanted = splice.read(offset, sum(lengths))
    reader = SplicedReader(cast(InstanceReader, Held(original)), splice)
    buffers = [bytearray(length) for length in lengths]
    count = asyncio.run(reader.read_into([memoryview(one) for one in buffers], offset))
    assert b"".join(buffers)[:count] == wanted


async def test_giving_up_leaves_no_thread_behind() -> None:
    """A thread that waits for bytes ends with an error once the instance is closed."""
    asked, refused = asyncio.Event(), asyncio.Event()

    class Stalled(Held):
        async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
            if offset > 6 * HEAD_BYTES:
                asked.set()
                await refused.wait()
                raise OSError("the reader is closed")
            return await super().read_into(buffers, offset)

    held = Stalled(scattered())
    splicing = Splicing()
    async with asyncio.timeout(60):
        opening = asyncio.ensure_future(splicing.open(held, EXPLICIT_VR_LITTLE_ENDIAN, rewriter()))
        await asked.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        refused.set()
        await asyncio.get_running_loop().shutdown_default_executor()
