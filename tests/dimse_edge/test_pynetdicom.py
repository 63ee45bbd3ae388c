"""The edge against an independent implementation, pynetdicom, in both directions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.dsutils import encode

from dicomproxy.demo.peers import Entity
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField, request, response
from dicomproxy.dimse.errors import AssociationRejected
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.negotiation import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    UNCOMPRESSED,
)
from dicomproxy.dimse.operations import echo, exchange, store
from dicomproxy.dimse.pool import AssociationPool, Purpose
from tests.dimse_edge.harness import Service, layer_left_clean, listening, until
from tests.dimse_edge.raw_peer import CT, STUDY_ROOT_FIND, VERIFICATION


@pytest.fixture(scope="module")
def ct_small() -> Dataset:
    """The CT instance that ships with pydicom: 39 kB, Explicit VR Little Endian."""
    path = get_testdata_file("CT_small.dcm", download=False)
    assert path is not None
    return pydicom.dcmread(path)


@pytest.fixture
def acceptor() -> Iterator[AE]:
    """An AE that is shut down at the end; a test adds contexts and starts its server."""
    ae = AE("THIRD")
    yield ae
    ae.shutdown()


def serve(ae: AE, *handlers: Any) -> int:
    """Start *ae* on a free port and return that."""
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=list(handlers))
    assert server is not None
    port: int = server.server_address[1]
    return port


class InMemory:
    """A data set at hand, as a source to send from."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    async def read_into(self, buffers: Any, offset: int) -> int:
        at = offset
        for buffer in buffers:
            buffer[:] = self._data[at : at + len(buffer)]
            at += len(buffer)
        return at - offset


@asynccontextmanager
async def pool_to(layer: UpperLayer, port: int, *contexts: Any) -> AsyncIterator[AssociationPool]:
    pool = AssociationPool(
        layer, Target("127.0.0.1", port, "THIRD", "PROXY"), Proposal(contexts), ceiling=2
    )
    try:
        yield pool
        await until(lambda: pool.in_use == 0)
    finally:
        await pool.close()


@pytest.mark.parametrize("max_pdu", [0, 4097, 16382, 1_000_000])
@pytest.mark.parametrize("syntax", [EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN])
async def test_our_requestor_echoes_and_stores(
    acceptor: AE, ct_small: Dataset, max_pdu: int, syntax: str
) -> None:
    """C-ECHO and C-STORE on one association; the data set arrives byte for byte."""
    stored: list[tuple[bytes, str, str]] = []

    def handle(event: Any) -> int:
        stored.append(
            (
                event.request.DataSet.getvalue(),
                event.context.transfer_syntax,
                str(event.request.AffectedSOPInstanceUID),
            )
        )
        return 0xB007

    acceptor.maximum_pdu_size = max_pdu
    acceptor.add_supported_context(VERIFICATION)
    acceptor.add_supported_context(CT, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    port = serve(acceptor, (evt.EVT_C_STORE, handle))
    data = encode(ct_small, syntax == IMPLICIT_VR_LITTLE_ENDIAN, True)
    assert data is not None
    uid = str(ct_small.SOPInstanceUID)
    async with (
        layer_left_clean() as layer,
        pool_to(layer, port, (VERIFICATION, UNCOMPRESSED), (CT, (syntax,))) as pool,
    ):
        assert await echo(await pool.lease(Purpose.QUERY, timeout_seconds=60), 60.0) == 0
        lease = await pool.lease(Purpose.RETRIEVE, timeout_seconds=60)
        assert lease.reused
        association = lease.association
        assert association.peer_max_length == max_pdu
        for source in (InMemory(data), data):
            command = request(
                CommandField.C_STORE_RQ,
                CT,
                association.next_message_id(),
                data_set=True,
                priority=0,
                affected_sop_instance_uid=uid,
            )
            answer = await store(association, association.context_for(CT), command, source, 60.0)
            assert answer.status == 0xB007
        lease.done()
    assert stored == [(data, syntax, uid)] * 2


async def test_our_requestor_queries_and_cancels(acceptor: AE) -> None:
    """Matches of a C-FIND come in order; stopping early reaches the handler as C-CANCEL."""
    cancelled = threading.Event()

    def handle(event: Any) -> Iterator[tuple[int, Dataset | None]]:
        if event.identifier.StudyInstanceUID == "1.2":
            for number in range(3):
                match = Dataset()
                match.StudyInstanceUID = f"1.2.{number}"
                yield 0xFF00, match
            return
        yield 0xFF00, event.identifier
        # While it has something to send pynetdicom does not read, so it sends no more.
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if event.is_cancelled:  # true but once
                cancelled.set()
                yield 0xFE00, None
                return
            time.sleep(0.002)

    acceptor.add_supported_context(STUDY_ROOT_FIND)
    port = serve(acceptor, (evt.EVT_C_FIND, handle))
    async with (
        layer_left_clean() as layer,
        pool_to(layer, port, (STUDY_ROOT_FIND, UNCOMPRESSED)) as pool,
    ):
        for uid, stop in (("1.2", False), ("1.3", True)):
            lease = await pool.lease(Purpose.QUERY, timeout_seconds=60)
            context = lease.association.context_for(STUDY_ROOT_FIND)
            identifier = Dataset()
            identifier.QueryRetrieveLevel = "STUDY"
            identifier.StudyInstanceUID = uid
            implicit = context.transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
            command = request(
                CommandField.C_FIND_RQ,
                STUDY_ROOT_FIND,
                lease.association.next_message_id(),
                data_set=True,
                priority=0,
            )
            statuses = []
            async with aclosing(
                exchange(
                    lease,
                    context,
                    command,
                    encode(identifier, implicit, True),
                    timeout_seconds=lambda: 60.0,
                )
            ) as found:
                async for one in found:
                    statuses.append(one.status)
                    if stop:
                        break
            assert statuses == ([0xFF00] if stop else [0xFF00] * 3 + [0x0000])
        await until(lambda: pool.idle == 1)
    assert cancelled.is_set()


async def test_rejection_is_understood(acceptor: AE) -> None:
    """An AE that insists on its own title rejects another permanently."""
    acceptor.require_called_aet = True
    acceptor.ae_title = "OTHER"
    acceptor.add_supported_context(VERIFICATION)
    port = serve(acceptor)
    async with (
        layer_left_clean() as layer,
        pool_to(layer, port, (VERIFICATION, UNCOMPRESSED)) as pool,
    ):
        with pytest.raises(AssociationRejected) as caught:
            await pool.lease(Purpose.QUERY, timeout_seconds=60)
    assert caught.value.rejection.in_words() == "permanent: called AE title not recognized"


@pytest.mark.parametrize("max_length", [0, 4097, 262144])
async def test_our_listener_serves_its_requestor(ct_small: Dataset, max_length: int) -> None:
    """Its C-ECHO is answered; its C-STORE arrives byte for byte, and its release is answered."""
    stored: list[tuple[bytes, str]] = []

    async def handle(association: Association, message: Message) -> None:
        if message.command.field == CommandField.C_STORE_RQ:
            stored.append((message.data, message.context.transfer_syntax))
        await association.send(message.context, response(message.command, 0x0000))

    def requestor(port: int) -> list[int]:
        ae = Entity("THIRD")
        ae.add_requested_context(VERIFICATION)
        ae.add_requested_context(CT, ExplicitVRLittleEndian)
        association = ae.associate("127.0.0.1", port, ae_title="PROXY")
        assert association.is_established
        statuses = [association.send_c_echo().Status]
        statuses += [association.send_c_store(ct_small).Status for _ in range(3)]
        association.release()
        assert association.is_released
        return statuses

    service = Service(handle, max_length=max_length)
    async with layer_left_clean() as layer, listening(layer, service) as (_, port):
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(requestor, port) == [0, 0, 0, 0]
    expected = encode(ct_small, False, True)
    assert stored == [(expected, EXPLICIT_VR_LITTLE_ENDIAN)] * 3


async def test_our_listener_notices_its_abort() -> None:
    """A-ABORT by pynetdicom ends the association here."""

    def requestor(port: int) -> None:
        ae = Entity("THIRD")
        ae.add_requested_context(VERIFICATION)
        association = ae.associate("127.0.0.1", port)
        assert association.is_established
        association.abort()

    service = Service()
    async with layer_left_clean() as layer, listening(layer, service) as (_, port):
        async with asyncio.timeout(60):
            await asyncio.to_thread(requestor, port)
        assert "aborted (source 0" in str(await service.end())
