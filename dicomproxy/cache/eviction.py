"""Which studies go. Pure: no clock, no I/O.

Whole studies only, least recently used first, never one that is in use or pinned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StudyUse:
    """What eviction needs to know of one study."""

    study_instance_uid: str
    size_bytes: int
    last_used: float
    in_use: bool = False
    pinned: bool = False

    @property
    def evictable(self) -> bool:
        return not (self.in_use or self.pinned)


def bytes_to_free(
    used_bytes: int,
    arriving_bytes: int,
    *,
    high_bytes: int,
    low_bytes: int,
    missing_free_bytes: int = 0,
) -> int:
    """Return how much must go so that *arriving_bytes* fit.

    Nothing goes below the high watermark; once it is crossed, as much as
    brings the cache down to the low one, so that eviction comes in bouts.
    ``missing_free_bytes`` is what the file system lacks of the space it must keep.
    """
    needed = max(0, missing_free_bytes)
    if used_bytes + arriving_bytes > high_bytes:
        needed = max(needed, used_bytes + arriving_bytes - low_bytes)
    return needed


def least_recently_used(studies: Iterable[StudyUse], free_bytes: int) -> list[str]:
    """Return the studies whose eviction frees *free_bytes*, or all that may go.

    A study without bytes is passed over: its going would free nothing.
    """
    chosen: list[str] = []
    freed = 0
    candidates = [study for study in studies if study.evictable and study.size_bytes > 0]
    for study in sorted(candidates, key=lambda study: study.last_used):
        if freed >= free_bytes:
            break
        chosen.append(study.study_instance_uid)
        freed += study.size_bytes
    return chosen


def unused_since(studies: Iterable[StudyUse], moment: float) -> list[str]:
    """Return the evictable studies that were last used before *moment*."""
    return [
        study.study_instance_uid
        for study in studies
        if study.evictable and study.last_used < moment
    ]
