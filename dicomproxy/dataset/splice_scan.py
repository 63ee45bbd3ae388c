"""Finding the top-level elements of a data set, and reading a few of them. Pure.

Elements are stepped over by their lengths; where each begins is remembered,
and what was asked for is read. Rules kept: any bytes whatever give a
:class:`Header` or :class:`SpliceError`; what is cut off or garbled is an error
before and in what was asked for, and left alone behind it, once what is
required was there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from dicomproxy.dataset.header import IMPLICIT_VR_LITTLE_ENDIAN, LONG_VRS, SHORT_VRS
from dicomproxy.dataset.identifier import Element, Identifier, IdentifierError, vr_of
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET
from dicomproxy.dataset.splice_walk import (
    UNDEFINED,
    Encoding,
    Read,
    SpliceError,
    Window,
    inner_encoding,
    is_vr,
    skip,
    top_encoding,
)

_MAX_ELEMENTS: Final = 250_000
"""At the top level, where each is remembered."""
_MAX_VALUE_BYTES: Final = 1024 * 1024
_MAX_SEQUENCE_BYTES: Final = 16 * 1024 * 1024

_IMPLICIT: Final = {False: Struct("<HHL").unpack_from, True: Struct(">HHL").unpack_from}
_EXPLICIT: Final = {False: Struct("<HH2sH").unpack_from, True: Struct(">HH2sH").unpack_from}
_LONG: Final = {False: Struct("<L").unpack_from, True: Struct(">L").unpack_from}
_BELIEVED: Final = (SHORT_VRS | LONG_VRS) - {b"UN"}
_BEYOND: Final = 0xFFFFFFFE
"""The length of an element whose length is cut off: more than there can be."""
_SWAPPED: Final = frozenset({"US", "SS", "AT", "UL", "SL", "FL", "UV", "SV", "FD"})


@dataclass(frozen=True, slots=True)
class Header:
    """What has been seen of a data set.

    Args:
        encoding: how it is really written.
        tags: of its top-level elements, in the order of the file.
        starts: where each of them begins; it ends where the next one begins.
        end: where stepping over them ended; what follows is copied.
        reach: the largest tag that would have been seen.
        raw: the elements that were asked for, as they are encoded, by tag.
    """

    read: Read
    size_bytes: int
    encoding: Encoding
    tags: Sequence[int]
    starts: Sequence[int]
    end: int
    reach: int
    ordered: bool
    raw: Sequence[bytes]

    def start(self, number: int) -> int:
        """Return where the element of that place in the file begins, or where all end."""
        return self.starts[number] if number < len(self.starts) else self.end

    def numbers(self, tag: int) -> Sequence[int]:
        """Return the places at which *tag* stands; several only where order is broken."""
        if self.ordered:
            number = bisect_left(self.tags, tag)
            there = number < len(self.tags) and self.tags[number] == tag
            return (number,) if there else ()
        return [number for number, other in enumerate(self.tags) if other == tag]

    def view(self) -> Identifier:
        """Return the elements that were asked for, decoded.

        Raises:
            SpliceError: a value is too long, or a sequence cannot be read.
        """
        return _view(self.raw, self.encoding)


def scan(
    read: Read,
    size_bytes: int,
    transfer_syntax_uid: str,
    wanted: Collection[int],
    required: Collection[int] = (),
    further: Collection[int] = (),
) -> Header:
    """Find the top-level elements of a data set, and read those of *wanted*.

    Stepping ends at the first value of undefined length behind the last wanted
    tag, unless elements are out of order, one of *required* was not found until
    there, or one of *further* was: then the whole data set is searched.

    Args:
        size_bytes: of the data set.
        transfer_syntax_uid: not the deflated one; see :class:`Rewriter`.
        wanted: tags of which at least one is named.
        required: of them those without which a data set is suspicious, and is not
            taken where it breaks off.
        further: tags that are read as well where stepping gets to them.

    Raises:
        SpliceError: the bytes are no data set, or a wanted value is too long.
    """
    window = Window(read)
    encoding = top_encoding(window, size_bytes, transfer_syntax_uid)
    wanted, further = frozenset(wanted), frozenset(further)
    steps = _Steps(window, size_bytes, encoding, wanted, required, further)
    steps.walk()
    return Header(
        read,
        size_bytes,
        encoding,
        steps.tags,
        steps.starts,
        steps.end,
        0xFFFFFFFF if steps.end >= size_bytes else steps.limit,
        steps.ordered,
        _raw(window, steps, wanted, further),
    )


class _Steps:
    """From element to element, until nothing of interest can follow."""

    def __init__(
        self,
        window: Window,
        size_bytes: int,
        encoding: Encoding,
        wanted: Collection[int],
        required: Collection[int],
        further: Collection[int],
    ) -> None:
        self._window = window
        self._size_bytes = size_bytes
        self._encoding = encoding
        self._wanted = wanted
        self._required = required
        self._further = further
        self.limit = max(wanted)
        self.tags: list[int] = []
        self.starts: list[int] = []
        self.end = 0
        self.ordered = True
        self._passed = False
        self._thorough = False

    def walk(self) -> None:
        # Most of what a splice costs is this loop, so heads are taken apart in place.
        window, tags, starts, limit = self._window, self.tags, self.starts, self.limit
        implicit, big_endian = self._encoding
        unpack_implicit, unpack_explicit = _IMPLICIT[big_endian], _EXPLICIT[big_endian]
        unpack_long, short_vrs = _LONG[big_endian], SHORT_VRS
        base, data, at, last, vr = window.start, window.data, 0 - window.start, -1, b""
        size = len(data)
        while True:
            if at + 12 > size:
                if self._ends(base + at):
                    return
                at = window.at(base + at, min(12, self._size_bytes - base - at))
                base, data, size = window.start, window.data, len(window.data)
            start = base + at
            if implicit:
                group, number, length = unpack_implicit(data, at)
                at += 8
            else:
                group, number, vr, length = unpack_explicit(data, at)
                if vr in short_vrs:
                    at += 8
                elif not is_vr(vr):
                    _, _, length = unpack_implicit(data, at)
                    vr = b""
                    at += 8
                elif at + 12 <= size:
                    (length,) = unpack_long(data, at + 8)
                    at += 12
                else:
                    length, at = _BEYOND, at + 12
            tag = group << 16 | number
            if not last < tag <= limit and self._stops(tag, last, start, length):
                return
            tags.append(tag)
            starts.append(start)
            last = tag
            if length != UNDEFINED or vr in short_vrs:
                at += length
                continue
            position = self._behind(base + at, start, vr)
            if position < 0:
                return
            base, data, size = window.start, window.data, len(window.data)
            at = position - base

    def _ends(self, position: int) -> bool:
        """Tell whether no element begins at *position*."""
        left = self._size_bytes - position
        if left >= 8:
            if len(self.tags) > _MAX_ELEMENTS:
                raise SpliceError("too many elements")
            return False
        self.end = position
        if left < 0:
            # The last element is cut off. Pixels may be, what is edited may not.
            if not self._may_break_off() or self.tags[-1] in self._wanted:
                raise SpliceError("truncated element")
            self._drop_last()
        elif left and not self._passed and any(self._window.bytes(position, left)):
            raise SpliceError("truncated element")
        return True

    def _may_break_off(self) -> bool:
        """Tell whether all that matters has been seen: it is not somewhere in the rest."""
        return self._passed and self._has_required()

    def _has_required(self) -> bool:
        return set(self._required) <= set(self.tags)

    def _drop_last(self) -> None:
        self.tags.pop()
        self.end = self.starts.pop()

    def _stops(self, tag: int, last: int, start: int, length: int) -> bool:
        """Tell whether an element out of order or behind what is wanted ends the walk."""
        self.end = start
        if not tag or tag >> 16 == 0xFFFE:
            if self._may_break_off() or (not tag and not length):
                return True
            raise SpliceError("not a data set")
        if tag <= last:
            self.ordered = False
        if tag > self.limit:
            if not self._passed:
                self._passed = True
                self._thorough = not self._has_required()
            if tag in self._further:
                self._thorough = True
            if length == UNDEFINED and self.ordered and not self._thorough:
                return True
        return False

    def _behind(self, value: int, start: int, vr: bytes) -> int:
        """Return the position behind a value of undefined length, -1 if it does not end."""
        try:
            return skip(self._window, value, inner_encoding(vr, self._encoding))
        except SpliceError:
            if not self._may_break_off() or self.tags[-1] in self._wanted:
                raise
        self._drop_last()
        return -1


def _raw(
    window: Window, steps: _Steps, wanted: Collection[int], further: Collection[int]
) -> list[bytes]:
    """Return the wanted elements by tag; of several with one tag the last counts."""
    raw = []
    starts = [*steps.starts, steps.end]
    found = [number for number, tag in enumerate(steps.tags) if tag in wanted or tag in further]
    if not steps.ordered:
        last = {steps.tags[number]: number for number in found}
        found = [last[tag] for tag in sorted(last)]
    for number in found:
        start, size = starts[number], starts[number + 1] - starts[number]
        if size > _MAX_SEQUENCE_BYTES:
            raise SpliceError("element too long")
        raw.append(window.bytes(start, size))
    return raw


def _view(raw: Sequence[bytes], encoding: Encoding) -> Identifier:
    decoded = []
    charset = None
    for data in raw:
        tag, code, at, length = Window(_reading(data)).head(0, encoding)
        vr = code.decode("ascii") if code in _BELIEVED else vr_of(tag)
        if vr != "SQ" and length != UNDEFINED and not (encoding.big_endian and vr in _SWAPPED):
            if length > _MAX_VALUE_BYTES:
                raise SpliceError("value too long")
            element = Element(tag, vr, data[at:])
            if tag == SPECIFIC_CHARACTER_SET:
                charset = element
            else:
                decoded.append(element)
            continue
        decoded.extend(_sequence(data, at, encoding))
    view = Identifier(decoded)
    if charset is not None:
        view.put(charset)  # last, so that items inherit it
    return view


def _sequence(data: bytes, at: int, encoding: Encoding) -> Identifier:
    try:
        return Identifier.decode(data, encoding.transfer_syntax_uid)
    except IdentifierError:
        if encoding.implicit or encoding.big_endian:
            raise SpliceError("a sequence that cannot be read") from None
    try:
        # Its items have implicit VRs, as those of some writers do: so let it be all implicit.
        return Identifier.decode(data[:4] + data[at - 4 :], IMPLICIT_VR_LITTLE_ENDIAN)
    except IdentifierError:
        raise SpliceError("a sequence that cannot be read") from None


def _reading(data: bytes) -> Read:
    return lambda offset, size: data[offset : offset + size]
