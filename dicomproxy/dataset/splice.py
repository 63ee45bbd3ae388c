"""Rewriting a data set's header without decoding the object. Pure.

The top-level elements up to the last one of interest are stepped over, a few
are decoded, and edits become patches: the new data set is a sequence of new
bytes and of ranges of the original, with its size known before the first byte
is sent. What nobody changes is copied as it is, pixels above all, whatever its
transfer syntax, its order or its odd encoding.

Rules kept: a group length in a changed group is dropped, since it would be
wrong; of an element that stands there several times, an edit leaves one. Memory
in use follows what is edited, not the object.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple, Protocol

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    LONG_VRS,
    SHORT_VRS,
)
from dicomproxy.dataset.identifier import Element, Identifier, IdentifierError, vr_of
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET
from dicomproxy.dataset.splice_deflated import Inflated, deflate
from dicomproxy.dataset.splice_text import Patch, to_unicode
from dicomproxy.dataset.splice_walk import (
    MAX_ELEMENTS,
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

__all__ = [
    "Copy",
    "Decision",
    "Edits",
    "Header",
    "Read",
    "Rewritten",
    "Splice",
    "SpliceError",
    "rewrite",
    "scan",
    "splice",
]

Edits = Mapping[int, Element | None]
"""By tag the new element, in little endian as identifiers hold it, or None to remove it."""

_LENGTH_TO_END: Final = 0x00080001
_MAX_VALUE_BYTES: Final = 1024 * 1024
_MAX_SEQUENCE_BYTES: Final = 16 * 1024 * 1024
_MATERIALISED_BYTES: Final = 4 * 1024
"""A shorter range between two patches is copied at once, rather than read again when sent."""

CHUNK_BYTES: Final = 256 * 1024

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
        places: by tag its place in both; where a tag stands several times, the last.
        end: where stepping over them ended; what follows is copied.
        reach: the largest tag that would have been seen.
        view: the elements that were asked for, decoded.
    """

    read: Read
    size_bytes: int
    encoding: Encoding
    tags: Sequence[int]
    starts: Sequence[int]
    places: Mapping[int, int]
    end: int
    reach: int
    ordered: bool
    view: Identifier

    def start(self, number: int) -> int:
        """Return where the element of that place in the file begins, or where all end."""
        return self.starts[number] if number < len(self.starts) else self.end

    def numbers(self, tag: int) -> Sequence[int]:
        """Return the places at which *tag* stands; several only where order is broken."""
        if tag not in self.places:
            return ()
        if self.ordered:
            return (self.places[tag],)
        return [number for number, other in enumerate(self.tags) if other == tag]


# -------------------------------------------------------------------- scanning


def scan(
    read: Read,
    size_bytes: int,
    transfer_syntax_uid: str,
    wanted: Collection[int],
    required: Collection[int] = (),
) -> Header:
    """Find the top-level elements of a data set, and decode those of *wanted*.

    Stepping ends at the first value of undefined length behind the last wanted
    tag, unless elements are out of order or one of *required* was not found
    until there: then the whole data set is searched.

    Args:
        size_bytes: of the data set.
        transfer_syntax_uid: not the deflated one; see :func:`rewrite`.
        wanted: tags of which at least one is named.

    Raises:
        SpliceError: the bytes are no data set, or a wanted value is too long.
    """
    window = Window(read)
    encoding = top_encoding(window, size_bytes, transfer_syntax_uid)
    steps = _Steps(window, size_bytes, encoding, wanted, required)
    steps.walk()
    places = dict(zip(steps.tags, range(len(steps.tags)), strict=True))
    view = _view(window, encoding, steps, places, wanted)
    return Header(
        read,
        size_bytes,
        encoding,
        steps.tags,
        steps.starts,
        places,
        steps.end,
        0xFFFFFFFF if steps.end >= size_bytes else steps.limit,
        steps.ordered,
        view,
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
    ) -> None:
        self._window = window
        self._size_bytes = size_bytes
        self._encoding = encoding
        self._wanted = wanted
        self._required = required
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
            return False
        self.end = position
        if left < 0:
            # The last element is cut off. Pixels may be, what is edited may not.
            if not self._passed or self.tags[-1] in self._wanted:
                raise SpliceError("truncated element")
            self._drop_last()
        elif left and not self._passed and any(self._window.bytes(position, left)):
            raise SpliceError("truncated element")
        return True

    def _drop_last(self) -> None:
        self.tags.pop()
        self.end = self.starts.pop()

    def _stops(self, tag: int, last: int, start: int, length: int) -> bool:
        """Tell whether an element out of order or behind what is wanted ends the walk."""
        if len(self.tags) > MAX_ELEMENTS:
            raise SpliceError("too many elements")
        self.end = start
        if not tag or tag >> 16 == 0xFFFE:
            if self._passed or (not tag and not length):
                return True
            raise SpliceError("not a data set")
        if tag <= last:
            self.ordered = False
        if tag > self.limit:
            if not self._passed:
                self._passed = True
                self._thorough = not set(self._required) <= set(self.tags)
            if length == UNDEFINED and self.ordered and not self._thorough:
                return True
        return False

    def _behind(self, value: int, start: int, vr: bytes) -> int:
        """Return the position behind a value of undefined length, -1 if it does not end."""
        try:
            return skip(self._window, value, inner_encoding(vr, self._encoding))
        except SpliceError:
            if not self._passed or self.tags[-1] in self._wanted:
                raise
        self._drop_last()
        return -1


def _view(
    window: Window,
    encoding: Encoding,
    steps: _Steps,
    places: Mapping[int, int],
    wanted: Collection[int],
) -> Identifier:
    """Decode the wanted elements; of several with one tag the last counts."""
    decoded = []
    charset = None
    ends = [*steps.starts[1:], steps.end]
    for number in sorted(places[tag] for tag in wanted if tag in places):
        tag, start, end = steps.tags[number], steps.starts[number], ends[number]
        _, code, value, length = window.head(start, encoding)
        vr = code.decode("ascii") if code in _BELIEVED else vr_of(tag)
        if vr != "SQ" and length != UNDEFINED and not (encoding.big_endian and vr in _SWAPPED):
            if length > _MAX_VALUE_BYTES:
                raise SpliceError("value too long")
            element = Element(tag, vr, window.bytes(value, length))
            if tag == SPECIFIC_CHARACTER_SET:
                charset = element
            else:
                decoded.append(element)
            continue
        if end - start > _MAX_SEQUENCE_BYTES:
            raise SpliceError("sequence too long")
        try:
            alone = Identifier.decode(
                window.bytes(start, end - start), encoding.transfer_syntax_uid
            )
        except IdentifierError:
            raise SpliceError("a sequence that cannot be read") from None
        decoded.extend(alone)
    view = Identifier(decoded)
    if charset is not None:
        view.put(charset)  # last, so that items inherit it
    return view


# -------------------------------------------------------------------- splicing


@dataclass(frozen=True, slots=True)
class Copy:
    """A range of the original data set."""

    offset: int
    size: int


class Rewritten(Protocol):
    """A rewritten data set: how long it is, and its bytes in order."""

    @property
    def total_bytes(self) -> int: ...

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield all bytes, at most *chunk_bytes* at a time."""
        ...


class Splice:
    """New bytes and ranges of the original, one after the other."""

    __slots__ = ("_ends", "_read", "segments", "total_bytes")

    def __init__(self, read: Read, segments: Iterable[bytes | Copy]) -> None:
        self._read = read
        self.segments = tuple(segments)
        self._ends: list[int] = []
        self.total_bytes = 0
        for segment in self.segments:
            self.total_bytes += segment.size if isinstance(segment, Copy) else len(segment)
            self._ends.append(self.total_bytes)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the rewritten data set, fewer at its end."""
        parts = []
        at = bisect_right(self._ends, offset)
        while size > 0 and at < len(self.segments):
            segment = self.segments[at]
            length = segment.size if isinstance(segment, Copy) else len(segment)
            inside = offset - (self._ends[at] - length)
            taken = min(size, length - inside)
            if isinstance(segment, Copy):
                part = self._read(segment.offset + inside, taken)
            else:
                part = segment[inside : inside + taken]
            parts.append(part)
            if len(part) < taken:
                break  # the original has become shorter
            offset, size, at = offset + taken, size - taken, at + 1
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield all bytes in order, at most *chunk_bytes* at a time.

        Raises:
            SpliceError: the original has become shorter.
        """
        for offset in range(0, self.total_bytes, chunk_bytes):
            chunk = self.read(offset, chunk_bytes)
            if len(chunk) < min(chunk_bytes, self.total_bytes - offset):
                raise SpliceError("truncated")
            yield chunk


def splice(header: Header, edits: Edits, *, unicode: bool = False) -> Splice:
    """Return the data set with *edits* made.

    An element of a tag that is not there is inserted before the first one with
    a larger tag.

    Args:
        unicode: convert every text that is not edited to ISO_IR 192 too, from the
            character set that the header declares; the new Specific Character
            Set is itself one of the edits.

    Raises:
        SpliceError: a text that is to be converted cannot be read.
        ValueError: an edit of the file meta group, or of an element that is out of reach.
    """
    patches, changed = _patches(header, edits)
    if unicode:
        texts, groups = to_unicode(
            Window(header.read),
            header.size_bytes,
            header.encoding,
            [
                start
                for tag, start in zip(header.tags, header.starts, strict=True)
                if tag not in edits
            ],
            header.end,
            header.view.specific_character_set,
        )
        patches += texts
        changed |= groups
    lengths = {group << 16 for group in changed}
    if 0x0008 in changed and _LENGTH_TO_END not in edits:
        lengths.add(_LENGTH_TO_END)
    patches += [
        Patch(header.starts[number], header.start(number + 1), b"")
        for tag in lengths
        for number in header.numbers(tag)
    ]
    # Stable: what is inserted before an element precedes what replaces it.
    patches.sort(key=_start)
    return Splice(header.read, _segments(header, patches))


def _start(patch: Patch) -> int:
    return patch.start


def _patches(header: Header, edits: Edits) -> tuple[list[Patch], set[int]]:
    uid = header.encoding.transfer_syntax_uid
    patches: list[Patch] = []
    changed: set[int] = set()
    for tag in sorted(edits):
        if tag < 0x00080000 or not tag & 0xFFFF:
            raise ValueError("not an element of a data set")
        element = edits[tag]
        there = header.numbers(tag)
        if not there and element is None:
            continue
        new = b"" if element is None else Identifier((element,)).encode(uid)
        changed.add(tag >> 16)
        if not there:
            if header.ordered:
                at = bisect_right(header.tags, tag)
            else:
                later = (number for number, other in enumerate(header.tags) if other > tag)
                at = next(later, len(header.tags))
            if at == len(header.tags) and tag > header.reach:
                raise ValueError("an element beyond what was scanned")
            patches.append(Patch(header.start(at), header.start(at), new))
            continue
        for number in there:
            patches.append(Patch(header.starts[number], header.start(number + 1), new))
            new = b""
    return patches, changed


def _segments(header: Header, patches: list[Patch]) -> Iterator[bytes | Copy]:
    """Yield the segments; short ranges between patches become new bytes with them."""
    window = Window(header.read)
    pending: list[bytes] = []
    position = 0
    for start, end, new in patches:
        size = start - position
        if size <= _MATERIALISED_BYTES:
            if size:
                pending.append(window.bytes(position, size))
        else:
            if pending:
                yield b"".join(pending)
                pending = []
            yield Copy(position, size)
        if new:
            pending.append(new)
        position = end
    if pending:
        yield b"".join(pending)
    if position < header.size_bytes:
        yield Copy(position, header.size_bytes - position)


# ------------------------------------------------------------------- the whole


class Decision(NamedTuple):
    """What is to be changed, and whether all text becomes Unicode."""

    edits: Edits
    unicode: bool = False


class _DeflatedSplice:
    """A splice that is deflated as it is read, and once before to know its size."""

    __slots__ = ("_splice", "total_bytes")

    def __init__(self, spliced: Splice) -> None:
        self._splice = spliced
        self.total_bytes = sum(map(len, self.chunks()))

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        return deflate(self._splice.chunks(), chunk_bytes)


def rewrite(
    read: Read,
    size_bytes: int,
    transfer_syntax_uid: str,
    wanted: Collection[int],
    decide: Callable[[Identifier], Decision],
    required: Collection[int] = (),
) -> Rewritten:
    """Return the data set with the changes that *decide* makes of its header.

    A deflated data set is inflated and deflated again, piece by piece; that
    takes time in proportion to its size, so do it in a thread.

    Args:
        wanted: tags that *decide* is shown.
        required: as for :func:`scan`.

    Raises:
        SpliceError: the data set cannot be rewritten.
    """
    deflated = transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
    if deflated:
        inflated = Inflated(read)
        read, size_bytes = inflated.read, inflated.size_bytes
        transfer_syntax_uid = EXPLICIT_VR_LITTLE_ENDIAN
    header = scan(read, size_bytes, transfer_syntax_uid, wanted, required)
    edits, unicode = decide(header.view)
    spliced = splice(header, edits, unicode=unicode)
    return _DeflatedSplice(spliced) if deflated else spliced
