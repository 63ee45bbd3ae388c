"""What the cache is told, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How much the cache may hold, and where.

    Args:
        directory: holds everything; created if missing. One process at a time.
        max_size_bytes: instance files never take more than this.
        min_free_bytes: what the file system must keep free; None is 2 % of it.
        high_watermark: fraction of ``max_size_bytes`` at which eviction begins.
        low_watermark: fraction at which eviction ends.
        max_age_seconds: studies not used for so long are evicted; None keeps them.
        memory_spool_bytes: how much may be held in memory, over all instances,
            while the disk takes none.
    """

    directory: Path
    max_size_bytes: int
    min_free_bytes: int | None = None
    high_watermark: float = 0.95
    low_watermark: float = 0.85
    max_age_seconds: float | None = None
    memory_spool_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        if self.max_size_bytes <= 0:
            raise ValueError("max_size_bytes must be positive")
        if not 0 < self.low_watermark < self.high_watermark <= 1:
            raise ValueError("watermarks must obey 0 < low < high <= 1")

    @property
    def high_bytes(self) -> int:
        return int(self.max_size_bytes * self.high_watermark)

    @property
    def low_bytes(self) -> int:
        return int(self.max_size_bytes * self.low_watermark)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot. ``bytes`` counts instance files, ``spooled_bytes`` what memory holds."""

    bytes: int
    max_size_bytes: int
    instances: int
    studies: int
    pinned: int
    in_use: int
    spooled_bytes: int
    hits: int
    misses: int
    evictions: int
    evicted_bytes: int


@dataclass(frozen=True, slots=True)
class CachedStudy:
    """One study as listings show it. ``last_used`` is in seconds since 1970."""

    study_instance_uid: str
    size_bytes: int
    instances: int
    complete: bool
    pinned: bool
    in_use: bool
    last_used: float
