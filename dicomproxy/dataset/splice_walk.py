"""Stepping over the elements of an encoded data set without decoding it. Pure.

Lengths are believed, values are not looked at. Encodings met in practice are
followed: a data set or an item whose first element shows that its VRs are
implicit where explicit ones were due, or the reverse, VRs that are none, and UN
with undefined length. Rule kept: any bytes whatever give a position or :class:`SpliceError`,
in bounded memory; nothing is read but the heads of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple

from dicomproxy.dataset.header import (
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    LONG_VRS,
    SHORT_VRS,
)

Read = Callable[[int, int], bytes]
"""``read(offset, size)``: data set bytes, fewer at the end. Any offset, any number of times."""

WINDOW_BYTES: Final = 16 * 1024
"""How much is read at a time; most headers are in the first window."""

UNDEFINED: Final = 0xFFFFFFFF
ITEM: Final = 0xFFFEE000
ITEM_END: Final = 0xFFFEE00D
SEQUENCE_END: Final = 0xFFFEE0DD

MAX_DEPTH: Final = 64
MAX_ELEMENTS: Final = 4_000_000

_KNOWN_VRS: Final = SHORT_VRS | LONG_VRS
_TAG_AND_LENGTH: Final = {False: Struct("<HHL").unpack_from, True: Struct(">HHL").unpack_from}
_SHORT_HEAD: Final = {False: Struct("<HH2sH").unpack_from, True: Struct(">HH2sH").unpack_from}
_LONG_LENGTH: Final = {False: Struct("<L").unpack_from, True: Struct(">L").unpack_from}


class SpliceError(Exception):
    """The data set cannot be rewritten as it is encoded. Carries no value."""


class Encoding(NamedTuple):
    """How elements are written."""

    implicit: bool
    big_endian: bool

    @property
    def transfer_syntax_uid(self) -> str:
        """The uncompressed transfer syntax that writes them so."""
        if self.implicit:
            return IMPLICIT_VR_LITTLE_ENDIAN
        return EXPLICIT_VR_BIG_ENDIAN if self.big_endian else EXPLICIT_VR_LITTLE_ENDIAN


WITHIN_UNKNOWN: Final = Encoding(implicit=True, big_endian=False)
"""How the items of a UN are written, whatever is around it (PS3.5 6.2.2)."""


class Head(NamedTuple):
    """The beginning of an element.

    ``vr`` is empty where none is written; ``value`` is where the value begins
    and ``length`` may be :data:`UNDEFINED`.
    """

    tag: int
    vr: bytes
    value: int
    length: int


class Window:
    """A part of the data set that is held, and moves with what is asked for."""

    __slots__ = ("_budget", "_read", "data", "start")

    def __init__(self, read: Read) -> None:
        self._read = read
        self._budget = MAX_ELEMENTS
        self.data = b""
        self.start = 0

    def at(self, position: int, size: int) -> int:
        """Return where in ``data`` the *size* bytes at *position* begin.

        Raises:
            SpliceError: the data set ends before.
        """
        at = position - self.start
        if at < 0 or at + size > len(self.data):
            self.data = self._read(position, max(size, WINDOW_BYTES))
            self.start, at = position, 0
            if len(self.data) < size:
                raise SpliceError("truncated")
        return at

    def bytes(self, position: int, size: int) -> bytes:
        """Return *size* bytes at *position*; the caller bounds *size*.

        Raises:
            SpliceError: the data set ends before.
        """
        at = self.at(position, size)
        return self.data[at : at + size]

    def count(self) -> None:
        """Account for one element or item.

        Raises:
            SpliceError: there are too many.
        """
        self._budget -= 1
        if self._budget < 0:
            raise SpliceError("too many elements")

    def head(self, position: int, encoding: Encoding) -> Head:
        """Return the head of the element, item or delimiter at *position*.

        Raises:
            SpliceError: the data set ends before, or has too many elements.
        """
        self.count()
        implicit, big_endian = encoding
        at = self.at(position, 8)
        if implicit:
            group, number, length = _TAG_AND_LENGTH[big_endian](self.data, at)
            return Head(group << 16 | number, b"", position + 8, length)
        group, number, vr, length = _SHORT_HEAD[big_endian](self.data, at)
        tag = group << 16 | number
        if vr in SHORT_VRS:
            return Head(tag, vr, position + 8, length)
        if group == 0xFFFE or not is_vr(vr):
            # Delimiters bear no VR; an element without one is read as implicit.
            (length,) = _LONG_LENGTH[big_endian](self.data, at + 4)
            return Head(tag, b"", position + 8, length)
        (length,) = _LONG_LENGTH[big_endian](self.data, self.at(position + 8, 4))
        return Head(tag, vr, position + 12, length)


def is_vr(code: bytes) -> bool:
    """Tell whether two bytes look like a VR, known or not; unknown ones have long lengths."""
    return code in _KNOWN_VRS or (code.isalpha() and code.isupper())


def top_encoding(window: Window, size_bytes: int, transfer_syntax_uid: str) -> Encoding:
    """Return how the data set is really written, as its first element shows."""
    implicit = transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN
    big_endian = transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN
    if size_bytes >= 8:
        code = window.bytes(0, 8)[4:6]
        if implicit and code in _KNOWN_VRS:
            implicit = False
        elif not is_vr(code):
            implicit = True
    return Encoding(implicit, big_endian)


def item_encoding(window: Window, position: int, length: int, around: Encoding) -> Encoding:
    """Return how the elements of the item whose content is at *position* are written."""
    if length < 8:
        return around
    first = window.bytes(position, 8)
    code = first[4:6]
    if around.implicit:
        if code not in _KNOWN_VRS or first[:2] in (b"\xfe\xff", b"\xff\xfe"):
            return around
        (size,) = _LONG_LENGTH[around.big_endian](first, 4)
        if length != UNDEFINED and size <= length - 8:
            return around  # it may as well be a length, and is what is due
        return Encoding(implicit=False, big_endian=around.big_endian)
    if is_vr(code) or first[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return around  # as announced, or empty: a delimiter has no VR
    return Encoding(implicit=True, big_endian=around.big_endian)


def inner_encoding(vr: bytes, around: Encoding) -> Encoding:
    """Return how the items of a sequence that is written with *vr* are written."""
    return WITHIN_UNKNOWN if vr == b"UN" else around


def skip(window: Window, position: int, encoding: Encoding) -> int:
    """Return the position behind a value of undefined length (PS3.5 7.5.2, A.4).

    Args:
        position: where the value begins: its first item, or its delimiter.
        encoding: that of its items.

    Raises:
        SpliceError: it does not end, or holds what cannot be there.
    """
    # One entry for each open sequence or item: whether it is an item, and its encoding.
    nested: list[tuple[bool, Encoding]] = [(False, encoding)]
    while nested:
        in_item, encoding = nested[-1]
        head = window.head(position, encoding)
        position = head.value
        if not in_item:
            if head.tag == SEQUENCE_END:
                nested.pop()
            elif head.tag != ITEM:
                raise SpliceError("not an item")
            elif head.length == UNDEFINED:
                nested.append((True, item_encoding(window, position, UNDEFINED, encoding)))
            else:
                position += head.length
        elif head.tag == ITEM_END:
            nested.pop()
        elif head.tag >> 16 == 0xFFFE:
            raise SpliceError("item without a sequence")
        elif head.length == UNDEFINED:
            nested.append((False, inner_encoding(head.vr, encoding)))
        else:
            position += head.length
        if len(nested) > MAX_DEPTH:
            raise SpliceError("nested too deeply")
    return position
