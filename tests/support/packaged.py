"""Every data set that comes with pydicom, whatever is odd about it; nothing is downloaded."""

from __future__ import annotations

import gzip
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom import dcmread
from pydicom.dataset import FileDataset

from dicomproxy.dataset.header import EXPLICIT_VR_BIG_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN
from dicomproxy.dataset.part10 import Part10Error, read_file_meta


def reading(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: data[offset : offset + size]


class Packaged(NamedTuple):
    """One of pydicom's files: what precedes its data set, the data set, its transfer syntax."""

    name: str
    head: bytes
    data: bytes
    syntax: str

    def dataset(self, data: bytes) -> FileDataset:
        """Decode *data* in place of its data set."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = dcmread(io.BytesIO(self.head + data), force=True)
            for _ in dataset.iterall():
                pass
        return dataset


DATA = Path(pydicom.__file__).parent / "data"
NO_DATA_SETS = frozenset({".py", ".pyc", ".json", ".txt", ".md", ".dump", ".icc"})
"""Code, lists, descriptions, dumps as text, and a colour profile."""


def packaged() -> Iterator[Packaged]:
    """Yield every data set that comes with pydicom, whatever its file is called.

    Those without meta information are included, and the one that is compressed.
    """
    for path in sorted(DATA.rglob("*")):
        if not path.is_file() or path.suffix in NO_DATA_SETS or path.name == "README":
            continue
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        try:
            meta = read_file_meta(reading(content))
            offset, syntax = meta.data_set_offset, meta.transfer_syntax_uid
        except Part10Error:
            offset = 132 if content[128:132] == b"DICM" else 0
            while content[offset : offset + 2] == b"\x02\x00":
                vr, length = struct.unpack_from("<2sH", content, offset + 4)
                if vr in (b"OB", b"UN"):
                    (length,) = struct.unpack_from("<L", content, offset + 8)
                    offset += 4
                offset += 8 + length
            big_endian = content[offset : offset + 2] == b"\x00\x08"
            syntax = EXPLICIT_VR_BIG_ENDIAN if big_endian else EXPLICIT_VR_LITTLE_ENDIAN
        yield Packaged(str(path.relative_to(DATA)), content[:offset], content[offset:], syntax)


PACKAGED = {one.name: one for one in packaged()}


def comparable(dataset: FileDataset) -> FileDataset:
    """Leave out what a change of length makes wrong, or what is only there to say a length."""
    for element in list(dataset):
        if not element.tag.element or element.tag == 0x00080001:
            del dataset[element.tag]
    return dataset
