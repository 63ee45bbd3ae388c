"""A query is local first, remote besides, ends as the local PACS ended it, and leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    INSTANCE_AVAILABILITY,
    RETRIEVE_AE_TITLE,
    SERIES_INSTANCE_UID,
    SPECIFIC_CHARACTER_SET,
    STUDY_INSTANCE_UID,
    Root,
)
from dicomproxy.ports import Failure, LocalAnswer, Location, SourceError, SourceQuery
from dicomproxy.query import coordinator as module
from dicomproxy.query import merge
from dicomproxy.query.coordinator import Answer, Answers, QueryCoordinator, QuerySummary
from tests.query.builders import (
    EXPLICIT,
    STUDY_ROOT_FIND,
    RecordedAudit,
    RememberedLocations,
    ScriptedLocal,
    ScriptedSource,
    caller,
    identifier,
    study_row,
)
from tests.sentinel import PATIENT_ID, PATIENT_NAME
from tests.support.log_watch import LogWatch

PATIENT_QUERY = {"QueryRetrieveLevel": "STUDY", "PatientID": PATIENT_ID, "StudyInstanceUID": ""}
NAME = 0x00100010


def never() -> asyncio.Event:
    return asyncio.Event()


class Bench:
    """A coordinator among scripted peers."""

    def __init__(
        self,
        local: ScriptedLocal,
        *sources: ScriptedSource,
        locations: RememberedLocations | None = None,
        local_query_timeout_seconds: float = 10.0,
        cached: Callable[[str], bool] = lambda _study: False,
    ) -> None:
        self.audit = RecordedAudit()
        self.locations = locations or RememberedLocations()
        self.summary = QuerySummary()
        self.coordinator = QueryCoordinator(
            local,
            {source.name: source for source in sources},
            self.locations,
            self.audit,
            local_query_timeout_seconds,
            cached,
        )

    def batches(
        self, charset: str = "", caller_changes: dict[str, Any] | None = None, **keys: Any
    ) -> AsyncGenerator[Answers, None]:
        asked = identifier(charset, **(keys or PATIENT_QUERY))
        return self.coordinator.find(
            sop_class_uid=STUDY_ROOT_FIND,
            root=Root.STUDY,
            transfer_syntax_uid=EXPLICIT,
            data=asked.encode(EXPLICIT),
            caller=caller(**(caller_changes or {})),
            operation_id="op1",
            local_calling_ae_title="READING1",
            summary=self.summary,
        )

    async def find(self, **asked: Any) -> AsyncGenerator[Answer, None]:
        async with aclosing(self.batches(**asked)) as batches:
            async for batch in batches:
                for answer in batch:
                    yield answer

    async def answers(self, **asked: Any) -> list[Answer]:
        async with asyncio.timeout(60), aclosing(self.find(**asked)) as found:
            return [answer async for answer in found]


@asynccontextmanager
async def bench(*args: Any, **kwargs: Any) -> AsyncIterator[Bench]:
    made = Bench(*args, **kwargs)
    try:
        yield made
    finally:
        await made.coordinator.close()


def rows(answers: list[Answer]) -> list[Identifier]:
    return [Identifier.decode(answer.data, EXPLICIT) for answer in answers if answer.pending]


def uids(answers: list[Answer], tag: int = STUDY_INSTANCE_UID) -> list[str]:
    return [row.text(tag) for row in rows(answers)]


# ------------------------------------------------------------------- merging


async def test_local_rows_arrive_before_any_source_has_answered() -> None:
    """A source held back until the local row is out cannot have delayed it."""
    gate = asyncio.Event()
    north = ScriptedSource("north", gate, study_row("1.2"))
    async with (
        bench(ScriptedLocal(study_row("1.1")), north) as it,
        asyncio.timeout(60),
        aclosing(it.find()) as found,
    ):
        first = await anext(found)
        gate.set()
        rest = [answer async for answer in found]
    assert uids([first]) == ["1.1"]
    assert uids(rest) == ["1.2"]
    assert rest[-1].status == 0x0000


async def test_the_first_row_goes_alone_and_the_rest_together() -> None:
    """Nobody waits for the first row to be joined by others; later ones cost one sending."""
    local = ScriptedLocal(*(study_row(f"1.1.{number}") for number in range(5)))
    north = ScriptedSource("north", *(study_row(f"1.2.{number}") for number in range(4)))
    async with bench(local, north) as it, asyncio.timeout(60), aclosing(it.batches()) as found:
        batches = [batch async for batch in found]
    assert [len(batch) for batch in batches] == [1, 4, 4, 1]
    assert uids(list(batches[0] + batches[1])) == [f"1.1.{number}" for number in range(5)]
    assert uids(list(batches[2])) == [f"1.2.{number}" for number in range(4)]


@pytest.mark.parametrize("long", [False, True])
async def test_a_batch_is_bounded(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows and by bytes: what is held for one sending does not grow with the answer."""
    monkeypatch.setattr(module, "_BATCH_ROWS", 100 if long else 3)
    monkeypatch.setattr(module, "_BATCH_BYTES", 1 if long else 10**6)
    north = ScriptedSource("north", *(study_row(f"1.2.{number}") for number in range(9)))
    async with bench(ScriptedLocal(), north) as it, aclosing(it.batches()) as found:
        sizes = [len(batch) async for batch in found]
    assert sum(sizes) == 9 + 1
    assert max(sizes) == (1 if long else 3)


async def test_disclosures_are_written_while_the_local_archive_still_answers() -> None:
    """The record of sources that have ended does not wait for the rest, and is made once."""
    gate = asyncio.Event()
    north = ScriptedSource("north", study_row("1.2"))
    local = ScriptedLocal(study_row("1.1"), gate)
    async with bench(local, north) as it, asyncio.timeout(60), asyncio.TaskGroup() as group:
        asking = group.create_task(it.answers(), name="ask")
        await it.audit.recorded.wait()
        assert it.audit.outcomes() == {"north": "success"}
        assert not asking.done()
        gate.set()
        assert (await asking)[-1].status == 0x0000
        assert len(it.audit.events) == 1


async def test_a_local_archive_without_an_end_does_not_withhold_the_final_response(
    monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """Behind its own timers stands ours: what came is kept, and C001 ends the query."""
    monkeypatch.setattr(module, "_LOCAL_SILENCE_SECONDS", 0.05)
    local = ScriptedLocal(study_row("1.1"), never())
    north = ScriptedSource("north", study_row("1.2"))
    async with bench(local, north, local_query_timeout_seconds=0.01) as it:
        answers = await it.answers()
    assert sorted(uids(answers)) == ["1.1", "1.2"]
    assert answers[-1].status == 0xC001
    assert local.ended == ["closed"]
    assert [entry["failure"] for entry in log_watch.named("local_query_failed")] == ["timeout"]


async def test_an_audit_trail_that_hangs_does_not_withhold_the_final_response(
    monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """It is waited for up to a deadline, then the query ends and the log says so."""
    monkeypatch.setattr(module, "_AUDIT_SECONDS", 0.01)
    async with bench(ScriptedLocal(), ScriptedSource("north", study_row("1.2"))) as it:
        it.audit.hangs = True
        answers = await it.answers()
    assert [answer.status for answer in answers] == [0xFF00, 0x0000]
    assert [entry["reason"] for entry in log_watch.named("audit_failed")] == ["timeout"]


async def test_local_rows_do_not_wait_for_the_memory_of_locations() -> None:
    """A state store that does not answer delays the sources, not the local PACS."""
    gate = asyncio.Event()
    locations = RememberedLocations()
    locations.looking_up = gate.wait
    series = identifier(StudyInstanceUID="1.1", SeriesInstanceUID="1.1.1")
    async with bench(ScriptedLocal(series), ScriptedSource("north"), locations=locations) as it:
        keys = {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.1"}
        async with asyncio.timeout(60), aclosing(it.find(**keys)) as found:
            first = await anext(found)
            gate.set()
            await anext(found)
    assert uids([first]) == ["1.1"]


async def test_remote_rows_wait_for_the_local_final_response() -> None:
    """Of a study held twice the local row is the one, even if the source was quicker."""
    north = ScriptedSource("north", study_row("1.1", StudyID="north"))
    local = ScriptedLocal(north.over, study_row("1.1", StudyID="local"))
    async with bench(local, north) as it:
        answers = await it.answers()
    assert [row.text(0x00200010) for row in rows(answers)] == ["local"]
    assert it.locations.holders("1.1") == {"local", "north"}
    assert it.summary.duplicates == 1


async def test_a_silent_local_archive_holds_remote_rows_for_its_timeout_only() -> None:
    """After local.query_timeout remote rows flow; local ones may still follow."""
    gate = asyncio.Event()
    local = ScriptedLocal(gate, study_row("1.1"), study_row("1.2", StudyID="late"))
    north = ScriptedSource("north", study_row("1.2"))
    async with (
        bench(local, north, local_query_timeout_seconds=0.05) as it,
        asyncio.timeout(60),
        aclosing(it.find()) as found,
    ):
        first = await anext(found)
        gate.set()
        rest = [answer async for answer in found]
    assert uids([first, *rest]) == ["1.2", "1.1"]
    assert rest[-1].status == 0x0000


async def test_sources_give_each_study_once_and_are_all_remembered() -> None:
    """The first source to answer gives the row; both are known as holders."""
    first_has_answered = asyncio.Event()

    async def answered() -> None:
        first_has_answered.set()

    south = ScriptedSource("south", study_row("1.2", StudyID="south"), answered)
    north = ScriptedSource("north", first_has_answered, study_row("1.2", StudyID="north"))
    async with bench(ScriptedLocal(first_has_answered), north, south) as it:
        answers = await it.answers(**PATIENT_QUERY, StudyID="")
    assert [row.text(0x00200010) for row in rows(answers)] == ["south"]
    assert it.locations.holders("1.2") == {"north", "south"}
    assert it.locations.known["1.2", "north"].patient_id == PATIENT_ID


@pytest.mark.parametrize(("cached", "shown"), [(True, "ONLINE"), (False, "NEARLINE")])
async def test_remote_rows_say_whence_and_how_soon(cached: bool, shown: str) -> None:
    """Remote rows are retrieved from the called title; what is cached is online."""
    north = ScriptedSource("north", study_row("1.2", RetrieveAETitle="NORTHPACS"))
    async with bench(ScriptedLocal(), north, cached=lambda study: cached and study == "1.2") as it:
        (row,) = rows(await it.answers())
    assert row.text(RETRIEVE_AE_TITLE) == "DICOMPROXY"
    assert row.text(INSTANCE_AVAILABILITY) == shown


async def test_each_answer_is_decoded_with_its_own_character_set() -> None:
    """Sources may each use another character set; the answer uses one that fits."""
    north = ScriptedSource("north", study_row("1.2", charset="ISO_IR 100", PatientName="Grün^A"))
    south = ScriptedSource("south", study_row("1.3", charset="ISO_IR 144", PatientName="Люкс^Б"))
    plain = study_row("1.4", PatientName="PLAIN^C")
    local = ScriptedLocal(plain)
    async with bench(local, north, south) as it:
        answers = await it.answers(charset="ISO_IR 100", **PATIENT_QUERY, PatientName="")
    found = {row.text(STUDY_INSTANCE_UID): row for row in rows(answers)}
    assert {uid: row.text(NAME) for uid, row in found.items()} == {
        "1.2": "Grün^A",
        "1.3": "Люкс^Б",
        "1.4": "PLAIN^C",
    }
    assert found["1.2"].values(SPECIFIC_CHARACTER_SET) == ("ISO_IR 100",)
    assert found["1.3"].values(SPECIFIC_CHARACTER_SET) == ("ISO_IR 192",)
    assert SPECIFIC_CHARACTER_SET not in found["1.4"]


async def test_local_bytes_and_final_status_are_relayed() -> None:
    """The local PACS is asked in the workstation's words, and quoted in its own."""
    row = study_row("1.1", PatientName=PATIENT_NAME)
    final = LocalAnswer(0xA700, error_comment="tape robot jammed")
    local = ScriptedLocal(row, final=final)
    async with bench(local, ScriptedSource("north", study_row("1.2"))) as it:
        answers = await it.answers()
    assert answers[0] == Answer(0xFF00, row.encode(EXPLICIT))
    assert uids(answers) == ["1.1", "1.2"]
    assert answers[-1] == Answer(0xA700, error_comment="tape robot jammed")
    asked = identifier(**PATIENT_QUERY).encode(EXPLICIT)
    assert local.asked == [(STUDY_ROOT_FIND, EXPLICIT, asked, "READING1")]


async def test_many_local_rows_wait_for_a_slow_workstation() -> None:
    """Local rows are held back, not stored, while nobody takes them."""
    local = ScriptedLocal(*(study_row(f"1.{number}") for number in range(500)))
    async with bench(local) as it, asyncio.timeout(60), aclosing(it.find()) as found:
        first = await anext(found)
        for _ in range(50):
            await asyncio.sleep(0)
        assert local.ended == []
        rest = [answer async for answer in found]
    assert uids([first, *rest]) == [f"1.{number}" for number in range(500)]
    assert it.summary.local_matches == 500


# ------------------------------------------------------------------ failures


async def test_a_silent_source_costs_the_budget_and_nothing_else(log_watch: LogWatch) -> None:
    """The query ends with Success within its budget; the silence is reported."""
    north = ScriptedSource("north", never())
    south = ScriptedSource("south", study_row("1.3"))
    async with bench(ScriptedLocal(study_row("1.1")), north, south) as it:
        answers = await it.answers(caller_changes={"query_budget_seconds": 0.1})
    assert uids(answers) == ["1.1", "1.3"]
    assert answers[-1].status == 0x0000
    (line,) = log_watch.named("source_query_failed")
    assert (line["source"], line["failure"]) == ("north", "timeout")
    assert it.audit.outcomes() == {"north": "failure", "south": "success"}
    assert it.summary.failed_sources == ("north",)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (SourceError("north", Failure.UNREACHABLE), "unreachable"),
        (SourceError("north", Failure.STATUS, 0xA700), "status"),
        (SourceError("north", Failure.ABORTED), "aborted"),
        (ValueError(PATIENT_NAME), "protocol_error"),
        (TimeoutError(), "timeout"),
    ],
)
async def test_a_failing_source_is_reported_and_fails_nobody_else(
    error: Exception, failure: str, log_watch: LogWatch
) -> None:
    """What a source gave before it failed counts; the query ends as the local PACS ended it."""
    north = ScriptedSource("north", study_row("1.2"), error)
    south = ScriptedSource("south", study_row("1.3"))
    async with bench(ScriptedLocal(study_row("1.1")), north, south) as it:
        answers = await it.answers()
    assert sorted(uids(answers)) == ["1.1", "1.2", "1.3"]
    assert answers[-1].status == 0x0000
    (line,) = log_watch.named("source_query_failed")
    assert (line["source"], line["failure"]) == ("north", failure)
    assert it.audit.outcomes() == {"north": "partial", "south": "success"}


async def test_an_open_breaker_discloses_nothing() -> None:
    """A source that was not asked is a failure in the log, and none in the audit."""
    north = ScriptedSource("north", SourceError("north", Failure.BREAKER))
    async with bench(ScriptedLocal(), north) as it:
        await it.answers()
    assert it.audit.events == []
    assert it.summary.failed_sources == ("north",)


async def test_what_was_asked_before_the_breaker_opened_is_recorded() -> None:
    """Of several questions to one source the first had left the house."""
    north = ScriptedSource("north")

    async def once(query: SourceQuery) -> AsyncIterator[Identifier]:
        north.asked.append(query)
        if len(north.asked) > 1:
            raise SourceError("north", Failure.BREAKER)
        return
        yield  # pragma: no cover

    north.find = once  # type: ignore[method-assign]
    keys = {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.1\\1.2", "SeriesInstanceUID": ""}
    async with bench(ScriptedLocal(), north) as it:
        await it.answers(**keys)
    assert len(north.asked) == 2
    assert list(it.audit.outcomes()) == ["north"]


@pytest.mark.parametrize(
    "script",
    [
        (SourceError("local", Failure.UNREACHABLE),),
        (study_row("1.1"), SourceError("local", Failure.ABORTED)),
        (ValueError(PATIENT_NAME),),
    ],
)
async def test_without_the_local_archive_remote_rows_come_and_then_c001(
    script: tuple[Any, ...], log_watch: LogWatch
) -> None:
    """A dead local PACS does not hide what others hold, nor is it a success."""
    async with bench(ScriptedLocal(*script), ScriptedSource("north", study_row("1.2"))) as it:
        answers = await it.answers()
    assert uids(answers)[-1] == "1.2"
    assert answers[-1].status == 0xC001
    assert not answers[-1].data
    assert len(log_watch.named("local_query_failed")) == 1
    assert it.summary.local_failed


async def test_what_comes_late_serves_the_next_query(log_watch: LogWatch) -> None:
    """A source that misses the budget is still listened to, and its studies are located."""
    gate = asyncio.Event()
    north = ScriptedSource("north", gate, study_row("1.2"))
    async with bench(ScriptedLocal(), north) as it:
        answers = await it.answers(caller_changes={"query_budget_seconds": 0.05})
        assert uids(answers) == []
        gate.set()
        async with asyncio.timeout(60):
            await it.coordinator.wait_idle()
        assert it.locations.holders("1.2") == {"north"}
    assert north.ended == ["finished"]
    assert [line["source"] for line in log_watch.named("source_query_late")] == ["north"]
    assert len(it.audit.events) == 1


async def test_late_legs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond their number a late leg is ended, so that silence cannot pile up."""
    monkeypatch.setattr(module, "_MAX_LATE_LEGS", 1)
    north, south = ScriptedSource("north", never()), ScriptedSource("south", never())
    async with bench(ScriptedLocal(), north, south) as it:
        await it.answers(caller_changes={"query_budget_seconds": 0.05})
        assert (north.ended, south.ended) == ([], ["closed"])
    assert north.ended == ["closed"]


async def test_an_answer_that_never_ends_is_capped(
    monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """A source that pours out rows is cut off, and that is logged."""
    monkeypatch.setattr(merge, "MAX_ROWS_PER_SOURCE", 1000)
    north = ScriptedSource("north", *(study_row(f"1.{number}") for number in range(1500)), never())
    async with bench(ScriptedLocal(), north) as it:
        answers = await it.answers()
    assert len(uids(answers)) == 1000
    assert north.ended == ["closed"]
    assert [line["reason"] for line in log_watch.named("source_rows_dropped")] == ["too_many"]


# -------------------------------------------------------------------- cancel


async def test_cancelling_ends_every_leg() -> None:
    """Closing the answer closes the local leg and every source leg, and records it."""
    local = ScriptedLocal(study_row("1.1"), never())
    north, south = ScriptedSource("north", never()), ScriptedSource("south", never())
    async with bench(local, north, south) as it:
        async with asyncio.timeout(60), aclosing(it.find()) as found:
            await anext(found)
            await north.reached.wait()
            await south.reached.wait()
        assert local.ended == north.ended == south.ended == ["closed"]
        assert len(it.coordinator._tasks) == 0
    assert it.audit.outcomes() == {"north": "cancelled", "south": "cancelled"}


async def test_a_cancelled_task_ends_every_leg() -> None:
    """An association that is lost while nothing arrives leaves nothing running."""
    local = ScriptedLocal(never())
    north = ScriptedSource("north", never())
    async with bench(local, north) as it:

        async def serve() -> None:
            await it.answers()

        task = asyncio.create_task(serve())
        async with asyncio.timeout(60):
            await local.reached.wait()
            await north.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert local.ended == north.ended == ["closed"]
        assert len(it.coordinator._tasks) == 0


async def test_a_query_cancelled_twice_ends_every_leg_and_is_recorded() -> None:
    """A C-CANCEL with the end of the association right behind it hides no disclosure."""
    local, north = ScriptedLocal(never()), ScriptedSource("north", never())
    async with bench(local, north) as it:
        task = asyncio.create_task(it.answers())
        async with asyncio.timeout(60):
            await local.reached.wait()
            await north.reached.wait()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await it.coordinator.wait_idle()
        assert local.ended == north.ended == ["closed"]
    assert it.audit.outcomes() == {"north": "cancelled"}


# ------------------------------------------------------------------ identity


async def test_rows_about_another_patient_are_withheld(log_watch: LogWatch) -> None:
    """An archive that ignores Patient ID cannot show somebody else's studies."""
    nobody = identifier(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.4")
    north = ScriptedSource("north", study_row("1.2"), study_row("1.3", patient="OTHER"), nobody)
    async with bench(ScriptedLocal(), north) as it:
        answers = await it.answers()
    assert uids(answers) == ["1.2"]
    assert it.summary.withheld == 2
    assert it.locations.holders("1.3") == it.locations.holders("1.4") == set()
    (line,) = log_watch.named("source_rows_dropped")
    assert (line["reason"], line["dropped"]) == ("withheld", 2)


async def test_a_study_under_two_patients_is_a_conflict(log_watch: LogWatch) -> None:
    """A source that knows the local study under another patient is no holder of it."""
    north = ScriptedSource("north", study_row("1.1", patient="OTHER"))
    async with bench(ScriptedLocal(north.reached, study_row("1.1")), north) as it:
        keys = {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1.1", "PatientID": ""}
        answers = await it.answers(**keys)
    assert uids(answers) == ["1.1"]
    assert it.locations.holders("1.1") == {"local"}
    (line,) = log_watch.named("identity_conflict")
    assert (line["source"], line["study_instance_uid"]) == ("north", "1.1")


# ------------------------------------------------------------------- routing


async def test_series_go_to_holders_and_are_united() -> None:
    """A study held in two places shows the series of both, each once; others are not asked."""

    def series(uid: str) -> Identifier:
        return identifier(StudyInstanceUID="1.1", SeriesInstanceUID=uid)

    north = ScriptedSource("north", series("1.1.1"), series("1.1.2"))
    south = ScriptedSource("south", series("1.1.3"))
    locations = RememberedLocations(
        Location("1.1", "local", PATIENT_ID), Location("1.1", "north", PATIENT_ID)
    )
    local = ScriptedLocal(series("1.1.1"))
    async with bench(local, north, south, locations=locations) as it:
        keys = {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.1", "SeriesInstanceUID": ""}
        answers = await it.answers(**keys)
    assert uids(answers, SERIES_INSTANCE_UID) == ["1.1.1", "1.1.2"]
    assert south.asked == []
    assert it.locations.known["1.1", "north"].patient_id == PATIENT_ID


async def test_a_failing_memory_of_locations_only_widens_the_search(log_watch: LogWatch) -> None:
    """Without locations every visible source is asked, as for a study never seen."""

    async def broken() -> None:
        raise OSError

    locations = RememberedLocations(Location("1.1", "north", PATIENT_ID))
    locations.looking_up = broken
    north, south = ScriptedSource("north"), ScriptedSource("south")
    async with bench(ScriptedLocal(), north, south, locations=locations) as it:
        answers = await it.answers(QueryRetrieveLevel="SERIES", StudyInstanceUID="1.1")
    assert len(north.asked) == len(south.asked) == 1
    assert answers[-1].status == 0x0000
    assert len(log_watch.named("locations_unavailable")) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"QueryRetrieveLevel": "STUDY", "PatientName": PATIENT_NAME},
        {"QueryRetrieveLevel": "STUDY", "PatientID": "*"},
        {"QueryRetrieveLevel": "STUDY", "AccessionNumber": "A1"},
        {"QueryRetrieveLevel": "STUDY"},
        {"QueryRetrieveLevel": "SERIES", "PatientID": PATIENT_ID},
    ],
)
async def test_the_region_does_not_see_broad_queries(keys: dict[str, str]) -> None:
    """By name, by pattern, empty: the local PACS answers alone, and nothing is recorded."""
    north = ScriptedSource("north", study_row("1.2"))
    async with bench(ScriptedLocal(study_row("1.1")), north) as it:
        answers = await it.answers(**keys)
    assert uids(answers) == ["1.1"]
    assert north.asked == []
    assert it.audit.events == []
    assert it.summary.local_only


async def test_what_leaves_the_house_is_recorded_before_the_final_response() -> None:
    """Who asked, about whom, whom, and with what result: on record when the query ends."""
    async with (
        bench(ScriptedLocal(), ScriptedSource("north", study_row("1.2"))) as it,
        asyncio.timeout(60),
        aclosing(it.find()) as found,
    ):
        async for answer in found:
            if not answer.pending:
                (event,) = it.audit.events
    assert (event.event, event.outcome, event.source) == ("query", "success", "north")
    assert (event.caller_ae_title, event.peer_address) == ("READING1", "127.0.0.1")
    assert (event.patient_id, event.level, event.root) == (PATIENT_ID, "STUDY", "study")
    assert event.operation_id == "op1"
    assert event.extra["matches"] == 1


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("data", "status", "offending"),
    [
        (identifier(PatientID=PATIENT_ID).encode(EXPLICIT), 0xA900, (0x00080052,)),
        (identifier(QueryRetrieveLevel="PATIENT").encode(EXPLICIT), 0xA900, (0x00080052,)),
        (identifier(QueryRetrieveLevel="SERIE").encode(EXPLICIT), 0xA900, (0x00080052,)),
        (b"\x01\x02\x03", 0xC000, ()),
    ],
)
async def test_what_cannot_be_answered_is_refused_without_asking_anybody(
    data: bytes, status: int, offending: tuple[int, ...]
) -> None:
    """A wrong level or an unreadable identifier is answered by one final response."""
    local, north = ScriptedLocal(), ScriptedSource("north")
    async with bench(local, north) as it:
        found = it.coordinator.find(
            sop_class_uid=STUDY_ROOT_FIND,
            root=Root.STUDY,
            transfer_syntax_uid=EXPLICIT,
            data=data,
            caller=caller(),
            operation_id="op1",
            local_calling_ae_title="READING1",
        )
        batches = [batch async for batch in found]
    assert [(answer.status, answer.offending_element) for (answer,) in batches] == [
        (status, offending)
    ]
    assert local.asked == []
    assert north.asked == []
