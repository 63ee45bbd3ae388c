"""C-FIND at a source: the right question, every answer, and one word for each way to fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    STUDY_INSTANCE_UID,
    Level,
)
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import CommandField
from dicomproxy.dimse.errors import AssociationAborted, AssociationReleased
from dicomproxy.dimse.layer import Limits
from dicomproxy.dimse.negotiation import UNCOMPRESSED
from dicomproxy.dimse.pdu import REJECT_CALLED, REJECT_LIMIT, AssociateReject, AssociateRequest
from dicomproxy.dimse.pool import Lease, Purpose
from dicomproxy.ports import Failure, SourceError, SourceQuery
from dicomproxy.sources import archive
from dicomproxy.sources.archive import PATIENT_ROOT_FIND, STUDY_ROOT_FIND
from dicomproxy.sources.dimse import DimseSource
from tests.dimse_edge.harness import until
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID as SENTINEL_ID
from tests.sources.support import (
    SHORT,
    Arrived,
    archive_at,
    asking,
    first,
    keys,
    row,
    study,
    within,
)
from tests.support.log_watch import LogWatch
from tests.support.stand_in import (
    SECONDS,
    StandIn,
    answers,
    cancelled,
    only,
    send_final,
    send_pending,
)
from tests.support.time_passes import time_passes

BOTH = (PATIENT_ROOT_FIND, STUDY_ROOT_FIND)


def finds(*roots: str) -> Any:
    return only(dict.fromkeys(roots, UNCOMPRESSED))


# ---------------------------------------------------------------- the question


@pytest.mark.parametrize(
    ("level", "offered", "study_root_only", "asked", "asked_level"),
    [
        (Level.PATIENT, BOTH, False, PATIENT_ROOT_FIND, "PATIENT"),
        (Level.PATIENT, BOTH, True, STUDY_ROOT_FIND, "STUDY"),
        (Level.PATIENT, (STUDY_ROOT_FIND,), False, STUDY_ROOT_FIND, "STUDY"),
        (Level.PATIENT, (PATIENT_ROOT_FIND,), False, PATIENT_ROOT_FIND, "PATIENT"),
        (Level.STUDY, BOTH, False, STUDY_ROOT_FIND, "STUDY"),
        (Level.SERIES, BOTH, False, STUDY_ROOT_FIND, "SERIES"),
        (Level.IMAGE, BOTH, True, STUDY_ROOT_FIND, "IMAGE"),
        (Level.STUDY, (PATIENT_ROOT_FIND,), False, PATIENT_ROOT_FIND, "STUDY"),
        (Level.IMAGE, (PATIENT_ROOT_FIND,), False, PATIENT_ROOT_FIND, "IMAGE"),
    ],
)
async def test_question_fits_the_information_model_at_hand(
    level: Level, offered: tuple[str, ...], study_root_only: bool, asked: str, asked_level: str
) -> None:
    """Study Root below the patient, Patient Root for patients, the other if need be."""
    peer = StandIn(answers(), supported=finds(*offered))
    async with asking(peer, study_root_only=study_root_only) as at:
        query = SourceQuery(level, keys(patient=SENTINEL_ID))
        assert await at.find(query) == []
    (message,) = peer.messages
    (identifier,) = peer.identifiers()
    assert message.context.abstract_syntax == asked
    assert message.command.affected_sop_class_uid == asked
    assert identifier.text(QUERY_RETRIEVE_LEVEL) == asked_level
    assert identifier.text(PATIENT_ID) == SENTINEL_ID
    # Answers per study are told apart by their study.
    translated = level is Level.PATIENT and asked == STUDY_ROOT_FIND
    assert (STUDY_INSTANCE_UID in identifier) is translated
    # The caller's own identifier is not touched.
    assert QUERY_RETRIEVE_LEVEL not in query.identifier


@pytest.mark.parametrize(
    ("offered", "study_root_only", "patient"),
    [
        ((), False, SENTINEL_ID),
        ((PATIENT_ROOT_FIND,), True, SENTINEL_ID),
        ((PATIENT_ROOT_FIND,), False, ""),
    ],
)
async def test_question_that_no_model_can_ask(
    offered: tuple[str, ...], study_root_only: bool, patient: str
) -> None:
    """Without a usable context nothing is asked, and the breaker stays shut: it is alive."""
    peer = StandIn(answers(), supported=finds(*offered))
    async with asking(peer, study_root_only=study_root_only, breaker_failures=1) as at:
        with pytest.raises(SourceError) as caught:
            await at.find(SourceQuery(Level.STUDY, keys(study="1.2.3", patient=patient)))
        assert caught.value.failure is Failure.NO_CONTEXT
        assert at.archive.health().breaker == "closed"
        assert peer.messages == []


async def test_studies_become_one_row_for_each_patient() -> None:
    """Asked for studies instead of patients, it still gives each patient once, at PATIENT level."""
    rows = [row("1.1", "A"), row("1.2", "B"), row("1.3", "A"), row("1.4", "B")]
    peer = StandIn(answers(*rows), supported=finds(STUDY_ROOT_FIND))
    async with asking(peer) as at:
        found = await at.find(SourceQuery(Level.PATIENT, keys(patient=SENTINEL_ID)))
    assert [one.text(PATIENT_ID) for one in found] == ["A", "B"]
    assert {one.text(QUERY_RETRIEVE_LEVEL) for one in found} == {"PATIENT"}


async def test_matches_are_yielded_as_they_arrive() -> None:
    """A row is there before the next one is sent."""
    gate = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, row("1.1"))
        await gate.wait()
        await answers(row("1.2"))(association, message)

    async with asking(StandIn(handle)) as at, aclosing(at.source.find(study())) as rows:
        assert (await first(rows)).text(STUDY_INSTANCE_UID) == "1.1"
        gate.set()
        assert [one.text(STUDY_INSTANCE_UID) async for one in rows] == ["1.2"]


# ------------------------------------------------------------ cap and cancel


@pytest.mark.parametrize(("maximum", "asked", "given"), [(3, None, 3), (3, 5, 5), (9, 2, 2)])
async def test_answers_are_capped_and_the_archive_told_to_stop(
    log_watch: LogWatch, maximum: int, asked: int | None, given: int
) -> None:
    """After so many rows C-CANCEL is sent and logged, and the association serves again."""

    async def handle(association: Association, message: Message) -> None:
        for number in range(given):
            await send_pending(association, message, row(f"1.{number}"))
        await cancelled(association, message)

    async with asking(StandIn(handle), max_matches=maximum) as at:
        assert len(await at.find(study(max_matches=asked))) == given
        await until(lambda: at.archive.pool.idle == 1)
        assert at.archive.health().breaker == "closed"
    (line,) = log_watch.named("source_matches_capped")
    assert (line["source"], line["maximum"]) == ("north", given)


async def test_giving_up_sends_c_cancel() -> None:
    """Whoever stops listening cancels at the archive; its association is not lost."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, row("1.1"))
        await cancelled(association, message)
        seen.set()

    async with asking(StandIn(handle)) as at:
        async with aclosing(at.source.find(study())) as rows:
            await first(rows)
        await within(seen.wait())
        await until(lambda: at.archive.pool.idle == 1)


async def test_cancelled_while_waiting_sends_c_cancel() -> None:
    """A task that is cancelled in the middle of a query leaves a clean association."""
    asked, seen = asyncio.Event(), asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        asked.set()
        await cancelled(association, message)
        seen.set()

    async with asking(StandIn(handle)) as at:
        task = asyncio.create_task(at.find())
        await within(asked.wait())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await within(seen.wait())
        await until(lambda: at.archive.pool.idle == 1)


# ------------------------------------------------------------------- failures


@pytest.mark.parametrize("status", [0x0110, 0x0122, 0xA700, 0xA900, 0xC000, 0xC123, 0xFE00, 0xB000])
async def test_final_status_other_than_success_is_a_failure(status: int) -> None:
    """The rows before it hold; the archive answered, so that it counts as alive."""
    async with asking(StandIn(answers(row("1.1"), final=status)), breaker_failures=1) as at:
        async with aclosing(at.source.find(study())) as rows:
            assert (await first(rows)).text(STUDY_INSTANCE_UID) == "1.1"
            with pytest.raises(SourceError) as caught:
                await first(rows)
        assert (caught.value.failure, caught.value.status) == (Failure.STATUS, status)
        health = at.archive.health()
        assert (health.breaker, health.last_failure, health.idle) == ("closed", "", 1)


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (b"\x10\x00\x20\x00LO\x40\x00no", None),
        (b"\x08", None),
        (b"\x10\x00\x20\x00LO\x00\x10" + b"A" * 4096, Limits(max_identifier_bytes=4096)),
    ],
    ids=["cut_value", "cut_tag", "over_the_limit"],
)
async def test_identifier_that_cannot_be_read(data: bytes, limits: Limits | None) -> None:
    """Garbage is a protocol error of this query, which is cancelled; nothing else breaks."""

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, data)
        await cancelled(association, message)

    async with asking(StandIn(handle), limits=limits) as at:
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.PROTOCOL
        await until(lambda: at.archive.pool.idle == 1)


async def reject_transiently(_request: AssociateRequest) -> AssociateReject | None:
    return REJECT_LIMIT


async def reject_for_good(_request: AssociateRequest) -> AssociateReject | None:
    return REJECT_CALLED


@pytest.mark.parametrize(
    ("admit", "failure", "detail", "breaker"),
    [
        (reject_transiently, Failure.BUSY, "local limit exceeded", "closed"),
        (reject_for_good, Failure.REJECTED, "called AE title not recognized", "open"),
    ],
)
async def test_rejection(admit: Any, failure: Failure, detail: str, breaker: str) -> None:
    """A transient rejection says that it is busy, not that it is broken; reasons come in words."""
    async with asking(StandIn(admit=admit), breaker_failures=1) as at:
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is failure
        assert detail in caught.value.detail
        health = at.archive.health()
        assert (health.breaker, health.last_failure) == (breaker, str(failure))
        assert [one[1:] for one in at.archive.recent_failures] == [("find", str(failure))]


async def test_nobody_listening() -> None:
    """A refused connection is told apart from a refusing archive."""
    async with archive_at(free_port()) as archive:
        with pytest.raises(SourceError) as caught:
            async with aclosing(DimseSource(archive, Arrived()).find(study())) as rows:
                await first(rows)
        assert caught.value.failure is Failure.UNREACHABLE


@pytest.mark.parametrize("rows_before", [0, 1])
async def test_silent_archive_costs_its_deadline_and_is_told_to_stop(rows_before: int) -> None:
    """The deadline is for the query as a whole; the archive sees a C-CANCEL."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        for number in range(rows_before):
            await send_pending(association, message, row(f"1.{number}"))
        time_passes(31)
        await cancelled(association, message)
        seen.set()

    async with asking(StandIn(handle), query_timeout=30.0, breaker_failures=1) as at:
        with pytest.raises(SourceError) as caught:
            async with aclosing(at.source.find(study())) as rows:
                for _ in range(rows_before):
                    await first(rows)
                await first(rows)
        assert (caught.value.failure, caught.value.detail) == (Failure.TIMEOUT, "response")
        await within(seen.wait())
        assert at.archive.health().breaker == "open"


async def test_archive_that_answers_no_association_request() -> None:
    """Waiting for the association is part of the query's deadline."""
    hold = asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        await hold.wait()
        return None

    async with asking(StandIn(admit=admit), query_timeout=SHORT) as at:
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.TIMEOUT
        hold.set()


async def test_archive_that_answers_something_else() -> None:
    """A response to another message is no answer: the association is aborted."""

    async def handle(association: Association, message: Message) -> None:
        message.command.elements[0x0110] += 1  # Message ID
        await send_final(association, message)

    async with asking(StandIn(handle)) as at:
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.PROTOCOL
        assert isinstance(await at.peer.end(), AssociationAborted)
        assert at.archive.pool.idle == 0


# --------------------------------------------------------- dead associations


async def test_association_that_died_in_the_pool_is_replaced() -> None:
    """What the peer ended while nobody looked costs a second association, not the query."""
    first_one: list[Association] = []

    async def handle(association: Association, message: Message) -> None:
        first_one.append(association)
        if len(first_one) > 1 and association is first_one[0]:
            association.abort()  # it dies at the very moment of the next request
            return
        await answers(row("1.1"))(association, message)

    async with asking(StandIn(handle), breaker_failures=1) as at:
        assert len(await at.find()) == 1
        assert len(await at.find()) == 1
        assert len(at.peer.associations) == 2
        assert at.archive.health().breaker == "closed"


async def test_several_that_died_in_the_pool_cost_one_more_association() -> None:
    """The second try does not take another idle one, which is likely to be as dead."""
    gate, asked = asyncio.Event(), asyncio.Semaphore(0)
    pooled: list[Association] = []
    dying = False

    async def handle(association: Association, message: Message) -> None:
        if dying and association in pooled:
            association.abort()
            return
        pooled.append(association)
        asked.release()
        await gate.wait()
        await answers(row("1.1"))(association, message)

    async with asking(StandIn(handle), parallel_associations=4) as at:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(at.find())
            for _ in range(3):
                await within(asked.acquire())
            gate.set()
        assert at.archive.pool.idle == 3
        dying = True
        assert len(await at.find()) == 1
        assert len(at.peer.associations) == 4


@pytest.mark.parametrize("rows_before", [0, 1])
async def test_fresh_or_answering_association_that_breaks_is_a_failure(rows_before: int) -> None:
    """Only a dead one is replaced: a question is not asked twice of an archive that aborts it."""

    async def handle(association: Association, message: Message) -> None:
        if len(at.peer.messages) == 1 and rows_before:
            await answers()(association, message)  # so that the next one is reused
            return
        for number in range(rows_before):
            await send_pending(association, message, row(f"1.{number}"))
        association.abort()

    async with asking(StandIn(handle)) as at:
        if rows_before:
            await at.find()
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.ABORTED
        assert len(at.peer.associations) == 1


async def test_released_by_the_archive_is_noticed_at_once() -> None:
    """An idle association that the archive released is not even tried."""
    async with asking(StandIn(answers())) as at:
        await at.find()
        (association,) = at.peer.associations
        await association.release(5.0)
        assert isinstance(await at.peer.end(), AssociationReleased)
        await at.find()
        assert len(at.peer.associations) == 2


# -------------------------------------------------------------------- breaker


async def test_breaker_opens_half_opens_and_closes(
    log_watch: LogWatch,
) -> None:
    """After failures in a row the archive is left alone; after the pause one query tries it."""
    now = [0.0]
    broken = True

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        return REJECT_CALLED if broken else None

    peer = StandIn(answers(row("1.1")), admit=admit)
    async with asking(peer, breaker_failures=2, breaker_pause=30.0) as at:
        at.archive.breaker._clock = lambda: now[0]
        for _ in range(2):
            with pytest.raises(SourceError):
                await at.find()
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.BREAKER
        assert len(peer.requests) == 2
        now[0] = 31.0
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.REJECTED
        assert at.archive.health().breaker == "open"
        broken = False
        now[0] = 62.0
        assert len(await at.find()) == 1
        assert at.archive.health().breaker == "closed"
    states = [line["state"] for line in log_watch.named("source_breaker")]
    assert states == ["open", "half_open", "open", "half_open", "closed"]


@pytest.mark.parametrize("well", [True, False], ids=["well_again", "still_down"])
async def test_who_asks_during_a_probe_hears_what_it_finds(well: bool) -> None:
    """Several ask at once after an outage: one tries, and its outcome holds for all."""
    now = [0.0]
    broken = True
    gate, knocked = asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        if now[0]:
            knocked.set()
            await gate.wait()
        return REJECT_CALLED if broken else None

    peer = StandIn(answers(row("1.1")), admit=admit)
    async with asking(peer, breaker_failures=1, breaker_pause=30.0) as at:
        at.archive.breaker._clock = lambda: now[0]
        with pytest.raises(SourceError):
            await at.find()
        now[0], broken = 31.0, not well
        probe = asyncio.create_task(at.find())
        await within(knocked.wait())
        others = [asyncio.create_task(at.find()) for _ in range(3)]
        await asyncio.sleep(0)
        assert len(peer.requests) == 2
        gate.set()
        outcomes = await within(asyncio.gather(probe, *others, return_exceptions=True))
        if well:
            assert [len(rows) for rows in outcomes] == [1, 1, 1, 1]
        else:
            failures = [error.failure for error in outcomes]
            assert failures == [Failure.REJECTED, *[Failure.BREAKER] * 3]
            assert len(peer.requests) == 2


async def test_somebody_who_waits_may_probe_an_open_breaker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interactive query is tried although the breaker is open, one at a time.

    Somebody else waits for what it finds, a query that nobody waits for not for long.
    """
    monkeypatch.setattr(archive, "_PROBE_SECONDS", 0.05)
    broken = True
    gate, asked = asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        return REJECT_CALLED if broken else None

    async def handle(association: Association, message: Message) -> None:
        asked.set()
        await gate.wait()
        await answers(row("1.1"))(association, message)

    async with asking(StandIn(handle, admit=admit), breaker_failures=1) as at:
        with pytest.raises(SourceError):
            await at.find()
        broken = False
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.BREAKER
        probe = asyncio.create_task(at.find(study(interactive=True)))
        await within(asked.wait())
        with pytest.raises(SourceError) as caught:
            await at.find()
        assert caught.value.failure is Failure.BREAKER
        waiting = asyncio.create_task(at.find(study(interactive=True)))
        await asyncio.sleep(0)
        gate.set()
        assert len(await within(probe)) == 1
        assert len(await within(waiting)) == 1
        assert len(await at.find()) == 1


async def test_a_probe_that_fails_fails_for_all_who_waited_for_it() -> None:
    """They are not tried one after the other, each with its own deadline."""
    peer, gate, asked = StandIn(answers()), asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        if len(peer.requests) > 1:
            asked.set()
            await gate.wait()
        return REJECT_CALLED

    peer.admit = admit
    async with asking(peer, breaker_failures=1) as at:
        with pytest.raises(SourceError):
            await at.find()
        probe = asyncio.create_task(at.find(study(interactive=True)))
        await within(asked.wait())
        waiting = [asyncio.create_task(at.find(study(interactive=True))) for _ in range(3)]
        await asyncio.sleep(0)
        gate.set()
        for task, failure in [(probe, Failure.REJECTED), *((w, Failure.BREAKER) for w in waiting)]:
            with pytest.raises(SourceError) as caught:
                await within(task)
            assert caught.value.failure is failure
        assert len(peer.requests) == 2


async def test_probe_given_up_leaves_the_breaker_to_the_next() -> None:
    """A probe that was cancelled before any answer neither closes the breaker nor blocks it."""
    broken = True
    hold, asked = asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        return REJECT_CALLED if broken else None

    async def handle(association: Association, message: Message) -> None:
        asked.set()
        if not hold.is_set():
            await cancelled(association, message)
            hold.set()
            return
        await answers()(association, message)

    async with asking(StandIn(handle, admit=admit), breaker_failures=1) as at:
        with pytest.raises(SourceError):
            await at.find()
        broken = False
        probe = asyncio.create_task(at.find(study(interactive=True)))
        await within(asked.wait())
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        await within(hold.wait())
        assert at.archive.health().breaker == "open"
        assert await at.find(study(interactive=True)) == []
        assert at.archive.health().breaker == "closed"


async def test_probe_given_up_after_an_answer_closes_the_breaker() -> None:
    """Whoever has seen a row has seen that the archive is alive."""
    broken = True

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        return REJECT_CALLED if broken else None

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, row("1.1"))
        await cancelled(association, message)

    async with asking(StandIn(handle, admit=admit), breaker_failures=1) as at:
        with pytest.raises(SourceError):
            await at.find()
        broken = False
        async with aclosing(at.source.find(study(interactive=True))) as rows:
            await first(rows)
        assert at.archive.health().breaker == "closed"


async def test_waiting_in_vain_for_a_turn_says_nothing_of_the_archive() -> None:
    """All associations are in use for a retrieve that goes well: the breaker stays shut."""
    async with asking(
        StandIn(answers(row("1.1"))),
        parallel_associations=1,
        query_timeout=30.0,
        breaker_failures=1,
    ) as at:
        lease = await at.archive.pool.lease(Purpose.RETRIEVE, timeout_seconds=SECONDS)
        asking_ = asyncio.create_task(at.find())
        await until(lambda: bool(at.archive.pool._waiters))
        time_passes(31)
        with pytest.raises(SourceError) as caught:
            await within(asking_)
        assert caught.value.failure is Failure.BUSY
        assert at.archive.health().breaker == "closed"
        lease.done()
        assert len(await at.find()) == 1


async def test_who_gives_up_what_began_before_an_outage_lets_no_second_probe_in() -> None:
    """One at a time finds out whether the archive is well, whatever else ends meanwhile."""
    broken = False
    gate, asked, began = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        return REJECT_CALLED if broken else None

    async def handle(association: Association, message: Message) -> None:
        if not began.is_set():
            began.set()
            await cancelled(association, message)
            return
        asked.set()
        await gate.wait()
        await answers(row("1.1"))(association, message)

    peer = StandIn(handle, admit=admit)
    async with asking(peer, breaker_failures=1) as at:
        before = asyncio.create_task(at.find())
        await within(began.wait())
        broken = True
        with pytest.raises(SourceError):
            await at.find()
        broken = False
        probe = asyncio.create_task(at.find(study(interactive=True)))
        await within(asked.wait())
        before.cancel()
        with pytest.raises(asyncio.CancelledError):
            await before
        assert at.archive.breaker.probing
        gate.set()
        assert len(await within(probe)) == 1


async def test_question_that_cannot_be_put_costs_no_association() -> None:
    """A fault of ours while a request is made leaves its slot to the next."""

    def choose(_lease: Lease) -> Any:
        raise ValueError

    async with asking(StandIn(answers(row("1.1"))), parallel_associations=1) as at:
        asked = at.archive.ask(
            "find",
            choose,
            purpose=Purpose.QUERY,
            probe=False,
            lease_seconds=5.0,
            left_seconds=lambda: 5.0,
        )
        with pytest.raises(ValueError):
            await first(asked)
        assert at.archive.pool.in_use == 0
        assert len(await at.find()) == 1


async def test_health_tells_of_success() -> None:
    """What the status page shows: when it last answered, how fast, how many associations."""
    async with asking(StandIn(answers()), parallel_associations=3) as at:
        assert at.archive.health().last_success_at == 0.0
        await at.find()
        health = at.archive.health()
        assert health.last_success_at > 0
        assert len(health.latencies) == 1
        assert (health.in_use, health.idle, health.ceiling) == (0, 1, 3)
        assert at.peer.commands[0].field == CommandField.C_FIND_RQ


async def test_distance_is_the_quickest_of_all_answers() -> None:
    """An association that came about slowly does not make a near archive a far one."""

    async def admit(_request: AssociateRequest) -> AssociateReject | None:
        await asyncio.sleep(0.5)
        return None

    async with asking(StandIn(answers(row("1.1")), admit=admit)) as at:
        await at.find()
        slow = at.archive.pool._round_trips[0]
        assert slow >= 0.5
        for _ in range(3):
            await at.find()
        assert 0 < at.archive.pool.round_trip_seconds < slow
