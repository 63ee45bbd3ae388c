"""Another toolkit's judgement of coerced objects: no error that the original did not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.dataset.splice import scan
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import (
    Coercer,
    CoercionSettings,
    LocalPatient,
    accession_numbers,
)
from dicomproxy.identity.safety import Demographics
from tests.peers.process import require, run_program
from tests.support.datasets import RealFile, instance, part10, real_files

AT = datetime(2024, 2, 3, tzinfo=UTC)
HERE = Domain("HERE", "1.2.3.9", "ISO")
LATIN = LocalPatient(PatientId("L-1", HERE), Demographics("Local^Name", "19701231", "F"))
UNICODE = LocalPatient(PatientId("L-1", HERE), Demographics("Łukasz^Ő=王^小东", "19701231", "F"))
SETTINGS = CoercionSettings(
    "NORTHPACS", "DICOMPROXY", Domain("NORTH", "1.2.3.1", "ISO"), study_description_prefix="[N] "
)

pytestmark = [pytest.mark.peers, pytest.mark.slow]


def coerced(data: bytes, syntax: str, patient: LocalPatient) -> Iterator[bytes]:
    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    accessions: Mapping[str, Shown] = {}
    if not syntax.endswith("1.99"):
        view = scan(read, len(data), syntax, SETTINGS.tags).view()
        accessions = {number: Shown("X123456789", HERE) for number in accession_numbers(view)}
    return Coercer(patient, SETTINGS, accessions, AT).rewrite(read, len(data), syntax).chunks()


async def errors(content: bytes, directory: Path) -> Counter[str]:
    program = require("dciodvfy")
    path = directory / "object.dcm"
    path.write_bytes(content)
    _, output = await run_program([program, str(path)], directory, 60)
    assert output.strip(), "nothing was said"
    return Counter(line for line in output.splitlines() if line.startswith("Error"))


@pytest.mark.parametrize("patient", [LATIN, UNICODE], ids=["latin", "unicode"])
@pytest.mark.parametrize("one", real_files(), ids=lambda one: one.name)
async def test_no_error_that_the_original_did_not_have(
    one: RealFile, patient: LocalPatient, tmp_path: Path
) -> None:
    """Whatever the object, and whether or not all of its text is converted."""
    content = one.path.read_bytes()
    head = content[: one.data_set_offset]
    made = b"".join(coerced(one.data_set_bytes(), one.transfer_syntax_uid, patient))

    before = await errors(content, tmp_path)
    after = await errors(head + made, tmp_path)

    assert after - before == Counter()


async def test_an_error_would_be_seen(tmp_path: Path) -> None:
    """The judge speaks up: without its SOP Instance UID an object is wrong."""
    whole, less = instance(), instance()
    del less.SOPInstanceUID

    before = await errors(part10(whole), tmp_path)
    after = await errors(part10(less), tmp_path)

    assert after - before
