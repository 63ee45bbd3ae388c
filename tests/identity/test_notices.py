"""Merge and update notices, from the message to whoever remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.client import MllpClient
from dicomproxy.hl7.errors import Refusal
from dicomproxy.hl7.inbox import Inbox
from dicomproxy.hl7.journal import Journal
from dicomproxy.hl7.listener import MllpListener
from dicomproxy.hl7.message import parse
from dicomproxy.identity.notices import (
    IdentityNotice,
    IdentityNotices,
    LiveIdentities,
    NoticeStats,
)
from dicomproxy.identity.safety import Demographics
from tests.identity.providers import local, north
from tests.query.identities import Site
from tests.sentinel import PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.log_watch import LogWatch

HERE, NORTH = Domain("HERE", "1.2.1", "ISO"), Domain("NORTH", "1.2.2", "ISO")
A, B, C = PatientId("A", HERE), PatientId("B", HERE), PatientId("C", HERE)
N, M = PatientId("N", NORTH), PatientId("M", NORTH)


def cx(*ids: PatientId) -> str:
    return "~".join(
        f"{one.value}^^^{one.domain.namespace}&{one.domain.universal_id}&ISO^PI" for one in ids
    )


def a40(*groups: tuple[str, str], control_id: str = "M1", version: str = "2.3.1") -> bytes:
    lines = [
        f"MSH|^~\\&|ADT|HOSP|US|HOSP|2024||ADT^A40^ADT_A39|{control_id}|P|{version}",
        "EVN|A40|20240506",
    ]
    for surviving, old in groups:
        lines += [f"PID|||{surviving}||{PATIENT_NAME}||19010203|M", "PD1|", f"MRG|{old}"]
    return "".join(f"{line}\r" for line in lines).encode()


def a31(ids: str, control_id: str = "M1") -> bytes:
    """Return an update notification, as ITI-10 has it."""
    return (
        f"MSH|^~\\&|PIX|REGION|US|HOSP|2024||ADT^A31^ADT_A05|{control_id}|P|2.5\r"
        f"EVN||20240506\rPID|||{ids}||^^^^^^S\rPV1||N\r"
    ).encode()


class Taker:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.notices: list[IdentityNotice] = []

    async def __call__(self, notice: IdentityNotice) -> None:
        self.notices.append(notice)


async def notices(content: bytes, default: Domain = HERE) -> list[IdentityNotice]:
    taker = Taker()
    made = IdentityNotices(taker, default=default)
    message = parse(content)
    made.check(message)
    await made.handle(message)
    return taker.notices


async def test_a_merge_names_who_went_and_who_stays() -> None:
    """MRG-1 is the old ID, PID-3 the surviving one; other IDs of the person are named too."""
    assert await notices(a40((cx(A, N), cx(B)))) == [IdentityNotice(B, A, (B, A, N))]


async def test_the_surviving_id_is_of_the_old_ones_domain() -> None:
    """Whatever the order of PID-3; the first one where none is."""
    assert await notices(a40((cx(N, A), cx(B)))) == [IdentityNotice(B, A, (B, N, A))]
    assert await notices(a40((cx(A), cx(N)))) == [IdentityNotice(N, A, (N, A))]


async def test_several_merges_come_one_by_one() -> None:
    """Several old IDs in one segment, and several persons in one message."""
    assert await notices(a40((cx(A, N), cx(B, M)), (cx(C), cx(A)))) == [
        IdentityNotice(B, A, (B, M, A, N)),
        IdentityNotice(M, N, (B, M, A, N)),
        IdentityNotice(A, C, (A, C)),
    ]


async def test_an_update_names_every_id_of_the_person() -> None:
    """Nobody went; what is remembered of any of them is out of date."""
    assert await notices(a31(cx(A, N))) == [IdentityNotice(None, None, (A, N))]


async def test_ids_without_a_domain_are_the_feeds_own() -> None:
    """A hospital's own feed names no authority as a rule."""
    assert await notices(a40(("A^^^^MR", "B"))) == [IdentityNotice(B, A, (B, A))]


@pytest.mark.parametrize(
    ("content", "code", "location"),
    [
        (a40(("", cx(B))), 101, "PID^1^3"),
        (a40((cx(A), "")), 101, "MRG^1^1"),
        (a40((cx(A), '""')), 101, "MRG^1^1"),
        (a40((cx(A), cx(B)), (cx(C), "")), 101, "MRG^2^1"),
        (a40(), 101, "PID^1^3"),
        (a40((cx(A), cx(B))).replace(b"MRG", b"ZZZ"), 101, "MRG^1^1"),
        (a40((cx(A), cx(B))).replace(b"PID", b"ZZZ"), 101, "PID^1^3"),
        (a40((cx(A), "B\\XFF\\")), 102, "MRG^1^1"),
        (a40(("A\\XFF\\", cx(B))), 102, "PID^1^3"),
        (a40((cx(A), "~".join(f"B{n}" for n in range(600)))), 102, "MRG^1^1"),
        (a40(*[(cx(A), cx(B))] * 600), 102, "MRG^1^1"),
        (a31(""), 101, "PID^1^3"),
        (a31("^^^HERE"), 101, "PID^1^3"),
        (a40((cx(A), cx(B))) + b"ZZZ|\r" * 2000, 100, ""),
        (a31(cx(A)).replace(b"PID", b"ZZZ"), 101, "PID^1^3"),
    ],
)
async def test_a_notice_about_nobody_is_refused(content: bytes, code: int, location: str) -> None:
    """Its sender learns what is missing and where; none of it is handled."""
    with pytest.raises(Refusal) as caught:
        await notices(content)
    assert (caught.value.code, caught.value.location) == (code, location)
    assert not caught.value.permanent


async def test_notices_go_all_the_way(tmp_path: Path, log_watch: LogWatch) -> None:
    """Sent over MLLP, acknowledged, and told in the order sent; refused ones are not told."""
    taker = Taker()
    inbox = Inbox(Journal(tmp_path / "journal"))
    IdentityNotices(taker).subscribe_to(inbox)
    await inbox.start()
    listener = MllpListener(inbox.receive)
    client = MllpClient("127.0.0.1", await listener.start("127.0.0.1", 0))
    sentinel = PatientId(PATIENT_ID, HERE)
    acknowledged = []
    for content in (
        a40((cx(A), cx(sentinel)), control_id="M1"),
        a40((cx(A), ""), control_id="M2", version="2.5"),
        a31(cx(sentinel, N), "M3"),
        a31(cx(A), "M4").replace(b"A31", b"A08"),
    ):
        answer = parse(await client.exchange(content, bytes))
        acknowledged.append([answer.get("MSA", 1), answer.get("MSA", 2), answer.get("ERR", 3)])
    await inbox.wait_idle()
    assert acknowledged == [
        ["AA", "M1", ""],
        ["AE", "M2", "101"],
        ["AA", "M3", ""],
        ["AR", "M4", "201"],
    ]
    assert taker.notices == [
        IdentityNotice(sentinel, A, (sentinel, A)),
        IdentityNotice(None, None, (sentinel, N)),
    ]
    await client.close()
    await listener.close()
    await inbox.close()
    assert "ADT^A40" in log_watch.text


async def test_a_notice_that_nobody_took_is_told_after_a_restart(tmp_path: Path) -> None:
    """What was acknowledged is not forgotten with the process."""
    path = tmp_path / "journal"

    async def fails(notice: IdentityNotice) -> None:
        raise LookupError

    inbox = Inbox(Journal(path), attempts=1)
    IdentityNotices(fails).subscribe_to(inbox)
    await inbox.start()
    assert b"MSA|AA|" in await inbox.receive(a40((cx(A), cx(B))))
    await inbox.wait_idle()
    await inbox.close()
    taker = Taker()
    inbox = Inbox(Journal(path))
    IdentityNotices(taker).subscribe_to(inbox)
    await inbox.start()
    await inbox.wait_idle()
    assert taker.notices == [IdentityNotice(B, A, (B, A))]
    await inbox.close()


# -------------------------------------------------------------- whoever remembers

ME = local(PATIENT_ID)
KNOWN = Demographics(PATIENT_NAME, PATIENT_BIRTH_DATE, "F")
MakeSite = Callable[[], Site]


@pytest.fixture
async def make_site() -> AsyncIterator[MakeSite]:
    made: list[Site] = []

    def make() -> Site:
        made.append(Site({ME, north("N1")}, {local("OTHER"), north("N9")}))
        return made[-1]

    yield make
    for site in made:
        await site.service.close()


def notice(*patients: PatientId) -> IdentityNotice:
    return IdentityNotice(patients[0], patients[-1], patients)


async def remembering(make_site: MakeSite) -> Site:
    """Return a site that remembers where both persons are, and who they are."""
    site = make_site()
    for patient in (ME, local("OTHER")):
        await site.identities.elsewhere(patient, "north")
        site.service.known.learn(patient, KNOWN)
    return site


async def asked_again(site: Site, patient: PatientId) -> bool:
    before = len(site.manager.asked)
    await site.identities.elsewhere(patient, "north")
    return len(site.manager.asked) > before


@pytest.mark.parametrize(
    "named",
    [
        ME,
        north("N1"),
        PatientId(PATIENT_ID),
        PatientId(PATIENT_ID, Domain("HOSPITAL")),
        PatientId("N1", Domain("", "1.2.2")),
    ],
    ids=["here", "there", "of-no-domain", "by-namespace", "by-oid"],
)
async def test_everybody_forgets_the_person_and_what_hangs_on_them(
    make_site: MakeSite, named: PatientId, log_watch: LogWatch
) -> None:
    """Links, demographics and locations, however the ID is written; others are left alone."""
    sites = [await remembering(make_site) for _ in range(2)]
    live = LiveIdentities(lambda: 7.0)
    for site in sites:
        live.add(site.service)

    await live(notice(named))

    for site in sites:
        assert ("north", "N1") in site.forgotten
        assert ("north", "N9") not in site.forgotten
        assert site.service.known.of(ME) is None
        assert site.service.known.of(local("OTHER")) == KNOWN
        assert not await asked_again(site, local("OTHER"))
        assert await asked_again(site, ME)
    assert live.stats == NoticeStats(merges=1, last_at=7.0)
    (line,) = log_watch.named("identity_notice")
    assert (line["operation"], line["outcome"], line["count"]) == ("merge", "forgotten", 2)


async def test_a_notice_of_unknown_domains_costs_everything(
    make_site: MakeSite, log_watch: LogWatch
) -> None:
    """A sender that names our domain otherwise may mean anybody: nothing remembered holds."""
    site = await remembering(make_site)
    live = LiveIdentities()
    live.add(site.service)

    await live(IdentityNotice(None, None, (PatientId(PATIENT_ID, Domain("HIS", "1.2.99")),)))

    assert await asked_again(site, ME)
    assert await asked_again(site, local("OTHER"))
    assert site.service.known.of(ME) is None
    assert (live.stats.updates, live.stats.unknown_domain) == (1, 1)
    (line,) = log_watch.named("identity_notice")
    assert (line["operation"], line["outcome"]) == ("update", "unknown_domain")


async def test_flood_of_notices_of_unknown_domains_lets_lookups_end(make_site: MakeSite) -> None:
    """Everything is forgotten at once, and once more after the last: not for each of them."""
    site, other = await remembering(make_site), await remembering(make_site)
    forgotten: list[object] = []
    twice = asyncio.Event()

    def note(gone: object) -> None:
        forgotten.append(gone)
        if len(forgotten) == 2:
            twice.set()

    site.identities.on_forget(note)
    live = LiveIdentities(rest_seconds=0.05)
    for one in (site, other):
        live.add(one.service)
    for number in range(100):
        await live(notice(PatientId(str(number), Domain("HIS", "1.2.99"))))
        if not number:
            assert forgotten == [None]
            assert await asked_again(other, ME)
    assert forgotten == [None]
    async with asyncio.timeout(10):
        await twice.wait()
    assert forgotten == [None, None]
    assert live.stats.unknown_domain == 100


async def test_one_domain_that_is_known_is_enough(make_site: MakeSite) -> None:
    """Of the IDs of a region only some mean anything here."""
    site = await remembering(make_site)
    live = LiveIdentities()
    live.add(site.service)

    await live(notice(PatientId("X", Domain("REGION")), ME))

    assert not await asked_again(site, local("OTHER"))
    assert await asked_again(site, ME)


async def test_who_has_left_is_told_no_more(make_site: MakeSite) -> None:
    """A configuration without identity is nobody, and nobody listening is no unknown domain."""
    site = await remembering(make_site)
    live = LiveIdentities()
    for service in (None, site.service):
        live.add(service)
    for service in (None, site.service, site.service):
        live.remove(service)

    await live(notice(ME))

    assert not await asked_again(site, ME)
    assert live.stats.unknown_domain == 0


async def test_one_who_fails_keeps_nobody_from_being_told(make_site: MakeSite) -> None:
    """The others forget at once, and the notice counts only when it comes again."""
    broken, sound = await remembering(make_site), await remembering(make_site)

    def fail(_gone: object) -> None:
        raise LookupError

    broken.identities.on_forget(fail)
    live = LiveIdentities()
    for site in (broken, sound):
        live.add(site.service)

    with pytest.raises(LookupError):
        await live(notice(ME))
    assert await asked_again(sound, ME)
    assert live.stats == NoticeStats()
