"""The last resort: an instance in a syntax that its workstation accepts.

Used only where the workstation accepts no syntax in which we hold the object.
Nothing is ever compressed again. Blocking, so it runs in a thread, one instance
at a time, and only up to a size, since pixels must be held in memory for it.
"""

from __future__ import annotations

import io
import warnings
from typing import Any, Final

from pydicom import dcmread
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filewriter import dcmwrite

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)
from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.dataset.transfer_syntaxes import LOSSY

MOST_BYTES: Final = 64 * 1024 * 1024
"""Of a data set, held and decoded; a function of nothing but this constant."""

NATIVE: Final = frozenset(
    {
        IMPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_LITTLE_ENDIAN,
        EXPLICIT_VR_BIG_ENDIAN,
        DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    }
)
"""Syntaxes whose pixel data, if any, is not encapsulated."""

TARGETS: Final = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)
"""What can be made, best first."""


_UNDEFINED_LENGTH: Final = 0xFFFFFFFF


class CannotTranscode(Exception):
    """The instance cannot be had in the other syntax; ``reason`` is a log-safe word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def transcode(data: bytes, sop_class_uid: str, held: str, wanted: str) -> bytes:
    """Return the data set *data*, held in one transfer syntax, in another of :data:`TARGETS`.

    After decoding, Photometric Interpretation says what the pixels then are,
    and Lossy Image Compression that they were once compressed with loss.

    Raises:
        CannotTranscode: it is too large, damaged, or no decoder is installed for it.
    """
    if len(data) > MOST_BYTES:
        raise CannotTranscode("too_large")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they print values
        try:
            # The syntax must be in the meta for pydicom to read by it.
            meta = build_file_meta(sop_class_uid, "1.2", held)
            dataset = dcmread(io.BytesIO(meta + data))
            _settle(dataset)
            if held not in NATIVE:
                _decode(dataset, held)
            return _encode(dataset, held, wanted)
        except CannotTranscode:
            raise
        except Exception as error:
            # Whatever pydicom or a decoder stumbles over; only the kind is known to be harmless.
            raise CannotTranscode(f"undecodable_{type(error).__name__}".lower()[:64]) from None


def _settle(dataset: FileDataset) -> None:
    """See that what pydicom read loosely is what will be written.

    Raises:
        CannotTranscode: the data set ends within a value; pydicom takes what
            there is for all of it, and would give it a length that fits.
    """
    for tag in list(dataset.keys()):
        element: Any = dataset.get_item(tag)
        if not isinstance(element, RawDataElement):
            continue
        if element.value is not None and len(element.value) < element.length < _UNDEFINED_LENGTH:
            raise CannotTranscode("cut_short")
        if element.VR is None and not dataset.original_encoding[0]:
            # Implicit in a syntax that is explicit: files exist that are so, and
            # what pydicom does not look at, it would write without a VR.
            dataset[tag]


def _decode(dataset: FileDataset, held: str) -> None:
    if "PixelData" not in dataset:
        return
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    bits = int(dataset.get("BitsAllocated", 16))
    samples = int(dataset.get("SamplesPerPixel", 1))
    size = int(dataset.Rows) * int(dataset.Columns) * samples * -(-bits // 8) * frames
    if size > MOST_BYTES:
        raise CannotTranscode("too_large")
    try:
        dataset.decompress(generate_instance_uid=False)
    except ValueError:
        # JPEG 2000 whose own signedness contradicts Pixel Representation: frame
        # by frame pydicom cannot correct it, the whole array at once it can.
        colour = "RGB" if samples > 1 else str(dataset.PhotometricInterpretation)
        dataset.set_pixel_data(
            dataset.pixel_array, colour, int(dataset.BitsStored), generate_instance_uid=False
        )
    if held in LOSSY:
        dataset.LossyImageCompression = "01"  # once lossy, always lossy (PS3.3 C.7.6.1.1.5)


def _encode(dataset: FileDataset, held: str, wanted: str) -> bytes:
    if held == EXPLICIT_VR_BIG_ENDIAN:
        if int(dataset.get("BitsAllocated", 16)) > 16:
            raise CannotTranscode("big_endian_words")  # their order was never settled
        _swap_words(dataset)
    del dataset.file_meta
    dataset.preamble = None
    buffer = io.BytesIO()
    dcmwrite(
        buffer,
        dataset,
        implicit_vr=wanted == IMPLICIT_VR_LITTLE_ENDIAN,
        little_endian=True,
        force_encoding=True,
        enforce_file_format=False,
    )
    return buffer.getvalue()


_WORD_BYTES: Final = {"OW": 2, "OL": 4, "OF": 4, "OD": 8, "OV": 8}


def _swap_words(dataset: Dataset) -> None:
    """Turn the words of bulk values around, which pydicom keeps as the bytes they came as."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _swap_words(item)
        elif element.VR in _WORD_BYTES and isinstance(element.value, bytes):
            size = _WORD_BYTES[element.VR]
            swapped = bytearray(len(element.value))
            for byte in range(size):
                swapped[byte::size] = element.value[size - 1 - byte :: size]
            element.value = bytes(swapped)
