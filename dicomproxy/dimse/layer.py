"""What all associations of a process share, and how one is requested.

:class:`UpperLayer` owns the two bounded pools of memory (received and sent
data), the timers and the limits, counts associations, and writes one log line
for each when it is over.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Gauge

from dicomproxy.dimse.association import Association, MessageLimits
from dicomproxy.dimse.blocks import BlockPool
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationError,
    AssociationLost,
    AssociationRejected,
    AssociationReleased,
    AssociationTimeout,
    ConnectFailed,
)
from dicomproxy.dimse.negotiation import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
)
from dicomproxy.dimse.pdu import (
    AssociateRequest,
    ProposedContext,
    RoleSelection,
    UserInformation,
)
from dicomproxy.dimse.transport import AssociationProtocol
from dicomproxy.logs import get_logger

_RECEIVE_BLOCK_BYTES: Final = 128 * 1024
# Two PDUs of 256 KiB, or four of 128 KiB, with their headers and a command before them.
_SEND_BLOCK_BYTES: Final = 512 * 1024 + 4096
# A peer that stops reading keeps its block until the stall deadline. So that a few dozen of
# those hold up nobody, a quarter of the memory is in blocks of one PDU of the usual 16 KiB:
# some two hundred senders have memory at once, the first two dozen of them plenty.
_SMALL_SEND_BLOCK_BYTES: Final = 16 * 1024 + 4096
_SMALL_SEND_SHARE: Final = 4

_ASSOCIATIONS = Counter(
    "dicomproxy_associations_total", "Associations that are over.", ("role", "outcome")
)
_OPEN = Gauge("dicomproxy_associations_open", "Transport connections open now.", ("role",))
_BYTES = Counter(
    "dicomproxy_transport_bytes_total", "Bytes of ended associations.", ("role", "direction")
)

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Timers:
    """Seconds: ARTIM (PS3.8 9.1.5), negotiation, a response, an idle association, a stall."""

    artim: float = 30.0
    association: float = 30.0
    response: float = 60.0
    idle: float = 600.0
    stall: float = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What peers may make us hold; memory in use follows from these alone."""

    max_pdu_bytes: int = 256 * 1024
    max_identifier_bytes: int = 1024 * 1024
    max_command_bytes: int = 64 * 1024
    max_pending_messages: int = 32
    receive_memory_bytes: int = 16 * 1024 * 1024
    send_memory_bytes: int = 16 * 1024 * 1024

    @property
    def messages(self) -> MessageLimits:
        return MessageLimits(
            self.max_identifier_bytes, self.max_command_bytes, self.max_pending_messages
        )


@dataclass(frozen=True, slots=True)
class Target:
    """An application entity to associate with, and who we are to it."""

    host: str
    port: int
    called_ae_title: str
    calling_ae_title: str
    connect_seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to propose: abstract syntaxes with transfer syntaxes, and roles."""

    contexts: tuple[tuple[str, tuple[str, ...]], ...]
    roles: tuple[RoleSelection, ...] = ()


class UpperLayer:
    """The DICOM upper layer of this process. Make it inside a running event loop."""

    def __init__(self, timers: Timers | None = None, limits: Limits | None = None) -> None:
        self.timers = timers or Timers()
        self.limits = limits or Limits()
        self.receive_pool = BlockPool(
            _RECEIVE_BLOCK_BYTES, max(4, self.limits.receive_memory_bytes // _RECEIVE_BLOCK_BYTES)
        )
        small_bytes = self.limits.send_memory_bytes // _SMALL_SEND_SHARE
        large_bytes = self.limits.send_memory_bytes - small_bytes
        self.send_pool = BlockPool(
            _SEND_BLOCK_BYTES,
            max(1, large_bytes // _SEND_BLOCK_BYTES),
            small_bytes=_SMALL_SEND_BLOCK_BYTES,
            small_limit=max(1, small_bytes // _SMALL_SEND_BLOCK_BYTES),
        )
        self.associations: set[Association] = set()
        self._prefix = secrets.token_hex(2)
        self._numbers = itertools.count(1)

    def acceptor(
        self, on_request: Callable[[Association, AssociateRequest], None]
    ) -> AssociationProtocol:
        """Return the protocol for a connection that a peer opened."""
        return self._make(on_request=on_request).protocol

    async def request(self, target: Target, proposal: Proposal) -> Association:
        """Associate with *target*.

        Raises:
            ConnectFailed: no TCP connection.
            AssociationRejected: with result, source and reason.
            AssociationError: aborted, lost or silent.
        """
        request = AssociateRequest(
            target.called_ae_title,
            target.calling_ae_title,
            tuple(
                ProposedContext(2 * number + 1, abstract_syntax, syntaxes)
                for number, (abstract_syntax, syntaxes) in enumerate(proposal.contexts)
            ),
            UserInformation(
                max_length=self.limits.max_pdu_bytes,
                implementation_class_uid=IMPLEMENTATION_CLASS_UID,
                implementation_version_name=IMPLEMENTATION_VERSION_NAME,
                roles=proposal.roles,
            ),
        )
        association = self._make(request=request)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(target.connect_seconds):
                await loop.create_connection(lambda: association.protocol, target.host, target.port)
        except BaseException as error:
            self._forget(association)
            association.protocol.forsake()
            match error:
                case TimeoutError():
                    raise ConnectFailed("connecting took too long") from None
                case OSError() | UnicodeError():
                    # Only the kind: texts of operating systems name addresses in many ways.
                    raise ConnectFailed(type(error).__name__) from None
            raise
        sent = loop.time()
        try:
            await association.negotiated(self.timers.association)
        except asyncio.CancelledError:
            association.abort()
            raise
        association.round_trip_seconds = loop.time() - sent
        return association

    def _make(
        self,
        *,
        on_request: Callable[[Association, AssociateRequest], None] | None = None,
        request: AssociateRequest | None = None,
    ) -> Association:
        association_id = f"{self._prefix}-{next(self._numbers)}"
        association = Association(
            association_id,
            limits=self.limits.messages,
            send_pool=self.send_pool,
            stall_seconds=self.timers.stall,
            on_request=on_request,
            request=request,
        )
        association.protocol = AssociationProtocol(
            association,
            self.receive_pool,
            max_pdu_bytes=self.limits.max_pdu_bytes,
            artim_seconds=self.timers.artim,
            stall_seconds=self.timers.stall,
            association_id=association_id,
        )
        association.started = asyncio.get_running_loop().time()
        association.on_ended = self._ended
        self.associations.add(association)
        _OPEN.labels(_role(association)).inc()
        return association

    def _forget(self, association: Association) -> None:
        if association in self.associations:
            self.associations.discard(association)
            _OPEN.labels(_role(association)).dec()

    def _ended(self, association: Association) -> None:
        if association not in self.associations:
            return
        self._forget(association)
        role, outcome = _role(association), _outcome(association.ended)
        if association.request is None:
            outcome = "no_request"
        protocol = association.protocol
        _ASSOCIATIONS.labels(role, outcome).inc()
        _BYTES.labels(role, "received").inc(protocol.received_bytes)
        _BYTES.labels(role, "sent").inc(protocol.sent_bytes)
        now = asyncio.get_running_loop().time()
        # A health check that only connects is not worth a line of its own.
        level = "debug" if association.request is None else "info"
        getattr(_log, level)(
            "association",
            association_id=association.association_id,
            role=role,
            outcome=outcome,
            calling_ae_title=association.calling_ae_title,
            called_ae_title=association.called_ae_title,
            peer_address=protocol.peer_address,
            contexts=len(association.contexts),
            received_bytes=protocol.received_bytes,
            sent_bytes=protocol.sent_bytes,
            received_count=association.messages_received,
            sent_count=association.messages_sent,
            duration_seconds=now - association.started,
        )

    async def close(self, timeout_seconds: float) -> None:
        """Abort whatever is still open and wait, but not for long, until it is gone."""
        left = list(self.associations)
        for association in left:
            association.abort()
        try:
            async with asyncio.timeout(timeout_seconds):
                for association in left:
                    await association.wait_closed()
        except TimeoutError:
            for association in left:
                association.protocol.close_now()


def _role(association: Association) -> str:
    return "requestor" if association.is_requestor else "acceptor"


def _outcome(ended: AssociationError | None) -> str:
    match ended:
        case AssociationReleased():
            return "released"
        case AssociationRejected():
            return "rejected"
        case AssociationAborted():
            return "aborted"
        case AssociationTimeout():
            return "timeout"
        case AssociationLost() | None:
            return "lost"
        case _:
            return "failed"
