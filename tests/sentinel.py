"""The sentinel patient: values that no log, no output and no exception text may contain.

Synthetic datasets use these; ``tests/conftest.py`` searches for them in all
that a test wrote.
"""

from __future__ import annotations

from typing import Final

PATIENT_NAME: Final = "SENTINEL^PATIENT"
PATIENT_ID: Final = "SENTINELID4711"
PATIENT_BIRTH_DATE: Final = "19010203"
ACCESSION_NUMBER: Final = "SENTACC4711"

SENTINEL: Final = {
    "PatientName": PATIENT_NAME,
    "PatientID": PATIENT_ID,
    "PatientBirthDate": PATIENT_BIRTH_DATE,
    "AccessionNumber": ACCESSION_NUMBER,
}
"""By DICOM keyword, to be laid over any synthetic dataset."""

_SPELLINGS: Final = (*SENTINEL.values(), "SENTINEL%5EPATIENT", "SENTINEL PATIENT", "1901-02-03")


def sentinels_in(text: str) -> list[str]:
    """Return the DICOM values, in any of their spellings, that *text* contains."""
    folded = text.upper()
    return [value for value in _SPELLINGS if value in folded]
