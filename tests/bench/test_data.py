"""The benchmark's synthetic studies: real instances, of one length, told apart by their UIDs."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import dcmread

from bench.data import Study


def test_files_are_instances_of_one_study(tmp_path: Path) -> None:
    """pydicom reads them back with their own UIDs, one study, and all their pixels."""
    study = Study(10, "MR", 3, 128 * 128 * 2)

    study.write_files(tmp_path)

    read = [dcmread(path) for path in sorted(tmp_path.iterdir())]
    assert [one.SOPInstanceUID for one in read] == [study.sop_instance_uid(n) for n in range(3)]
    assert {one.StudyInstanceUID for one in read} == {study.study_instance_uid}
    assert {len(one.PixelData) for one in read} == {study.pixel_bytes}
    assert {one.file_meta.MediaStorageSOPClassUID for one in read} == {study.sop_class_uid}


@pytest.mark.parametrize("block", [100, 4096, 100_000])
async def test_generated_data_is_what_the_files_hold(tmp_path: Path, block: int) -> None:
    """However it is cut into blocks, what is sent equals what is written."""
    study = Study(11, "CT", 2, 60_000)
    study.write_files(tmp_path)
    content = (tmp_path / "00001.dcm").read_bytes()
    data = study.data(1)

    sent = bytearray()
    while len(sent) < data.size:
        buffer = memoryview(bytearray(min(block, data.size - len(sent))))
        half = len(buffer) // 2
        sent_now = await data.read_into([buffer[:half], buffer[half:]], len(sent))
        sent += buffer[:sent_now]

    assert len(sent) * study.instances == study.total_bytes
    assert content.endswith(bytes(sent))
