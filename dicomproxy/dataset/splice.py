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
_SWAPPED: Final = frozenset({"US", "SS", "AT", "UL", "SL", "FL", "UV", "SV", "FD"})


class Found(NamedTuple):
    """Where a top-level element is: its head, its value, and what follows it."""

    tag: int
    vr: bytes
    start: int
    value: int
    end: int
    defined: bool


@dataclass(frozen=True, slots=True)
class Header:
    """What has been seen of a data set.

    Args:
        encoding: how it is really written.
        elements: where its top-level elements are, in the order of the file.
        end: where stepping over them ended; what follows is copied.
        reach: the largest tag that would have been seen.
        view: the elements that were asked for, decoded.
    """

    read: Read
    size_bytes: int
    encoding: Encoding
    elements: Sequence[Found]
    end: int
    reach: int
    ordered: bool
    view: Identifier


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
    implicit, big_endian = encoding
    unpack_implicit, unpack_explicit = _IMPLICIT[big_endian], _EXPLICIT[big_endian]
    unpack_long, short_vrs = _LONG[big_endian], SHORT_VRS
    elements: list[Found] = []
    limit, last = max(wanted), -1
    ordered, passed, thorough = True, False, False
    position, vr, data, size = 0, b"", window.data, len(window.data)
    # Most of what a splice costs is this loop, so heads are taken apart in place.
    while position < size_bytes:
        if len(elements) > MAX_ELEMENTS:
            raise SpliceError("too many elements")
        at = position - window.start
        if at + 12 > size:
            available = min(12, size_bytes - position)
            if available < 8:
                if passed or not any(window.bytes(position, available)):
                    break  # padding, or something cut off
                raise SpliceError("truncated element")
            at = window.at(position, available)
            data, size = window.data, len(window.data)
        start = position
        if implicit:
            group, number, length = unpack_implicit(data, at)
            position += 8
        else:
            group, number, vr, length = unpack_explicit(data, at)
            if vr in short_vrs:
                position += 8
            elif is_vr(vr):
                if at + 12 > size:
                    raise SpliceError("truncated element")
                (length,) = unpack_long(data, at + 8)
                position += 12
            else:
                _, _, length = unpack_implicit(data, at)
                vr, position = b"", position + 8
        tag = group << 16 | number
        if tag <= last:
            ordered = False
        if tag > limit and not passed and group != 0xFFFE:
            passed = True
            thorough = not all(any(one.tag == tag for one in elements) for tag in required)
        last = tag
        value, defined = position, True
        if not tag or group == 0xFFFE or (length > size_bytes - position and length != UNDEFINED):
            if passed or (not tag and not length):
                position = start
                break
            raise SpliceError("not a data set")
        if length != UNDEFINED or vr in short_vrs:
            position += length
        elif passed and ordered and not thorough:
            position = start
            break
        else:
            defined = False
            try:
                position = skip(window, position, inner_encoding(vr, encoding))
            except SpliceError:
                if not passed:
                    raise
                position = start
                break
            data, size = window.data, len(window.data)
        elements.append(Found(tag, vr, start, value, position, defined))
    view = _view(window, encoding, elements, wanted)
    reach = 0xFFFFFFFF if position >= size_bytes else limit
    return Header(read, size_bytes, encoding, elements, position, reach, ordered, view)


def _view(
    window: Window, encoding: Encoding, elements: list[Found], wanted: Collection[int]
) -> Identifier:
    """Decode the wanted elements; of several with one tag the last counts."""
    decoded = []
    charset = None
    for found in elements:
        tag = found.tag
        if tag not in wanted:
            continue
        vr = found.vr.decode("ascii") if found.vr in _BELIEVED else vr_of(tag)
        size = found.end - found.value
        if vr != "SQ" and found.defined and not (encoding.big_endian and vr in _SWAPPED):
            if size > _MAX_VALUE_BYTES:
                raise SpliceError("value too long")
            element = Element(tag, vr, window.bytes(found.value, size))
            if tag == SPECIFIC_CHARACTER_SET:
                charset = element
                continue
            decoded.append(element)
            continue
        size = found.end - found.start
        if size > _MAX_SEQUENCE_BYTES:
            raise SpliceError("sequence too long")
        try:
            alone = Identifier.decode(window.bytes(found.start, size), encoding.transfer_syntax_uid)
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
            [one for one in header.elements if one.tag not in edits],
            header.end,
            header.view.specific_character_set,
        )
        patches += texts
        changed |= groups
    if changed:
        patches += [
            Patch(found.start, found.end, b"")
            for found in header.elements
            if (not found.tag & 0xFFFF and found.tag >> 16 in changed)
            or (found.tag == _LENGTH_TO_END and found.tag not in edits)
        ]
    # Stable: what is inserted before an element precedes what replaces it.
    patches.sort(key=_start)
    return Splice(header.read, _segments(header, patches))


def _start(patch: Patch) -> int:
    return patch.start


def _patches(header: Header, edits: Edits) -> tuple[list[Patch], set[int]]:
    places: dict[int, list[Found]] = {}
    for found in header.elements:
        if found.tag in edits:
            places.setdefault(found.tag, []).append(found)
    tags = [found.tag for found in header.elements]
    uid = header.encoding.transfer_syntax_uid
    patches: list[Patch] = []
    changed: set[int] = set()
    for tag in sorted(edits):
        if tag < 0x00080000 or not tag & 0xFFFF:
            raise ValueError("not an element of a data set")
        element = edits[tag]
        there = places.get(tag)
        if there is None and element is None:
            continue
        new = b"" if element is None else Identifier((element,)).encode(uid)
        changed.add(tag >> 16)
        if there is None:
            if header.ordered:
                at = bisect_right(tags, tag)
            else:
                at = next((n for n, other in enumerate(tags) if other > tag), len(tags))
            if at == len(tags) and tag > header.reach:
                raise ValueError("an element beyond what was scanned")
            start = header.elements[at].start if at < len(tags) else header.end
            patches.append(Patch(start, start, new))
            continue
        for found in there:
            patches.append(Patch(found.start, found.end, new))
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
