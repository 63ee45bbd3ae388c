"""Where retrieves begin: what one operation shares with all others."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from dicomproxy.ports import (
    Audit,
    Caller,
    InstanceStore,
    LocalArchive,
    Locations,
    Originator,
    Source,
)
from dicomproxy.retrieval.flights import Flights, FlightSettings
from dicomproxy.retrieval.locate import Locator
from dicomproxy.retrieval.operation import DestinationPlan, RetrieveOperation, RetrieveOutcome
from dicomproxy.retrieval.persons import Identification, Persons
from dicomproxy.retrieval.request import RetrieveRefused, RetrieveRequest, parse_request
from dicomproxy.retrieval.spliced import Splicing
from dicomproxy.tasks import TaskOwner

__all__ = [
    "DestinationPlan",
    "RetrieveCoordinator",
    "RetrieveOperation",
    "RetrieveOutcome",
    "RetrieveRefused",
    "RetrieveRequest",
    "RetrieveSettings",
    "parse_request",
]

T = TypeVar("T")


RetrieveSettings = FlightSettings
"""The ``retrieve`` section of the configuration; it is the flights that follow it."""


class RetrieveCoordinator:
    """Starts retrieve operations.

    Args:
        store: where instances are held on their way.
        flights: the flights under way.
        locations: where studies were seen.
        audit: the record of disclosures.
        sources: archives in order of precedence, without the local PACS.
        local_source: the local PACS as one to be asked and fetched from.
        local: the local PACS as one that delivers by itself.
        relay_local: whether it is to do so.
        identity: who patients are elsewhere, and what their objects become on the way;
            None where every source numbers patients as this site does.
    """

    def __init__(
        self,
        store: InstanceStore,
        flights: Flights,
        locations: Locations,
        audit: Audit,
        sources: Mapping[str, Source],
        local_source: Source,
        local: LocalArchive,
        relay_local: bool,
        identity: Identification | None = None,
    ) -> None:
        self.store = store
        self.flights = flights
        self.audit = audit
        self.local_source = local_source
        self.local = local
        self.relay_local = relay_local
        self.persons = Persons(identity)
        self.splicing = Splicing()
        self.locator = Locator(
            locations,
            sources,
            local_source,
            self.persons,
            pause_seconds=flights.retry_pause_seconds,
        )
        self._owner = TaskOwner("retrieve")

    def start(
        self,
        request: RetrieveRequest,
        *,
        caller: Caller,
        originator: Originator,
        destination: DestinationPlan,
        operation_id: str,
        local_calling_ae_title: str,
    ) -> RetrieveOperation:
        """Make an operation; nothing happens until its ``run`` is awaited."""
        return RetrieveOperation(
            self,
            request,
            caller=caller,
            originator=originator,
            destination=destination,
            operation_id=operation_id,
            local_calling_ae_title=local_calling_ae_title,
        )

    def spawn(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a step of an operation."""
        return self._owner.spawn(coro, name=name)

    async def close(self) -> None:
        """End what is still under way; operations should have been cancelled before."""
        await self._owner.close()
