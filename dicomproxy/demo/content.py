"""What the demo's archives hold: pydicom's packaged real files, and a synthetic CT.

The real files keep their pixels and transfer syntaxes; only the patient is made
one and the same, since a demo of priors needs a patient who has some.
"""

from __future__ import annotations

import math
import warnings
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

PATIENT_ID: Final = "DEMO-0001"
PATIENT_NAME: Final = "Demo^Patient"
SLICES: Final = 240
_SIZE: Final = 256
_ROOT: Final = "2.25.31415926535897932384626433"


@dataclass(frozen=True, slots=True)
class Study:
    """One study as an archive holds it."""

    origin: str
    date: str
    description: str
    files: tuple[str, ...]


_STUDIES: Final = (
    Study("local", "20260302", "CT thorax, today", ("CT_small.dcm",)),
    Study("local", "20240611", "Radiotherapy plan", ("rtplan.dcm", "rtdose.dcm")),
    Study("north", "20231120", "MR head, elsewhere", ("MR_small.dcm", "MR_small_RLE.dcm")),
    Study(
        "south", "20220815", "Secondary captures", ("SC_rgb_rle.dcm", "JPEG2000.dcm", "test-SR.dcm")
    ),
    Study("south", "20210105", "ECG", ("waveform_ecg.dcm",)),
)


def contents() -> dict[str, list[Dataset]]:
    """Return the instances of each archive: ``local``, ``north`` and ``south``."""
    held: dict[str, list[Dataset]] = {"local": [], "north": [], "south": []}
    directory = Path(pydicom.__file__).parent / "data" / "test_files"
    for number, study in enumerate(_STUDIES, 1):
        for name in study.files:
            path = directory / name
            if path.is_file():
                held[study.origin].append(_adopted(path, study, number, len(held[study.origin])))
    held["north"].extend(_synthetic_ct(SLICES))
    return {origin: instances for origin, instances in held.items() if instances}


def _identify(dataset: Dataset, study_number: int, date: str, description: str) -> None:
    dataset.PatientID = PATIENT_ID
    dataset.PatientName = PATIENT_NAME
    dataset.PatientBirthDate = "19700101"
    dataset.PatientSex = "O"
    dataset.StudyInstanceUID = f"{_ROOT}.{study_number}"
    dataset.StudyID = str(study_number)
    dataset.StudyDate = date
    dataset.StudyTime = "101500"
    dataset.AccessionNumber = f"DEMO{study_number}"
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = description


def _adopted(path: Path, study: Study, number: int, serial: int) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        _identify(dataset, number, study.date, study.description)
        dataset.SeriesInstanceUID = f"{_ROOT}.{number}.{serial + 1}"
        dataset.SOPInstanceUID = f"{_ROOT}.{number}.{serial + 1}.1"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        if "Modality" not in dataset:
            dataset.Modality = "OT"
        dataset.SeriesNumber = str(serial + 1)
        dataset.InstanceNumber = "1"
    return dataset


def _synthetic_ct(slices: int) -> list[Dataset]:
    """Return a CT of a sphere in water, which looks like something in a viewer."""
    number = len(_STUDIES) + 1
    instances = []
    for index in range(slices):
        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = f"{_ROOT}.{number}.1.{index + 1}"
        _identify(dataset, number, "20251009", "CT abdomen, elsewhere")
        dataset.Modality = "CT"
        dataset.SeriesInstanceUID = f"{_ROOT}.{number}.1"
        dataset.SeriesNumber = "1"
        dataset.SeriesDescription = "1 mm"
        dataset.InstanceNumber = str(index + 1)
        dataset.FrameOfReferenceUID = f"{_ROOT}.{number}.2"
        dataset.ImagePositionPatient = [-128, -128, index]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [1, 1]
        dataset.SliceThickness = "1"
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.Rows = dataset.Columns = _SIZE
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit = 15
        dataset.PixelRepresentation = 1
        dataset.RescaleIntercept = "0"
        dataset.RescaleSlope = "1"
        dataset.WindowCenter, dataset.WindowWidth = "40", "400"
        dataset.PixelData = _slice(index, slices)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta = meta
        instances.append(dataset)
    return instances


def _slice(index: int, slices: int) -> bytes:
    middle = _SIZE / 2
    height = (index - slices / 2) / (slices / 2) * middle * 0.8
    radius_squared = (middle * 0.8) ** 2 - height**2
    rows = []
    water = array("h", [0]) * _SIZE
    for row in range(_SIZE):
        left = radius_squared - (row - middle) ** 2
        half = int(math.sqrt(left)) if left > 0 else 0
        if not half:
            rows.append(water.tobytes())
            continue
        begin = int(middle) - half
        shade = 60 + (row * 7 + index * 13) % 40
        line = water[:begin] + array("h", [shade]) * (2 * half) + water[: _SIZE - begin - 2 * half]
        rows.append(line.tobytes())
    return b"".join(rows)
