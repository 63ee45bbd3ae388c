"""The file format of instances at rest: preamble, prefix and File Meta Information.

Only the head of a file is built and read here (PS3.10 7.1); what follows it is
the data set as it came from its source. Pure: bytes in, bytes out. Any bytes
whatever give a :class:`FileMeta` or :class:`Part10Error`, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Final

from dicomproxy import __version__

IMPLEMENTATION_CLASS_UID: Final = "2.25.317692657051483787991882700511810022111"
"""Names this implementation in files and associations; a UUID as a UID (PS3.5 B.2)."""

IMPLEMENTATION_VERSION_NAME: Final = f"DICOMPROXY_{__version__}"[:16]

_PREAMBLE: Final = bytes(128) + b"DICM"
_LONGEST_META_BYTES: Final = 64 * 1024
_LONGEST_UID: Final = 64
_LONGEST_AE_TITLE: Final = 16
_LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_SHORT_ELEMENT: Final = Struct("<HH2sH")
_LONG_ELEMENT: Final = Struct("<HH2sHI")
_UINT32: Final = Struct("<I")

Read = Callable[[int, int], bytes]
"""``read(offset, size)``: file bytes, fewer at the end."""


class Part10Error(Exception):
    """The bytes are not the head of a DICOM file. Carries no value."""


@dataclass(frozen=True, slots=True)
class FileMeta:
    """What a file says of its data set, which begins at ``data_set_offset``."""

    transfer_syntax_uid: str
    data_set_offset: int
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    source_ae_title: str = ""


def build_file_meta(
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    source_ae_title: str = "",
) -> bytes:
    """Return everything that precedes the data set in a file (PS3.10 7.1).

    UIDs are taken as peers send them: printable ASCII of at most 64 characters,
    whether or not their components obey PS3.5 9.1.

    Raises:
        ValueError: a UID or the AE title cannot be written. Names no value.
    """
    sop_class = _element(0x0002, b"UI", _uid(sop_class_uid))
    sop_instance = _element(0x0003, b"UI", _uid(sop_instance_uid))
    rest = _rest_of_meta(transfer_syntax_uid, source_ae_title)
    length = len(_VERSION_ELEMENT) + len(sop_class) + len(sop_instance) + len(rest)
    group_length = _element(0x0000, b"UL", _UINT32.pack(length))
    return b"".join((_PREAMBLE, group_length, _VERSION_ELEMENT, sop_class, sop_instance, rest))


@lru_cache(maxsize=128)
def _rest_of_meta(transfer_syntax_uid: str, source_ae_title: str) -> bytes:
    """Return the elements from Transfer Syntax UID on: few kinds, written for every instance."""
    elements = [
        _element(0x0010, b"UI", _uid(transfer_syntax_uid)),
        _element(0x0012, b"UI", _uid(IMPLEMENTATION_CLASS_UID)),
        _element(0x0013, b"SH", _text(IMPLEMENTATION_VERSION_NAME, _LONGEST_AE_TITLE)),
    ]
    if source_ae_title:
        elements.append(_element(0x0016, b"AE", _text(source_ae_title, _LONGEST_AE_TITLE)))
    return b"".join(elements)


def read_file_meta(read: Read) -> FileMeta:
    """Read the head of the file that *read* gives access to.

    The group length may be absent or wrong, as in files met in practice: the
    group ends where its elements end.

    Raises:
        Part10Error: no prefix, an element that does not end, or no transfer syntax.
    """
    head = read(0, _LONGEST_META_BYTES)
    if head[128:132] != b"DICM":
        raise Part10Error("no DICM prefix")
    found: dict[int, bytes] = {}
    offset = 132
    while len(head) - offset >= _SHORT_ELEMENT.size:
        group, element, vr, length = _SHORT_ELEMENT.unpack_from(head, offset)
        if group != 0x0002:
            break
        value_offset = offset + _SHORT_ELEMENT.size
        if vr in _LONG_VRS:
            if len(head) - offset < _LONG_ELEMENT.size:
                raise Part10Error("file meta is cut off")
            length = _LONG_ELEMENT.unpack_from(head, offset)[4]
            value_offset = offset + _LONG_ELEMENT.size
        if length > len(head) - value_offset:
            raise Part10Error("file meta is cut off or too long")
        found[element] = head[value_offset : value_offset + length]
        offset = value_offset + length
    transfer_syntax_uid = _plain(found.get(0x0010, b""))
    if not transfer_syntax_uid:
        raise Part10Error("no transfer syntax")
    return FileMeta(
        transfer_syntax_uid=transfer_syntax_uid,
        data_set_offset=offset,
        sop_class_uid=_plain(found.get(0x0002, b"")),
        sop_instance_uid=_plain(found.get(0x0003, b"")),
        source_ae_title=_plain(found.get(0x0016, b"")),
    )


def _element(element: int, vr: bytes, value: bytes) -> bytes:
    if vr in _LONG_VRS:
        return _LONG_ELEMENT.pack(0x0002, element, vr, 0, len(value)) + value
    return _SHORT_ELEMENT.pack(0x0002, element, vr, len(value)) + value


def _uid(value: str) -> bytes:
    """Encode a UID, padded to even length with NUL (PS3.5 9.1)."""
    if not (0 < len(value) <= _LONGEST_UID and _printable(value)):
        raise ValueError("not a UID")
    return value.encode("ascii") + b"\0" * (len(value) % 2)


def _text(value: str, longest: int) -> bytes:
    """Encode a short text, padded to even length with a space (PS3.5 6.2)."""
    if not (0 < len(value) <= longest and _printable(value)):
        raise ValueError("not a short text")
    return value.encode("ascii") + b" " * (len(value) % 2)


def _printable(value: str) -> bool:
    return value.isascii() and value.isprintable() and "\\" not in value


def _plain(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


_VERSION_ELEMENT: Final = _element(0x0001, b"OB", b"\x00\x01")
