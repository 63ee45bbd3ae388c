"""What must never be shown or delivered, whatever the cross-reference does meanwhile.

A manager (PIX, PIXm) that fails in every way, is late, knows nobody, knows too many
or changes its mind: local rows come at once, nobody else's study is shown or
delivered, and an outage is told apart from there being nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from pydicom import Dataset

from tests.e2e.conftest import MakeProxy, proxies
from tests.e2e.identities import (
    HOSPITAL,
    NORTH,
    NORTH_ID,
    PERSONS,
    SOUTH,
    SOUTH_ID,
    Held,
    Since,
    arrived,
    ct,
    mine,
    scene,
    studies,
    uid,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.peers.mllp_server import Caller
from tests.peers.pix_manager import PixManager, Reply, pix_manager
from tests.peers.pixm_manager import Question, pixm_manager, response
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID

pytestmark = pytest.mark.asyncio(loop_scope="module")

STALL = {"timeout": "300ms"}
"""Of a manager that shall be waited for in vain."""


def pix(port: int, name: str = "mpi", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "pix", "host": "127.0.0.1", "port": port, **more}


@pytest.fixture(scope="module")
def held() -> Held:
    """What the archives hold; one of them by a second ID, too."""
    made = Held()
    made.more["south"] = ct("TWICE-2-0815", AccessionNumber="2")
    return made


class Region:
    """Archives behind a PIX manager; what it said is forgotten in a moment.

    Of several IDs the north's cross-reference gives none, the south's all.
    """

    def __init__(self, setup: Setup, manager: PixManager) -> None:
        self.setup, self.manager = setup, manager

    def as_usual(self) -> None:
        """Let the manager know whom it knows at first, and answer honestly."""
        self.manager.persons = [list(person) for person in PERSONS]
        self.manager.decide, self.manager.behave = self.manager.honest, None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def region(held: Held, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Region]:
    """Run it; no log may name anybody's ID."""
    remember = {"remember": "100ms", "remember_none": "100ms"}
    async with (
        proxies(tmp_path_factory.mktemp("wrong")) as start,
        pix_manager(*PERSONS) as manager,
        scene(
            start,
            held,
            pix(manager.port, **STALL),
            pix(manager.port, "several", several_ids="all", **STALL),
            south={"identity": {"cross_reference": "several"}},
            identity=remember,
        ) as made,
    ):
        yield Region(made, manager)
        assert [value for value in (NORTH_ID, SOUTH_ID) if value in made.proxy.log] == []


@pytest_asyncio.fixture(loop_scope="module")
async def usual(region: Region, held: Held) -> AsyncIterator[Region]:
    """The region as it is at first, and again afterwards."""
    yield region
    region.as_usual()
    await until_all_are_found(region.setup, held)
    arrived(region.setup.reading)


async def until_all_are_found(it: Setup, held: Held) -> None:
    async with asyncio.timeout(60):
        while studies(await mine(it)) != held.mine:
            pass  # what was said before is remembered a little longer


async def nothing_but_local(it: Setup, held: Held) -> None:
    """Query; see local rows come and both sources fail, without having been asked."""
    since, asked = Since(it), [len(one.requests) for one in it.archives]
    result = await mine(it)
    assert result.final.status == 0x0000
    assert studies(result) == {uid(held.here)}
    failed = [line["source"] for line in since.named("source_query_failed")]
    assert sorted(failed) == ["north", "south"]
    assert [len(one.requests) for one in it.archives] == asked
    assert since.named("cross_reference_failed")
    for event in ("source_not_asked", "identity_unresolved"):
        assert since.named(event) == []


async def silent(*_: object) -> None:
    """Let the question be."""


async def garbage(caller: Caller, _content: bytes) -> None:
    await caller.send(b"MSH|nonsense\rZZZ\xff\xfe\r")


async def other_answer(caller: Caller, _content: bytes) -> None:
    await caller.send(b"MSH|^~\\&|P|R|D||2024||RSP^K23^RSP_K23|1|P|2.5\rMSA|AA|OTHER\rQAK|X|NF\r")


async def reset(caller: Caller, _content: bytes) -> None:
    caller.reset()


async def test_a_pix_manager_that_fails_is_no_empty_answer(usual: Region, held: Held) -> None:
    """Refusals, garbage, answers to another question, silence: each an outage, none remembered."""
    it, manager = usual.setup, usual.manager
    replies = (
        Reply("AE", "AE"),
        Reply("AR", "AR"),
        Reply("AE", "AE", errors=["ERR||QPD^1^4^1|204^Unknown Key Identifier|E"]),
        Reply(identifiers=[f"{NORTH_ID}^^^ELSEWHERE&9.9.9&ISO"]),
    )
    manager.decide = lambda _question: replies[0]
    async with asyncio.timeout(60):
        while studies(await mine(it)) != {uid(held.here)}:
            pass  # what was said before is remembered a little longer
    for reply in replies:
        manager.decide = lambda _question, reply=reply: reply  # type: ignore[misc]
        await nothing_but_local(it, held)
    for behave in (garbage, other_answer, reset, silent):
        manager.behave = behave
        await nothing_but_local(it, held)
    usual.as_usual()
    assert studies(await mine(it)) == held.mine


async def test_an_outage_withholds_even_what_is_cached(usual: Region, held: Held) -> None:
    """Nobody can say whose it is now: it is not delivered, that is a failure, and it passes."""
    it, manager = usual.setup, usual.manager
    assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
    arrived(it.reading)
    fetched, since = await it.proxy.fetched(), Since(it)
    for decide, behave in ((lambda _: Reply("AE", "AE"), None), (manager.honest, silent)):
        manager.decide, manager.behave = decide, behave
        async with asyncio.timeout(60):
            while (moved := await it.reading.move(the_study(held.north))).final.completed:
                arrived(it.reading)  # while it was remembered
        assert moved.final.status != 0x0000
        arrived(it.reading)
        await it.reading.move(the_study(held.north))
        assert arrived(it.reading) == {}
        assert {one["source"] for one in since.named("source_not_identified")} == {"north"}
    usual.as_usual()
    assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
    assert {one.PatientID for one in arrived(it.reading).values()} == {PATIENT_ID}
    assert await it.proxy.fetched() == fetched


async def test_who_is_unknown_is_not_asked_for_and_that_is_no_failure(
    usual: Region, held: Held
) -> None:
    """To the manager nobody has this ID; then there is nothing, and nothing has failed."""
    it, manager = usual.setup, usual.manager
    manager.persons = [*PERSONS[1:], [("20", *HOSPITAL), ("s", *SOUTH)]]
    async with asyncio.timeout(60):
        while studies(result := await mine(it)) != {uid(held.here)}:
            pass
    since, asked = Since(it), [len(one.requests) for one in it.archives]
    result = await mine(it)
    assert (result.final.status, studies(result)) == (0x0000, {uid(held.here)})
    assert {one["source"] for one in since.named("source_not_asked")} == {"north", "south"}
    assert [len(one.requests) for one in it.archives] == asked
    assert since.named("source_query_failed") == []
    assert since.named("cross_reference_failed") == []
    await withheld(it, held.north, "no_local_id")


async def test_who_is_several_people_here_is_nobodys(usual: Region, held: Held) -> None:
    """An ID of the north leads to two local ones: by study alone it is withheld."""
    usual.manager.persons = [[*PERSONS[0], ("DOUBLE-HERE", *HOSPITAL)], PERSONS[1]]
    await withheld(usual.setup, held.north, "several_local_ids")


async def withheld(it: Setup, instances: list[Dataset], reason: str) -> None:
    """Ask for a study of the north by its UID alone, and see it withheld, soon."""
    async with asyncio.timeout(60):
        while (await it.reading.move(the_study(instances))).final.completed:
            arrived(it.reading)  # while it was remembered
    arrived(it.reading)
    since = Since(it)
    found = await mine(it, PatientID="", StudyInstanceUID=uid(instances))
    assert uid(instances) not in studies(found)
    assert {one["reason"] for one in since.named("identity_unresolved")} == {reason}
    since = Since(it)
    assert (await it.reading.move(the_study(instances))).final.status == 0xA702
    assert arrived(it.reading) == {}
    lines = since.named("identity_unresolved")
    assert {(one["source"], one["reason"]) for one in lines} == {("north", reason)}
    total = "dicomproxy_identity_withheld_total"
    assert await it.proxy.metric(total, source="north", reason=reason) >= 2
    _, page = await asyncio.to_thread(it.proxy.http, "/")
    assert "north identity_unresolved" in page


async def test_several_ids_of_a_person_are_all_theirs_or_none(usual: Region, held: Held) -> None:
    """As the site says: the south's are all the person's, of the north's none can be relied on."""
    it, twice = usual.setup, ("TWICE-2-0815", *SOUTH)
    usual.manager.persons = [[*PERSONS[0], ("N-TWICE-2", *NORTH), twice], PERSONS[1]]
    second = held.more["south"]
    expected = {uid(held.here), uid(held.south), uid(second)}
    async with asyncio.timeout(60):
        while studies(await mine(it)) != expected:
            pass
    since, asked = Since(it), len(it.archives[0].requests)
    result = await mine(it)
    assert (result.final.status, studies(result)) == (0x0000, expected)
    assert {row.PatientID for row in result.rows} == {PATIENT_ID}
    assert len(it.archives[0].requests) == asked
    (failed,) = since.named("source_query_failed")
    assert (failed["source"], failed["reason"]) == ("north", "several_ids")
    assert figures((await it.reading.move(the_study(second))).final)[1] == len(second)
    assert {one.PatientID for one in arrived(it.reading).values()} == {PATIENT_ID}


async def test_a_mapping_that_changes_counts_once_it_is_not_remembered(
    usual: Region, held: Held
) -> None:
    """Whom the manager calls another person is that person, in rows and in what is cached."""
    it = usual.setup
    await until_all_are_found(it, held)
    assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
    assert {one.PatientID for one in arrived(it.reading).values()} == {PATIENT_ID}
    usual.manager.persons = [
        [(PATIENT_ID, *HOSPITAL), (SOUTH_ID, *SOUTH)],
        [("17", *HOSPITAL), (PATIENT_ID, *NORTH)],
        [("MOVED-HERE", *HOSPITAL), (NORTH_ID, *NORTH)],
    ]
    async with asyncio.timeout(60):
        while uid(held.north) in studies(result := await mine(it)):
            pass
    assert studies(result) == held.mine - {uid(held.north)}
    wanted = the_study(held.north)
    wanted.PatientID = PATIENT_ID
    async with asyncio.timeout(60):
        while (await it.reading.move(wanted, root="P")).final.completed:
            arrived(it.reading)
    assert arrived(it.reading) == {}
    await it.reading.move(the_study(held.north))
    assert {one.PatientID for one in arrived(it.reading).values()} <= {"MOVED-HERE"}
    assert studies(await mine(it, PatientID="MOVED-HERE")) == {uid(held.north)}


async def test_a_pixm_manager_that_fails_is_no_empty_answer(start: MakeProxy, held: Held) -> None:
    """Errors, garbage, silence: each an outage, none remembered."""

    def answer(content: bytes) -> Callable[[Question, asyncio.StreamWriter], Awaitable[None]]:
        async def behave(_question: Question, writer: asyncio.StreamWriter) -> None:
            writer.write(content)

        return behave

    async def reset(_question: Question, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    behaviours = [
        answer(response(500)),
        answer(response(404)),  # of a server that does not know the operation
        answer(response(403, {"resourceType": "OperationOutcome"})),
        answer(response(200, b"<html>logged out</html>")),
        answer(response(200, {"resourceType": "Bundle"})),
        answer(b"\xff\x00 not HTTP\r\n\r\n"),
        reset,
        silent,
    ]
    persons = [[(f"urn:oid:{oid}", value) for value, _, oid in person] for person in PERSONS]
    async with pixm_manager(*persons) as manager:
        url = f"http://127.0.0.1:{manager.port}/fhir"
        reference = {"name": "mpi", "type": "pixm", "url": url, **STALL}
        async with scene(start, held, reference) as it:
            for behave in behaviours:
                manager.behave = behave
                await nothing_but_local(it, held)
            manager.behave = None
            assert studies(await mine(it)) == held.mine


class Gate:
    """Holds a PIX manager's answers until it is opened."""

    def __init__(self, manager: PixManager) -> None:
        self._manager = manager
        self._open = asyncio.Event()
        manager.behave = self._behave

    async def _behave(self, caller: Caller, _content: bytes) -> None:
        reply = self._manager.honest(question := self._manager.questions[-1])
        await self._open.wait()
        await caller.send(reply.written(question))

    def lift(self) -> None:
        self._manager.behave = None
        self._open.set()


async def test_an_answer_beyond_the_budget_serves_the_next_query(
    start: MakeProxy, held: Held
) -> None:
    """The query ends in time with what is here; nobody's row comes late, and none is lost.

    The south's manager is one that nobody hears from: priors may exist, so it has failed.
    """
    async with (
        pix_manager(*PERSONS) as manager,
        scene(
            start,
            held,
            pix(manager.port, timeout="60s"),
            pix(free_port(), "deaf"),
            south={"identity": {"cross_reference": "deaf"}},
            identity={"timeout": "60s"},
            entries={"READING1": {"query_budget": "1s"}},
        ) as it,
    ):
        since, gate = Since(it), Gate(manager)
        result = await mine(it)
        assert (result.final.status, studies(result)) == (0x0000, {uid(held.here)})
        failed = {one["source"]: one["failure"] for one in since.named("source_query_failed")}
        assert failed == {"north": "timeout", "south": "unreachable"}
        gate.lift()
        await it.proxy.until(lambda: bool(since.named("source_query_late")), "answered after all")
        assert studies(await mine(it)) == {uid(held.here), uid(held.north)}
        moved = await it.reading.move(the_study(held.south))
        assert moved.final.status != 0x0000
        assert not moved.final.completed
        assert arrived(it.reading) == {}
        assert {one["source"] for one in since.named("source_not_identified")} == {"south"}
