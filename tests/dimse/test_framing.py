"""Framing: the same messages however the bytes are split, in memory that does not grow."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_primitives import P_DATA

from dicomproxy.dimse import pdu
from dicomproxy.dimse.framing import Fragment, Framer
from dicomproxy.dimse.pdu import AbortReason, ProtocolError

Message = tuple[int, bool, bytes]
"""Context ID, whether it is a command, and the bytes of all its fragments."""

REQUEST: Final = pdu.AssociateRequest(
    "CALLED", "CALLING", (pdu.ProposedContext(1, "1.2.840.10008.1.1", ("1.2.840.10008.1.2",)),)
)


def pdv(context_id: int, control: int, data: bytes) -> bytes:
    return struct.pack(">LBB", len(data) + 2, context_id, control) + data


def p_data(*pdvs: bytes) -> bytes:
    body = b"".join(pdvs)
    return struct.pack(">BxL", 4, len(body)) + body


def messages(framer: Framer, pieces: Iterable[bytes]) -> list[pdu.Pdu | Message]:
    """Feed *pieces*; return PDUs, and messages put together, in the order they ended.

    Messages without an end follow, and a protocol error is listed as its text. Each
    piece is wiped once the framer has had it, as a receive buffer is that serves again.
    """
    found: list[pdu.Pdu | Message] = []
    parts: dict[tuple[int, bool], bytes] = {}
    try:
        for piece in pieces:
            buffer = bytearray(piece)
            for event in framer.feed(memoryview(buffer)):
                if not isinstance(event, Fragment):
                    found.append(event)
                    continue
                key = (event.context_id, event.is_command)
                parts[key] = parts.get(key, b"") + bytes(event.view)
                if event.last:
                    found.append((*key, parts.pop(key)))
            buffer[:] = b"\xee" * len(buffer)
    except ProtocolError as error:
        found.append((-1, False, f"{error.reason.name}: {error}".encode()))
    found.extend((*key, part + b" unfinished") for key, part in parts.items() if part)
    return found


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def at_cuts(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


# ------------------------------------------------------------ every split

fragments = st.tuples(
    st.integers(0, 127).map(lambda n: 2 * n + 1),
    st.integers(0, 3),
    st.binary(max_size=40),
).map(lambda fields: pdv(*fields))
valid_pdus = st.one_of(
    st.lists(fragments, min_size=1, max_size=5).map(lambda pdvs: p_data(*pdvs)),
    st.sampled_from(
        [
            pdu.encode(REQUEST),
            pdu.encode(pdu.REJECT_LIMIT),
            pdu.encode(pdu.Abort(2, 1)),
            pdu.RELEASE_RQ_BYTES,
            pdu.RELEASE_RP_BYTES,
        ]
    ),
)
streams = st.lists(valid_pdus, max_size=6).map(b"".join)
cut_lists = st.lists(st.integers(0, 10_000), max_size=12)


@given(stream=streams, cuts=cut_lists, trailing=st.binary(max_size=20))
def test_every_split_gives_the_same_messages(
    stream: bytes, cuts: list[int], trailing: bytes
) -> None:
    """Whole, byte by byte or cut anywhere, and whatever follows: the same, errors included."""
    data = stream + trailing
    whole = messages(Framer(), [data])
    assert messages(Framer(), bytewise(data)) == whole
    assert messages(Framer(), at_cuts(data, cuts)) == whole


@given(
    size=st.integers(0, 40),
    beyond=st.integers(-8, 8),
    off=st.sampled_from([0, 0, 0, -7, -6, -1, 1, 6]),
    control=st.integers(0, 3),
    cuts=cut_lists,
)
def test_one_pdv_is_judged_the_same_at_once_and_in_pieces(
    size: int, beyond: int, off: int, control: int, cuts: list[int]
) -> None:
    """Lengths about our maximum, and PDVs that do not fit, are accepted or refused alike."""
    length = size + 6
    stream = (
        struct.pack(">BxLLBB", 4, length, max(0, size + 2 + off), 3, control)
        + bytes(size)
        + p_data(pdv(3, 3, b"next"))
        + pdu.RELEASE_RQ_BYTES
    )
    limit = max(1, length + beyond)
    in_pieces = messages(Framer(limit), bytewise(stream))
    assert messages(Framer(limit), [stream]) == in_pieces
    assert messages(Framer(limit), at_cuts(stream, cuts)) == in_pieces


@pytest.mark.parametrize("missing", range(14))
def test_heads_and_first_byte_arrive_in_any_two_parts(missing: int) -> None:
    """Wherever the two heads of the usual PDU are torn apart, its bytes come out once."""
    stream = p_data(pdv(5, 2, b"data set")) * 2
    at = 14 + 6 + 13 - missing
    assert messages(Framer(20), [stream[:at], stream[at:]]) == [(5, False, b"data set")] * 2


@given(noise=st.binary(max_size=200), cuts=cut_lists, limit=st.integers(0, 100))
def test_any_bytes_are_messages_or_a_protocol_error(
    noise: bytes, cuts: list[int], limit: int
) -> None:
    """Noise raises nothing else, and the same error however it is cut."""
    whole = messages(Framer(limit), [noise])
    assert messages(Framer(limit), at_cuts(noise, cuts)) == whole


@given(
    stream=streams,
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    cuts=cut_lists,
)
def test_damaged_stream_is_messages_or_a_protocol_error(
    stream: bytes, changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    """Nor does a sound stream with some bytes changed, which gets further than noise does."""
    data = bytearray(stream + pdu.RELEASE_RQ_BYTES)
    for at, byte in changes:
        data[at % len(data)] = byte
    whole = messages(Framer(256), [bytes(data)])
    assert messages(Framer(256), at_cuts(bytes(data), cuts)) == whole


@given(
    command=st.binary(min_size=1, max_size=300),
    data_set=st.binary(min_size=1, max_size=3000),
    limit=st.integers(20, 500),
    cuts=cut_lists,
)
def test_message_fragmented_by_pynetdicom_comes_out_whole(
    command: bytes, data_set: bytes, limit: int, cuts: list[int]
) -> None:
    """A command and its data set, cut into PDVs and encoded by pynetdicom, arrive as sent."""
    stream = b""
    for control, data in ((1, command), (0, data_set)):
        size = limit - 6
        for at in range(0, len(data), size):
            last = at + size >= len(data)
            primitive = P_DATA()
            header = bytes([control | (2 if last else 0)])
            primitive.presentation_data_value_list = [[5, header + data[at : at + size]]]
            theirs = P_DATA_TF()
            theirs.from_primitive(primitive)
            stream += theirs.encode()
    expected = [(5, True, command), (5, False, data_set)]
    assert messages(Framer(limit), at_cuts(stream, cuts)) == expected


# ------------------------------------------------------------ what PDVs may look like


def test_many_pdvs_in_one_pdu() -> None:
    """A command and its data set may share a PDU, and a PDU hold many PDVs."""
    stream = p_data(
        pdv(1, 3, b"command"),
        *(pdv(1, 0, bytes([n])) for n in range(100)),
        pdv(1, 2, b"end"),
        pdv(7, 3, b"next"),
    )
    expected = [(1, True, b"command"), (1, False, bytes(range(100)) + b"end"), (7, True, b"next")]
    assert messages(Framer(), [stream]) == expected


@pytest.mark.parametrize("step", [1, 5, 6, 7, 1000])
def test_empty_last_fragment_ends_its_message(step: int) -> None:
    """Some senders learn only afterwards that they were done, and say so with nothing in it."""
    stream = p_data(pdv(3, 0, b"all")) + p_data(pdv(3, 0, b"")) + p_data(pdv(3, 2, b""))
    pieces = [stream[at : at + step] for at in range(0, len(stream), step)]
    assert messages(Framer(), pieces) == [(3, False, b"all")]


def test_empty_message_is_a_message() -> None:
    """A data set announced and then empty is still delivered, once."""
    stream = p_data(pdv(3, 2, b""))
    assert messages(Framer(), [stream]) == [(3, False, b"")]


def test_only_the_last_piece_of_the_last_fragment_is_last() -> None:
    """A consumer need not know where PDVs begin: *last* ends a message, nothing else does."""
    framer = Framer()
    stream = p_data(pdv(1, 0, b"abcd"), pdv(1, 2, b"efgh"))
    flags = [
        (event.last, bytes(event.view))
        for piece in (stream[:14], stream[14:24], stream[24:])
        for event in framer.feed(memoryview(piece))
        if isinstance(event, Fragment)
    ]
    assert flags == [(False, b"ab"), (False, b"cd"), (False, b"ef"), (True, b"gh")]


def test_fragment_is_a_view_of_the_callers_buffer() -> None:
    """No byte of a data set is copied on its way through."""
    stream = bytearray(p_data(pdv(1, 2, b"abcd")))
    (event,) = Framer().feed(memoryview(stream))
    assert isinstance(event, Fragment)
    stream[-4:] = b"wxyz"
    assert event.view == b"wxyz"


def test_between_pdus_is_told() -> None:
    """Idle and stalled are different: a peer may rest between PDUs, not inside one."""
    framer = Framer()
    stream = p_data(pdv(1, 2, b"abcd")) + pdu.RELEASE_RQ_BYTES
    rests = [0, 16, 26]
    assert framer.between_pdus
    for at in range(len(stream)):
        assert framer.between_pdus is (at in rests)
        list(framer.feed(memoryview(stream[at : at + 1])))
    assert framer.between_pdus


# ------------------------------------------------------------ limits and faults

INVALID, UNRECOGNIZED = AbortReason.INVALID_PARAMETER, AbortReason.UNRECOGNIZED_PDU


def header(pdu_type: int, length: int) -> bytes:
    return struct.pack(">BxL", pdu_type, length)


MALFORMED: Final = [
    ("HTTP", b"GET / HTTP/1.1\r\n", "unknown PDU type 0x47", UNRECOGNIZED),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00", "unknown PDU type 0x16", UNRECOGNIZED),
    ("type zero", bytes(6), "unknown PDU type 0x00", UNRECOGNIZED),
    ("request over 64 KiB", header(1, 65537), "longer than its limit", INVALID),
    ("request of 4 GiB", header(1, 2**32 - 1), "longer than its limit", INVALID),
    ("acceptance over 64 KiB", header(2, 65537), "longer than its limit", INVALID),
    ("reject over its limit", header(3, 1025), "longer than its limit", INVALID),
    ("release over its limit", header(5, 2**31), "longer than its limit", INVALID),
    ("abort over its limit", header(7, 1025), "longer than its limit", INVALID),
    ("request, empty", header(1, 0), "shorter than its fixed part", INVALID),
    ("release, empty", header(5, 0), "shorter than its fixed part", INVALID),
    ("abort of three bytes", header(7, 3), "shorter than its fixed part", INVALID),
    ("data, empty", header(4, 0), "without a PDV", INVALID),
    ("data shorter than a PDV", header(4, 5), "without a PDV", INVALID),
    ("data over our maximum", header(4, 107), "longer than the maximum", INVALID),
    ("data of 4 GiB", header(4, 2**32 - 1), "longer than the maximum", INVALID),
    ("PDV of length zero", header(4, 6) + bytes(6), "does not fit", INVALID),
    ("PDV of length one", header(4, 6) + b"\0\0\0\1\1\3", "does not fit", INVALID),
    ("PDV one byte over", header(4, 10) + b"\0\0\0\7\1\3", "does not fit", INVALID),
    ("PDV of 4 GiB", header(4, 10) + b"\xff\xff\xff\xff\1\3", "does not fit", INVALID),
    ("a byte left over", header(4, 11) + b"\0\0\0\6\1\3", "bytes left over", INVALID),
    ("five bytes left over", header(4, 15) + b"\0\0\0\6\1\3", "bytes left over", INVALID),
    (
        "second PDV over",
        p_data(pdv(1, 3, b"sound"), b"\0\0\0\x03\1\2"),
        "does not fit",
        INVALID,
    ),
]


@pytest.mark.parametrize(
    ("data", "words", "reason"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
def test_fault_is_found_in_the_header_that_has_it(
    data: bytes, words: str, reason: AbortReason
) -> None:
    """No byte behind a bad header is waited for: each is refused as soon as it is read."""
    framer = Framer(100)
    with pytest.raises(ProtocolError, match=words) as raised:
        for piece in bytewise(data):
            list(framer.feed(memoryview(piece)))
    assert raised.value.reason is reason


def test_what_came_before_a_fault_is_delivered() -> None:
    """Messages that ended before the fault in the same buffer are not lost."""
    stream = p_data(pdv(1, 3, b"sound")) + header(0x55, 9)
    sound, fault = messages(Framer(), [stream])
    assert sound == (1, True, b"sound")
    assert fault == (-1, False, b"UNRECOGNIZED_PDU: unknown PDU type 0x55")


def test_limits_themselves_are_allowed() -> None:
    """A request of 64 KiB, a P-DATA-TF of our maximum, one whose sender forgot its own header."""
    filler = pdu.MAX_ASSOCIATE_BYTES - (len(pdu.encode(REQUEST)) - 6) - 4
    body = pdu.encode(REQUEST)[6:] + b"\x7e\0" + filler.to_bytes(2, "big") + bytes(filler)
    assert messages(Framer(100), [header(1, len(body)) + body]) == [REQUEST]
    assert len(body) == 64 * 1024
    for length in (100, 106):
        data = bytes(length - 6)
        assert messages(Framer(100), [p_data(pdv(1, 2, data))]) == [(1, False, data)]


def test_unlimited_framer_takes_any_data_length() -> None:
    """With 0 offered a peer may send what it likes; it is streamed all the same."""
    framer = Framer(0)
    start = header(4, 2**32 - 1) + struct.pack(">LBB", 2**32 - 5, 1, 0) + b"first"
    (event,) = framer.feed(memoryview(start))
    assert isinstance(event, Fragment)
    assert (event.view, event.last) == (b"first", False)


def test_memory_does_not_grow_with_data() -> None:
    """100 MB in one PDV, and in many PDUs, leave nothing behind in the framer."""
    chunk = bytearray(1 << 20)
    view = memoryview(chunk)
    small = memoryview(p_data(pdv(1, 0, bytes(16_378))) * 64)
    framer = Framer(0)
    tracemalloc.start()
    try:
        list(framer.feed(memoryview(header(4, (100 << 20) + 6))))
        list(framer.feed(memoryview(struct.pack(">LBB", (100 << 20) + 2, 1, 2))))
        received = 0
        for _ in range(100):
            for event in framer.feed(view):
                assert isinstance(event, Fragment)
                received += len(event.view)
        assert received == 100 << 20
        assert event.last
        assert framer.between_pdus
        for _ in range(100):
            received += sum(
                len(event.view) for event in framer.feed(small) if isinstance(event, Fragment)
            )
        assert received == (100 << 20) + 100 * 64 * 16_378
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024
