"""Every text of an encoded data set in ISO_IR 192, where it stands. Pure.

Only what is beyond plain ASCII is rewritten, with the lengths of the sequences
and items around it; all else stays as it is encoded. Text whose VR nobody can
know (private elements with implicit VRs, UN) is left alone, and so is a
sequence that cannot be read: what it says is lost to every reader alike. Bytes
that mean nothing in the declared character set become U+FFFD.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final, NamedTuple

from dicomproxy.dataset import charset
from dicomproxy.dataset.charset import TEXT_VRS
from dicomproxy.dataset.header import SHORT_VRS
from dicomproxy.dataset.identifier import vr_of
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET
from dicomproxy.dataset.splice_walk import (
    ITEM,
    ITEM_END,
    MAX_DEPTH,
    SEQUENCE_END,
    UNDEFINED,
    Encoding,
    Head,
    SpliceError,
    Window,
    inner_encoding,
    item_encoding,
    skip,
)

Terms = tuple[str, ...]

_MAX_TEXT_BYTES: Final = 16 * 1024 * 1024
_FOLDED_GAP_BYTES: Final = 1024
_FOLDED_BYTES: Final = 1024 * 1024
_LENGTH: Final = {False: Struct("<L").pack, True: Struct(">L").pack}
_SHORT_LENGTH: Final = {False: Struct("<H").pack, True: Struct(">H").pack}
_LONG_HEAD: Final = {False: Struct("<HH2sxxL").pack, True: Struct(">HH2sxxL").pack}


class Patch(NamedTuple):
    """What stands in place of the bytes from *start* to *end*."""

    start: int
    end: int
    new: bytes | bytearray


def to_unicode(
    window: Window,
    size_bytes: int,
    encoding: Encoding,
    known: Iterable[int],
    position: int,
    terms: Terms,
) -> tuple[list[Patch], set[int]]:
    """Return the patches that convert all text, and the groups whose top level they change.

    Args:
        known: where the top-level elements begin that are to be converted.
        position: where what is not known begins; it is stepped through up to its
            end, or to where it is no data set any more.
        terms: the character set that holds outside of items with their own.

    Raises:
        SpliceError: a text is too long, or there are too many elements.
    """
    texts = _Texts(window)
    groups: set[int] = set()
    for start in known:
        head = window.head(start, encoding)
        if head.tag & 0xFFFF and head.tag != SPECIFIC_CHARACTER_SET:
            before = len(texts.patches)
            try:
                texts.element(start, head, encoding, terms, 0)
            except _Unreadable:
                del texts.patches[before:]
            if len(texts.patches) > before:
                groups.add(head.tag >> 16)
    group_length: tuple[int, Patch] | None = None
    before = len(texts.patches)
    try:
        while position + 8 <= size_bytes:
            before, start = len(texts.patches), position
            head = texts.head(position, encoding)
            defined = head.length != UNDEFINED
            if not head.tag or (defined and head.length > size_bytes - head.value):
                break
            position, _ = texts.element(position, head, encoding, terms, 0)
            if not head.tag & 0xFFFF:
                group_length = head.tag, Patch(start, position, b"")
            elif (
                len(texts.patches) > before
                and group_length
                and group_length[0] == head.tag & 0xFFFF0000
            ):
                texts.patches.append(group_length[1])
                group_length = None
    except _Unreadable:
        del texts.patches[before:]
    return texts.patches, groups


def _start(patch: Patch) -> int:
    return patch.start


class _Unreadable(Exception):
    """The content of a sequence is not what it should be."""


class _Texts:
    def __init__(self, window: Window) -> None:
        self._window = window
        self.patches: list[Patch] = []

    def head(self, position: int, encoding: Encoding) -> Head:
        try:
            return self._window.head(position, encoding)
        except SpliceError:
            raise _Unreadable from None

    def element(
        self, start: int, head: Head, encoding: Encoding, terms: Terms, depth: int
    ) -> tuple[int, int]:
        """Convert an element; return the position behind it and by how much it has grown."""
        tag, code, value, length = head
        name = vr_of(tag) if code in (b"", b"UN") else code.decode("ascii")
        if length == UNDEFINED and code not in SHORT_VRS:
            if name in ("SQ", "UN") or code in (b"", b"UN"):
                inner = inner_encoding(code, encoding)
                return self._sequence(value, UNDEFINED, inner, terms, depth + 1)
            try:
                return skip(self._window, value, encoding), 0  # fragments
            except SpliceError:
                raise _Unreadable from None
        end = value + length
        if name in TEXT_VRS:
            return end, self._text(start, head, encoding, terms, name)
        if name != "SQ":
            return end, 0
        before = len(self.patches)
        try:
            inner = inner_encoding(code, encoding)
            _, growth = self._sequence(value, length, inner, terms, depth + 1)
        except _Unreadable:
            if code != b"UN":
                raise
            del self.patches[before:]
            return end, 0  # what a UN holds is anybody's guess
        if growth:
            self._resize(value, length + growth, encoding)
        return end, growth

    def _text(self, start: int, head: Head, encoding: Encoding, terms: Terms, name: str) -> int:
        tag, code, value, length = head
        if length > _MAX_TEXT_BYTES:
            raise SpliceError("text too long")
        try:
            old = self._window.bytes(value, length)
        except SpliceError:
            raise _Unreadable from None
        if old.isascii() and b"\x1b" not in old:
            return 0
        new = charset.encode(charset.decode(old, terms, name), charset.UTF8, name)
        new += b" " * (len(new) % 2)
        if new == old:
            return 0
        big_endian = encoding.big_endian
        if code not in SHORT_VRS:
            self.patches.append(
                Patch(value - 4, value + length, _LENGTH[big_endian](len(new)) + new)
            )
        elif len(new) <= 0xFFFF:
            size = _SHORT_LENGTH[big_endian](len(new))
            self.patches.append(Patch(value - 2, value + length, size + new))
        else:
            # Grown beyond its VR's length field: written as UN (PS3.5 6.2.2).
            longer = _LONG_HEAD[big_endian](tag >> 16, tag & 0xFFFF, b"UN", len(new))
            self.patches.append(Patch(start, value + length, longer + new))
            return len(longer) + len(new) - (value + length - start)
        return len(new) - length

    def _sequence(
        self, position: int, length: int, encoding: Encoding, terms: Terms, depth: int
    ) -> tuple[int, int]:
        if depth > MAX_DEPTH:
            raise _Unreadable
        end = position + length
        growth = 0
        begin = len(self.patches)
        while length == UNDEFINED or position < end:
            before = len(self.patches)
            head = self.head(position, encoding)
            if head.tag == SEQUENCE_END:
                position = head.value
                if length == UNDEFINED:
                    return position, growth
                continue
            if head.tag != ITEM:
                raise _Unreadable
            try:
                inner = item_encoding(self._window, head.value, head.length, encoding)
            except SpliceError:
                raise _Unreadable from None
            position, grown = self._item(head.value, head.length, inner, terms, depth)
            if grown and head.length != UNDEFINED:
                self._resize(head.value, head.length + grown, encoding)
            growth += grown
            self._fold(before, begin)
        if position != end:
            raise _Unreadable
        return position, growth

    def _fold(self, before: int, begin: int) -> None:
        """Join the patches of an item, from *before* on, to those of the items before it.

        Nothing between two of them changes any more. Thousands of items with a
        text each would else be thousands of patches, and many times their size.
        """
        fresh = self.patches[before:]
        del self.patches[before:]
        fresh.sort(key=_start)
        for patch in fresh:
            last = self.patches[-1] if len(self.patches) > begin else None
            gap = patch.start - last.end if last is not None else 0
            if (
                last is not None
                and isinstance(last.new, bytearray)
                and gap <= _FOLDED_GAP_BYTES
                and len(last.new) < _FOLDED_BYTES
            ):
                last.new.extend(self._window.bytes(last.end, gap) if gap else b"")
                last.new.extend(patch.new)
                self.patches[-1] = Patch(last.start, patch.end, last.new)
            else:
                self.patches.append(Patch(patch.start, patch.end, bytearray(patch.new)))

    def _item(
        self, position: int, length: int, encoding: Encoding, terms: Terms, depth: int
    ) -> tuple[int, int]:
        end = position + length
        growth = 0
        group_length: tuple[int, Patch] | None = None
        while length == UNDEFINED or position < end:
            head = self.head(position, encoding)
            if head.tag == ITEM_END:
                position = head.value
                if length == UNDEFINED:
                    return position, growth
                continue
            if head.tag >> 16 == 0xFFFE:
                raise _Unreadable
            start = position
            if head.tag == SPECIFIC_CHARACTER_SET:
                terms = self._own_terms(head) or terms
                position = head.value + head.length
                # Without one of its own the item has that of the data set.
                self.patches.append(Patch(start, position, b""))
                grown = start - position
            else:
                position, grown = self.element(start, head, encoding, terms, depth)
            if not head.tag & 0xFFFF:
                group_length = head.tag, Patch(start, position, b"")
            elif grown and group_length and group_length[0] == head.tag & 0xFFFF0000:
                # It would be wrong now, and is optional (PS3.5 7.2).
                patch = group_length[1]
                self.patches.append(patch)
                growth -= patch.end - patch.start
                group_length = None
            growth += grown
        if position != end:
            raise _Unreadable
        return position, growth

    def _own_terms(self, head: Head) -> Terms:
        try:
            value = self._window.bytes(head.value, min(head.length, 1024))
        except SpliceError:
            raise _Unreadable from None
        text = value.decode("ascii", "replace").strip(" \0")
        return tuple(term.strip() for term in text.split("\\")) if text else ()

    def _resize(self, value: int, length: int, encoding: Encoding) -> None:
        self.patches.append(Patch(value - 4, value, _LENGTH[encoding.big_endian](length)))
