"""What becomes of a received message: checked, kept on disk, acknowledged, handled.

Rules kept: AA is answered only for what is on disk; what nobody subscribed to is
refused (AR), what its subscriber cannot use as well (AE or AR), and when the disk or
the bound does not allow more the sender is told to come again (AE). Messages are
handled one after the other, in the order received, each at least once: handlers bear
repetition. One that fails is tried again, then set aside until the next start, so
that it does not hold up the others for good.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeVar

from prometheus_client import Counter, Gauge

from dicomproxy.hl7.errors import MalformedMessage, Refusal, UnknownCharacterSet
from dicomproxy.hl7.journal import Journal, JournalFull
from dicomproxy.hl7.message import Message, parse, parse_header
from dicomproxy.hl7.writing import acknowledgement
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.tasks import TaskOwner

T = TypeVar("T")

SEGMENT_SEQUENCE_ERROR: Final = 100
REQUIRED_FIELD_MISSING: Final = 101
DATA_TYPE_ERROR: Final = 102
TABLE_VALUE_NOT_FOUND: Final = 103
UNSUPPORTED_MESSAGE_TYPE: Final = 200
UNSUPPORTED_EVENT_CODE: Final = 201
INTERNAL_ERROR: Final = 207
"""Of HL7 table 0357."""

_PARSED_ON_LOOP_BYTES: Final = 64 * 1024
"""Beyond that, reading a message could be felt on the loop."""

_MOST_WRITES: Final = 100
"""How many messages may wait for a disk that does not answer."""

_log = get_logger()

_ANSWERED = Counter(
    "dicomproxy_mllp_messages_total", "HL7 messages received, by acknowledgement.", ["outcome"]
)
_WAITING = Gauge("dicomproxy_mllp_waiting", "HL7 messages acknowledged and not handled yet.")
_FAILED = Counter(
    "dicomproxy_mllp_handling_failures_total", "Attempts to handle an HL7 message that failed."
)


class Subscriber(Protocol):
    """Who wants messages of some type."""

    def check(self, message: Message) -> None:
        """Say whether it can be used, before it is acknowledged; quick, without waiting.

        Raises:
            Refusal: it cannot.
        """
        ...

    async def handle(self, message: Message) -> None:
        """Do what it asks for; may be called again for the same message."""
        ...


@dataclass(frozen=True, slots=True)
class InboxStats:
    """What became of messages so far; moments are seconds since 1970, 0 for never.

    ``waiting`` are those acknowledged that are to be handled, ``set_aside`` those
    that failed and wait for the next start.
    """

    acknowledged: int
    refused: int
    waiting: int
    set_aside: int
    last_acknowledged_at: float
    last_refused_at: float


class Inbox:
    """Takes messages for its subscribers. Used from one event loop.

    Args:
        journal: where messages wait; this object opens and closes it.
        handle_seconds: how long one subscriber may take for one message.
        disk_seconds: how long a sender waits for the disk before it is told AE.
        attempts: how often a message is handled before it is set aside.
        retry_seconds: pause after the first failure; doubled after each.
        now: the present moment, with its time zone.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        handle_seconds: float = 30.0,
        disk_seconds: float = 10.0,
        attempts: int = 5,
        retry_seconds: float = 1.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._journal = journal
        self._handle_seconds = handle_seconds
        self._disk_seconds = disk_seconds
        self._attempts = attempts
        self._retry_seconds = retry_seconds
        self._now = now
        self._subscribers: dict[tuple[str, str], list[Subscriber]] = {}
        self._tasks = TaskOwner("inbox")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="inbox-journal")
        self._queue: deque[int] = deque()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._set_aside = 0
        self._acknowledged = self._refused = 0
        self._last_acknowledged_at = self._last_refused_at = 0.0
        self._writing = 0
        self._started = False
        self._prefix = uuid.uuid4().hex[:8].upper()
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        return f"<Inbox {len(self._queue)} waiting, {self._set_aside} set aside>"

    @property
    def stats(self) -> InboxStats:
        """What became of messages since it was made."""
        return InboxStats(
            self._acknowledged,
            self._refused,
            len(self._queue),
            self._set_aside,
            self._last_acknowledged_at,
            self._last_refused_at,
        )

    def subscribe(self, code: str, trigger: str, subscriber: Subscriber) -> None:
        """Have messages of a type, such as ``ADT`` and ``A40``, handed to *subscriber*.

        Raises:
            RuntimeError: after :meth:`start`; what waited would have missed it.
        """
        if self._started:
            raise RuntimeError("subscribe before the inbox starts")
        self._subscribers.setdefault((code, trigger), []).append(subscriber)

    async def start(self) -> None:
        """Open the journal and handle what waits in it since the last time.

        Raises:
            OSError: the journal cannot be opened.
            TimeoutError: its disk does not answer.
        """
        self._started = True
        numbers = await self._on_disk(self._journal.open)
        self._tasks.spawn(self._work(), name="handler")
        for number in numbers:
            self._enqueue(number)
        if numbers:
            _log.info("mllp_replayed", count=len(numbers))

    async def wait_idle(self) -> None:
        """Return once nothing waits to be handled; what is set aside does not count."""
        await self._idle.wait()

    async def close(self) -> None:
        """Stop handling; what is left is handled after the next start."""
        await self._tasks.close()
        try:
            await self._on_disk(self._journal.close)
        except (OSError, RuntimeError, TimeoutError):
            pass  # all that was acknowledged had been synced
        self._disk.shutdown(wait=False, cancel_futures=True)

    async def receive(self, content: bytes) -> bytes:
        """Take the content of a frame; return the acknowledgement to send.

        Raises:
            MalformedMessage: it is no message, so that there is nothing to answer to.
        """
        try:
            message = await self._parsed(content)
            self._check(message)
        except UnknownCharacterSet:
            return self._answer(self._header(content), "AR", TABLE_VALUE_NOT_FOUND, "MSH^1^18")
        except MalformedMessage:
            return self._answer(self._header(content), "AR", SEGMENT_SEQUENCE_ERROR)
        except Refusal as refusal:
            code = "AR" if refusal.permanent else "AE"
            return self._answer(message, code, refusal.code, refusal.location)
        try:
            await self._keep(content)
        except JournalFull:
            _log.error("mllp_journal_failed", reason="full", waiting=len(self._queue))
            return self._answer(message, "AE", INTERNAL_ERROR)
        except (OSError, RuntimeError, TimeoutError) as error:
            _log.error("mllp_journal_failed", reason="disk", **error_fields(error))
            return self._answer(message, "AE", INTERNAL_ERROR)
        return self._answer(message, "AA")

    # --------------------------------------------------------------- internals

    async def _parsed(self, content: bytes) -> Message:
        if len(content) > _PARSED_ON_LOOP_BYTES:
            return await asyncio.to_thread(parse, content)
        return parse(content)

    def _check(self, message: Message) -> None:
        if not message.control_id:
            raise Refusal(REQUIRED_FIELD_MISSING, "MSH^1^10", permanent=True)
        subscribers = self._subscribers.get((message.code, message.trigger))
        if subscribers is None:
            known = any(code == message.code for code, _ in self._subscribers)
            raise Refusal(
                UNSUPPORTED_EVENT_CODE if known else UNSUPPORTED_MESSAGE_TYPE,
                "MSH^1^9",
                permanent=True,
            )
        for subscriber in subscribers:
            subscriber.check(message)

    def _answer(
        self, message: Message, code: str, error: int | None = None, location: str = ""
    ) -> bytes:
        _ANSWERED.labels(code).inc()
        # What is refused may call itself anything; what is taken is of a known type.
        fields: dict[str, Any] = {"outcome": code}
        if error is None:
            fields["operation"] = f"{message.code}^{message.trigger}"
            self._acknowledged += 1
            self._last_acknowledged_at = self._now().timestamp()
            _log.info("mllp_message", **fields)
        else:
            self._note_refusal()
            _log.warning("mllp_message_refused", reason=f"{error} {location}".strip(), **fields)
        return acknowledgement(
            message,
            code,
            control_id=f"{self._prefix}{next(self._numbers)}",
            at=self._now(),
            error=error,
            location=location.split("^") if location else (),
        )

    def _header(self, content: bytes) -> Message:
        """Return what can be read of a message that cannot be read.

        Raises:
            MalformedMessage: not even that.
        """
        try:
            return parse_header(content)
        except MalformedMessage as error:
            _ANSWERED.labels("malformed").inc()
            self._note_refusal()
            _log.warning("mllp_message_refused", reason=error.reason, bytes=len(content))
            raise

    def _note_refusal(self) -> None:
        self._refused += 1
        self._last_refused_at = self._now().timestamp()

    async def _keep(self, content: bytes) -> None:
        """Return once a message is on disk and in the queue.

        It comes into the queue even if nobody waits any more: a slow disk may keep
        what its sender was told AE for, and will send again.
        """
        if self._writing >= _MOST_WRITES:
            raise JournalFull
        self._writing += 1
        loop = asyncio.get_running_loop()
        written = loop.run_in_executor(self._disk, self._journal.append, content)
        written.add_done_callback(self._written)
        async with asyncio.timeout(self._disk_seconds):
            await asyncio.shield(written)

    def _written(self, written: asyncio.Future[int]) -> None:
        self._writing -= 1
        if not written.cancelled() and written.exception() is None:
            self._enqueue(written.result())

    def _enqueue(self, number: int) -> None:
        self._queue.append(number)
        self._idle.clear()
        self._arrived.set()
        _WAITING.set(len(self._queue) + self._set_aside)

    async def _work(self) -> None:
        while True:
            if not self._queue:
                self._arrived.clear()
                self._idle.set()
                await self._arrived.wait()
            number = self._queue[0]
            if await self._handled(number):
                await self._note_done(number)
            else:
                self._set_aside += 1
            self._queue.popleft()
            _WAITING.set(len(self._queue) + self._set_aside)

    async def _handled(self, number: int) -> bool:
        """Hand a message to its subscribers until all are content; False if it is set aside."""
        pending: list[Subscriber] | None = None
        message: Message | None = None
        pause = self._retry_seconds
        for attempt in range(1, self._attempts + 1):
            try:
                if message is None:
                    message = await self._on_disk(self._read, number)
                    pending = list(self._subscribers.get((message.code, message.trigger), ()))
                while pending:
                    async with asyncio.timeout(self._handle_seconds):
                        await pending[0].handle(message)
                    del pending[0]
                return True
            except Exception as error:
                _FAILED.inc()
                last = attempt == self._attempts
                _log.error(
                    "mllp_message_failed",
                    attempt=attempt,
                    attempts=self._attempts,
                    outcome="set_aside" if last else "retried",
                    **error_fields(error),
                )
                if not last:
                    await asyncio.sleep(pause)
                    pause *= 2
        return False

    def _read(self, number: int) -> Message:
        return parse(self._journal.read(number))

    async def _note_done(self, number: int) -> None:
        try:
            await self._on_disk(self._journal.done, number)
        except Exception as error:
            # Handled again after a restart, which does no harm.
            _log.error("mllp_journal_failed", reason="disk", **error_fields(error))

    async def _on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        async with asyncio.timeout(self._disk_seconds):
            return await asyncio.get_running_loop().run_in_executor(self._disk, work, *arguments)
