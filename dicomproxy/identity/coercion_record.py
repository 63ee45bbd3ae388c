"""What was changed is kept in the object: Original Attributes Sequence (PS3.3 C.12.1.1.9). Pure.

One item is added for each coercion, behind those that are there. It holds every
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
MODIFIED_ATTRIBUTES: Final = 0x04000550
ORIGINAL_ATTRIBUTES: Final = 0x04000561
_MODIFICATION_DATETIME: Final = 0x04000562
_MODIFYING_SYSTEM: Final = 0x04000563
_SOURCE: Final = 0x04000564
_REASON: Final = 0x04000565

RECORD_TAGS: Final = frozenset({INSTANCE_COERCION_DATETIME, ORIGINAL_ATTRIBUTES})

_BELONGS: Final = {
    0x00100020: (0x00100021, 0x00100024),
    0x00080050: (0x00080051,),
}
"""What says whose an ID or a number is."""

_LONGEST: Final = 64


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


def _put_name(item: Identifier, tag: int, name: str) -> None:
    try:
        item.set_text(tag, name[:_LONGEST], "LO")
    except CannotEncode:
        # No reason to convert an object: the name of a system is ours to spell.
        item.put(Element(tag, "LO", name[:_LONGEST].encode("ascii", "replace")))
