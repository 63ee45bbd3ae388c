"""A table of IDs in a file: read whole or refused, indexed on disk, taken over when it changes."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity import reports
from dicomproxy.identity import table as table_module
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.table import TableCrossReference, check_table
from dicomproxy.identity.table_file import Link, TableError, TableFile
from dicomproxy.identity.table_index import Changing, Stopped, TableIndex, build, content_hash
from dicomproxy.ports import CrossReferenceError
from tests.identity.providers import HOSPITAL, NORTH, SOUTH, local, north
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch

DOMAINS = Domains(HOSPITAL, {"north": NORTH, "south": SOUTH, "sister": Domain()})
WIDE = f"local,north,south\n{PATIENT_ID},N1,S1\nL2,,S2\n"
LONG = f"local_id,source,id\n{PATIENT_ID},north,N1\n{PATIENT_ID},south,S1\nL2,south,S2\n"
ME = local(PATIENT_ID)


def links(text: str | bytes) -> list[Link]:
    data = text.encode() if isinstance(text, str) else text
    return list(TableFile(BytesIO(data)).links())


def never() -> bool:
    return False


# ------------------------------------------------------------------- the file

BOTH_FORMS = {
    Link("north", "N1", PATIENT_ID, 2),
    Link("south", "S1", PATIENT_ID, 2),
    Link("south", "S2", "L2", 3),
}


@pytest.mark.parametrize(
    "text",
    [
        WIDE,
        WIDE.replace(",", ";"),
        WIDE.replace(",", "\t"),
        WIDE.replace("\n", "\r\n"),
        "\ufeff" + WIDE,
        WIDE.rstrip("\n"),
        WIDE + "\n , ,\n",
        WIDE.replace("N1", ' "N1"'.strip()).replace("L2", " L2 "),
        f"south,local,north\nS1,{PATIENT_ID},N1\nS2,L2,\n",
    ],
)
def test_wide_form_has_a_row_for_each_patient(text: str) -> None:
    """Separators, line ends, quotes, spaces and the order of columns make no difference."""
    assert set(links(text)) == BOTH_FORMS


@pytest.mark.parametrize("text", [LONG, LONG.replace("source", "domain"), LONG.replace(",", ";")])
def test_long_form_has_a_row_for_each_id(text: str) -> None:
    """The long form says the same, a line for each ID."""
    assert {link._replace(line=0) for link in links(text)} == {
        link._replace(line=0) for link in BOTH_FORMS
    }


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["line 1: a header row that is neither"]),
        ("north,south\nN1,S1\n", ["line 1: a header row that is neither"]),
        ("local\nL1\n", ["line 1: a header row that is neither"]),
        ("local,north,north\nL1,a,b\n", ["line 1: a column without a name, or a name twice"]),
        ("local,north,\nL1,a,b\n", ["line 1: a column without a name, or a name twice"]),
        ("local,north\nL1\n", ["line 2: 1 cells where the header row has 2"]),
        ("local,north\nL1,N1,X\n", ["line 2: 3 cells where the header row has 2"]),
        ("local,north\n,N1\n", ["line 2: no local ID"]),
        ("local_id,source,id\nL1,north,\n", ["line 2: no foreign ID"]),
        ("local_id,source,id\nL1,,N1\n", ["line 2: no source"]),
        ("local,north\nL*,N1\n", ["line 2: a character that no local ID has"]),
        ("local,north\nL1,N?\n", ["line 2: a character that no foreign ID has"]),
        ("local,north\nL1,N\\1\n", ["line 2: a character that no foreign ID has"]),
        ('local,north\nL1,"N\n1"\n', ["line 3: a character that no foreign ID has"]),
        (f"local,north\nL1,{'9' * 65}\n", ["line 2: a foreign ID of more than 64 characters"]),
        ('local,north\nL1,"N1"X\n', ["line 2: a quote that does not fit"]),
        ('local,north\nL1,"N1\n', ["line 2: a quote that does not fit"]),
        (b"local,north\nL1,N1\nL2,\xff\n", ["line 3: bytes that are not UTF-8"]),
        (b"local,north\nL1," + b"9" * 70_000 + b"\n", ["line 2: more than 65536 bytes"]),
        (
            "local,north\nL1,1.23457E+11\n",
            ["line 2: a foreign ID that a spreadsheet has shortened"],
        ),
        ("local;north\n1,23457E+11;N1\n", ["line 2: a local ID that a spreadsheet has shortened"]),
        ("local,north\n", ["not one ID"]),
        ("local_id,source,id\n", ["not one ID"]),
        ("local,north\nL1,\n", ["not one ID"]),
        ("local,north\nL*,N1\n,N2\nL3\n", ["line 2: a char", "line 3: no loc", "line 4: 1 cel"]),
    ],
)
def test_fault_names_the_line(text: str | bytes, faults: list[str]) -> None:
    """Each thing that is wrong is told with its line, all that can be found in one go."""
    with pytest.raises(TableError) as refused:
        links(text)

    told = [str(fault) for fault in refused.value.faults]
    assert len(told) == len(faults)
    assert all(one.startswith(start) for one, start in zip(told, faults, strict=True)), told


@pytest.mark.parametrize("value", ["1E5", "12E+10", "E+10", "1.5e+11", "0815", "1E+1"])
def test_what_only_resembles_a_shortened_number_is_an_id(value: str) -> None:
    """An ID is text, whatever it looks like."""
    assert links(f"local,north\n{value},N1\n") == [Link("north", "N1", value, 2)]


def test_fault_names_no_value() -> None:
    """What stands in the table, stays there."""
    with pytest.raises(TableError) as refused:
        links(f"local,north\n{PATIENT_ID}*,N1\n{PATIENT_ID}\n,{PATIENT_ID}\n")

    assert PATIENT_ID not in str(refused.value)


def test_file_of_nothing_but_faults_is_not_read_to_its_end() -> None:
    """After twenty faults the rest is left alone."""
    stream = BytesIO(b"local,north\n" + b"L1\n" * 1_000_000)
    with pytest.raises(TableError) as refused:
        list(TableFile(stream).links())

    assert len(refused.value.faults) == 20
    assert stream.tell() < 1_000


@given(st.binary(max_size=200), st.sampled_from([b"", b"local,north\n", b"local_id,source,id\n"]))
def test_any_file_is_a_table_or_not(content: bytes, header: bytes) -> None:
    """Whatever bytes there are, they give links that can be used, or faults."""
    try:
        found = links(header + content)
    except TableError:
        return
    for link in found:
        assert link.foreign_id.isprintable()
        assert 0 < len(link.local_id) <= 64


# ------------------------------------------------------------------ the index


def write(file: Path, text: str) -> Path:
    """Replace a file as it should be, by renaming."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)
    return file


def build_index(directory: Path, text: str) -> TableIndex:
    file = write(directory / "ids.csv", text)
    index = directory / "index.sqlite3"
    build(file, index, content_hash(file, never), never)
    return TableIndex(index)


@pytest.mark.parametrize("text", [WIDE, LONG])
def test_index_finds_both_ways(tmp_path: Path, text: str) -> None:
    """A local ID leads to one in a domain, and that one back."""
    index = build_index(tmp_path, text)
    in_north, in_south = index.numbers["north"], index.numbers["south"]

    assert index.foreign(PATIENT_ID, in_north) == "N1"
    assert index.foreign("L2", in_north) is None
    assert index.foreign("L2", in_south) == "S2"
    assert index.local("S1", in_south) == PATIENT_ID
    assert index.local("S1", in_north) is None
    assert index.links == 3
    assert index.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.glob("*.part")] == []
    index.close()


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (
            "local,north\nL1,N1\nL2,N2\nL3,N1\n",
            ["line 4: an ID that belongs to another local ID (see line 2)"],
        ),
        (
            "local,north\nL1,N1\nL1,N2\n",
            ["line 3: another ID in the same domain for a local ID (see line 2)"],
        ),
        (
            "local_id,source,id\nL1,north,N1\nL2,south,N1\nL2,north,N1\n",
            ["line 4: an ID that belongs to another local ID (see line 2)"],
        ),
        (
            "local,north\nL1,N1\nL2,N1\nL1,N2\n",
            [
                "line 3: an ID that belongs to another local ID (see line 2)",
                "line 4: another ID in the same domain for a local ID (see line 2)",
            ],
        ),
    ],
)
def test_table_in_which_an_id_is_two_persons_is_refused(
    tmp_path: Path, text: str, faults: list[str]
) -> None:
    """One ID for two patients, and two IDs for one in a domain, are told with both lines."""
    file = write(tmp_path / "ids.csv", text)
    index = tmp_path / "index.sqlite3"
    with pytest.raises(TableError) as refused:
        build(file, index, content_hash(file, never), never)

    assert list(map(str, refused.value.faults)) == faults
    assert [path.name for path in tmp_path.iterdir()] == ["ids.csv"]


def test_same_row_twice_is_no_conflict(tmp_path: Path) -> None:
    """What says the same again contradicts nothing; IDs of two domains may be equal."""
    index = build_index(tmp_path, "local,north,south\nL1,1,2\nL2,2,1\nL1,1,2\n")

    assert index.foreign("L1", index.numbers["north"]) == "1"
    assert index.local("1", index.numbers["south"]) == "L2"
    index.close()


def test_file_that_changes_while_it_is_read_makes_no_index(tmp_path: Path) -> None:
    """What was hashed and what was read must be one."""
    file = write(tmp_path / "ids.csv", WIDE)
    with pytest.raises(Changing):
        build(file, tmp_path / "index.sqlite3", "0" * 64, never)

    assert [path.name for path in tmp_path.iterdir()] == ["ids.csv"]


def test_work_is_given_up_when_told(tmp_path: Path) -> None:
    """Hashing, reading and sorting end soon when the program does."""
    rows = "".join(f"L{number},N{number}\n" for number in range(60_000))
    file = write(tmp_path / "ids.csv", f"local,north\n{rows}")
    digest = content_hash(file, never)
    with pytest.raises(Stopped):
        content_hash(file, lambda: True)
    for after in (1, 30, 62):  # while reading, twice, and while sorting
        calls = iter(range(1_000_000))
        with pytest.raises(Stopped):
            build(file, tmp_path / "i.sqlite3", digest, lambda: next(calls) >= after)  # noqa: B023
    assert [path.name for path in tmp_path.iterdir()] == ["ids.csv"]


# ----------------------------------------------------------- check beforehand


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (WIDE, []),
        (LONG, []),
        ("local,NORTH,1.2.3\nL1,N1,S1\n", []),  # by namespace and by universal ID
        ("local,nort\nL1,N1\n", ["line 1: a name that no source and no domain has"]),
        ("local_id,source,id\nL1,north,1\nL1,x,1\n", ["line 3: a name that no source and no"]),
        ("local,sister\nL1,N1\n", ["line 1: a source that has the local domain"]),
        ("local,north,NORTH\nL1,N1,N1\n", ["line 1: a domain under a second name"]),
        ("local,north\nL1,N1\nL2,N1\n", ["line 3: an ID that belongs to another local ID"]),
    ],
)
def test_table_can_be_checked_beforehand(tmp_path: Path, text: str, faults: list[str]) -> None:
    """What would be refused is told, and nothing is left behind."""
    found = check_table(write(tmp_path / "ids.csv", text), DOMAINS)

    assert len(found) == len(faults)
    assert all(str(one).startswith(start) for one, start in zip(found, faults, strict=True))


def test_table_that_is_not_there_is_told(tmp_path: Path) -> None:
    """A missing file and what is no file are faults like any other."""
    assert str(check_table(tmp_path / "nowhere.csv", DOMAINS)[0]) == (
        "cannot be read (No such file or directory)"
    )
    assert str(check_table(tmp_path, DOMAINS)[0]) == "cannot be read (not a file)"


# ---------------------------------------------------------- the cross-reference

Start = Callable[..., Awaitable[TableCrossReference]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    started = []

    async def start(text: str | None = WIDE, **options: Any) -> TableCrossReference:
        file = tmp_path / "ids.csv"
        if text is not None:
            write(file, text)
        reference = TableCrossReference(
            "regional", file, tmp_path / "state", DOMAINS, **{"look_seconds": 0.05} | options
        )
        started.append(reference)
        await reference.start()
        async with asyncio.timeout(10):
            await reference.look()
        return reference

    yield start
    for reference in started:
        await reference.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the other side is a thread
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("text", [WIDE, LONG])
async def test_table_answers_both_ways(start: Start, text: str) -> None:
    """A local patient's ID in a domain, the way back, and from one domain to another."""
    reference = await start(text)

    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    assert await reference.lookup(PatientId(PATIENT_ID, Domain("HOSPITAL")), NORTH) == (
        north("N1"),
    )
    assert await reference.lookup(local("L2"), NORTH) == ()
    assert await reference.lookup(local("stranger"), SOUTH) == ()
    assert await reference.lookup(north("N1"), HOSPITAL) == (ME,)
    assert await reference.lookup(north("N1"), SOUTH) == (PatientId("S1", SOUTH),)
    assert await reference.lookup(PatientId("S2", SOUTH), NORTH) == ()
    assert await reference.lookup(ME, HOSPITAL) == (ME,)
    reference.forget(ME)
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_id_of_one_domain_is_nobody_in_another(start: Start) -> None:
    """A local ID that equals a foreign one of somebody else leads to its own person only."""
    reference = await start("local,north,south\n1,2,3\n2,1,4\n")

    assert await reference.lookup(local("1"), NORTH) == (north("2"),)
    assert await reference.lookup(north("1"), HOSPITAL) == (local("2"),)


async def test_domain_that_the_table_does_not_know_is_an_error(start: Start) -> None:
    """A missing column is a fault of configuration, not a patient without an ID."""
    reference = await start("local,north\nL1,N1\n")

    for patient, domain in ((local("L1"), SOUTH), (PatientId("S1", SOUTH), HOSPITAL)):
        with pytest.raises(CrossReferenceError, match="unknown_domain"):
            await reference.lookup(patient, domain)


async def test_long_form_knows_a_domain_before_anybody_is_in_it(start: Start) -> None:
    """Without a row for a domain nobody has an ID there; one never configured is an error."""
    reference = await start("local_id,source,id\nL2,south,S2\n")

    assert await reference.lookup(ME, NORTH) == ()
    with pytest.raises(CrossReferenceError, match="unknown_domain"):
        await reference.lookup(ME, Domain("ELSEWHERE"))


async def test_column_without_any_id_is_known(start: Start) -> None:
    """An empty column means that nobody has an ID there."""
    assert await (await start("local,north,south\nL1,N1,\n")).lookup(ME, SOUTH) == ()


async def test_changed_table_is_taken_over(start: Start, tmp_path: Path) -> None:
    """A new content is in force without a restart, and whoever remembers is told."""
    changes: list[None] = []
    reference = await start(on_change=lambda: changes.append(None))
    assert len(changes) == 1
    write(tmp_path / "ids.csv", WIDE.replace("N1", "N7"))
    async with asyncio.timeout(10):
        await reference.look()

    assert await reference.lookup(ME, NORTH) == (north("N7"),)
    assert len(changes) == 2
    assert len(list((tmp_path / "state").iterdir())) == 1


async def test_change_is_noticed_unasked(start: Start, tmp_path: Path) -> None:
    """The file is looked at now and then."""
    changed = asyncio.Event()
    reference = await start()
    reference._on_change = changed.set
    write(tmp_path / "ids.csv", WIDE.replace("N1", "N7"))
    async with asyncio.timeout(10):
        await changed.wait()

    assert await reference.lookup(ME, NORTH) == (north("N7"),)


async def test_file_that_is_still_written_to_is_left_alone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that grows from one look to the next is not read until it keeps still."""
    reference = await start(look_seconds=0.01)
    growing, looks, hashed = True, count(), []
    signature = table_module._signature

    def seen(file: Path) -> tuple[int, int, int, int]:
        return (next(looks), 0, 0, 0) if growing else signature(file)

    def counted(file: Path, stop: Callable[[], bool]) -> str:
        hashed.append(file)
        return content_hash(file, stop)

    monkeypatch.setattr(table_module, "_signature", seen)
    monkeypatch.setattr(table_module, "content_hash", counted)
    write(tmp_path / "ids.csv", WIDE.replace("N1", "N7"))
    await until(lambda: next(looks) > 10)
    assert hashed == []
    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    growing = False
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N7"),)


async def test_file_that_is_touched_changes_nothing(start: Start, tmp_path: Path) -> None:
    """The same content again drops nothing that is remembered."""
    changes: list[None] = []
    reference = await start(on_change=lambda: changes.append(None))
    os.utime(tmp_path / "ids.csv", ns=(1, 1))
    async with asyncio.timeout(10):
        await reference.look()

    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    assert len(changes) == 1


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("local,north\nL1,N1\nL2,N1\n", "line 3: an ID that belongs to another local ID"),
        ("local,nort\nL1,N1\n", "line 1: a name that no source and no domain has"),
        (f"local,north\n{PATIENT_ID}*,N1\n", "line 2: a character that no local ID has"),
    ],
)
async def test_faulty_change_is_refused_whole(
    start: Start, tmp_path: Path, log_watch: LogWatch, text: str, detail: str
) -> None:
    """The table before it stays in force, the lines are told once, and a good one mends it."""
    reference = await start()
    write(tmp_path / "ids.csv", text)
    async with asyncio.timeout(10):
        await reference.look()
        await reference.look()

    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    (told,) = log_watch.named("cross_reference_table_refused")
    assert told["state"] == "former_table_in_force"
    assert told["detail"].startswith(detail)
    write(tmp_path / "ids.csv", WIDE.replace("N1", "N7"))
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N7"),)


async def test_table_that_is_refused_is_among_what_failed_lately(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else shows on the status page while the former one answers, older every day."""
    monkeypatch.setattr(reports, "_recent", deque(maxlen=20))
    await (await start("local,north\nL1\n")).close()
    reference = await start()
    (tmp_path / "ids.csv").unlink()
    async with asyncio.timeout(10):
        await reference.look()
    assert [told[1:] for told in reports.recently_withheld()] == [
        ("regional", "cross_reference_table_refused", "no_table"),
        ("regional", "cross_reference_table_refused", "former_table_in_force"),
    ]


async def test_first_table_that_is_faulty_is_an_outage(start: Start, tmp_path: Path) -> None:
    """Without any table to answer from, nobody is taken for a patient without an ID."""
    reference = await start("local,north\nL1,N1\nL2,N1\n")
    with pytest.raises(CrossReferenceError, match="table_refused"):
        await reference.lookup(ME, NORTH)
    assert not reference.ready
    write(tmp_path / "ids.csv", WIDE)
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_missing_table_is_an_outage_until_it_comes(
    start: Start, tmp_path: Path, log_watch: LogWatch
) -> None:
    """A file that is not there is told once, and taken as soon as it is."""
    reference = await start(None)
    async with asyncio.timeout(10):
        await reference.look()
    with pytest.raises(CrossReferenceError, match="table_unreadable"):
        await reference.lookup(ME, NORTH)
    assert len(log_watch.named("cross_reference_table_refused")) == 1
    write(tmp_path / "ids.csv", WIDE)
    await until(lambda: reference.ready)
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_full_disk_is_tried_again_now_and_then(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """An index that does not fit is told once, and a large table is not read all the time."""
    tries = []

    def full(*_: Any) -> None:
        tries.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(table_module, "build", full)
    reference = await start(look_seconds=0.01)
    with pytest.raises(CrossReferenceError, match="table_unreadable"):
        await reference.lookup(ME, NORTH)
    assert reference._pause_seconds == 30
    async with asyncio.timeout(10):
        await reference.look()
    assert len(tries) == 2
    assert len(log_watch.named("cross_reference_table_refused")) == 1
    monkeypatch.setattr(table_module, "build", build)
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_table_that_vanishes_stays_in_force(start: Start, tmp_path: Path) -> None:
    """What was read answers although its file is gone, and the file may come back unchanged."""
    reference = await start()
    file = tmp_path / "ids.csv"
    file.rename(tmp_path / "away.csv")
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    (tmp_path / "away.csv").rename(file)
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_lookups_wait_for_the_first_table_as_long_as_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is read, start does not wait for it; who asks does, so that a reload costs nobody.

    Who may not wait that long gets an error, and so does who waits when all is closed.
    """
    go = threading.Event()

    def held(file: Path, stop: Callable[[], bool]) -> str:
        assert go.wait(10)
        return content_hash(file, stop)

    monkeypatch.setattr(table_module, "content_hash", held)
    file = write(tmp_path / "ids.csv", WIDE)
    made = [
        TableCrossReference(
            f"regional{number}",
            file,
            tmp_path / "state",
            DOMAINS,
            look_seconds=0.01,
            deadline_seconds=seconds,
        )
        for number, seconds in enumerate((60.0, 0.01, 60.0))
    ]
    patient, impatient, closed = made
    for reference in made:
        await reference.start()
    with pytest.raises(CrossReferenceError, match="table_loading"):
        await impatient.lookup(ME, NORTH)
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(patient.lookup(ME, NORTH))
        given_up = group.create_task(failing(closed.lookup(ME, NORTH)))
        await asyncio.sleep(0)
        await closed.close()
        assert await given_up == "aborted closing"
        assert not asking.done()
        go.set()
        assert await asking == (north("N1"),)
    for reference in made:
        await reference.close()
    with pytest.raises(CrossReferenceError, match="closing"):
        await patient.lookup(ME, NORTH)


async def failing(lookup: Awaitable[object]) -> str:
    with pytest.raises(CrossReferenceError) as caught:
        await lookup
    return str(caught.value)


async def test_first_table_that_was_written_to_a_moment_ago_must_keep_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a table could end in half an ID. One that was left alone is read at the first look."""
    looks: list[int] = []
    signature = table_module._signature

    def seen(file: Path) -> tuple[int, int, int, int]:
        looks.append(len(looks))
        if len(looks) == 3:
            write(file, WIDE)  # by renaming
        return signature(file)

    monkeypatch.setattr(table_module, "_signature", seen)
    file = tmp_path / "ids.csv"
    file.write_text(WIDE[:-2])
    state = tmp_path / "state"
    reference = TableCrossReference("a", file, state, DOMAINS, look_seconds=0.01)
    await reference.start()
    assert await reference.lookup(PatientId("S2", SOUTH), HOSPITAL) == (local("L2"),)
    await reference.close()

    looks[:] = range(3, 4)
    os.utime(file, ns=(0, 0))
    reference = TableCrossReference("b", file, state, DOMAINS, look_seconds=60)
    await reference.start()
    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    await reference.close()


async def test_lookups_go_on_while_a_table_is_read(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large new table makes nobody wait, and is in force at once when it is whole."""
    reference = await start()
    entered, go = threading.Event(), threading.Event()
    original = build

    def held(*args: Any) -> None:
        entered.set()
        assert go.wait(10)
        original(*args)

    monkeypatch.setattr(table_module, "build", held)
    write(tmp_path / "ids.csv", WIDE.replace("N1", "N7"))
    await until(entered.is_set)
    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    go.set()
    async with asyncio.timeout(10):
        await reference.look()
    assert await reference.lookup(ME, NORTH) == (north("N7"),)


async def test_two_of_one_table_do_not_make_its_index_at_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a reload: one would put the other's half made index in force."""
    built, entered, go = [], threading.Event(), threading.Event()

    def held(*args: Any) -> None:
        built.append(args)
        entered.set()
        assert go.wait(10)
        build(*args)

    monkeypatch.setattr(table_module, "build", held)
    file = write(tmp_path / "ids.csv", WIDE)
    os.utime(file, ns=(0, 0))
    made = [
        TableCrossReference("regional", file, tmp_path / "state", DOMAINS, look_seconds=0.01)
        for _ in range(2)
    ]
    for reference in made:
        await reference.start()
    await until(entered.is_set)
    async with asyncio.TaskGroup() as group:
        looking = [group.create_task(reference.lookup(ME, NORTH)) for reference in made]
        go.set()
    assert [task.result() for task in looking] == [(north("N1"),)] * 2
    assert len(built) == 1
    for reference in made:
        await reference.close()


async def test_who_waits_for_another_of_one_table_gives_up_when_closed(tmp_path: Path) -> None:
    """However long the other takes, its thread does not outlive it by much."""
    state = tmp_path / "state"
    lock = table_module._BUILDING.setdefault(state / "waiting", threading.Lock())
    file = write(tmp_path / "ids.csv", WIDE)
    os.utime(file, ns=(0, 0))
    reference = TableCrossReference("waiting", file, state, DOMAINS)

    def builds() -> bool:
        return any(one.name.startswith("table-build-waiting") for one in threading.enumerate())

    with lock:
        await reference.start()
        await until(builds)
        await reference.close()
        await until(lambda: not builds())
    assert not state.exists()


async def test_table_that_is_configured_no_more_is_in_no_metric(
    start: Start, tmp_path: Path
) -> None:
    """Its last fault would be an alarm for good; after a reload the new one's stays."""

    def shown() -> list[float | None]:
        return [
            REGISTRY.get_sample_value(
                f"dicomproxy_cross_reference_table_{what}", {"service": "regional"}
            )
            for what in ("refused", "links")
        ]

    before = await start()
    assert shown() == [0, 3]
    after = await start("local,north\nL1\n")
    await before.close()
    await before.close()
    assert shown() == [1, 3]
    await after.close()
    assert shown() == [None, None]


async def test_first_table_that_grows_while_it_is_read_is_read_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """What was written to meanwhile is not in force until it keeps still."""

    def grow(file: Path, *rest: Any) -> None:
        monkeypatch.setattr(table_module, "build", build)
        build(file, *rest)
        with file.open("a") as stream:
            stream.write("L3,N3,S3\n")

    monkeypatch.setattr(table_module, "build", grow)
    reference = await start()

    assert await reference.lookup(local("L3"), NORTH) == (north("N3"),)
    assert [told["count"] for told in log_watch.named("cross_reference_table_loaded")] == [5]


async def test_next_start_uses_the_index_that_is_there(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that did not change is not read row by row again."""
    await (await start()).close()

    def never_build(*_: Any) -> None:
        pytest.fail("built again")

    monkeypatch.setattr(table_module, "build", never_build)
    assert await (await start(None)).lookup(ME, NORTH) == (north("N1"),)


async def test_crash_while_building_leaves_nothing_that_is_used(
    start: Start, tmp_path: Path
) -> None:
    """Half an index has no name, and goes when the next one is made."""
    state = tmp_path / "state"
    state.mkdir()
    digest = sha256(write(tmp_path / "ids.csv", WIDE).read_bytes()).hexdigest()
    (state / f"regional-{digest[:32]}.part").write_bytes(b"half an index")
    (state / f"regional-{'0' * 32}.part").write_bytes(b"half of another")
    (state / f"regional-{'0' * 32}.sqlite3").write_bytes(b"of another content")
    (state / f"regional-2-{'0' * 32}.sqlite3").write_bytes(b"of another table")
    reference = await start(None)

    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    assert {path.name for path in state.iterdir()} == {
        f"regional-{digest[:32]}.sqlite3",
        f"regional-2-{'0' * 32}.sqlite3",
    }


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\0" * 4096])
async def test_damaged_index_is_made_again_at_start(
    start: Start, tmp_path: Path, content: bytes
) -> None:
    """An index that cannot be opened is thrown away: the table is what counts."""
    digest = sha256(write(tmp_path / "ids.csv", WIDE).read_bytes()).hexdigest()
    state = tmp_path / "state"
    state.mkdir()
    (state / f"regional-{digest[:32]}.sqlite3").write_bytes(content)

    assert await (await start(None)).lookup(ME, NORTH) == (north("N1"),)


async def test_index_damaged_later_is_an_outage_and_is_made_again(
    start: Start, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """A lookup that the disk fails is an error, and the next table comes from the file."""
    reference = await start()
    original = TableIndex.foreign

    def fail(*_: Any) -> None:
        monkeypatch.setattr(TableIndex, "foreign", original)
        raise sqlite3.DatabaseError(f"malformed at {PATIENT_ID}")

    monkeypatch.setattr(TableIndex, "foreign", fail)
    with pytest.raises(CrossReferenceError, match="index_damaged"):
        await reference.lookup(ME, NORTH)
    await until(lambda: reference.ready)
    assert await reference.lookup(ME, NORTH) == (north("N1"),)
    assert log_watch.named("cross_reference_index_failed")[0]["error_type"] == "DatabaseError"


async def test_disk_that_hangs_is_an_outage(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup has a deadline, what waits for the disk a bound, and both end."""
    reference = await start(deadline_seconds=0.05)
    go = threading.Event()
    original = TableIndex.foreign

    def held(self: TableIndex, local_id: str, name: int) -> str | None:
        assert go.wait(10)
        return original(self, local_id, name)

    monkeypatch.setattr(TableIndex, "foreign", held)
    with pytest.raises(CrossReferenceError, match="timeout disk"):
        await reference.lookup(ME, NORTH)
    reference._deadline_seconds = 10
    waiting = [asyncio.create_task(reference.lookup(ME, NORTH)) for _ in range(300)]
    await until(lambda: sum(task.done() for task in waiting) >= 300 - 256)
    go.set()
    async with asyncio.timeout(10):
        found = await asyncio.gather(*waiting, return_exceptions=True)
    refused = [one for one in found if isinstance(one, CrossReferenceError)]
    assert {one.reason for one in refused} == {"too_many_lookups"}
    assert len(refused) < 300
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_lookups_that_nobody_waits_for_count_until_they_end(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a disk hangs no queue grows, however many lookups give up."""
    reference = await start(deadline_seconds=0.05)
    go = threading.Event()
    original = TableIndex.foreign

    def held(self: TableIndex, local_id: str, name: int) -> str | None:
        assert go.wait(10)
        return original(self, local_id, name)

    monkeypatch.setattr(TableIndex, "foreign", held)
    monkeypatch.setattr(table_module, "_MOST_WAITING", 3)
    for expected in ("disk", "disk", "disk", "too_many_lookups"):
        with pytest.raises(CrossReferenceError, match=expected):
            await reference.lookup(ME, NORTH)
    go.set()
    await until(lambda: reference._waiting == 0)
    assert await reference.lookup(ME, NORTH) == (north("N1"),)


async def test_closing_gives_up_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that ends does not wait for a large table."""
    entered, stopped = threading.Event(), threading.Event()

    def hold(file: Path, stop: Callable[[], bool]) -> str:
        entered.set()
        while not stop():
            threading.Event().wait(0.005)
        stopped.set()
        raise Stopped

    monkeypatch.setattr(table_module, "content_hash", hold)
    file = write(tmp_path / "ids.csv", WIDE)
    reference = TableCrossReference("regional", file, tmp_path / "state", DOMAINS)
    await reference.start()
    await until(entered.is_set)
    async with asyncio.timeout(10):
        await reference.close()
    await until(stopped.is_set)


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from(["north", "south"]), st.integers(0, 8)),
        min_size=1,
        max_size=12,
    )
)
def test_index_says_what_the_rows_say_or_refuses_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, int]]
) -> None:
    """Against a plain model: one to one in each domain is indexed, anything else refused."""
    text = "local_id,source,id\n" + "".join(f"{a},{name},{b}\n" for a, name, b in rows)
    there = {(name, a): {b for x, n, b in rows if (n, x) == (name, a)} for a, name, _ in rows}
    back = {(name, b): {a for a, n, x in rows if (n, x) == (name, b)} for _, name, b in rows}
    directory = tmp_path_factory.mktemp("table")
    one_to_one = all(len(found) == 1 for found in (*there.values(), *back.values()))
    if not one_to_one:
        with pytest.raises(TableError):
            build_index(directory, text)
        return
    index = build_index(directory, text)
    for name, number in index.numbers.items():
        for value in range(9):
            assert index.foreign(str(value), number) == _only(there.get((name, value)))
            assert index.local(str(value), number) == _only(back.get((name, value)))
    index.close()


def _only(values: set[int] | None) -> str | None:
    return None if values is None else str(*values)
