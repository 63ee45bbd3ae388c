"""Data for tests: synthetic studies of the sentinel patient, and pydicom's packaged real files.

Nothing is downloaded. What is made here is a pydicom ``Dataset`` with file meta
information, so that a peer can send it in the transfer syntax it names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import pydicom
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)

from tests.sentinel import SENTINEL

_FRAME: Final = 2  # bytes of a pixel


def instance(
    number: int = 1,
    *,
    study_instance_uid: str = "",
    series_instance_uid: str = "",
    sop_class_uid: str = CTImageStorage,
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
    rows: int = 16,
    columns: int = 16,
    frames: int = 1,
    **elements: Any,
) -> Dataset:
    """Make one image of the sentinel patient; UIDs that are not given are new.

    Args:
        number: Instance Number; images of different numbers have different pixels.
        transfer_syntax_uid: uncompressed, deflated, RLE (really encoded), or any
            encapsulated syntax: then the pixels are bytes that no decoder takes,
            which is enough where they only pass through.
        rows: height in pixels of 2 bytes.
        columns: width.
        frames: number of frames; above 1 it is said in Number of Frames.
        **elements: further elements or other values, by keyword; None leaves one out.
    """
    syntax = UID(transfer_syntax_uid)
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 100"
    made.SOPClassUID = sop_class_uid
    made.SOPInstanceUID = generate_uid()
    made.StudyDate = "20200102"
    made.StudyTime = "101500"
    made.Modality = "CT"
    made.ReferringPhysicianName = ""
    made.StudyDescription = "synthetic"
    made.SeriesDescription = "synthetic"
    made.PatientSex = "O"
    for keyword, value in SENTINEL.items():
        setattr(made, keyword, value)
    made.StudyInstanceUID = study_instance_uid or generate_uid()
    made.SeriesInstanceUID = series_instance_uid or generate_uid()
    made.StudyID = "1"
    made.SeriesNumber = "1"
    made.InstanceNumber = str(number)
    made.SamplesPerPixel = 1
    made.PhotometricInterpretation = "MONOCHROME2"
    if frames > 1:
        made.NumberOfFrames = str(frames)
    made.Rows, made.Columns = rows, columns
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit = 15
    made.PixelRepresentation = 0
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    for keyword in [keyword for keyword, value in elements.items() if value is None]:
        delattr(made, keyword)
    _add_pixels(made, number, rows * columns * _FRAME, frames, syntax)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = made.SOPClassUID
    meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    made.file_meta = meta
    return made


def _add_pixels(made: Dataset, number: int, size: int, frames: int, syntax: UID) -> None:
    shades = bytes((number * 7 + index) % 251 for index in range(256))
    frame = (shades * (size // 256 + 1))[:size]
    if not syntax.is_compressed or syntax == DeflatedExplicitVRLittleEndian:
        made.PixelData = frame * frames
    elif syntax == RLELossless:
        from pydicom.pixels import get_encoder

        encoder = get_encoder(RLELossless)
        options: dict[str, Any] = {
            "rows": made.Rows,
            "columns": made.Columns,
            "samples_per_pixel": 1,
            "bits_allocated": 16,
            "bits_stored": 16,
            "number_of_frames": 1,
            "pixel_representation": 0,
            "photometric_interpretation": "MONOCHROME2",
        }
        encoded = encoder.encode(frame, encoding_plugin="pydicom", **options)
        made.PixelData = encapsulate([encoded] * frames)
    else:
        made.PixelData = encapsulate([frame] * frames)
    made["PixelData"].VR = "OB" if syntax.is_encapsulated else "OW"
    if syntax.is_encapsulated:
        made["PixelData"].is_undefined_length = True


def study(
    series: int = 1, instances: int = 3, *, study_instance_uid: str = "", **more: Any
) -> list[Dataset]:
    """Make a study of *series* with *instances* images each, in order.

    Args:
        **more: as for :func:`instance`, the same in every image.
    """
    uid = study_instance_uid or generate_uid()
    made = []
    for series_number in range(1, series + 1):
        series_uid = generate_uid()
        made += [
            instance(
                number,
                study_instance_uid=uid,
                series_instance_uid=series_uid,
                **{"SeriesNumber": str(series_number), **more},
            )
            for number in range(1, instances + 1)
        ]
    return made


def sizeable_ct(slices: int = 100, size: int = 512, **more: Any) -> list[Dataset]:
    """Make a CT of the usual size: half a MiB for each slice of 512 pixels squared."""
    return study(1, slices, rows=size, columns=size, **more)


def data_set_bytes(dataset: Dataset) -> bytes:
    """Encode *dataset* in the transfer syntax of its file meta information."""
    syntax = dataset.file_meta.TransferSyntaxUID
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = syntax.is_implicit_VR
    buffer.is_little_endian = syntax.is_little_endian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dataset(buffer, dataset)
    encoded = buffer.getvalue()
    if syntax == DeflatedExplicitVRLittleEndian:
        return _deflated(encoded)
    return encoded


def _deflated(encoded: bytes) -> bytes:
    import zlib

    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(encoded) + deflate.flush()
    return data + b"\0" * (len(data) % 2)


def part10(dataset: Dataset) -> bytes:
    """Encode *dataset* as a Part 10 file."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class RealFile:
    """One of pydicom's packaged files: what it is, and where its data set begins."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    data_set_offset: int

    @property
    def name(self) -> str:
        return self.path.name

    def data_set_bytes(self) -> bytes:
        """Return the data set exactly as the file holds it."""
        return self.path.read_bytes()[self.data_set_offset :]


def real_files(*, transfer_syntax_uids: Iterable[str] = ()) -> list[RealFile]:
    """Return pydicom's packaged Part 10 files that are instances, by name.

    Left out are directories (DICOMDIR), files without a SOP Instance UID or
    transfer syntax, and those that pydicom itself cannot read to their end.
    """
    wanted = set(transfer_syntax_uids)
    return [one for one in _real_files() if not wanted or one.transfer_syntax_uid in wanted]


@cache
def _real_files() -> tuple[RealFile, ...]:
    directory = Path(pydicom.__file__).parent / "data"
    found = {}
    for path in sorted(directory.rglob("*.dcm")):
        read = _read_real(path)
        # Some files are the same object in another place; a peer would hold one of them.
        if read is not None and read.sop_instance_uid not in found:
            found[read.sop_instance_uid] = read
    return tuple(sorted(found.values(), key=lambda one: one.name))


def _read_real(path: Path) -> RealFile | None:
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = dcmread(path)
            # Sequences are read when they are looked at; a broken one shows here.
            for _ in dataset.iterall():
                pass
        except Exception:  # broken in any way at all: that is what some of the files are for
            return None
    meta = dataset.file_meta
    uids = (
        dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID"),
        dataset.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID"),
        dataset.get("StudyInstanceUID"),
        meta.get("TransferSyntaxUID"),
    )
    if not all(uids) or uids[0] == MediaStorageDirectoryStorage:
        return None
    offset = 132 + 12 + int(meta.get("FileMetaInformationGroupLength") or 0)
    return RealFile(path, *(str(uid) for uid in uids), offset)
