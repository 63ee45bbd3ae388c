"""The part of a C-MOVE that the local PACS delivers itself.

It is asked at the request's own level, for the studies that it holds, with the
workstation's title and Message ID, so that it names them as Move Originator.
Cancelled, it is told so and keeps the last word: its final response says what
became of the sub-operations, and is waited for, but not for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from dicomproxy.dataset.levels import Level
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    LOCAL,
    Cancellation,
    Failure,
    LocalArchive,
    Originator,
    RetrieveOrder,
    SourceError,
)
from dicomproxy.retrieval.locate import LocatedStudy
from dicomproxy.retrieval.manifest import closing
from dicomproxy.retrieval.request import RetrieveRequest
from dicomproxy.retrieval.tally import (
    CANCELLED,
    NUMBER_OF_MATCHES_UNKNOWN,
    SUB_OPERATIONS_FAILED,
    UNABLE_TO_PROCESS,
    WARNING,
    Part,
)

_CANCEL_SECONDS: Final = 4.0  # less than what a shutdown leaves for cancelled operations

_log = get_logger()


@dataclass(slots=True)
class Relay:
    """What the local PACS was asked for, and how far it has come.

    ``status`` is that of its final response, ``broken`` says that none came.
    ``ended`` is set when no more comes of it, ``quiet`` once the PACS has ended
    what it was asked first, for it may be asked again.
    ``covered`` are studies that were had from elsewhere instead, ``cancelled``
    says that the PACS was sent a C-CANCEL.
    """

    studies: list[LocatedStudy]
    part: Part
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    status: int | None = None
    broken: bool = False
    covered: set[str] = field(default_factory=set)
    cancelled: bool = False
    _cancellation: Cancellation = field(default_factory=Cancellation)
    _patience: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    @property
    def was_kept_out(self) -> bool:
        """Whether the PACS delivered nothing at all, as if the workstation did not take it."""
        if self.status is None or self.cancelled or self.part.completed + self.part.warning:
            return False
        return self.status in (SUB_OPERATIONS_FAILED, WARNING) or self.status >> 12 == 0xC

    def begin_anew(self) -> None:
        """Expect again what has failed, since the PACS is about to be asked once more."""
        self.status = None
        self._patience = asyncio.timeout(None)
        part = self.part
        part.remaining, part.failed, part.failure = part.remaining + part.failed, 0, None
        part.failed_sop_instance_uids.clear()

    def cancel(self) -> bool:
        """Tell the PACS to stop; False if it was not asked yet, so that nobody need wait for it."""
        if self._cancellation.send is None:
            return False
        if not self.cancelled:
            self.cancelled = True
            self._patience.reschedule(asyncio.get_running_loop().time() + _CANCEL_SECONDS)
            self._cancellation.send()
        return True

    async def follow(
        self,
        local: LocalArchive,
        request: RetrieveRequest,
        originator: Originator,
        *,
        destination_ae_title: str,
        calling_ae_title: str,
        progressed: Callable[[], None],
    ) -> None:
        """Have it send, and take its counts over as they come.

        Raises:
            SourceError: no final response came, or none in time to a C-CANCEL.
        """
        studies = tuple(study.study_instance_uid for study in self.studies)
        order = RetrieveOrder(
            level=request.level,
            study_instance_uids=() if request.level is Level.PATIENT else studies,
            series_instance_uids=request.series_instance_uids,
            sop_instance_uids=request.sop_instance_uids,
            patient_id=request.patient_id,
            last_activity=asyncio.get_running_loop().time(),
        )
        steps = local.move(
            order,
            destination_ae_title=destination_ae_title,
            calling_ae_title=calling_ae_title,
            message_id=originator.message_id,
            priority=originator.priority,
            cancellation=self._cancellation,
        )
        try:
            async with self._patience, closing(steps):
                async for progress in steps:
                    self.part.follow(progress)
                    if progress.final:
                        self.status = progress.status
                    progressed()
        except TimeoutError:
            raise SourceError(LOCAL, Failure.TIMEOUT) from None
        finally:
            self._cancellation.send = None
        if self.status is None:
            self.part.fail_remaining()
            self.part.failure = SUB_OPERATIONS_FAILED
        elif self.status == CANCELLED:
            if not self.cancelled:
                self.part.fail_remaining()  # somebody else's doing
        elif self.status == WARNING and not self.part.failed + self.part.warning:
            self.part.failure = WARNING

    def break_off(self, error: Exception, operation_id: str) -> None:
        """Count what was still to come as Failed, since the exchange has.

        After a C-CANCEL it counts as not begun: the last Pending response stands.
        """
        self.broken = True
        if not self.cancelled:
            self.part.fail_remaining()
        if isinstance(error, SourceError):
            self.part.failure = error.status or NUMBER_OF_MATCHES_UNKNOWN
            _log.warning(
                "local_retrieve_failed",
                failure=str(error.failure),
                status=error.status,
                operation_id=operation_id,
            )
        else:
            self.part.failure = UNABLE_TO_PROCESS
            _log.error("retrieve_failed", operation_id=operation_id, **error_fields(error))
