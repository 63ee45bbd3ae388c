"""The identity of an instance, read from the first bytes of its data set.

Only what decides where an instance belongs is read, up to Series Instance UID
(0020,000E); larger values and sequences are stepped over by arithmetic. Rule
kept: any bytes whatever give a header or :class:`HeaderError`, in bounded time
and memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from dicomproxy.dataset.charset import decode

IMPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1"
DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1.99"
EXPLICIT_VR_BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"

Read = Callable[[int, int], bytes]
"""``read(offset, size)``: data set bytes, fewer at the end."""

WINDOW_BYTES: Final = 8192
"""How much is read at a time, beginning at 0; in most instances the header is in that."""

_LITTLE_ENDIAN: Final = Struct("<HHL").unpack_from
_MAX_ELEMENTS: Final = 250_000
_MAX_DEPTH: Final = 64
_MAX_VALUE_BYTES: Final = 1024
_MAX_INFLATED_BYTES: Final = 64 * 1024 * 1024

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM: Final = 0xFFFEE000
_ITEM_END: Final = 0xFFFEE00D
_SEQUENCE_END: Final = 0xFFFEE0DD

_SPECIFIC_CHARACTER_SET: Final = 0x00080005
_SERIES_INSTANCE_UID: Final = 0x0020000E
_ISSUER_QUALIFIERS: Final = 0x00100024
_UNIVERSAL_ENTITY_ID: Final = 0x00400032
_UNIVERSAL_ENTITY_ID_TYPE: Final = 0x00400033
_FIELDS: Final = frozenset(
    {
        _SPECIFIC_CHARACTER_SET,
        0x00080016,
        0x00080018,
        0x00100020,
        0x00100021,
        _ISSUER_QUALIFIERS,
        0x00100030,
        0x00100040,
        0x0020000D,
        _SERIES_INSTANCE_UID,
    }
)

SHORT_VRS: Final = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()
)
"""VRs whose explicit form has a length of 16 bits (PS3.5 7.1.2); all others have 32."""

LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


class HeaderError(Exception):
    """The bytes are not the beginning of a data set. Carries no value."""


@dataclass(frozen=True, slots=True)
class InstanceHeader:
    """What an instance says of itself; empty where it says nothing.

    ``issuer_universal_id`` and its type are from the first item of Issuer of
    Patient ID Qualifiers Sequence (0010,0024).
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
    issuer_of_patient_id: str
    patient_birth_date: str
    patient_sex: str
    specific_character_set: tuple[str, ...] = ()
    issuer_universal_id: str = ""
    issuer_universal_id_type: str = ""


def read_header(read: Read, transfer_syntax_uid: str) -> InstanceHeader:
    """Read the header of the data set that *read* gives access to.

    Every compressed, private or unknown transfer syntax is Explicit VR Little
    Endian up to its pixel data (PS3.5 A.4).

    Raises:
        HeaderError: the bytes are no data set in that transfer syntax.
    """
    if transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
        read = _Inflated(read).read
    big_endian = transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN
    scanner = _Scanner(read, big_endian)
    if transfer_syntax_uid == IMPLICIT_VR_LITTLE_ENDIAN:
        found = scanner.scan_implicit()
    else:
        found = scanner.scan_explicit()
    return _header(found)


def _header(found: dict[int, bytes]) -> InstanceHeader:
    def text(tag: int) -> str:
        value = found.get(tag)
        return value.decode("ascii", "replace").strip(" \0") if value else ""

    terms: tuple[str, ...] = ()
    if declared := text(_SPECIFIC_CHARACTER_SET):
        terms = tuple(term.strip(" \0") for term in declared.split("\\"))
    return InstanceHeader(
        sop_class_uid=text(0x00080016),
        sop_instance_uid=text(0x00080018),
        study_instance_uid=text(0x0020000D),
        series_instance_uid=text(_SERIES_INSTANCE_UID),
        patient_id=decode(found.get(0x00100020, b""), terms).strip(" \0"),
        issuer_of_patient_id=decode(found.get(0x00100021, b""), terms).strip(" \0"),
        patient_birth_date=text(0x00100030),
        patient_sex=text(0x00100040),
        specific_character_set=terms,
        issuer_universal_id=decode(found.get(_UNIVERSAL_ENTITY_ID, b""), terms).strip(" \0"),
        issuer_universal_id_type=text(_UNIVERSAL_ENTITY_ID_TYPE),
    )


class _Scanner:
    """Walks elements through a window that moves forward over the data set."""

    def __init__(self, read: Read, big_endian: bool) -> None:
        self._read = read
        order = ">" if big_endian else "<"
        self._explicit = Struct(f"{order}HH2sH").unpack_from
        self._implicit = Struct(f"{order}HHL").unpack_from
        self._long = Struct(f"{order}L").unpack_from
        self._budget = _MAX_ELEMENTS
        self._window = b""
        self._start = 0

    # The two scans differ in a line or two, and stay apart since this loop is
    # most of what a header costs.

    def scan_explicit(self) -> dict[int, bytes]:
        """Collect the wanted values of a data set with explicit VRs (PS3.5 7.1.2)."""
        found: dict[int, bytes] = {}
        unpack, unpack_long, short_vrs, fields = self._explicit, self._long, SHORT_VRS, _FIELDS
        window, at, size = self._window, 0, 0
        for _ in range(_MAX_ELEMENTS):
            if at + 12 > size:
                position = self._start + at
                at = self._move(position)
                if at < 0:
                    return found
                window, size = self._window, len(self._window)
            group, number, vr, length = unpack(window, at)
            tag = group << 16 | number
            if tag > _SERIES_INSTANCE_UID:
                return found
            if vr in short_vrs:
                at += 8
            else:
                if not (vr.isalpha() and vr.isupper()):
                    if self._start + at == 0:
                        # Written with implicit VRs against its transfer syntax.
                        return self.scan_implicit()
                    raise HeaderError("not an explicit VR")
                if at + 12 > size:
                    raise HeaderError("truncated element")
                (length,) = unpack_long(window, at + 8)
                at += 12
                if length == _UNDEFINED:
                    position = self._start + at
                    if tag == _ISSUER_QUALIFIERS:
                        position = self._qualify_undefined(found, position, vr == b"UN")
                    else:
                        position = self._skip(position, vr == b"UN")
                    window, size = self._window, len(self._window)
                    at = position - self._start
                    continue
            if tag in fields:
                position = self._start + at
                if tag == _ISSUER_QUALIFIERS:
                    self._qualify(found, position, position + length, vr == b"UN")
                else:
                    found[tag] = self._value(position, length)
                if tag == _SERIES_INSTANCE_UID:
                    return found
                window, size = self._window, len(self._window)
                at = position - self._start
            at += length
        raise HeaderError("too many elements")

    def scan_implicit(self) -> dict[int, bytes]:
        """Collect the wanted values of a data set with implicit VRs (PS3.5 7.1.3)."""
        found: dict[int, bytes] = {}
        unpack, fields = _LITTLE_ENDIAN, _FIELDS
        position = 0
        for _ in range(_MAX_ELEMENTS):
            at = position - self._start
            if at + 8 > len(self._window):
                at = self._move(position)
                if at < 0:
                    return found
            group, number, length = unpack(self._window, at)
            tag = group << 16 | number
            if tag > _SERIES_INSTANCE_UID:
                return found
            position += 8
            if length == _UNDEFINED:
                if tag == _ISSUER_QUALIFIERS:
                    position = self._qualify_undefined(found, position, True)
                else:
                    position = self._skip(position, True)
                continue
            if tag == _ISSUER_QUALIFIERS:
                self._qualify(found, position, position + length, True)
            elif tag in fields:
                found[tag] = self._value(position, length)
                if tag == _SERIES_INSTANCE_UID:
                    return found
            position += length
        raise HeaderError("too many elements")

    def _move(self, position: int) -> int:
        """Have the window begin just before *position*; where that is in it, or -1 at the end.

        One byte before it is kept in view, which tells a data set that ends
        here from one whose last length points beyond the end.
        """
        self._start = max(0, position - 1)
        self._window = self._read(self._start, WINDOW_BYTES)
        at = position - self._start
        available = len(self._window) - at
        if available == 0:
            return -1
        if available < 8:
            raise HeaderError("truncated element")
        return at

    def _at(self, position: int, size: int) -> int:
        """Return where *position* is in the window, with *size* bytes behind it."""
        at = position - self._start
        if at < 0 or at + size > len(self._window):
            self._start, at = position, 0
            self._window = self._read(position, max(size, WINDOW_BYTES))
            if len(self._window) < size:
                raise HeaderError("truncated element")
        return at

    def _value(self, position: int, length: int) -> bytes:
        if length > _MAX_VALUE_BYTES:
            raise HeaderError("value too long")
        at = self._at(position, length)
        return self._window[at : at + length]

    def _qualify(self, found: dict[int, bytes], begin: int, end: int, implicit: bool) -> None:
        """Collect from the first item of the issuer's qualifiers what identifies it.

        An item that makes no sense identifies nobody, as in a data set without one.
        """
        if end - begin > _MAX_VALUE_BYTES:
            return
        held = self._value(begin, end - begin)
        # What a UN holds is little endian in every transfer syntax.
        unpack = _LITTLE_ENDIAN if implicit else self._implicit
        if len(held) < 8:
            return
        group, number, length = unpack(held, 0)
        if group << 16 | number != _ITEM:
            return
        at, size = 8, len(held) if length == _UNDEFINED else min(8 + length, len(held))
        while at + 8 <= size:
            group, number, length = unpack(held, at)
            tag = group << 16 | number
            vr = held[at + 4 : at + 6]
            at += 8
            if not implicit and vr in SHORT_VRS:
                _, _, _, length = self._explicit(held, at - 8)
            elif not implicit:
                if at + 4 > size:
                    return
                (length,) = self._long(held, at)
                at += 4
            if tag == _ITEM_END or length == _UNDEFINED or at + length > size:
                return
            if tag in (_UNIVERSAL_ENTITY_ID, _UNIVERSAL_ENTITY_ID_TYPE):
                found[tag] = held[at : at + length]
            at += length

    def _qualify_undefined(self, found: dict[int, bytes], begin: int, implicit: bool) -> int:
        """Do so where the sequence is of undefined length; return the position behind it."""
        if begin + _MAX_VALUE_BYTES > self._start + len(self._window):
            # All in view beforehand, since what is behind a window cannot be read again.
            self._start, self._window = begin, self._read(begin, WINDOW_BYTES)
        end = self._skip(begin, implicit)
        self._qualify(found, begin, end, implicit)
        return end

    def _skip(self, position: int, implicit: bool) -> int:
        """Return the position behind a value of undefined length (PS3.5 7.5.2).

        ``implicit``: the items hold implicit VRs, as those of a UN do (PS3.5
        6.2.2); an item whose first element bears a VR all the same is believed.
        """
        # One entry for each open sequence or item: (is an item, implicit VRs).
        nested: list[tuple[bool, bool]] = [(False, implicit)]
        fresh = False
        while nested:
            self._budget -= 1
            if self._budget < 0:
                raise HeaderError("too many elements")
            if len(nested) > _MAX_DEPTH:
                raise HeaderError("nested too deeply")
            in_item, implicit = nested[-1]
            at = self._at(position, 8)
            # What a UN holds is little endian in every transfer syntax.
            unpack = _LITTLE_ENDIAN if implicit else self._implicit
            group, number, length = unpack(self._window, at)
            tag = group << 16 | number
            position += 8
            if not in_item:
                if tag == _SEQUENCE_END:
                    nested.pop()
                elif tag != _ITEM:
                    raise HeaderError("not an item")
                elif length == _UNDEFINED:
                    nested.append((True, implicit))
                    fresh = True
                else:
                    position += length
                continue
            if tag == _ITEM_END:
                nested.pop()
                continue
            if group == 0xFFFE:
                raise HeaderError("item without a sequence")
            vr = self._window[at + 4 : at + 6]
            if fresh and implicit and (vr in SHORT_VRS or vr in LONG_VRS):
                nested[-1] = (True, implicit := False)
            fresh = False
            if not implicit:
                if vr in SHORT_VRS:
                    _, _, _, length = self._explicit(self._window, at)
                elif vr.isalpha() and vr.isupper():
                    (length,) = self._long(self._window, self._at(position, 4))
                    position += 4
                else:
                    raise HeaderError("not an explicit VR")
            if length == _UNDEFINED and (implicit or vr not in SHORT_VRS):
                nested.append((False, implicit or vr == b"UN"))
            else:
                position += length
        return position


class _Inflated:
    """Gives forward access to a deflated data set (PS3.5 A.5), holding one window of it."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._offset = 0
        self._start = 0
        self._held = bytearray()

    def read(self, offset: int, size: int) -> bytes:
        """Return inflated bytes; *offset* never goes back behind an earlier one."""
        while self._start + len(self._held) < offset + size:
            if not self._grow():
                break
            if self._start + len(self._held) > _MAX_INFLATED_BYTES:
                raise HeaderError("inflates beyond the limit")
            # Stepped over, thus never asked for again, but for the byte before.
            surplus = min(offset - 1 - self._start, len(self._held))
            if surplus > 0:
                del self._held[:surplus]
                self._start += surplus
        at = offset - self._start
        return bytes(self._held[at : at + size])

    def _grow(self) -> bool:
        if self._inflater.eof:
            return False
        compressed = self._inflater.unconsumed_tail
        if not compressed:
            compressed = self._read(self._offset, WINDOW_BYTES)
            self._offset += len(compressed)
            if not compressed:
                return False
        try:
            self._held += self._inflater.decompress(compressed, 8 * WINDOW_BYTES)
        except zlib.error:
            raise HeaderError("does not inflate") from None
        return True
