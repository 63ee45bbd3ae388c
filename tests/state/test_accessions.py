"""Assigned accession numbers: the same each time, also after a restart, and no two the same."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.dataset import accession as minting
from dicomproxy.dataset.accession import AccessionsUnavailable, Origin, mint
from dicomproxy.dataset.patient import Domain
from dicomproxy.state import accessions as accessions_module
from dicomproxy.state.accessions import FILE_NAME, AccessionMap
from dicomproxy.state.file import StateFile
from tests.sentinel import ACCESSION_NUMBER
from tests.support.log_watch import LogWatch

DAY = 86_400
RIS = Domain("RIS", "1.2.3", "ISO")
ONE = Origin("north", ACCESSION_NUMBER)
TWO = Origin("south", ACCESSION_NUMBER)


@pytest.fixture
async def accessions(tmp_path: Path) -> AsyncIterator[AccessionMap]:
    opened = await reopened(tmp_path)
    yield opened
    await opened.close()


async def reopened(directory: Path, **options: Any) -> AccessionMap:
    opened = AccessionMap(directory, **{"retry_seconds": 0.01} | options)
    await opened.start()
    return opened


async def assign(accessions: AccessionMap, origin: Origin, prefix: str = "") -> str:
    (number,) = await accessions.assign([(origin, prefix)])
    return number


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the other side is a thread
            await asyncio.sleep(0.005)


class Disk:
    """The disk of every state file, which can be broken, held and watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.runs = 0
        original = StateFile.run

        def run(file: StateFile, job: Callable[[sqlite3.Connection], Any]) -> Any:
            self.runs += 1
            self.entered.set()
            assert self.go.wait(10)
            if self.error is not None:
                raise self.error
            return original(file, job)

        monkeypatch.setattr(StateFile, "run", run)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


FULL = sqlite3.OperationalError("database or disk is full")


# ----------------------------------------------------------------- assigning


async def test_number_is_minted_and_leads_back(accessions: AccessionMap) -> None:
    """An origin has its number, twice the same one, and the number its origin."""
    number = await assign(accessions, ONE)

    assert number == mint(ONE) == await assign(accessions, ONE)
    assert await accessions.find(number) == ONE
    assert await accessions.find(ACCESSION_NUMBER) is None
    assert await accessions.find("") is None


async def test_same_number_at_two_sources_is_two(accessions: AccessionMap) -> None:
    """Numbers that collide in the region do not collide here."""
    numbers = await accessions.assign([(ONE, ""), (TWO, ""), (ONE, "")])

    assert numbers[0] == numbers[2] != numbers[1]
    assert [await accessions.find(number) for number in numbers] == [ONE, TWO, ONE]


async def test_assigned_numbers_survive_a_restart(tmp_path: Path) -> None:
    """The next process resolves what this one showed, with the issuer."""
    accessions = await reopened(tmp_path)
    number = await assign(accessions, Origin("north", "1", RIS))
    prefixed = await assign(accessions, TWO, "S-")
    await accessions.close()
    accessions = await reopened(tmp_path)

    assert await accessions.find(number) == Origin("north", "1", RIS)
    assert await accessions.find(prefixed) == TWO
    assert prefixed == f"S-{ACCESSION_NUMBER}"
    await accessions.close()


async def test_number_is_on_the_disk_before_it_is_told(tmp_path: Path) -> None:
    """A process that is killed right after an answer has not forgotten what it answered."""
    script = (
        "import asyncio, os, sys, pathlib\n"
        "from dicomproxy.dataset.accession import Origin\n"
        "from dicomproxy.state.accessions import AccessionMap\n"
        "async def main():\n"
        "    accessions = AccessionMap(pathlib.Path(sys.argv[1]))\n"
        "    await accessions.start()\n"
        "    print(*await accessions.assign([(Origin('north', '1001'), '')]), flush=True)\n"
        "    os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 9
    accessions = await reopened(tmp_path)

    assert await accessions.find(child.stdout.decode().strip()) == Origin("north", "1001")
    await accessions.close()


async def test_number_that_is_taken_is_not_given_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two origins hash to one number the second gets its next one, also after a restart."""
    original = minting.mint

    def colliding(origin: Origin, attempt: int = 0) -> str:
        return "X0000000000000" if attempt == 0 else original(origin, attempt)

    monkeypatch.setattr(minting, "mint", colliding)
    accessions = await reopened(tmp_path)
    first, second = await accessions.assign([(ONE, ""), (TWO, "")])
    assert (first, second) == ("X0000000000000", original(TWO, 1))
    await accessions.close()
    accessions = await reopened(tmp_path)

    assert await accessions.assign([(TWO, ""), (ONE, "")]) == [second, first]
    assert [await accessions.find(number) for number in (first, second)] == [ONE, TWO]
    await accessions.close()


async def test_prefixed_number_of_another_source_is_minted(accessions: AccessionMap) -> None:
    """A prefix that makes the number of another source gives way."""
    assert await assign(accessions, Origin("north", "B1"), "A") == "AB1"
    assert await assign(accessions, Origin("south", "1"), "AB") == mint(Origin("south", "1"))


async def test_change_of_policy_keeps_what_was_shown(accessions: AccessionMap) -> None:
    """A number minted earlier still leads back once the source has a prefix."""
    minted = await assign(accessions, ONE)
    prefixed = await assign(accessions, ONE, "N-")

    assert prefixed == f"N-{ACCESSION_NUMBER}"
    assert await accessions.find(minted) == await accessions.find(prefixed) == ONE


async def test_issuer_is_learnt_and_not_unlearnt(tmp_path: Path) -> None:
    """An answer that names the issuer adds it; one that does not takes nothing away."""
    accessions = await reopened(tmp_path)
    number = await assign(accessions, ONE)
    named = Origin(ONE.source, ONE.number, RIS)
    assert await assign(accessions, named) == number
    assert await assign(accessions, ONE) == number
    assert await accessions.find(number) == named
    await accessions.close()
    accessions = await reopened(tmp_path)
    assert await assign(accessions, ONE) == number
    assert await accessions.find(number) == named
    await accessions.close()
    accessions = await reopened(tmp_path)

    assert await accessions.find(number) == named
    await accessions.close()


async def test_issuer_is_not_unlearnt_while_the_disk_fails(tmp_path: Path, disk: Disk) -> None:
    """An answer that names no issuer does not overwrite what is to be written."""
    accessions = await reopened(tmp_path)
    disk.error = FULL
    named = Origin(ONE.source, ONE.number, RIS)
    number = await assign(accessions, named)
    accessions._numbers.clear()
    assert await assign(accessions, ONE) == number
    assert await accessions.find(number) == named
    disk.error = None
    await accessions.close()
    accessions = await reopened(tmp_path)

    assert await accessions.find(number) == named
    await accessions.close()


async def test_known_numbers_cost_no_disk(tmp_path: Path, disk: Disk) -> None:
    """The next query about the same studies reads and writes nothing."""
    accessions = await reopened(tmp_path)
    number = await assign(accessions, ONE)
    runs = disk.runs

    assert await assign(accessions, ONE) == number
    assert await accessions.find(number) == ONE
    assert disk.runs == runs
    await accessions.close()


async def test_thousand_numbers_are_one_transaction(tmp_path: Path, disk: Disk) -> None:
    """What one query teaches costs the disk once."""
    accessions = await reopened(tmp_path)
    runs = disk.runs
    origins = [Origin("north", str(number)) for number in range(1000)]

    assert await accessions.assign([(origin, "") for origin in origins]) == list(map(mint, origins))
    assert disk.runs == runs + 1
    await accessions.close()


async def test_memory_is_bounded(tmp_path: Path) -> None:
    """What does not fit into memory is asked of the disk."""
    accessions = await reopened(tmp_path, known=2)
    origins = [Origin("north", str(number)) for number in range(10)]
    numbers = await accessions.assign([(origin, "") for origin in origins])

    assert (len(accessions._known), len(accessions._numbers)) == (2, 2)
    assert [await accessions.find(number) for number in numbers] == origins
    assert await accessions.assign([(origin, "") for origin in origins]) == numbers
    await accessions.close()


async def test_numbers_not_seen_longest_go_first(tmp_path: Path, log_watch: LogWatch) -> None:
    """Beyond the bound the oldest are forgotten; one that was seen again is not old."""
    now = 0.0
    origins = [Origin("north", str(number)) for number in range(10)]
    accessions = await reopened(tmp_path, clock=lambda: now)
    await accessions.assign([(origin, "") for origin in origins])
    await accessions.close()
    now = 2 * DAY
    accessions = await reopened(tmp_path, clock=lambda: now)
    await accessions.assign([(origin, "") for origin in origins[::2]])
    await accessions.close()
    accessions = await reopened(tmp_path, most=5)

    found = [await accessions.find(mint(origin)) for origin in origins]
    assert [origin for origin in found if origin is not None] == origins[::2]
    assert log_watch.named("accessions_pruned")[0]["pruned"] == 5
    await accessions.close()


# ---------------------------------------------------------------------- disk


async def test_files_are_the_owners_alone(accessions: AccessionMap, tmp_path: Path) -> None:
    """Accession numbers are patients' data: nobody else may read them."""
    await assign(accessions, ONE)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    assert set(modes) >= {FILE_NAME, f"{FILE_NAME}-wal"}
    assert set(modes.values()) == {0o600}


def test_what_is_assigned_survives_a_power_cut(tmp_path: Path) -> None:
    """A number that was shown is on the disk itself, not on its way there."""
    file = AccessionMap(tmp_path)._file

    assert file.run(lambda open_file: open_file.execute("PRAGMA synchronous").fetchone()) == (2,)
    file.close()


@pytest.mark.parametrize("content", [b"no database at all", b"SQLite format 3\0" + b"\xff" * 5000])
async def test_damaged_file_is_set_aside(
    tmp_path: Path, content: bytes, log_watch: LogWatch
) -> None:
    """A file that cannot be read is kept beside a new one, and numbers come out the same."""
    accessions = await reopened(tmp_path)
    number = await assign(accessions, ONE)
    await accessions.close()
    (tmp_path / FILE_NAME).write_bytes(content)
    accessions = await reopened(tmp_path)

    assert await accessions.find(number) is None
    assert await assign(accessions, ONE) == number
    assert await accessions.find(number) == ONE
    assert (tmp_path / f"{FILE_NAME}.damaged").read_bytes() == content
    assert log_watch.named("state_set_aside")[0]["file"] == f"{FILE_NAME}.damaged"
    assert not accessions.degraded
    await accessions.close()


async def test_full_disk_costs_no_operation(
    tmp_path: Path, disk: Disk, log_watch: LogWatch
) -> None:
    """Numbers come from memory, lead back, and are written once the disk takes them."""
    accessions = await reopened(tmp_path)
    disk.error = FULL
    number = await assign(accessions, ONE)

    assert number == mint(ONE)
    assert accessions.degraded
    assert await accessions.find(number) == ONE
    assert await assign(accessions, ONE) == number
    disk.error = None
    await until(lambda: not accessions.degraded)
    await accessions.close()
    accessions = await reopened(tmp_path)
    assert await accessions.find(number) == ONE
    await accessions.close()
    assert len(log_watch.named("accessions_degraded")) == 1
    assert len(log_watch.named("accessions_recovered")) == 1


async def test_unknown_number_during_an_outage_is_not_taken_for_a_local_one(
    tmp_path: Path, disk: Disk
) -> None:
    """While the disk does not say what a number stands for, that is an error."""
    accessions = await reopened(tmp_path, retry_seconds=60)
    disk.error = FULL
    for _ in range(2):  # the second without asking the disk
        with pytest.raises(AccessionsUnavailable):
            await accessions.find(mint(ONE))
    await accessions.close()


async def test_what_waits_is_written_at_the_end(tmp_path: Path, disk: Disk) -> None:
    """A disk that is back when the program ends gets what it missed."""
    accessions = await reopened(tmp_path, retry_seconds=60)
    disk.error = FULL
    number = await assign(accessions, ONE)
    disk.error = None
    await accessions.close()
    accessions = await reopened(tmp_path)

    assert await accessions.find(number) == ONE
    await accessions.close()


async def test_what_waits_is_bounded(tmp_path: Path, disk: Disk, log_watch: LogWatch) -> None:
    """The oldest go when too many wait; how many is told when the disk is back."""
    accessions = await reopened(tmp_path, pending=3, known=3)
    disk.error = FULL
    await accessions.assign([(Origin("north", str(number)), "") for number in range(10)])
    assert repr(accessions) == "<AccessionMap degraded, 3 pending>"
    disk.error = None
    await until(lambda: not accessions.degraded)

    assert log_watch.named("accessions_recovered")[0]["dropped"] == 7
    await accessions.close()


async def test_two_origins_never_share_a_number_while_the_disk_fails(
    tmp_path: Path, disk: Disk
) -> None:
    """Among numbers from memory a prefix that makes another's number gives way too."""
    accessions = await reopened(tmp_path)
    disk.error = FULL
    assert await assign(accessions, Origin("north", "B1"), "A") == "AB1"

    assert await assign(accessions, Origin("south", "1"), "AB") == mint(Origin("south", "1"))
    disk.error = None
    await accessions.close()


async def test_number_given_from_memory_that_was_taken_is_told(
    tmp_path: Path, disk: Disk, log_watch: LogWatch
) -> None:
    """What the disk says counts: the earlier origin keeps the number, the later gets another."""
    accessions = await reopened(tmp_path)
    await assign(accessions, Origin("north", "B1"), "A")
    await accessions.close()
    accessions = await reopened(tmp_path)
    disk.error = FULL
    later = Origin("south", "1")
    assert await assign(accessions, later, "AB") == "AB1"
    disk.error = None
    await until(lambda: not accessions.degraded)

    assert await accessions.find("AB1") == Origin("north", "B1")
    assert await assign(accessions, later, "AB") == mint(later)
    assert log_watch.named("accession_collision")[0]["count"] == 1
    await accessions.close()


async def test_disk_that_hangs_costs_its_deadline_once(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a time-out numbers come from memory at once, and what was late changes nothing."""
    monkeypatch.setattr(accessions_module, "_ANSWER_SECONDS", 0.05)
    accessions = await reopened(tmp_path, retry_seconds=60)
    disk.go.clear()
    disk.entered.clear()
    number = await assign(accessions, ONE)
    assert number == mint(ONE)
    assert await assign(accessions, TWO) == mint(TWO)
    assert accessions._waiting == 1  # the second did not ask
    disk.go.set()
    await accessions.close()
    accessions = await reopened(tmp_path)
    assert [await accessions.find(mint(origin)) for origin in (ONE, TWO)] == [ONE, TWO]
    await accessions.close()


async def test_cancelled_caller_leaves_the_map_in_order(tmp_path: Path, disk: Disk) -> None:
    """Whoever goes while the disk works harms nobody who comes later."""
    accessions = await reopened(tmp_path)
    disk.go.clear()
    disk.entered.clear()
    waiting = asyncio.create_task(assign(accessions, ONE))
    await until(disk.entered.is_set)
    waiting.cancel()
    await until(waiting.done)
    disk.go.set()

    assert await assign(accessions, ONE) == mint(ONE)
    assert not accessions.degraded
    await accessions.close()


async def test_concurrent_callers_get_the_same_number(accessions: AccessionMap) -> None:
    """Legs of several queries that see one study at once agree on its number."""
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        tasks = [group.create_task(assign(accessions, ONE)) for _ in range(20)]

    assert {task.result() for task in tasks} == {mint(ONE)}


async def test_directory_that_cannot_be_made_is_an_outage(tmp_path: Path) -> None:
    """A state directory in the way of a file degrades the map, and nothing raises."""
    (tmp_path / "state").write_text("a file")
    accessions = await reopened(tmp_path / "state")

    assert accessions.degraded
    assert await assign(accessions, ONE) == mint(ONE)
    await accessions.close()
