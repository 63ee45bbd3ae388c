"""Which presentation contexts a peer gets: by its role, and by what its source is to send."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest

from dicomproxy.dimse.errors import AssociationRejected
from dicomproxy.dimse.negotiation import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
)
from dicomproxy.dimse.operations import VERIFICATION
from dicomproxy.dimse.pdu import (
    REJECT_CALLED,
    REJECT_CALLING,
    REJECT_CONGESTION,
    AssociateReject,
    RoleSelection,
)
from dicomproxy.services.acceptor import ServiceAcceptor
from dicomproxy.services.access import Peer
from dicomproxy.services.sop_classes import is_storage
from tests.services.support import (
    CT,
    EVERYTHING,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    MODALITY_WORKLIST,
    PATIENT_FIND,
    PATIENT_MOVE,
    PRIVATE,
    RLE,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    serving,
)
from tests.support.log_watch import LogWatch
from tests.support.stand_in import SECONDS

FINDS = {PATIENT_FIND, STUDY_FIND}
MOVES = {PATIENT_MOVE, STUDY_MOVE}


@pytest.mark.parametrize(
    ("calling", "expected"),
    [
        ("READING1", {VERIFICATION} | FINDS | MOVES),
        ("MODALITY", {VERIFICATION}),
        ("NORTHPACS", {VERIFICATION, CT} | FINDS),
        ("LOCALPACS", {VERIFICATION, CT}),
        ("BOTH", {VERIFICATION, CT} | FINDS | MOVES),
    ],
)
async def test_contexts_follow_the_role(calling: str, expected: set[str]) -> None:
    """Workstations query and retrieve, sources send, callers verify; nobody gets more."""
    proposed = (*EVERYTHING, STUDY_GET, MODALITY_WORKLIST)
    async with serving() as at, at.peer(calling, contexts=proposed) as peer:
        assert set(peer.accepted) == expected


async def test_alias_is_answered_as_our_own_title() -> None:
    """A workstation may go on calling the local PACS's title."""
    async with serving() as at, at.peer(called="LOCALPACS") as peer:
        assert STUDY_FIND in peer.accepted
        assert peer.association.accept is not None
        assert peer.association.accept.called_ae_title == "LOCALPACS"


@pytest.mark.parametrize(
    ("calling", "called", "rejection"),
    [
        ("NOBODY", "DICOMPROXY", REJECT_CALLING),
        ("READING1", "OTHER", REJECT_CALLED),
        ("ELSEWHERE", "DICOMPROXY", REJECT_CALLING),
    ],
)
async def test_stranger_is_rejected_and_logged(
    log_watch: LogWatch, calling: str, called: str, rejection: object
) -> None:
    """With result, source and reason, on the wire as in the log."""
    async with serving() as at:
        with pytest.raises(AssociationRejected) as caught:
            async with at.peer(calling, called):
                pass
    assert caught.value.rejection == rejection
    (line,) = log_watch.named("association_rejected")
    assert (line["calling_ae_title"], line["called_ae_title"]) == (calling, called)
    assert line["peer_address"] == "127.0.0.1"
    assert line["reason"] == caught.value.rejection.in_words()


@pytest.mark.parametrize(
    ("proposed", "chosen"),
    [
        ((EXPLICIT, IMPLICIT), EXPLICIT),
        ((IMPLICIT, EXPLICIT), IMPLICIT),
        ((EXPLICIT_VR_BIG_ENDIAN, IMPLICIT), EXPLICIT_VR_BIG_ENDIAN),
        ((DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,), DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN),
        ((RLE, IMPLICIT), IMPLICIT),
        ((RLE,), None),
    ],
)
async def test_queries_are_taken_in_the_workstations_order(
    proposed: tuple[str, ...], chosen: str | None
) -> None:
    """Its first syntax that an identifier can be written in."""
    async with serving() as at, at.peer(contexts=[(STUDY_FIND, proposed)]) as peer:
        assert peer.accepted.get(STUDY_FIND) == chosen


@pytest.mark.parametrize(
    ("accept", "proposed", "chosen"),
    [
        (None, (EXPLICIT, RLE), RLE),
        (None, (JPEG, IMPLICIT), IMPLICIT),
        (None, (JPEG,), JPEG),
        (None, ("1.2.3.4.5",), "1.2.3.4.5"),
        (None, ("1.2.3.4.5", EXPLICIT), EXPLICIT),
        ((IMPLICIT, RLE), (EXPLICIT, RLE, IMPLICIT), IMPLICIT),
        ((IMPLICIT,), (EXPLICIT, RLE), None),
        ((JPEG, EXPLICIT), (EXPLICIT, JPEG), JPEG),
    ],
)
async def test_instances_are_taken_in_the_sources_order(
    accept: tuple[str, ...] | None, proposed: tuple[str, ...], chosen: str | None
) -> None:
    """By default lossless, then uncompressed, then lossy; else as configured for this source."""
    async with (
        serving(accept={"north": accept}) as at,
        at.peer("NORTHPACS", contexts=[(CT, proposed)]) as peer,
    ):
        assert peer.accepted.get(CT) == chosen


async def test_one_context_for_each_syntax_is_accepted_as_proposed() -> None:
    """A sender that wants its own syntax for each object gets it."""
    contexts = [(CT, (syntax,)) for syntax in (JPEG, RLE, EXPLICIT)]
    async with serving() as at, at.peer("NORTHPACS", contexts=contexts) as peer:
        syntaxes = [one.transfer_syntax for one in peer.association.contexts.values()]
    assert syntaxes == [JPEG, RLE, EXPLICIT]


@pytest.mark.parametrize(
    "sop_class", [PRIVATE, "1.2.840.10008.5.1.4.1.1.999", "1.2.840.10008.5.1.4.1.1.5"]
)
async def test_private_new_and_retired_classes_are_stored(sop_class: str) -> None:
    """Objects that only their maker knows are part of a study too."""
    async with serving() as at, at.peer("NORTHPACS", contexts=[sop_class]) as peer:
        assert sop_class in peer.accepted
    async with serving() as at, at.peer("READING1", contexts=[sop_class, VERIFICATION]) as peer:
        assert set(peer.accepted) == {VERIFICATION}


@pytest.mark.parametrize(
    ("uid", "expected"),
    [
        (CT, True),
        (PRIVATE, True),
        ("1.2.840.10008.5.1.4.34.7", True),  # RT Beams Delivery Instruction
        (VERIFICATION, False),
        (STUDY_FIND, False),
        (STUDY_MOVE, False),
        (MODALITY_WORKLIST, False),
        ("1.2.840.10008.1.20.1", False),  # Storage Commitment
        ("1.2.840.10008.3.1.2.3.3", False),  # Modality Performed Procedure Step
        ("1.2.840.10008.5.1.1.9", False),  # Basic Grayscale Print Management
        ("1.2.840.10008.9.9.9", False),
    ],
)
def test_what_counts_as_storage(uid: str, expected: bool) -> None:
    """Storage classes, and whatever the standard's registry does not name as another service."""
    assert is_storage(uid) is expected


async def test_peer_that_proposes_to_be_scp_only_is_not_asked_for_anything() -> None:
    """We request nothing on an association that we did not ask for."""
    roles = (RoleSelection(CT, scu=False, scp=True),)
    async with (
        serving() as at,
        at.peer("NORTHPACS", contexts=[CT, VERIFICATION], roles=roles) as peer,
    ):
        assert CT not in peer.accepted


async def test_draining_lets_in_only_what_is_waited_for() -> None:
    """While it drains, an archive may still bring what a retrieve under way waits for."""
    async with serving() as at:
        at.acceptor.drain()
        for calling in ("READING1", "NORTHPACS"):
            with pytest.raises(AssociationRejected) as caught:
                async with at.peer(calling):
                    pass
            assert caught.value.rejection == REJECT_CONGESTION
        at.arrivals.fetching = {"north"}
        async with at.peer("NORTHPACS") as peer:
            assert CT in peer.accepted
        with pytest.raises(AssociationRejected):
            async with at.peer("SOUTHPACS"):
                pass


async def test_who_was_being_admitted_during_a_reload_is_served_as_they_were_admitted(
    monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """The services that admit are in use until what they admitted is over, and serve it."""
    judged, decide = asyncio.Event(), asyncio.Event()

    async with serving() as at:
        former, access = at.acceptor, at.acceptor._access
        admit = access.admit

        async def slowly(*who: str) -> Peer | AssociateReject:
            judged.set()
            await decide.wait()
            return await admit(*who)

        monkeypatch.setattr(access, "admit", slowly)
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:

            async def ask() -> None:
                async with at.peer() as peer:
                    await peer.find(b"")
                    assert (await peer.receive()).command.status == 0x0000

            group.create_task(ask())
            await judged.wait()
            successor = Mock(spec=ServiceAcceptor)
            at.listener.acceptor = successor
            unused = group.create_task(former.wait_idle())
            await asyncio.sleep(0)
            assert not unused.done()
            decide.set()
        assert successor.mock_calls == []
    assert log_watch.named("association_crashed") == []
