"""Where in a block of memory the P-DATA-TF PDUs of a data set lie (PS3.8 9.3.5).

A data set is read straight into its place between the headers, and the block
is sent as it is. Headers are written once, since all PDUs but the last are
alike. Pure: no socket, no clock.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from dicomproxy.dimse.framing import PDV_HEAD
from dicomproxy.dimse.pdu import PduType

_HEAD_BYTES: Final = PDV_HEAD.size
_LEAST_PDU_BYTES: Final = 16
_GAP_BYTES: Final = 1024  # a C-STORE-RQ takes some 300
_LAST_FRAGMENT: Final = 2


def gap_in(block_bytes: int) -> int:
    """Return how much room a block has before its first PDU, for a command."""
    return _GAP_BYTES if block_bytes > 8 * _GAP_BYTES else 0


def pdu_bytes_in(block_bytes: int, peer_max_length: int) -> int:
    """Return the longest P-DATA-TF to send from a block, headers included.

    Args:
        peer_max_length: the Maximum Length that the peer offered; 0 accepts any.
    """
    most = block_bytes - gap_in(block_bytes)
    if peer_max_length:
        most = min(most, max(peer_max_length, _LEAST_PDU_BYTES) + 6)
    # Even: fragments have an even length but for a data set's odd end, and
    # some receivers give up on others (PS3.7 Annex F).
    return most & ~1


class LaidOut(NamedTuple):
    """As much of a data set as a block takes: ``size`` bytes, to be read into ``views``.

    ``end`` is where in the block the last of its PDUs ends.
    """

    views: list[memoryview]
    size: int
    end: int
    is_last: bool


class BlockLayout:
    """One block, used again and again for the data set of one message.

    Args:
        view: the block.
        context_id: of the message.
        peer_max_length: as for :func:`pdu_bytes_in`.
    """

    def __init__(self, view: memoryview, context_id: int, peer_max_length: int) -> None:
        self.gap = gap_in(len(view))
        self.pdu_bytes = pdu_bytes_in(len(view), peer_max_length)
        self._view = view
        self._context_id = context_id
        self._chunk = self.pdu_bytes - _HEAD_BYTES
        self._per_block = (len(view) - self.gap) // self.pdu_bytes
        self._full = PDV_HEAD.pack(
            PduType.P_DATA_TF, self._chunk + 6, self._chunk + 2, context_id, 0
        )
        self._full_heads = 0  # of how many PDUs the head is in its place

    def put_before(self, head: bytes) -> int | None:
        """Put *head* right before the first PDU; where it begins, None if it finds no room."""
        begin = self.gap - len(head)
        if begin < 0:
            return None
        self._view[begin : self.gap] = head
        return begin

    def lay_out(self, left: int) -> LaidOut:
        """Write the headers for the next of the *left* bytes that the data set still has."""
        view, chunk = self._view, self._chunk
        count = min(self._per_block, -(-left // chunk)) if left else 1
        is_last = count * chunk >= left
        tail = left - (count - 1) * chunk if is_last else chunk
        views: list[memoryview] = []
        at = self.gap
        for number in range(count):
            length = chunk
            if is_last and number == count - 1:
                length = tail
                PDV_HEAD.pack_into(
                    view,
                    at,
                    PduType.P_DATA_TF,
                    length + 6,
                    length + 2,
                    self._context_id,
                    _LAST_FRAGMENT,
                )
            elif number >= self._full_heads:
                view[at : at + _HEAD_BYTES] = self._full
                self._full_heads = number + 1
            views.append(view[at + _HEAD_BYTES : at + _HEAD_BYTES + length])
            at += self.pdu_bytes
        size = (count - 1) * chunk + tail
        end = self.gap + (count - 1) * self.pdu_bytes + _HEAD_BYTES + tail
        return LaidOut(views, size, end, is_last)
