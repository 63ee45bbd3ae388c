"""The SOP Classes of our services, and what counts as storage.

The registry is pynetdicom's. A SOP Class that it does not know, a private one,
counts as storage: archives hold such objects, and they must not get lost.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from pynetdicom import sop_class

from dicomproxy.dataset.levels import Root
from dicomproxy.dimse.negotiation import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    UNCOMPRESSED,
)

FIND: Final = MappingProxyType(
    {
        "1.2.840.10008.5.1.4.1.2.1.1": Root.PATIENT,
        "1.2.840.10008.5.1.4.1.2.2.1": Root.STUDY,
    }
)
MOVE: Final = MappingProxyType(
    {
        "1.2.840.10008.5.1.4.1.2.1.2": Root.PATIENT,
        "1.2.840.10008.5.1.4.1.2.2.2": Root.STUDY,
    }
)
QUERY_SYNTAXES: Final = (
    *UNCOMPRESSED,
    EXPLICIT_VR_BIG_ENDIAN,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
)
"""Transfer syntaxes of identifiers."""

_STORAGE: Final = frozenset(sop_class._STORAGE_CLASSES.values())
_OTHER: Final = frozenset(
    uid
    for name, classes in vars(sop_class).items()
    if name.startswith("_") and name.endswith("_CLASSES") and isinstance(classes, dict)
    for uid in classes.values()
    if uid not in _STORAGE
)
_DICOM_PREFIX: Final = "1.2.840.10008."
_STORAGE_PREFIX: Final = "1.2.840.10008.5.1.4.1.1."


def is_storage(uid: str) -> bool:
    """Tell whether instances of this SOP Class may be stored with us."""
    if uid in _STORAGE:
        return True
    if uid in _OTHER:
        return False
    # A class newer than the registry, a retired one, or somebody's own.
    return uid.startswith(_STORAGE_PREFIX) or not uid.startswith(_DICOM_PREFIX)
