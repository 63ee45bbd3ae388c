"""``dicomproxy doctor`` on the HL7 listener: whether what its TLS needs is there and fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dicomproxy.cli.doctor_hl7 import try_listener
from dicomproxy.cli.main import main
from dicomproxy.config import Settings, load
from tests.cli.test_doctor_identity import Steps
from tests.e2e.support import configuration
from tests.peers.ports import free_port
from tests.support.certificates import authority


def config(directory: Path, **hl7: Any) -> Path:
    made = configuration(
        directory,
        pacs=("LOCALPACS", "127.0.0.1", free_port()),
        sources={},
        local={"patient_id_issuer": "HOSPITAL", "connect_timeout": "1s"},
        hl7={"allow_from": "10.0.2.7", **hl7},
    )
    file = directory / "dicomproxy.yaml"
    file.write_text(yaml.safe_dump(made))
    return file


def settings(directory: Path, **hl7: Any) -> Settings:
    return load(config(directory, **hl7))


async def tried(given: Settings) -> Steps:
    steps = Steps()
    await try_listener(given, steps)
    return steps


async def test_nothing_is_tried_of_plain_tcp(tmp_path: Path) -> None:
    """There is nothing that could be wrong with it."""
    assert (await tried(settings(tmp_path))).words == {}


async def test_certificate_and_key_that_fit_are_fine(tmp_path: Path) -> None:
    """In one file, as the authority writes them."""
    certificate = authority().certificate_file(tmp_path)
    steps = await tried(settings(tmp_path, tls={"certificate_file": str(certificate)}))
    assert steps.words == {"files": "certificate and key fit"}
    assert steps.failed == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("missing", "no such file"), ("garbage", "no"), ("another_key", "mismatch")],
)
async def test_what_is_wrong_with_the_files_is_told(tmp_path: Path, wrong: str, words: str) -> None:
    """In the system's words, or OpenSSL's."""
    certificate = authority().certificate_file(tmp_path)
    tls = {"certificate_file": str(certificate)}
    if wrong == "missing":
        tls["certificate_file"] = "missing.pem"
    elif wrong == "garbage":
        certificate.write_text("no certificate")
    else:
        key = tmp_path / "key.pem"
        authority().issuer.issue_cert("other").private_key_pem.write_to_path(str(key))
        tls["key_file"] = str(key)
    steps = await tried(settings(tmp_path, tls=tls))
    assert steps.failed == ["files"]
    assert words in steps.words["files"].lower()


def test_doctor_tries_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command has a part for it, after the archives."""
    file = config(tmp_path, tls={"certificate_file": "missing.pem"})
    assert main(["doctor", "--config", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "hl7: listens on 0.0.0.0:2575" in shown
    assert "No such file or directory" in shown
