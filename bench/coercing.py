"""Rows about coercion: processor time for an instance, pixels left where they are.

Measured in this process, since nothing but the processor is asked: the header is
read from a file, decided about and spliced. The rest of the instance is copied
by whoever sends it, coerced or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from bench.data import Study
from bench.stage import Stage
from bench.table import NO_AIM, Row, at_most, under_seconds
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import Coercer, CoercionSettings, LocalPatient
from dicomproxy.identity.safety import Demographics

_AT: Final = datetime(2024, 3, 1, tzinfo=UTC)
_MOST_SECONDS: Final = 0.0003
_LARGE_BYTES: Final = 50_000_000
_HERE: Final = Domain("HERE", "1.2.3.9", "ISO")
_PATIENT: Final = LocalPatient(
    PatientId("LOCAL-1", _HERE), Demographics("Local^Patient", "19700101", "O")
)
_SETTINGS: Final = CoercionSettings(
    "NORTHPACS",
    "DICOMPROXY",
    Domain("NORTH", "1.2.3.1", "ISO"),
    study_description_prefix="[NORTH] ",
)

# What a CT scanner writes of itself: a header of the usual length.
_ELEMENTS: Final = 100
_SEQUENCES: Final = 4


def _header(study: Study, index: int) -> bytes:
    """Return a header of some 140 elements, a few of them sequences, up to the pixels."""
    dataset = study.dataset.copy()
    dataset.SOPInstanceUID = study.sop_instance_uid(index)
    dataset.InstanceNumber = str(index)
    block = dataset.private_block(0x0019, "BENCHMARK", create=True)
    for number in range(_ELEMENTS):
        block.add_new(number, "DS", f"{number}.000000")
    for number in range(_SEQUENCES):
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99B", "benchmark"
        dataset.add_new((0x0040, 0x0254 + 0x0200 * number), "SQ", [code])
    dataset.RequestAttributesSequence = [_request()]
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, dataset)
    pixels = bytes.fromhex("e07f1000") + b"OW\0\0" + study.pixel_bytes.to_bytes(4, "little")
    return buffer.getvalue() + pixels


def _request() -> Dataset:
    made = Dataset()
    made.AccessionNumber, made.RequestedProcedureID = "B10", "1"
    return made


def _reader(descriptor: int) -> Callable[[int, int], bytes]:
    return lambda offset, size: os.pread(descriptor, size, offset)


def _write(study: Study, directory: Path, count: int) -> list[tuple[Path, int]]:
    """Write data sets whose pixels are a hole in the file, which reads as zeros."""
    directory.mkdir(parents=True)
    files = []
    for index in range(count):
        path, header = directory / f"{index}", _header(study, index)
        size = len(header) + study.pixel_bytes
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)
        files.append((path, size))
    return files


def _seconds(files: list[tuple[Path, int]], repeated: int, coercer: Callable[[], Coercer]) -> float:
    """Return the processor time an instance takes, its file open already."""
    opened = [(os.open(path, os.O_RDONLY), size) for path, size in files]
    try:
        began = time.process_time()
        for _ in range(repeated):
            one = coercer()
            for descriptor, size in opened:
                made = one.rewrite(_reader(descriptor), size, ExplicitVRLittleEndian)
                assert made.total_bytes > size
        return (time.process_time() - began) / (repeated * len(opened))
    finally:
        for descriptor, _ in opened:
            os.close(descriptor)


async def coerce(stage: Stage) -> list[Row]:
    """A series of CT, one instance alone, and a series of objects a hundred times as large."""
    quick = stage.sizes.rounds == 1
    count, repeated = (20, 5) if quick else (100, 20)
    study = replace(stage.sizes.ct, number=90)
    small = _write(study, stage.directory / "coerce-ct", count)
    large = _write(
        replace(study, pixel_bytes=_LARGE_BYTES), stage.directory / "coerce-large", count
    )
    accessions = {"B90": Shown("X123456789", _HERE), "B10": Shown("X987654321", _HERE)}
    coercer = partial(Coercer, _PATIENT, _SETTINGS, accessions, _AT)
    measure = "CPU an instance"
    series = Row(
        "coerce", f"coerce {count} CT of 525 KB", measure, "", under_seconds(_MOST_SECONDS)
    )
    # What is decided of one header holds for those that are like it: this is the first.
    alone = Row("coerce", "coerce the first CT of a series", measure, "", NO_AIM)
    of_large = Row(
        "coerce", f"coerce {count} objects of 50 MB", measure, "of 525 KB", at_most(1.25)
    )
    for _ in range(stage.sizes.rounds or 5):
        series.ours.append(_seconds(small, repeated, coercer))
        of_large.ours.append(_seconds(large, repeated, coercer))
        of_large.baseline.append(_seconds(small, repeated, coercer))
        alone.ours.append(_seconds(small[:1], count * repeated, coercer))
    return [series, alone, of_large]
