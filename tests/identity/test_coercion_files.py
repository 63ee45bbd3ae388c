"""Real files, however odd, are made local and taken back."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.dataset.splice import SpliceError
from dicomproxy.identity.coercion import Coercer, CoercionSettings, LocalPatient
from dicomproxy.identity.safety import Demographics
from tests.identity.test_coercion_charset import restored, texts
from tests.support.packaged import PACKAGED, comparable, reading

AT = datetime(2024, 2, 3, tzinfo=UTC)
HERE = Domain("HERE", "1.2.3.9", "ISO")
SETTINGS = CoercionSettings("north", "DICOMPROXY", Domain("NORTH"), study_description_prefix="[N] ")
REFUSED = ("test_files/no_meta.dcm",)
"""Begins with a byte too many: where its Patient ID is, nobody finds it."""


@pytest.mark.parametrize("local", ["Local^Name", "Анна^Ж", "Yamada^Tarou=山田^太郎"])
@pytest.mark.parametrize("name", [name for name in PACKAGED if name not in REFUSED])
def test_every_real_file_becomes_local_and_can_be_taken_back(name: str, local: str) -> None:
    """pydicom reads the local patient, and by the record finds all that was there before."""
    one = PACKAGED[name]
    patient = LocalPatient(PatientId("L-1", HERE), Demographics(local, "19700101", "F"))
    coercer = Coercer(patient, SETTINGS, {}, AT)

    made = coercer.rewrite(reading(one.data), len(one.data), one.syntax)
    found = comparable(one.dataset(b"".join(made.chunks())))

    assert (found.PatientID, str(found.PatientName)) == ("L-1", local)
    assert (found.PatientBirthDate, found.PatientSex) == ("19700101", "F")
    original = comparable(one.dataset(one.data))
    assert texts(restored(found, original)) == texts(original)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_sense_of_is_refused(name: str) -> None:
    """No patient is put into what may name another one further on."""
    one = PACKAGED[name]
    patient = LocalPatient(PatientId("L-1", HERE), Demographics("Local^Name"))

    with pytest.raises(SpliceError):
        Coercer(patient, SETTINGS, {}, AT).rewrite(reading(one.data), len(one.data), one.syntax)
