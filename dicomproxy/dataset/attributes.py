"""Attributes by name, and what their values may be (PS3.5 6.2, PS3.6). Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from pydicom.datadict import dictionary_has_tag, keyword_for_tag, tag_for_keyword

from dicomproxy.dataset.identifier import vr_of

LONGEST: Final = {
    "AE": 16,
    "AS": 4,
    "CS": 16,
    "DA": 8,
    "DS": 16,
    "DT": 26,
    "IS": 12,
    "LO": 64,
    "LT": 10_240,
    "PN": 194,
    "SH": 16,
    "ST": 1024,
    "TM": 16,
    "UC": 1 << 20,
    "UR": 1 << 20,
    "UT": 1 << 20,
}
"""Characters that one value of a VR has at most, for the VRs that are written as text."""

_TAG: Final = re.compile(r"\(?([0-9A-Fa-f]{4}),?([0-9A-Fa-f]{4})\)?")
_FORMS: Final = {
    "AS": re.compile(r"[0-9]{3}[DWMY]"),
    "CS": re.compile(r"[A-Z0-9_ ]*"),
    "DA": re.compile(r"[0-9]{8}"),
    "DS": re.compile(r" *[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)? *"),
    "DT": re.compile(r"[0-9]{4,14}(\.[0-9]{1,6})?([+-][0-9]{4})?"),
    "IS": re.compile(r" *[+-]?[0-9]+ *"),
    "TM": re.compile(r"[0-9]{2,6}(\.[0-9]{1,6})?"),
}
_SINGLE_VALUED: Final = frozenset({"ST", "LT", "UT", "UR"})


class Attribute(NamedTuple):
    """An attribute of the Standard."""

    tag: int
    vr: str
    keyword: str


def attribute(name: str) -> Attribute | None:
    """Return the attribute with that keyword or tag; None where PS3.6 lists none.

    A tag is written ``00080080``, ``0008,0080`` or ``(0008,0080)``.
    """
    if written := _TAG.fullmatch(name):
        tag = int(written[1] + written[2], 16)
    else:
        # Some retired ones have no keyword, and are not meant by none.
        tag = (tag_for_keyword(name) if name else None) or 0
    # Repeating groups and private elements are not among them.
    if not tag or tag >> 16 & 1 or not dictionary_has_tag(tag):
        return None
    return Attribute(tag, vr_of(tag), keyword_for_tag(tag))


def fits(vr: str, text: str) -> bool:
    """Tell whether *text* is a value of *vr*, or several with a backslash between them."""
    if vr not in LONGEST or not text.isprintable():
        return False
    values = [text] if vr in _SINGLE_VALUED else text.split("\\")
    form = _FORMS.get(vr)
    return all(
        len(value) <= LONGEST[vr] and (not value or form is None or bool(form.fullmatch(value)))
        for value in values
    )


_FIXED: Final = frozenset(
    {
        0x00080005,  # Specific Character Set
        0x00080015,  # Instance Coercion DateTime
        0x00080050,  # Accession Number
        0x00080051,  # its issuer
        0x00080052,  # Query/Retrieve Level
        0x00080054,  # Retrieve AE Title
        0x00080056,  # Instance Availability
        0x00100010,  # Patient's Name
        0x00100020,  # Patient ID
        0x00100021,  # its issuer
        0x00100022,  # its type
        0x00100024,  # its issuer's qualifiers
        0x00100030,  # Patient's Birth Date
        0x00100040,  # Patient's Sex
        0x00101000,  # Other Patient IDs
        0x00101002,  # Other Patient IDs Sequence
    }
)
_GROUPS: Final = frozenset({0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040})


def may_be_changed(tag: int, vr: str) -> bool:
    """Tell whether a site's own rules may change the attribute.

    Identity, UIDs, what describes pixels, and the record of changes are not for them.
    """
    return tag >> 16 in _GROUPS and tag not in _FIXED and vr in LONGEST
