"""Sub-operation counts and the final status of a retrieve (PS3.4 C.4.2.1.5). Pure.

An operation is the sum of its parts: one per study that we deliver, one for
what the local PACS delivers itself. Rule kept: what failed without being
counted (a holder that cannot even be asked how much it has) still keeps the
operation from being a Success.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from dicomproxy.ports import Delivered, RetrieveProgress

SUCCESS: Final = 0x0000
PENDING: Final = 0xFF00
CANCELLED: Final = 0xFE00
WARNING: Final = 0xB000
NUMBER_OF_MATCHES_UNKNOWN: Final = 0xA701
SUB_OPERATIONS_FAILED: Final = 0xA702
DESTINATION_UNKNOWN: Final = 0xA801
IDENTIFIER_MISMATCH: Final = 0xA900
UNABLE_TO_PROCESS: Final = 0xC000

MAX_COUNT: Final = 65_535
"""The largest number of sub-operations that a US can hold."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of sub-operations as a response carries them, each capped at a US."""

    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0


@dataclass(slots=True)
class Part:
    """What became of one part of an operation so far; numbers are not capped here.

    ``failure`` is the status to answer with if nothing succeeds at all, and
    says that something failed whether or not it could be counted.
    """

    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0
    failure: int | None = None
    failed_sop_instance_uids: dict[str, None] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Sub-operations that have an outcome."""
        return self.completed + self.failed + self.warning

    def expect(self, total: int) -> None:
        """Set how many sub-operations there will be, those done included."""
        self.remaining = max(0, total - self.done)

    def add(self, outcome: Delivered, sop_instance_uid: str) -> None:
        """Count the outcome of one sub-operation."""
        if outcome is Delivered.COMPLETED:
            self.completed += 1
        elif outcome is Delivered.WARNING:
            self.warning += 1
        else:
            self.failed += 1
            self.failed_sop_instance_uids[sop_instance_uid] = None
        self.remaining = max(0, self.remaining - 1)

    def fail(self, sop_instance_uids: Iterable[str]) -> None:
        """Count as Failed those instances that were not counted so already."""
        for uid in sop_instance_uids:
            if uid not in self.failed_sop_instance_uids:
                self.add(Delivered.FAILED, uid)

    def fail_remaining(self) -> None:
        """Count as Failed whatever was still expected; its UIDs are not known."""
        self.failed += self.remaining
        self.remaining = 0

    def forgive(self, sop_instance_uids: Collection[str]) -> None:
        """Take back failures that another part answers for from now on."""
        for uid in sop_instance_uids:
            if uid in self.failed_sop_instance_uids:
                del self.failed_sop_instance_uids[uid]
                self.failed = max(0, self.failed - 1)

    def overlap(self, other: Part) -> None:
        """Count once what *other* did of the very instances that are counted here.

        It is not known which those were, so as few as can be are taken to be
        delivered in total: one that is counted here, and there, was the same one.
        """
        self._take_away(other.completed + other.warning, ("completed", "warning", "failed"))
        self._take_away(other.failed, ("failed", "completed", "warning"))
        for uid in other.failed_sop_instance_uids:
            self.failed_sop_instance_uids.pop(uid, None)

    def _take_away(self, count: int, outcomes: Iterable[str]) -> None:
        for name in outcomes:
            taken = min(getattr(self, name), count)
            setattr(self, name, getattr(self, name) - taken)
            count -= taken

    def follow(self, progress: RetrieveProgress) -> None:
        """Take over what a peer that delivers by itself says of its own operation.

        A final response may leave the counts out; those of the last Pending
        response then stand, and a Success completes what was remaining.
        """
        said = progress.completed + progress.failed + progress.warning
        total = self.remaining + self.done
        if not progress.final or said:
            self.completed = progress.completed
            self.failed = progress.failed
            self.warning = progress.warning
        elif progress.status == SUCCESS:
            self.completed += self.remaining
        if progress.final:
            if progress.status != CANCELLED:
                self.remaining = 0
            elif progress.remaining is not None:
                self.remaining = progress.remaining
            elif said:
                self.remaining = max(0, total - said)
            for uid in progress.failed_sop_instance_uids:
                self.failed_sop_instance_uids[uid] = None
            self.failed = max(self.failed, len(self.failed_sop_instance_uids))
            if is_failure(progress.status):
                self.failure = progress.status
        elif progress.remaining is not None:
            self.remaining = progress.remaining


@dataclass(slots=True)
class Tally:
    """The parts of one operation."""

    parts: list[Part] = field(default_factory=list)

    def part(self) -> Part:
        """Add a part."""
        self.parts.append(made := Part())
        return made

    @property
    def counts(self) -> Counts:
        """The sums, as a response may carry them."""
        return Counts(
            remaining=_capped(part.remaining for part in self.parts),
            completed=_capped(part.completed for part in self.parts),
            failed=_capped(part.failed for part in self.parts),
            warning=_capped(part.warning for part in self.parts),
        )

    @property
    def failed_sop_instance_uids(self) -> tuple[str, ...]:
        """Failed SOP Instance UID List (0008,0058), each once, in the order of failing."""
        merged: dict[str, None] = {}
        for part in self.parts:
            merged.update(part.failed_sop_instance_uids)
        return tuple(merged)

    @property
    def failure(self) -> int | None:
        """The first status that a part would fail with."""
        return next((part.failure for part in self.parts if part.failure is not None), None)


def is_failure(status: int) -> bool:
    """Tell whether a retrieve's final *status* means Refused or Failed."""
    return status not in (SUCCESS, CANCELLED, PENDING, 0xFF01) and status >> 12 != 0xB


def final_status(counts: Counts, failure: int | None = None, *, cancelled: bool = False) -> int:
    """Return the status that ends a retrieve with *counts*.

    Args:
        counts: of all sub-operations.
        failure: what to say if none succeeded, although not all that failed
            need be counted; None if no more failed than the counts tell.
        cancelled: a C-CANCEL ended it.
    """
    if cancelled:
        return CANCELLED
    if counts.failed == 0 and failure is None:
        return WARNING if counts.warning else SUCCESS
    if counts.completed or counts.warning:
        return WARNING
    return SUB_OPERATIONS_FAILED if failure is None else failure


def _capped(numbers: Iterable[int]) -> int:
    return min(MAX_COUNT, sum(numbers))
