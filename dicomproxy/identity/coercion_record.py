"""What was changed is kept in the object: Original Attributes Sequence (PS3.3 C.12.1.1.9). Pure.

One item is added for each coercion, behind those that are there, and one to
Contributing Equipment Sequence (PS3.3 C.12.1.1.5). The first holds every
top-level attribute that was changed or removed with its previous value, and
without a value the ones that were added. A change inside a sequence keeps the
whole of it. The issuer of an ID or number is kept with it, changed or not.

Where the whole object became Unicode, the previous values keep their bytes, and
the item the Specific Character Set they are written in: that attribute was
changed as well, and an item's own holds for all that is in it (PS3.5 7.5.3).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from datetime import datetime
from typing import Final

from dicomproxy.dataset.charset import CannotEncode
from dicomproxy.dataset.identifier import Element, Identifier, vr_of
from dicomproxy.dataset.levels import SPECIFIC_CHARACTER_SET

INSTANCE_COERCION_DATETIME: Final = 0x00080015
CONTRIBUTING_EQUIPMENT: Final = 0x0018A001
MODIFIED_ATTRIBUTES: Final = 0x04000550
ORIGINAL_ATTRIBUTES: Final = 0x04000561
_MODIFICATION_DATETIME: Final = 0x04000562
_MODIFYING_SYSTEM: Final = 0x04000563
_SOURCE: Final = 0x04000564
_REASON: Final = 0x04000565
_CODE_VALUE: Final = 0x00080100
_CODING_SCHEME: Final = 0x00080102
_CODE_MEANING: Final = 0x00080104
_MANUFACTURER: Final = 0x00080070
_STATION_NAME: Final = 0x00081010
_CONTRIBUTION_DATETIME: Final = 0x0018A002
_CONTRIBUTION_DESCRIPTION: Final = 0x0018A003
_PURPOSE: Final = 0x0040A170

RECORD_TAGS: Final = frozenset(
    {INSTANCE_COERCION_DATETIME, CONTRIBUTING_EQUIPMENT, ORIGINAL_ATTRIBUTES}
)

_MODIFYING_EQUIPMENT: Final = Identifier(
    (
        Element(_CODE_VALUE, "SH", b"109103"),  # of CID 7005 (PS3.16)
        Element(_CODING_SCHEME, "SH", b"DCM"),
        Element(_CODE_MEANING, "LO", b"Modifying Equipment"),
    )
)

_BELONGS: Final = {
    0x00100020: (0x00100021, 0x00100024),
    0x00080050: (0x00080051,),
}
"""What says whose an ID or a number is."""

_LONGEST: Final = 64
_LONGEST_STATION: Final = 16


def record(
    edits: MutableMapping[int, Element | None],
    view: Identifier,
    before: Identifier,
    source: str,
    modifying_system: str,
    at: datetime,
) -> None:
    """Add to *edits* the record of them, and when they were made.

    Args:
        edits: at least one.
        view: the object as it came.
        before: the same in the character set in which it is delivered.
        source: where the previous values come from.
        at: when, with a time zone.
    """
    stamp = f"{at:%Y%m%d%H%M%S%z}"
    terms = before.specific_character_set
    edits[INSTANCE_COERCION_DATETIME] = Element(
        INSTANCE_COERCION_DATETIME, "DT", stamp.encode("ascii")
    )
    edits[CONTRIBUTING_EQUIPMENT] = Element(
        CONTRIBUTING_EQUIPMENT,
        "SQ",
        (*before.items(CONTRIBUTING_EQUIPMENT), _equipment(modifying_system, stamp, terms)),
    )
    # An object that names no character set, and becomes Unicode, has none to keep.
    keeps_bytes = before is view or bool(view.specific_character_set)
    original = view if keeps_bytes else before
    kept = {*edits}
    for tag, issuers in _BELONGS.items():
        if tag in kept:
            kept.update(issuer for issuer in issuers if issuer in view)
    if not keeps_bytes:
        kept.discard(SPECIFIC_CHARACTER_SET)
    previous = []
    for tag in kept:
        element = original.element(tag)
        if element is None:
            vr = vr_of(tag)
            element = Element(tag, vr, () if vr == "SQ" else b"")
        previous.append(element)
    modified = Identifier(previous, inherited=terms)
    item = Identifier(inherited=terms)
    item.put(Element(MODIFIED_ATTRIBUTES, "SQ", (modified,)))
    item.put(Element(_MODIFICATION_DATETIME, "DT", stamp.encode("ascii")))
    _put_name(item, _MODIFYING_SYSTEM, modifying_system)
    _put_name(item, _SOURCE, source)
    item.put(Element(_REASON, "CS", b"COERCE"))
    items = (*before.items(ORIGINAL_ATTRIBUTES), item)
    edits[ORIGINAL_ATTRIBUTES] = Element(ORIGINAL_ATTRIBUTES, "SQ", items)


def _equipment(modifying_system: str, stamp: str, terms: tuple[str, ...]) -> Identifier:
    item = Identifier(inherited=terms)
    item.put(Element(_MANUFACTURER, "LO", b"dicomproxy"))
    _put_name(item, _STATION_NAME, modifying_system, "SH", _LONGEST_STATION)
    item.put(Element(_CONTRIBUTION_DATETIME, "DT", stamp.encode("ascii")))
    item.put(Element(_CONTRIBUTION_DESCRIPTION, "ST", b"Values replaced by local ones"))
    item.put(Element(_PURPOSE, "SQ", (_MODIFYING_EQUIPMENT.copy(),)))
    return item


def _put_name(
    item: Identifier, tag: int, name: str, vr: str = "LO", longest: int = _LONGEST
) -> None:
    try:
        item.set_text(tag, name[:longest], vr)
    except CannotEncode:
        # No reason to convert an object: the name of a system is ours to spell.
        item.put(Element(tag, vr, name[:longest].encode("ascii", "replace")))
