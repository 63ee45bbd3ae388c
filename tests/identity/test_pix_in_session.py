"""A cross-reference that is late, fails, and changes in the middle of a session.

PIX, the memory of what it said, and the notices that a registry sends, together: the
manager and the sender of notices are real sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.client import MllpClient
from dicomproxy.hl7.inbox import Inbox
from dicomproxy.hl7.journal import Journal
from dicomproxy.hl7.listener import MllpListener
from dicomproxy.identity.crossref import Identities, IdentityUnresolved, Provider
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.notices import IdentityNotice, IdentityNotices
from dicomproxy.identity.pix import PixCrossReference
from dicomproxy.ports import CrossReferenceError, Failure
from tests.peers.mllp_server import Caller
from tests.peers.pix_manager import PixManager, pix_manager
from tests.sentinel import PATIENT_ID

HERE = Domain("HERE", "1.2.1", "ISO")
NORTH = Domain("NORTH", "1.2.2", "ISO")

ME, OLD, OTHER = (PatientId(one, HERE) for one in (PATIENT_ID, "OLD", "OTHER"))
MINE, SOMEBODY = PatientId("N-1", NORTH), PatientId(PATIENT_ID, NORTH)


def cx(one: PatientId) -> tuple[str, str, str]:
    return one.value, one.domain.namespace, one.domain.universal_id


PERSONS = [[cx(ME), cx(MINE)], [cx(OTHER), cx(SOMEBODY)], [cx(OLD)]]


@dataclass
class Session:
    """What runs, and the hospital's own feed."""

    manager: PixManager
    identities: Identities
    inbox: Inbox
    feed: MllpClient
    sent: int = 0

    async def tells(self, kind: str, surviving: PatientId, old: PatientId | None = None) -> None:
        """Send an A40 or A31 and return once it is acknowledged and handled."""
        self.sent += 1
        lines = [
            f"MSH|^~\\&|ADT|HOSP|US|HOSP|2024||ADT^{kind}|M{self.sent}|P|2.5",
            "PID|||{}^^^{}&{}&ISO".format(*cx(surviving)),
        ]
        if old is not None:
            lines.append("MRG|{}^^^{}&{}&ISO".format(*cx(old)))
        message = "".join(f"{line}\r" for line in lines).encode()
        answer = await self.feed.exchange(message, bytes)
        assert f"MSA|AA|M{self.sent}\r".encode() in answer
        await self.inbox.wait_idle()

    def asked(self) -> int:
        return len(self.manager.questions)


@asynccontextmanager
async def running(directory: Path, **options: float) -> AsyncIterator[Session]:
    async with pix_manager(*PERSONS) as manager:
        pix = PixCrossReference(MllpClient("127.0.0.1", manager.port, **options))  # type: ignore[arg-type]
        identities = Identities(
            Domains(HERE, {"north": NORTH}), {"north": [Provider("region", pix)]}
        )

        async def forget(notice: IdentityNotice) -> None:
            identities.forget(*notice.patient_ids)

        inbox = Inbox(Journal(directory / "journal"))
        IdentityNotices(forget, default=HERE).subscribe_to(inbox)
        await inbox.start()
        listener = MllpListener(inbox.receive)
        feed = MllpClient("127.0.0.1", await listener.start("127.0.0.1", 0))
        try:
            yield Session(manager, identities, inbox, feed)
        finally:
            await feed.close()
            await listener.close()
            await inbox.close()
            await identities.close()
            await pix.close()


async def test_each_person_is_known_by_their_own_id_and_no_other(tmp_path: Path) -> None:
    """Not by that of the one whose ID elsewhere equals theirs here, in either direction."""
    async with running(tmp_path) as session:
        identities = session.identities
        assert await identities.elsewhere(ME, "north") == (MINE,)
        assert await identities.elsewhere(OTHER, "north") == (SOMEBODY,)
        assert await identities.here(MINE, "north") == ME
        assert await identities.here(SOMEBODY, "north") == OTHER
        asked = session.asked()
        assert await identities.elsewhere(ME, "north") == (MINE,)
        assert session.asked() == asked


@pytest.mark.parametrize("kind", ["A40", "A31"])
async def test_a_notice_ends_what_is_remembered(tmp_path: Path, kind: str) -> None:
    """After it the manager is asked again, for the person and in both directions."""
    async with running(tmp_path) as session:
        identities = session.identities
        assert await identities.elsewhere(ME, "north") == (MINE,)
        assert await identities.here(MINE, "north") == ME
        # A registry finds out that north's N-1 is somebody else.
        session.manager.persons = [[cx(ME)], [cx(OTHER), cx(MINE)]]
        assert await identities.elsewhere(ME, "north") == (MINE,)
        await session.tells(kind, ME, OLD if kind == "A40" else None)
        assert await identities.elsewhere(ME, "north") == ()
        assert await identities.here(MINE, "north") == OTHER


async def test_an_outage_after_a_notice_is_neither_the_old_answer_nor_none(
    tmp_path: Path,
) -> None:
    """Whoever asks is told that it could not be found out."""
    async with running(tmp_path) as session:

        async def closes(caller: Caller, content: bytes) -> None:
            caller.close()

        assert await session.identities.elsewhere(ME, "north") == (MINE,)
        session.manager.behave = closes
        await session.tells("A40", ME, OLD)
        for _ in range(2):
            with pytest.raises(CrossReferenceError) as caught:
                await session.identities.elsewhere(ME, "north")
            assert caught.value.failure is Failure.ABORTED
        session.manager.behave = None
        assert await session.identities.elsewhere(ME, "north") == (MINE,)


async def test_an_answer_on_its_way_when_the_notice_comes_is_not_taken(tmp_path: Path) -> None:
    """It speaks of before; the manager is asked once more."""
    async with running(tmp_path) as session:
        manager, gate = session.manager, asyncio.Event()

        async def slow(caller: Caller, content: bytes) -> None:
            answer = manager.honest(manager.questions[-1]).written(manager.questions[-1])
            manager.behave = None
            await gate.wait()
            await caller.send(answer)

        manager.behave = slow
        asking = asyncio.get_running_loop().create_task(session.identities.elsewhere(ME, "north"))
        assert manager.server is not None
        await manager.server.until(lambda: session.asked() == 1)
        manager.persons = [[cx(ME)], [cx(OTHER), cx(MINE)]]
        await session.tells("A40", ME, OLD)
        gate.set()
        assert await asking == ()
        assert session.asked() == 2


async def test_a_late_answer_is_an_outage_and_nobodys_afterwards(tmp_path: Path) -> None:
    """The next question has its own answer, on another connection."""
    async with running(tmp_path, deadline_seconds=0.3) as session:
        held: list[Caller] = []

        async def silent(caller: Caller, content: bytes) -> None:
            held.append(caller)

        session.manager.behave = silent
        with pytest.raises(CrossReferenceError) as caught:
            await session.identities.elsewhere(OTHER, "north")
        assert caught.value.failure is Failure.TIMEOUT
        question = session.manager.questions[0]
        session.manager.behave = None
        try:
            await held[0].send(session.manager.honest(question).written(question))
        except (OSError, RuntimeError):
            pass  # its connection is gone
        assert await session.identities.elsewhere(ME, "north") == (MINE,)


async def test_an_id_from_elsewhere_that_leads_to_nobody_is_withheld(tmp_path: Path) -> None:
    """And one that cannot be looked up as well: neither is anybody's."""
    async with running(tmp_path) as session:
        with pytest.raises(IdentityUnresolved):
            await session.identities.here(PatientId("N-9", NORTH), "north")

        async def closes(caller: Caller, content: bytes) -> None:
            caller.reset()

        session.manager.behave = closes
        with pytest.raises(CrossReferenceError):
            await session.identities.here(PatientId("N-8", NORTH), "north")
