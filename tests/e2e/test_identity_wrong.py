"""What must never be shown or delivered, whatever the cross-reference does meanwhile.

A manager (PIX, PIXm) that fails in every way, is late, knows nobody, knows too many
or changes its mind: local rows come at once, nobody else's study is shown or
delivered, and an outage is told apart from there being nothing.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeProxy
from tests.e2e.identities import (
    HOSPITAL,
    NORTH,
    NORTH_ID,
    PERSONS,
    SOUTH,
    SOUTH_ID,
    TABLE,
    Held,
    ct,
    loaded,
    mine,
    scene,
    studies,
    table,
    uid,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.peers.mllp_server import Caller
from tests.peers.pix_manager import PixManager, Reply, pix_manager
from tests.peers.pixm_manager import Question, pixm_manager, response
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID

STALL = {"timeout": "300ms"}
"""Of a manager that shall be waited for in vain."""


def pix(port: int, **more: Any) -> dict[str, Any]:
    return {"name": "mpi", "type": "pix", "host": "127.0.0.1", "port": port, **more}


def pixm(port: int, **more: Any) -> dict[str, Any]:
    return {"name": "mpi", "type": "pixm", "url": f"http://127.0.0.1:{port}/fhir", **more}


def fhir_persons() -> list[list[tuple[str, str]]]:
    return [[(f"urn:oid:{oid}", value) for value, _, oid in person] for person in PERSONS]


async def nothing_but_local(it: Setup, held: Held, times: int) -> None:
    """Query and retrieve; see both sources fail, for the *times*-th time, without being asked."""
    result = await mine(it)
    assert result.final.status == 0x0000
    assert studies(result) == {uid(held.here)}
    failed = it.proxy.named("source_query_failed")
    assert [line["source"] for line in failed].count("north") == times
    assert [line["source"] for line in failed].count("south") == times
    assert [one.asked("find") for one in it.archives] == [[], []]
    assert len(it.proxy.named("cross_reference_failed")) >= times
    for event in ("source_not_asked", "identity_unresolved"):
        assert it.proxy.named(event) == []


async def silent(*_: object) -> None:
    """Let the question be."""


async def pix_garbage(caller: Caller, _content: bytes) -> None:
    await caller.send(b"MSH|nonsense\rZZZ\xff\xfe\r")


async def pix_other_answer(caller: Caller, _content: bytes) -> None:
    await caller.send(b"MSH|^~\\&|P|R|D||2024||RSP^K23^RSP_K23|1|P|2.5\rMSA|AA|OTHER\rQAK|X|NF\r")


async def pix_reset(caller: Caller, _content: bytes) -> None:
    caller.reset()


async def test_a_pix_manager_that_fails_is_no_empty_answer(start: MakeProxy) -> None:
    """Refusals, garbage, answers to another question, silence: each an outage, none remembered."""
    held = Held()
    errors = (
        Reply("AE", "AE"),
        Reply("AR", "AR"),
        Reply("AE", "AE", errors=["ERR||QPD^1^4^1|204^Unknown Key Identifier|E"]),
        Reply(identifiers=[f"{NORTH_ID}^^^ELSEWHERE&9.9.9&ISO"]),
    )
    async with (
        pix_manager(*PERSONS) as manager,
        scene(start, held, pix(manager.port, **STALL)) as it,
    ):
        times = 0
        for reply in errors:
            manager.decide = lambda _question, reply=reply: reply  # type: ignore[misc]
            await nothing_but_local(it, held, times := times + 1)
        for behave in (pix_garbage, pix_other_answer, pix_reset, silent):
            manager.behave = behave
            await nothing_but_local(it, held, times := times + 1)
        manager.decide, manager.behave = manager.honest, None
        assert studies(await mine(it)) == held.mine


async def test_a_manager_that_nobody_hears_from_is_no_empty_answer(start: MakeProxy) -> None:
    """Its port is closed: priors may exist, so the sources have failed."""
    held = Held()
    async with scene(start, held, pix(free_port(), **STALL)) as it:
        await nothing_but_local(it, held, 1)
        for others in (held.north, held.third):
            moved = await it.reading.move(the_study(others))
            assert moved.final.status != 0x0000
            assert not moved.final.completed
        assert it.reading.received == []
        assert {line["source"] for line in it.proxy.named("source_not_identified")} == {"north"}


async def test_a_pixm_manager_that_fails_is_no_empty_answer(start: MakeProxy) -> None:
    """Errors, garbage, silence: each an outage, none remembered."""
    held = Held()

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
    async with (
        pixm_manager(*fhir_persons()) as manager,
        scene(start, held, pixm(manager.port, **STALL)) as it,
    ):
        for times, behave in enumerate(behaviours, 1):
            manager.behave = behave
            await nothing_but_local(it, held, times)
        manager.behave = None
        assert studies(await mine(it)) == held.mine


class Gate:
    """Holds a PIX manager's answers until it is opened."""

    def __init__(self, manager: PixManager) -> None:
        self._manager = manager
        self.open = asyncio.Event()
        self.waiting = asyncio.Event()
        manager.behave = self._behave

    async def _behave(self, caller: Caller, content: bytes) -> None:
        self.waiting.set()
        question = self._manager.questions[-1]
        reply = self._manager.honest(question)  # as things stand when it is asked
        await self.open.wait()
        await caller.send(reply.written(question))

    def lift(self) -> None:
        self._manager.behave = None
        self.open.set()


async def test_an_answer_beyond_the_budget_serves_the_next_query(start: MakeProxy) -> None:
    """The query ends in time with what is here; no row comes late, none of anybody else's."""
    held = Held()
    async with pix_manager(*PERSONS) as manager:
        patient = {"timeout": "60s", "connections": 4}
        async with scene(
            start, held, pix(manager.port, **patient), identity={"timeout": "60s"}
        ) as it:
            for entry in it.proxy.settings["workstations"]:
                entry["query_budget"] = "1s"
            it.proxy.write()
            it.proxy.signal(signal.SIGHUP)
            await it.proxy.until(lambda: bool(it.proxy.named("reloaded")), "reloaded")
            gate = Gate(manager)
            result = await mine(it)
            assert (result.final.status, studies(result)) == (0x0000, {uid(held.here)})
            failed = it.proxy.named("source_query_failed")
            assert {(one["source"], one["failure"]) for one in failed} == {
                ("north", "timeout"),
                ("south", "timeout"),
            }
            gate.lift()
            await it.proxy.until(
                lambda: len(it.proxy.named("source_query_late")) == 2, "answered after all"
            )
            assert studies(await mine(it)) == held.mine
            assert len(it.proxy.named("source_query_failed")) == 2


async def test_who_is_unknown_is_not_asked_for_and_that_is_no_failure(start: MakeProxy) -> None:
    """To the manager nobody has this ID; then there is nothing, and nothing has failed."""
    held = Held()
    async with (
        pix_manager(*PERSONS[1:], [("20", *HOSPITAL), ("s", *SOUTH)]) as manager,
        scene(start, held, pix(manager.port)) as it,
    ):
        result = await mine(it)
        assert (result.final.status, studies(result)) == (0x0000, {uid(held.here)})
        assert {one["source"] for one in it.proxy.named("source_not_asked")} == {
            "north",
            "south",
        }
        assert [one.asked("find") for one in it.archives] == [[], []]
        assert it.proxy.named("source_query_failed") == []
        assert it.proxy.named("cross_reference_failed") == []
        await withheld(it, held.north, "no_local_id")


async def withheld(it: Setup, instances: list[Any], reason: str) -> None:
    """Ask for a study by its UID alone, and see it withheld."""
    before = len(it.proxy.named("identity_unresolved"))
    found = await mine(it, PatientID="", StudyInstanceUID=uid(instances))
    assert uid(instances) not in studies(found)
    moved = await it.reading.move(the_study(instances))
    assert not moved.final.completed
    assert it.reading.received == []
    lines = it.proxy.named("identity_unresolved")[before:]
    assert {(one["source"], one["reason"]) for one in lines} == {("north", reason)}
    assert (
        await it.proxy.metric("dicomproxy_identity_withheld_total", source="north", reason=reason)
        >= 1
    )


@pytest.mark.parametrize("policy", ["none", "all"])
async def test_several_ids_of_a_person_are_all_theirs_or_none(
    start: MakeProxy, policy: str
) -> None:
    """As the site says: two records in the north, of which the manager gives both."""
    held = Held()
    twice = [*PERSONS[0], ("N-TWICE-2", *NORTH)]
    for one in held.namesake:
        one.PatientID = "N-TWICE-2"
    async with (
        pix_manager(twice, PERSONS[1]) as manager,
        scene(start, held, pix(manager.port, several_ids=policy)) as it,
    ):
        result = await mine(it)
        if policy == "all":
            assert studies(result) == held.mine | {uid(held.namesake)}
            assert {row.PatientID for row in result.rows} == {PATIENT_ID}
            assert figures((await it.reading.move(the_study(held.namesake))).final) == (
                0x0000,
                2,
                0,
                0,
            )
            assert {one.dataset().PatientID for one in it.reading.received} == {PATIENT_ID}
        else:
            assert studies(result) == held.mine - {uid(held.north)}
            assert it.archives[0].asked("find") == []
            (failed,) = it.proxy.named("source_query_failed")
            assert (failed["source"], failed["reason"]) == ("north", "several_ids")


async def test_who_is_several_people_here_is_nobodys(start: MakeProxy) -> None:
    """An ID of the north leads to two local ones: by study alone it is withheld."""
    held = Held()
    doubled = [*PERSONS[0], ("DOUBLE-HERE", *HOSPITAL)]
    async with (
        pix_manager(doubled, PERSONS[1]) as manager,
        scene(start, held, pix(manager.port)) as it,
    ):
        await withheld(it, held.north, "several_local_ids")


async def test_a_mapping_that_changes_counts_once_it_is_not_remembered(start: MakeProxy) -> None:
    """Whom the manager calls another person is that person, in rows and in what is cached."""
    held = Held()
    remember = {"remember": "1s", "remember_none": "1s"}
    async with (
        pix_manager(*PERSONS) as manager,
        scene(start, held, pix(manager.port), identity=remember) as it,
    ):
        assert studies(await mine(it)) == held.mine
        assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
        assert {one.dataset().PatientID for one in it.reading.received} == {PATIENT_ID}
        it.reading.received.clear()
        manager.persons = [
            [(PATIENT_ID, *HOSPITAL), (SOUTH_ID, *SOUTH)],
            [("17", *HOSPITAL), (PATIENT_ID, *NORTH)],
            [("MOVED-HERE", *HOSPITAL), (NORTH_ID, *NORTH)],
        ]
        async with asyncio.timeout(60):
            while uid(held.north) in studies(result := await mine(it)):
                pass  # remembered a little longer
        assert studies(result) == held.mine - {uid(held.north)}
        wanted = the_study(held.north)
        wanted.PatientID = PATIENT_ID
        async with asyncio.timeout(60):
            while (await it.reading.move(wanted, root="P")).final.completed:
                it.reading.received.clear()
        assert it.reading.received == []
        await it.reading.move(the_study(held.north))
        assert {one.dataset().PatientID for one in it.reading.received} <= {"MOVED-HERE"}
        found = await mine(it, PatientID="MOVED-HERE")
        assert studies(found) == {uid(held.north)}


async def test_an_outage_withholds_even_what_is_cached(start: MakeProxy) -> None:
    """Nobody can say whose it is now: it is not delivered, that is a failure, and it passes."""
    held = Held()
    remember = {"remember": "100ms", "remember_none": "100ms"}
    async with (
        pix_manager(*PERSONS) as manager,
        scene(start, held, pix(manager.port, **STALL), identity=remember) as it,
    ):
        assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
        fetched = await it.proxy.fetched()
        it.reading.received.clear()
        for decide, behave in ((lambda _: Reply("AE", "AE"), None), (manager.honest, silent)):
            manager.decide, manager.behave = decide, behave
            async with asyncio.timeout(60):
                while (moved := await it.reading.move(the_study(held.north))).final.completed:
                    it.reading.received.clear()  # while it was remembered
            assert moved.final.status != 0x0000
            assert it.reading.received == []
            assert {one["source"] for one in it.proxy.named("source_not_identified")} == {"north"}
        manager.decide, manager.behave = manager.honest, None
        assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
        assert {one.dataset().PatientID for one in it.reading.received} == {PATIENT_ID}
        assert await it.proxy.fetched() == fetched


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [("PatientBirthDate", "19010204", "birth_date"), ("PatientSex", "M", "sex")],
)
async def test_what_the_local_pacs_corrects_counts_for_what_was_shown_before(
    start: MakeProxy, tmp_path: Path, keyword: str, value: str, reason: str
) -> None:
    """A contradiction withholds what was located, and what was cached and delivered."""
    held = Held()
    async with scene(start, held, table(tmp_path)) as it:
        await loaded(it)
        assert studies(await mine(it)) == held.mine
        # One is cached, the other is only known to be there.
        assert figures((await it.reading.move(the_study(held.north))).final)[1] == 2
        it.reading.received.clear()
        before = {uid(one): getattr(one[0], keyword) for one in (held.north, held.south)}
        for one in it.local.instances:
            setattr(one, keyword, value)
        # Even where it answers last.
        asked = [len(one.asked("find")) for one in it.archives]
        it.local.hold()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(mine(it))
            await it.proxy.until(
                lambda: all(
                    len(one.asked("find")) > before
                    for one, before in zip(it.archives, asked, strict=True)
                ),
                "asked",
            )
            it.local.release()
        assert studies(asking.result()) == {uid(held.here)}
        for instances in (held.north, held.south):
            moved = await it.reading.move(the_study(instances))
            assert moved.final.status != 0x0000
            assert not moved.final.completed
        assert it.reading.received == []
        lines = it.proxy.named("identity_conflict")
        assert {(one["study_instance_uid"], one["reason"]) for one in lines} == {
            (study, reason) for study in before
        }
        _, page = await asyncio.to_thread(it.proxy.http, "/")
        for source in ("north", "south"):
            assert f"{source} identity_conflict" in page
            withheld = "dicomproxy_identity_withheld_total"
            assert await it.proxy.metric(withheld, source=source, reason=reason) >= 2
        assert value not in it.proxy.log or len(value) == 1
        assert value not in page or len(value) == 1
        # Put right again, it is as before.
        for one in it.local.instances:
            setattr(one, keyword, before[uid(held.south)])
        assert studies(await mine(it)) == held.mine
        assert figures((await it.reading.move(the_study(held.south))).final)[1] == 2
        assert {one.dataset().PatientID for one in it.reading.received} == {PATIENT_ID}


async def test_what_cannot_be_compared_is_shown_or_withheld_as_the_site_says(
    start: MakeProxy, tmp_path: Path
) -> None:
    """Nothing said there, nobody known here, or no local PACS to ask: each source by its policy."""
    held = Held()
    unsaid = {"PatientBirthDate": "", "PatientSex": "O"}
    for one in (*held.north, *held.south):
        for keyword, value in unsaid.items():
            setattr(one, keyword, value)
    with_others = f"{TABLE}STRANGER-HERE,N-STRANGER,S-STRANGER\n"
    strangers = [ct("N-STRANGER"), ct("S-STRANGER")]
    held.north, held.south = [*held.north, *strangers[0]], [*held.south, *strangers[1]]
    async with scene(
        start,
        held,
        table(tmp_path, with_others),
        north={"identity": {"unverified": "withhold"}},
    ) as it:
        await loaded(it)
        assert studies(await mine(it)) == held.mine - {uid(held.north)}
        # Complete here and there, but of somebody of whom the local PACS knows nothing.
        assert studies(await mine(it, PatientID="STRANGER-HERE")) == {uid(strangers[1])}
        for withheld in (held.north[:2], strangers[0]):
            moved = await it.reading.move(the_study(withheld))
            assert moved.final.status != 0x0000
            assert not moved.final.completed
        assert it.reading.received == []
        lines = it.proxy.named("identity_unverified")
        assert {(one["source"], one["study_instance_uid"]) for one in lines} == {
            ("north", uid(held.north)),
            ("north", uid(strangers[0])),
        }
        for shown in (held.south[:2], strangers[1]):
            assert figures((await it.reading.move(the_study(shown))).final)[1] == 2
        it.local.stop()
        result = await mine(it, PatientID="STRANGER-HERE")
        assert (result.final.status, studies(result)) == (0xC001, {uid(strangers[1])})
