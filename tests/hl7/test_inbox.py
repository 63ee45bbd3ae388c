"""What becomes of a received message."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dicomproxy.hl7.errors import MalformedMessage, Refusal
from dicomproxy.hl7.inbox import Inbox, InboxStats
from dicomproxy.hl7.journal import Journal
from dicomproxy.hl7.message import Message, parse
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch


def message(control_id: str, kind: str = "ADT^A40", patient_id: str = PATIENT_ID) -> bytes:
    return (f"MSH|^~\\&|REG|H|US|H|2024||{kind}|{control_id}|P|2.5\rPID|1||{patient_id}\r").encode()


class Recorder:
    """A subscriber that notes what it is given, and does what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.refuses: Refusal | None = None
        self.before: Callable[[str], Awaitable[None]] | None = None

    def check(self, message: Message) -> None:
        if self.refuses is not None:
            raise self.refuses

    async def handle(self, message: Message) -> None:
        if self.before is not None:
            await self.before(message.control_id)
        self.seen.append(message.control_id)


@asynccontextmanager
async def inbox(
    path: Path, *subscribers: Recorder, journal: Journal | None = None, **options: float
) -> AsyncIterator[Inbox]:
    made = Inbox(Journal(path) if journal is None else journal, **options)  # type: ignore[arg-type]
    for subscriber in subscribers:
        made.subscribe("ADT", "A40", subscriber)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def answered(made: Inbox, content: bytes) -> tuple[str, str, str]:
    """Return MSA-1, MSA-2 and the error's code."""
    answer = parse(await made.receive(content))
    return answer.get("MSA", 1), answer.get("MSA", 2), answer.get("ERR", 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def test_a_message_is_acknowledged_and_handled(path: Path) -> None:
    """AA names the control ID; the subscriber sees the message once, and nothing is left."""
    recorder = Recorder()
    async with inbox(path, recorder) as made:
        assert await answered(made, message("M1")) == ("AA", "M1", "")
        await made.wait_idle()
        assert recorder.seen == ["M1"]
    assert path.read_bytes() == b""


async def test_it_is_on_disk_before_it_is_acknowledged(path: Path) -> None:
    """A message whose handling never ended is there after the answer, and after a restart."""
    recorder = Recorder()

    async def never(control_id: str) -> None:
        await asyncio.Event().wait()

    recorder.before = never
    async with inbox(path, recorder) as made:
        assert (await answered(made, message("M1")))[0] == "AA"
        assert path.stat().st_size > 0
        assert (await answered(made, message("M2")))[0] == "AA"
    assert recorder.seen == []
    recorder.before = None
    async with inbox(path, recorder) as made:
        await made.wait_idle()
        assert recorder.seen == ["M1", "M2"]
    async with inbox(path, recorder) as made:
        await made.wait_idle()
        assert recorder.seen == ["M1", "M2"]


async def test_every_subscriber_of_a_type_gets_it(path: Path) -> None:
    """Several may want the same; who did not ask for a type does not see it."""
    first, second, other = Recorder(), Recorder(), Recorder()
    made = Inbox(Journal(path))
    made.subscribe("ADT", "A40", first)
    made.subscribe("ADT", "A40", second)
    made.subscribe("ORM", "O01", other)
    await made.start()
    assert (await answered(made, message("M1")))[0] == "AA"
    assert (await answered(made, message("M2", "ORM^O01")))[0] == "AA"
    await made.wait_idle()
    assert (first.seen, second.seen, other.seen) == (["M1"], ["M1"], ["M2"])
    with pytest.raises(RuntimeError):
        made.subscribe("ADT", "A08", other)
    await made.close()


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (message("M1", "ADT^A41"), ("AR", "M1", "201")),
        (message("M1", "ADT"), ("AR", "M1", "201")),
        (message("M1", "ORU^R01"), ("AR", "M1", "200")),
        (message("M1", ""), ("AR", "M1", "200")),
        (message("", "ADT^A40"), ("AR", "", "101")),
        (
            message("M1", patient_id="é").replace(b"|2.5\r", b"|2.5||||||EBCDIC\r"),
            ("AR", "M1", "103"),
        ),
        (message("M1") + b"torn value\r", ("AR", "M1", "100")),
    ],
)
async def test_what_nobody_asked_for_is_refused(
    path: Path, content: bytes, answer: tuple[str, str, str]
) -> None:
    """An unknown type or event is rejected for good, and not kept."""
    recorder = Recorder()
    async with inbox(path, recorder) as made:
        assert await answered(made, content) == answer
        await made.wait_idle()
        assert recorder.seen == []
        assert path.stat().st_size == 0


@pytest.mark.parametrize(("permanent", "code"), [(True, "AR"), (False, "AE")])
async def test_what_a_subscriber_cannot_use_is_refused(
    path: Path, permanent: bool, code: str
) -> None:
    """With the error and the place that it names."""
    recorder = Recorder()
    recorder.refuses = Refusal(101, "MRG^1^1", permanent=permanent)
    async with inbox(path, recorder) as made:
        answer = parse(await made.receive(message("M1")))
        assert answer.get("MSA", 1) == code
        assert [answer.get("ERR", 2, component) for component in (1, 2, 3)] == ["MRG", "1", "1"]
        assert path.stat().st_size == 0


async def test_what_is_no_message_has_no_answer(path: Path) -> None:
    """There is nobody to name in MSA-2."""
    async with inbox(path) as made:
        with pytest.raises(MalformedMessage):
            await made.receive(b"GET / HTTP/1.1")


async def test_a_message_that_fails_is_tried_again_and_holds_the_others_back(path: Path) -> None:
    """Order is kept: what came later is handled later, also after a failure."""
    recorder = Recorder()
    failures = ["M1", "M1"]

    async def fails_twice(control_id: str) -> None:
        if control_id in failures:
            failures.remove(control_id)
            raise LookupError(PATIENT_ID)

    recorder.before = fails_twice
    async with inbox(path, recorder, retry_seconds=0.001) as made:
        await made.receive(message("M1"))
        await made.receive(message("M2"))
        await made.wait_idle()
        assert recorder.seen == ["M1", "M2"]
        assert failures == []


async def test_a_subscriber_that_was_content_is_not_asked_again(path: Path) -> None:
    """One that fails does not repeat the work of another."""
    content, failing = Recorder(), Recorder()
    attempts: list[str] = []

    async def once(control_id: str) -> None:
        attempts.append(control_id)
        if len(attempts) == 1:
            raise LookupError

    failing.before = once
    async with inbox(path, content, failing, retry_seconds=0.001) as made:
        await made.receive(message("M1"))
        await made.wait_idle()
    assert (content.seen, failing.seen, attempts) == (["M1"], ["M1"], ["M1", "M1"])


async def test_a_message_that_always_fails_is_set_aside_until_the_next_start(
    path: Path, log_watch: LogWatch
) -> None:
    """It does not stop the others, and it is not lost."""
    recorder = Recorder()

    async def poison(control_id: str) -> None:
        if control_id == "M1":
            raise LookupError(PATIENT_ID)

    recorder.before = poison
    async with inbox(path, recorder, attempts=3, retry_seconds=0.001) as made:
        for control_id in ("M1", "M2", "M3"):
            await made.receive(message(control_id))
        await made.wait_idle()
        assert recorder.seen == ["M2", "M3"]
        assert "1 set aside" in repr(made)
    assert log_watch.text.count("mllp_message_failed") == 3
    recorder.before = None
    async with inbox(path, recorder) as made:
        await made.wait_idle()
        assert recorder.seen == ["M2", "M3", "M1"]


async def test_a_subscriber_that_hangs_has_a_deadline(path: Path) -> None:
    """It costs its own message, not the queue."""
    recorder = Recorder()

    async def hangs(control_id: str) -> None:
        if control_id == "M1":
            await asyncio.Event().wait()

    recorder.before = hangs
    async with inbox(path, recorder, attempts=1, handle_seconds=0.01) as made:
        await made.receive(message("M1"))
        await made.receive(message("M2"))
        await made.wait_idle()
        assert recorder.seen == ["M2"]


async def test_a_full_journal_tells_the_sender_to_come_again(path: Path) -> None:
    """AE instead of AA, for as long as nothing is handled; then it takes messages again."""
    recorder = Recorder()
    gate = asyncio.Event()

    async def waits(control_id: str) -> None:
        await gate.wait()

    recorder.before = waits
    async with inbox(path, recorder, journal=Journal(path, max_messages=2)) as made:
        assert (await answered(made, message("M1")))[0] == "AA"
        assert (await answered(made, message("M2")))[0] == "AA"
        assert await answered(made, message("M3")) == ("AE", "M3", "207")
        gate.set()
        await made.wait_idle()
        assert (await answered(made, message("M3")))[0] == "AA"
        await made.wait_idle()
        assert recorder.seen == ["M1", "M2", "M3"]


class FaultyJournal(Journal):
    """A journal whose disk fails or hangs when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fails = False
        self.release = threading.Event()
        self.release.set()

    def append(self, message: bytes) -> int:
        assert self.release.wait(20)
        if self.fails:
            raise OSError(28, "no space left")
        return super().append(message)


async def test_a_disk_that_fails_is_no_acknowledgement(path: Path) -> None:
    """AE, and the message is not handled either."""
    recorder = Recorder()
    journal = FaultyJournal(path)
    async with inbox(path, recorder, journal=journal) as made:
        journal.fails = True
        assert await answered(made, message("M1")) == ("AE", "M1", "207")
        journal.fails = False
        assert await answered(made, message("M1")) == ("AA", "M1", "")
        await made.wait_idle()
        assert recorder.seen == ["M1"]


async def test_a_disk_that_hangs_is_waited_for_only_so_long(path: Path) -> None:
    """AE at the deadline; what reaches the disk afterwards is handled nevertheless."""
    recorder = Recorder()
    journal = FaultyJournal(path)
    async with inbox(path, recorder, journal=journal, disk_seconds=0.05) as made:
        journal.release.clear()
        assert await answered(made, message("M1")) == ("AE", "M1", "207")
        handled = asyncio.Event()

        async def notes(control_id: str) -> None:
            handled.set()

        recorder.before = notes
        journal.release.set()
        async with asyncio.timeout(10):
            await handled.wait()
        await made.wait_idle()
        assert recorder.seen == ["M1"]


async def test_a_journal_that_another_process_has_stops_the_start(path: Path) -> None:
    """Two inboxes would handle each other's messages."""
    async with inbox(path):
        second = Inbox(Journal(path))
        with pytest.raises(OSError):
            await second.start()
        await second.close()


async def test_a_message_of_any_size_is_read_and_none_of_it_is_logged(
    path: Path, log_watch: LogWatch
) -> None:
    """A large one is parsed elsewhere than on the loop; the log names its type alone."""
    recorder = Recorder()
    async with inbox(path, recorder) as made:
        assert (await answered(made, message("M1", patient_id="A" * 200_000)))[0] == "AA"
        assert (await answered(made, message("M2")))[0] == "AA"
        assert (await answered(made, message(PATIENT_ID, f"{PATIENT_ID}^X")))[0] == "AR"
        await made.wait_idle()
    assert '"operation":"ADT^A40"' in log_watch.text


async def test_what_became_of_messages_is_counted(path: Path) -> None:
    """Acknowledged, refused and unreadable ones, those that wait and those set aside."""
    recorder, go = Recorder(), asyncio.Event()

    async def before(control_id: str) -> None:
        await go.wait()
        raise LookupError

    recorder.before = before
    async with inbox(path, recorder, attempts=1) as made:
        assert made.stats == InboxStats(0, 0, 0, 0, 0.0, 0.0)
        await answered(made, message("1"))
        await answered(made, message("2", "ADT^A08"))
        with pytest.raises(MalformedMessage):
            await made.receive(b"no message")
        stats = made.stats
        assert (stats.acknowledged, stats.refused, stats.waiting) == (1, 2, 1)
        assert stats.last_acknowledged_at
        assert stats.last_refused_at >= stats.last_acknowledged_at
        go.set()
        await made.wait_idle()
        assert (made.stats.waiting, made.stats.set_aside) == (0, 1)
