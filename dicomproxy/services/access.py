"""Who may associate, and as what.

A peer is known by its calling AE title and its address together. What it may do
follows from where the configuration names it: as a workstation (query and
retrieve), as a caller (nothing but verification here), as the sender of a
source's instances, or in several of these roles at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from dicomproxy.dimse.pdu import REJECT_CALLED, REJECT_CALLING, AssociateReject
from dicomproxy.ports import LOCAL, Caller

Network = IPv4Network | IPv6Network

_RESOLVED_SECONDS: Final = 60.0
_RESOLVE_SECONDS: Final = 5.0
_UNRESOLVED_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """An entry of the configuration that may call: its title and where from.

    With neither ``networks`` nor ``host`` it may call from anywhere.
    """

    ae_title: str
    networks: tuple[Network, ...] = ()
    host: str = ""
    caller: Caller | None = None


@dataclass(frozen=True, slots=True)
class Senders:
    """Who sends a source's instances: AE titles, and addresses whatever the title."""

    source: str
    ae_titles: frozenset[str]
    networks: tuple[Network, ...] = ()

    def match(self, ae_title: str, address: IPv4Address | IPv6Address | None) -> bool:
        if ae_title in self.ae_titles:
            return True
        return address is not None and any(address in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class Peer:
    """An admitted peer.

    ``caller`` is set where it may query, ``may_retrieve`` where it is a
    workstation; ``sends_for`` names the sources, ``local`` among them, whose
    instances it may send.
    """

    ae_title: str
    called_ae_title: str
    address: str
    caller: Caller | None
    sends_for: tuple[str, ...]
    may_retrieve: bool = False


class AccessControl:
    """Admits peers.

    Args:
        called_ae_titles: the titles that are ours, aliases included.
        peers: workstations and callers; one title may have several entries.
        senders: in order of precedence.
    """

    def __init__(
        self,
        called_ae_titles: frozenset[str],
        peers: Sequence[KnownPeer],
        senders: Sequence[Senders],
    ) -> None:
        self._called = called_ae_titles
        self._peers: Mapping[str, tuple[KnownPeer, ...]] = {
            peer.ae_title: tuple(other for other in peers if other.ae_title == peer.ae_title)
            for peer in peers
        }
        self._senders = tuple(senders)
        self._resolved: dict[str, tuple[float, frozenset[str]]] = {}
        self._resolving: dict[str, asyncio.Lock] = {}

    async def admit(
        self, calling_ae_title: str, called_ae_title: str, address: str
    ) -> Peer | AssociateReject:
        """Return who it is, or the rejection with its reason (PS3.8 9.3.4)."""
        if called_ae_title not in self._called:
            return REJECT_CALLED
        parsed = parse_address(address)
        sends_for = tuple(
            senders.source for senders in self._senders if senders.match(calling_ae_title, parsed)
        )
        known: KnownPeer | None = None
        for entry in self._peers.get(calling_ae_title, ()):
            if await self._may_call_from(entry, parsed) and (known is None or entry.caller):
                known = entry
        if known is None and not sends_for:
            return REJECT_CALLING
        caller: Caller | None = None
        from_region = any(source != LOCAL for source in sends_for)
        if known is not None and known.caller is not None:
            caller = known.caller
        may_retrieve = caller is not None
        if caller is not None:
            caller = Caller(
                ae_title=calling_ae_title,
                peer_address=address,
                called_ae_title=called_ae_title,
                sources=caller.sources,
                is_source=from_region,
                query_budget_seconds=caller.query_budget_seconds,
                availability=caller.availability,
                charset=caller.charset,
            )
        elif from_region:
            # Another proxy, or an archive that asks back: it is answered from here alone.
            caller = Caller(calling_ae_title, address, called_ae_title, is_source=True)
        return Peer(calling_ae_title, called_ae_title, address, caller, sends_for, may_retrieve)

    async def _may_call_from(
        self, entry: KnownPeer, address: IPv4Address | IPv6Address | None
    ) -> bool:
        if entry.networks:
            return address is not None and any(address in network for network in entry.networks)
        if not entry.host:
            return True
        return address is not None and str(address) in await self._addresses(entry.host)

    async def _addresses(self, host: str) -> frozenset[str]:
        """Return the addresses of *host*, asked for at most once a minute."""
        if (literal := parse_address(host)) is not None:
            return frozenset({str(literal)})
        # By one at a time: a lookup that hangs occupies a thread, of which there are few.
        async with self._resolving.setdefault(host, asyncio.Lock()):
            loop = asyncio.get_running_loop()
            held = self._resolved.get(host)
            if held is not None and held[0] > loop.time():
                return held[1]
            try:
                async with asyncio.timeout(_RESOLVE_SECONDS):
                    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            except (OSError, TimeoutError, UnicodeError):
                # What was true a minute ago is likelier than nothing.
                addresses = held[1] if held is not None else frozenset()
                seconds = _UNRESOLVED_SECONDS
            else:
                parsed = (parse_address(str(info[4][0])) for info in found)
                addresses = frozenset(str(one) for one in parsed if one is not None)
                seconds = _RESOLVED_SECONDS
            self._resolved[host] = loop.time() + seconds, addresses
            return addresses


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an IP address, IPv4 where it is one mapped into IPv6; None for anything else."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
