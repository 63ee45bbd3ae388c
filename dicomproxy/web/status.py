"""What the status page shows, as plain values. No patient values are among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STUCK_SECONDS: Final = 30.0
"""After which an operation in which nothing moves counts as stuck."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """One archive, ``local`` included; moments are seconds since 1970, 0 for never."""

    name: str
    ae_title: str
    address: str
    breaker: str
    last_success_at: float
    last_failure_at: float
    last_failure: str
    median_seconds: float | None
    last_seconds: float | None
    in_use: int
    idle: int
    ceiling: int

    @property
    def reachable(self) -> bool | None:
        """What its latest exchange says; None before the first."""
        if self.breaker == "open":
            return False
        if not self.last_success_at and not self.last_failure_at:
            return None
        return self.last_success_at >= self.last_failure_at


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """One query or retrieve under way; ``quiet_seconds`` is since anything moved."""

    operation_id: str
    kind: str
    caller_ae_title: str
    peer_address: str
    query_level: str
    destination_ae_title: str
    phase: str
    remaining: int
    completed: int
    failed: int
    warning: int
    bytes: int
    duration_seconds: float
    quiet_seconds: float

    @property
    def stuck(self) -> bool:
        """Whether nothing has moved for longer than :data:`STUCK_SECONDS`."""
        return self.quiet_seconds > STUCK_SECONDS


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """How full the cache is."""

    bytes: int
    max_size_bytes: int
    studies: int
    instances: int
    pinned: int
    in_use: int
    spooled_bytes: int
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True, slots=True)
class FailureStatus:
    """Something that went wrong lately."""

    at: float
    event: str
    detail: str


@dataclass(frozen=True, slots=True)
class Hl7Status:
    """The listener for HL7 messages; counts since the start, moments since 1970, 0 for never."""

    address: str
    connections: int
    max_connections: int
    refused_connections: int
    acknowledged: int
    refused: int
    waiting: int
    set_aside: int
    merges: int
    updates: int
    unknown_domain: int
    last_notice_at: float
    last_refused_at: float


@dataclass(frozen=True, slots=True)
class StatusSnapshot:
    """Everything the page shows, at one moment."""

    version: str
    started_at: float
    ready: bool
    draining: bool
    ae_titles: tuple[str, ...]
    address: str
    associations: int
    max_associations: int
    sources: tuple[SourceStatus, ...]
    operations: tuple[OperationStatus, ...]
    cache: CacheStatus
    failures: tuple[FailureStatus, ...] = ()
    tasks: int = 0
    hl7: Hl7Status | None = None

    @property
    def state(self) -> str:
        """``starting``, ``ready`` or ``draining``."""
        if self.draining:
            return "draining"
        return "ready" if self.ready else "starting"
