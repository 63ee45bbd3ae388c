"""A workstation made of pynetdicom: it asks, names itself as destination, and receives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from pydicom import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, build_context, build_role, evt
from pynetdicom.dsutils import decode

from tests.peers.dcmtk import Response
from tests.peers.entity import (
    FIND,
    GET,
    MOST_CONTEXTS,
    MOVE,
    STORAGE,
    UNCOMPRESSED,
    VERIFICATION,
    Entity,
    Root,
    new_entity,
    titles,
)
from tests.peers.process import PeerFailed


@dataclass(frozen=True, slots=True)
class Received:
    """One instance as it arrived by C-STORE; the data set may hold patient values."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae_title: str
    called_ae_title: str
    message_id: int
    originator_ae_title: str
    originator_message_id: int | None
    data_set: bytes = field(repr=False)

    def dataset(self) -> Dataset:
        """Decode it."""
        syntax = UID(self.transfer_syntax_uid)
        deflated = syntax == DeflatedExplicitVRLittleEndian
        implicit, little = syntax.is_implicit_VR, syntax.is_little_endian
        return decode(BytesIO(self.data_set), implicit, little, deflated)


@dataclass(frozen=True, slots=True)
class Result:
    """What an operation came to: its responses in order, and the rows of a query."""

    responses: tuple[Response, ...]
    rows: tuple[Dataset, ...] = field(repr=False, default=())
    failed_sop_instance_uids: tuple[str, ...] = ()

    @property
    def final(self) -> Response:
        if not self.responses:
            raise PeerFailed("no response came")
        return self.responses[-1]

    @property
    def pending(self) -> tuple[Response, ...]:
        return tuple(one for one in self.responses if one.pending)


class Workstation(Entity):
    """A workstation: it queries and retrieves, and takes instances by C-STORE.

    Args:
        ae_title: what it calls with, and names as move destination.
        server: whom it asks.
        accept: SOP Classes it takes; default every standard one.
        transfer_syntaxes: transfer syntaxes it takes of each; default all.
    """

    def __init__(
        self,
        ae_title: str,
        server: tuple[str, str, int] | None = None,
        *,
        accept: Iterable[str] = STORAGE,
        transfer_syntaxes: Iterable[str] = ALL_TRANSFER_SYNTAXES,
    ) -> None:
        super().__init__(ae_title)
        self.server = server
        self.received: list[Received] = []
        self.answer: Callable[[str], int] = lambda _sop_instance_uid: 0x0000
        """The status of each C-STORE, by SOP Instance UID; ``fail`` goes before it."""
        self._accept = list(accept)
        self._syntaxes = list(transfer_syntaxes)

    def uids(self) -> list[str]:
        """Return the SOP Instance UIDs received so far, in order."""
        with self.lock:
            return [one.sop_instance_uid for one in self.received]

    async def echo(self) -> int:
        """Verify; the status.

        Raises:
            PeerFailed: no association, or no answer.
        """

        def work() -> int:
            association = self._associate([build_context(VERIFICATION)])
            try:
                return _status(association.send_c_echo())
            finally:
                _end(association)

        return await asyncio.to_thread(work)

    async def find(
        self, identifier: Dataset, *, root: Root = "S", cancel_after: int | None = None
    ) -> Result:
        """Query; send C-CANCEL after *cancel_after* rows.

        Raises:
            PeerFailed: no association.
        """

        def work() -> Result:
            association = self._associate([build_context(FIND[root], UNCOMPRESSED)])
            responses, rows = [], []
            try:
                for answer, row in association.send_c_find(identifier, FIND[root], msg_id=7):
                    responses.append(Response(_status(answer)))
                    if row is not None:
                        rows.append(row)
                    if len(rows) == cancel_after and responses[-1].pending:
                        association.send_c_cancel(7, None, FIND[root])
            finally:
                _end(association)
            return Result(tuple(responses), tuple(rows))

        return await asyncio.to_thread(work)

    async def move(
        self,
        identifier: Dataset,
        destination: str = "",
        *,
        root: Root = "S",
        message_id: int = 1,
        cancel_after: int | None = None,
        on_response: Callable[[Response], None] = lambda _response: None,
    ) -> Result:
        """Have instances sent to *destination* (default: here).

        Args:
            cancel_after: send C-CANCEL after so many Pending responses.
            on_response: told of each response, on another thread.

        Raises:
            PeerFailed: no association.
        """

        def work() -> Result:
            association = self._associate([build_context(MOVE[root], UNCOMPRESSED)])
            try:
                answers = association.send_c_move(
                    identifier, destination or self.ae_title, MOVE[root], msg_id=message_id
                )
                return _collect(answers, association, message_id, cancel_after, on_response)
            finally:
                _end(association)

        return await asyncio.to_thread(work)

    async def get(
        self, identifier: Dataset, sop_classes: Iterable[str], root: Root = "S"
    ) -> Result:
        """Retrieve over the same association; instances are in ``received``.

        Raises:
            PeerFailed: no association.
        """
        classes = list(sop_classes)[: MOST_CONTEXTS - 1]

        def work() -> Result:
            contexts = [build_context(GET[root], UNCOMPRESSED)]
            contexts += [build_context(one, self._syntaxes) for one in classes]
            association = self._associate(
                contexts, [build_role(one, False, True) for one in classes]
            )
            try:
                answers = association.send_c_get(identifier, GET[root], msg_id=1)
                return _collect(answers, association, 1, None, lambda _response: None)
            finally:
                _end(association)

        return await asyncio.to_thread(work)

    async def store(self, instances: Iterable[Dataset]) -> list[int]:
        """Send *instances* on one association; the status of each.

        Raises:
            PeerFailed: no association, or a context was not accepted.
        """
        held = list(instances)

        def work() -> list[int]:
            pairs = sorted({(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in held})
            association = self._associate([build_context(*pair) for pair in pairs])
            try:
                return [_status(association.send_c_store(one)) for one in held]
            except ValueError as error:
                raise PeerFailed("a presentation context was not accepted") from error
            finally:
                _end(association)

        return await asyncio.to_thread(work)

    def _associate(self, contexts: list[Any], roles: Sequence[Any] = ()) -> Any:
        if self.server is None:
            raise PeerFailed(f"{self.ae_title} knows nobody to ask")
        called, host, port = self.server
        association = new_entity(self.ae_title).associate(
            host,
            port,
            contexts,
            called,
            ext_neg=list(roles),
            evt_handlers=[(evt.EVT_C_STORE, self._store)],
        )
        if not association.is_established:
            raise PeerFailed("rejected" if association.is_rejected else "no association")
        return association

    def make_entity(self) -> AE:
        entity = new_entity(self.ae_title)
        entity.add_supported_context(VERIFICATION, UNCOMPRESSED)
        for sop_class in self._accept:
            entity.add_supported_context(sop_class, self._syntaxes)
        return entity

    def handlers(self) -> list[tuple[Any, Callable[[Any], Any]]]:
        return [(evt.EVT_C_STORE, self._store)]

    def _store(self, event: Any) -> int:
        self.wait_at_gate()
        if self.delay_seconds:
            time.sleep(self.delay_seconds)
        request = event.request
        calling, called = titles(event)
        received = Received(
            str(request.AffectedSOPClassUID),
            str(request.AffectedSOPInstanceUID),
            str(event.context.transfer_syntax),
            calling,
            called,
            request.MessageID,
            str(request.MoveOriginatorApplicationEntityTitle or "").strip(),
            request.MoveOriginatorMessageID,
            request.DataSet.getvalue(),
        )
        if "store" in self.fail:
            return self.fail["store"]
        status = self.answer(received.sop_instance_uid)
        if status == 0x0000 or status & 0xF000 == 0xB000:
            with self.lock:
                self.received.append(received)
        return status


def _status(answer: Dataset) -> int:
    """Return the status of *answer*; pynetdicom gives an empty one where none came.

    Raises:
        PeerFailed: no response came.
    """
    if "Status" not in answer:
        raise PeerFailed("no response came")
    return int(answer.Status)


def _collect(
    answers: Iterable[tuple[Dataset, Dataset | None]],
    association: Any,
    message_id: int,
    cancel_after: int | None,
    on_response: Callable[[Response], None],
) -> Result:
    responses: list[Response] = []
    failed: tuple[str, ...] = ()
    for answer, identifier in answers:
        response = Response(
            _status(answer),
            answer.get("NumberOfRemainingSuboperations"),
            answer.get("NumberOfCompletedSuboperations"),
            answer.get("NumberOfFailedSuboperations"),
            answer.get("NumberOfWarningSuboperations"),
        )
        responses.append(response)
        on_response(response)
        if identifier is not None:
            listed = identifier.get("FailedSOPInstanceUIDList") or ()
            failed = (listed,) if isinstance(listed, str) else tuple(map(str, listed))
        if response.pending and len(responses) == cancel_after:
            context = next(
                one.context_id
                for one in association.accepted_contexts
                if one.abstract_syntax in (*MOVE.values(), *GET.values())
            )
            association.send_c_cancel(message_id, context)
    return Result(tuple(responses), failed_sop_instance_uids=failed)


def _end(association: Any) -> None:
    if association.is_established:
        association.release()
