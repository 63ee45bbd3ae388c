"""Rewriting a data set's header without decoding the object. Pure.

Edits of top-level elements become patches: the new data set is a sequence of
new bytes and of ranges of the original, with its size known before the first
byte is sent. What nobody changes is copied as it is, pixels above all, whatever
its transfer syntax, its order or its odd encoding.

Rules kept: a group length in a changed group is dropped, since it would be
wrong; of an element that stands there several times, an edit leaves one. Memory
in use follows what is edited, not the object.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.identifier import Element, Identifier
from dicomproxy.dataset.splice_deflated import Inflated, deflate
from dicomproxy.dataset.splice_scan import Header, scan
from dicomproxy.dataset.splice_text import Patch, to_unicode
from dicomproxy.dataset.splice_walk import Encoding, Read, SpliceError, Window

__all__ = [
    "Copy",
    "Decision",
    "Edits",
    "Header",
    "Read",
    "Rewriter",
    "Rewritten",
    "Splice",
    "SpliceError",
    "scan",
    "splice",
]

Edits = Mapping[int, Element | None]
"""By tag the new element, in little endian as identifiers hold it, or None to remove it."""

_LENGTH_TO_END: Final = 0x00080001
_MATERIALISED_BYTES: Final = 4 * 1024
"""A shorter range between two patches is copied at once, rather than read again when sent."""

CHUNK_BYTES: Final = 256 * 1024

_MOST_REMEMBERED: Final = 32
_MOST_REMEMBERED_BYTES: Final = 32 * 1024
_MOST_LAYOUTS: Final = 4
_MOST_LAID_OUT: Final = 2_000
"""Elements of a layout that is remembered."""


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
            character set that the header declares, which has to be among what
            was read of it; the new one is itself one of the edits.

    Raises:
        SpliceError: a text that is to be converted cannot be read.
        ValueError: an edit of the file meta group, or of an element that is out of reach.
    """
    terms = header.view().specific_character_set if unicode else None
    return _splice(header, _encoded(edits, header.encoding), terms)


def _encoded(edits: Edits, encoding: Encoding) -> dict[int, bytes]:
    """Encode new elements, in the order of their tags; a removed one is nothing."""
    uid = encoding.transfer_syntax_uid
    encoded = {}
    for tag in sorted(edits):
        if tag < 0x00080000 or not tag & 0xFFFF:
            raise ValueError("not an element of a data set")
        element = edits[tag]
        encoded[tag] = b"" if element is None else Identifier((element,)).encode(uid)
    return encoded


def _splice(header: Header, edits: Mapping[int, bytes], terms: tuple[str, ...] | None) -> Splice:
    """Make encoded *edits*; with *terms* all other text becomes Unicode from those."""
    places, changed = _places(header, edits)
    if terms is None:
        return _at(header, _sorted(places + _lengths(header, changed, edits)))
    texts, groups = to_unicode(
        Window(header.read),
        header.size_bytes,
        header.encoding,
        [start for tag, start in zip(header.tags, header.starts, strict=True) if tag not in edits],
        header.end,
        terms,
    )
    places += _lengths(header, changed | groups, edits)
    return _at(header, _sorted(places), texts)


class _Place(NamedTuple):
    """What stands in place of the elements from the one numbered *first* to before *end*."""

    first: int
    end: int
    new: bytes


def _at(header: Header, places: Iterable[_Place], texts: Sequence[Patch] = ()) -> Splice:
    """Find *places* in the bytes of a data set, and put what is new there."""
    starts = (*header.starts, header.end)
    patches = [Patch(starts[first], starts[end], new) for first, end, new in places]
    if texts:
        patches += texts
        patches.sort(key=_start)  # stable, as below
    return Splice(header.read, _segments(header, patches))


def _start(patch: Patch) -> int:
    return patch.start


def _sorted(places: list[_Place]) -> list[_Place]:
    """Bring *places* in the order of the file, those that touch as one."""
    made: list[_Place] = []
    # Stable: what is inserted before an element precedes what replaces it.
    for place in sorted(places, key=lambda place: place.first):
        if made and made[-1].end == place.first:
            made[-1] = _Place(made[-1].first, place.end, made[-1].new + place.new)
        else:
            made.append(place)
    return made


def _lengths(header: Header, changed: Collection[int], edits: Mapping[int, bytes]) -> list[_Place]:
    """Drop the lengths of groups that have changed."""
    lengths = {group << 16 for group in changed}
    if 0x0008 in changed and _LENGTH_TO_END not in edits:
        lengths.add(_LENGTH_TO_END)
    return [_Place(number, number + 1, b"") for tag in lengths for number in header.numbers(tag)]


def _places(header: Header, edits: Mapping[int, bytes]) -> tuple[list[_Place], set[int]]:
    places: list[_Place] = []
    changed: set[int] = set()
    for tag, new in edits.items():
        there = header.numbers(tag)
        if not there and not new:
            continue
        changed.add(tag >> 16)
        if not there:
            if header.ordered:
                at = bisect_right(header.tags, tag)
            else:
                later = (number for number, other in enumerate(header.tags) if other > tag)
                at = next(later, len(header.tags))
            if at == len(header.tags) and tag > header.reach:
                raise ValueError("an element beyond what was scanned")
            places.append(_Place(at, at, new))
            continue
        for number in there:
            places.append(_Place(number, number + 1, new))
            new = b""
    return places, changed


def _segments(header: Header, patches: list[Patch]) -> Iterator[bytes | Copy]:
    """Yield the segments; short ranges between patches become new bytes with them."""
    window = Window(header.read)
    pending: list[bytes | bytearray] = []
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


class _Decided:
    """What was decided of one header, for those that are equal in all that is looked at.

    Where edits go is the same in all that have the same elements, however long.
    """

    __slots__ = ("_edits", "_layouts", "_terms")

    def __init__(self, edits: Mapping[int, bytes], terms: tuple[str, ...] | None) -> None:
        self._edits = edits
        self._terms = terms
        self._layouts: dict[tuple[int, Sequence[int]], list[_Place]] = {}

    def splice(self, header: Header) -> Splice:
        if self._terms is not None or not header.ordered or len(header.tags) > _MOST_LAID_OUT:
            return _splice(header, self._edits, self._terms)
        layout = header.reach, tuple(header.tags)
        places = self._layouts.get(layout)
        if places is None:
            found, changed = _places(header, self._edits)
            places = _sorted(found + _lengths(header, changed, self._edits))
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[layout] = places
        return _at(header, places)


class Rewriter:
    """Rewrites data sets as a rule over their headers says.

    What the rule says is remembered for headers that are equal in all that it is
    shown, as those of a series mostly are.

    Args:
        wanted: tags of the elements that *decide* is shown.
        decide: the rule. It depends on nothing but its argument.
        required: as for :func:`scan`.
        further: likewise; *decide* is shown those that were found.
    """

    def __init__(
        self,
        wanted: Collection[int],
        decide: Callable[[Identifier], Decision],
        required: Collection[int] = (),
        further: Collection[int] = (),
    ) -> None:
        self._wanted = wanted if isinstance(wanted, frozenset) else frozenset(wanted)
        self._decide = decide
        self._required = required
        self._further = frozenset(further)
        self._remembered: dict[tuple[Encoding, bytes], _Decided] = {}

    def rewrite(self, read: Read, size_bytes: int, transfer_syntax_uid: str) -> Rewritten:
        """Return a data set with the changes that its header asks for.

        What is needed of the original is read at once, the rest while chunks are
        taken. A deflated data set is inflated and deflated again, piece by piece:
        that takes time in proportion to its size.

        Raises:
            SpliceError: the data set cannot be rewritten.
        """
        deflated = transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN
        if deflated:
            inflated = Inflated(read)
            read, size_bytes = inflated.read, inflated.size_bytes
            transfer_syntax_uid = EXPLICIT_VR_LITTLE_ENDIAN
        header = scan(
            read, size_bytes, transfer_syntax_uid, self._wanted, self._required, self._further
        )
        spliced = self._decided(header).splice(header)
        return _DeflatedSplice(spliced) if deflated else spliced

    def _decided(self, header: Header) -> _Decided:
        # Elements say where they end, so that no two lists of them are the same bytes.
        key = header.encoding, b"".join(header.raw)
        known = self._remembered.get(key)
        if known is None:
            view = header.view()
            edits, unicode = self._decide(view)
            terms = view.specific_character_set if unicode else None
            known = _Decided(_encoded(edits, header.encoding), terms)
            if len(key[1]) <= _MOST_REMEMBERED_BYTES:
                if len(self._remembered) >= _MOST_REMEMBERED:
                    self._remembered.clear()
                self._remembered[key] = known
        return known
