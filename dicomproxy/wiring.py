"""From the configuration to what serves it: each room gets its slice, and no more.

A :class:`Routing` is everything that a changed configuration replaces while the
proxy runs: peers, access control and the services over them. What it is built
on, the cache, the memory of locations, the audit trail and the upper layer,
outlives it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from dicomproxy.audit import FileAudit
from dicomproxy.cache import CacheSettings, DiskInstanceStore
from dicomproxy.config import Settings
from dicomproxy.config.identity import DomainSection
from dicomproxy.config.model import LocalSection, SourceEntry, WorkstationEntry
from dicomproxy.dataset.patient import Domain
from dicomproxy.destinations.workstation import Workstation, WorkstationSettings
from dicomproxy.dimse.layer import Limits, Timers, UpperLayer
from dicomproxy.ports import LOCAL, Caller, Destination, Originator
from dicomproxy.query.coordinator import QueryCoordinator
from dicomproxy.retrieval.arrivals import FlightArrivals
from dicomproxy.retrieval.coordinator import DestinationPlan, RetrieveCoordinator
from dicomproxy.retrieval.flights import Flights, FlightSettings
from dicomproxy.services.acceptor import ServiceAcceptor, ServiceSettings
from dicomproxy.services.access import AccessControl, KnownPeer, Network, Senders
from dicomproxy.services.move import DestinationFor
from dicomproxy.services.operations import Operations
from dicomproxy.services.store import StorageService
from dicomproxy.sources.archive import Archive, ArchiveSettings
from dicomproxy.sources.dimse import DimseSource
from dicomproxy.sources.local import LocalPacs
from dicomproxy.state import StateStore
from dicomproxy.state.accessions import AccessionMap
from dicomproxy.wiring_identity import Identity, Secrets, coercion_settings, is_configured

__all__ = ["Foundation", "Routing", "coercion_settings"]

_NEVER = 10**9


@dataclass(frozen=True, slots=True)
class Foundation:
    """What every routing is built on."""

    layer: UpperLayer
    store: DiskInstanceStore
    locations: StateStore
    accessions: AccessionMap
    audit: FileAudit
    flights: Flights
    operations: Operations


def timers(settings: Settings) -> Timers:
    section = settings.proxy.timers
    return Timers(
        artim=section.artim,
        association=section.association,
        response=section.response,
        idle=section.idle,
        stall=section.stall,
    )


def limits(settings: Settings) -> Limits:
    section = settings.proxy.limits
    return Limits(
        max_pdu_bytes=section.max_pdu,
        max_identifier_bytes=section.max_identifier,
        max_command_bytes=section.max_command,
        max_pending_messages=section.max_pending_messages,
    )


def cache_settings(settings: Settings) -> CacheSettings:
    section = settings.cache
    return CacheSettings(
        directory=section.directory,
        max_size_bytes=section.max_size,
        min_free_bytes=section.min_free,
        high_watermark=section.high_watermark,
        low_watermark=section.low_watermark,
        max_age_seconds=section.max_age,
        memory_spool_bytes=section.memory_spool,
    )


def flight_settings(settings: Settings) -> FlightSettings:
    section = settings.retrieve
    return FlightSettings(
        finish_abandoned=section.finish_abandoned,
        retry_pause_seconds=section.retry_pause,
        attempts=section.attempts,
    )


def local_archive_settings(settings: Settings) -> ArchiveSettings:
    section = settings.local
    return ArchiveSettings(
        name=LOCAL,
        ae_title=section.ae_title,
        host=section.host,
        port=section.port,
        calling_ae_title=settings.proxy.ae_title,
        retrieve=section.retrieve,
        connect_timeout=section.connect_timeout,
        query_timeout=section.query_timeout,
        first_instance_timeout=section.first_instance_timeout,
        stall_timeout=section.stall_timeout,
        response_timeout=settings.proxy.timers.response,
        parallel_associations=section.parallel_associations,
        # What only the local PACS knows is worth a try at every query.
        breaker_failures=_NEVER,
        accept=section.accept,
    )


def source_archive_settings(settings: Settings, entry: SourceEntry) -> ArchiveSettings:
    return ArchiveSettings(
        name=entry.name,
        ae_title=entry.ae_title,
        host=entry.host,
        port=entry.port,
        calling_ae_title=entry.calling_ae_title or settings.proxy.ae_title,
        retrieve=entry.retrieve,
        connect_timeout=entry.connect_timeout,
        query_timeout=entry.query_timeout,
        first_instance_timeout=entry.first_instance_timeout,
        stall_timeout=entry.stall_timeout,
        response_timeout=settings.proxy.timers.response,
        parallel_associations=entry.parallel_associations,
        max_matches=entry.max_matches,
        study_root_only=entry.study_root_only,
        breaker_failures=entry.breaker.failures,
        breaker_pause=entry.breaker.pause,
        accept=entry.accept,
    )


def domain(section: DomainSection) -> Domain:
    return section.domain


def access_control(settings: Settings) -> AccessControl:
    every_source = tuple(source.name for source in settings.sources)
    peers = [
        KnownPeer(
            entry.ae_title,
            entry.allow_from or (),
            entry.host or "",
            Caller(
                entry.ae_title,
                # Precedence is the order of the sources, not of a workstation's list.
                sources=tuple(
                    name for name in every_source if entry.sources is None or name in entry.sources
                ),
                query_budget_seconds=entry.query_budget,
                availability=entry.availability,
                charset=entry.charset or (),
            ),
        )
        for entry in settings.workstations
    ]
    peers.extend(
        KnownPeer(entry.ae_title, entry.allow_from or (), entry.host or "")
        for entry in settings.callers
    )
    senders = [_senders(source.name, source) for source in settings.sources]
    senders.append(_senders(LOCAL, settings.local))
    called = frozenset({settings.proxy.ae_title, *settings.proxy.aliases, *_our_titles(settings)})
    return AccessControl(called, peers, senders)


def _our_titles(settings: Settings) -> Iterator[str]:
    """Yield the titles under which sources know us: they are what they call."""
    for source in settings.sources:
        if source.calling_ae_title:
            yield source.calling_ae_title


def _senders(name: str, entry: SourceEntry | LocalSection) -> Senders:
    titles = frozenset(sender for sender in entry.senders if isinstance(sender, str))
    networks: tuple[Network, ...] = tuple(
        sender for sender in entry.senders if not isinstance(sender, str)
    )
    return Senders(name, titles, networks)


class Directory:
    """The workstations by title, as move destinations."""

    def __init__(self, settings: Settings, layer: UpperLayer) -> None:
        transcoding = asyncio.Semaphore(1)
        self._deliver_as: dict[str, str | None] = {}
        self._workstations: dict[str, Workstation] = {}
        for entry in settings.workstations:
            if entry.host is not None and entry.port is not None:
                self._deliver_as[entry.ae_title] = entry.deliver_as
                self._workstations[entry.ae_title] = Workstation(
                    layer, _workstation(settings, entry), transcoding
                )

    def destination_for(self, caller: Caller) -> DestinationFor:
        """Return how a Move Destination that *caller* names is reached."""

        def plan(title: str, originator: Originator, operation_id: str) -> DestinationPlan:
            workstation = self._workstations.get(title)
            if workstation is None:
                return DestinationPlan(title, False, _unknown)
            calling = self._deliver_as[title] or caller.called_ae_title
            return DestinationPlan(
                title, True, lambda: workstation.open(calling, originator, operation_id)
            )

        return plan


def _unknown() -> Destination:
    raise LookupError("the destination is not known")


def _workstation(settings: Settings, entry: WorkstationEntry) -> WorkstationSettings:
    return WorkstationSettings(
        ae_title=entry.ae_title,
        host=entry.host or "",
        port=entry.port or 0,
        associations=entry.associations,
        connect_timeout=settings.local.connect_timeout,
        response_timeout=settings.proxy.timers.response,
        retry_seconds=settings.retrieve.destination_retry,
    )


class Routing:
    """Peers and services as one configuration has them.

    Args:
        settings: the configuration.
        foundation: what it is built on.
        secrets: of its cross-references, as they were read.
    """

    def __init__(
        self,
        settings: Settings,
        foundation: Foundation,
        secrets: dict[str, Secrets] | None = None,
    ) -> None:
        self.settings = settings
        layer, flights = foundation.layer, foundation.flights
        arrivals = FlightArrivals(foundation.store, flights)
        self.archives = [
            Archive(layer, source_archive_settings(settings, entry)) for entry in settings.sources
        ]
        sources = {
            archive.settings.name: DimseSource(archive, arrivals) for archive in self.archives
        }
        self.local_archive = Archive(layer, local_archive_settings(settings))
        local_source = DimseSource(self.local_archive, arrivals)
        self.sources = (*sources.values(), local_source)
        self.local = LocalPacs(self.local_archive, local_source)
        self._identity = (
            Identity(
                settings,
                secrets or {},
                foundation.accessions,
                foundation.locations,
                local_source.find,
            )
            if is_configured(settings)
            else None
        )
        self.identity = self._identity.service if self._identity is not None else None
        self.queries = QueryCoordinator(
            self.local,
            sources,
            foundation.locations,
            foundation.audit,
            settings.local.query_timeout,
            foundation.store.is_complete,
            identity=self.identity,
        )
        self.retrieves = RetrieveCoordinator(
            store=foundation.store,
            flights=flights,
            locations=foundation.locations,
            audit=foundation.audit,
            sources=sources,
            local_source=local_source,
            local=self.local,
            relay_local=settings.local.deliver == "relay",
            identity=self.identity,
        )
        accept = {entry.name: entry.accept for entry in settings.sources}
        accept[LOCAL] = settings.local.accept
        self.acceptor = ServiceAcceptor(
            ServiceSettings(
                idle_seconds=settings.proxy.timers.idle,
                pending_seconds=settings.proxy.pending_interval,
                max_length=settings.proxy.limits.max_pdu,
                local_calling_ae_title=(
                    settings.proxy.ae_title if settings.local.calling_ae_title == "proxy" else ""
                ),
            ),
            access_control(settings),
            self.queries,
            self.retrieves,
            StorageService(arrivals, accept),
            Directory(settings, layer),
            foundation.operations,
        )

    async def start(self) -> None:
        """Begin to read what answers have to be translated by."""
        if self._identity is not None:
            await self._identity.start()

    async def close(self) -> None:
        """End what is still asked of sources, and their associations."""
        await self.queries.close()
        await self.retrieves.close()
        if self._identity is not None:
            await self._identity.close()
        await self.local.close()
        for archive in self.archives:
            await archive.close()
