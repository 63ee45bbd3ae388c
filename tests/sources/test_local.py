"""The local PACS: asked in the workstation's own bytes and name, and sending by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    STUDY_INSTANCE_UID,
    Level,
)
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField
from dicomproxy.dimse.errors import AssociationTimeout
from dicomproxy.dimse.layer import Limits
from dicomproxy.dimse.negotiation import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    UNCOMPRESSED,
)
from dicomproxy.ports import (
    Cancellation,
    Failure,
    LocalAnswer,
    RetrieveOrder,
    RetrieveProgress,
    SourceError,
)
from dicomproxy.sources import local as local_module
from dicomproxy.sources.archive import (
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_MOVE,
    STUDY_ROOT_FIND,
    STUDY_ROOT_MOVE,
)
from dicomproxy.sources.local import LocalPacs
from tests.dimse_edge.harness import until
from tests.sentinel import PATIENT_ID as SENTINEL_ID
from tests.sources.support import SHORT, Setting, asking, first, keys, row, within
from tests.support.stand_in import (
    SECONDS,
    StandIn,
    answers,
    cancelled,
    only,
    send_final,
    send_pending,
    succeed,
)

EXPLICIT, IMPLICIT = EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN
ORDER = RetrieveOrder(Level.STUDY, ("1.2.3",))


class Pacs:
    def __init__(self, at: Setting) -> None:
        self.at = at
        self.peer = at.peer
        self.local = LocalPacs(at.archive, at.source)

    def ask(
        self,
        data: bytes,
        *,
        sop_class: str = STUDY_ROOT_FIND,
        syntax: str = EXPLICIT,
        calling: str = "READING1",
        **more: Any,
    ) -> Any:
        return self.local.find(sop_class, syntax, data, calling_ae_title=calling, **more)

    async def find(self, data: bytes, **more: Any) -> list[LocalAnswer]:
        async with asyncio.timeout(SECONDS), aclosing(self.ask(data, **more)) as found:
            return [answer async for answer in found]

    def moving(self, order: RetrieveOrder = ORDER, **more: Any) -> Any:
        given = {"destination_ae_title": "READING2", "calling_ae_title": "READING1"}
        return self.local.move(order, **({"message_id": 7} | given | more))

    async def move(self, order: RetrieveOrder = ORDER, **more: Any) -> list[RetrieveProgress]:
        async with asyncio.timeout(SECONDS), aclosing(self.moving(order, **more)) as steps:
            return [step async for step in steps]


@asynccontextmanager
async def pacs(peer: StandIn, **settings: Any) -> AsyncIterator[Pacs]:
    """Yield a local PACS that is *peer*; afterwards nothing of it is open."""
    async with asking(peer, **settings) as at:
        made = Pacs(at)
        try:
            yield made
            pools = list(made.local._pools.values())
            await until(lambda: not any(pool.in_use for pool in pools))
        finally:
            await made.local.close()


def question(syntax: str = EXPLICIT, **texts: str) -> bytes:
    return keys(level="STUDY", patient=SENTINEL_ID, **texts).encode(syntax)


# ----------------------------------------------------------------------- find


@pytest.mark.parametrize("syntax", UNCOMPRESSED)
@pytest.mark.parametrize("sop_class", [STUDY_ROOT_FIND, PATIENT_ROOT_FIND])
async def test_identifiers_travel_as_their_bytes_are(syntax: str, sop_class: str) -> None:
    """Question and answers keep every byte, in the transfer syntax of the workstation."""
    # Bytes that decoding and encoding again would not give back: a padded value.
    asked = (
        question(syntax)
        + b"\x20\x00\x10\x00"
        + (b"SH\x02\x00" if syntax == EXPLICIT else b"\x02\0\0\0")
    )
    asked += b"  "
    given = row("1.2.3").encode(syntax) + asked[-10:]

    async with pacs(StandIn(answers(given))) as at:
        found = await at.find(asked, syntax=syntax, sop_class=sop_class, priority=1)
    assert found == [LocalAnswer(0xFF00, given, syntax), LocalAnswer(0x0000, b"", syntax)]
    (message,) = at.peer.messages
    assert message.data == asked
    assert message.context.transfer_syntax == syntax
    assert message.context.abstract_syntax == sop_class
    assert message.command.priority == 1
    assert at.peer.requests[0].calling_ae_title == "READING1"


async def test_question_is_written_anew_where_the_pacs_takes_another_syntax() -> None:
    """A PACS with Implicit VR alone is asked in it; its answers say in what they are written."""
    supported = only({STUDY_ROOT_FIND: [IMPLICIT]})
    async with pacs(StandIn(answers(row("1.2.3")), supported=supported)) as at:
        found = await at.find(question(EXPLICIT, study="1.2.3"), syntax=EXPLICIT)
    (asked,) = at.peer.identifiers()
    assert asked == Identifier.decode(question(EXPLICIT, study="1.2.3"), EXPLICIT)
    assert found[0].transfer_syntax_uid == IMPLICIT
    answered = Identifier.decode(found[0].data, IMPLICIT)
    assert (answered.text(STUDY_INSTANCE_UID), answered.text(PATIENT_ID)) == ("1.2.3", SENTINEL_ID)


async def test_question_that_cannot_be_written_anew() -> None:
    """Bytes that cannot be read can only be relayed as they are; else nothing is asked."""
    supported = only({STUDY_ROOT_FIND: [IMPLICIT]})
    async with pacs(StandIn(answers(), supported=supported)) as at:
        with pytest.raises(SourceError) as caught:
            await at.find(b"\x08\x00\x05", syntax=EXPLICIT)
        assert caught.value.failure is Failure.NO_CONTEXT
    assert at.peer.messages == []


@pytest.mark.parametrize("level", ["STUDY", "SERIES", "IMAGE"])
async def test_patient_root_below_the_patient_is_asked_in_study_root(level: str) -> None:
    """A PACS without Patient Root gets the same bytes in Study Root."""
    supported = only({STUDY_ROOT_FIND: UNCOMPRESSED})
    asked = keys(level=level, patient=SENTINEL_ID, study="1.2.3").encode(EXPLICIT)
    async with pacs(StandIn(answers(row("1.2.3")), supported=supported)) as at:
        found = await at.find(asked, sop_class=PATIENT_ROOT_FIND)
    assert [answer.status for answer in found] == [0xFF00, 0x0000]
    (message,) = at.peer.messages
    assert (message.context.abstract_syntax, message.data) == (STUDY_ROOT_FIND, asked)


@pytest.mark.parametrize("syntax", UNCOMPRESSED)
async def test_patients_of_a_study_root_pacs(syntax: str) -> None:
    """At PATIENT level its studies are asked for, and each patient is answered once."""
    supported = only({STUDY_ROOT_FIND: UNCOMPRESSED})
    rows = [row("1.1", "A"), row("1.2", "A"), row("1.3", "B")]
    asked = keys(level="PATIENT", patient="*").encode(syntax)
    async with pacs(StandIn(answers(*rows), supported=supported)) as at:
        found = await at.find(asked, sop_class=PATIENT_ROOT_FIND, syntax=syntax)
    assert [answer.status for answer in found] == [0xFF00, 0xFF00, 0x0000]
    patients = [Identifier.decode(answer.data, syntax) for answer in found[:-1]]
    assert [patient.text(PATIENT_ID) for patient in patients] == ["A", "B"]
    (identifier,) = at.peer.identifiers()
    assert identifier.text(QUERY_RETRIEVE_LEVEL) == "STUDY"
    assert STUDY_INSTANCE_UID in identifier


async def test_patients_of_a_study_root_pacs_are_not_cut_short() -> None:
    """What caps the answers of the region is not for the house's own: Success says all."""
    supported = only({STUDY_ROOT_FIND: UNCOMPRESSED})
    rows = [row("1.1", "A"), row("1.2", "B"), row("1.3", "C")]
    asked = keys(level="PATIENT", patient="*").encode(EXPLICIT)
    async with pacs(StandIn(answers(*rows), supported=supported), max_matches=2) as at:
        found = await at.find(asked, sop_class=PATIENT_ROOT_FIND)
    assert [answer.status for answer in found] == [0xFF00, 0xFF00, 0xFF00, 0x0000]


async def test_closing_a_query_for_patients_of_a_study_root_pacs_cancels_it_at_once() -> None:
    """The association is being given back when the closing returns, not some time later."""

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, row("1.1", "A"))
        await cancelled(association, message)

    supported = only({STUDY_ROOT_FIND: UNCOMPRESSED})
    asked = keys(level="PATIENT", patient="*").encode(EXPLICIT)
    async with pacs(StandIn(handle, supported=supported)) as at:
        async with aclosing(at.ask(asked, sop_class=PATIENT_ROOT_FIND)) as found:
            await first(found)
        assert len(at.at.archive.pool._tasks) == 1


async def test_pacs_without_any_find() -> None:
    """What it cannot be asked is said, at every level."""
    async with pacs(StandIn(answers(), supported=only({}))) as at:
        for sop_class in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND):
            with pytest.raises(SourceError) as caught:
                await at.find(question(), sop_class=sop_class)
            assert caught.value.failure is Failure.NO_CONTEXT


async def test_final_status_and_comment_are_passed_on() -> None:
    """How the PACS ends a query is how the workstation sees it end; nothing of it is logged."""

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, row("1.1"))
        await send_final(association, message, 0xA700, error_comment=SENTINEL_ID)

    async with pacs(StandIn(handle)) as at:
        found = await at.find(question())
    assert found[-1] == LocalAnswer(0xA700, b"", EXPLICIT, SENTINEL_ID)


async def test_answer_over_the_limit() -> None:
    """An identifier larger than allowed is a protocol error, not a cut answer."""
    long = row("1.1").encode(EXPLICIT) + b"\x20\x00\x00\x40LT\x00\x20" + b"x" * 0x2000
    async with pacs(StandIn(answers(long)), limits=Limits(max_identifier_bytes=4096)) as at:
        with pytest.raises(SourceError) as caught:
            await at.find(question())
        assert caught.value.failure is Failure.PROTOCOL


async def test_silent_pacs() -> None:
    """No wait is without a deadline, that for the local PACS neither."""

    async def handle(association: Association, message: Message) -> None:
        await cancelled(association, message)

    async with pacs(StandIn(handle), response_timeout=SHORT) as at:
        with pytest.raises(SourceError) as caught:
            await at.find(question())
        assert (caught.value.source, caught.value.failure) == ("north", Failure.TIMEOUT)


async def test_closing_a_query_cancels_it() -> None:
    """A workstation's C-CANCEL goes on to the PACS."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, row("1.1"))
        await cancelled(association, message)
        seen.set()

    async with pacs(StandIn(handle)) as at:
        async with aclosing(at.ask(question())) as found:
            await first(found)
        await within(seen.wait())


# ------------------------------------------------------------------- whose name


async def test_each_title_has_associations_of_its_own() -> None:
    """A PACS that knows its workstations by title sees theirs; ours uses the common pool."""
    async with pacs(StandIn(answers())) as at:
        for title in ("READING1", "READING2", "READING1", "DICOMPROXY"):
            await at.find(question(), calling=title)
        assert at.at.archive.pool.idle == 1
    titles = [request.calling_ae_title for request in at.peer.requests]
    assert titles == ["READING1", "READING2", "DICOMPROXY"]


async def test_number_of_pools_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more titles than pools the oldest that nobody uses goes; its associations are closed."""
    monkeypatch.setattr(local_module, "_MOST_POOLS", 3)
    gate, asked = asyncio.Event(), asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        if association.calling_ae_title == "BUSY":
            asked.set()
            await gate.wait()
        await succeed(association, message)

    async with pacs(StandIn(handle)) as at:
        busy = asyncio.create_task(at.find(question(), calling="BUSY"))
        await within(asked.wait())
        for number in range(7):
            assert len(await at.find(question(), calling=f"READING{number}")) == 1
            assert len(at.local._pools) <= 3
        assert "BUSY" in at.local._pools
        # Only the idle associations of the pools that are left still stand.
        await until(lambda: sum(one.established for one in at.peer.associations) == 3)
        gate.set()
        assert len(await within(busy)) == 1


# ----------------------------------------------------------------------- move


@pytest.mark.parametrize(
    ("offered", "asked"),
    [
        ((STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE), STUDY_ROOT_MOVE),
        ((PATIENT_ROOT_MOVE,), PATIENT_ROOT_MOVE),
    ],
)
async def test_move_is_the_workstations_own(offered: tuple[str, ...], asked: str) -> None:
    """Title, Message ID, destination and priority are those of the workstation."""
    order = RetrieveOrder(Level.STUDY, ("1.2.3", "1.2.4"), patient_id=SENTINEL_ID)
    supported = only(dict.fromkeys(offered, UNCOMPRESSED))
    async with pacs(StandIn(succeed, supported=supported)) as at:
        (step,) = await at.move(order, message_id=4711, priority=2)
    assert (step.final, step.status) == (True, 0x0000)
    (message,) = at.peer.messages
    command = message.command
    assert command.field == CommandField.C_MOVE_RQ
    assert (command.message_id, command.priority) == (4711, 2)
    assert command.move_destination == "READING2"
    assert message.context.abstract_syntax == asked
    assert at.peer.requests[0].calling_ae_title == "READING1"
    (identifier,) = at.peer.identifiers()
    assert identifier.values(STUDY_INSTANCE_UID) == ("1.2.3", "1.2.4")
    assert (PATIENT_ID in identifier) is (asked == PATIENT_ROOT_MOVE)


@pytest.mark.parametrize(
    ("level", "patient", "offered"),
    [
        (Level.PATIENT, "P", (STUDY_ROOT_MOVE,)),
        (Level.STUDY, "", (PATIENT_ROOT_MOVE,)),
        (Level.STUDY, "P", ()),
    ],
)
async def test_move_that_no_model_can_carry(
    level: Level, patient: str, offered: tuple[str, ...]
) -> None:
    """Nothing is sent where no accepted context fits."""
    supported = only(dict.fromkeys(offered, UNCOMPRESSED))
    async with pacs(StandIn(succeed, supported=supported)) as at:
        with pytest.raises(SourceError) as caught:
            await at.move(RetrieveOrder(level, ("1.2.3",), patient_id=patient))
        assert caught.value.failure is Failure.NO_CONTEXT
    assert at.peer.messages == []


async def test_counts_and_failed_list_of_the_pacs_are_passed_on() -> None:
    """What the PACS says of its own sub-operations is what the workstation will hear."""
    failed = Identifier()
    failed.set_text(0x00080058, ("1.1",))

    async def handle(association: Association, message: Message) -> None:
        for left in (2, 1, 0):
            await send_pending(
                association, message, remaining=left, completed=2 - left, failed=1, warning=0
            )
        await send_final(association, message, 0xB000, failed, completed=2, failed=1, warning=0)

    async with pacs(StandIn(handle)) as at:
        steps = await at.move()
    assert [(step.remaining, step.completed, step.failed) for step in steps] == [
        (2, 0, 1),
        (1, 1, 1),
        (0, 2, 1),
        (None, 2, 1),
    ]
    assert steps[-1].failed_sop_instance_uids == ("1.1",)


async def test_closing_a_move_cancels_it_by_its_message_id() -> None:
    """The C-CANCEL names the Message ID that the PACS was given."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        assert message.command.message_id == 4711
        await send_pending(association, message, remaining=9)
        await cancelled(association, message)
        seen.set()

    async with pacs(StandIn(handle)) as at:
        async with aclosing(at.moving(message_id=4711)) as steps:
            await first(steps)
        await within(seen.wait())


async def test_cancelled_move_ends_by_the_final_response_of_the_pacs() -> None:
    """One C-CANCEL is sent however often it is asked for; the PACS's counts come through."""
    cancellation = Cancellation()
    failed = Identifier()
    failed.set_text(0x00080058, ("1.1",))
    cancels: list[int] = []

    async def handle(association: Association, message: Message) -> None:
        if message.command.field == CommandField.C_FIND_RQ:
            await succeed(association, message)
            return
        await send_pending(association, message, remaining=9)
        got = await association.receive(SECONDS)
        assert got.command.field == CommandField.C_CANCEL_RQ
        cancels.append(got.command.responds_to)
        with pytest.raises(AssociationTimeout):
            await association.receive(SHORT)
        counts = {"remaining": 6, "completed": 2, "failed": 1, "warning": 0}
        await send_final(association, message, 0xFE00, failed, **counts)

    async with pacs(StandIn(handle)) as at:
        async with aclosing(at.moving(message_id=4711, cancellation=cancellation)) as steps:
            assert cancellation.send is None
            await first(steps)
            assert cancellation.send is not None
            cancellation.send()
            cancellation.send()
            (last,) = [step async for step in steps]
            cancellation.send()  # too late: the association is not ours any more
        assert len(await at.find(question())) == 1
    assert cancels == [4711]
    assert (last.final, last.status, last.remaining) == (True, 0xFE00, 6)
    assert (last.completed, last.failed, last.failed_sop_instance_uids) == (2, 1, ("1.1",))


@pytest.mark.parametrize("how", ["silent", "dies"])
async def test_cancelled_move_without_an_end(how: str) -> None:
    """A PACS that dies over the C-CANCEL is an error; a silent one can be left all the same."""
    cancellation = Cancellation()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, remaining=9)
        await association.receive(SECONDS)
        if how == "dies":
            association.protocol.close_now()
        await association.receive(SECONDS)

    async with pacs(StandIn(handle), stall_timeout=SHORT if how == "silent" else SECONDS) as at:
        async with aclosing(at.moving(cancellation=cancellation)) as steps:
            await first(steps)
            assert cancellation.send is not None
            cancellation.send()
            with pytest.raises(SourceError) as caught:
                await first(steps)
        assert caught.value.failure is (Failure.ABORTED if how == "dies" else Failure.TIMEOUT)
        for association in at.peer.associations:
            association.abort()


@pytest.mark.parametrize("pending", [0, 1])
async def test_silent_move_is_given_up(pending: int) -> None:
    """Long patience until the first response, short after it."""
    timeouts = [("first_instance_timeout", SHORT), ("stall_timeout", SHORT)]
    name, seconds = timeouts[pending]

    async def handle(association: Association, message: Message) -> None:
        for _ in range(pending):
            await send_pending(association, message, remaining=9)
        await cancelled(association, message)

    async with pacs(StandIn(handle), **{name: seconds}) as at:
        with pytest.raises(SourceError) as caught:
            await at.move()
        assert caught.value.failure is Failure.TIMEOUT


async def test_moves_with_one_message_id_do_not_share_an_association() -> None:
    """Workstations all count from 1: two such moves at once are told apart."""
    gate = asyncio.Event()
    asked: asyncio.Queue[Association] = asyncio.Queue()

    async def handle(association: Association, message: Message) -> None:
        asked.put_nowait(association)
        await gate.wait()
        await succeed(association, message)

    async with pacs(StandIn(handle)) as at:
        moves = [asyncio.create_task(at.move(message_id=1)) for _ in range(2)]
        assert await within(asked.get()) is not await within(asked.get())
        gate.set()
        for move in moves:
            assert (await within(move))[-1].status == 0x0000
