"""From the configuration to who patients are elsewhere: nothing where nothing is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicomproxy import wiring_identity
from dicomproxy.config import Settings, load
from dicomproxy.dataset.accession import Origin
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.safety import Demographics, Unverified
from dicomproxy.ports import CrossReferenceError, SourceQuery
from dicomproxy.state.accessions import AccessionMap
from dicomproxy.wiring_identity import Identity, is_configured, read_secrets
from tests.e2e.support import configuration
from tests.peers.pix_manager import pix_manager
from tests.query.builders import identifier
from tests.sentinel import PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.log_watch import LogWatch

HOSPITAL = Domain("HOSPITAL", "1.2.1", "ISO")
NORTH = Domain("NORTH", "1.2.2", "ISO")
LOCAL = {"patient_id_issuer": {"namespace": "HOSPITAL", "universal_id": "1.2.1"}}
THERE = {"patient_id_issuer": {"namespace": "NORTH", "universal_id": "1.2.2"}}
TABLE = {"name": "regional", "type": "table", "file": "ids.csv"}
ME = PatientId(PATIENT_ID, HOSPITAL)


def settings(directory: Path, **more: Any) -> Settings:
    made = configuration(
        directory,
        pacs=("LOCALPACS", "127.0.0.1", 104),
        sources={
            "north": ("NORTH", "127.0.0.1", 105),
            "south": ("SOUTH", "127.0.0.1", 106),
        },
        **more,
    )
    file = directory / "dicomproxy.yaml"
    file.write_text(yaml.safe_dump(made))
    return load(file)


class Here:
    """The local PACS, and the memory of locations."""

    def __init__(self) -> None:
        self.asked: list[SourceQuery] = []
        self.forgotten: set[tuple[str, str]] = set()

    async def ask(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        self.asked.append(query)
        yield identifier(
            PatientID=PATIENT_ID,
            PatientName=PATIENT_NAME,
            PatientBirthDate=PATIENT_BIRTH_DATE,
            PatientSex="F",
        )

    def forget_patients(self, patients: Any) -> None:
        self.forgotten |= set(patients)


@asynccontextmanager
async def identity(given: Settings, here: Here) -> AsyncIterator[Identity]:
    accessions = AccessionMap(given.state_directory)
    await accessions.start()
    secrets = await asyncio.to_thread(read_secrets, given)
    made = Identity(given, secrets, accessions, here, here.ask)
    try:
        await made.start()
        yield made
    finally:
        await made.close()
        await accessions.close()


@pytest.mark.parametrize(
    ("more", "configured"),
    [
        ({}, False),
        ({"identity": {"remember": "1m"}}, False),  # of what nobody is asked for
        ({"local": LOCAL}, True),
        ({"north": {"identity": {"accession": "mint"}}}, True),  # as by default, but said
        ({"north": {"coerce": {"study_description_prefix": "EXT "}}}, True),
        ({"proxy": {"accession_issuer": "ORDERS"}}, True),
    ],
)
def test_identity_is_there_where_it_is_configured(
    tmp_path: Path, more: dict[str, Any], configured: bool
) -> None:
    """Without a word of it, every patient has one ID everywhere, and nothing is changed."""
    assert is_configured(settings(tmp_path, **more)) is configured


async def test_each_source_has_the_cross_references_it_names(tmp_path: Path) -> None:
    """A manager for one, the shared domain for the other; domains come out whole."""
    here = Here()
    async with pix_manager(
        [(PATIENT_ID, "HOSPITAL", "1.2.1"), ("N-0815", "NORTH", "1.2.2")]
    ) as manager:
        reference = {
            "name": "mpi",
            "type": "pix",
            "host": "127.0.0.1",
            "port": manager.port,
            "sending_facility": "HOSPITAL",
            "receiving_application": "MPI^1.2.9^ISO",
        }
        given = settings(
            tmp_path,
            local=LOCAL,
            north=THERE | {"identity": {"cross_reference": "mpi", "unverified": "withhold"}},
            cross_references=[reference],
        )
        async with identity(given, here) as made:
            service = made.service
            assert await made.identities.elsewhere(ME, "north") == (PatientId("N-0815", NORTH),)
            assert await made.identities.elsewhere(ME, "south") == (ME,)
    (question,) = manager.questions
    assert question.text.startswith("MSH|^~\\&|DICOMPROXY|HOSPITAL|MPI^1.2.9^ISO||")
    north, south = service.of("north"), service.of("south")
    assert north is not None
    assert south is not None
    assert (north.unverified, south.unverified) == (Unverified.WITHHOLD, Unverified.SHOW)
    assert (north.coercion.domain, south.coercion.domain) == (NORTH, HOSPITAL)
    assert service.of("local") is None


async def test_a_table_that_changes_makes_all_that_was_remembered_be_forgotten(
    tmp_path: Path,
) -> None:
    """What its former content said holds no longer."""
    here = Here()
    (tmp_path / "ids.csv").write_text(f"local,north\n{PATIENT_ID},2\n")
    given = settings(
        tmp_path,
        local=LOCAL,
        north=THERE | {"identity": {"cross_reference": "regional"}},
        cross_references=[TABLE],
    )
    async with identity(given, here) as made, asyncio.timeout(60):
        (table,) = made._tables
        await table.look()
        assert await made.identities.elsewhere(ME, "north") == (PatientId("2", NORTH),)
        assert await made.service.demographics(ME) is not None
        fresh = tmp_path / "ids.new"
        fresh.write_text(f"local,north\n{PATIENT_ID},3\n")
        fresh.replace(tmp_path / "ids.csv")
        await table.look()
        assert len(made.service.known) == 0
        assert await made.identities.elsewhere(ME, "north") == (PatientId("3", NORTH),)


async def test_a_table_that_is_configured_no_more_leaves_no_index(
    tmp_path: Path, log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold patient IDs for good. What cannot be removed is told, and is no obstacle."""
    given = settings(tmp_path, local=LOCAL, cross_references=[TABLE])
    directory = given.state_directory / "tables"
    directory.mkdir(parents=True)
    digits = "0123456789abcdef" * 2
    gone = [directory / f"old-table-{digits}.{end}" for end in ("sqlite3", "part")]
    kept = [directory / f"regional-{digits}.sqlite3", directory / "notes.txt"]
    for file in (*gone, *kept):
        file.touch()
    async with identity(given, Here()):
        assert [file.exists() for file in (*gone, *kept)] == [False, False, True, True]

    def fail(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(wiring_identity, "remove_indexes", fail)
    async with identity(given, Here()):
        assert log_watch.named("cross_reference_index_left")


@pytest.mark.parametrize("content", ["", "\n", "Bearer a\nBearer b", "Bearer \N{BULLET}"])
def test_a_secret_that_is_no_header_is_refused(tmp_path: Path, content: str) -> None:
    """Nobody is asked without it, or with another one; what stands there is not told."""
    secret = tmp_path / "secret"
    entry = {
        "name": "fhir",
        "type": "pixm",
        "url": "https://127.0.0.1/fhir",
        "authorization_file": str(secret),
    }
    given = settings(tmp_path, cross_references=[entry])
    secret.write_text(content)
    with pytest.raises(OSError, match="not one line of text") as refused:
        read_secrets(given)
    assert "Bearer" not in str(refused.value)
    secret.write_text("Bearer a-b.c\n")
    assert read_secrets(given)["fhir"].authorization == "Bearer a-b.c"


async def test_a_merge_notice_reaches_whatever_hangs_on_the_ids(tmp_path: Path) -> None:
    """Demographics and locations go with the IDs, in every domain."""
    here = Here()
    (tmp_path / "ids.csv").write_text(f"local,north\n{PATIENT_ID},2\n")
    given = settings(
        tmp_path,
        local=LOCAL,
        north=THERE | {"identity": {"cross_reference": "regional"}},
        cross_references=[TABLE],
    )
    async with identity(given, here) as made, asyncio.timeout(60):
        await made._tables[0].look()
        await made.identities.elsewhere(ME, "north")
        known = Demographics(PATIENT_NAME, PATIENT_BIRTH_DATE, "F")
        assert await made.service.demographics(ME) == known
        assert await made.service.demographics(ME) == known
        assert len(here.asked) == 1
        made.identities.forget(ME)
        assert ("north", "2") in here.forgotten
        assert await made.service.demographics(ME) == known
        assert len(here.asked) == 2


@pytest.mark.parametrize(
    ("section", "shown"),
    [
        ({"accession": "keep"}, None),
        ({"accession": "empty"}, {"4711": Shown("")}),
        (
            {"accession": "prefix", "accession_prefix": "N-"},
            {"4711": Shown("N-4711", Domain("DICOMPROXY"))},
        ),
    ],
)
async def test_accession_numbers_follow_the_policy_of_their_source(
    tmp_path: Path, section: dict[str, Any], shown: Any
) -> None:
    """And the issuer of those made up is the proxy's title where nothing else is said."""
    given = settings(tmp_path, local=LOCAL, north={"identity": section})
    async with identity(given, Here()) as made:
        service = made.service
        assert await service.shown_numbers("north", {"4711": Domain()}) == shown
        if section["accession"] == "prefix":
            assert await service.accessions.resolve("N-4711") == Origin("north", "4711")


async def test_once_closed_nobody_is_asked(tmp_path: Path) -> None:
    """What is looked up then is an error or unknown, and not a crash."""
    here = Here()
    given = settings(tmp_path, local=LOCAL)
    async with identity(given, here) as made:
        pass
    assert await made.service.demographics(ME) is None
    with pytest.raises(CrossReferenceError):
        await made.identities.elsewhere(ME, "north")
    assert here.asked == []
