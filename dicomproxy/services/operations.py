"""Operations under way: what a status page shows and a shutdown waits for.

One log line and one count for each operation when it is over.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Histogram

from dicomproxy.logs import get_logger

_OPERATIONS = Counter(
    "dicomproxy_operations_total", "Operations that are over.", ("kind", "status")
)
_SECONDS = Histogram(
    "dicomproxy_operation_seconds",
    "How long operations took.",
    ("kind",),
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)

_log = get_logger()


@dataclass(slots=True)
class Operation:
    """One C-FIND or C-MOVE being served; counts are live."""

    operation_id: str
    association_id: str
    kind: str
    caller_ae_title: str
    peer_address: str
    root: str = ""
    query_level: str = ""
    destination_ae_title: str = ""
    started: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0
    bytes: int = 0
    cancelled: bool = False
    cancel: Callable[[], None] | None = None
    phase: Callable[[], str] = str

    def stop(self) -> None:
        """Cancel it as C-CANCEL asks; told again, it is ending already."""
        if not self.cancelled:
            self.cancelled = True
            if self.cancel is not None:
                self.cancel()


@dataclass(frozen=True, slots=True)
class RecentFailure:
    """An operation that did not end well; ``at`` in seconds since 1970."""

    at: float
    event: str
    detail: str


class Operations:
    """The registry of operations."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(2)
        self._numbers = itertools.count(1)
        self.running: dict[str, Operation] = {}
        self.recent_failures: deque[RecentFailure] = deque(maxlen=20)
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(
        self, kind: str, *, association_id: str, caller_ae_title: str, peer_address: str
    ) -> Operation:
        operation = Operation(
            f"{self._prefix}.{next(self._numbers)}",
            association_id,
            kind,
            caller_ae_title,
            peer_address,
        )
        self.running[operation.operation_id] = operation
        self._idle.clear()
        return operation

    def end(self, operation: Operation, status: int | None, **facts: Any) -> None:
        """Log and count *operation*, once; *status* is None where no final response was sent."""
        if self.running.pop(operation.operation_id, None) is None:
            return
        if not self.running:
            self._idle.set()
        seconds = time.monotonic() - operation.started
        _OPERATIONS.labels(operation.kind, "lost" if status is None else f"{status:04X}").inc()
        _SECONDS.labels(operation.kind).observe(seconds)
        good = status in (0x0000, 0xFE00)
        if operation.kind == "retrieve":
            facts = {
                "destination_ae_title": operation.destination_ae_title,
                "completed": operation.completed,
                "failed": operation.failed,
                "warning": operation.warning,
                "bytes": operation.bytes,
                **facts,
            }
        level = "info" if good else "warning"
        getattr(_log, level)(
            operation.kind,
            operation_id=operation.operation_id,
            association_id=operation.association_id,
            caller_ae_title=operation.caller_ae_title,
            peer_address=operation.peer_address,
            root=operation.root or None,
            query_level=operation.query_level or None,
            status=status,
            duration_seconds=seconds,
            **facts,
        )
        if not good:
            ended = "association lost" if status is None else f"status {status:04X}"
            detail = f"{operation.operation_id} from {operation.caller_ae_title}: {ended}"
            self.recent_failures.append(RecentFailure(time.time(), operation.kind, detail))

    async def wait_idle(self) -> None:
        """Return once nothing is under way."""
        await self._idle.wait()

    def cancel_all(self) -> None:
        """Cancel everything as C-CANCEL would."""
        for operation in list(self.running.values()):
            operation.stop()
