"""C-MOVE as SCP: a requester that is kept informed, and a final response that says it all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import QUERY_RETRIEVE_LEVEL, STUDY_INSTANCE_UID, Level, Root
from dicomproxy.dimse.command import CommandField, Tag, request
from dicomproxy.dimse.errors import AssociationAborted
from dicomproxy.dimse.layer import Limits
from dicomproxy.dimse.operations import VERIFICATION
from dicomproxy.dimse.pdu import Abort, encode
from dicomproxy.ports import Originator
from dicomproxy.retrieval.coordinator import RetrieveOutcome
from tests.dimse_edge.harness import until
from tests.dimse_edge.raw_peer import message
from tests.services.support import (
    EXPLICIT,
    IMPLICIT,
    PATIENT_MOVE,
    STUDY_FIND,
    STUDY_MOVE,
    Retrieve,
    serving,
    within,
)
from tests.sources.support import keys
from tests.support.log_watch import LogWatch

ORDER = keys(level="STUDY", study="1.2.3")
FAILED_LIST = 0x00080058
COUNTS = (Tag.REMAINING, Tag.COMPLETED, Tag.FAILED, Tag.WARNING)


def counts(command: Any) -> tuple[int | None, ...]:
    return tuple(command.count(tag) for tag in COUNTS)


async def test_request_reaches_the_coordinator_whole() -> None:
    """Keys, caller, originator and destination, and as whom the local PACS is called."""
    async with serving() as at, at.peer(called="LOCALPACS") as peer:
        await peer.move(ORDER, message_id=4711)
        (await at.retrieves.next()).end(RetrieveOutcome(0x0000))
        await peer.final()
        (started,) = at.retrieves.started
    assert (started.request.root, started.request.level) == (Root.STUDY, Level.STUDY)
    assert started.request.study_instance_uids == ("1.2.3",)
    assert started.originator == Originator("READING1", 4711, 1)
    assert (started.destination.ae_title, started.destination.known) == ("READING2", True)
    assert (started.caller.ae_title, started.caller.called_ae_title) == ("READING1", "LOCALPACS")
    assert started.local_calling_ae_title == "READING1"


async def test_patient_root_is_read_as_such() -> None:
    """At PATIENT level the Patient ID is the unique key."""
    async with serving() as at, at.peer(contexts=[PATIENT_MOVE]) as peer:
        asked = keys(level="PATIENT", patient="P1")
        await peer.send(
            CommandField.C_MOVE_RQ, PATIENT_MOVE, asked, priority=0, move_destination="READING2"
        )
        (await at.retrieves.next()).end(RetrieveOutcome(0x0000))
        await peer.final()
        (started,) = at.retrieves.started
    assert (started.request.root, started.request.patient_id) == (Root.PATIENT, "P1")


# -------------------------------------------------------------------- pending


async def test_each_change_of_the_counts_is_told() -> None:
    """Pending responses carry all four counts, and no data set."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        for done in (1, 2, 3):
            retrieve.count(remaining=3 - done, completed=done, failed=0, warning=done - 1)
            command = (await peer.receive()).command
            assert command.status == 0xFF00
            assert counts(command) == (3 - done, done, 0, done - 1)
            assert not command.has_data_set
            assert command.affected_sop_class_uid == STUDY_MOVE
        retrieve.end(RetrieveOutcome(0x0000, completed=3))
        pending, final = await peer.final()
    assert final.command.status == 0x0000
    # What the end wakes up may be told once more; never something else.
    assert {counts(message.command) for message in pending} <= {(0, 3, 0, 2)}


async def test_pending_comes_on_a_timer_while_nothing_moves() -> None:
    """A tape recall is no reason for silence."""
    async with serving(pending_seconds=0.02) as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        for _ in range(3):
            command = (await peer.receive()).command
            assert (command.status, counts(command)) == (0xFF00, (3, 0, 0, 0))
        retrieve.end(RetrieveOutcome(0x0000))
        await peer.final()


async def test_many_changes_at_once_are_told_once() -> None:
    """A slow requester gets the latest counts, not a backlog of old ones."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        for done in range(1000):
            retrieve.count(remaining=1000 - done, completed=done)
        command = (await peer.receive()).command
        assert counts(command) == (1, 999, 0, 0)
        retrieve.end(RetrieveOutcome(0x0000, completed=1000))
        pending, _ = await peer.final()
        assert len(pending) <= 1


async def test_numbers_fit_their_vr() -> None:
    """More than 65535 sub-operations are told as 65535."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        retrieve.count(remaining=70_000, completed=80_000, failed=90_000, warning=100_000)
        assert counts((await peer.receive()).command) == (65535,) * 4
        retrieve.end(RetrieveOutcome(0x0000, completed=80_000))
        _, final = await peer.final()
        assert counts(final.command) == (None, 65535, 0, 0)


# ---------------------------------------------------------------------- final


@pytest.mark.parametrize(
    ("outcome", "expected", "listed"),
    [
        (RetrieveOutcome(0x0000, 0, 3, 0, 0), (None, 3, 0, 0), None),
        (RetrieveOutcome(0x0000, 0, 0, 0, 0), (None, 0, 0, 0), None),
        (
            RetrieveOutcome(0xB000, 0, 2, 1, 1, ("1.1",), "Sub-operations Complete"),
            (None, 2, 1, 1),
            ("1.1",),
        ),
        (RetrieveOutcome(0xB000, 0, 2, 0, 1), (None, 2, 0, 1), None),
        (RetrieveOutcome(0xFE00, 4, 2, 1, 0, ("1.1",)), (4, 2, 1, 0), ("1.1",)),
        (RetrieveOutcome(0xFE00, 0, 2, 0, 0), (0, 2, 0, 0), None),
        (RetrieveOutcome(0xA702, 0, 0, 2, 0, ("1.1", "1.2")), (None, 0, 2, 0), ("1.1", "1.2")),
        (RetrieveOutcome(0xA801, 0, 0, 0, 0), (None, 0, 0, 0), None),
        (RetrieveOutcome(0xC000, 3, 0, 0, 0, (), "x" * 80), (None, 0, 0, 0), None),
    ],
    ids=[
        "success",
        "empty",
        "warning",
        "warning_only",
        "cancel",
        "cancel_done",
        "failed",
        "unknown_destination",
        "unable",
    ],
)
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
async def test_final_response_says_what_became_of_it(
    outcome: RetrieveOutcome,
    expected: tuple[int | None, ...],
    listed: tuple[str, ...] | None,
    syntax: str,
) -> None:
    """Counts in every one, Remaining in Cancel alone, the failed list where something failed."""
    async with serving() as at, at.peer(contexts=[(STUDY_MOVE, (syntax,))]) as peer:
        await peer.move(ORDER)
        (await at.retrieves.next()).end(outcome)
        _, final = await peer.final()
    assert final.command.status == outcome.status
    assert counts(final.command) == expected
    assert final.command.error_comment == outcome.error_comment[:64]
    if listed is None:
        assert not final.command.has_data_set
    else:
        identifier = Identifier.decode(final.data, syntax)
        assert identifier.values(FAILED_LIST) == listed


@pytest.mark.parametrize(("syntax", "cut"), [(EXPLICIT, True), (IMPLICIT, False)])
async def test_failed_list_is_cut_at_what_its_vr_holds(
    log_watch: LogWatch, syntax: str, cut: bool
) -> None:
    """A 16-bit length holds 64 kB of UIDs: the list is cut and logged, the counts stay true."""
    uids = tuple(f"1.2.826.0.1.3680043.8.498.{number:038}" for number in range(2000))
    async with (
        serving(limits=Limits(max_identifier_bytes=1 << 20)) as at,
        at.peer(contexts=[(STUDY_MOVE, (syntax,))]) as peer,
    ):
        await peer.move(ORDER)
        (await at.retrieves.next()).end(
            RetrieveOutcome(0xA702, failed=2000, failed_sop_instance_uids=uids)
        )
        _, final = await peer.final()
    listed = Identifier.decode(final.data, syntax).values(FAILED_LIST)
    assert listed == uids[: len(listed)]
    assert final.command.count(Tag.FAILED) == 2000
    lines = log_watch.named("failed_list_cut")
    if cut:
        size = sum(len(uid) + 1 for uid in listed) - 1
        assert 0xFFFE - 65 < size <= 0xFFFE
        assert [(line["failed"], line["count"]) for line in lines] == [(2000, len(listed))]
    else:
        assert (len(listed), lines) == (2000, [])


# -------------------------------------------------------------------- refusals


def without_level() -> Identifier:
    return keys(study="1.2.3")


@pytest.mark.parametrize(
    ("asked", "status", "offending"),
    [
        (keys(study="1.2.3"), 0xA900, QUERY_RETRIEVE_LEVEL),
        (keys(level="WARD", study="1.2.3"), 0xA900, QUERY_RETRIEVE_LEVEL),
        (keys(level="PATIENT", patient="P"), 0xA900, QUERY_RETRIEVE_LEVEL),
        (keys(level="STUDY"), 0xA900, STUDY_INSTANCE_UID),
        (keys(level="STUDY", study="not a uid"), 0xA900, STUDY_INSTANCE_UID),
        (b"\x08\x00\x52", 0xC000, None),
        (bytes(5000), 0xA700, None),
    ],
    ids=[
        "no_level",
        "odd_level",
        "level_of_the_other_root",
        "no_key",
        "no_uid",
        "garbage",
        "too_long",
    ],
)
async def test_request_that_makes_no_sense_is_refused(
    log_watch: LogWatch, asked: Identifier | bytes, status: int, offending: int | None
) -> None:
    """With its status, the element at fault and a comment; nothing is started."""
    async with serving(limits=Limits(max_identifier_bytes=4096)) as at, at.peer() as peer:
        await peer.move(asked)
        pending, final = await peer.final()
        assert (pending, final.command.status) == ([], status)
        named = final.command.elements.get(Tag.OFFENDING_ELEMENT)
        assert named == (None if offending is None else (offending,))
        assert final.command.error_comment
        assert at.retrieves.started == []
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION, message_id=2)
        assert (await peer.receive()).command.status == 0x0000
    (line,) = log_watch.named("retrieve")
    assert (line["reason"], line["status"]) == ("refused", f"0x{status:04X}")


async def test_unknown_destination_is_for_the_coordinator_to_judge() -> None:
    """The local PACS may know a destination that nobody configured here."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER, destination="NEVER HEARD OF")
        (await at.retrieves.next()).end(RetrieveOutcome(0xA801))
        _, final = await peer.final()
        assert final.command.status == 0xA801
        plan = at.retrieves.started[0].destination
        assert (plan.ae_title, plan.known) == ("NEVER HEARD OF", False)


# ---------------------------------------------------------------- cancel, loss


async def test_cancel_reaches_the_operation_which_still_ends_by_itself() -> None:
    """C-CANCEL is handed on; the final response is what the operation says."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER, message_id=3)
        retrieve = await at.retrieves.next()
        await peer.cancel(3, STUDY_MOVE)
        await within(retrieve.cancelled.wait())
        assert not retrieve.stopped.is_set()
        retrieve.end(RetrieveOutcome(0xFE00, remaining=2, completed=1))
        _, final = await peer.final()
    assert (final.command.status, counts(final.command)) == (0xFE00, (2, 1, 0, 0))


async def test_cancel_of_another_message_id_cancels_nothing() -> None:
    """Only the operation named is told."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER, message_id=3)
        retrieve = await at.retrieves.next()
        await peer.cancel(4, STUDY_MOVE)
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION, message_id=5)
        assert (await peer.receive()).command.responds_to == 5
        assert not retrieve.cancelled.is_set()
        retrieve.end(RetrieveOutcome(0x0000))
        await peer.final()


@pytest.mark.parametrize("abort", [True, False])
async def test_workstation_that_leaves_ends_its_retrieve(log_watch: LogWatch, abort: bool) -> None:
    """Aborted or lost: the operation is cancelled, and logged without a status."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        if abort:
            peer.association.abort()
        else:
            peer.association.protocol.close_now()
        await within(retrieve.stopped.wait())
        await until(lambda: at.operations.running == {})
    (line,) = log_watch.named("retrieve")
    assert line.get("status") is None
    assert at.operations.recent_failures[0].detail.endswith("association lost")


@pytest.mark.parametrize("kind", ["query", "retrieve"])
async def test_request_with_an_abort_right_behind_it_is_over(
    log_watch: LogWatch, kind: str
) -> None:
    """Read together, the request is taken up and given up before anything of it has run."""
    field, sop_class = {
        "query": (CommandField.C_FIND_RQ, STUDY_FIND),
        "retrieve": (CommandField.C_MOVE_RQ, STUDY_MOVE),
    }[kind]
    more = {"move_destination": "READING2"} if kind == "retrieve" else {}
    async with serving() as at, at.peer() as peer:
        context = peer.context(sop_class)
        asked = request(field, sop_class, 1, data_set=True, priority=0, **more)
        data = ORDER.encode(context.transfer_syntax)
        together = message(context.context_id, asked, data) + encode(Abort(0, 0))
        peer.association.protocol.write(together)
        await until(lambda: bool(log_watch.named(kind)))
        assert at.operations.running == {}
        await within(at.operations.wait_idle())
    (line,) = log_watch.named(kind)
    assert line.get("status") is None


async def test_crash_inside_a_retrieve_aborts_the_association(log_watch: LogWatch) -> None:
    """Nobody knows then what was sent: no final response is invented."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        (await at.retrieves.next()).end(ZeroDivisionError("of no use"))
        with pytest.raises(AssociationAborted):
            await peer.final()
        await until(lambda: at.operations.running == {})
    assert log_watch.named("task_crashed")


async def test_shutdown_cancels_as_the_workstation_would() -> None:
    """What is under way when the grace period is over ends with Cancel."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        at.operations.cancel_all()
        assert retrieve.cancelled.is_set()
        idle = asyncio.create_task(at.operations.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
        retrieve.end(RetrieveOutcome(0xFE00, remaining=3))
        assert (await peer.final())[1].command.status == 0xFE00
        await within(idle)


# ------------------------------------------------------------------------ told


async def test_what_is_shown_of_an_operation_is_live(log_watch: LogWatch) -> None:
    """The status page sees level, destination, phase and counts; the log line their last state."""
    async with serving() as at, at.peer() as peer:
        await peer.move(ORDER)
        retrieve = await at.retrieves.next()
        (shown,) = at.operations.running.values()
        retrieve.phase, retrieve.bytes = "delivering", 5000
        retrieve.count(remaining=1, completed=1, failed=1, warning=0)
        assert (shown.kind, shown.query_level, shown.destination_ae_title) == (
            "retrieve",
            "STUDY",
            "READING2",
        )
        assert (shown.phase(), shown.bytes) == ("delivering", 5000)
        assert (shown.remaining, shown.completed, shown.failed) == (1, 1, 1)
        retrieve.end(RetrieveOutcome(0xB000, completed=2, failed=1))
        await peer.final()
        await until(lambda: bool(log_watch.named("retrieve")))
    (line,) = log_watch.named("retrieve")
    assert (line["status"], line["level"]) == ("0xB000", "warning")
    assert (line["completed"], line["failed"], line["warning"]) == (2, 1, 0)
    assert (line["bytes"], line["destination_ae_title"]) == (5000, "READING2")
    assert line["operation_id"] == at.retrieves.started[0].operation_id


async def test_cancelled_before_it_began() -> None:
    """A C-CANCEL right behind its request is not lost."""
    prepared = Retrieve()
    async with serving() as at, at.peer() as peer:
        at.retrieves.prepared.append(prepared)
        await peer.move(ORDER)
        await peer.cancel(1, STUDY_MOVE)
        await within(prepared.cancelled.wait())
        prepared.end(RetrieveOutcome(0xFE00))
        assert (await peer.final())[1].command.status == 0xFE00
