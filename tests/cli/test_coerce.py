"""``dicomproxy coerce`` shows what a delivery would change, and writes it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from pydicom import Dataset, Sequence, dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from dicomproxy.cli.main import main
from tests.sentinel import ACCESSION_NUMBER, PATIENT_ID
from tests.support.datasets import instance, part10

CONFIG = """\
proxy: {ae_title: DICOMPROXY}
local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104, patient_id_issuer: HERE}
cache: {directory: cache, max_size: 200GB}
sources:
  - name: north
    ae_title: NORTHPACS
    host: 10.9.0.4
    port: 104
    patient_id_issuer: NORTH
    identity: {cross_reference: staff, accession: %s}
    coerce:
      study_description_prefix: "[N] "
      rules:
        - {action: remove, attribute: PatientComments, destinations: [TEACHING]}
cross_references: [{name: staff, type: table, file: staff.csv}]
"""


def prepare(directory: Path, dataset: Dataset, accession: str = "mint") -> list[str]:
    """Write configuration and object; return the arguments of the command."""
    (directory / "site.yaml").write_text(CONFIG % accession, "utf-8")
    (directory / "in.dcm").write_bytes(part10(dataset))
    files = [str(directory / name) for name in ("site.yaml", "in.dcm", "out.dcm")]
    return ["coerce", "--source", "north", "--config", *files]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_the_difference_is_shown_and_the_result_written(
    syntax: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each change is a line that goes and one that comes; the file is a DICOM file again."""
    dataset = instance(transfer_syntax_uid=syntax)
    command = prepare(tmp_path, dataset)

    code = main([*command, "--patient-id", "L-1", "--patient-name", "Local^Name", "--sex", "F"])

    said = capsys.readouterr().out.splitlines()
    assert code == 0
    assert f"-(0010,0020) LO PatientID [{PATIENT_ID}]" in said
    assert "+(0010,0020) LO PatientID [L-1]" in said
    assert "+(0010,0040) CS PatientSex [F]" in said
    assert "+(0008,1030) LO StudyDescription [[N] synthetic]" in said
    assert any("ModifiedAttributesSequence" in line for line in said)
    assert not any("BirthDate [" in line and line.startswith(("+(", "-(")) for line in said)
    found = dcmread(tmp_path / "out.dcm")
    assert (found.PatientID, found.PatientName) == ("L-1", "Local^Name")
    assert found.PatientBirthDate == dataset.PatientBirthDate
    assert found.OtherPatientIDsSequence[0].IssuerOfPatientID == "NORTH"
    assert found.PixelData == dataset.PixelData
    assert found.AccessionNumber.startswith("X")
    assert found.IssuerOfAccessionNumberSequence[0].LocalNamespaceEntityID == "DICOMPROXY"


def test_text_that_only_changes_its_encoding_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says that all is converted, and none that unchanged text were changed."""
    command = prepare(tmp_path, instance(RequestedProcedureDescription="Schädel"))

    assert main([*command, "--patient-id", "L-1", "--patient-name", "Анна"]) == 0

    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "all other text is converted to ISO_IR 192"
    assert not any("Schädel" in line for line in said)
    assert dcmread(tmp_path / "out.dcm").RequestedProcedureDescription == "Schädel"


@pytest.mark.parametrize(("accession", "expected"), [("keep", ACCESSION_NUMBER), ("empty", "")])
def test_accession_numbers_follow_the_policy(
    accession: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the source's policy says."""
    assert main(prepare(tmp_path, instance(), accession)) == 0
    capsys.readouterr()
    assert dcmread(tmp_path / "out.dcm").AccessionNumber == expected


def test_without_a_local_patient_the_patient_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is asked who the patient is."""
    assert main(prepare(tmp_path, instance())) == 0
    assert "(0010,0020)" not in "".join(
        line for line in capsys.readouterr().out.splitlines() if line[:1] in "+-" and line[1] == "("
    )
    assert dcmread(tmp_path / "out.dcm").PatientID == PATIENT_ID


@pytest.mark.parametrize(("destination", "kept"), [("READING1", True), ("TEACHING", False)])
def test_rules_for_a_destination_are_shown_for_it(
    destination: str, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What goes to one workstation may differ from what goes to another."""
    command = prepare(tmp_path, instance(PatientComments="none"))
    assert main([*command, "--destination", destination]) == 0
    capsys.readouterr()
    assert ("PatientComments" in dcmread(tmp_path / "out.dcm")) is kept


def test_nothing_to_change_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An object that is local already is copied."""
    dataset = instance(StudyDescription="[N] a", StudyID="")
    assert main(prepare(tmp_path, dataset, "keep")) == 0
    assert capsys.readouterr().out == "nothing is changed\n"
    assert (tmp_path / "out.dcm").read_bytes() == (tmp_path / "in.dcm").read_bytes()


def test_what_would_move_a_terminal_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters of an object do not reach whoever looks at it."""
    item = Dataset()
    item.RequestedProcedureDescription = "a\x9b2Jb"
    dataset = instance(RequestAttributesSequence=Sequence([item]), StudyID="\x0c7")
    assert main(prepare(tmp_path, dataset)) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--birth-date", "20010203"], "another birth date"),
        (["--sex", "F", "--birth-date", "20010203"], "another birth date"),
        (["--birth-date", "19010203"], None),
        (["--birth-date", "", "--sex", ""], "neither birth date nor sex to compare"),
    ],
)
def test_what_a_delivery_would_withhold_is_said(
    options: list[str], words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command makes anything look like anybody's; a delivery does not."""
    command = prepare(tmp_path, instance(PatientBirthDate="19010203", PatientSex="O"))
    config = tmp_path / "site.yaml"
    config.write_text(
        config.read_text().replace("identity: {", "identity: {unverified: withhold, ")
    )

    assert main([*command, "--patient-id", "L-1", *options]) == 0

    withheld = [line for line in capsys.readouterr().out.splitlines() if "withhold" in line]
    assert len(withheld) == (words is not None)
    assert words is None or words in withheld[0]


def test_a_terminal_that_cannot_write_a_name_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not know is shown as a question mark."""
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    command = prepare(tmp_path, instance())

    assert main([*command, "--patient-id", "L-1", "--patient-name", "Анна"]) == 0

    shown.flush()
    assert b"PatientName [????]" in shown.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--source", "south"], "sources are: north"),
        (["--patient-id", "x" * 65], "--patient-id is no value of VR LO"),
        (["--patient-id", "L-1", "--birth-date", "1970-12-31"], "--birth-date"),
        (["--sex", "F"], "needs --patient-id"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is read; exit status 2."""
    assert main([*prepare(tmp_path, instance()), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.dcm").exists()


def test_the_original_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """IN stays what it is, under whatever name it is called."""
    command = prepare(tmp_path, instance())
    (tmp_path / "out.dcm").hardlink_to(tmp_path / "in.dcm")
    before = (tmp_path / "in.dcm").read_bytes()

    assert main(command) == 2
    assert "same file" in capsys.readouterr().err
    assert (tmp_path / "in.dcm").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no DICOM at all", part10(instance())[:300]])
def test_what_is_no_dicom_file_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit status 1, and nothing left behind."""
    command = prepare(tmp_path, instance())
    (tmp_path / "in.dcm").write_bytes(content)

    assert main(command) == 1
    assert "in.dcm: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.dcm", "site.yaml"]


def test_files_that_cannot_be_opened_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either of them."""
    command = prepare(tmp_path, instance())
    assert main([*command[:-1], str(tmp_path / "nowhere" / "out.dcm")]) == 1
    assert capsys.readouterr().err == f"{tmp_path}/nowhere/out.dcm: No such file or directory\n"
    (tmp_path / "out.dcm").mkdir()
    assert main(command) == 1
    assert capsys.readouterr().err == f"{tmp_path}/out.dcm: Is a directory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.dcm", "out.dcm", "site.yaml"]
    (tmp_path / "in.dcm").unlink()
    assert main(command) == 1
    assert "in.dcm: No such file" in capsys.readouterr().err
