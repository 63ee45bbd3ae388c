"""The journal of received messages: on disk, bounded, for its owner only."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.hl7.journal import Journal, JournalFull
from tests.support.log_watch import LogWatch

_DIED = 7
_MESSAGES = 12


def opened(path: Path, **bounds: int) -> tuple[Journal, list[int]]:
    journal = Journal(path, **bounds)
    return journal, journal.open()


def contents(path: Path) -> list[bytes]:
    """Return what waits in the file of a process that ended."""
    journal, numbers = opened(path)
    found = [journal.read(number) for number in numbers]
    journal.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "inbox" / "journal"


def test_what_was_not_handled_is_there_after_a_restart(path: Path) -> None:
    """In the order received, whatever bytes it holds."""
    journal, numbers = opened(path)
    assert numbers == []
    first, second, third = (journal.append(one) for one in (b"A\r\n\x00", b"", b"C" * 5000))
    journal.done(second)
    assert journal.count == 2
    journal.close()
    journal, numbers = opened(path)
    assert numbers == [first, third]
    assert [journal.read(number) for number in numbers] == [b"A\r\n\x00", b"C" * 5000]
    assert journal.append(b"D") > third
    journal.close()


def test_it_is_for_its_owner_only(path: Path) -> None:
    """Whatever mode an existing file has: it holds patients' names."""
    path.parent.mkdir()
    path.touch(0o644)
    path.chmod(0o644)
    journal, _ = opened(path, max_bytes=400)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    waiting: list[int] = []
    for _ in range(50):  # through several compactions
        journal.done(journal.append(b"A" * 100))
        waiting.append(journal.append(b"B"))
        if len(waiting) > 4:
            journal.done(waiting.pop(0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["journal"]
    journal.close()


def test_it_is_empty_when_everything_is_handled(path: Path) -> None:
    """No patient stays behind in it."""
    journal, _ = opened(path)
    for number in [journal.append(b"A"), journal.append(b"B")]:
        journal.done(number)
        journal.done(number)
    assert path.read_bytes() == b""
    journal.close()


def test_it_has_a_bound_and_room_again_when_messages_are_handled(path: Path) -> None:
    """What is handled makes room, also in the middle of the file; what waits is kept."""
    journal, _ = opened(path, max_bytes=1000)
    numbers: list[int] = []
    with pytest.raises(JournalFull):
        while True:
            numbers.append(journal.append(b"M%d" % len(numbers) * 20))
    assert len(numbers) > 3
    assert path.stat().st_size <= 1000
    for number in numbers[1:-1]:
        journal.done(number)
    late = journal.append(b"late")
    assert [journal.read(number) for number in (numbers[0], numbers[-1], late)] == [
        b"M0" * 20,
        b"M%d" % (len(numbers) - 1) * 20,
        b"late",
    ]
    journal.close()
    assert len(contents(path)) == 3


def test_the_number_of_messages_is_bounded_too(path: Path) -> None:
    """Small ones do not grow what is held of them in memory."""
    journal, _ = opened(path, max_messages=2)
    first = journal.append(b"A")
    journal.append(b"B")
    with pytest.raises(JournalFull):
        journal.append(b"C")
    journal.done(first)
    journal.append(b"C")
    journal.close()


def test_two_processes_never_share_it(path: Path) -> None:
    """The second one does not start."""
    journal, _ = opened(path)
    with pytest.raises(OSError):
        Journal(path).open()
    journal.close()
    opened(path)[0].close()


@pytest.mark.parametrize("rest", [b"M 3 0", b"M 3 00000000 QUFB", b"D", b"\x00\x00\x00"])
def test_a_line_that_a_crash_tore_is_cut_off(path: Path, rest: bytes) -> None:
    """It was never acknowledged, and the next one is not written behind it."""
    journal, _ = opened(path)
    journal.append(b"A")
    journal.close()
    with path.open("ab") as file:
        file.write(rest)
    journal, numbers = opened(path)
    assert numbers == [1]
    journal.append(b"B")
    journal.close()
    assert contents(path) == [b"A", b"B"]


def test_a_damaged_line_costs_itself_only(path: Path, log_watch: LogWatch) -> None:
    """Those before and after it are handled, and the damage is reported."""
    journal, _ = opened(path)
    for content in (b"AAAA", b"BBBB", b"CCCC"):
        journal.append(content)
    journal.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"QkJCQg==", b"QkJDQg=="))
    assert contents(path) == [b"AAAA", b"CCCC"]
    assert "mllp_journal_damaged" in log_watch.text


@given(st.binary(max_size=200))
def test_any_file_opens(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever is in it, it can be written to, and what is written is read."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.write_bytes(data)
    journal, _ = opened(path)
    number = journal.append(b"A")
    assert journal.read(number) == b"A"
    journal.close()
    assert contents(path)[-1] == b"A"


def test_a_write_that_fails_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full half way through a line takes the next one when it has room."""
    journal, _ = opened(path)
    journal.append(b"A")
    real = os.pwrite

    def half(descriptor: int, data: memoryview, offset: int) -> int:
        real(descriptor, data[: len(data) // 2], offset)
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError):
        journal.append(b"B")
    monkeypatch.setattr(os, "pwrite", real)
    assert journal.count == 1
    journal.append(b"C")
    journal.close()
    assert contents(path) == [b"A", b"C"]


def test_a_new_file_takes_the_old_ones_place_only_when_it_is_synced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power the name leads to the messages, not to an empty file."""
    journal, _ = opened(path, max_bytes=400)
    journal.append(b"A" * 100)
    synced: list[int] = []
    replaced: list[int] = []
    fsync, replace = os.fsync, os.replace

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def checking(old: Path, new: Path) -> None:
        replaced.append(old.stat().st_ino)
        assert synced[-1:] == replaced[-1:]
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    journal.done(journal.append(b"B" * 100))
    journal.append(b"C" * 100)
    assert len(replaced) == 1
    assert synced[-2:] == [path.parent.stat().st_ino, path.stat().st_ino]
    journal.close()
    assert contents(path) == [b"A" * 100, b"C" * 100]


def test_a_message_counts_only_when_it_is_synced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not confirm has not taken it, and it is not found later."""
    journal, _ = opened(path)
    real = os.fsync
    synced: list[bytes] = []

    def noting(descriptor: int) -> None:
        real(descriptor)
        synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", noting)
    journal.append(b"A")
    assert synced == [path.read_bytes()]

    def failing(descriptor: int) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError):
        journal.append(b"B")
    monkeypatch.setattr(os, "fsync", real)
    journal.close()
    assert contents(path) == [b"A"]


def _dies(path: Path, step: int) -> None:
    """Append and handle messages; leave without a word at one of the calls to the system."""
    left = [step]

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os._exit(_DIED)
            return real(*arguments)

        setattr(os, name, call)

    for name in ("pwrite", "fsync", "ftruncate", "replace"):
        counted(name)
    journal, _ = opened(path, max_bytes=400)
    acknowledged = os.open(path.with_name("acknowledged"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    waiting: list[int] = []
    for number in range(_MESSAGES):
        while True:
            try:
                waiting.append(journal.append(b"%d" % number * 40))
                break
            except JournalFull:
                os.write(acknowledged, b"D")
                journal.done(waiting.pop(0))
        os.write(acknowledged, b"M")


def main(directory: Path) -> None:
    """Die once at each step, in a child each; in a process of its own, which has no threads."""
    for step in range(1000):
        path = directory / str(step) / "journal"
        path.parent.mkdir()
        child = os.fork()
        if child == 0:
            try:
                _dies(path, step)
            except BaseException:
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, _DIED), code
        if code == 0:
            break


def test_no_acknowledged_message_is_lost_wherever_the_process_ends(tmp_path: Path) -> None:
    """Killed at any write, sync, cut or rename, the file still holds what was acknowledged."""
    subprocess.run(
        [sys.executable, "-m", "tests.hl7.test_journal", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=100,
    )
    wanted = [b"%d" % number * 40 for number in range(_MESSAGES)]
    steps = sorted(tmp_path.iterdir(), key=lambda one: int(one.name))
    assert len(steps) > 40
    for step in steps:
        told = step / "acknowledged"
        marks = told.read_bytes() if told.exists() else b""
        taken, handled = marks.count(b"M"), marks.count(b"D")
        found = contents(step / "journal")
        # One may have been written without being acknowledged, and a note be lost.
        assert set(wanted[handled:taken]) <= set(found) <= set(wanted[: taken + 1]), step.name
        assert found == sorted(found, key=wanted.index), step.name
    assert taken == _MESSAGES
    assert handled > 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
