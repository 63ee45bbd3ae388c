"""Who is said to hold a study, and how it has served somebody. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dicomproxy.ports import Source


@dataclass(frozen=True, slots=True)
class Holder:
    """An archive said to hold a study, and the Patient ID it holds it under."""

    source: Source
    patient_id: str = ""

    @property
    def name(self) -> str:
        return self.source.name


class Standing(StrEnum):
    """How a holder has served a subscriber."""

    PROVEN = "proven"  # everything that it lists is here
    ASSUMED = "assumed"  # it cannot be asked what it has; nothing speaks against it
    SHORT = "short"  # something is missing
    ABSENT = "absent"  # it says that it has no such study
    UNREACHABLE = "unreachable"  # it could not be asked, and nothing came
    CONFLICT = "identity_conflict"  # it has the study under another patient
