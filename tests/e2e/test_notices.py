"""Records are merged and links change while the proxy runs: it is told, and tells it at once."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pynetdicom import build_context

from tests.e2e.conftest import MakeProxy
from tests.e2e.identities import (
    HOSPITAL,
    NORTH,
    NORTH_ID,
    PERSONS,
    SOUTH,
    SOUTH_ID,
    Held,
    mine,
    scene,
    studies,
    uid,
)
from tests.e2e.scene import Setup, figures, the_study
from tests.e2e.support import Proxy, identifier
from tests.peers.adt_feed import a31, a40, acknowledged, tell
from tests.peers.entity import FIND, UNCOMPRESSED, new_entity
from tests.peers.mllp_server import Caller
from tests.peers.pix_manager import PixManager, pix_manager, read_question
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID
from tests.support.certificates import authority, calling, stranger
from tests.support.datasets import study

ME = (PATIENT_ID, *HOSPITAL)
NORTHERN = (NORTH_ID, *NORTH)
SOUTHERN = (SOUTH_ID, *SOUTH)
FORMER = ("99", *HOSPITAL)
"""The same person's record here, until it is merged into the other."""

APART = [[ME, SOUTHERN], [FORMER, NORTHERN], *PERSONS[1:]]
ELSEWHERE = [[ME, SOUTHERN], [("17", *HOSPITAL), NORTHERN], PERSONS[2]]
"""What was the person's in the north is somebody else's."""


@dataclass
class Told:
    """The region, its manager, and the port at which the proxy is told."""

    it: Setup
    manager: PixManager
    port: int

    async def notice(self, message: bytes, count: int = 1, **more: Any) -> None:
        """Tell, and wait until it is heeded, as the *count*-th notice."""
        assert acknowledged(await tell(self.port, message, **more)) == ("AA", "1")
        await self.heeded(count)

    async def heeded(self, count: int = 1) -> None:
        proxy = self.it.proxy
        await proxy.until(lambda: len(proxy.named("identity_notice")) >= count, "heeded")


@asynccontextmanager
async def told(start: MakeProxy, held: Held, persons: list[Any], **hl7: Any) -> AsyncIterator[Told]:
    """Run the region with a manager that knows *persons*, and the proxy with a listener."""
    port = free_port()
    async with pix_manager(*persons) as manager:
        reference = {"name": "mpi", "type": "pix", "host": "127.0.0.1", "port": manager.port}
        section = {"host": "127.0.0.1", "port": port, "allow_from": "127.0.0.1", **hl7}
        async with scene(start, held, reference, hl7=section) as it:
            yield Told(it, manager, port)


NOTICES = pytest.mark.parametrize(
    "message",
    [
        a40(ME, FORMER),
        a40(PATIENT_ID, "99"),
        a31(ME, NORTHERN, SOUTHERN),
    ],
    ids=["A40", "A40-of-no-domain", "A31"],
)


@NOTICES
async def test_a_query_after_a_notice_gives_the_new_link(start: MakeProxy, message: bytes) -> None:
    """At once, although what was found before would be remembered for minutes."""
    held = Held()
    async with told(start, held, APART, max_connections=1) as region:
        mine_before = held.mine - {uid(held.north)}
        assert studies(await mine(region.it)) == mine_before
        region.manager.persons = list(PERSONS)
        assert studies(await mine(region.it)) == mine_before
        await region.notice(message)
        assert studies(await mine(region.it)) == held.mine
        (line,) = region.it.proxy.named("identity_notice")
        assert line["outcome"] == "forgotten"


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "cold"])
async def test_a_study_of_a_former_link_is_not_delivered_to_the_former_patient(
    start: MakeProxy, cached: bool
) -> None:
    """Neither from the cache nor from its archive; whose it is now gets it."""
    held = Held()
    async with told(start, held, PERSONS) as region:
        it = region.it
        assert studies(await mine(it)) == held.mine
        if cached:
            assert figures((await it.reading.move(the_study(held.north))).final) == (0, 2, 0, 0)
            it.reading.received.clear()
        region.manager.persons = list(ELSEWHERE)
        await region.notice(a40(NORTHERN, ("N-1", *NORTH)))
        wanted = the_study(held.north)
        wanted.PatientID = PATIENT_ID
        result = await it.reading.move(wanted, root="P")
        assert not result.final.completed
        assert it.reading.received == []
        assert studies(await mine(it)) == held.mine - {uid(held.north)}
        assert figures((await it.reading.move(the_study(held.north))).final) == (0, 2, 0, 0)
        assert {one.dataset().PatientID for one in it.reading.received} == {"17"}


async def test_a_notice_ends_a_delivery_to_the_former_patient(start: MakeProxy) -> None:
    """What is on its way arrives; nothing follows it, and nothing is counted as delivered."""
    held = Held()
    held.north = study(1, 12, PatientID=NORTH_ID, PatientSex="F")
    async with told(start, held, PERSONS) as region:
        it = region.it
        assert studies(await mine(it)) == held.mine
        wanted = the_study(held.north)
        wanted.PatientID = PATIENT_ID
        it.reading.hold()
        async with asyncio.TaskGroup() as group:
            moving = group.create_task(it.reading.move(wanted, root="P"))
            await it.reading.held()
            region.manager.persons = list(ELSEWHERE)
            await region.notice(a31(ME, SOUTHERN))
            it.reading.release()
        final = moving.result().final
        assert final.status in (0xA702, 0xB000)
        on_their_way = 2  # one on each association
        delivered = len(it.reading.received)
        assert delivered <= on_their_way
        assert (final.completed, final.failed) == (delivered, 12 - delivered)
        withheld = it.proxy.named("instance_withheld")
        assert {line["reason"] for line in withheld} <= {"identity_conflict", "identity_changes"}


async def test_an_association_that_stands_across_a_reload_is_told_too(start: MakeProxy) -> None:
    """It goes on under the former configuration, whose memory is cleared like the new one's."""
    held = Held()
    async with told(start, held, APART) as region:
        it, mine_before = region.it, held.mine - {uid(held.north)}
        async with standing(it.proxy) as ask:
            assert studies(await ask()) == mine_before
            it.proxy.settings["log"] = {"level": "debug"}
            it.proxy.write()
            it.proxy.signal(signal.SIGHUP)
            await it.proxy.until(lambda: bool(it.proxy.named("reloaded")), "reloaded")
            assert studies(await mine(it)) == mine_before
            region.manager.persons = list(PERSONS)
            assert studies(await ask()) == mine_before
            await region.notice(a40(ME, FORMER))
            assert studies(await ask()) == held.mine
            assert studies(await mine(it)) == held.mine


async def test_an_answer_that_a_notice_overtakes_is_not_kept(start: MakeProxy) -> None:
    """What the manager read before a merge is late: it counts for nobody, now or later."""
    held = Held()
    go = asyncio.Event()

    async def be_late(caller: Caller, content: bytes) -> None:
        reply = region.manager.honest(read_question(content))
        await go.wait()
        await caller.send(reply.written(read_question(content)))

    async with told(start, held, APART) as region:
        region.manager.behave = be_late
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(mine(region.it))
            server = region.manager.server
            assert server is not None
            await server.until(lambda: len(server.received) == 2)
            region.manager.persons, region.manager.behave = list(PERSONS), None
            await region.notice(a40(ME, FORMER))
            go.set()
        assert studies(asking.result()) == held.mine
        assert studies(await mine(region.it)) == held.mine


async def test_rows_that_a_notice_overtakes_are_withheld(start: MakeProxy) -> None:
    """An archive was asked by the former link: what it answers after the notice is not shown."""
    held = Held()
    async with told(start, held, PERSONS) as region:
        north = region.it.archives[0]
        north.hold()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(mine(region.it))
            await north.held()
            region.manager.persons = list(ELSEWHERE)
            await region.notice(a31(ME, SOUTHERN))
            north.release()
        assert asking.result().final.status == 0x0000
        assert studies(asking.result()) == held.mine - {uid(held.north)}


async def test_what_was_acknowledged_is_heeded_after_a_kill(start: MakeProxy) -> None:
    """AA is a promise: a proxy that ends before it has handled a notice does so when it is back."""
    held = Held()
    async with told(start, held, APART) as region:
        proxy = region.it.proxy
        assert await proxy.stop() == 0
        proxy.program = [sys.executable, "-c", HANDLES_NOTHING]
        await proxy.start()
        assert acknowledged(await tell(region.port, a40(ME, FORMER))) == ("AA", "1")
        journal = proxy.cache_directory / "state" / "hl7" / "journal"
        assert journal.stat().st_size
        assert (journal.stat().st_mode & 0o777, journal.parent.stat().st_mode & 0o777) == (
            0o600,
            0o700,
        )
        proxy.kill()
        assert proxy.named("identity_notice") == []
        proxy.program = [sys.executable, "-m", "dicomproxy"]
        await proxy.start()
        await region.heeded()
        (line,) = proxy.named("mllp_replayed")
        assert line["count"] == 1
        await proxy.until(lambda: not journal.stat().st_size, "done with it")


HANDLES_NOTHING = """
import asyncio, sys
from dicomproxy.cli.main import main
from dicomproxy.identity.notices import LiveIdentities

async def hang(self, notice):
    await asyncio.Event().wait()

LiveIdentities.__call__ = hang
sys.exit(main())
"""


async def test_a_caller_from_elsewhere_gets_nothing(start: MakeProxy) -> None:
    """Its connection is closed unread, which shows in log, metrics and on the page."""
    held = Held()
    async with told(start, held, PERSONS, allow_from="10.255.255.0/24") as region:
        proxy = region.it.proxy
        assert await tell(region.port, a40(ME, FORMER)) == ""
        (line,) = proxy.named("mllp_connection_refused")
        assert (line["peer_address"], line["reason"]) == ("127.0.0.1", "address")
        refused = "dicomproxy_mllp_connections_refused_total"
        assert await proxy.metric(refused, reason="address") == 1
        assert "mllp_message" not in proxy.events()


async def test_what_is_told_shows(start: MakeProxy) -> None:
    """How many notices there were and when, how many were refused, and whom nobody knows."""
    held = Held()
    async with told(start, held, PERSONS) as region:
        proxy = region.it.proxy
        await region.notice(a40(ME, FORMER))
        await region.notice(a31(("1", "NOWHERE", "1.2.99")), count=2)
        refused = a31().replace(b"ADT^A31^ADT_A05", b"ADT^A08")
        assert acknowledged(await tell(region.port, refused)) == ("AR", "1")
        _, page = await asyncio.to_thread(proxy.http, "/")
        for name, value in (
            ("Messages acknowledged", "2"),
            ("Merges / updates heeded", "1 / 1"),
            ("Connections refused", "0"),
        ):
            assert f"<dt>{name}</dt><dd>{value}</dd>" in page
        assert '<dt>Messages refused</dt><dd><span class="warn">1</span>' in page
        notices = "dicomproxy_identity_notices_total"
        assert await proxy.metric(notices, operation="merge", outcome="forgotten") == 1
        assert await proxy.metric(notices, operation="update", outcome="unknown_domain") == 1


@pytest.mark.parametrize("mutual", [False, True], ids=["ours", "mutual"])
async def test_notices_over_tls(start: MakeProxy, tmp_path: Path, mutual: bool) -> None:
    """Who speaks no TLS, or is certified by nobody known where that is asked, is not heard."""
    held = Held()
    files = {"certificate_file": str(authority().certificate_file(tmp_path))}
    theirs = calling(tmp_path)
    if mutual:
        files["ca_file"] = str(authority().ca_file(tmp_path))
    async with told(start, held, PERSONS, tls=files) as region:
        assert await tell(region.port, a40(ME, FORMER)) == ""
        if mutual:
            theirs.load_cert_chain(stranger().certificate_file(tmp_path, "stranger"))
            assert await tell(region.port, a40(ME, FORMER), theirs) == ""
            theirs = calling(tmp_path)
            theirs.load_cert_chain(authority().certificate_file(tmp_path, "feed"))
        assert region.it.proxy.named("mllp_message") == []
        await region.notice(a40(ME, FORMER), tls=theirs)


@asynccontextmanager
async def standing(proxy: Proxy) -> AsyncIterator[Any]:
    """Hold an association of READING1's; what is yielded asks for the person's studies on it."""
    association = await asyncio.to_thread(
        new_entity("READING1").associate,
        "127.0.0.1",
        proxy.port,
        [build_context(FIND["S"], UNCOMPRESSED)],
        proxy.node.ae_title,
    )
    assert association.is_established

    def ask() -> list[Dataset]:
        keys = identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID="")
        answers = association.send_c_find(keys, FIND["S"])
        return [row for _, row in answers if row is not None]

    try:
        yield lambda: asyncio.to_thread(ask)
    finally:
        await asyncio.to_thread(association.release)
