"""An admitted association at work: which contexts it gets, and what becomes of its messages.

Queries and retrieves run as tasks of the association, so that a C-CANCEL is
read while they run; verification and storage are answered in place.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, Protocol

from dicomproxy.dataset.transfer_syntaxes import chooser
from dicomproxy.dimse.association import Association, BytesSink, Message, Sink
from dicomproxy.dimse.command import Command, CommandField, response
from dicomproxy.dimse.errors import AssociationError, AssociationTimeout
from dicomproxy.dimse.negotiation import (
    Context,
    Supported,
    acceptance,
    negotiate,
    requestors_order,
)
from dicomproxy.dimse.operations import VERIFICATION
from dicomproxy.dimse.pdu import (
    REJECT_CONGESTION,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
)
from dicomproxy.logs import get_logger
from dicomproxy.ports import Caller
from dicomproxy.query.coordinator import QueryCoordinator
from dicomproxy.retrieval.coordinator import RetrieveCoordinator
from dicomproxy.services.access import AccessControl, Peer
from dicomproxy.services.find import serve_find
from dicomproxy.services.move import DestinationFor, serve_move
from dicomproxy.services.operations import Operation, Operations
from dicomproxy.services.sop_classes import FIND, MOVE, QUERY_SYNTAXES, is_storage
from dicomproxy.services.store import StorageService
from dicomproxy.tasks import TaskOwner

_MOST_OPERATIONS: Final = 8  # on one association; the window we answer with allows one
_UNRECOGNIZED_OPERATION: Final = 0x0211
_DUPLICATE_INVOCATION: Final = 0x0210
_RESOURCE_LIMITATION: Final = 0x0213
_NOT_AUTHORIZED: Final = 0x0124

_log = get_logger()


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What the services need of the configuration; durations in seconds."""

    idle_seconds: float = 600.0
    pending_seconds: float = 5.0
    max_length: int = 256 * 1024
    local_calling_ae_title: str = ""
    """As whom the local PACS is called; empty for the workstation's own title."""


class DestinationDirectory(Protocol):
    """Knows the workstations by title."""

    def destination_for(self, caller: Caller) -> DestinationFor: ...


class ServiceAcceptor:
    """Implements :class:`dicomproxy.dimse.listener.Acceptor`."""

    def __init__(
        self,
        settings: ServiceSettings,
        access: AccessControl,
        queries: QueryCoordinator,
        retrieves: RetrieveCoordinator,
        storage: StorageService,
        directory: DestinationDirectory,
        operations: Operations,
    ) -> None:
        self._settings = settings
        self._access = access
        self._queries = queries
        self._retrieves = retrieves
        self._storage = storage
        self._directory = directory
        self._operations = operations
        self._peers: dict[Association, Peer] = {}
        self._admitting = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        """Admit the peer and answer its contexts."""
        # In use from here on: who is being admitted will be served.
        self._admitting += 1
        self._idle.clear()
        try:
            return await self._negotiate(association, request)
        finally:
            self._admitting -= 1
            self._may_be_idle()

    async def _negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        peer = await self._access.admit(
            request.calling_ae_title, request.called_ae_title, association.peer_address
        )
        if isinstance(peer, AssociateReject):
            return peer
        if self._draining and not self._storage.expects(peer):
            return REJECT_CONGESTION
        negotiated = negotiate(request, lambda uid: self._supported(peer, uid))
        self._peers[association] = peer
        association.sink_for = self._sink_for
        accept = acceptance(request, negotiated, max_length=self._settings.max_length)
        return accept, negotiated.contexts

    def _supported(self, peer: Peer, abstract_syntax: str) -> Supported | None:
        if abstract_syntax == VERIFICATION:
            return Supported(requestors_order(QUERY_SYNTAXES))
        if abstract_syntax in FIND or abstract_syntax in MOVE:
            if peer.caller is None or (abstract_syntax in MOVE and not peer.may_retrieve):
                return None
            return Supported(requestors_order(QUERY_SYNTAXES))
        if peer.sends_for and is_storage(abstract_syntax):
            return Supported(chooser(self._storage.accept_order(peer.sends_for)))
        return None

    def _sink_for(self, association: Association, context: Context, command: Command) -> Sink:
        if command.field == CommandField.C_STORE_RQ:
            return self._storage.sink(association, self._peers[association], context, command)
        return BytesSink(association.limits.max_identifier_bytes)

    # ----------------------------------------------------------------- serving

    async def serve(self, association: Association) -> None:
        """Handle messages until the association is over."""
        peer = self._peers[association]
        running: dict[int, Operation] = {}
        try:
            async with TaskOwner(f"operations-{association.association_id}") as tasks:
                while True:
                    try:
                        message = await association.receive(self._settings.idle_seconds)
                    except AssociationTimeout:
                        if running:
                            continue  # it waits for us
                        _log.info(
                            "association_idle",
                            association_id=association.association_id,
                            calling_ae_title=peer.ae_title,
                            peer_address=peer.address,
                        )
                        association.abort()
                        return
                    await self._handle(association, peer, message, running, tasks)
        except AssociationError:
            return
        finally:
            self._peers.pop(association, None)
            self._may_be_idle()

    def drain(self) -> None:
        """Admit nobody any more but those who bring what a retrieve under way waits for."""
        self._draining = True

    def _may_be_idle(self) -> None:
        if not self._peers and not self._admitting:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no association is being admitted or served here."""
        await self._idle.wait()

    async def _handle(
        self,
        association: Association,
        peer: Peer,
        message: Message,
        running: dict[int, Operation],
        tasks: TaskOwner,
    ) -> None:
        command = message.command
        field, sop_class = command.field, message.context.abstract_syntax
        if field == CommandField.C_CANCEL_RQ:
            # It may have crossed the final response: then there is nothing to cancel.
            if (operation := running.get(command.responds_to)) is not None:
                operation.stop()
            return
        if command.is_response:
            return  # to nothing we asked here
        if field == CommandField.C_STORE_RQ:
            status = await self._storage.finish(association, peer, message)
        elif field == CommandField.C_ECHO_RQ and sop_class == VERIFICATION:
            status = 0x0000
        elif (field == CommandField.C_FIND_RQ and sop_class in FIND) or (
            field == CommandField.C_MOVE_RQ and sop_class in MOVE
        ):
            refusal = self._refusal(command, running)
            if refusal is None and peer.caller is not None:
                self._start(association, peer.caller, message, running, tasks)
                return
            status = _NOT_AUTHORIZED if refusal is None else refusal
        else:
            status = _UNRECOGNIZED_OPERATION
            _log.warning(
                "operation_refused",
                association_id=association.association_id,
                calling_ae_title=peer.ae_title,
                command=f"{field:04X}",
                abstract_syntax_uid=sop_class,
                status=status,
            )
        await association.send(message.context, response(command, status))

    def _refusal(self, command: Command, running: dict[int, Operation]) -> int | None:
        if command.message_id in running:
            return _DUPLICATE_INVOCATION
        return _RESOURCE_LIMITATION if len(running) >= _MOST_OPERATIONS else None

    def _start(
        self,
        association: Association,
        caller: Caller,
        message: Message,
        running: dict[int, Operation],
        tasks: TaskOwner,
    ) -> None:
        finding = message.command.field == CommandField.C_FIND_RQ
        operation = self._operations.begin(
            "query" if finding else "retrieve",
            association_id=association.association_id,
            caller_ae_title=caller.ae_title,
            peer_address=caller.peer_address,
        )
        running[message.command.message_id] = operation
        task = tasks.spawn(
            self._run(association, caller, message, operation, running),
            name=operation.operation_id,
        )
        # Where an abort came right behind the request, the task is cancelled before
        # it has begun, and nothing in it runs, not even what says that it is over.
        task.add_done_callback(lambda _: self._operations.end(operation, None))

    async def _run(
        self,
        association: Association,
        caller: Caller,
        message: Message,
        operation: Operation,
        running: dict[int, Operation],
    ) -> None:
        sop_class = message.context.abstract_syntax
        local_title = self._settings.local_calling_ae_title or caller.ae_title
        status: int | None = None
        facts: dict[str, object] = {}
        try:
            if sop_class in FIND:
                root = FIND[sop_class]
                operation.root = str(root)
                status, facts = await serve_find(
                    association,
                    message,
                    root=root,
                    caller=caller,
                    local_calling_ae_title=local_title,
                    coordinator=self._queries,
                    operation=operation,
                )
            else:
                root = MOVE[sop_class]
                operation.root = str(root)
                status, facts = await serve_move(
                    association,
                    message,
                    root=root,
                    caller=caller,
                    local_calling_ae_title=local_title,
                    coordinator=self._retrieves,
                    destination_for=self._directory.destination_for(caller),
                    operation=operation,
                    pending_seconds=self._settings.pending_seconds,
                )
        except Exception:
            # Unforeseen, so nothing is known of what was sent: the association cannot go on.
            association.abort()
            raise
        finally:
            running.pop(message.command.message_id, None)
            self._operations.end(operation, status, **facts)
