"""What the archives hold: a plan of studies, and instances made from their UIDs.

Every process makes the same plan from the same seed, so that nothing is handed
over: an archive generates the bytes of an instance, and a workstation knows
their checksum, from its SOP Instance UID alone.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from pydicom import Dataset
from pynetdicom.dsutils import encode

CT: Final = "1.2.840.10008.5.1.4.1.1.2"
LOCAL: Final = "local"
PATIENT_MARK: Final = "SOAKPAT"
"""Every patient value contains it: no log may."""

_ROOT: Final = "2.25.314159265358979323846"
_PATIENTS: Final = 12
_REMOTE_STUDIES: Final = 4  # of each patient
_PIXEL_BYTES: Final = (8 * 1024, 32 * 1024, 64 * 1024, 128 * 1024)
_CYCLE: Final = bytes(range(251)) * 600
"""251 is a prime: a shift by any block size is seen."""


@dataclass(frozen=True)
class Study:
    """One study.

    Args:
        holders: names of the archives that hold it, ``local`` for the local PACS.
        series: how many instances each has.
        pixel_bytes: size of the pixel data of each instance.
    """

    number: int
    patient: int
    holders: tuple[str, ...]
    series: tuple[int, ...]
    pixel_bytes: int

    @property
    def uid(self) -> str:
        return f"{_ROOT}.{self.number}"

    @property
    def patient_id(self) -> str:
        return f"{PATIENT_MARK}{self.patient}"

    @cached_property
    def instances(self) -> dict[str, tuple[str, ...]]:
        """SOP Instance UIDs by Series Instance UID."""
        return {
            f"{self.uid}.{series}": tuple(
                f"{self.uid}.{series}.{number}" for number in range(1, count + 1)
            )
            for series, count in enumerate(self.series, 1)
        }

    @cached_property
    def all_instances(self) -> frozenset[str]:
        return frozenset(uid for series in self.instances.values() for uid in series)


class Plan:
    """All studies, with the ways to find one, and the instances' content.

    Args:
        sources: names of the remote archives; each gets studies.
    """

    def __init__(self, seed: int, sources: Sequence[str]) -> None:
        self.studies = list(_studies(random.Random(seed), sources))
        self.by_uid = {study.uid: study for study in self.studies}
        self.patients: dict[str, list[Study]] = {}
        for study in self.studies:
            self.patients.setdefault(study.patient_id, []).append(study)
        self._study_of = {uid: study for study in self.studies for uid in study.all_instances}
        self._checks: dict[str, tuple[int, int]] = {}

    def held_by(self, holder: str) -> list[Study]:
        return [study for study in self.studies if holder in study.holders]

    def study_of(self, sop_instance_uid: str) -> Study | None:
        return self._study_of.get(sop_instance_uid)

    def dataset(self, sop_instance_uid: str) -> Dataset:
        """Return an instance without its pixel data.

        Raises:
            KeyError: it is not of this plan.
        """
        study = self._study_of[sop_instance_uid]
        series_uid, _, number = sop_instance_uid.rpartition(".")
        made = Dataset()
        made.SpecificCharacterSet = "ISO_IR 100"
        made.SOPClassUID = CT
        made.SOPInstanceUID = sop_instance_uid
        made.StudyDate, made.StudyTime = f"2020{study.patient % 12 + 1:02d}10", "101500"
        made.AccessionNumber = f"{PATIENT_MARK}{study.number}"
        made.Modality = "CT"
        made.ReferringPhysicianName = ""
        made.StudyDescription = "soak"
        made.PatientName, made.PatientID = f"{PATIENT_MARK}^{study.patient}", study.patient_id
        made.PatientBirthDate, made.PatientSex = "19700101", "O"
        made.StudyInstanceUID, made.SeriesInstanceUID = study.uid, series_uid
        made.StudyID = str(study.number)
        made.SeriesNumber = series_uid.rpartition(".")[2]
        made.InstanceNumber = number
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.Rows, made.Columns = 64, study.pixel_bytes // 128
        made.BitsAllocated = made.BitsStored = 16
        made.HighBit, made.PixelRepresentation = 15, 0
        return made

    def pixels(self, sop_instance_uid: str) -> bytes:
        first = zlib.crc32(sop_instance_uid.encode("ascii")) % 251
        return _CYCLE[first : first + self._study_of[sop_instance_uid].pixel_bytes]

    def complete_dataset(self, sop_instance_uid: str) -> Dataset:
        """Return an instance with its pixel data."""
        made = self.dataset(sop_instance_uid)
        made.PixelData = self.pixels(sop_instance_uid)
        made["PixelData"].VR = "OW"
        return made

    def data(self, sop_instance_uid: str) -> bytes:
        """Return an instance's data set in Explicit VR Little Endian, as it travels."""
        encoded = encode(self.complete_dataset(sop_instance_uid), False, True)
        if encoded is None:
            raise ValueError("the data set does not encode")
        return encoded

    def check(self, sop_instance_uid: str) -> tuple[int, int] | None:
        """Return size and CRC-32 of what must arrive; None for an instance of nobody's."""
        if sop_instance_uid not in self._study_of:
            return None
        if sop_instance_uid not in self._checks:
            data = self.data(sop_instance_uid)
            self._checks[sop_instance_uid] = len(data), zlib.crc32(data)
        return self._checks[sop_instance_uid]

    def instances(self, studies: Iterable[Study]) -> list[str]:
        return [uid for study in studies for uid in sorted(study.all_instances)]


def _studies(chance: random.Random, sources: Sequence[str]) -> Iterable[Study]:
    number = 100
    for patient in range(1, _PATIENTS + 1):
        for index in range(_REMOTE_STUDIES + 1):
            number += 1
            holders: tuple[str, ...] = (LOCAL,)
            if index:
                # In turn, so that each holds some; one in three has a second holder.
                first = sources[number % len(sources)]
                others = [name for name in sources if name != first]
                second = others and chance.random() < 1 / 3
                holders = (first, chance.choice(others)) if second else (first,)
            yield Study(
                number,
                patient,
                holders,
                tuple(chance.randint(3, 20) for _ in range(chance.randint(1, 3))),
                chance.choice(_PIXEL_BYTES),
            )
