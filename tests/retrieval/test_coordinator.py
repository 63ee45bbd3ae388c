"""Retrieves from request to final status, over ports in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import Level, Root
from dicomproxy.ports import (
    LOCAL,
    Delivered,
    DestinationError,
    Failure,
    Location,
    RetrieveOrder,
    RetrieveProgress,
    SourceError,
    SourceQuery,
)
from dicomproxy.retrieval import flights, orders
from dicomproxy.retrieval import relay as relay_module
from dicomproxy.retrieval.coordinator import RetrieveCoordinator, RetrieveOutcome, RetrieveRequest
from dicomproxy.retrieval.holder import Holder
from dicomproxy.retrieval.operation import RetrieveOperation
from dicomproxy.retrieval.selection import Selection
from dicomproxy.retrieval.subscription import FlightOutcome, FlightRequest
from tests.retrieval.fakes import (
    CT,
    STUDY,
    Archive,
    Lease,
    Study,
    Workstation,
    World,
    image_request,
    series_request,
    study,
    study_request,
)
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch

SECONDS = 60


@pytest.fixture
async def build() -> AsyncIterator[Callable[..., World]]:
    """Make worlds that are closed, and checked for leaks, at the end."""
    worlds: list[World] = []

    def make(*sources: Archive, **more: object) -> World:
        world = World(*sources, **more)  # type: ignore[arg-type]
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        await world.close()


async def run(operation: RetrieveOperation) -> RetrieveOutcome:
    async with asyncio.timeout(SECONDS):
        return await operation.run()


async def settle() -> None:
    """Let every task run until it waits for something that the test controls."""
    for _ in range(300):
        await asyncio.sleep(0)
    # Admission takes place in threads.
    await asyncio.to_thread(lambda: None)
    for _ in range(300):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(operation: RetrieveOperation) -> AsyncIterator[asyncio.Task[RetrieveOutcome]]:
    async with asyncio.TaskGroup() as group:
        yield group.create_task(run(operation))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (what fakes count has no event)
            await asyncio.sleep(0)


Build = Callable[..., World]


async def test_remote_study_is_fetched_and_delivered(build: Build) -> None:
    """Every instance arrives once, the status is Success, and the disclosure is on record."""
    held = study(3, 2)
    north = Archive("north", held)
    world, workstation = build(north), Workstation()
    world.know(north)
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=5)
    assert sorted(workstation.received) == sorted(held.instances)
    assert [order.level for order in north.orders] == [Level.STUDY]
    assert workstation.opened == workstation.closed == 1
    assert world.store.studies[STUDY].complete
    [event] = world.audit.events
    assert (event.event, event.outcome, event.source) == ("disclosure", "success", "north")
    assert (event.instances, event.failed, event.patient_id) == (5, 0, PATIENT_ID)


async def test_second_retrieve_fetches_nothing(build: Build) -> None:
    """A cached study is delivered from the cache, after its manifest was asked for again."""
    north = Archive("north", study(4))
    world = build(north)
    world.know(north)
    await run(world.operation(Workstation()))
    asked, workstation = len(north.queries), Workstation()
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=4)
    assert len(north.orders) == 1
    assert len(north.queries) > asked
    assert (world.store.hits, world.store.misses) == (4, 4)
    assert len(workstation.received) == 4


async def test_twenty_at_the_same_moment_fetch_each_instance_once(build: Build) -> None:
    """Twenty workstations opening one study make it leave its source once."""
    north = Archive("north", study(5, 5))
    world = build(north)
    world.know(north)
    workstations = [Workstation() for _ in range(20)]
    outcomes = await asyncio.gather(*(run(world.operation(w)) for w in workstations))
    assert outcomes == [RetrieveOutcome(0x0000, completed=10)] * 20
    assert set(north.sent.values()) == {1}
    assert len(north.sent) == 10
    assert [query.level for query in north.queries].count(Level.STUDY) == 1


@pytest.mark.parametrize("study_first", [True, False])
async def test_series_and_study_retrieves_share_what_they_fetch(
    build: Build, study_first: bool
) -> None:
    """Twenty SERIES retrieves and one STUDY retrieve make each instance leave its source once."""
    held = study(*[3] * 20, 2)
    north = Archive("north", held)
    world = build(north)
    world.know(north)
    requests = [series_request(f"{STUDY}.{number}") for number in range(1, 21)]
    requests.insert(0 if study_first else 20, study_request())
    workstations = [Workstation() for _ in requests]
    outcomes = await asyncio.gather(
        *(run(world.operation(w, r)) for w, r in zip(workstations, requests, strict=True))
    )
    assert {outcome.status for outcome in outcomes} == {0}
    assert sorted(outcome.completed for outcome in outcomes) == [3] * 20 + [62]
    assert set(north.sent.values()) == {1}
    assert len(north.sent) == 62


async def test_series_retrieve_ends_when_its_series_has_come(build: Build) -> None:
    """A SERIES retrieve does not wait for the rest of a STUDY order that brings its series."""
    north, gate = Archive("north", study(2, 2)), asyncio.Event()
    north.gate = lambda uid: gate if uid.startswith(f"{STUDY}.2.") else None
    world = build(north)
    world.know(north)
    async with running(world.operation(Workstation())) as whole:
        await until(lambda: len(north.sent) == 2)
        await settle()
        outcome = await run(world.operation(Workstation(), series_request(f"{STUDY}.1")))
        assert outcome == RetrieveOutcome(0x0000, completed=2)
        assert not whole.done()
        gate.set()
    assert whole.result().completed == 4
    assert set(north.sent.values()) == {1}
    # One who comes a moment later is served by the same manifest.
    assert [query.level for query in north.queries].count(Level.STUDY) == 1


async def test_instances_are_delivered_while_others_still_arrive(build: Build) -> None:
    """The first instance reaches the workstation before the source has sent the last."""
    north, gate = Archive("north", study(3)), asyncio.Event()
    north.gate = lambda uid: gate if uid.endswith(".3") else None
    world, workstation = build(north), Workstation()
    world.know(north)
    operation = world.operation(workstation)
    async with running(operation):
        await until(lambda: len(workstation.received) == 2)
        assert (operation.counts.completed, operation.counts.remaining) == (2, 1)
        gate.set()
    assert operation.bytes > 0


async def test_slow_workstation_does_not_hold_up_the_source(build: Build) -> None:
    """The whole study is fetched although its only delivery has not moved."""
    north = Archive("north", study(6))
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.gate = asyncio.Event()
    async with running(world.operation(workstation)) as task:
        await until(lambda: len(north.sent) == 6)
        assert workstation.received == []
        workstation.gate.set()
    assert task.result().completed == 6


async def test_image_retrieve_asks_for_its_instances_only(build: Build) -> None:
    """Instances named one by one are asked for by list."""
    north = Archive("north", study(4))
    world, workstation = build(north), Workstation()
    world.know(north)
    wanted = (f"{STUDY}.1.2", f"{STUDY}.1.4")
    outcome = await run(world.operation(workstation, image_request(f"{STUDY}.1", *wanted)))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert sorted(north.sent) == list(wanted)
    assert not world.store.studies[STUDY].complete


async def test_cancel_finishes_the_instance_under_way(build: Build) -> None:
    """C-CANCEL lets the instance in flight end, cancels at the source, and answers FE00."""
    north, gate = Archive("north", study(4)), asyncio.Event()
    north.gate = lambda uid: gate if uid.endswith(".4") else None
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.gate = asyncio.Event()
    operation = world.operation(workstation)
    async with running(operation) as task:
        await workstation.waiting.wait()
        await until(lambda: operation.counts.remaining == 4)
        operation.cancel()
        await settle()
        assert not task.done()
        workstation.gate.set()
    outcome = task.result()
    assert (outcome.status, outcome.completed, outcome.remaining) == (0xFE00, 1, 3)
    assert north.cancelled == 1
    assert world.audit.events[0].outcome == "cancelled"


async def test_cancel_while_locating(build: Build) -> None:
    """A C-CANCEL before anything is found ends the search."""
    north = Archive("north", study(1))
    north.find_gate = asyncio.Event()
    world = build(north)
    operation = world.operation(Workstation())
    async with running(operation) as task:
        await until(lambda: bool(north.queries))
        operation.cancel()
    assert task.result().status == 0xFE00


async def test_only_the_last_leaver_ends_a_flight(build: Build) -> None:
    """A retrieve that goes away leaves the others' fetching alone; the last takes it along."""
    north, gate = Archive("north", study(3)), asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north)
    world.know(north)
    first, second = world.operation(Workstation()), world.operation(Workstation())
    async with running(first) as one, running(second) as two:
        await until(lambda: bool(north.orders))
        await settle()
        first.cancel()
        await settle()
        assert one.done()
        assert north.cancelled == 0
        second.cancel()
        await settle()
        assert two.done()
        assert north.cancelled == 1


async def test_lost_association_leaves_the_flight(build: Build) -> None:
    """Cancelling the task of an operation cleans up and still records what was disclosed."""
    north, gate = Archive("north", study(3)), asyncio.Event()
    north.gate = lambda uid: gate if uid.endswith(".3") else None
    world, workstation = build(north), Workstation()
    world.know(north)
    task = asyncio.create_task(world.operation(workstation).run())
    await until(lambda: len(workstation.received) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (north.cancelled, workstation.closed, len(world.flights)) == (1, 1, 0)
    [event] = world.audit.events
    assert (event.outcome, event.instances) == ("cancelled", 2)


async def test_abandoned_flight_is_finished_where_wanted(build: Build) -> None:
    """With finish_abandoned, what nobody waits for any more still fills the cache."""
    north, gate = Archive("north", study(3)), asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north, finish_abandoned=True)
    world.know(north)
    operation = world.operation(Workstation())
    async with running(operation):
        await until(lambda: bool(north.orders))
        operation.cancel()
    gate.set()
    await until(lambda: len(world.flights) == 0)
    await settle()
    assert north.cancelled == 0
    assert world.store.studies[STUDY].complete


async def test_what_one_holder_lacks_is_asked_of_the_next(
    build: Build, log_watch: LogWatch
) -> None:
    """A source that stalls mid-study is given up for the next holder, for what is missing."""
    north, south = Archive("north", study(4)), Archive("south", study(4))
    north.stall_after, gate = [2], asyncio.Event()
    north.gate = lambda uid: gate
    world, workstation = build(north, south), Workstation()
    world.know(north, south)
    async with running(world.operation(workstation)) as task:
        await until(lambda: any(query.level is Level.IMAGE for query in north.queries))
        await settle()
        gate.set()
    outcome = task.result()
    assert outcome == RetrieveOutcome(0x0000, completed=4)
    assert sorted(south.sent) == [f"{STUDY}.1.3", f"{STUDY}.1.4"]
    assert len(north.orders) == 1
    [line] = log_watch.named("flight_incomplete")
    assert (line["source"], line["failure"], line["missing"]) == ("north", "timeout", 2)


async def test_study_held_in_two_places_is_united(build: Build) -> None:
    """What only the second holder lists is delivered too, and nothing travels twice."""
    part = Study(series={f"{STUDY}.1": [f"{STUDY}.1.1"]})
    north, south = Archive("north", part), Archive("south", study(2, 1))
    world, workstation = build(north, south), Workstation()
    world.know(north, south)
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert sorted(south.sent) == [f"{STUDY}.1.2", f"{STUDY}.2.1"]


async def test_second_attempt_asks_for_what_is_missing(build: Build) -> None:
    """With one holder, what it failed to send is asked for once more, and no more than that."""
    north = Archive("north", study(4))
    north.stall_after = [3]
    world = build(north)
    world.know(north)
    outcome = await run(world.operation(Workstation()))
    assert outcome == RetrieveOutcome(0x0000, completed=4)
    assert [order.level for order in north.orders] == [Level.STUDY, Level.IMAGE]
    assert north.orders[1].sop_instance_uids == (f"{STUDY}.1.4",)


async def test_undelivered_instances_are_failed_and_listed(
    build: Build, log_watch: LogWatch
) -> None:
    """After two attempts the rest is Failed by name, and the source is left alone for a while."""
    north = Archive("north", study(3))
    north.withheld = {f"{STUDY}.1.2"}
    world = build(north)
    world.know(north)
    outcome = await run(world.operation(Workstation()))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xB000, 2, 1)
    assert outcome.failed_sop_instance_uids == (f"{STUDY}.1.2",)
    assert len(north.orders) == 2
    assert log_watch.named("flight_incomplete")
    again = await run(world.operation(Workstation()))
    assert again.failed_sop_instance_uids == (f"{STUDY}.1.2",)
    assert (again.status, again.completed) == (0xB000, 2)
    assert len(north.orders) == 2
    assert world.audit.events[0].outcome == "partial"


async def test_instance_that_comes_after_all_was_given_up_is_counted_once(build: Build) -> None:
    """What a dead source had still sent is delivered, and is not among the failed as well."""
    held = study(3)
    north, late = Archive("north", held), f"{STUDY}.1.2"
    north.withheld = {late}
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.gate = asyncio.Event()
    async with running(world.operation(workstation)) as task:
        await until(lambda: len(north.orders) == 2)
        await settle()
        assert await north.send(held, f"{STUDY}.1", late) == 0x0000
        workstation.gate.set()
    outcome = task.result()
    assert late in workstation.received
    assert (outcome.completed, outcome.failed) == (3, 0)
    assert outcome.failed_sop_instance_uids == ()


async def test_failed_study_is_asked_for_again_after_the_pause(build: Build) -> None:
    """The pause ends; then the source may be asked again."""
    north = Archive("north", study(3))
    north.withheld = {f"{STUDY}.1.2"}
    world = build(north, pause=0.0)
    world.know(north)
    await run(world.operation(Workstation()))
    north.withheld = set()
    outcome = await run(world.operation(Workstation()))
    assert outcome == RetrieveOutcome(0x0000, completed=3)


async def test_refused_uid_list_falls_back_to_the_series(build: Build) -> None:
    """An archive that takes no UID lists is asked for the series instead."""
    held = study(3)
    north = Archive("north", held)
    north.refused_levels = {Level.IMAGE}
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(held, "north", held.instances[:1], complete=False)
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed) == (0x0000, 3)
    assert [order.level for order in north.orders] == [Level.IMAGE, Level.SERIES] or [
        order.level for order in north.orders
    ] == [Level.IMAGE, Level.STUDY]


@pytest.mark.parametrize("level", [Level.STUDY, Level.SERIES, Level.IMAGE])
@pytest.mark.parametrize("failure", [Failure.STATUS, Failure.NO_CONTEXT])
async def test_source_that_lists_nothing_is_believed_if_its_count_is_right(
    build: Build, log_watch: LogWatch, level: Level, failure: Failure
) -> None:
    """Without a manifest, Success with the right count completes a study, and that is logged."""
    north = Archive("north", study(2, 1))
    north.fail(level, failure, 0x0122)
    world, workstation = build(north), Workstation()
    world.know(north)
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert len(log_watch.named("manifest_unverified")) == 1


async def test_source_that_lists_nothing_and_miscounts_is_not_believed(build: Build) -> None:
    """Without a manifest, a count that does not match what came is no Success."""
    north = Archive("north", study(2))
    north.fail(Level.IMAGE, Failure.STATUS, 0xA900)
    north.completed_lie = 3
    world = build(north)
    world.know(north)
    outcome = await run(world.operation(Workstation()))
    assert (outcome.status, outcome.completed) == (0xB000, 2)


async def test_only_the_growth_of_a_cached_study_travels(build: Build) -> None:
    """A study that has grown since is completed with what is new."""
    held = study(3)
    north = Archive("north", held)
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(held, "north", held.instances[:2])
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert list(north.sent) == [f"{STUDY}.1.3"]


async def test_instances_that_the_source_dropped_leave_the_cache(build: Build) -> None:
    """A study that has shrunk loses in the cache what its source lists no more."""
    world_study, smaller = study(3), study(2)
    north = Archive("north", smaller)
    world = build(north)
    world.know(north)
    world.store.put(world_study, "north")
    await run(world.operation(Workstation()))
    assert sorted(world.store.studies[STUDY].instances) == smaller.instances
    outcome = await run(world.operation(Workstation()))
    assert outcome == RetrieveOutcome(0x0000, completed=2)


async def test_recent_study_is_asked_about_again_at_the_end(build: Build) -> None:
    """What was added to a new study while it was fetched is delivered as well."""
    held = study(2, study_date="20261124")
    north, gate = Archive("north", held), asyncio.Event()
    north.gate = lambda uid: gate if uid.endswith(".2") else None
    world, workstation = build(north), Workstation()
    world.know(north)
    async with running(world.operation(workstation)) as task:
        await until(lambda: len(workstation.received) == 1)
        await settle()
        held.series[f"{STUDY}.1"].append(f"{STUDY}.1.9")
        gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=3)
    assert f"{STUDY}.1.9" in workstation.received


async def test_cached_study_of_another_patient_is_dropped(
    build: Build, log_watch: LogWatch
) -> None:
    """If the source files the study under another patient now, the cached one is not delivered."""
    before, after = study(2, patient_id="OTHER1"), study(2)
    north = Archive("north", after)
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(before, "north")
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert world.store.dropped == [STUDY]
    assert len(north.sent) == 2
    assert log_watch.named("identity_conflict")


async def test_study_that_changed_its_patient_unnoticed_is_not_delivered(
    build: Build, log_watch: LogWatch
) -> None:
    """Where the manifest names another patient than the memory does, the study is dropped."""
    north = Archive("north", study(2))
    world, workstation = build(north), Workstation()
    world.memory.remember([Location(STUDY, "north", "OTHER1")])
    outcome = await run(world.operation(workstation))
    assert outcome.status == 0xA702
    assert workstation.received == []
    assert world.store.dropped == [STUDY]
    assert log_watch.named("identity_conflict")
    again = await run(world.operation(workstation))
    assert again == RetrieveOutcome(0x0000, completed=2)


@pytest.mark.parametrize(
    ("header", "reason"),
    [({"study": "1.9.9"}, "other_study"), ({"patient": "OTHER1"}, "other_patient")],
)
async def test_foreign_instance_is_failed_not_delivered(
    build: Build, log_watch: LogWatch, header: dict[str, str], reason: str
) -> None:
    """An instance whose header names another study or patient never reaches the workstation."""
    north = Archive("north", study(3))
    north.headers[f"{STUDY}.1.2"] = header
    world, workstation = build(north), Workstation()
    world.know(north)
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xB000, 2, 1)
    assert outcome.failed_sop_instance_uids == (f"{STUDY}.1.2",)
    assert f"{STUDY}.1.2" not in workstation.received
    assert north.sent[f"{STUDY}.1.2"] == 1
    assert {line["reason"] for line in log_watch.named("identity_conflict")} == {reason}


async def test_empty_patient_id_in_a_header_is_tolerated(build: Build) -> None:
    """An instance that names no patient is not one of another patient."""
    north = Archive("north", study(2))
    north.headers[f"{STUDY}.1.2"] = {"patient": ""}
    world = build(north)
    world.know(north)
    assert (await run(world.operation(Workstation()))).completed == 2


async def test_cached_study_is_delivered_while_its_source_is_down(
    build: Build, log_watch: LogWatch
) -> None:
    """A whole study in the cache needs no source; that it was not verified is logged."""
    held = study(3)
    north = Archive("north", held)
    north.down()
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(held, "north")
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert log_watch.named("manifest_unverified")
    assert north.orders == []


async def test_partly_cached_study_is_not_taken_for_a_whole_one(build: Build) -> None:
    """With the source down, a part is delivered, but as a part."""
    held = study(3)
    north = Archive("north", held)
    north.down()
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(held, "north", held.instances[:2], complete=False)
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed) == (0xB000, 2)


async def test_unreachable_holder_is_no_success(build: Build) -> None:
    """Nothing cached and nobody to ask: the number of matches cannot be told."""
    north = Archive("north", study(3))
    north.down()
    world = build(north)
    world.know(north)
    outcome = await run(world.operation(Workstation()))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xA701, 0, 0)
    assert world.audit.events[0].outcome == "failure"


async def test_study_that_exists_nowhere(build: Build) -> None:
    """Zero matches are a Success with no sub-operation, on record as asked for."""
    world = build(Archive("north"))
    outcome = await run(world.operation(Workstation()))
    assert outcome == RetrieveOutcome(0x0000)
    assert len(world.audit.events) == 1


async def test_unlocated_study_with_nobody_reachable(build: Build) -> None:
    """If no archive can be asked where a study is, that is not zero matches."""
    north = Archive("north")
    north.down()
    world = build(north)
    world.local.down()
    assert (await run(world.operation(Workstation()))).status == 0xA701


async def test_unlocated_study_is_located_before_it_is_retrieved(build: Build) -> None:
    """A study never seen before is found by asking everyone, and remembered."""
    south = Archive("south", study(2))
    world, workstation = build(Archive("north"), south), Workstation()
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert (STUDY, "south") in world.memory.known


async def test_study_that_moved_is_found_where_it_is(build: Build) -> None:
    """If the remembered holder has it no more, the others are asked."""
    north, south = Archive("north"), Archive("south", study(2))
    world, workstation = build(north, south), Workstation()
    world.memory.remember([Location(STUDY, "north", PATIENT_ID)])
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert (STUDY, "north") not in world.memory.known


async def test_study_whose_remembered_holder_is_down_is_looked_for_elsewhere(build: Build) -> None:
    """Somebody else may have it too, although only one was ever seen to."""
    north, south = Archive("north", study(2)), Archive("south", study(2))
    world, workstation = build(north, south), Workstation()
    world.memory.remember([Location(STUDY, "north", PATIENT_ID)])
    north.down()
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert sorted(workstation.received) == sorted(study(2).instances)


async def test_study_whose_only_holder_is_down_is_asked_of_the_others_once(build: Build) -> None:
    """Nobody else has it: there may be more than anybody can tell, which is no Success."""
    north, south = Archive("north", study(2)), Archive("south")
    world = build(north, south)
    world.memory.remember([Location(STUDY, "north", PATIENT_ID)])
    north.down()
    outcome = await run(world.operation(Workstation()))
    assert (outcome.status, outcome.completed) == (0xA701, 0)
    assert [query.level for query in south.queries] == [Level.STUDY]


@pytest.mark.parametrize("relay", [True, False])
async def test_unknown_destination_is_refused(build: Build, relay: bool) -> None:
    """A remote study for a destination that nobody knows is A801, and nothing is fetched."""
    north = Archive("north", study(2))
    world, workstation = build(north, relay=relay), Workstation()
    world.know(north)
    outcome = await run(world.operation(workstation, known=False))
    assert outcome.status == 0xA801
    assert (workstation.opened, north.orders) == (0, [])


@pytest.mark.parametrize("status", [0x0000, 0xA801])
async def test_wholly_local_study_is_left_to_the_local_pacs(build: Build, status: int) -> None:
    """Under relay the local PACS moves, names the workstation, and judges the destination."""
    local = Archive(LOCAL, study(2))
    world, workstation = build(local=local, relay=True), Workstation()
    world.know(local)
    world.local_pacs.script = [
        RetrieveProgress(remaining=1, completed=1),
        RetrieveProgress(completed=2 if status == 0 else 0, final=True, status=status),
    ]
    outcome = await run(world.operation(workstation, known=False))
    assert outcome.status == status
    [(order, destination, calling, message_id)] = world.local_pacs.moves
    assert (order.level, order.study_instance_uids) == (Level.STUDY, (STUDY,))
    assert (destination, calling, message_id) == ("READING1", "READING1", 7)
    assert local.orders == []
    assert workstation.opened == 0


async def test_local_study_is_fetched_like_others_without_relay(build: Build) -> None:
    """Where the proxy delivers, the local PACS is a holder like the rest, and the first."""
    held = study(2)
    local, north = Archive(LOCAL, held), Archive("north", held)
    world, workstation = build(north, local=local), Workstation()
    world.know(local, north)
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert (len(local.sent), len(north.sent)) == (2, 0)


async def test_mixed_study_fetches_what_the_local_pacs_lacks(build: Build) -> None:
    """The local PACS sends its part, the proxy the rest, and the counts add up."""
    local = Archive(LOCAL, study(2))
    north = Archive("north", study(2, 3))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(local, north)
    world.local_pacs.script = [
        RetrieveProgress(remaining=1, completed=1),
        RetrieveProgress(completed=2, final=True, status=0),
    ]
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=5)
    assert sorted(workstation.received) == [f"{STUDY}.2.{n}" for n in (1, 2, 3)]
    assert len(north.sent) == 3
    assert {event.source for event in world.audit.events} == {LOCAL, "north"}


async def test_what_the_local_pacs_fails_to_send_is_had_from_elsewhere(build: Build) -> None:
    """An instance that the local PACS lists and fails to move comes from the next holder."""
    held = study(3)
    local, north = Archive(LOCAL, held), Archive("north", held)
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(local, north)
    lost = f"{STUDY}.1.2"
    world.local_pacs.script = [
        RetrieveProgress(
            completed=2, failed=1, final=True, status=0xB000, failed_sop_instance_uids=(lost,)
        )
    ]
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert workstation.received == [lost]


@pytest.mark.parametrize(
    ("elsewhere", "expected"),
    [
        (3, RetrieveOutcome(0x0000, completed=3)),
        (1, RetrieveOutcome(0xB000, completed=1, failed=2)),
    ],
)
async def test_local_pacs_that_breaks_off_is_stood_in_for_and_nothing_counts_twice(
    build: Build, elsewhere: int, expected: RetrieveOutcome
) -> None:
    """Which ones it sent is not known, so all come again; each is one sub-operation."""
    local, north = Archive(LOCAL, study(3)), Archive("north", study(elsewhere))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(local, north)
    world.local_pacs.script = [
        RetrieveProgress(remaining=2, completed=1),
        SourceError(LOCAL, Failure.ABORTED),
    ]
    outcome = await run(world.operation(workstation))
    assert replace(outcome, error_comment="", failed_sop_instance_uids=()) == expected
    assert len(workstation.received) == elsewhere


@pytest.mark.parametrize("failure", [Failure.UNREACHABLE, Failure.REJECTED, Failure.NO_CONTEXT])
async def test_local_pacs_that_never_began_is_stood_in_for_once(
    build: Build, failure: Failure
) -> None:
    """It has sent nothing, so nothing comes twice."""
    held = study(3)
    local, north = Archive(LOCAL, held), Archive("north", held)
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(local, north)
    world.local_pacs.script = [SourceError(LOCAL, failure)]
    assert await run(world.operation(workstation)) == RetrieveOutcome(0x0000, completed=3)
    assert sorted(workstation.received) == sorted(held.instances)


async def test_remote_part_is_delivered_while_the_local_pacs_is_down(build: Build) -> None:
    """A local PACS that cannot be reached fails its own part only."""
    local, north = Archive(LOCAL), Archive("north", study(2))
    local.down()
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north)
    world.memory.remember([Location("1.2.9", LOCAL, PATIENT_ID)])
    world.local_pacs.script = [SourceError(LOCAL, Failure.UNREACHABLE)]
    outcome = await run(world.operation(workstation, study_request(STUDY, "1.2.9")))
    assert (outcome.status, outcome.completed) == (0xB000, 2)
    alone = await run(world.operation(workstation, study_request("1.2.9")))
    assert (alone.status, alone.completed) == (0xA701, 0)


async def test_mixed_study_comes_from_the_source_while_the_local_pacs_is_down(
    build: Build,
) -> None:
    """A study also held elsewhere is delivered whole without the local PACS."""
    held = study(2)
    local, north = Archive(LOCAL, held), Archive("north", held)
    local.down()
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(local, north)
    world.local_pacs.script = [SourceError(LOCAL, Failure.UNREACHABLE)]
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)


async def test_several_studies_share_one_destination(build: Build) -> None:
    """A list of studies is delivered through one destination, each study on record."""
    north = Archive("north", study(2, uid="1.2.4"), study(3, uid="1.2.5"))
    south = Archive("south", study(1, uid="1.2.6"))
    world, workstation = build(north, south), Workstation()
    world.know(north, south)
    outcome = await run(world.operation(workstation, study_request("1.2.4", "1.2.5", "1.2.6")))
    assert outcome == RetrieveOutcome(0x0000, completed=6)
    assert (workstation.opened, workstation.closed) == (1, 1)
    assert len(world.audit.events) == 3


async def test_patient_level_retrieve_finds_the_patients_studies(build: Build) -> None:
    """A PATIENT retrieve asks local and sources for the patient's studies, exactly matched."""
    mine, other = study(2, uid="1.2.4"), study(2, uid="1.2.5", patient_id=PATIENT_ID.lower())
    local, north = Archive(LOCAL, study(1, uid="1.2.6")), Archive("north", mine, other)
    world, workstation = build(north, local=local), Workstation()
    request = RetrieveRequest(Root.PATIENT, Level.PATIENT, PATIENT_ID)
    outcome = await run(world.operation(workstation, request))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert other.instances[0] not in workstation.received


async def test_lost_destination_fails_the_rest(build: Build, log_watch: LogWatch) -> None:
    """Once the destination is gone, what is left counts as Failed and fetching stops."""
    north = Archive("north", study(3))
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.fates[f"{STUDY}.1.2"] = DestinationError(Failure.ABORTED)
    workstation.gate = asyncio.Event()
    operation = world.operation(workstation)
    async with running(operation) as task:
        await until(lambda: len(north.sent) == 3 and operation.counts.remaining == 3)
        await settle()
        workstation.gate.set()
    outcome = task.result()
    assert (outcome.status, outcome.completed, outcome.failed) == (0xB000, 1, 2)
    assert set(outcome.failed_sop_instance_uids) == {f"{STUDY}.1.2", f"{STUDY}.1.3"}
    assert len(log_watch.named("delivery_failed")) == 1


async def test_unreachable_destination_is_a702(build: Build) -> None:
    """A destination that cannot be reached at all fails every sub-operation."""
    north = Archive("north", study(2))
    world, workstation = build(north), Workstation()
    world.know(north)
    for uid in north.studies[STUDY].instances:
        workstation.fates[uid] = DestinationError(Failure.UNREACHABLE)
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xA702, 0, 2)


@pytest.mark.parametrize(
    ("fate", "status"),
    [(Delivered.WARNING, 0xB000), (Delivered.FAILED, 0xB000)],
)
async def test_outcomes_of_sub_operations_decide_the_status(
    build: Build, fate: Delivered, status: int
) -> None:
    """A warning or failure of one C-STORE makes the retrieve a warning."""
    north = Archive("north", study(2))
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.fates[f"{STUDY}.1.1"] = fate
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed) == (status, 1)
    assert outcome.warning + outcome.failed == 1


async def test_instance_without_room_is_failed(build: Build) -> None:
    """Where neither disk nor memory has room, the instance is Failed and the rest goes on."""
    north = Archive("north", study(3))
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.full_for = {f"{STUDY}.1.1"}
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xB000, 2, 1)


async def test_damaged_instance_is_fetched_again(build: Build) -> None:
    """An instance found damaged when it is to be sent is replaced and delivered."""
    held = study(3)
    north = Archive("north", held)
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(held, "north")
    world.store.damaged[held.instances[0]] = 1
    # Seen when the flight looks whose study it is; the second time at delivery.
    world.store.damaged[held.instances[1]] = 1
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert sorted(north.sent) == held.instances[:2]


async def test_instance_found_damaged_as_its_flight_ends_is_not_lost(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the store is told that it holds the whole study, one of it proves damaged."""
    held = study(3)
    north, ending, may_end = Archive("north", held), asyncio.Event(), asyncio.Event()
    world, workstation = build(north), Workstation()
    world.know(north)
    set_complete = Lease.set_complete

    async def slowly(lease: Lease, complete: bool) -> None:
        ending.set()
        await may_end.wait()
        await set_complete(lease, complete)

    monkeypatch.setattr(Lease, "set_complete", slowly)
    workstation.gate = asyncio.Event()
    async with running(world.operation(workstation)) as task:
        await until(ending.is_set)
        world.store.damaged[held.instances[2]] = 1
        workstation.gate.set()
        await until(lambda: len(workstation.received) == 2)
        await settle()
        may_end.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=3)
    assert (north.sent[held.instances[2]], sorted(workstation.received)) == (2, held.instances)


async def test_instance_damaged_twice_is_failed(build: Build) -> None:
    """It is fetched again once, not for ever."""
    held = study(2)
    north = Archive("north", held)
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(held, "north")
    world.store.damaged[held.instances[1]] = 5
    outcome = await run(world.operation(workstation))
    assert (outcome.status, outcome.completed, outcome.failed) == (0xB000, 1, 1)
    assert north.sent[held.instances[1]] == 1


async def test_cached_instances_of_invisible_sources_are_not_served(build: Build) -> None:
    """A caller gets a study from a source it may see, though the cache has another's copy."""
    held = study(2)
    north, south = Archive("north", held), Archive("south", held)
    world, workstation = build(north, south), Workstation()
    world.know(north, south)
    world.store.put(held, "north")
    outcome = await run(world.operation(workstation, caller=world.caller("south")))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert (len(south.sent), len(north.orders), north.queries) == (2, 0, [])


async def test_copy_that_differs_from_an_invisible_one_is_failed(
    build: Build, log_watch: LogWatch
) -> None:
    """If the visible copy has other content, neither is served, and the conflict is logged."""
    held = study(1)
    south = Archive("south", held)
    south.filler = "other content"
    world, workstation = build(Archive("north", held), south), Workstation()
    world.know(south)
    world.store.put(held, "north")
    outcome = await run(world.operation(workstation, caller=world.caller("south")))
    assert (outcome.status, outcome.failed) == (0xA702, 1)
    assert workstation.received == []
    assert log_watch.named("instance_conflict")


async def test_invisible_holder_is_as_good_as_none(build: Build) -> None:
    """A study held only by a source that the caller may not see does not exist for it."""
    north, south = Archive("north", study(2)), Archive("south")
    world = build(north, south)
    world.know(north)
    outcome = await run(world.operation(Workstation(), caller=world.caller("south")))
    assert outcome == RetrieveOutcome(0x0000)
    assert (north.queries, north.orders) == ([], [])


async def test_caller_that_is_a_source_is_served_from_local_alone(build: Build) -> None:
    """Two proxies facing each other cannot loop."""
    north = Archive("north", study(2))
    world = build(north)
    world.know(north)
    outcome = await run(world.operation(Workstation(), caller=world.caller(is_source=True)))
    assert outcome == RetrieveOutcome(0x0000)
    assert north.orders == []


async def test_holders_that_disagree_on_the_patient(build: Build, log_watch: LogWatch) -> None:
    """A holder that names another patient than the first one is not asked."""
    north, south = Archive("north", study(2)), Archive("south", study(3, patient_id="OTHER1"))
    world, workstation = build(north, south), Workstation()
    world.know(north, south)
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=2)
    assert south.orders == []
    assert log_watch.named("identity_conflict")


async def test_every_change_of_the_tally_is_told(build: Build) -> None:
    """The hook sees counts that only ever add up to what is known to come."""
    north = Archive("north", study(3))
    world, workstation = build(north), Workstation()
    world.know(north)
    operation = world.operation(workstation)
    seen: list[int] = []
    operation.changed = lambda: seen.append(operation.counts.completed)
    await run(operation)
    assert seen == sorted(seen)
    assert set(seen) >= {1, 2, 3}


async def test_failure_before_the_manifest_counts_as_an_attempt(build: Build) -> None:
    """What an order did not bring counts against the holder once the manifest tells what it was."""
    north = Archive("north", study(3))
    north.withheld, north.find_gate = {f"{STUDY}.1.2"}, asyncio.Event()
    world = build(north)
    world.know(north)
    async with running(world.operation(Workstation())) as task:
        await until(lambda: len(north.sent) == 2)
        await settle()
        north.find_gate.set()
    assert task.result().failed == 1
    assert [order.level for order in north.orders] == [Level.STUDY, Level.IMAGE]


async def test_grown_study_is_not_whole_while_it_is_completed(build: Build) -> None:
    """From the moment a manifest lists more than is held, the cached study is a part."""
    held = study(3)
    north, gate = Archive("north", held), asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north)
    world.know(north)
    world.store.put(held, "north", held.instances[:2])
    async with running(world.operation(Workstation())):
        await until(lambda: bool(north.orders))
        assert not world.store.studies[STUDY].complete
        gate.set()
    assert world.store.studies[STUDY].complete


async def test_nothing_more_is_ordered_for_one_that_left(build: Build) -> None:
    """A retrieve that goes away takes along what only it wanted and was not ordered yet."""
    held = study(*[1] * 12)
    north, mine, others = Archive("north", held), asyncio.Event(), asyncio.Event()
    north.gate = lambda uid: mine if uid == f"{STUDY}.1.1" else others
    world = build(north)
    world.know(north)
    whole = world.operation(Workstation())
    async with running(world.operation(Workstation(), series_request(f"{STUDY}.1"))) as series:
        await until(lambda: len(north.orders) == 1)
        async with running(whole):
            await until(lambda: len(north.orders) == 4)
            whole.cancel()
        others.set()
        await until(lambda: len(north.sent) == 3)
        await settle()
        assert len(north.orders) == 4
        mine.set()
    assert series.result() == RetrieveOutcome(0x0000, completed=1)


async def test_cancelled_request_sends_nothing_of_its_other_studies(build: Build) -> None:
    """After a C-CANCEL only the one instance under way is finished, whichever study has more."""
    north = Archive("north", study(2, uid="1.2.4"), study(2, uid="1.2.5"))
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.gate = asyncio.Event()
    operation = world.operation(workstation, study_request("1.2.4", "1.2.5"))
    async with running(operation) as task:
        await until(lambda: len(north.sent) == 4)
        await settle()
        operation.cancel()
        workstation.gate.set()
    assert task.result().status == 0xFE00
    assert len(workstation.received) == 1


async def test_cached_instances_that_the_local_pacs_sends_are_not_sent_twice(
    build: Build,
) -> None:
    """In a mixed study, what the local PACS has is left to it even where the cache has it too."""
    local, remote = Archive(LOCAL, study(2)), study(2, 1)
    north = Archive("north", remote)
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(local, north)
    world.store.put(remote, "north")
    world.local_pacs.script = [RetrieveProgress(completed=2, final=True, status=0)]
    outcome = await run(world.operation(workstation))
    assert outcome == RetrieveOutcome(0x0000, completed=3)
    assert workstation.received == [f"{STUDY}.2.1"]


async def test_damaged_instance_is_fetched_once_for_all_who_find_it(build: Build) -> None:
    """Two deliveries that stumble over the same instance have it fetched again once."""
    held = study(3)
    north, gate = Archive("north", held), asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north)
    world.know(north)
    world.store.put(held, "north")
    world.store.damaged[held.instances[2]] = 1
    workstations = [Workstation(), Workstation()]
    first, second = (world.operation(workstation) for workstation in workstations)
    async with running(first) as one, running(second) as two:
        await until(lambda: bool(north.orders))
        await settle()
        gate.set()
    assert one.result() == two.result() == RetrieveOutcome(0x0000, completed=3)
    assert dict(north.sent) == {held.instances[2]: 1}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param(
            [
                RetrieveProgress(remaining=2, completed=2),
                RetrieveProgress(
                    remaining=1,
                    completed=2,
                    failed=1,
                    final=True,
                    status=0xFE00,
                    failed_sop_instance_uids=("1.9",),
                ),
            ],
            RetrieveOutcome(0xFE00, 1, 2, 1, failed_sop_instance_uids=("1.9",)),
            id="cancels",
        ),
        pytest.param(
            [RetrieveProgress(completed=2, final=True, status=0xFE00)],
            RetrieveOutcome(0xFE00, 2, 2),
            id="leaves out what remains",
        ),
        pytest.param(
            [RetrieveProgress(final=True, status=0xFE00)],
            RetrieveOutcome(0xFE00, 3, 1),
            id="leaves out every count",
        ),
        pytest.param(
            [RetrieveProgress(completed=4, final=True, status=0x0000)],
            RetrieveOutcome(0x0000, 0, 4),
            id="had finished",
        ),
        pytest.param(
            [SourceError(LOCAL, Failure.ABORTED)], RetrieveOutcome(0xFE00, 3, 1), id="dies"
        ),
    ],
)
async def test_cancelled_local_pacs_has_the_last_word(
    build: Build, said: list[RetrieveProgress | SourceError], expected: RetrieveOutcome
) -> None:
    """It is sent a C-CANCEL, and its own final counts and failed list are passed on."""
    local = Archive(LOCAL, study(4))
    world = build(local=local, relay=True)
    world.know(local)
    pacs = world.local_pacs
    pacs.gate, pacs.once_cancelled = asyncio.Event(), said
    pacs.script = [RetrieveProgress(remaining=3, completed=1)]
    operation = world.operation(Workstation())
    async with running(operation) as task:
        await until(lambda: operation.counts.completed == 1)
        operation.cancel()
        operation.cancel()  # as a shutdown that comes on top would
    assert task.result() == expected
    assert (pacs.told_to_cancel, pacs.cancelled) == (1, 0)
    (event,) = world.audit.events
    assert (event.source, event.instances) == (LOCAL, expected.completed)


async def test_local_pacs_that_ignores_a_cancel_is_not_waited_for_long(
    build: Build, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """Its last Pending response then stands, nothing is called failed, and it is let go."""
    monkeypatch.setattr(relay_module, "_CANCEL_SECONDS", 0.01)
    local = Archive(LOCAL, study(2))
    world = build(local=local, relay=True)
    world.know(local)
    world.local_pacs.gate = asyncio.Event()
    world.local_pacs.script = [RetrieveProgress(remaining=1, completed=1)] * 2
    operation = world.operation(Workstation())
    async with running(operation) as task:
        await until(lambda: operation.counts.completed == 1)
        operation.cancel()
    assert task.result() == RetrieveOutcome(0xFE00, 1, 1)
    assert (world.local_pacs.told_to_cancel, world.local_pacs.cancelled) == (1, 1)
    (entry,) = log_watch.named("local_retrieve_failed")
    assert entry["failure"] == "timeout"


async def test_crash_of_a_source_is_a_failure_of_that_source(build: Build) -> None:
    """An exception that no port allows for ends in a status, not in a hang."""
    north = Archive("north", study(2))
    north.gate = lambda uid: 1 // 0  # type: ignore[return-value]
    world = build(north)
    world.know(north)
    outcome = await run(world.operation(Workstation()))
    assert (outcome.status, outcome.failed) == (0xA702, 2)


async def test_closing_ends_what_is_under_way(build: Build) -> None:
    """When everything shuts down, operations end with a status and sources are cancelled."""
    north, gate = Archive("north", study(2)), asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north)
    world.know(north)
    async with running(world.operation(Workstation())) as task:
        await until(lambda: bool(north.orders))
        await settle()
        await world.flights.close()
    assert task.result().status != 0x0000
    assert north.cancelled == 1


async def test_cancel_while_the_study_is_being_opened(build: Build) -> None:
    """A C-CANCEL that comes before the store has answered delivers nothing."""
    north = Archive("north", study(2))
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.lease_gate = asyncio.Event()
    operation = world.operation(workstation)
    async with running(operation) as task:
        await until(lambda: len(world.flights) == 1)
        await settle()
        operation.cancel()
        world.store.lease_gate.set()
    assert task.result().status == 0xFE00
    assert workstation.opened == 0
    assert north.orders == []


async def test_store_that_fails_is_a_failure_not_a_hang(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer while the cache is set right ends in a status all the same."""

    async def fail(self: Lease, *_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(Lease, "remove", fail)
    monkeypatch.setattr(Lease, "set_complete", fail)
    north = Archive("north", study(2))
    world, workstation = build(north), Workstation()
    world.know(north)
    world.store.put(study(3), "north")
    await run(world.operation(workstation))
    assert set(workstation.received) >= set(north.studies[STUDY].instances)


async def test_closing_ends_abandoned_flights_once(build: Build) -> None:
    """A flight that goes on although nobody waits ends with the rest, and gives back its study."""
    north, gate = Archive("north", study(2)), asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north, finish_abandoned=True)
    world.know(north)
    operation = world.operation(Workstation())
    async with running(operation):
        await until(lambda: bool(north.orders))
        operation.cancel()
    assert len(world.flights) == 1
    await world.close()
    assert north.cancelled == 1
    late = await run(world.operation(Workstation()))
    assert late.status == 0xC000


async def test_a_far_source_is_asked_on_several_associations(build: Build) -> None:
    """A few are ordered as soon as they are listed, the rest in lists, and each once."""
    far = Archive("far", study(30))
    far.round_trip_seconds, far.parallel_retrieves = 0.03, 3
    gate = asyncio.Event()
    far.gate = lambda uid: gate
    world, workstation = build(far), Workstation()
    world.know(far)
    async with running(world.operation(workstation)) as task:
        await until(lambda: len(far.orders) == 3)
        assert [order.level for order in far.orders] == [Level.IMAGE] * 3
        assert [len(order.sop_instance_uids) for order in far.orders] == [4, 10, 10]
        gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=30)
    assert set(far.sent.values()) == {1}
    assert len(far.orders) == 4


async def test_a_source_is_in_use_until_its_last_flight_has_ended(build: Build) -> None:
    """Nobody closes it under a study that is fetched to the end for nobody."""
    north, south = Archive("north", study(3)), Archive("south")
    gate = asyncio.Event()
    north.gate = lambda uid: gate
    world = build(north, south, finish_abandoned=True)
    world.know(north)
    operation = world.operation(Workstation())
    async with running(operation), asyncio.timeout(SECONDS):
        await until(lambda: bool(north.orders))
        operation.cancel()
    unused = asyncio.create_task(world.flights.wait_unused([north]))
    await world.flights.wait_unused([south])
    await settle()
    assert not unused.done()
    gate.set()
    async with asyncio.timeout(SECONDS):
        await unused
    assert sorted(world.store.studies[STUDY].instances) == sorted(north.studies[STUDY].instances)


@pytest.mark.parametrize("held_back", ["instances", "listing"])
async def test_a_source_that_was_replaced_is_in_use_until_it_has_answered(
    build: Build, held_back: str
) -> None:
    """Who joins by a new configuration takes nothing from what the former one has asked for."""
    old, new, gate = Archive("north", study(3)), Archive("north", study(3)), asyncio.Event()
    if held_back == "listing":
        old.find_gate = gate
    else:
        old.gate = lambda uid: gate
    world = build(old)
    first, second = (
        FlightRequest(
            STUDY, Selection(), (Holder(source, PATIENT_ID),), frozenset({"north"}), PATIENT_ID
        )
        for source in (old, new)
    )
    new.arrivals = world.arrivals
    async with asyncio.timeout(SECONDS), world.flights.join(first):
        await until(lambda: bool(old.orders if held_back == "instances" else old.queries))
        async with world.flights.join(second):
            await settle()
            unused = asyncio.create_task(world.flights.wait_unused([old]))
            await settle()
            assert not unused.done()
            gate.set()
    async with asyncio.timeout(SECONDS):
        await unused


async def test_a_source_that_was_replaced_is_unused_once_its_orders_have_ended(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flight that goes on by a newer one, for however long, keeps the former open no longer."""
    monkeypatch.setattr(flights, "_RECHECK_SECONDS", 0.01)
    old, new, gate = Archive("north", study(3)), Archive("north", study(3)), asyncio.Event()
    old.gate = lambda uid: gate
    world = build(old)
    first, second = (
        FlightRequest(
            STUDY, Selection(), (Holder(source, PATIENT_ID),), frozenset({"north"}), PATIENT_ID
        )
        for source in (old, new)
    )
    new.arrivals = world.arrivals
    async with (
        asyncio.timeout(SECONDS),
        world.flights.join(first),
        world.flights.join(second),
    ):
        await until(lambda: bool(old.orders))
        unused = asyncio.create_task(world.flights.wait_unused([old]))
        await settle()
        assert not unused.done()
        gate.set()
        await unused


async def test_closing_lets_a_flight_that_is_ending_end(build: Build) -> None:
    """It gives its study back although its orders take a while to be cancelled."""
    north, gate = Archive("north", study(3)), asyncio.Event()
    north.gate = lambda uid: asyncio.Event()
    steps = north.retrieve

    async def slow_to_end(order: RetrieveOrder) -> AsyncIterator[RetrieveProgress]:
        try:
            async for step in steps(order):
                yield step
        finally:
            await gate.wait()

    north.retrieve = slow_to_end  # type: ignore[method-assign]
    world = build(north)
    world.know(north)
    operation = world.operation(Workstation())
    async with running(operation) as task, asyncio.timeout(SECONDS):
        await until(lambda: bool(north.orders))
        await settle()
        operation.cancel()
        await until(lambda: len(world.flights) == 0)
        task.cancel()
        closing = asyncio.create_task(world.flights.close())
        await settle()
        gate.set()
        await closing
    assert world.store.leases == 0


@pytest.mark.parametrize("round_trip", [0.0, 0.03])
async def test_an_order_that_has_brought_everything_is_not_cancelled(
    build: Build, round_trip: float
) -> None:
    """The delivery ends with the last instance; the archive may say that it is done."""
    north = SaysDoneLater("north", study(9))
    north.round_trip_seconds = round_trip
    world = build(north)
    world.know(north)
    assert (await run(world.operation(Workstation()))).completed == 9
    assert world.flights.has_orders("north")
    assert len(world.flights) == 0
    north.say_done.set()
    await until(lambda: not world.flights.has_orders("north"))
    assert north.cancelled == 0


async def test_an_order_that_never_says_that_it_is_done_is_cancelled(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a place among those that the archive allows, so that this has an end."""
    monkeypatch.setattr(orders, "_FINAL_SECONDS", 0.02)
    north = SaysDoneLater("north", study(3))
    world = build(north)
    world.know(north)
    assert (await run(world.operation(Workstation()))).completed == 3
    await until(lambda: not world.flights.has_orders("north"))
    assert north.cancelled == 1


async def test_a_listing_that_fails_once_costs_nothing_twice(build: Build) -> None:
    """Where instances are coming already, the archive is asked again what there is."""
    far = Archive("far", study(12, 12))
    far.round_trip_seconds = 0.03
    failing = iter([SourceError("far", Failure.BUSY)])

    async def find(query: SourceQuery) -> AsyncIterator[Identifier]:
        rows = 0
        async for row in Archive.find(far, query):
            yield row
            rows += 1
            if query.level is Level.IMAGE and rows == 6:
                await until(lambda: bool(far.orders))
                for error in failing:
                    raise error

    far.find = find  # type: ignore[method-assign]
    world = build(far)
    world.know(far)
    assert (await run(world.operation(Workstation()))).completed == 24
    assert set(far.sent.values()) == {1}
    assert {order.level for order in far.orders} == {Level.IMAGE}


async def test_instances_of_a_far_source_arrive_while_it_is_still_listing(build: Build) -> None:
    """The first few are ordered and delivered as soon as they are known; the rest follows."""
    far = Archive("far", study(20))
    far.round_trip_seconds, far.parallel_retrieves = 0.03, 3
    go_on = asyncio.Event()

    async def find(query: SourceQuery) -> AsyncIterator[Identifier]:
        rows = 0
        async for row in Archive.find(far, query):
            yield row
            rows += 1
            if query.level is Level.IMAGE and rows == 6:
                await go_on.wait()

    far.find = find  # type: ignore[method-assign]
    world, workstation = build(far), Workstation()
    world.know(far)
    async with running(world.operation(workstation)) as task:
        await until(lambda: len(workstation.received) == 4)
        assert [len(order.sop_instance_uids) for order in far.orders[:1]] == [4]
        go_on.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=20)
    assert set(far.sent.values()) == {1}


async def test_a_pause_ends_within_a_flight_that_began_in_it(build: Build) -> None:
    """A source that failed is asked again once the pause is over, whoever else is served still."""
    north = Archive("north", study(3))
    world = build(north)
    world.know(north)
    north.down()
    await run(world.operation(Workstation()))
    north.up()
    north.orders.clear()
    request = FlightRequest(STUDY, Selection(), (Holder(north),), frozenset({"north"}))
    async with world.flights.join(request) as early:
        assert isinstance(await anext(early), FlightOutcome)
        assert north.orders == []
        world.flights._pauses.clear()  # time goes by
        assert (await run(world.operation(Workstation()))).completed == 3


async def test_studies_share_what_a_far_source_gives(build: Build) -> None:
    """Together they have no more lists than it works on at once, so that lists are long."""
    uids = [f"1.{number}" for number in range(5, 9)]
    far = Archive("far", *(study(40, uid=uid) for uid in uids))
    far.round_trip_seconds, far.parallel_retrieves = 0.03, 4
    gate = asyncio.Event()
    far.gate = lambda uid: gate
    world = build(far)
    world.know(far)
    async with asyncio.TaskGroup() as group:
        moves = [
            group.create_task(run(world.operation(Workstation(), study_request(uid))))
            for uid in uids
        ]
        await until(lambda: len(far.orders) == 4)
        await settle()
        assert len(far.orders) == 4
        gate.set()
    assert [move.result().completed for move in moves] == [40] * 4
    assert set(far.sent.values()) == {1}
    assert len(far.orders) <= 4 * 3


class SaysDoneLater(Archive):
    def __init__(self, name: str, *studies: Study) -> None:
        super().__init__(name, *studies)
        self.say_done = asyncio.Event()

    async def retrieve(self, order: RetrieveOrder) -> AsyncIterator[RetrieveProgress]:
        done = False
        try:
            async for progress in super().retrieve(order):
                if progress.final:
                    await self.say_done.wait()
                    done = True
                yield progress
        finally:
            self.cancelled += not done


async def test_a_far_source_that_refuses_lists_is_asked_so_once(build: Build) -> None:
    """What it refused is remembered for its other studies, and nothing is fetched twice."""
    far = Archive("far", study(6, 3), study(4, uid="1.9"))
    far.round_trip_seconds, far.refused_levels = 0.03, {Level.IMAGE}
    world = build(far)
    world.know(far)
    assert (await run(world.operation(Workstation()))).completed == 9
    assert set(far.sent.values()) == {1}
    before = len(far.orders)
    assert (await run(world.operation(Workstation(), study_request("1.9")))).completed == 4
    assert Level.IMAGE not in {order.level for order in far.orders[before:]}


async def test_contexts_of_a_get_follow_from_the_manifest(build: Build) -> None:
    """A source that must name SOP Classes beforehand is not asked before they are known."""
    getting = Archive("getting", study(3, 2))
    getting.wants_sop_classes = True
    getting.find_gate = asyncio.Event()
    world = build(getting)
    world.know(getting)
    async with running(world.operation(Workstation())) as task:
        await until(lambda: bool(getting.queries))
        await settle()
        assert getting.orders == []
        getting.find_gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=5)
    assert {order.sop_classes for order in getting.orders} == {(CT,)}


@pytest.mark.parametrize("failure", [Failure.TIMEOUT, Failure.BUSY])
async def test_delivery_waits_for_the_local_part_where_it_must(
    build: Build, failure: Failure
) -> None:
    """A workstation that takes one association at a time gets the local PACS's first."""
    north, local = Archive("north", study(3)), Archive(LOCAL, study(2, uid="1.8"))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    world.local_pacs.gate = asyncio.Event()
    workstation.refusals.append(failure)
    world.local_pacs.script = [
        RetrieveProgress(remaining=2),
        RetrieveProgress(completed=2, final=True, status=0),
    ]
    async with running(world.operation(workstation, study_request(STUDY, "1.8"))) as task:
        await until(lambda: bool(workstation.refused))
        await settle()
        assert workstation.received == []
        world.local_pacs.gate.set()
    assert task.result().status == 0x0000
    assert len(workstation.received) == 3


async def test_local_pacs_has_the_workstation_as_soon_as_our_part_is_delivered(
    build: Build,
) -> None:
    """Ours is let go although the local PACS, which may wait for it, has not ended."""
    north, local = Archive("north", study(3)), Archive(LOCAL, study(2, uid="1.8"))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    world.local_pacs.gate = asyncio.Event()
    world.local_pacs.script = [
        RetrieveProgress(remaining=2),
        RetrieveProgress(completed=2, final=True, status=0),
    ]
    async with running(world.operation(workstation, study_request(STUDY, "1.8"))) as task:
        await until(lambda: workstation.closed == 1)
        assert not task.done()
        world.local_pacs.gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=5)
    assert len(world.local_pacs.moves) == 1


@pytest.mark.parametrize("status", [0xA702, 0xB000, 0xC001])
async def test_local_pacs_that_was_kept_out_is_asked_again(build: Build, status: int) -> None:
    """It could not associate while we did: once ours is over it can, and only that counts."""
    north, local = Archive("north", study(3)), Archive(LOCAL, study(2, uid="1.8"))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    workstation.gate, world.local_pacs.gate = asyncio.Event(), asyncio.Event()
    lost = ("1.8.1.1", "1.8.1.2")
    world.local_pacs.script = [
        RetrieveProgress(failed=2, final=True, status=status, failed_sop_instance_uids=lost)
    ]
    world.local_pacs.later = [[RetrieveProgress(completed=2, final=True, status=0)]]
    async with running(world.operation(workstation, study_request(STUDY, "1.8"))) as task:
        await workstation.waiting.wait()
        world.local_pacs.gate.set()
        await settle()
        assert len(world.local_pacs.moves) == 1
        workstation.gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=5)
    assert (len(world.local_pacs.moves), workstation.closed) == (2, 1)


async def test_local_pacs_that_was_kept_out_is_asked_again_after_many_studies(
    build: Build,
) -> None:
    """Studies that wait for what it leaves keep none from being delivered before it is asked."""
    uids = [f"1.8.{number}" for number in range(1, 9)]
    local = Archive(LOCAL, *(study(1, uid=uid) for uid in uids))
    north = Archive("north", *(study(1, 1, uid=uid) for uid in uids))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    workstation.gate, world.local_pacs.gate = asyncio.Event(), asyncio.Event()
    lost = tuple(f"{uid}.1.1" for uid in uids)
    world.local_pacs.script = [
        RetrieveProgress(failed=8, final=True, status=0xA702, failed_sop_instance_uids=lost)
    ]
    world.local_pacs.later = [[RetrieveProgress(completed=8, final=True, status=0)]]
    async with running(world.operation(workstation, study_request(*uids))) as task:
        await workstation.waiting.wait()
        world.local_pacs.gate.set()
        workstation.gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=16)
    assert len(world.local_pacs.moves) == 2


async def test_studies_held_by_one_source_alone_do_not_wait_for_the_local_pacs(
    build: Build,
) -> None:
    """However many studies wait for what it leaves, what only others hold comes meanwhile."""
    shared = [f"1.8.{number}" for number in range(1, 9)]
    local = Archive(LOCAL, *(study(1, uid=uid) for uid in shared))
    north = Archive("north", study(3), *(study(1, uid=uid) for uid in shared))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    world.local_pacs.gate = asyncio.Event()
    world.local_pacs.script = [
        RetrieveProgress(remaining=8),
        RetrieveProgress(completed=8, final=True, status=0),
    ]
    async with running(world.operation(workstation, study_request(*shared, STUDY))) as task:
        await until(lambda: len(workstation.received) == 3)
        assert not task.done()
        world.local_pacs.gate.set()
    assert task.result() == RetrieveOutcome(0x0000, completed=11)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (RetrieveProgress(final=True, status=0xA801), 0xB000),
        (RetrieveProgress(completed=1, failed=1, final=True, status=0xB000), 0xB000),
    ],
)
async def test_local_pacs_that_was_not_kept_out_is_not_asked_again(
    build: Build, script: RetrieveProgress, status: int
) -> None:
    """One that delivered anything, or knows no such workstation, has said its last word."""
    north, local = Archive("north", study(3)), Archive(LOCAL, study(2, uid="1.8"))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    world.local_pacs.script = [script]
    outcome = await run(world.operation(workstation, study_request(STUDY, "1.8")))
    assert outcome.status == status
    assert len(world.local_pacs.moves) == 1


async def test_cancel_while_the_local_pacs_waits_to_be_asked_again(build: Build) -> None:
    """Nobody is asked any more, and what failed before remains failed."""
    north, local = Archive("north", study(3)), Archive(LOCAL, study(2, uid="1.8"))
    world, workstation = build(north, local=local, relay=True), Workstation()
    world.know(north, local)
    workstation.gate, world.local_pacs.gate = asyncio.Event(), asyncio.Event()
    world.local_pacs.script = [RetrieveProgress(failed=2, final=True, status=0xA702)]
    operation = world.operation(workstation, study_request(STUDY, "1.8"))
    async with running(operation) as task:
        await workstation.waiting.wait()
        await until(lambda: operation.counts.failed == 2)
        world.local_pacs.gate.set()
        await settle()
        operation.cancel()
        workstation.gate.set()
    assert task.result().status == 0xFE00
    assert task.result().failed == 2
    assert len(world.local_pacs.moves) == 1


async def test_destination_lost_before_all_is_listed_fails_every_instance(build: Build) -> None:
    """The first instances come while more are being listed; all of them are counted."""
    north = Archive("north", study(3))
    listed = asyncio.Event()
    rows = north.find

    async def slowly(query: SourceQuery) -> AsyncIterator[Identifier]:
        async for row in rows(query):
            yield row
            if query.level is Level.IMAGE:
                await listed.wait()

    north.find = slowly  # type: ignore[method-assign]
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.refusals.append(Failure.UNREACHABLE)
    async with running(world.operation(workstation)) as task:
        await until(lambda: bool(workstation.refused))
        await settle()
        assert not task.done()
        listed.set()
    assert (task.result().status, task.result().failed) == (0xA702, 3)
    assert sorted(task.result().failed_sop_instance_uids) == sorted(study(3).instances)


async def test_cancel_while_a_lost_destinations_instances_are_being_listed(build: Build) -> None:
    """A listing that does not come keeps nobody who has cancelled."""
    north = Archive("north", study(3))
    rows = north.find

    async def endlessly(query: SourceQuery) -> AsyncIterator[Identifier]:
        async for row in rows(query):
            yield row
            if query.level is Level.IMAGE:
                await asyncio.Event().wait()

    north.find = endlessly  # type: ignore[method-assign]
    world, workstation = build(north), Workstation()
    world.know(north)
    workstation.refusals.append(Failure.UNREACHABLE)
    operation = world.operation(workstation)
    async with running(operation) as task:
        await until(lambda: bool(workstation.refused))
        await settle()
        operation.cancel()
    assert task.result().status == 0xFE00


async def test_reload_does_not_leave_a_flight_with_a_source_that_is_closed(build: Build) -> None:
    """What a retrieve under the new configuration joined goes on at the source that it knows."""
    held, gate = study(3), asyncio.Event()
    before, after = Archive("north", held), Archive("north", held)
    before.gate = lambda uid: gate
    before.stall_after = [1]
    world = build(before)
    world.know(before)
    after.arrivals = world.arrivals
    reloaded = RetrieveCoordinator(
        world.store,
        world.flights,
        world.memory,
        world.audit,
        {"north": after},
        world.local,
        world.local_pacs,
        relay_local=False,
    )
    first = world.operation(Workstation())
    world.coordinator, standing = reloaded, world.coordinator
    second = world.operation(Workstation())
    async with running(first):
        await until(lambda: bool(before.orders))
        async with running(second) as result:
            await settle()
            gate.set()
    assert result.result() == RetrieveOutcome(0x0000, completed=3)
    assert (len(before.orders), len(after.orders)) == (1, 1)
    await standing.close()
