"""Who may associate, from where, and as what: one table of peers, one of refusals."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_network
from typing import Any

import pytest

from dicomproxy.dimse.pdu import REJECT_CALLED, REJECT_CALLING, AssociateReject
from dicomproxy.ports import LOCAL, Caller
from dicomproxy.services import access as module
from dicomproxy.services.access import AccessControl, KnownPeer, Peer, Senders, parse_address

TITLES = frozenset({"DICOMPROXY", "LOCALPACS"})


def workstation(title: str, *networks: str, host: str = "", **more: Any) -> KnownPeer:
    caller = Caller(title, sources=("north", "south"), **more)
    return KnownPeer(title, tuple(map(ip_network, networks)), host, caller)


CONTROL = AccessControl(
    TITLES,
    [
        workstation("ANYWHERE"),
        workstation("BY_HOST", host="10.0.1.21"),
        workstation("BY_HOST_V6", host="2001:db8::1"),
        workstation("BY_NET", "10.1.0.0/16", "192.168.7.0/24", "2001:db8:1::/48"),
        KnownPeer("MODALITY", host="10.0.2.5"),
        workstation("SHARED", "10.2.0.0/16"),
        KnownPeer("SHARED", (ip_network("10.3.0.0/16"),)),
        KnownPeer("TWICE"),
        workstation("TWICE"),
        workstation("TWICE_OVER"),
        KnownPeer("TWICE_OVER"),
        workstation("PROXY_TOO"),
    ],
    [
        Senders("north", frozenset({"NORTHPACS", "PROXY_TOO"})),
        Senders("south", frozenset({"SOUTHPACS"}), (ip_network("10.8.0.0/16"),)),
        Senders(LOCAL, frozenset({"PACS_SCU", "NORTHPACS"})),
    ],
)


@pytest.mark.parametrize(
    ("calling", "address", "queries", "retrieves", "sends_for"),
    [
        ("ANYWHERE", "203.0.113.9", True, True, ()),
        ("ANYWHERE", "fe80::1%eth0", True, True, ()),
        ("ANYWHERE", "", True, True, ()),
        ("BY_HOST", "10.0.1.21", True, True, ()),
        ("BY_HOST", "::ffff:10.0.1.21", True, True, ()),
        ("BY_HOST_V6", "2001:DB8:0::1", True, True, ()),
        ("BY_NET", "10.1.255.1", True, True, ()),
        ("BY_NET", "192.168.7.3", True, True, ()),
        ("BY_NET", "2001:db8:1:2::3", True, True, ()),
        ("MODALITY", "10.0.2.5", False, False, ()),
        ("SHARED", "10.2.0.1", True, True, ()),
        ("SHARED", "10.3.0.1", False, False, ()),
        ("TWICE", "10.9.9.9", True, True, ()),
        ("TWICE_OVER", "10.9.9.9", True, True, ()),
        ("NORTHPACS", "10.9.0.4", True, False, ("north", LOCAL)),
        ("ANY TITLE", "10.8.3.4", True, False, ("south",)),
        ("ANYWHERE", "10.8.3.4", True, True, ("south",)),
        ("PACS_SCU", "10.0.0.5", False, False, (LOCAL,)),
        ("PROXY_TOO", "10.9.0.9", True, True, ("north",)),
    ],
)
async def test_admitted_peer_has_the_roles_of_its_entries(
    calling: str, address: str, queries: bool, retrieves: bool, sends_for: tuple[str, ...]
) -> None:
    """Title and address together decide; one peer may be several things at once."""
    peer = await CONTROL.admit(calling, "DICOMPROXY", address)
    assert isinstance(peer, Peer)
    assert (peer.caller is not None, peer.may_retrieve) == (queries, retrieves)
    assert peer.sends_for == sends_for
    assert (peer.ae_title, peer.address) == (calling, address)


@pytest.mark.parametrize(
    ("calling", "called", "address", "rejection"),
    [
        ("ANYWHERE", "OTHER", "10.0.0.1", REJECT_CALLED),
        ("ANYWHERE", "", "10.0.0.1", REJECT_CALLED),
        ("ANYWHERE", "dicomproxy", "10.0.0.1", REJECT_CALLED),
        ("NOBODY", "OTHER", "10.0.0.1", REJECT_CALLED),
        ("NOBODY", "DICOMPROXY", "10.0.0.1", REJECT_CALLING),
        ("anywhere", "DICOMPROXY", "10.0.0.1", REJECT_CALLING),
        ("", "DICOMPROXY", "10.0.0.1", REJECT_CALLING),
        ("BY_HOST", "DICOMPROXY", "10.0.1.22", REJECT_CALLING),
        ("BY_HOST", "DICOMPROXY", "", REJECT_CALLING),
        ("BY_HOST", "DICOMPROXY", "10.0.1.21.evil", REJECT_CALLING),
        ("BY_NET", "DICOMPROXY", "10.2.0.1", REJECT_CALLING),
        ("BY_NET", "DICOMPROXY", "garbage", REJECT_CALLING),
        ("MODALITY", "DICOMPROXY", "10.0.2.6", REJECT_CALLING),
        ("SHARED", "DICOMPROXY", "10.4.0.1", REJECT_CALLING),
    ],
)
async def test_refusal_has_the_reason_of_the_standard(
    calling: str, called: str, address: str, rejection: AssociateReject
) -> None:
    """A wrong called title comes first, then whoever calls (PS3.8 9.3.4)."""
    assert await CONTROL.admit(calling, called, address) == rejection


async def test_caller_knows_whom_it_called_and_from_where() -> None:
    """What the configuration says of a workstation, with the facts of the association."""
    control = AccessControl(
        TITLES,
        [
            workstation(
                "R", query_budget_seconds=3.0, availability="OFFLINE", charset=("ISO_IR 100",)
            )
        ],
        [],
    )
    peer = await control.admit("R", "LOCALPACS", "10.0.0.7")
    assert isinstance(peer, Peer)
    assert peer.caller == Caller(
        "R", "10.0.0.7", "LOCALPACS", ("north", "south"), False, 3.0, "OFFLINE", ("ISO_IR 100",)
    )


@pytest.mark.parametrize(
    ("calling", "is_source", "sources"),
    [
        ("NORTHPACS", True, ()),
        ("PROXY_TOO", True, ("north", "south")),
        ("ANYWHERE", False, ("north", "south")),
    ],
)
async def test_source_that_asks_back_is_marked_as_one(
    calling: str, is_source: bool, sources: tuple[str, ...]
) -> None:
    """Two proxies that face each other cannot ask each other in circles."""
    peer = await CONTROL.admit(calling, "DICOMPROXY", "10.9.0.4")
    assert isinstance(peer, Peer)
    assert peer.caller is not None
    assert (peer.caller.is_source, peer.caller.sources) == (is_source, sources)


async def test_sender_for_the_local_pacs_alone_may_not_query() -> None:
    """The local PACS sends; what it asks, it can answer itself."""
    peer = await CONTROL.admit("PACS_SCU", "DICOMPROXY", "10.0.0.5")
    assert isinstance(peer, Peer)
    assert peer.caller is None


# ------------------------------------------------------------------ host names


class Resolver:
    """Stands for the system's resolver, on the running loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[str] = []
        self.error: Exception | None = None
        self.asked = 0
        self.hold: asyncio.Event | None = None
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.resolve)

    async def resolve(self, host: str, port: object, **_: object) -> list[Any]:
        self.asked += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return [(socket.AF_INET, 1, 6, "", (address, 0)) for address in self.addresses]


@pytest.fixture
async def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    return Resolver(monkeypatch)


def by_name() -> AccessControl:
    return AccessControl(TITLES, [workstation("BY_NAME", host="reading.example")], [])


async def test_host_name_stands_for_all_its_addresses(resolver: Resolver) -> None:
    """A workstation known by name may call from any address that the name has."""
    resolver.addresses = ["10.0.1.1", "10.0.1.2", "fe80::9%eth0"]
    control = by_name()
    for address, admitted in (
        ("10.0.1.1", True),
        ("::ffff:10.0.1.2", True),
        ("fe80::9%eth1", True),
        ("10.0.1.3", False),
    ):
        outcome = await control.admit("BY_NAME", "DICOMPROXY", address)
        assert isinstance(outcome, Peer) is admitted, address
    assert resolver.asked == 1


async def test_addresses_are_asked_for_again_after_a_while(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workstation that moved is known by its new address; a failing resolver changes nothing."""
    monkeypatch.setattr(module, "_RESOLVED_SECONDS", -1.0)
    monkeypatch.setattr(module, "_UNRESOLVED_SECONDS", -1.0)
    control = by_name()
    resolver.addresses = ["10.0.1.1"]
    assert isinstance(await control.admit("BY_NAME", "DICOMPROXY", "10.0.1.1"), Peer)
    resolver.error = OSError("resolver is down")
    assert isinstance(await control.admit("BY_NAME", "DICOMPROXY", "10.0.1.1"), Peer)
    resolver.error, resolver.addresses = None, ["10.0.1.2"]
    assert await control.admit("BY_NAME", "DICOMPROXY", "10.0.1.1") == REJECT_CALLING
    assert isinstance(await control.admit("BY_NAME", "DICOMPROXY", "10.0.1.2"), Peer)


async def test_a_resolver_that_hangs_is_waited_for_once(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither delays each association anew nor has many threads waiting for it."""
    monkeypatch.setattr(module, "_RESOLVED_SECONDS", -1.0)
    control = by_name()
    resolver.addresses = ["10.0.1.1"]
    assert isinstance(await control.admit("BY_NAME", "DICOMPROXY", "10.0.1.1"), Peer)
    resolver.hold = asyncio.Event()
    monkeypatch.setattr(module, "_RESOLVE_SECONDS", 0.05)
    at_once = (control.admit("BY_NAME", "DICOMPROXY", "10.0.1.1") for _ in range(5))
    assert all(isinstance(peer, Peer) for peer in await asyncio.gather(*at_once))
    assert isinstance(await control.admit("BY_NAME", "DICOMPROXY", "10.0.1.1"), Peer)
    assert resolver.asked == 2


@pytest.mark.parametrize("error", [OSError("no such name"), UnicodeError("label too long"), None])
async def test_name_that_cannot_be_resolved_admits_nobody(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Unknown, impossible or too slow: the peer is refused, and nothing hangs."""
    monkeypatch.setattr(module, "_RESOLVE_SECONDS", 0.05)
    resolver.error = error
    resolver.hold = asyncio.Event() if error is None else None
    assert await by_name().admit("BY_NAME", "DICOMPROXY", "10.0.1.1") == REJECT_CALLING


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::1", "::1"),
        ("", None),
        ("host", None),
        ("10.0.0.256", None),
        ("010.0.0.1", None),
    ],
)
def test_addresses_in_their_spellings(text: str, expected: str | None) -> None:
    """IPv4 mapped into IPv6 is IPv4, a zone is no part of the address, a name is none."""
    parsed = parse_address(text)
    assert (None if parsed is None else str(parsed)) == expected
