"""Query identifiers: small data sets whose values stay encoded bytes.

A row of a C-FIND answer is decoded, looked at and encoded again without ever
becoming anything but bytes: a value that nobody changes leaves as it came. Text
is decoded where it is asked for, by the identifier's own Specific Character Set.
Rule kept: any bytes whatever give an identifier or :class:`IdentifierError`.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import Final, NamedTuple, Self

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from dicomproxy.dataset import charset
from dicomproxy.dataset.charset import TEXT_VRS, CannotEncode
from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    LONG_VRS,
    SHORT_VRS,
)
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET

__all__ = ["CannotEncode", "Element", "Identifier", "IdentifierError"]

_MAX_DEPTH: Final = 32
_MAX_ELEMENTS: Final = 20_000
_MAX_INFLATED_BYTES: Final = 16 * 1024 * 1024

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM: Final = 0xFFFEE000
_ITEM_END: Final = 0xFFFEE00D
_SEQUENCE_END: Final = 0xFFFEE0DD

_VR_NAMES: Final = {vr: vr.decode() for vr in SHORT_VRS | LONG_VRS}
_VR_BYTES: Final = {name: vr for vr, name in _VR_NAMES.items()}
_SHORT: Final = frozenset(vr.decode() for vr in SHORT_VRS)
_NUL_PADDED: Final = frozenset({"UI", "OB", "UN"})
_SINGLE_VALUED: Final = frozenset({"ST", "LT", "UT", "UR"})  # a backslash is text there
_TRAILING_ONLY: Final = frozenset({"ST", "LT", "UT", "UR"})  # leading spaces are text there
_NUMBERS: Final = {
    "US": Struct("<H"),
    "SS": Struct("<h"),
    "UL": Struct("<L"),
    "SL": Struct("<l"),
    "UV": Struct("<Q"),
    "SV": Struct("<q"),
    "FL": Struct("<f"),
    "FD": Struct("<d"),
}
_SWAPPED_BYTES: Final = {
    **dict.fromkeys(("US", "SS", "OW", "AT"), 2),
    **dict.fromkeys(("UL", "SL", "FL", "OF", "OL"), 4),
    **dict.fromkeys(("UV", "SV", "FD", "OD", "OV"), 8),
}


class IdentifierError(Exception):
    """The bytes are no data set in that transfer syntax. Carries no value."""


class Element(NamedTuple):
    """One data element; a tuple, since an answer of 1,000 rows makes 25,000 of them.

    ``value`` holds the encoded bytes, little endian, or the items of a sequence.
    """

    tag: int
    vr: str
    value: bytes | tuple[Identifier, ...]


@lru_cache(maxsize=8192)
def vr_of(tag: int) -> str:
    """Return the VR that PS3.6 gives to *tag*; ``UN`` for what it does not list."""
    if tag & 0x10000:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return "UN"
    # "OB or OW" and "US or SS" depend on elements that no identifier holds.
    return {"OB or OW": "OW"}.get(vr, vr[:2])


class Identifier:
    """A mutable data set, ordered by tag, equal by content.

    Args:
        elements: in any order; of two with the same tag the later one counts.
        inherited: the character set of the data set around this sequence item.
    """

    __slots__ = ("_elements", "_inherited", "_sorted")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, elements: Sequence[Element] = (), *, inherited: tuple[str, ...] = ()
    ) -> None:
        self._elements = {element.tag: element for element in elements}
        self._inherited = inherited
        self._sorted = False

    # ------------------------------------------------------------ bytes

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, transfer_syntax_uid: str) -> Self:
        """Read an identifier.

        Group lengths are dropped, values may be of odd length, and zeros behind
        the last element are overlooked.

        Raises:
            IdentifierError: *data* is no data set in that transfer syntax.
        """
        held = bytes(data)
        if transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
            held = _inflate(held)
        reader = _Reader(
            held,
            implicit=transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN,
            big_endian=transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN,
        )
        identifier = cls()
        reader.elements(identifier, 0, len(held), 0)
        return identifier

    def encode(self, transfer_syntax_uid: str) -> bytes:
        """Write the identifier, sequences and items with their lengths."""
        if transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
            deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            deflated = deflater.compress(_encode_explicit(self, False)) + deflater.flush()
            return deflated + b"\0" * (len(deflated) % 2)
        if transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN:
            return _encode_implicit(self)
        return _encode_explicit(self, transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> Self:
        """Take over a pydicom data set."""
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_dataset(buffer, dataset)
        return cls.decode(buffer.getvalue(), EXPLICIT_VR_LITTLE_ENDIAN)

    def to_dataset(self) -> Dataset:
        """Return a pydicom data set with the same content."""
        encoded = self.encode(EXPLICIT_VR_LITTLE_ENDIAN)
        return read_dataset(io.BytesIO(encoded), is_implicit_VR=False, is_little_endian=True)

    # --------------------------------------------------------- elements

    def __contains__(self, tag: int) -> bool:
        return tag in self._elements

    def __iter__(self) -> Iterator[Element]:
        """Yield elements by ascending tag."""
        if not self._sorted:
            self._elements = dict(sorted(self._elements.items()))
            self._sorted = True
        return iter(self._elements.values())

    def __len__(self) -> int:
        return len(self._elements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identifier):
            return NotImplemented
        return self._elements == other._elements

    def __repr__(self) -> str:
        # Tags only: a representation may end in a log.
        return f"<Identifier {' '.join(f'{element.tag:08X}' for element in self)}>"

    def element(self, tag: int) -> Element | None:
        """Return the element, or None where the identifier lacks it."""
        return self._elements.get(tag)

    def items(self, tag: int) -> tuple[Identifier, ...]:
        """Return the items of a sequence; none where it is absent or no sequence."""
        element = self._elements.get(tag)
        return element.value if element and isinstance(element.value, tuple) else ()

    def is_empty(self, tag: int) -> bool:
        """Tell whether the element is absent or without a value but padding."""
        element = self._elements.get(tag)
        if element is None:
            return True
        if isinstance(element.value, tuple):
            return not any(len(item) for item in element.value)
        if element.vr in _NUMBERS or element.vr == "AT":
            return not element.value
        return not element.value.strip(b" \0")

    def put(self, element: Element) -> None:
        """Add or replace an element as it is, its bytes in this identifier's character set."""
        if element.tag not in self._elements:
            self._sorted = False
        self._elements[element.tag] = element
        if element.tag == SPECIFIC_CHARACTER_SET:
            self._bequeath(self.specific_character_set)

    def set_empty(self, tag: int) -> None:
        """Give the element no value: a key that is to be returned, or is unknown."""
        vr = self._elements[tag].vr if tag in self._elements else vr_of(tag)
        self.put(Element(tag, vr, () if vr == "SQ" else b""))

    def set_items(self, tag: int, items: Sequence[Identifier]) -> None:
        """Give a sequence its items."""
        self.put(Element(tag, "SQ", tuple(items)))
        self._bequeath(self.specific_character_set)

    def remove(self, tag: int) -> None:
        """Drop the element, if there is one."""
        self._elements.pop(tag, None)

    def copy(self) -> Self:
        """Return an identifier that changes independently of this one, items included."""
        made = type(self)(inherited=self._inherited)
        made._elements = {
            tag: element
            if isinstance(element.value, bytes)
            else element._replace(value=tuple(item.copy() for item in element.value))
            for tag, element in self._elements.items()
        }
        made._sorted = self._sorted
        return made

    # ------------------------------------------------------------- text

    @property
    def specific_character_set(self) -> tuple[str, ...]:
        """The defined terms in force, as they were written; empty for the default repertoire."""
        element = self._elements.get(SPECIFIC_CHARACTER_SET)
        if element is None or not isinstance(element.value, bytes):
            return self._inherited
        value = element.value.decode("ascii", "replace").strip(" \0")
        return tuple(term.strip() for term in value.split("\\")) if value else self._inherited

    def text(self, tag: int) -> str:
        """Return the first value without padding, ``""`` where there is none."""
        element = self._elements.get(tag)
        if element is None or not element.value:
            return ""
        values = self.values(tag)
        return values[0] if values else ""

    def values(self, tag: int) -> tuple[str, ...]:
        """Return every value without padding; none where the element is absent or empty.

        Numbers are given as decimals, tags as eight hexadecimal digits, and
        bytes without a meaning (OB, UN and their kin) as no value at all.
        """
        element = self._elements.get(tag)
        if element is None:
            return ()
        _, vr, value = element
        if not isinstance(value, bytes) or not value:
            return ()
        if vr in TEXT_VRS:
            if _plain(value):
                text = value.decode("ascii")
            else:
                text = charset.decode(value, self.specific_character_set, vr)
        elif vr in _NUMBERS:
            number = _NUMBERS[vr]
            whole = len(value) - len(value) % number.size
            return tuple(str(found) for (found,) in number.iter_unpack(value[:whole]))
        elif vr == "AT":
            pairs = Struct("<HH").iter_unpack(value[: len(value) - len(value) % 4])
            return tuple(f"{group:04X}{number:04X}" for group, number in pairs)
        elif vr[0] == "O" or vr == "UN":
            return ()
        else:
            text = value.decode("latin_1")
        if vr in _SINGLE_VALUED:
            text = text.rstrip(" \0")
            return (text,) if text else ()
        if "\\" in text:
            return tuple(part.strip(" \0") for part in text.split("\\"))
        text = text.strip(" \0")
        return (text,) if text else ()

    def set_text(self, tag: int, value: str | Sequence[str], vr: str | None = None) -> None:
        """Give the element one value or several, in this identifier's character set.

        Raises:
            CannotEncode: a character does not fit into it, or a number into its VR.
        """
        values = (value,) if isinstance(value, str) else tuple(value)
        present = self._elements.get(tag)
        vr = vr or (present.vr if present else vr_of(tag))
        if vr in _NUMBERS:
            encoded = _encode_numbers(vr, values)
        else:
            joined = "\\".join(values)
            terms = self.specific_character_set if vr in TEXT_VRS else ()
            encoded = charset.encode(joined, terms, vr)
        self.put(Element(tag, vr, encoded))

    def with_character_set(self, terms: tuple[str, ...], *, replace: bool = False) -> Self:
        """Return this identifier with every text in another character set, items included.

        Args:
            terms: the defined terms; none for the default repertoire.
            replace: write ``?`` for what does not fit, for peers without Unicode.

        Raises:
            CannotEncode: a value does not fit and is not to be replaced.
        """
        made = self._recoded(terms, replace)
        if terms:
            made.put(Element(SPECIFIC_CHARACTER_SET, "CS", "\\".join(terms).encode("ascii")))
        return made

    def _recoded(self, terms: tuple[str, ...], replace: bool) -> Self:
        own = self.specific_character_set
        made = type(self)(inherited=terms)
        for element in self:
            tag, vr, value = element
            if tag == SPECIFIC_CHARACTER_SET:
                continue
            if isinstance(value, tuple):
                items = tuple(item._recoded(terms, replace) for item in value)
                element = Element(tag, vr, items)
            elif vr in TEXT_VRS and not _plain(value):
                text = charset.decode(value, own, vr)
                element = Element(tag, vr, _encode_text(text, terms, vr, replace))
            made._elements[tag] = element
        made._sorted = True
        return made

    def texts(self) -> Iterator[str]:
        """Yield every text beyond plain ASCII, items included: what asks for a character set."""
        own = self.specific_character_set
        for _, vr, value in self._elements.values():
            if isinstance(value, tuple):
                for item in value:
                    yield from item.texts()
            elif vr in TEXT_VRS and not _plain(value):
                yield charset.decode(value, own, vr)

    def _bequeath(self, terms: tuple[str, ...]) -> None:
        """Let items without a character set of their own have this one (PS3.3 C.12.1.1.2)."""
        for element in self._elements.values():
            if isinstance(element.value, tuple):
                for item in element.value:
                    item._inherited = terms
                    item._bequeath(item.specific_character_set)


def _plain(value: bytes) -> bool:
    """Tell whether a text means the same in every character set."""
    return value.isascii() and b"\x1b" not in value


def _encode_text(text: str, terms: tuple[str, ...], vr: str, replace: bool) -> bytes:
    try:
        return charset.encode(text, terms, vr)
    except CannotEncode:
        if not replace:
            raise
    fitting = []
    for character in text:
        try:
            charset.encode(character, terms, vr)
        except CannotEncode:
            character = "?"
        fitting.append(character)
    try:
        return charset.encode("".join(fitting), terms, vr)
    except CannotEncode:  # each fits, but not one beside the other
        return "".join(fitting).encode("ascii", "replace")


def _encode_numbers(vr: str, values: tuple[str, ...]) -> bytes:
    number = _NUMBERS[vr]
    convert = float if vr in ("FL", "FD") else int
    try:
        return b"".join(number.pack(convert(value)) for value in values if value)
    except (ValueError, ArithmeticError, StructError):
        # Not chained: the cause quotes the value.
        raise CannotEncode(f"not a number of VR {vr}") from None


# ------------------------------------------------------------------- writing

_IMPLICIT: Final = Struct("<HHL").pack
_EXPLICIT_SHORT: Final = {False: Struct("<HH2sH").pack, True: Struct(">HH2sH").pack}
_EXPLICIT_LONG: Final = {False: Struct("<HH2sxxL").pack, True: Struct(">HH2sxxL").pack}
_ITEM_HEAD: Final = {False: Struct("<HHL").pack, True: Struct(">HHL").pack}


def _padded(vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        return value + (b"\0" if vr in _NUL_PADDED else b" ")
    return value


def _encode_implicit(identifier: Identifier) -> bytes:
    parts = []
    for tag, vr, value in identifier:
        if isinstance(value, tuple):
            value = _encode_items([_encode_implicit(item) for item in value], False)
        elif len(value) % 2:
            value = _padded(vr, value)
        parts.append(_IMPLICIT(tag >> 16, tag & 0xFFFF, len(value)))
        parts.append(value)
    return b"".join(parts)


def _encode_explicit(identifier: Identifier, big_endian: bool) -> bytes:
    short, long = _EXPLICIT_SHORT[big_endian], _EXPLICIT_LONG[big_endian]
    parts = []
    for tag, vr, value in identifier:
        if isinstance(value, tuple):
            items = [_encode_explicit(item, big_endian) for item in value]
            value = _encode_items(items, big_endian)
        else:
            if len(value) % 2:
                value = _padded(vr, value)
            if big_endian and vr in _SWAPPED_BYTES:
                value = _swapped(value, _SWAPPED_BYTES[vr])
        length = len(value)
        if vr not in _SHORT:
            parts.append(long(tag >> 16, tag & 0xFFFF, _VR_BYTES[vr], length))
        elif length > 0xFFFF:
            # Too long for its VR's length field: written as UN (PS3.5 6.2.2).
            parts.append(long(tag >> 16, tag & 0xFFFF, b"UN", length))
        else:
            parts.append(short(tag >> 16, tag & 0xFFFF, _VR_BYTES[vr], length))
        parts.append(value)
    return b"".join(parts)


def _encode_items(items: list[bytes], big_endian: bool) -> bytes:
    head = _ITEM_HEAD[big_endian]
    return b"".join(head(0xFFFE, 0xE000, len(item)) + item for item in items)


def _swapped(value: bytes, size: int) -> bytes:
    """Return *value* with the bytes of each number in the other order."""
    swapped = bytearray(value)
    whole = len(value) - len(value) % size
    for offset in range(size):
        swapped[offset:whole:size] = value[size - 1 - offset : whole : size]
    return bytes(swapped)


# ------------------------------------------------------------------- reading

_READ_IMPLICIT: Final = {False: Struct("<HHL").unpack_from, True: Struct(">HHL").unpack_from}
_READ_EXPLICIT: Final = {False: Struct("<HH2sH").unpack_from, True: Struct(">HH2sH").unpack_from}
_READ_LONG: Final = {False: Struct("<L").unpack_from, True: Struct(">L").unpack_from}


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, _MAX_INFLATED_BYTES)
    except zlib.error:
        raise IdentifierError("does not inflate") from None
    if not inflater.eof:
        raise IdentifierError("truncated, or inflates beyond the limit")
    return inflated


class _Reader:
    """Reads elements out of bytes held whole."""

    def __init__(self, data: bytes, *, implicit: bool, big_endian: bool) -> None:
        self._data = data
        self._implicit = implicit
        self._big_endian = big_endian
        self._budget = _MAX_ELEMENTS

    def elements(self, into: Identifier, position: int, end: int, depth: int) -> int:
        """Read elements up to *end*, or up to an item's end; the position behind them."""
        if depth > _MAX_DEPTH:
            raise IdentifierError("nested too deeply")
        data, implicit, big_endian = self._data, self._implicit, self._big_endian
        unpack_implicit = _READ_IMPLICIT[big_endian]
        unpack_explicit = _READ_EXPLICIT[big_endian]
        elements = into._elements
        ascending, last = True, -1
        while position < end:
            if position + 8 > end:
                if data.count(0, position, end) == end - position:
                    position = end
                    break
                raise IdentifierError("truncated element")
            self._budget -= 1
            if self._budget < 0:
                raise IdentifierError("too many elements")
            if implicit:
                group, number, length = unpack_implicit(data, position)
                tag = group << 16 | number
                position += 8
                vr = vr_of(tag)
            else:
                group, number, code, length = unpack_explicit(data, position)
                tag = group << 16 | number
                name = _VR_NAMES.get(code)
                position += 8
                if name is None:
                    if tag == _ITEM_END and depth:
                        break
                    if not tag and data.count(0, position - 8, end) == end - position + 8:
                        position = end
                        break
                    raise IdentifierError("not an explicit VR")
                vr = name
                if code in LONG_VRS:
                    if position + 4 > end:
                        raise IdentifierError("truncated element")
                    (length,) = _READ_LONG[big_endian](data, position)
                    position += 4
                    if code == b"UN":
                        vr = vr_of(tag)
            if group == 0xFFFE:
                if tag == _ITEM_END and depth:
                    break
                raise IdentifierError("item without a sequence")
            if length == _UNDEFINED and (implicit or code in LONG_VRS):
                if vr not in ("SQ", "UN"):
                    raise IdentifierError("undefined length without a sequence")
                vr = "SQ"
            elif length > end - position:
                raise IdentifierError("value beyond the end")
            value: bytes | tuple[Identifier, ...]
            if vr == "SQ":
                unknown = not implicit and code == b"UN"
                start = position
                try:
                    value, position = self._sequence(into, start, end, length, depth, unknown)
                except IdentifierError:
                    if not unknown or length == _UNDEFINED:
                        raise
                    # What a UN holds is anybody's guess; its bytes are kept.
                    vr, position = "UN", start + length
                    value = data[start:position]
            else:
                value = data[position : position + length]
                position += length
                if big_endian and vr in _SWAPPED_BYTES and code != b"UN":
                    value = _swapped(value, _SWAPPED_BYTES[vr])
            if not number:
                if implicit and not group and not length and not any(data[position:end]):
                    position = end
                    break
                continue  # a group length (PS3.5 7.2)
            elements[tag] = Element(tag, vr, value)
            if tag <= last:
                ascending = False
            last = tag
        into._sorted = ascending
        return position

    def _sequence(
        self, around: Identifier, position: int, end: int, length: int, depth: int, unknown: bool
    ) -> tuple[tuple[Identifier, ...], int]:
        """Read the items of a sequence; those of a UN are implicit and little endian."""
        if unknown and not (self._implicit and not self._big_endian):
            inner = _Reader(self._data, implicit=True, big_endian=False)
            inner._budget = self._budget
            try:
                return inner._sequence(around, position, end, length, depth, False)
            finally:
                self._budget = inner._budget
        data, terms = self._data, around.specific_character_set
        unpack = _READ_IMPLICIT[self._big_endian]
        delimited = length == _UNDEFINED
        if not delimited:
            end = position + length
        items: list[Identifier] = []
        while position < end:
            if position + 8 > end:
                raise IdentifierError("truncated item")
            self._budget -= 1
            if self._budget < 0:
                raise IdentifierError("too many elements")
            group, number, size = unpack(data, position)
            tag = group << 16 | number
            position += 8
            if tag == _SEQUENCE_END:
                if delimited:
                    return tuple(items), position
                continue  # superfluous where the length is given, and harmless
            if tag != _ITEM:
                raise IdentifierError("not an item")
            item = Identifier(inherited=terms)
            items.append(item)
            if size == _UNDEFINED:
                position = self.elements(item, position, end, depth + 1)
            elif size > end - position:
                raise IdentifierError("item beyond the end")
            else:
                self.elements(item, position, position + size, depth + 1)
                position += size
        if delimited:
            raise IdentifierError("sequence without an end")
        return tuple(items), position
