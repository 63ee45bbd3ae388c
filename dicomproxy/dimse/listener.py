"""Accepting associations: limits first, then the service's own judgement.

A connection beyond the limit is answered as the standard has it, by a transient
rejection with "local limit exceeded" (PS3.8 9.3.4), as long as there are not so
many that answering would be the load; beyond that it is dropped.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from dicomproxy.dimse.association import Association
from dicomproxy.dimse.layer import UpperLayer
from dicomproxy.dimse.negotiation import Context
from dicomproxy.dimse.pdu import (
    APPLICATION_CONTEXT,
    REJECT_APPLICATION_CONTEXT,
    REJECT_CONGESTION,
    REJECT_LIMIT,
    REJECT_PROTOCOL_VERSION,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
)
from dicomproxy.dimse.transport import AssociationProtocol
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.tasks import OwnerClosed, TaskOwner

_BACKLOG: Final = 512
_SURPLUS: Final = 100  # connections over the limit that still get an answer

_log = get_logger()


class Acceptor(Protocol):
    """What a service does with associations."""

    async def negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        """Accept, with the accepted contexts, or reject."""
        ...

    async def serve(self, association: Association) -> None:
        """Handle an accepted association until it is over; whatever is left then is aborted."""
        ...


class Listener:
    """Listens on one port and hands associations to an :class:`Acceptor`."""

    def __init__(self, layer: UpperLayer, acceptor: Acceptor, *, max_associations: int) -> None:
        self._layer = layer
        self.acceptor = acceptor
        self.max_associations = max_associations
        self._tasks = TaskOwner("association")
        self._server: asyncio.Server | None = None
        self._draining = False
        self.accepted: set[Association] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port bound, which differs from *port* if that was 0.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._connection, host or None, port, backlog=_BACKLOG, reuse_address=True
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def drain(self) -> None:
        """Reject new associations from now on, transiently; those accepted go on."""
        self._draining = True

    async def close(self) -> None:
        """Stop listening and end every association that is left."""
        self._draining = True
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self._tasks.close()

    async def wait_idle(self) -> None:
        """Return once no association is being served."""
        await self._tasks.wait_idle()

    def _connection(self) -> AssociationProtocol:
        protocol = self._layer.acceptor(self._requested)
        if self._open >= self.max_associations + _SURPLUS:
            protocol.drop_at_once = True
        return protocol

    @property
    def _open(self) -> int:
        return sum(not association.is_requestor for association in self._layer.associations)

    def _requested(self, association: Association, request: AssociateRequest) -> None:
        reject = self._refusal(request)
        if reject is not None:
            self._reject(association, request, reject)
            return
        self.accepted.add(association)
        try:
            self._tasks.spawn(self._serve(association, request), name=association.association_id)
        except OwnerClosed:
            self.accepted.discard(association)
            association.abort()

    def _refusal(self, request: AssociateRequest) -> AssociateReject | None:
        if request.protocol_version & 1 == 0:
            return REJECT_PROTOCOL_VERSION
        if request.application_context != APPLICATION_CONTEXT:
            return REJECT_APPLICATION_CONTEXT
        if self._draining:
            return REJECT_CONGESTION
        if len(self.accepted) >= self.max_associations:
            return REJECT_LIMIT
        return None

    async def _serve(self, association: Association, request: AssociateRequest) -> None:
        acceptor = self.acceptor  # whoever admits it serves it, though another follows meanwhile
        try:
            outcome = await acceptor.negotiate(association, request)
            if isinstance(outcome, AssociateReject):
                self._reject(association, request, outcome)
                return
            association.accepted(*outcome)
            await acceptor.serve(association)
        except Exception as error:
            # One association's trouble stays its own.
            _log.error(
                "association_crashed",
                association_id=association.association_id,
                **error_fields(error),
            )
        finally:
            self.accepted.discard(association)
            association.abort()

    def _reject(
        self, association: Association, request: AssociateRequest, reject: AssociateReject
    ) -> None:
        _log.warning(
            "association_rejected",
            association_id=association.association_id,
            calling_ae_title=request.calling_ae_title,
            called_ae_title=request.called_ae_title,
            peer_address=association.peer_address,
            result=reject.result,
            reject_source=reject.source,
            reason=reject.in_words(),
        )
        association.rejected(reject)
