"""C-FIND as SCP: each answer as it comes, one final response, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import Root
from dicomproxy.dimse.association import Association
from dicomproxy.dimse.command import CommandField, Tag, request, response
from dicomproxy.dimse.errors import AssociationAborted, AssociationTimeout
from dicomproxy.dimse.layer import Limits
from dicomproxy.dimse.operations import VERIFICATION
from dicomproxy.query.coordinator import Answer
from tests.dimse_edge.harness import SHORT, until
from tests.services.support import (
    CT,
    EXPLICIT,
    IMPLICIT,
    MODALITY_WORKLIST,
    PATIENT_FIND,
    STUDY_FIND,
    STUDY_MOVE,
    serving,
    within,
)
from tests.sources.support import keys
from tests.support.log_watch import LogWatch
from tests.support.stand_in import SECONDS
from tests.support.time_passes import time_passes

QUESTION = keys(level="STUDY", study="1.2.3")
ROW = keys(level="STUDY", study="1.2.3").encode(EXPLICIT)


async def test_echo() -> None:
    """Verification is answered with Success, again and again."""
    async with serving() as at, at.peer("MODALITY") as peer:
        for number in (1, 2, 3):
            await peer.send(CommandField.C_ECHO_RQ, VERIFICATION, message_id=number)
            command = (await peer.receive()).command
            assert (command.status, command.responds_to) == (0x0000, number)
            assert command.affected_sop_class_uid == VERIFICATION
            assert not command.has_data_set


async def test_answers_are_sent_as_they_come() -> None:
    """Each Pending with its bytes before the next one exists; then the final response, bare."""
    gate = asyncio.Event()

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        yield Answer(0xFF00, ROW)
        await gate.wait()
        yield Answer(0xFF01, ROW + ROW)
        yield Answer(0x0000)

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION, message_id=9)
        first = await peer.receive()
        assert (first.command.status, first.data) == (0xFF00, ROW)
        gate.set()
        (second,), final = await peer.final()
        assert (second.command.status, second.data) == (0xFF01, ROW + ROW)
        assert (final.command.status, final.command.has_data_set) == (0x0000, False)
        for message in (first, second, final):
            assert message.command.responds_to == 9
            assert message.command.affected_sop_class_uid == STUDY_FIND
        await within(at.queries.closed.wait())


@pytest.mark.parametrize(
    ("sop_class", "root"), [(PATIENT_FIND, Root.PATIENT), (STUDY_FIND, Root.STUDY)]
)
@pytest.mark.parametrize("local_title", ["", "DICOMPROXY"])
async def test_question_is_handed_on_whole(sop_class: str, root: Root, local_title: str) -> None:
    """Model, syntax, bytes, priority and caller reach the coordinator unchanged."""
    data = QUESTION.encode(IMPLICIT)
    async with (
        serving(local_calling_ae_title=local_title) as at,
        at.peer(called="LOCALPACS", contexts=[(sop_class, (IMPLICIT,))]) as peer,
    ):
        await peer.send(CommandField.C_FIND_RQ, sop_class, data, priority=2)
        await peer.final()
        (asked,) = at.queries.asked
    assert (asked["sop_class_uid"], asked["root"]) == (sop_class, root)
    assert (asked["transfer_syntax_uid"], asked["data"]) == (IMPLICIT, data)
    assert asked["priority"] == 2
    caller = asked["caller"]
    assert (caller.ae_title, caller.called_ae_title) == ("READING1", "LOCALPACS")
    assert (caller.peer_address, caller.sources) == ("127.0.0.1", ("north", "south"))
    assert asked["local_calling_ae_title"] == (local_title or "READING1")


async def test_final_answer_carries_comment_and_offending_element() -> None:
    """A refusal says which element is at fault; a comment is cut to what its VR holds."""

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        yield Answer(0xA900, error_comment="c" * 100, offending_element=(0x00080052,))

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION)
        _, final = await peer.final()
    assert final.command.status == 0xA900
    assert final.command.error_comment == "c" * 64
    assert final.command.elements[Tag.OFFENDING_ELEMENT] == (0x00080052,)


async def test_cancel_ends_a_query_that_is_waiting() -> None:
    """C-CANCEL closes the coordinator's iterator, and the workstation hears Cancel."""

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        yield Answer(0xFF00, ROW)
        await asyncio.Event().wait()

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION)
        await peer.receive()
        await peer.cancel()
        pending, final = await peer.final()
        assert (pending, final.command.status) == ([], 0xFE00)
        await within(at.queries.closed.wait())


async def test_cancel_that_comes_again_changes_nothing() -> None:
    """A query that takes its time to end is not cancelled a second time, nor is anybody else."""
    ending, may_end = asyncio.Event(), asyncio.Event()

    async def slowly(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        try:
            await asyncio.Event().wait()
            yield Answer(0x0000)
        finally:
            ending.set()
            await may_end.wait()

    async with serving() as at, at.peer() as peer:
        at.queries.answering = slowly
        await peer.find(QUESTION)
        await until(lambda: bool(at.queries.asked))
        await peer.cancel()
        await within(ending.wait())
        await peer.cancel()
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION, message_id=2)
        assert (await peer.receive()).command.responds_to == 2
        at.operations.cancel_all()
        may_end.set()
        _, final = await peer.final()
    assert final.command.status == 0xFE00


@pytest.mark.parametrize("message_id", [1, 2])
async def test_cancel_that_comes_too_late_or_names_nothing_is_ignored(message_id: int) -> None:
    """It may have crossed the final response; the association goes on."""
    async with serving() as at, at.peer() as peer:
        await peer.find(QUESTION)
        await peer.final()
        await peer.cancel(message_id)
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION, message_id=5)
        assert (await peer.receive()).command.responds_to == 5


async def test_cancel_ends_only_the_query_it_names() -> None:
    """Two queries at once on one association are told apart by Message ID."""
    gate = asyncio.Event()

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        await gate.wait()
        yield Answer(0x0000)

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION, message_id=1)
        await peer.find(QUESTION, message_id=2)
        await until(lambda: len(at.queries.asked) == 2)
        await peer.cancel(2)
        command = (await peer.receive()).command
        assert (command.responds_to, command.status) == (2, 0xFE00)
        gate.set()
        command = (await peer.receive()).command
        assert (command.responds_to, command.status) == (1, 0x0000)


async def test_message_id_in_use_is_refused() -> None:
    """A second operation under the ID of one that runs is a duplicate invocation (0210)."""
    gate = asyncio.Event()

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        await gate.wait()
        yield Answer(0x0000)

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION, message_id=7)
        await peer.find(QUESTION, message_id=7)
        assert (await peer.receive()).command.status == 0x0210
        gate.set()
        assert (await peer.receive()).command.status == 0x0000
        await peer.find(QUESTION, message_id=7)
        assert (await peer.receive()).command.status == 0x0000
        assert len(at.queries.asked) == 2


async def test_too_many_operations_at_once_are_refused() -> None:
    """Beyond eight on one association: resource limitation (0213); others go on."""
    gate = asyncio.Event()

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        await gate.wait()
        yield Answer(0x0000)

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        for number in range(1, 10):
            await peer.find(QUESTION, message_id=number)
        refused = (await peer.receive()).command
        assert (refused.responds_to, refused.status) == (9, 0x0213)
        gate.set()
        answered = [(await peer.receive()).command for _ in range(8)]
        assert sorted(command.responds_to for command in answered) == list(range(1, 9))
        assert {command.status for command in answered} == {0x0000}


async def test_identifier_over_the_limit_is_out_of_resources(log_watch: LogWatch) -> None:
    """It is neither kept nor asked about; the association goes on."""
    async with serving(limits=Limits(max_identifier_bytes=4096)) as at, at.peer() as peer:
        await peer.find(b"\0" * 5000)
        _, final = await peer.final()
        assert final.command.status == 0xA700
        assert final.command.error_comment
        assert at.queries.asked == []
        await peer.find(QUESTION, message_id=2)
        assert (await peer.final())[1].command.status == 0x0000
    assert [line["status"] for line in log_watch.named("query")] == ["0xA700", "0x0000"]


async def test_coordinator_that_ends_without_a_final_answer() -> None:
    """The workstation is never left waiting: C001."""

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        yield Answer(0xFF00, ROW)

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION)
        pending, final = await peer.final()
        assert (len(pending), final.command.status) == (1, 0xC001)


async def test_crash_inside_ends_the_association_not_the_proxy(log_watch: LogWatch) -> None:
    """What nobody foresaw is logged by type, aborts this association, and is no longer running."""

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        raise ZeroDivisionError(keys(study="1.2.3"))
        yield

    async with serving() as at:
        async with at.peer() as peer:
            at.queries.answering = answering
            await peer.find(QUESTION)
            with pytest.raises(AssociationAborted):
                await peer.receive()
        await until(lambda: at.operations.running == {})
        at.queries.answering = lambda asked: _success()
        async with at.peer() as peer:
            await peer.find(QUESTION)
            assert (await peer.final())[1].command.status == 0x0000
    assert [line["error_type"] for line in log_watch.named("task_crashed")] == ["ZeroDivisionError"]
    assert len(at.operations.recent_failures) == 1


async def _success() -> AsyncIterator[Answer]:
    yield Answer(0x0000)


@pytest.mark.parametrize("how", ["abort", "release", "lost"])
async def test_association_that_ends_cancels_its_queries(log_watch: LogWatch, how: str) -> None:
    """Whichever way the workstation goes, the query stops and is logged as lost."""

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        yield Answer(0xFF00, ROW)
        await asyncio.Event().wait()

    async def leave(association: Association) -> None:
        if how == "abort":
            association.abort()
        elif how == "release":
            await association.release(SECONDS)
        else:
            association.protocol.close_now()

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION)
        await peer.receive()
        await leave(peer.association)
        await within(at.queries.closed.wait())
        await until(lambda: at.operations.running == {})
    (line,) = log_watch.named("query")
    assert line.get("status") is None


async def test_workstation_that_does_not_read_is_let_go() -> None:
    """Answers wait for the socket; a peer that takes none for the stall deadline is aborted."""
    many = 0

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        nonlocal many
        for many in range(100_000):  # noqa: B007  (read by the test)
            yield Answer(0xFF00, bytes(100_000))

    async with serving() as at:
        async with at.peer() as peer:
            at.queries.answering = answering
            peer.association.protocol.pause()
            await peer.find(QUESTION)
            last = -1
            while last != many or not many:  # until back-pressure has stopped it
                last = many
                for _ in range(200):
                    await asyncio.sleep(0)
            assert many < 1000
            peer.association.protocol.resume()
            peer.association.abort()
        await within(at.queries.closed.wait())


async def test_idle_association_is_ended(log_watch: LogWatch) -> None:
    """A peer that asks nothing for long is aborted, with a line for it."""
    async with serving(idle_seconds=SHORT) as at, at.peer() as peer:
        with pytest.raises(AssociationAborted):
            await peer.receive()
    (line,) = log_watch.named("association_idle")
    assert line["calling_ae_title"] == "READING1"


async def test_association_with_a_query_under_way_is_not_idle() -> None:
    """It waits for us: only afterwards it may be ended."""
    gate = asyncio.Event()

    async def answering(_asked: dict[str, Any]) -> AsyncIterator[Answer]:
        await gate.wait()
        yield Answer(0x0000)

    async with serving(idle_seconds=30.0) as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(QUESTION)
        await until(lambda: bool(at.queries.asked))
        time_passes(31)
        with pytest.raises(AssociationTimeout):
            await peer.association.receive(SHORT)
        gate.set()
        assert (await peer.receive()).command.status == 0x0000


@pytest.mark.parametrize(
    ("field", "sop_class", "calling"),
    [
        (CommandField.C_GET_RQ, STUDY_FIND, "READING1"),
        (CommandField.C_MOVE_RQ, STUDY_FIND, "READING1"),
        (CommandField.C_FIND_RQ, STUDY_MOVE, "READING1"),
        (CommandField.C_ECHO_RQ, STUDY_FIND, "READING1"),
        (CommandField.C_FIND_RQ, VERIFICATION, "MODALITY"),
        (CommandField.N_ACTION_RQ, CT, "NORTHPACS"),
        (CommandField.C_FIND_RQ, CT, "NORTHPACS"),
    ],
)
async def test_operation_that_its_context_does_not_have(
    log_watch: LogWatch, field: CommandField, sop_class: str, calling: str
) -> None:
    """Unrecognized operation (0211), logged; the association goes on."""
    async with serving() as at, at.peer(calling) as peer:
        await peer.send(field, sop_class, QUESTION if field != CommandField.C_ECHO_RQ else None)
        command = (await peer.receive()).command
        assert (command.status, command.field) == (0x0211, field | 0x8000)
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION, message_id=2)
        assert (await peer.receive()).command.status == 0x0000
        assert at.queries.asked == []
    (line,) = log_watch.named("operation_refused")
    assert (line["abstract_syntax_uid"], line["calling_ae_title"]) == (sop_class, calling)


async def test_responses_that_answer_nothing_are_ignored() -> None:
    """We asked nothing on this association."""
    async with serving() as at, at.peer() as peer:
        asked = request(CommandField.C_FIND_RQ, STUDY_FIND, 3, data_set=False)
        await peer.association.send(peer.context(STUDY_FIND), response(asked, 0x0000))
        await peer.send(CommandField.C_ECHO_RQ, VERIFICATION)
        assert (await peer.receive()).command.field == CommandField.C_ECHO_RQ | 0x8000


async def test_one_line_and_one_count_for_each_query(log_watch: LogWatch) -> None:
    """Who asked what, how it ended and how long it took; nothing that was asked for."""

    async def answering(asked: dict[str, Any]) -> AsyncIterator[Answer]:
        summary = asked["summary"]
        summary.query_level = "STUDY"
        summary.local_matches, summary.remote_matches = 2, 3
        summary.sources, summary.failed_sources = ("north",), ("south",)
        yield Answer(0x0000)

    async with serving() as at, at.peer() as peer:
        at.queries.answering = answering
        await peer.find(Identifier.decode(QUESTION.encode(EXPLICIT), EXPLICIT))
        await peer.final()
        await until(lambda: len(log_watch.named("query")) == 1)
        operation_id = at.queries.asked[0]["operation_id"]
    (line,) = log_watch.named("query")
    assert (line["operation_id"], line["root"], line["query_level"]) == (
        operation_id,
        "study",
        "STUDY",
    )
    assert (line["matches"], line["local_matches"], line["remote_matches"]) == (5, 2, 3)
    assert (line["sources"], line["missing"]) == (["north"], ["south"])
    assert (line["status"], line["caller_ae_title"]) == ("0x0000", "READING1")
    assert line["duration_seconds"] >= 0


async def test_worklist_is_not_served() -> None:
    """A service that is not ours is not accepted, so that nobody waits for it in vain."""
    async with (
        serving() as at,
        at.peer("MODALITY", contexts=[MODALITY_WORKLIST, VERIFICATION]) as peer,
    ):
        assert MODALITY_WORKLIST not in peer.accepted
