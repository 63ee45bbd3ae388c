"""PIX against a manager that answers in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.client import MllpClient
from dicomproxy.identity.pix import PixCrossReference, PixSettings, SeveralIds
from dicomproxy.ports import CrossReference, CrossReferenceError, Failure
from tests.peers.mllp_server import Caller
from tests.peers.pix_manager import PixManager, Question, Reply, pix_manager
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID, sentinels_in
from tests.support.certificates import calling, serving, stranger

HERE = Domain("HERE", "1.2.1", "ISO")
NORTH = Domain("NORTH", "1.2.2", "ISO")
SOUTH = Domain("SOUTH", "1.2.3", "ISO")

PERSON = [
    (PATIENT_ID, "HERE", "1.2.1"),
    ("N-1", "NORTH", "1.2.2"),
    ("S-1", "SOUTH", "1.2.3"),
    ("S-2", "SOUTH", "1.2.3"),
]
OTHER = [("OTHER", "HERE", "1.2.1"), (PATIENT_ID, "NORTH", "1.2.2")]
HERE_ONLY = [("ALONE", "HERE", "1.2.1")]

PATIENT = PatientId(PATIENT_ID, HERE)
USUAL = PixSettings()


def asking(port: int, settings: PixSettings = USUAL, **options: Any) -> PixCrossReference:
    client = MllpClient("127.0.0.1", port, **options)
    return PixCrossReference(client, settings, now=lambda: datetime(2024, 5, 6, tzinfo=UTC))


@asynccontextmanager
async def region(
    settings: PixSettings = USUAL, **options: Any
) -> AsyncIterator[tuple[PixManager, PixCrossReference]]:
    async with pix_manager(PERSON, OTHER, HERE_ONLY) as manager:
        pix = asking(manager.port, settings, **options)
        yield manager, pix
        await pix.close()


async def failure_of(
    pix: CrossReference, patient: PatientId = PATIENT, domain: Domain = NORTH
) -> tuple[Failure, str]:
    """Return how a lookup fails; its text names no patient, and neither does what is behind it."""
    with pytest.raises(CrossReferenceError) as caught:
        await pix.lookup(patient, domain)
    error: BaseException | None = caught.value
    while error is not None:
        assert sentinels_in(f"{error!r} {error}") == []
        error = None if error.__suppress_context__ else error.__context__
    return caught.value.failure, caught.value.reason


async def test_a_persons_id_elsewhere_is_found() -> None:
    """Theirs, and not that of the person who has the same ID there."""
    async with region() as (_, pix):
        assert await pix.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)
        assert await pix.lookup(PatientId(PATIENT_ID, NORTH), HERE) == (PatientId("OTHER", HERE),)


async def test_the_question_names_both_domains_and_nothing_else() -> None:
    """QPD-3 is the ID with its authority, QPD-4 the domain wanted."""
    settings = PixSettings(
        sending_facility="HOSP",
        receiving_application=("PIX", "1.9", "ISO"),
        receiving_facility="REGION",
    )
    async with region(settings) as (manager, pix):
        await pix.lookup(PATIENT, NORTH)
        header, query, _, _ = manager.questions[0].text.split("\r")
        assert header.startswith(
            "MSH|^~\\&|DICOMPROXY|HOSP|PIX^1.9^ISO|REGION|20240506000000+0000|"
        )
        assert query.endswith(f"|{PATIENT_ID}^^^HERE&1.2.1&ISO|^^^NORTH&1.2.2&ISO")


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (Domain("", "1.2.1", "ISO"), Domain("", "1.2.2", "ISO")),
        (Domain("", "1.2.1"), Domain("", "1.2.2")),
        (Domain("HERE"), Domain("NORTH")),
    ],
)
async def test_a_domain_is_named_as_far_as_it_is_known(here: Domain, there: Domain) -> None:
    """By its OID alone, or its namespace alone; the answer bears the domain that was asked for."""
    async with region() as (_, pix):
        found = await pix.lookup(PatientId(PATIENT_ID, here), there)
        assert found == (PatientId("N-1", there),)


async def test_several_ids_are_all_taken_or_none() -> None:
    """As the site has decided; none is an error, not an empty answer."""
    async with region(PixSettings(several_ids=SeveralIds.ALL)) as (_, pix):
        assert await pix.lookup(PATIENT, SOUTH) == (
            PatientId("S-1", SOUTH),
            PatientId("S-2", SOUTH),
        )
    async with region() as (_, pix):
        assert await failure_of(pix, domain=SOUTH) == (Failure.STATUS, "several_ids")


async def test_the_same_id_twice_is_one() -> None:
    """A manager that repeats itself does not make a person ambiguous."""
    async with region() as (manager, pix):
        manager.decide = lambda _: Reply(identifiers=["N-1^^^NORTH&1.2.2&ISO^PI"] * 2)
        assert await pix.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)


async def test_a_person_without_an_id_there_is_nobody_there() -> None:
    """NF, and an ID that the manager does not know (204 at QPD-3.1), are the only "none"."""
    async with region() as (_, pix):
        assert await pix.lookup(PatientId("ALONE", HERE), NORTH) == ()
        assert await pix.lookup(PatientId("UNKNOWN", HERE), NORTH) == ()


async def test_an_unknown_domain_is_a_fault_of_the_configuration() -> None:
    """Of the patient's own (component 4), or of the one asked for (QPD-4): never "nobody"."""
    async with region() as (manager, pix):
        nowhere = Domain("NOWHERE", "9.9", "ISO")
        unknown = (Failure.STATUS, "unknown_domain")
        assert await failure_of(pix, PatientId(PATIENT_ID, nowhere)) == unknown
        assert await failure_of(pix, domain=nowhere) == unknown
        asked = len(manager.questions)
        assert asked == 2
        assert await failure_of(pix, PatientId(PATIENT_ID)) == unknown
        assert await failure_of(pix, domain=Domain()) == unknown
        assert len(manager.questions) == asked


ERR_204 = "204^Unknown Key Identifier^HL70357|E"

REPLIES: list[tuple[Reply, Failure, str]] = [
    (Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1^4|{ERR_204}"]), Failure.STATUS, "unknown_domain"),
    (Reply("AE", "AE", errors=[f"ERR||QPD^1^4^1|{ERR_204}"]), Failure.STATUS, "unknown_domain"),
    (Reply("AE", "AE", errors=[f"ERR||QPD^1^4|{ERR_204}"]), Failure.STATUS, "unknown_domain"),
    # Which of the two it is cannot be told.
    (Reply("AE", "AE", errors=[f"ERR|||{ERR_204}"]), Failure.STATUS, "unknown_key"),
    (Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1|{ERR_204}"]), Failure.STATUS, "unknown_key"),
    (Reply("AE", "AE", errors=[f"ERR||PID^1^3^1^1|{ERR_204}"]), Failure.STATUS, "unknown_key"),
    # Meant for the domain by some, with repetition and component in the wrong order.
    (Reply("AE", "AE", errors=[f"ERR||QPD^1^3^4^1|{ERR_204}"]), Failure.STATUS, "unknown_key"),
    # The ID is unknown, and something else is wrong too.
    (
        Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1^1|{ERR_204}", "ERR|||207|E"]),
        Failure.STATUS,
        "unknown_key",
    ),
    (
        Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1^1~QPD^1^4^1|{ERR_204}"]),
        Failure.STATUS,
        "unknown_domain",
    ),
    (Reply("AE", "AE", errors=["ERR||QPD^1^3^1^1|207|E"]), Failure.STATUS, "application_error"),
    (Reply("AE", "AE"), Failure.STATUS, "application_error"),
    (Reply("AE", None, message_type="ACK"), Failure.STATUS, "application_error"),
    (Reply("AA", "AE"), Failure.STATUS, "application_error"),
    (Reply("AE", "OK", identifiers=["N-1^^^NORTH"]), Failure.STATUS, "application_error"),
    (Reply("AE", "NF"), Failure.STATUS, "application_error"),
    (Reply("AR", "AR"), Failure.STATUS, "rejected"),
    (Reply("AR", None, message_type="ACK"), Failure.STATUS, "rejected"),
    (Reply("AA", "AR"), Failure.STATUS, "rejected"),
    (Reply("AR", "AR", errors=[f"ERR||QPD^1^4^1|{ERR_204}"]), Failure.STATUS, "unknown_domain"),
    (Reply("AA", "XX"), Failure.PROTOCOL, "wrong_query_status"),
    (Reply("AA", None), Failure.PROTOCOL, "wrong_query_status"),
    (Reply("CA", "OK"), Failure.PROTOCOL, "wrong_acknowledgement"),
    (Reply("", "OK"), Failure.PROTOCOL, "wrong_acknowledgement"),
    (Reply(control_id="X"), Failure.PROTOCOL, "wrong_control_id"),
    (Reply(control_id=""), Failure.PROTOCOL, "wrong_control_id"),
    (Reply(status="NF", control_id="X"), Failure.PROTOCOL, "wrong_control_id"),
    (Reply(status="NF", tag="X"), Failure.PROTOCOL, "wrong_query_tag"),
    (Reply(status="NF", message_type="RSP^K22^RSP_K22"), Failure.PROTOCOL, "wrong_message_type"),
    (Reply(status="NF", message_type="ACK"), Failure.PROTOCOL, "wrong_message_type"),
    (Reply(status="NF", identifiers=["N-1^^^NORTH"]), Failure.PROTOCOL, "contradictory_answer"),
    (Reply(status="NF", identifiers=["", "N-1"]), Failure.PROTOCOL, "contradictory_answer"),
    (Reply(status="NF", identifiers=[""] * 5_000), Failure.PROTOCOL, "contradictory_answer"),
    (Reply(), Failure.PROTOCOL, "answer_without_ids"),
    (Reply(identifiers=[]), Failure.PROTOCOL, "answer_without_ids"),
    (Reply(identifiers=["^^^NORTH", '""^^^NORTH']), Failure.PROTOCOL, "answer_without_ids"),
    (
        Reply(identifiers=["S-1^^^SOUTH&1.2.3&ISO"]),
        Failure.PROTOCOL,
        "answer_of_another_domain",
    ),
    # The right namespace with another OID, and an ID that names no domain.
    (Reply(identifiers=["N-1^^^NORTH&9.9&ISO"]), Failure.PROTOCOL, "answer_of_another_domain"),
    (Reply(identifiers=["N-1"]), Failure.PROTOCOL, "answer_of_another_domain"),
    (
        Reply(identifiers=["N-é^^^NORTH"], charset="UNICODE UTF-8", codec="latin-1"),
        Failure.PROTOCOL,
        "undecoded_id",
    ),
    (
        Reply(identifiers=["N-é^^^NORTH"], charset="EBCDIC", codec="latin-1"),
        Failure.PROTOCOL,
        "unknown_character_set",
    ),
    (
        Reply(identifiers=[f"N-{number}^^^NORTH" for number in range(600)]),
        Failure.PROTOCOL,
        "too_many_ids",
    ),
    (
        Reply(identifiers=["N-1^^^NORTH"], errors=["ZZZ|1"] * 20_000),
        Failure.PROTOCOL,
        "too_many_segments",
    ),
    # About somebody else, by what it repeats of the question.
    (
        Reply(identifiers=["N-9^^^NORTH"], query="QPD|IHE PIX Query||OTHER^^^HERE|^^^NORTH"),
        Failure.PROTOCOL,
        "wrong_query_echo",
    ),
    (
        Reply(status="NF", query=f"QPD|IHE PIX Query|X|{PATIENT_ID}^^^HERE|^^^NORTH"),
        Failure.PROTOCOL,
        "wrong_query_echo",
    ),
    (
        Reply(
            "AE",
            "AE",
            errors=[f"ERR||QPD^1^3^1^1|{ERR_204}"],
            query="QPD|IHE PIX Query||OTHER^^^HERE",
        ),
        Failure.PROTOCOL,
        "wrong_query_echo",
    ),
]


@pytest.mark.parametrize(("reply", "failure", "reason"), REPLIES)
async def test_every_other_answer_is_an_error(reply: Reply, failure: Failure, reason: str) -> None:
    """None of them is taken for a person without priors, and each has its own word."""
    async with region() as (manager, pix):
        manager.decide = lambda _: reply
        assert await failure_of(pix) == (failure, reason)
        manager.decide = manager.honest
        assert await pix.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)


@pytest.mark.parametrize(
    "reply",
    [
        Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1^1|{ERR_204}"]),
        Reply("AA", "AE", errors=[f"ERR||QPD^1^3^1^1|{ERR_204}"]),
        Reply("AR", "AR", errors=[f"ERR||QPD^1^3^1^1|{ERR_204}"]),
        Reply("AE", None, errors=[f"ERR||QPD^1^3^^1|{ERR_204}"]),
        Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1^1|{ERR_204}"], message_type="RSP^Q23"),
        Reply("AE", "AE", errors=[f"ERR||QPD^1^3^1^1~QPD^1^3^1^1|{ERR_204}"]),
        Reply(status="NF"),
        Reply(status="NF", identifiers=[""]),
        Reply(status="NF", tag=""),
        Reply(status="NF", query=""),
        Reply(status="NF", query="QPD|IHE PIX Query"),
        Reply(status="NF", query=f"QPD||| {PATIENT_ID} "),
    ],
)
async def test_nobody_is_said_in_the_words_of_the_transaction(reply: Reply) -> None:
    """What they may vary in does not matter."""
    async with region() as (manager, pix):
        manager.decide = lambda _: reply
        assert await pix.lookup(PATIENT, NORTH) == ()


async def test_ids_are_escaped_both_ways() -> None:
    """Separators within an ID neither end it nor move what follows."""
    odd = "A|B^C~D\\E&F"
    escaped = r"A\F\B\S\C\R\D\E\E\T\F"
    async with region() as (manager, pix):

        def turned(question: Question) -> Reply:
            assert question.identifier == [escaped, "", "", "HERE&1.2.1&ISO"]
            return Reply(identifiers=[f"{escaped}^^^NORTH&1.2.2&ISO"])

        manager.decide = turned
        assert await pix.lookup(PatientId(odd, HERE), NORTH) == (PatientId(odd, NORTH),)


@pytest.mark.parametrize(("charset", "codec"), [("UNICODE UTF-8", "utf-8"), ("8859/1", "latin-1")])
async def test_ids_beyond_ascii_are_sent_and_read_in_the_character_set_agreed(
    charset: str, codec: str
) -> None:
    """Question and answer each name their own in MSH-18."""
    async with region(PixSettings(charset=charset)) as (manager, pix):

        def turned(question: Question) -> Reply:
            assert question.identifier[0] == "Ä-1"
            return Reply(identifiers=["Ö-1^^^NORTH"], charset=charset, codec=codec)

        manager.decide = turned
        assert await pix.lookup(PatientId("Ä-1", HERE), NORTH) == (PatientId("Ö-1", NORTH),)


async def test_an_id_that_cannot_be_written_is_not_sent() -> None:
    """Another one would be asked about."""
    async with region(PixSettings(charset="8859/1")) as (manager, pix):
        assert await failure_of(pix, PatientId("Ж-1", HERE)) == (
            Failure.PROTOCOL,
            "not_in_character_set",
        )
        assert await failure_of(pix, PatientId("", HERE)) == (Failure.STATUS, "unreadable_id")
        assert await failure_of(pix, PatientId("\ufffd", HERE)) == (
            Failure.STATUS,
            "unreadable_id",
        )
        assert manager.questions == []


async def test_garbage_is_a_protocol_error() -> None:
    """No frame, a frame that is no message, and one without end."""

    async def no_frame(caller: Caller, content: bytes) -> None:
        await caller.send_raw(b"220 mail.example ESMTP\r\n")

    async def no_message(caller: Caller, content: bytes) -> None:
        await caller.send(b"<html/>")

    async def endless(caller: Caller, content: bytes) -> None:
        await caller.send_raw(b"\x0b" + b"A" * 5000)

    async with region(max_answer_bytes=2000) as (manager, pix):
        found = []
        for manager.behave in (no_frame, no_message, endless):
            found.append(await failure_of(pix))
        assert found == [
            (Failure.PROTOCOL, "no_frame"),
            (Failure.PROTOCOL, "no_message"),
            (Failure.PROTOCOL, "frame_too_long"),
        ]


async def test_silence_and_lateness_end_at_the_deadline() -> None:
    """A late answer to one patient's question is never that to the next one's."""

    async def silent(caller: Caller, content: bytes) -> None:
        held.append((caller, content))

    held: list[tuple[Caller, bytes]] = []
    async with region(deadline_seconds=0.3) as (manager, pix):
        manager.behave = silent
        assert await failure_of(pix, PatientId("OTHER", HERE)) == (Failure.TIMEOUT, "")

        async def late_one_first(caller: Caller, content: bytes) -> None:
            question = manager.questions[0]
            try:
                await held[0][0].send(manager.honest(question).written(question))
            except (OSError, RuntimeError):
                pass  # its connection is gone
            question = manager.questions[-1]
            await caller.send(manager.honest(question).written(question))

        manager.behave = late_one_first
        assert await pix.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)


async def test_closing_in_mid_message_is_an_outage() -> None:
    """Half an answer says nothing, even if the half that came says NF."""

    async def half(caller: Caller, content: bytes) -> None:
        whole = Reply(status="NF").written(manager.questions[-1])
        await caller.send_raw(b"\x0b" + whole)
        caller.close()

    async with region() as (manager, pix):
        manager.behave = half
        assert await failure_of(pix) == (Failure.ABORTED, "mid_message")
        assert len(manager.questions) == 2


async def test_a_manager_that_restarted_is_asked_again() -> None:
    """The connection kept from the last question is stale; nobody notices."""
    async with region() as (manager, pix):
        await pix.lookup(PATIENT, NORTH)
        assert manager.server is not None
        manager.server.callers[1].reset()
        assert await pix.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)


async def test_no_manager_is_an_outage() -> None:
    """Nobody listens there."""
    pix = asking(free_port())
    assert await failure_of(pix) == (Failure.UNREACHABLE, "")
    await pix.close()
    assert await failure_of(pix) == (Failure.ABORTED, "client_closed")


async def test_many_patients_at_once_get_each_their_own_answer() -> None:
    """Over fewer connections than questions."""
    persons = [[(f"H-{n}", "HERE", "1.2.1"), (f"N-{n}", "NORTH", "1.2.2")] for n in range(30)]
    async with pix_manager(*persons) as manager:
        pix = asking(manager.port, max_connections=3)
        async with asyncio.TaskGroup() as group:
            asked = {
                n: group.create_task(pix.lookup(PatientId(f"H-{n}", HERE), NORTH))
                for n in range(30)
            }
        assert {n: task.result() for n, task in asked.items()} == {
            n: (PatientId(f"N-{n}", NORTH),) for n in range(30)
        }
        assert manager.server is not None
        assert manager.server.connections <= 3
        await pix.close()


async def test_over_tls_a_manager_proves_who_it_is(tmp_path: Path) -> None:
    """With the right certificate it is asked, with a wrong one it learns nothing."""
    async with pix_manager(PERSON, tls=serving(tmp_path)) as manager:
        pix = asking(manager.port, tls=calling(tmp_path))
        assert await pix.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)
        await pix.close()
    async with pix_manager(PERSON, tls=serving(tmp_path, by=stranger())) as manager:
        pix = asking(manager.port, tls=calling(tmp_path))
        assert await failure_of(pix) == (Failure.UNREACHABLE, "certificate")
        assert manager.questions == []
        await pix.close()
