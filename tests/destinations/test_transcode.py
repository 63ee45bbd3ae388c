"""The last resort, on pydicom's real files: the same pixels in a syntax that is accepted."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, dcmread

from dicomproxy.dataset.part10 import build_file_meta
from dicomproxy.dataset.transfer_syntaxes import LOSSY
from dicomproxy.destinations import transcode as module
from dicomproxy.destinations.transcode import CannotTranscode, transcode
from dicomproxy.ports import Delivered
from tests.destinations.support import (
    BIG_ENDIAN,
    CT,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    JPEG_LOSSLESS,
    RLE,
    Item,
    desk,
)
from tests.sentinel import PATIENT_NAME
from tests.support.datasets import RealFile, _read_real, data_set_bytes, instance, real_files
from tests.support.stand_in import StandIn, only

pytestmark = pytest.mark.filterwarnings("ignore:::pydicom")

_IGNORED = {
    "PixelData",
    "PhotometricInterpretation",
    "LossyImageCompression",
    "PlanarConfiguration",
}


def read(data: bytes, sop_class_uid: str, syntax: str) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcmread(io.BytesIO(build_file_meta(sop_class_uid, "1.2", syntax) + data))


def pixels(dataset: Dataset) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataset.pixel_array


def decodable(file: RealFile) -> bool:
    """Tell whether pydicom by itself gives the file's pixels; that is the oracle.

    Left out is what we refuse: big-endian words of 32 bits, and what is large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(file.path)
        if "PixelData" not in dataset or dataset.file_meta.TransferSyntaxUID != (
            file.transfer_syntax_uid
        ):
            return False
        try:
            ambiguous = file.transfer_syntax_uid == BIG_ENDIAN and dataset.BitsAllocated > 16
            return not ambiguous and dataset.pixel_array.nbytes < 8 << 20
        except Exception:  # broken in whatever way: that is what some of the files are for
            return False


def _all_files() -> list[RealFile]:
    """Return the real files, and those that are another one in a different transfer syntax."""
    found = {(one.sop_instance_uid, one.transfer_syntax_uid): one for one in real_files()}
    for path in sorted(Path(pydicom.__file__).parent.rglob("*.dcm")):
        read_file = _read_real(path)
        if read_file is not None:
            key = (read_file.sop_instance_uid, read_file.transfer_syntax_uid)
            found.setdefault(key, read_file)
    return list(found.values())


DECODABLE = [file for file in _all_files() if decodable(file)]


def test_oracle_covers_the_kinds_of_compression() -> None:
    """The files that pydicom decodes are not a few accidental ones."""
    held = {file.transfer_syntax_uid for file in DECODABLE}
    assert {JPEG, JPEG_LOSSLESS, RLE, EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED} <= held
    assert {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"} <= held


@pytest.mark.parametrize("wanted", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("file", DECODABLE, ids=lambda file: file.name)
def test_real_pixels_survive(file: RealFile, wanted: str) -> None:
    """Every frame as pydicom decodes it from the file, and every other element as it was."""
    held = file.transfer_syntax_uid
    made = transcode(file.data_set_bytes(), file.sop_class_uid, held, wanted)
    after = read(made, file.sop_class_uid, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = dcmread(file.path)
    assert np.array_equal(pixels(before), pixels(after))
    for element in before:
        # Group lengths are retired, and dropped; they would be wrong.
        if element.keyword not in _IGNORED and element.tag.element != 0:
            assert element.tag in after, element.tag
            # Implicit VR does not say of which VR a private value is.
            if element.VR not in ("SQ", "OW", "OB") and element.VR == after[element.tag].VR:
                assert after[element.tag].value == element.value, element.tag
    if held in LOSSY:
        assert after.LossyImageCompression == "01"
    assert after.SOPInstanceUID == before.get("SOPInstanceUID", after.SOPInstanceUID)


@pytest.mark.parametrize(
    "syntax", [JPEG, "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91", RLE, DEFLATED, BIG_ENDIAN]
)
async def test_workstation_without_compression_gets_the_same_pixels(syntax: str) -> None:
    """End to end: a compressed file reaches a workstation that takes uncompressed only."""
    file = next(one for one in DECODABLE if one.transfer_syntax_uid == syntax)
    item = Item(file.sop_class_uid, syntax, file.data_set_bytes(), file.sop_instance_uid)
    supported = only({file.sop_class_uid: [EXPLICIT]})
    async with desk(StandIn(supported=supported)) as at, at.open() as delivery:
        assert await delivery.send(item) == [Delivered.COMPLETED]
    (message,) = at.peer.messages
    assert message.context.transfer_syntax == EXPLICIT
    arrived = read(message.data, file.sop_class_uid, EXPLICIT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(pixels(arrived), dcmread(file.path).pixel_array)


def test_words_of_big_endian_are_turned_around() -> None:
    """16-bit pixels, and bulk values within items, keep their numbers."""
    little = instance(3)
    item = Dataset()
    item.add_new(0x00281201, "OW", b"\x01\x02\x03\x04")
    little.add_new(0x00283010, "SQ", [item])
    expected = pixels(little)
    big = instance(3, transfer_syntax_uid=BIG_ENDIAN)
    big.PixelData = expected.astype(">u2").tobytes()
    swapped = Dataset()
    swapped.add_new(0x00281201, "OW", b"\x02\x01\x04\x03")
    big.add_new(0x00283010, "SQ", [swapped])
    made = transcode(data_set_bytes(big), CT, BIG_ENDIAN, EXPLICIT)
    after = read(made, CT, EXPLICIT)
    assert np.array_equal(pixels(after), expected)
    assert after[0x00283010].value[0][0x00281201].value == b"\x01\x02\x03\x04"


@pytest.mark.parametrize(("syntax", "expected"), [(JPEG, "01"), (JPEG_LOSSLESS, None)])
def test_loss_is_never_forgotten(syntax: str, expected: str | None) -> None:
    """What was compressed with loss says so once decoded, though its source did not."""
    file = next(one for one in DECODABLE if one.transfer_syntax_uid == syntax)
    silent = read(file.data_set_bytes(), file.sop_class_uid, syntax)
    for keyword in ("LossyImageCompression", "LossyImageCompressionMethod"):
        if keyword in silent:
            delattr(silent, keyword)
    made = transcode(data_set_bytes(silent), file.sop_class_uid, syntax, EXPLICIT)
    assert read(made, file.sop_class_uid, EXPLICIT).get("LossyImageCompression") == expected


def test_no_pixels_no_decoding() -> None:
    """A document in a compressed syntax has nothing to decode, and is written anew all the same."""
    report = instance(1, transfer_syntax_uid=RLE)
    del report.PixelData
    after = read(transcode(data_set_bytes(report), CT, RLE, IMPLICIT), CT, IMPLICIT)
    assert after.PatientName == PATIENT_NAME


def _bomb() -> bytes:
    """A few bytes that claim to be 1.8 GB of pixels."""
    made = instance(1, transfer_syntax_uid=RLE)
    made.Rows = made.Columns = 30_000
    return data_set_bytes(made)


@pytest.mark.parametrize(
    ("data", "held", "reason"),
    [
        (data_set_bytes(instance(1))[:-5], EXPLICIT, "cut_short"),
        (data_set_bytes(instance(1, transfer_syntax_uid=JPEG)), JPEG, "undecodable_"),
        (
            data_set_bytes(instance(1, transfer_syntax_uid="1.2.840.10008.1.2.4.100")),
            "1.2.840.10008.1.2.4.100",
            "undecodable_",
        ),
        (b"not deflated at all", DEFLATED, "undecodable_"),
        (
            _bomb(),
            RLE,
            "too_large",
        ),
        (
            data_set_bytes(instance(1, transfer_syntax_uid=BIG_ENDIAN, BitsAllocated=32)),
            BIG_ENDIAN,
            "big_endian_words",
        ),
    ],
    ids=["cut", "no_jpeg", "video", "not_deflated", "bomb", "words_of_32_bits"],
)
def test_what_cannot_be_had_is_said_in_a_word(data: bytes, held: str, reason: str) -> None:
    """Damage, missing decoders and size end in one exception without values."""
    with pytest.raises(CannotTranscode) as caught:
        transcode(data, CT, held, EXPLICIT)
    assert caught.value.reason.startswith(reason)
    assert caught.value.__cause__ is None


def test_size_is_bounded_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte too many is too many."""
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    data = data_set_bytes(instance(1, rows=4, columns=4))
    assert transcode(data, CT, EXPLICIT, IMPLICIT)
    with pytest.raises(CannotTranscode, match="too_large"):
        transcode(data + bytes(1001), CT, EXPLICIT, IMPLICIT)
