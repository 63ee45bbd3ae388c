"""What the core asks of its edges.

Everything that two processes would have to share is reached through these
protocols, so that only the embedded implementations know how it is done:
archives (:class:`Source`, :class:`LocalArchive`), workstations
(:class:`Destination`), the cache (:class:`InstanceStore`), the memory of where
studies were seen (:class:`Locations`) and the disclosure record
(:class:`Audit`). The core imports this module; the edges implement it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import Level
from dicomproxy.dataset.patient import Domain, PatientId

LOCAL = "local"
"""The source name under which the local PACS appears everywhere."""


# --------------------------------------------------------------------- callers


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what the site allows and wants for them.

    ``sources`` are the names this caller may see, in order of precedence. A
    caller that ``is_source`` itself is answered from the local PACS alone, so
    that two proxies facing each other cannot loop. ``charset`` are the
    defined terms its answers are written in, none for whatever fits.
    """

    ae_title: str
    peer_address: str = ""
    called_ae_title: str = ""
    sources: tuple[str, ...] = ()
    is_source: bool = False
    query_budget_seconds: float = 5.0
    availability: str = "NEARLINE"
    charset: tuple[str, ...] = ()


# --------------------------------------------------------------------- sources


class Failure(StrEnum):
    """Why an exchange with a peer came to nothing; branched on, logged, counted."""

    UNREACHABLE = "unreachable"  # no TCP connection
    REJECTED = "rejected"  # A-ASSOCIATE-RJ, permanent
    BUSY = "busy"  # A-ASSOCIATE-RJ, transient; or all that we may have is in use
    NO_CONTEXT = "no_context"  # association without the presentation context
    ABORTED = "aborted"  # A-ABORT or connection lost
    TIMEOUT = "timeout"  # a deadline passed
    PROTOCOL = "protocol_error"  # what came was not DICOM
    STATUS = "status"  # a DIMSE failure status
    BREAKER = "breaker_open"  # not asked: it failed too often lately


class SourceError(Exception):
    """An exchange with an archive failed.

    Args:
        source: name of the source, ``local`` for the local PACS.
        failure: which way it failed.
        status: the DIMSE status where *failure* is ``STATUS``.
        detail: facts without patient values or peers' free text.
    """

    def __init__(
        self, source: str, failure: Failure, status: int | None = None, detail: str = ""
    ) -> None:
        self.source = source
        self.failure = failure
        self.status = status
        self.detail = detail
        shown = f" 0x{status:04X}" if status is not None else ""
        super().__init__(f"{source}: {failure}{shown}{' ' + detail if detail else ''}")


@dataclass(frozen=True, slots=True)
class SourceQuery:
    """One C-FIND as the core wants it asked.

    The source chooses the SOP Class: an archive that speaks Study Root only is
    asked a ``PATIENT`` level question at ``STUDY`` level and the answers are
    collapsed to one per patient. ``max_matches`` replaces the source's cap on
    rows, for listings that are worthless if cut. ``interactive``: somebody
    waits for this very archive, so that it may be tried although its breaker is open.
    """

    level: Level
    identifier: Identifier
    interactive: bool = False
    max_matches: int | None = None


@dataclass(slots=True)
class RetrieveProgress:
    """What a source says of a retrieve under way; counts may lie."""

    remaining: int | None = None
    completed: int = 0
    failed: int = 0
    warning: int = 0
    final: bool = False
    status: int = 0xFF00
    failed_sop_instance_uids: tuple[str, ...] = ()


@dataclass(slots=True)
class RetrieveOrder:
    """What one retrieve operation asks of a source.

    ``last_activity`` is the loop time at which bytes of this order last
    arrived, 0 while none did; whoever receives them sets it, the source's stall
    deadline reads it. ``last_possible_activity`` is the same for bytes that may
    have been of another order to that source: they put a deadline off, and do
    not mean that this order has begun. ``doubtful`` are instances on their way
    that may be of this order, which has begun, with the loop times of their first
    and last bytes: until it is known, they hold a deadline up if they began in time.
    ``sop_classes`` are those expected (from the manifest), for C-GET's contexts.
    ``wanted`` tells whether anybody waits for what it brings, at the moment it is
    asked; without it somebody does. What nobody waits for comes after all else.
    """

    level: Level
    study_instance_uids: tuple[str, ...]
    series_instance_uids: tuple[str, ...] = ()
    sop_instance_uids: tuple[str, ...] = ()
    patient_id: str = ""
    sop_classes: tuple[str, ...] = ()
    last_activity: float = 0.0
    last_possible_activity: float = 0.0
    doubtful: dict[object, tuple[float, float]] = field(
        default_factory=dict, compare=False, repr=False
    )
    arrived: int = 0
    wanted: Callable[[], bool] | None = field(default=None, compare=False, repr=False)


class Source(Protocol):
    """An archive that can be asked for matches and for instances."""

    @property
    def name(self) -> str: ...

    @property
    def wants_sop_classes(self) -> bool:
        """Whether an order should wait for the manifest, to name its SOP Classes (C-GET)."""
        ...

    @property
    def round_trip_seconds(self) -> float:
        """How far away it is, as far as was measured; 0 where nothing was."""
        ...

    @property
    def parallel_retrieves(self) -> int:
        """How many retrieves it may be asked for at once."""
        ...

    def find(self, query: SourceQuery) -> AsyncGenerator[Identifier, None]:
        """Yield matches as they arrive, at most the source's cap.

        Closing the iterator sends C-CANCEL. Every wait has a deadline.

        Raises:
            SourceError: the exchange failed; what was yielded before holds.
        """
        ...

    def retrieve(self, order: RetrieveOrder) -> AsyncGenerator[RetrieveProgress, None]:
        """Have instances sent to our Storage SCP; yield progress, the last one final.

        Closing the iterator cancels at the source.

        Raises:
            SourceError: no final response came.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """One C-FIND response of the local PACS, its identifier still as bytes.

    ``status`` is the DIMSE status; pending answers carry ``data`` encoded in
    ``transfer_syntax_uid``. The last answer is not pending and may carry the
    PACS's Error Comment, which is relayed and never logged.
    """

    status: int
    data: bytes = b""
    transfer_syntax_uid: str = ""
    error_comment: str = ""

    @property
    def pending(self) -> bool:
        return self.status in (0xFF00, 0xFF01)


@dataclass(slots=True)
class Cancellation:
    """How a move that the local PACS performs is cancelled.

    The archive sets ``send`` once there is something to cancel. Calling it has a
    C-CANCEL sent (PS3.7 9.3.2.3) and waits for nothing: the move then ends by its
    own final response, with its own counts.
    """

    send: Callable[[], None] | None = None


class LocalArchive(Protocol):
    """The local PACS as a workstation would talk to it."""

    def find(
        self,
        sop_class_uid: str,
        transfer_syntax_uid: str,
        data: bytes,
        *,
        calling_ae_title: str,
        priority: int = 0,
    ) -> AsyncGenerator[LocalAnswer, None]:
        """Ask with the identifier's own bytes; the last answer is final.

        Raises:
            SourceError: the PACS is unreachable, refused, silent or broken.
        """
        ...

    def move(
        self,
        order: RetrieveOrder,
        *,
        destination_ae_title: str,
        calling_ae_title: str,
        message_id: int,
        priority: int = 0,
        cancellation: Cancellation | None = None,
    ) -> AsyncGenerator[RetrieveProgress, None]:
        """Have the PACS itself send to a workstation; its progress, the last one final.

        Asked with the workstation's calling title and Message ID, so that the
        PACS names them as Move Originator. Closing the iterator sends C-CANCEL
        and gives up its final response; *cancellation* is for who wants that.

        Raises:
            SourceError: no final response came.
        """
        ...


# ----------------------------------------------------------------------- cache


@dataclass(frozen=True, slots=True)
class CachedInstance:
    """One whole instance in the store. ``size`` counts data set bytes only."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    source: str
    file_name: str
    data_set_offset: int
    size: int
    crc32: int


class Refused(Exception):
    """An arriving instance was not let in; ``reason`` is a log-safe word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class StoreFull(Exception):
    """No room for an instance: disk full and the memory spool used up."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Outcome of a commit. ``instance`` is the one the store holds.

    ``duplicate``: the same bytes were already held. ``conflict``: another
    content is held under the same SOP Instance UID, and was kept.
    """

    instance: CachedInstance
    duplicate: bool = False
    conflict: bool = False


class StudyLease(Protocol):
    """A study in use: it is not evicted until :meth:`release` (counted)."""

    @property
    def study_instance_uid(self) -> str: ...

    @property
    def instances(self) -> Mapping[str, CachedInstance]:
        """Whole instances by SOP Instance UID; live."""
        ...

    @property
    def complete(self) -> bool: ...

    async def set_complete(self, complete: bool) -> None: ...

    async def remove(self, sop_instance_uids: Sequence[str]) -> None:
        """Drop instances: they are no longer served, their bytes are freed."""
        ...

    def touch(self) -> None:
        """Count as used now; saved on release."""
        ...

    def release(self) -> None: ...


Admit = Callable[[InstanceHeader], StudyLease]
"""Decides, in the writer thread, where an instance belongs; raises Refused."""


class InstanceWriter(Protocol):
    """One arriving instance. Used from the event loop."""

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        """Queue bytes in order. *release* is called on the loop when they are no longer needed."""
        ...

    async def commit(self, admit: Admit) -> Stored:
        """Read the header, ask *admit*, and make the instance exist.

        Raises:
            Refused: *admit* said no, or the header cannot be read, or
                contradicts the SOP Class and Instance UID of the command.
            StoreFull: no room.
        """
        ...

    def discard(self) -> None:
        """Forget what was written; for an aborted or refused transfer."""
        ...


class InstanceReader(Protocol):
    """An open instance; its data set bytes are 0..size."""

    @property
    def size(self) -> int: ...

    @property
    def arrived(self) -> int:
        """When the instance came, in seconds since 1970; 0 where that was not kept."""
        ...

    async def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill *buffers* in order from data set byte *offset*, off the loop; bytes read."""
        ...

    async def close(self) -> None: ...


class InstanceStore(Protocol):
    """The bounded cache of instances, grouped by study."""

    async def lease(self, study_instance_uid: str) -> StudyLease:
        """Open a study for use, creating it empty if it is not held."""
        ...

    async def drop(self, study_instance_uid: str) -> None:
        """Forget a study, even if leased: its instances are no longer served."""
        ...

    def receive(
        self, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source: str
    ) -> InstanceWriter: ...

    async def open(self, instance: CachedInstance) -> InstanceReader:
        """Raises FileNotFoundError or Refused("damaged") if it is no longer whole."""
        ...

    async def open_several(
        self, instances: Sequence[CachedInstance], head_bytes: int = 0
    ) -> list[InstanceReader | None]:
        """Open a few before their turn, at the price of one; None for those that
        need :meth:`open`, which also says what is wrong with them. The first
        *head_bytes* of each are read with it, and then cost nothing. Raises nothing."""
        ...

    def count_hits(self, count: int) -> None:
        """Count instances that were wanted and held."""
        ...

    def count_misses(self, count: int) -> None:
        """Count instances that were wanted and had to be fetched."""
        ...


# -------------------------------------------------------------------- arrivals


class Arrival(Protocol):
    """One instance on its way in. Used from the event loop."""

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        """As :meth:`InstanceWriter.write`."""
        ...

    async def finish(self) -> int:
        """Let the instance exist if it belongs to a flight. Never raises.

        Returns:
            The status of the C-STORE response.
        """
        ...

    def discard(self) -> None:
        """Forget it: the transfer was aborted."""
        ...


class Arrivals(Protocol):
    """Where instances go that sources send, whether by C-STORE or within a C-GET."""

    def source_for(self, candidates: Sequence[str]) -> str | None:
        """Return which of the sources that a sender may be is being retrieved from."""
        ...

    def receive(
        self, source: str, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str
    ) -> Arrival: ...


# ---------------------------------------------------------------- destinations


@dataclass(frozen=True, slots=True)
class Originator:
    """Who asked for a delivery: (0000,1030) and (0000,1031) of each C-STORE-RQ."""

    ae_title: str
    message_id: int
    priority: int = 0


class Delivered(StrEnum):
    """What became of one instance at its destination."""

    COMPLETED = "completed"
    WARNING = "warning"
    FAILED = "failed"


class DestinationError(Exception):
    """The destination cannot be reached any more; nothing further is delivered."""

    def __init__(self, failure: Failure, detail: str = "") -> None:
        self.failure = failure
        self.detail = detail
        super().__init__(f"{failure} {detail}".strip())


class Destination(Protocol):
    """One delivery's way to one application entity."""

    def expect(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Say which SOP Classes will come, in which transfer syntaxes, as far as is known.

        A hint, so that one association can serve them all; what
        is delivered need not have been expected.
        """
        ...

    async def deliver(self, instance: CachedInstance, reader: InstanceReader) -> Delivered:
        """Send one instance and wait for its C-STORE-RSP.

        Raises:
            DestinationError: the destination is lost for good.
        """
        ...

    async def close(self) -> None: ...


# -------------------------------------------------------------------- locations


@dataclass(frozen=True, slots=True)
class Location:
    """A study was seen at a source, under that patient ID."""

    study_instance_uid: str
    source: str
    patient_id: str


class Locations(Protocol):
    """Where each study was seen; survives a restart."""

    async def find(self, study_instance_uid: str) -> tuple[Location, ...]:
        """Every known holder, in no order; empty if the study was never seen."""
        ...

    def remember(self, locations: Sequence[Location]) -> None:
        """Add or refresh; visible to find at once, written behind."""
        ...

    def forget(self, study_instance_uid: str, source: str) -> None: ...


# --------------------------------------------------------------- cross-reference


class CrossReferenceError(Exception):
    """It could not be found out who a patient is elsewhere; never taken for "nobody".

    Args:
        failure: which way it failed; ``STATUS`` for one that answered with an error.
        reason: a log-safe word, such as ``unknown_domain`` or ``several_ids``.
    """

    def __init__(self, failure: Failure, reason: str = "") -> None:
        self.failure = failure
        self.reason = reason
        super().__init__(f"{failure} {reason}".strip())


class CrossReference(Protocol):
    """Which IDs a person has in other domains."""

    async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
        """Return the person's IDs in *domain*; none if they are known to have none there.

        More than one only where the site has allowed it.

        Raises:
            CrossReferenceError: an outage, or a domain it does not know.
        """
        ...

    def forget(self, patient: PatientId) -> None:
        """Drop what is remembered of a person: two records were merged, or an ID moved."""
        ...


# ------------------------------------------------------------------------ audit


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One disclosure or refusal (DICOM PS3.15 A.5 in spirit; a durable file today).

    ``event`` is ``query`` or ``disclosure``; ``outcome`` is ``success``,
    ``partial``, ``failure`` or ``cancelled``. This record, unlike logs, names
    the patient where the request did.
    """

    event: str
    outcome: str
    caller_ae_title: str
    peer_address: str
    source: str
    operation_id: str
    destination_ae_title: str = ""
    level: str = ""
    root: str = ""
    patient_id: str = ""
    study_instance_uids: tuple[str, ...] = ()
    instances: int = 0
    failed: int = 0
    status: int | None = None
    detail: str = ""
    at: datetime | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Audit(Protocol):
    """The durable record of disclosures."""

    async def record(self, *events: AuditEvent) -> None:
        """Return once the events are on disk. Never raises: a failing disk is
        logged loudly (``audit_failed``) and clinical traffic goes on."""
        ...
