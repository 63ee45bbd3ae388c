"""Synthetic studies: a header made once, and pixel data that is a pattern.

Every instance of a study has the same length; only its SOP Instance UID differs,
so that a study of any size costs no more memory than one header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom.dsutils import encode

CT: Final = "1.2.840.10008.5.1.4.1.1.2"
MR: Final = "1.2.840.10008.5.1.4.1.1.4"
_ROOT: Final = "2.25.271828182845904523536"
_SOP_CLASSES: Final = {"CT": CT, "MR": MR}
_PIXEL_DATA: Final = bytes.fromhex("e07f1000") + b"OW\0\0"
_CYCLE: Final = bytes(range(251)) * 4200
"""The pattern; 251 is a prime, so that no block boundary hides a shift."""


@dataclass(frozen=True)
class Study:
    """One study of one series.

    Args:
        number: told from others by it; 10 to 99.
        instances: how many.
        pixel_bytes: pixel data of each, even.
    """

    number: int
    modality: str
    instances: int
    pixel_bytes: int
    patient_id: str = "BENCH-1"

    @property
    def sop_class_uid(self) -> str:
        return _SOP_CLASSES[self.modality]

    @property
    def study_instance_uid(self) -> str:
        return f"{_ROOT}.{self.number}"

    @property
    def series_instance_uid(self) -> str:
        return f"{self.study_instance_uid}.1"

    def sop_instance_uid(self, index: int) -> str:
        """Return UIDs of one length."""
        return f"{self.series_instance_uid}.{100000 + index}"

    @property
    def total_bytes(self) -> int:
        """All its data sets, as they travel."""
        return self.instances * (len(self.header(0)) + self.pixel_bytes)

    @cached_property
    def dataset(self) -> Dataset:
        """The first instance without its pixel data."""
        made = Dataset()
        made.SpecificCharacterSet = "ISO_IR 100"
        made.SOPClassUID = self.sop_class_uid
        made.SOPInstanceUID = self.sop_instance_uid(0)
        made.StudyDate, made.StudyTime = "20240301", "101500"
        made.AccessionNumber = f"B{self.number}"
        made.Modality = self.modality
        made.ReferringPhysicianName = ""
        made.StudyDescription = "benchmark"
        made.PatientName, made.PatientID = "Benchmark^Patient", self.patient_id
        made.PatientBirthDate, made.PatientSex = "19700101", "O"
        made.StudyInstanceUID = self.study_instance_uid
        made.SeriesInstanceUID = self.series_instance_uid
        made.StudyID, made.SeriesNumber, made.InstanceNumber = "1", "1", "1"
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.Rows = 512 if self.pixel_bytes % 1024 == 0 else 1
        made.Columns = self.pixel_bytes // 2 // made.Rows % 65536
        made.BitsAllocated = made.BitsStored = 16
        made.HighBit, made.PixelRepresentation = 15, 0
        return made

    @cached_property
    def _template(self) -> bytes:
        encoded = encode(self.dataset, False, True)
        assert encoded is not None
        return encoded + _PIXEL_DATA + self.pixel_bytes.to_bytes(4, "little")

    def header(self, index: int) -> bytes:
        """Return what precedes the pixel data of one instance, Explicit VR Little Endian."""
        uid = self.sop_instance_uid
        return self._template.replace(uid(0).encode("ascii"), uid(index).encode("ascii"))

    def data(self, index: int) -> Generated:
        """Return one instance's data set."""
        return Generated(self.header(index), self.pixel_bytes)

    def write_files(self, directory: Path) -> None:
        """Write it as Part 10 files."""
        directory.mkdir(parents=True, exist_ok=True)
        pixels = (_CYCLE * (self.pixel_bytes // len(_CYCLE) + 1))[: self.pixel_bytes]
        for index in range(self.instances):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID = UID(self.sop_class_uid)
            meta.MediaStorageSOPInstanceUID = UID(self.sop_instance_uid(index))
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            head = DicomBytesIO()
            write_file_meta_info(head, meta, enforce_standard=True)
            content = bytes(128) + b"DICM" + head.getvalue() + self.header(index) + pixels
            (directory / f"{index:05d}.dcm").write_bytes(content)


class Generated:
    """A data set whose pixel data is copied from the pattern while it is sent."""

    def __init__(self, header: bytes, pixel_bytes: int) -> None:
        self._header = header
        self.size = len(header) + pixel_bytes

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill *buffers* in order from byte *offset*; return how much that was."""
        at = offset
        for buffer in buffers:
            filled = 0
            while filled < len(buffer):
                piece: bytes | memoryview
                if at < len(self._header):
                    piece = self._header[at : at + len(buffer) - filled]
                else:
                    first = (at - len(self._header)) % 251
                    piece = memoryview(_CYCLE)[first : first + len(buffer) - filled]
                buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
                at += len(piece)
        return at - offset
