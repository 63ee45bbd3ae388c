"""``dicomproxy doctor`` and ``check`` on cross-references: what works, and what is wrong where."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicomproxy.cli.doctor_identity import NOBODY, StepFailed, try_cross_references
from dicomproxy.cli.main import main
from dicomproxy.config import Settings, load
from tests.e2e.support import configuration
from tests.peers.pix_manager import Identifier, pix_manager
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID

HERE: Identifier = (PATIENT_ID, "HOSPITAL", "1.2.1")
THERE: Identifier = ("N-0815", "NORTH", "1.2.2")


def config(directory: Path, reference: dict[str, Any]) -> Path:
    made = configuration(
        directory,
        pacs=("LOCALPACS", "127.0.0.1", 104),
        sources={"north": ("NORTH", "127.0.0.1", 105)},
        local={"patient_id_issuer": {"namespace": "HOSPITAL", "universal_id": "1.2.1"}},
        north={
            "patient_id_issuer": {"namespace": "NORTH", "universal_id": "1.2.2"},
            "identity": {"cross_reference": reference["name"]},
        },
        cross_references=[reference],
    )
    file = directory / "dicomproxy.yaml"
    file.write_text(yaml.safe_dump(made))
    return file


class Steps:
    """Takes every step, and keeps what came of it."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.failed: list[str] = []

    async def __call__(self, name: str, act: Callable[[], Awaitable[str]]) -> bool:
        try:
            self.words[name] = await act()
        except StepFailed as error:
            self.words[name] = str(error)
            self.failed.append(name)
            return False
        return True


async def tried(settings: Settings) -> Steps:
    steps = Steps()
    await try_cross_references(settings, steps)
    return steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"local,north\n{PATIENT_ID},2\n", "can be used"),
        (f"local,nowhere\n{PATIENT_ID},2\n", "line 1"),
        (f"local,north\n{PATIENT_ID},2\n3,2\n", "line 3"),
        (None, "cannot be read"),
    ],
    ids=["fine", "unknown name", "one ID of two", "missing"],
)
async def test_a_table_is_read(tmp_path: Path, text: str | None, words: str) -> None:
    """As the proxy would; its faults are told by line, without a patient."""
    if text is not None:
        (tmp_path / "ids.csv").write_text(text)
    reference = {"name": "regional", "type": "table", "file": "ids.csv"}
    steps = await tried(load(config(tmp_path, reference)))
    assert words in steps.words["table"]
    assert steps.failed == ([] if words == "can be used" else ["table"])
    assert PATIENT_ID not in steps.words["table"]


async def test_a_manager_is_asked_for_nobody(tmp_path: Path) -> None:
    """In each domain that it is there for; no patient's ID is sent."""
    async with pix_manager([HERE, THERE]) as manager:
        reference = {"name": "mpi", "type": "pix", "host": "127.0.0.1", "port": manager.port}
        steps = await tried(load(config(tmp_path, reference)))
    assert steps.failed == []
    assert [question.identifier[0] for question in manager.questions] == [NOBODY]


async def test_a_manager_that_does_not_know_the_domain_fails(tmp_path: Path) -> None:
    """Better known before the first query than after it."""
    async with pix_manager([HERE]) as manager:
        reference = {"name": "mpi", "type": "pix", "host": "127.0.0.1", "port": manager.port}
        steps = await tried(load(config(tmp_path, reference)))
    assert steps.failed == ["north IDs"]
    assert "unknown_domain" in steps.words["north IDs"]


async def test_a_manager_that_is_not_there_fails(tmp_path: Path) -> None:
    """In words that say it is the network."""
    reference = {"name": "mpi", "type": "pix", "host": "127.0.0.1", "port": free_port()}
    steps = await tried(load(config(tmp_path, reference)))
    assert steps.failed == ["north IDs"]
    assert "unreachable" in steps.words["north IDs"]


async def test_files_that_cannot_be_read_fail(tmp_path: Path) -> None:
    """Certificates and tokens are read before anybody is called."""
    reference = {
        "name": "mpi",
        "type": "pixm",
        "url": f"https://127.0.0.1:{free_port()}/fhir",
        "authorization_file": "missing",
    }
    steps = await tried(load(config(tmp_path, reference)))
    assert steps.failed == ["files"]


def test_check_says_whose_ids_are_valid_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The domains, and who knows between them."""
    reference = {"name": "regional", "type": "table", "file": "ids.csv"}
    assert main(["check", str(config(tmp_path, reference))]) == 0
    shown = capsys.readouterr().out
    assert "local HOSPITAL, north NORTH" in shown
    assert "regional (table)" in shown
