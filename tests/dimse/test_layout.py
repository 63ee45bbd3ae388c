"""A data set laid out in blocks comes out of the framer as it went in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dimse.framing import Fragment, Framer, message_pdus
from dicomproxy.dimse.layout import BlockLayout, gap_in, pdu_bytes_in


def sent(layout: BlockLayout, view: memoryview, data: bytes, head: bytes) -> bytes:
    """Return what goes over the wire."""
    begin = layout.put_before(head)
    wire = bytearray(head if begin is None else b"")
    offset = 0
    while True:
        part = layout.lay_out(len(data) - offset)
        at = offset
        for piece in part.views:
            piece[:] = data[at : at + len(piece)]
            at += len(piece)
        assert at == offset + part.size
        wire += view[layout.gap if begin is None else begin : part.end]
        begin = None
        offset = at
        if part.is_last:
            assert offset == len(data)
            return bytes(wire)


@given(
    size=st.integers(0, 30_000),
    block=st.one_of(st.integers(64, 300), st.integers(8193, 10_000)),
    most=st.sampled_from([0, 1, 16, 17, 100, 4096, 9000]),
    command=st.integers(1, 1500),
)
def test_every_byte_is_sent_once_in_pdus_of_the_peers_length(
    size: int, block: int, most: int, command: int
) -> None:
    """Whatever the sizes: the command, then the data set, in even fragments, one of them last."""
    view = memoryview(bytearray(b"\xee" * block))
    data = bytes(number % 251 for number in range(size))
    layout = BlockLayout(view, 7, most)
    head = message_pdus(7, bytes(command), None, layout.pdu_bytes)
    wire = sent(layout, view, data, head)
    # One who counts strictly takes what it said it takes, and no less than 16.
    pieces = list(Framer(max(most, 16) if most else 0).feed(memoryview(wire)))
    assert all(isinstance(piece, Fragment) and piece.context_id == 7 for piece in pieces)
    fragments = [piece for piece in pieces if isinstance(piece, Fragment)]
    assert b"".join(one.view for one in fragments if one.is_command) == bytes(command)
    of_data = [one for one in fragments if not one.is_command]
    assert b"".join(one.view for one in of_data) == data
    assert [one.last for one in of_data] == [False] * (len(of_data) - 1) + [True]
    assert all(len(one.view) % 2 == 0 for one in of_data[:-1])


@pytest.mark.parametrize(
    ("block", "peer", "longest"),
    [
        pytest.param(528_384, 16_384, 16_390, id="what the peer takes"),
        pytest.param(528_384, 0, 527_360, id="what a block takes"),
        pytest.param(20_480, 16_384, 16_390, id="a small block takes the usual length"),
        pytest.param(20_480, 262_144, 19_456, id="a small block limits"),
        pytest.param(528_384, 1, 22, id="a peer that says nonsense"),
        pytest.param(528_384, 16_383, 16_388, id="odd"),
    ],
)
def test_longest_pdu(block: int, peer: int, longest: int) -> None:
    """The peer and the block limit it, and it is even."""
    assert pdu_bytes_in(block, peer) == longest


def test_head_that_finds_no_room_is_left_to_the_caller() -> None:
    """What is longer than the gap is not cut."""
    view = memoryview(bytearray(20_000))
    layout = BlockLayout(view, 1, 0)
    assert layout.put_before(bytes(gap_in(20_000))) == 0
    assert layout.put_before(bytes(gap_in(20_000) + 1)) is None
