"""Requesting an association: every way in which a peer may fail to give one, and no trace left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

import pytest

from dicomproxy.dimse.association import Association
from dicomproxy.dimse.errors import (
    AssociationAborted,
    AssociationError,
    AssociationLost,
    AssociationRejected,
    AssociationReleased,
    AssociationTimeout,
    ConnectFailed,
    NoContext,
)
from dicomproxy.dimse.layer import Proposal, Target, Timers
from dicomproxy.dimse.negotiation import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    UNCOMPRESSED,
)
from dicomproxy.dimse.pdu import (
    REJECT_CALLED,
    REJECT_LIMIT,
    Abort,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    ContextAnswer,
    RoleSelection,
    UserInformation,
)
from tests.dimse_edge.harness import (
    PROPOSAL,
    SHORT,
    Service,
    cancel_when,
    layer_left_clean,
    listening,
    patient,
    target,
    until,
)
from tests.dimse_edge.raw_peer import (
    CT,
    DEADLINE_SECONDS,
    VERIFICATION,
    RawPeer,
    Script,
    raw_acceptor,
)
from tests.support.log_watch import LogWatch


def says(*items: object, then_end: bool = True) -> Script:
    """Return a script that answers A-ASSOCIATE-RQ by *items*."""

    async def play(peer: RawPeer) -> None:
        await peer.expect(AssociateRequest)
        await peer.send(*items)  # type: ignore[arg-type]
        if then_end:
            await peer.expect_end()

    return play


async def vanishes(peer: RawPeer) -> None:
    await peer.expect(AssociateRequest)


async def resets(peer: RawPeer) -> None:
    await peer.expect(AssociateRequest)
    peer.reset()


async def breaks_off_inside_its_answer(peer: RawPeer) -> None:
    await peer.expect(AssociateRequest)
    await peer.send(bytes.fromhex("02 00 00 00 01 00 00 01"))


def spits(data: bytes, *, reason: int) -> Script:
    """Return a script that answers by garbage, and expects A-ABORT with *reason* for it."""

    async def play(peer: RawPeer) -> None:
        await peer.expect(AssociateRequest)
        await peer.send(data)
        assert await peer.expect_abort() == Abort(2, reason)

    return play


def rejection(pdu: AssociateReject) -> Callable[[AssociationError], bool]:
    return lambda error: isinstance(error, AssociationRejected) and error.rejection == pdu


def abortion(source: int, reason: int) -> Callable[[AssociationError], bool]:
    return lambda error: (
        isinstance(error, AssociationAborted) and (error.source, error.reason) == (source, reason)
    )


def kind(of: type[AssociationError]) -> Callable[[AssociationError], bool]:
    return lambda error: type(error) is of


@pytest.mark.parametrize(
    ("script", "is_expected"),
    [
        pytest.param(says(REJECT_CALLED), rejection(REJECT_CALLED), id="reject permanent"),
        pytest.param(says(REJECT_LIMIT), rejection(REJECT_LIMIT), id="reject transient"),
        pytest.param(
            says(AssociateReject(9, 9, 9)), rejection(AssociateReject(9, 9, 9)), id="reject odd"
        ),
        pytest.param(says(Abort(2, 1)), abortion(2, 1), id="abort"),
        pytest.param(vanishes, kind(AssociationLost), id="close"),
        pytest.param(resets, kind(AssociationLost), id="reset"),
        pytest.param(
            breaks_off_inside_its_answer, kind(AssociationLost), id="close inside the answer"
        ),
        pytest.param(spits(b"HTTP/1.1 400 Bad", reason=1), abortion(2, 1), id="garbage"),
        pytest.param(
            spits(bytes.fromhex("02 00 00 00 00 08 00 01 00 00 00 00 00 00"), reason=6),
            abortion(2, 6),
            id="answer too short",
        ),
        pytest.param(
            spits(bytes.fromhex("02 00 7F FF FF FF"), reason=6),
            abortion(2, 6),
            id="answer too long",
        ),
        pytest.param(
            spits(bytes.fromhex("06 00 00 00 00 04 00 00 00 00"), reason=2),
            abortion(2, 2),
            id="release response",
        ),
        pytest.param(
            spits(bytes.fromhex("04 00 00 00 00 06 00 00 00 02 01 03"), reason=2),
            abortion(2, 2),
            id="data",
        ),
    ],
)
async def test_answer_that_gives_no_association_is_told_apart(
    script: Script, is_expected: Callable[[AssociationError], bool]
) -> None:
    """Rejection, abort, loss and garbage are different facts, and none leaves anything open."""
    async with layer_left_clean() as layer, raw_acceptor(script) as port:
        with pytest.raises(AssociationError) as caught:
            await layer.request(target(port), PROPOSAL)
    assert is_expected(caught.value), repr(caught.value)


async def test_silent_acceptor_costs_its_deadline() -> None:
    """A peer that takes the connection and says nothing is dropped, with an A-ABORT if it fits."""

    async def silent(peer: RawPeer) -> None:
        await peer.expect(AssociateRequest)
        async with asyncio.timeout(60):
            await peer.reader.read()

    async with (
        layer_left_clean(patient(association=SHORT)) as layer,
        raw_acceptor(silent) as port,
    ):
        with pytest.raises(AssociationTimeout) as caught:
            await layer.request(target(port), PROPOSAL)
    assert caught.value.phase == "association"


async def test_request_cancelled_during_negotiation_aborts() -> None:
    """Who no longer wants the association leaves the peer no half-open one."""
    asked = asyncio.Event()

    async def slow(peer: RawPeer) -> None:
        await peer.expect(AssociateRequest)
        asked.set()
        assert await peer.expect_abort() == Abort(0, 0)

    async with layer_left_clean() as layer, raw_acceptor(slow) as port:
        await cancel_when(asked, layer.request(target(port), PROPOSAL))


async def test_refused_connection_is_told_by_its_kind() -> None:
    """No listener: ConnectFailed, which names neither host nor port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        async with layer_left_clean() as layer:
            with pytest.raises(ConnectFailed) as caught:
                await layer.request(target(port), PROPOSAL)
    assert str(caught.value) == "ConnectionRefusedError"


async def test_host_name_that_cannot_be_one_fails_to_connect() -> None:
    """A label of 64 characters is no host name; that is ConnectFailed too."""
    async with layer_left_clean() as layer:
        with pytest.raises(ConnectFailed):
            await layer.request(Target("x" * 64 + ".invalid", 104, "A", "B"), PROPOSAL)


@pytest.fixture
def full_port() -> object:
    """Yield a port whose backlog is full, so that connecting to it hangs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            waiting.append(sock := socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for sock in waiting:
            sock.close()


async def test_connection_that_is_not_answered_costs_its_deadline(full_port: int) -> None:
    """A host that drops SYN packets is given up after connect_seconds."""
    async with layer_left_clean() as layer:
        with pytest.raises(ConnectFailed, match="took too long"):
            await layer.request(Target("127.0.0.1", full_port, "A", "B", SHORT), PROPOSAL)


async def test_request_cancelled_while_connecting_leaves_nothing(full_port: int) -> None:
    """Cancelling the connect takes the association out of the books."""
    async with layer_left_clean() as layer:
        await cancel_when(
            lambda: len(layer.associations) == 1,
            layer.request(Target("127.0.0.1", full_port, "A", "B", 60.0), PROPOSAL),
        )
        assert layer.associations == set()


async def test_contexts_are_what_was_proposed_and_accepted() -> None:
    """Answers to what was not proposed, or not accepted, carry nothing; roles are agreed."""

    async def odd(peer: RawPeer) -> None:
        request = await peer.expect(AssociateRequest)
        assert request.user.max_length == 256 * 1024
        assert [context.context_id for context in request.contexts] == [1, 3, 5, 7]
        await peer.send(
            AssociateAccept(
                "X",
                "Y",
                (
                    ContextAnswer(1, 0, IMPLICIT_VR_LITTLE_ENDIAN),
                    ContextAnswer(3, 3, IMPLICIT_VR_LITTLE_ENDIAN),
                    ContextAnswer(5, 0, "1.2.3.4"),
                    ContextAnswer(7, 0, EXPLICIT_VR_LITTLE_ENDIAN),
                    ContextAnswer(9, 0, IMPLICIT_VR_LITTLE_ENDIAN),
                ),
                UserInformation(roles=(RoleSelection(CT, False, True),)),
            )
        )
        await peer.released()

    proposal = Proposal(
        (
            (VERIFICATION, UNCOMPRESSED),
            ("1.2.3", UNCOMPRESSED),
            ("1.2.4", UNCOMPRESSED),
            (CT, UNCOMPRESSED),
        ),
        (RoleSelection(CT, True, True),),
    )
    async with layer_left_clean() as layer, raw_acceptor(odd) as port:
        association = await layer.request(target(port), proposal)
        assert sorted(association.contexts) == [1, 7]
        assert association.context_for(VERIFICATION).transfer_syntax == IMPLICIT_VR_LITTLE_ENDIAN
        assert association.contexts[7].as_scp
        with pytest.raises(NoContext):
            association.context_for(CT)  # the peer took the role of SCU from us
        with pytest.raises(NoContext):
            association.context_for(VERIFICATION, EXPLICIT_VR_LITTLE_ENDIAN)
        await association.release(60.0)
        assert isinstance(association.ended, AssociationReleased)


async def test_each_association_is_logged_once_when_it_is_over(log_watch: LogWatch) -> None:
    """One line a side, with who, how it ended, and how much travelled."""
    async with layer_left_clean() as layer, listening(layer, Service()) as (_, port):
        association = await layer.request(target(port), PROPOSAL)
        assert len(layer.associations) == 2
        assert log_watch.named("association") == []
        await association.release(60.0)
        await until(lambda: not layer.associations)
        lines = log_watch.named("association")
    by_role = {line["role"]: line for line in lines}
    assert len(lines) == len(by_role) == 2
    for line in lines:
        assert line["outcome"] == "released"
        assert (line["calling_ae_title"], line["called_ae_title"]) == ("PROXY", "RAW")
        assert line["contexts"] == 3
        assert line["peer_address"] == "127.0.0.1"
    assert by_role["requestor"]["sent_bytes"] == 0  # counts data, not the frame around it


async def test_close_aborts_what_is_open() -> None:
    """At shutdown both sides of every association are ended, each peer told."""
    told = asyncio.Event()

    async def established(peer: RawPeer) -> None:
        await peer.accept()
        assert await peer.expect_abort() == Abort(0, 0)
        told.set()

    async with layer_left_clean() as layer, raw_acceptor(established) as port:
        association = await layer.request(target(port), PROPOSAL)
        await layer.close(60.0)
        assert layer.associations == set()
        assert isinstance(association.ended, AssociationAborted)
        async with asyncio.timeout(60):
            await told.wait()


async def test_close_does_not_wait_for_a_peer_that_never_closes() -> None:
    """The peer ignores A-ABORT and keeps its end open: the connection is dropped in time."""
    over = asyncio.Event()

    async def stubborn(peer: RawPeer) -> None:
        await peer.accept()
        await peer.expect(Abort)
        async with asyncio.timeout(60):
            await over.wait()

    async with layer_left_clean() as layer, raw_acceptor(stubborn) as port:
        await layer.request(target(port), PROPOSAL)
        await layer.close(SHORT)
        await until(lambda: not layer.associations)
        over.set()


async def test_close_while_connecting_ends_the_request(full_port: int) -> None:
    """An association that is just being asked for does not outlive the layer."""
    async with layer_left_clean() as layer:
        request = asyncio.create_task(
            layer.request(Target("127.0.0.1", full_port, "A", "B", SHORT), PROPOSAL)
        )
        await until(lambda: len(layer.associations) == 1)
        await layer.close(SHORT / 2)
        with pytest.raises(AssociationError):
            await request


async def test_connection_made_after_close_is_dropped_at_once() -> None:
    """The connection succeeds, but nobody wants it any more: no request is sent on it."""
    async with layer_left_clean() as layer:

        async def hears_nothing(peer: RawPeer) -> None:
            await peer.expect_end()

        async with raw_acceptor(hears_nothing) as port:
            request = asyncio.create_task(layer.request(target(port), PROPOSAL))
            await until(lambda: len(layer.associations) == 1)
            for association in layer.associations:
                association.abort()
            with pytest.raises(AssociationAborted):
                await request


async def test_peer_that_releases_at_once_is_released() -> None:
    """A-RELEASE-RQ right behind A-ASSOCIATE-AC is answered; the association is over."""

    async def hasty(peer: RawPeer) -> None:
        await peer.accept()
        await peer.release()

    async with layer_left_clean() as layer, raw_acceptor(hasty) as port:
        association = await layer.request(target(port), PROPOSAL)
        with pytest.raises(AssociationReleased):
            await association.receive(60.0)
        assert not association.established


async def test_default_timers_are_those_of_the_standard_and_of_clinical_life() -> None:
    """ARTIM is 30 s (PS3.8 9.1.5); a response may take a minute."""
    assert (Timers().artim, Timers().response) == (30.0, 60.0)


def sockets() -> int:
    """Count the sockets that this process has open."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own, closed since
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's list of descriptors")
@pytest.mark.parametrize("late", [False, True])
async def test_cancelled_in_the_moment_of_connecting_leaves_no_socket(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Whether the loop says that such a connection is lost or not: the peer sees it end."""
    service = Service()
    requesting: list[asyncio.Task[Association]] = []
    connected = Association.connected

    def cancel_at_once(association: Association) -> None:
        connected(association)
        if association.is_requestor:
            if late:
                asyncio.get_running_loop().call_soon(requesting[-1].cancel)
            else:
                requesting[-1].cancel()

    monkeypatch.setattr(Association, "connected", cancel_at_once)
    async with layer_left_clean() as layer, listening(layer, service) as (_, port):
        before = sockets()
        async with asyncio.timeout(DEADLINE_SECONDS):
            for _ in range(5):
                requesting.append(asyncio.create_task(layer.request(target(port), PROPOSAL)))
                with pytest.raises(asyncio.CancelledError):
                    await requesting[-1]
        await until(lambda: not layer.associations and sockets() == before)
