"""PIXm against a manager that answers in every way."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.pix import SeveralIds
from dicomproxy.identity.pixm import PixmCrossReference, PixmSettings, system_of
from dicomproxy.ports import CrossReference, CrossReferenceError, Failure
from tests.peers.pixm_manager import (
    UNKNOWN_ID,
    UNKNOWN_SOURCE,
    UNKNOWN_TARGET,
    PixmManager,
    Question,
    outcome,
    parameters,
    pixm_manager,
    response,
)
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID, sentinels_in
from tests.support.certificates import calling, serving, stranger

HERE = Domain("HERE", "1.2.1", "ISO")
NORTH = Domain("NORTH", "1.2.2", "ISO")
SOUTH = Domain("SOUTH", "1.2.3", "ISO")
HERE_URI, NORTH_URI, SOUTH_URI = "urn:oid:1.2.1", "urn:oid:1.2.2", "urn:oid:1.2.3"

PERSON = [
    (HERE_URI, PATIENT_ID),
    (NORTH_URI, "N-1"),
    (SOUTH_URI, "S-1"),
    (SOUTH_URI, "S-2"),
]
OTHER = [(HERE_URI, "OTHER"), (NORTH_URI, PATIENT_ID)]
HERE_ONLY = [(HERE_URI, "ALONE")]

PATIENT = PatientId(PATIENT_ID, HERE)


def asking(
    port: int, *, scheme: str = "http", tls: ssl.SSLContext | None = None, **settings: Any
) -> PixmCrossReference:
    return PixmCrossReference(
        PixmSettings(f"{scheme}://127.0.0.1:{port}/fhir/", **settings), tls=tls
    )


@asynccontextmanager
async def region(**settings: Any) -> AsyncIterator[tuple[PixmManager, PixmCrossReference]]:
    async with pixm_manager(PERSON, OTHER, HERE_ONLY) as manager:
        pixm = asking(manager.port, **settings)
        try:
            yield manager, pixm
        finally:
            await pixm.close()


async def failure_of(
    pixm: CrossReference, patient: PatientId = PATIENT, domain: Domain = NORTH
) -> tuple[Failure, str]:
    """Return how a lookup fails; nothing about it names the patient, who is in the URL."""
    with pytest.raises(CrossReferenceError) as caught:
        await pixm.lookup(patient, domain)
    error: BaseException | None = caught.value
    while error is not None:
        assert sentinels_in(f"{error!r} {error}") == []
        error = None if error.__suppress_context__ else error.__context__
    return caught.value.failure, caught.value.reason


def answers(manager: PixmManager, data: bytes) -> None:
    async def behave(_question: Question, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    manager.behave = behave


async def test_a_persons_id_elsewhere_is_found() -> None:
    """Theirs, and not that of the person who has the same ID there."""
    async with region() as (manager, pixm):
        assert await pixm.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)
        assert await pixm.lookup(PatientId(PATIENT_ID, NORTH), HERE) == (PatientId("OTHER", HERE),)
        assert manager.connections == 1


async def test_the_question_is_that_of_the_transaction() -> None:
    """One source identifier with its system, one target system, and JSON asked for."""
    async with region(authorization="Bearer secret") as (manager, pixm):
        await pixm.lookup(PATIENT, NORTH)
        question = manager.questions[0]
        assert question.parameters == [
            ("sourceIdentifier", f"urn:oid:1.2.1|{PATIENT_ID}"),
            ("targetSystem", "urn:oid:1.2.2"),
        ]
        assert question.headers["accept"] == "application/fhir+json"
        assert question.headers["authorization"] == "Bearer secret"
        assert "cookie" not in question.headers
    assert "secret" not in repr(PixmSettings("http://pixm", authorization="secret"))


@pytest.mark.parametrize("value", ["A+B&C=D%20 E/F#G", "a|b,c$d\\e", "Ж-王", "A?;:@"])
async def test_any_id_arrives_as_it_is(value: str) -> None:
    """Neither the URL nor the token gives a character another meaning."""
    async with pixm_manager([(HERE_URI, value), (NORTH_URI, "N-9")]) as manager:
        pixm = asking(manager.port)
        assert await pixm.lookup(PatientId(value, HERE), NORTH) == (PatientId("N-9", NORTH),)
        await pixm.close()


async def test_what_a_token_gives_a_meaning_to_is_escaped() -> None:
    """A bar, comma, dollar sign or backslash within an ID is part of it."""
    async with region() as (manager, pixm):
        assert await pixm.lookup(PatientId("a|b,c$d\\e", HERE), NORTH) == ()
        asked = manager.questions[0]["sourceIdentifier"]
        assert asked == "urn:oid:1.2.1|a\\|b\\,c\\$d\\\\e"


async def test_a_domain_known_by_a_uuid_is_the_same_in_capitals() -> None:
    """Managers write them either way."""
    there = Domain("", "0F9A3C1E-0000-4000-8000-00000000ABCD", "UUID")
    system = "URN:uuid:0F9A3C1E-0000-4000-8000-00000000ABCD"
    async with region() as (manager, pixm):
        answers(manager, response(200, parameters((system, "N-1"))))
        assert await pixm.lookup(PATIENT, there) == (PatientId("N-1", there),)


async def test_several_ids_are_all_taken_or_none() -> None:
    """As the site has decided; none is an error, not an empty answer."""
    async with region(several_ids=SeveralIds.ALL) as (_, pixm):
        assert await pixm.lookup(PATIENT, SOUTH) == (
            PatientId("S-1", SOUTH),
            PatientId("S-2", SOUTH),
        )
    async with region() as (manager, pixm):
        assert await failure_of(pixm, domain=SOUTH) == (Failure.STATUS, "several_ids")
        answers(manager, response(200, parameters((SOUTH_URI, "S-1"), (SOUTH_URI, "S-1"))))
        assert await pixm.lookup(PATIENT, SOUTH) == (PatientId("S-1", SOUTH),)


async def test_a_person_without_an_id_there_is_nobody_there() -> None:
    """An answer without identifiers, and a 404 of the ID, are the only "none"."""
    async with region() as (manager, pixm):
        assert await pixm.lookup(PatientId("ALONE", HERE), NORTH) == ()
        assert await pixm.lookup(PatientId("UNKNOWN", HERE), NORTH) == ()
        for empty in ({"resourceType": "Parameters"}, shaped([])):
            answers(manager, response(200, empty))
            assert await pixm.lookup(PATIENT, NORTH) == ()
        text = "sourceIdentifier Patient Identifier not found"
        answers(manager, response(404, outcome("not-found", text, where="details")))
        assert await pixm.lookup(PATIENT, NORTH) == ()


async def test_an_unknown_domain_is_a_fault_of_the_configuration() -> None:
    """Of the patient's own (400), or of the one asked for (403): never "nobody"."""
    async with region() as (manager, pixm):
        nowhere = Domain("NOWHERE", "9.9", "ISO")
        unknown = (Failure.STATUS, "unknown_domain")
        assert await failure_of(pixm, PatientId(PATIENT_ID, nowhere)) == unknown
        assert await failure_of(pixm, domain=nowhere) == unknown
        asked = len(manager.questions)
        assert asked == 2
        # FHIR cannot name these, and nothing is sent.
        assert await failure_of(pixm, PatientId(PATIENT_ID)) == unknown
        assert await failure_of(pixm, domain=Domain("NORTH")) == unknown
        assert await failure_of(pixm, PatientId("", HERE)) == (Failure.STATUS, "unreadable_id")
        assert len(manager.questions) == asked


IDENTIFIER = {"system": NORTH_URI, "value": "N-1"}


def shaped(parameter: Any) -> dict[str, Any]:
    return {"resourceType": "Parameters", "parameter": parameter}


ANSWERS: list[tuple[str, bytes, Failure, str]] = [
    ("source", response(400, UNKNOWN_SOURCE), Failure.STATUS, "unknown_domain"),
    ("target", response(403, UNKNOWN_TARGET), Failure.STATUS, "unknown_domain"),
    ("source as 404", response(404, UNKNOWN_SOURCE), Failure.STATUS, "unknown_domain"),
    ("bare 400", response(400), Failure.STATUS, "http_400"),
    ("bare 401", response(401), Failure.STATUS, "http_401"),
    ("forbidden", response(403, outcome("forbidden", "no")), Failure.STATUS, "http_403"),
    ("bare 404", response(404), Failure.STATUS, "http_404"),
    ("a page", response(404, b"<html>not found</html>"), Failure.STATUS, "http_404"),
    (
        "no such operation",
        response(404, outcome("not-found", "Resource Patient/$ihe-pix is not known")),
        Failure.STATUS,
        "http_404",
    ),
    ("not said of what", response(404, outcome("not-found", "")), Failure.STATUS, "http_404"),
    (
        "authority",
        response(404, outcome("not-found", "sourceIdentifier Assigning Authority not found")),
        Failure.STATUS,
        "unknown_domain",
    ),
    (
        "no issue",
        response(404, {"resourceType": "OperationOutcome", "issue": []}),
        Failure.STATUS,
        "http_404",
    ),
    ("odd issue", response(404, {"resourceType": "OperationOutcome"}), Failure.STATUS, "http_404"),
    ("unknown but 500", response(500, UNKNOWN_ID), Failure.STATUS, "http_500"),
    ("bare 500", response(500), Failure.STATUS, "http_500"),
    ("503", response(503, b"", "Retry-After: 9"), Failure.STATUS, "http_503"),
    ("204", response(204), Failure.STATUS, "http_204"),
    *(
        (
            f"redirect {code}",
            response(code, b"", "Location: http://127.0.0.1:9/fhir/Patient/$ihe-pix"),
            Failure.PROTOCOL,
            "redirected",
        )
        for code in (301, 302, 303, 307, 308)
    ),
    ("no JSON", response(200, b"<Parameters/>"), Failure.PROTOCOL, "no_json"),
    ("empty", response(200), Failure.PROTOCOL, "no_json"),
    ("half JSON", response(200, b'{"resourceType": "Para'), Failure.PROTOCOL, "no_json"),
    ("not UTF-8", response(200, b'{"a": "\xff"}'), Failure.PROTOCOL, "no_json"),
    ("deep", response(200, b"[" * 100_000), Failure.PROTOCOL, "no_json"),
    ("a list", response(200, [IDENTIFIER]), Failure.PROTOCOL, "no_json"),
    ("a Bundle", response(200, {"resourceType": "Bundle"}), Failure.PROTOCOL, "wrong_resource"),
    ("an outcome", response(200, UNKNOWN_ID), Failure.PROTOCOL, "wrong_resource"),
    ("no type", response(200, {"parameter": []}), Failure.PROTOCOL, "wrong_resource"),
    ("an object", response(200, shaped({"name": "x"})), Failure.PROTOCOL, "wrong_resource"),
    ("texts", response(200, shaped(["x"])), Failure.PROTOCOL, "wrong_resource"),
    *(
        (
            f"identifier {value!r}",
            response(200, shaped([{"name": "targetIdentifier", "valueIdentifier": value}])),
            Failure.PROTOCOL,
            "wrong_resource",
        )
        for value in (
            None,
            "N-1",
            [IDENTIFIER],
            {"system": NORTH_URI},
            {"system": NORTH_URI, "value": 1},
            {"system": NORTH_URI, "value": " "},
        )
    ),
    (
        "undecoded",
        response(200, parameters((NORTH_URI, "N\ufffd"))),
        Failure.PROTOCOL,
        "undecoded_id",
    ),
    (
        "another system",
        response(200, parameters((SOUTH_URI, "S-1"))),
        Failure.PROTOCOL,
        "answer_of_another_domain",
    ),
    (
        "no system",
        response(200, shaped([{"name": "targetIdentifier", "valueIdentifier": {"value": "N"}}])),
        Failure.PROTOCOL,
        "answer_of_another_domain",
    ),
    ("too long", response(200, b" " * 300_000), Failure.PROTOCOL, "answer_too_long"),
    (
        "packed",
        response(200, gzip.compress(json.dumps(parameters()).encode()), "Content-Encoding: gzip"),
        Failure.PROTOCOL,
        "no_json",
    ),
    ("no HTTP", b"220 mail.example ESMTP\r\n\r\n", Failure.PROTOCOL, "no_http"),
    ("MLLP", b"\x0bMSH|^~\\&|\x1c\r", Failure.PROTOCOL, "no_http"),
    (
        "endless header",
        b"HTTP/1.1 200 OK\r\nX: " + b"A" * 20_000 + b"\r\n\r\n",
        Failure.PROTOCOL,
        "no_http",
    ),
]


@pytest.mark.parametrize(
    ("data", "failure", "reason"), [pytest.param(*row[1:], id=row[0]) for row in ANSWERS]
)
async def test_every_other_answer_is_an_error(data: bytes, failure: Failure, reason: str) -> None:
    """None of them is taken for a person without priors, and each has its own word."""
    async with region(deadline_seconds=5.0) as (manager, pixm):
        answers(manager, data)
        assert await failure_of(pixm) == (failure, reason)
        assert len(manager.questions) == 1
        manager.behave = None
        assert await pixm.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)


async def test_an_answer_without_end_is_given_up_at_the_limit() -> None:
    """Chunks that never stop are not collected."""
    sent = 0

    async def endless(_question: Question, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
            sent += 0x2000
            await writer.drain()
        raise ConnectionError

    async with region(max_answer_bytes=50_000) as (manager, pixm):
        manager.behave = endless
        assert await failure_of(pixm) == (Failure.PROTOCOL, "answer_too_long")
    assert sent > 50_000


async def test_silence_ends_at_the_deadline() -> None:
    """Before the answer, within its head and within its body."""

    def saying(data: bytes) -> Any:
        async def behave(_question: Question, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            await writer.drain()

        return behave

    async with region(deadline_seconds=0.2) as (manager, pixm):
        for said in (b"", b"HTTP/1.1 2", response(200, parameters())[:-5]):
            manager.behave = saying(said)
            assert await failure_of(pixm) == (Failure.TIMEOUT, "")


async def test_a_late_answer_is_not_that_to_the_next_question() -> None:
    """What comes after the deadline is nobody's."""
    held: list[asyncio.StreamWriter] = []

    async def silent(_question: Question, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    async with region(deadline_seconds=0.3) as (manager, pixm):
        manager.behave = silent
        assert (await failure_of(pixm, PatientId("OTHER", HERE)))[0] is Failure.TIMEOUT

        async def late_one_first(question: Question, writer: asyncio.StreamWriter) -> None:
            held[0].write(manager.honest(manager.questions[0]))
            writer.write(manager.honest(question))

        manager.behave = late_one_first
        assert await pixm.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 2", response(404, UNKNOWN_ID)[:-5]])
async def test_closing_in_mid_answer_is_an_outage(said: bytes) -> None:
    """Half an answer says nothing, even if the half that came says 404."""

    async def closes(_question: Question, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        writer.close()
        raise ConnectionError

    async with region() as (manager, pixm):
        manager.behave = closes
        failure, _ = await failure_of(pixm)
        assert failure is Failure.ABORTED


async def test_no_manager_is_an_outage() -> None:
    """Nobody listens there; and a client that is closed asks nobody."""
    pixm = asking(free_port())
    assert await failure_of(pixm) == (Failure.UNREACHABLE, "")
    await pixm.close()
    assert await failure_of(pixm) == (Failure.ABORTED, "client_closed")


async def test_over_tls_a_manager_proves_who_it_is(tmp_path: Path) -> None:
    """With the right certificate it is asked, with a wrong one it learns nothing."""
    async with pixm_manager(PERSON, tls=serving(tmp_path)) as manager:
        pixm = asking(manager.port, scheme="https", tls=calling(tmp_path))
        assert await pixm.lookup(PATIENT, NORTH) == (PatientId("N-1", NORTH),)
        await pixm.close()
    for wrong in (serving(tmp_path, by=stranger()), serving(tmp_path, name="pixm.example")):
        async with pixm_manager(PERSON, tls=wrong) as manager:
            pixm = asking(manager.port, scheme="https", tls=calling(tmp_path))
            assert await failure_of(pixm) == (Failure.UNREACHABLE, "certificate")
            assert manager.questions == []
            await pixm.close()
    async with pixm_manager(PERSON) as manager:
        pixm = asking(manager.port, scheme="https", tls=calling(tmp_path), connect_seconds=1.0)
        assert (await failure_of(pixm))[0] in (Failure.UNREACHABLE, Failure.TIMEOUT)
        await pixm.close()


@pytest.mark.parametrize(
    ("domain", "uri"),
    [
        (Domain("N", "1.2.3", "ISO"), "urn:oid:1.2.3"),
        (Domain("", "1.2.3"), "urn:oid:1.2.3"),
        (Domain("", "2.999.1", "iso"), "urn:oid:2.999.1"),
        (Domain("", "A0EEBC99-9C0B", "UUID"), "urn:uuid:a0eebc99-9c0b"),
        (Domain("", "http://ids.example/mrn", "URI"), "http://ids.example/mrn"),
        (Domain("", "urn:oid:1.2.3"), "urn:oid:1.2.3"),
        (Domain("N"), ""),
        (Domain("N", "", "ISO"), ""),
        (Domain("N", "pix.example", "DNS"), ""),
        (Domain("N", "http://a|b", "URI"), ""),
    ],
)
def test_domains_are_named_by_uri(domain: Domain, uri: str) -> None:
    """OIDs and UUIDs as URNs, a URI as it is, and no other way."""
    assert system_of(domain) == uri
