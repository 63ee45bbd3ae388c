"""From a stream of bytes to PDUs, the same however the bytes are split, and back (PS3.8 9.3).

P-DATA-TF is never assembled: each piece of a presentation data value (PDV) is
handed on as a view of the caller's own buffer, valid until the next call, so
that memory does not grow with what a peer sends. Every other PDU is small and
is assembled up to its limit. Pure: no socket, no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from dicomproxy.dimse.pdu import (
    MAX_ASSOCIATE_BYTES,
    AbortReason,
    Pdu,
    PduType,
    ProtocolError,
    decode,
)

PDU_HEADER_BYTES: Final = 6
PDV_HEADER_BYTES: Final = 6
PDV_HEAD: Final = struct.Struct(">BxLLBB")
"""Of a P-DATA-TF with one PDV: both headers."""
_TOLERANCE_BYTES: Final = 6  # some senders leave the PDU header out of their arithmetic
_FIXED_LIMIT: Final = 1024  # RJ, release and abort have 4 bytes; leave room for oddities


class Fragment(NamedTuple):
    """A piece of one PDV (PS3.8 9.3.5, Annex E).

    ``last`` is true only on the piece that ends a message's last PDV, so a
    consumer need not know where PDVs begin. ``view`` is lent until the next
    call of :meth:`Framer.feed`.
    """

    context_id: int
    is_command: bool
    last: bool
    view: memoryview


class Framer:
    """Incremental PDU parser of one association.

    Args:
        max_pdu_bytes: the Maximum Length we offered; a longer P-DATA-TF is a
            protocol error. 0 accepts any.
    """

    __slots__ = (
        "_body",
        "_context_id",
        "_control",
        "_header",
        "_max_pdu",
        "_need",
        "_pdu_left",
        "_pdu_type",
        "_pdv_left",
    )

    def __init__(self, max_pdu_bytes: int = 0) -> None:
        self._max_pdu = max_pdu_bytes
        self._header = bytearray()  # of the PDU or PDV being read
        self._body = bytearray()  # of a PDU that is not P-DATA-TF
        self._need = 0  # bytes of body still missing
        self._pdu_type = 0
        self._pdu_left = 0  # bytes of the P-DATA-TF after what was consumed
        self._pdv_left = 0  # bytes of the PDV's fragment still to come
        self._context_id = 0
        self._control = 0

    @property
    def between_pdus(self) -> bool:
        """Whether no PDU is partly read."""
        return not (self._header or self._need or self._pdu_left)

    def feed(self, data: memoryview) -> Iterator[Pdu | Fragment]:
        """Yield what *data* completes.

        Raises:
            ProtocolError: the bytes are no PDU, or one over its limit. The
                framer is unusable afterwards.
        """
        at = 0
        end = len(data)
        most = self._max_pdu or 0xFFFFFFFF  # a longer one is judged with its tolerance below
        while at < end:
            if self._pdv_left:
                size = min(self._pdv_left, end - at)
                self._pdv_left -= size
                self._pdu_left -= size
                yield Fragment(
                    self._context_id,
                    bool(self._control & 1),
                    self._pdv_left == 0 and bool(self._control & 2),
                    data[at : at + size],
                )
                at += size
            elif self._need:
                size = min(self._need, end - at)
                self._body += data[at : at + size]
                self._need -= size
                at += size
                if not self._need:
                    body = bytes(self._body)
                    self._body.clear()
                    yield decode(self._pdu_type, body)
            else:
                # A PDV header inside a P-DATA-TF, or a PDU header: six bytes each.
                if not (self._header or self._pdu_left) and end - at > PDV_HEAD.size:
                    # The usual P-DATA-TF has one PDV: both heads in one go.
                    pdu_type, length, pdv, context_id, control = PDV_HEAD.unpack_from(data, at)
                    if pdu_type == PduType.P_DATA_TF and pdv == length - 4 and 2 < pdv <= most:
                        at += PDV_HEAD.size
                        size = min(pdv - 2, end - at)
                        self._pdu_left = self._pdv_left = left = pdv - 2 - size
                        self._context_id, self._control = context_id, control
                        last = not left and bool(control & 2)
                        yield Fragment(context_id, bool(control & 1), last, data[at : at + size])
                        at += size
                        continue
                if not self._header and end - at >= 6:
                    raw: bytes | memoryview = data[at : at + 6]
                    at += 6
                else:
                    size = min(6 - len(self._header), end - at)
                    self._header += data[at : at + size]
                    at += size
                    if len(self._header) < 6:
                        break
                    raw = bytes(self._header)
                    self._header.clear()
                if self._pdu_left:
                    if self._start_pdv(raw):
                        yield Fragment(self._context_id, bool(self._control & 1), True, data[at:at])
                else:
                    self._start_pdu(raw)

    def _start_pdu(self, header: bytes | memoryview) -> None:
        pdu_type, length = struct.unpack(">BxL", header)
        if pdu_type == PduType.P_DATA_TF:
            if self._max_pdu and length > self._max_pdu + _TOLERANCE_BYTES:
                raise ProtocolError("P-DATA-TF longer than the maximum length we offered")
            if length < PDV_HEADER_BYTES:
                raise ProtocolError("P-DATA-TF without a PDV")
            self._pdu_left = length
            return
        if pdu_type not in PduType._value2member_map_:
            raise ProtocolError(f"unknown PDU type 0x{pdu_type:02X}", AbortReason.UNRECOGNIZED_PDU)
        associate = pdu_type in (PduType.ASSOCIATE_RQ, PduType.ASSOCIATE_AC)
        if length > (MAX_ASSOCIATE_BYTES if associate else _FIXED_LIMIT):
            raise ProtocolError("PDU longer than its limit")
        if length < 4:
            raise ProtocolError("PDU shorter than its fixed part")
        self._pdu_type = pdu_type
        self._need = length

    def _start_pdv(self, header: bytes | memoryview) -> bool:
        """Begin a PDV; return true if it is empty but ends its message."""
        length, context_id, control = struct.unpack(">LBB", header)
        if length < 2 or length + 4 > self._pdu_left:
            raise ProtocolError("PDV does not fit its P-DATA-TF")
        self._context_id = context_id
        self._control = control
        self._pdv_left = length - 2
        self._pdu_left -= PDV_HEADER_BYTES
        if 0 < self._pdu_left - self._pdv_left < PDV_HEADER_BYTES:
            raise ProtocolError("bytes left over behind the last PDV")
        return self._pdv_left == 0 and bool(control & 2)


def message_pdus(context_id: int, command: bytes, data: bytes | None, max_bytes: int) -> bytes:
    """Return a small message as P-DATA-TF PDUs of one PDV each.

    Args:
        max_bytes: of a PDU, its header included.
    """
    chunk = max_bytes - PDV_HEAD.size
    parts: list[bytes] = []
    for control, body in ((1, command), (0, data)):
        if body is None:
            continue
        for at in range(0, max(len(body), 1), chunk):
            piece = body[at : at + chunk]
            size = len(piece) + 2
            last = 2 if at + chunk >= len(body) else 0
            parts.append(
                PDV_HEAD.pack(PduType.P_DATA_TF, size + 4, size, context_id, control | last)
            )
            parts.append(piece)
    return b"".join(parts)
