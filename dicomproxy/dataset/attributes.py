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
    "PN": 194,  # three component groups of 64
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
_NAME_GROUPS: Final = 3
_NAME_GROUP_LENGTH: Final = 64
_NAME_COMPONENTS: Final = 5


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
    return all(len(value) <= LONGEST[vr] and well_formed(vr, value) for value in values)


def has_form(vr: str) -> bool:
    """Tell whether not every text is a value of *vr*."""
    return vr in _FORMS or vr == "AE"


def well_formed(vr: str, value: str) -> bool:
    """Tell whether one value has the form that *vr* asks for; an empty one has."""
    if not value:
        return True
    if vr == "PN":
        return _is_name(value)
    if vr == "AE":
        return value.isascii() and value.isprintable() and bool(value.strip())
    form = _FORMS.get(vr)
    return form is None or bool(form.fullmatch(value))


def _is_name(value: str) -> bool:
    """Tell whether *value* is a name as PS3.5 6.2.1 has it."""
    groups = value.split("=")
    return len(groups) <= _NAME_GROUPS and all(
        len(group) <= _NAME_GROUP_LENGTH and group.count("^") < _NAME_COMPONENTS for group in groups
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
_PLACES: Final = frozenset(
    {
        0x00180050,  # Slice Thickness
        0x00180088,  # Spacing Between Slices
        0x00181114,  # Estimated Radiographic Magnification Factor
        0x00181164,  # Imager Pixel Spacing
        0x00182010,  # Nominal Scanned Pixel Spacing
        0x00185100,  # Patient Position
        0x00200020,  # Patient Orientation
        0x00200030,  # Image Position
        0x00200032,  # Image Position (Patient)
        0x00200035,  # Image Orientation
        0x00200037,  # Image Orientation (Patient)
        0x00200060,  # Laterality
        0x00200062,  # Image Laterality
        0x00201041,  # Slice Location
    }
)
"""What says where in the patient pixels are, how large, and on which side."""
_GROUPS: Final = frozenset({0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040})


def may_be_changed(tag: int, vr: str) -> bool:
    """Tell whether a site's own rules may change the attribute.

    Identity, UIDs, what describes or places pixels, and the record of changes are not
    for them.
    """
    fixed = tag in _FIXED or tag in _PLACES
    return tag >> 16 in _GROUPS and not fixed and vr in LONGEST
