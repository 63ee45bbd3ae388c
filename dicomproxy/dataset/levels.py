"""Query/Retrieve information models and levels (PS3.4 C.3, C.6)."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Level(StrEnum):
    """Query/Retrieve Level (0008,0052), highest first."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class Root(StrEnum):
    """The information model a request was made in."""

    PATIENT = "patient"
    STUDY = "study"


PATIENT_ID: Final = 0x00100020
STUDY_INSTANCE_UID: Final = 0x0020000D
SERIES_INSTANCE_UID: Final = 0x0020000E
SOP_INSTANCE_UID: Final = 0x00080018
QUERY_RETRIEVE_LEVEL: Final = 0x00080052
RETRIEVE_AE_TITLE: Final = 0x00080054
INSTANCE_AVAILABILITY: Final = 0x00080056
SPECIFIC_CHARACTER_SET: Final = 0x00080005

UNIQUE_KEY: Final = MappingProxyType(
    {
        Level.PATIENT: PATIENT_ID,
        Level.STUDY: STUDY_INSTANCE_UID,
        Level.SERIES: SERIES_INSTANCE_UID,
        Level.IMAGE: SOP_INSTANCE_UID,
    }
)

_LEVELS: Final = MappingProxyType(
    {
        Root.PATIENT: (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE),
        Root.STUDY: (Level.STUDY, Level.SERIES, Level.IMAGE),
    }
)


def levels(root: Root) -> tuple[Level, ...]:
    """Return the levels of *root*, highest first (PS3.4 C.6.1, C.6.2)."""
    return _LEVELS[root]


def levels_above(root: Root, level: Level) -> tuple[Level, ...]:
    """Return the levels of *root* above *level*, highest first."""
    return _LEVELS[root][: _LEVELS[root].index(level)]
