"""What every DIMSE archive has: associations, a circuit breaker, and a record of how it fares.

Rule kept: the breaker is told of every exchange how it ended, of a probe also that
it was answered at all; every way in which one can fail becomes a
:class:`SourceError` with one of few words.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from dicomproxy.dataset.transfer_syntaxes import DEFAULT_ORDER
from dicomproxy.dimse.breaker import Breaker, BreakerState
from dicomproxy.dimse.command import Command
from dicomproxy.dimse.errors import (
    AssociationError,
    AssociationRejected,
    AssociationTimeout,
    ConnectFailed,
    NoContext,
    NoTurn,
)
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.negotiation import UNCOMPRESSED, Context
from dicomproxy.dimse.operations import (
    VERIFICATION,
    Incoming,
    Response,
    UnexpectedMessage,
    exchange,
)
from dicomproxy.dimse.pool import AssociationPool, Lease, Purpose
from dicomproxy.logs import get_logger
from dicomproxy.ports import Failure, SourceError

PATIENT_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.1.1"
PATIENT_ROOT_MOVE: Final = "1.2.840.10008.5.1.4.1.2.1.2"
PATIENT_ROOT_GET: Final = "1.2.840.10008.5.1.4.1.2.1.3"
STUDY_ROOT_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"

QUERY_RETRIEVE: Final = Proposal(
    (
        # One context per syntax: an identifier can then travel as its bytes are.
        *(
            (sop_class, (syntax,))
            for sop_class in (
                STUDY_ROOT_FIND,
                PATIENT_ROOT_FIND,
                STUDY_ROOT_MOVE,
                PATIENT_ROOT_MOVE,
            )
            for syntax in UNCOMPRESSED
        ),
        (VERIFICATION, UNCOMPRESSED),
    )
)
"""What pooled associations are proposed with: any of them can query and move."""

_EXCHANGES = Counter(
    "dicomproxy_source_exchanges_total",
    "Exchanges with archives.",
    ("source", "operation", "outcome"),
)
_SECONDS = Histogram(
    "dicomproxy_source_seconds",
    "How long archives took to answer in full.",
    ("source", "operation"),
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
_BREAKER = Gauge("dicomproxy_source_breaker", "0 closed, 1 half open, 2 open.", ("source",))
_PROBE_SECONDS: Final = 1.0
_SAYS_NOTHING: Final = frozenset({Failure.BUSY, Failure.NO_CONTEXT})
"""Failures from which it does not follow that an archive is not well."""
_BREAKER_VALUES: Final = {
    BreakerState.CLOSED: 0,
    BreakerState.HALF_OPEN: 1,
    BreakerState.OPEN: 2,
}

_log = get_logger()


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """One DIMSE archive; durations in seconds.

    ``calling_ae_title`` is who we are there, and the move destination.
    ``accept`` are the transfer syntaxes asked for in C-GET, ``None`` any.
    """

    name: str
    ae_title: str
    host: str
    port: int
    calling_ae_title: str
    retrieve: str = "c-move"
    connect_timeout: float = 3.0
    query_timeout: float = 5.0
    first_instance_timeout: float = 300.0
    stall_timeout: float = 60.0
    response_timeout: float = 60.0
    parallel_associations: int = 4
    max_matches: int = 1000
    study_root_only: bool = False
    breaker_failures: int = 3
    breaker_pause: float = 30.0
    accept: tuple[str, ...] | None = None

    @property
    def accept_order(self) -> tuple[str, ...]:
        return DEFAULT_ORDER if self.accept is None else self.accept


@dataclass(frozen=True, slots=True)
class Health:
    """How an archive fares; ``*_at`` are seconds since 1970, 0 for never."""

    breaker: str
    last_success_at: float
    last_failure_at: float
    last_failure: str
    latencies: tuple[float, ...]
    in_use: int
    idle: int
    ceiling: int


class Archive:
    """The associations of one archive and what is known of its health."""

    def __init__(self, layer: UpperLayer, settings: ArchiveSettings) -> None:
        self.settings = settings
        self.layer = layer
        self.pool = self.make_pool(settings.calling_ae_title)
        self.breaker = Breaker(
            failures=settings.breaker_failures,
            pause_seconds=settings.breaker_pause,
            on_change=self._breaker_changed,
        )
        self._probe: asyncio.Future[bool | None] | None = None
        """Ends with whether the archive is alive, None if that was not found out."""
        _BREAKER.labels(settings.name).set(0)
        self._latencies: deque[float] = deque(maxlen=50)
        self._last_success_at = 0.0
        self._last_failure_at = 0.0
        self._last_failure = ""
        self.recent_failures: deque[tuple[float, str, str]] = deque(maxlen=20)
        """When (seconds since 1970), in which operation, in a word what."""

    def make_pool(self, calling_ae_title: str) -> AssociationPool:
        """Return a pool of associations on which we are *calling_ae_title*."""
        settings = self.settings
        target = Target(
            settings.host,
            settings.port,
            settings.ae_title,
            calling_ae_title,
            settings.connect_timeout,
        )
        return AssociationPool(
            self.layer, target, QUERY_RETRIEVE, ceiling=settings.parallel_associations
        )

    def health(self) -> Health:
        return Health(
            breaker=str(self.breaker.state),
            last_success_at=self._last_success_at,
            last_failure_at=self._last_failure_at,
            last_failure=self._last_failure,
            latencies=tuple(self._latencies),
            in_use=self.pool.in_use,
            idle=self.pool.idle,
            ceiling=self.pool.ceiling,
        )

    async def close(self) -> None:
        await self.pool.close()

    # ---------------------------------------------------------------- exchange

    async def ask(
        self,
        operation: str,
        choose: Callable[[Lease], tuple[Context, Command, bytes]],
        *,
        purpose: Purpose,
        probe: bool,
        lease_seconds: float,
        left_seconds: Callable[[], float],
        pool: AssociationPool | None = None,
        proposal: Proposal | None = None,
        incoming: Incoming | None = None,
        prepare: Callable[[Lease], None] | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> AsyncGenerator[Response, None]:
        """Send one request and yield its responses, the final one last.

        A pooled association that turns out to be dead before it gave any
        response is replaced by a fresh one, once.

        Args:
            choose: makes context, command and identifier for an association.
            probe: may be tried although the breaker is open.
            lease_seconds: how long to wait for an association.
            left_seconds: how long still to wait for the next response.
            wanted: see :meth:`~dicomproxy.dimse.pool.AssociationPool.lease`.

        Raises:
            SourceError: whatever went wrong.
        """
        name = self.settings.name
        if not await self._allowed(probe, lease_seconds):
            _EXCHANGES.labels(name, operation, Failure.BREAKER).inc()
            raise SourceError(name, Failure.BREAKER)
        # Others are turned away while somebody probes, so that it can only be us.
        probing = self._probe if self.breaker.probing else None
        started = time.monotonic()
        told = answered = False
        try:
            for attempt in (1, 2):
                lease = await (pool or self.pool).lease(
                    purpose,
                    timeout_seconds=lease_seconds,
                    fresh=attempt == 2,
                    proposal=proposal,
                    wanted=wanted,
                )
                try:
                    if prepare is not None:
                        prepare(lease)
                    try:
                        context, command, data = choose(lease)
                    except NoContext:
                        lease.done()
                        raise
                    except BaseException:
                        lease.discard()
                        raise
                    asked_at = time.monotonic()
                    responses = exchange(
                        lease,
                        context,
                        command,
                        data,
                        timeout_seconds=left_seconds,
                        incoming=incoming,
                    )
                    async with aclosing(responses):
                        async for response in responses:
                            if not answered:
                                answered = True
                                lease.answered_in(time.monotonic() - asked_at)
                            if probing is not None:
                                # Found out: nobody waits until a whole study has come.
                                self.breaker.success()
                                _end_probe(probing, True)
                                probing = None
                            if not response.pending:
                                self._succeeded(operation, time.monotonic() - started)
                                told = True
                            yield response
                    return
                except AssociationError as error:
                    alive = answered or not lease.reused or attempt == 2
                    if alive or isinstance(error, AssociationTimeout | NoContext):
                        raise
        except AssociationError as error:
            failure = failure_of(error)
            told = True
            self._failed(operation, failure, probing is not None)
            if probing is not None and failure not in _SAYS_NOTHING:
                _end_probe(probing, False)
            raise SourceError(name, failure, detail=_detail(error)) from None
        finally:
            if not told and answered:
                self.breaker.success()  # given up by us, but it was alive
            elif not told and probing is not None:
                self.breaker.inconclusive()  # anybody else's end says nothing of a probe
            if probing is not None:
                _end_probe(probing, None)

    async def _allowed(self, probe: bool, seconds: float) -> bool:
        """Ask the breaker; what somebody finds out at this moment holds for us too.

        Without that, of several who ask an archive that is well again all but the
        first were told that it is not. Whoever may probe waits for that as long as
        for an association; others do not wait for long.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + (seconds if probe else min(seconds, _PROBE_SECONDS))
        while not self.breaker.allow(probe=probe):
            if not self.breaker.probing or self._probe is None:
                return False
            try:
                async with asyncio.timeout_at(end):
                    alive = await asyncio.shield(self._probe)
            except TimeoutError:
                return False
            if alive is False:
                return False
        if self.breaker.probing:
            self._probe = loop.create_future()
        return True

    def _succeeded(self, operation: str, seconds: float) -> None:
        name = self.settings.name
        self.breaker.success()
        self._last_success_at = time.time()
        if operation == "find":
            self._latencies.append(seconds)
        _EXCHANGES.labels(name, operation, "answered").inc()
        _SECONDS.labels(name, operation).observe(seconds)

    def _failed(self, operation: str, failure: Failure, probing: bool) -> None:
        if failure not in _SAYS_NOTHING:
            self.breaker.failure()
        elif probing:
            self.breaker.inconclusive()
        self._last_failure_at = time.time()
        self._last_failure = str(failure)
        self.recent_failures.append((self._last_failure_at, operation, str(failure)))
        _EXCHANGES.labels(self.settings.name, operation, str(failure)).inc()

    def _breaker_changed(self, state: BreakerState) -> None:
        _BREAKER.labels(self.settings.name).set(_BREAKER_VALUES[state])
        _log.warning(
            "source_breaker",
            source=self.settings.name,
            state=str(state),
            failure=self._last_failure or None,
        )


def _end_probe(probe: asyncio.Future[bool | None], alive: bool | None) -> None:
    if not probe.done():
        probe.set_result(alive)


def failure_of(error: AssociationError) -> Failure:
    """Return the word for an association error."""
    match error:
        case ConnectFailed():
            return Failure.UNREACHABLE
        case AssociationRejected():
            return Failure.BUSY if error.rejection.transient else Failure.REJECTED
        case NoTurn():
            return Failure.BUSY
        case AssociationTimeout():
            return Failure.TIMEOUT
        case NoContext():
            return Failure.NO_CONTEXT
        case UnexpectedMessage():
            return Failure.PROTOCOL
        case _:
            return Failure.ABORTED


def _detail(error: AssociationError) -> str:
    if isinstance(error, AssociationRejected):
        return error.rejection.in_words()
    if isinstance(error, AssociationTimeout):
        return error.phase
    return ""


def deadline(seconds: float) -> Callable[[], float]:
    """Return a function that says how much is left of *seconds* from now."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    return lambda: end - loop.time()
