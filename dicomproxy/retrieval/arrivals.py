"""The door through which sources' instances come in.

An instance belongs to a flight if its study is being retrieved from the source
that sent it, and its header names the patient agreed on, by whatever ID that
source has for them. Everything else is turned away, remembered where a flight
waits for it, and logged. C-STORE statuses given here (PS3.4 B.2.3, PS3.7
9.1.1.1.9):

====== =====================================================================
0000   stored, or held already
0124   not authorized: nobody asked this source for that study
A700   out of resources: neither disk nor memory has room
A900   the data set contradicts the SOP Class or Instance UID of the command
C000   the data set cannot be read
C001   the data set names another patient, or another study than was asked for,
       or nobody can tell at the moment whom it names
====== =====================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import Counter

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.reports import report_conflict, report_unresolved
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import (
    CrossReferenceError,
    InstanceStore,
    InstanceWriter,
    Refused,
    RetrieveOrder,
    Stored,
    StoreFull,
    StudyLease,
)
from dicomproxy.retrieval.flight import Flight
from dicomproxy.retrieval.flights import Flights

_log = get_logger()

STORED: Final = 0x0000
NOT_AUTHORIZED: Final = 0x0124
OUT_OF_RESOURCES: Final = 0xA700
DATA_SET_MISMATCH: Final = 0xA900
CANNOT_UNDERSTAND: Final = 0xC000
OTHER_IDENTITY: Final = 0xC001

NO_FLIGHT: Final = "no_flight"
IDENTITY_CONFLICT: Final = "identity_conflict"
IDENTITY_UNRESOLVED: Final = "identity_unresolved"
IDENTITY_UNKNOWN: Final = "identity_unknown"
OTHER_STUDY: Final = "other_study"

_STATUS: Final = {
    NO_FLIGHT: NOT_AUTHORIZED,
    IDENTITY_CONFLICT: OTHER_IDENTITY,
    IDENTITY_UNRESOLVED: OTHER_IDENTITY,
    IDENTITY_UNKNOWN: OTHER_IDENTITY,
    OTHER_STUDY: OTHER_IDENTITY,
    "sop_class_mismatch": DATA_SET_MISMATCH,
    "sop_instance_mismatch": DATA_SET_MISMATCH,
}

_ARRIVED = Counter(
    "dicomproxy_instances_fetched_total", "Instances that a source sent.", ["source"]
)
_REFUSED = Counter(
    "dicomproxy_instances_refused_total", "Instances turned away.", ["source", "reason"]
)


class FlightArrivals:
    """Implements :class:`~dicomproxy.ports.Arrivals` over a store and its flights."""

    def __init__(self, store: InstanceStore, flights: Flights) -> None:
        self._store = store
        self._flights = flights

    def source_for(self, candidates: Sequence[str]) -> str | None:
        """Return which of *candidates* is being retrieved from, one that is sending first."""
        for source in candidates:
            if self._flights.has_orders(source):
                return source
        return next((source for source in candidates if self._flights.is_asked(source)), None)

    def receive(
        self, source: str, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str
    ) -> FlightArrival:
        """Begin to take in an instance."""
        writer = self._store.receive(sop_class_uid, sop_instance_uid, transfer_syntax_uid, source)
        return FlightArrival(self._flights, writer, source, sop_instance_uid)


class FlightArrival:
    """One instance on its way into a flight."""

    def __init__(
        self, flights: Flights, writer: InstanceWriter, source: str, sop_instance_uid: str
    ) -> None:
        self._flights = flights
        self._writer = writer
        self._source = source
        self._sop_instance_uid = sop_instance_uid
        self._loop = asyncio.get_running_loop()
        self._flight: Flight | None = None
        self._series_instance_uid = ""
        self._unresolved: IdentityUnresolved | None = None
        self._doubtful_for: list[RetrieveOrder] = []
        self._over = False
        self._patient_id = ""
        self._named: PatientId | None = None
        """Whom its header names, while it is not known who that is here."""

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        """Take over bytes; they count as a sign of life of the order that they may be for."""
        self._active()
        self._writer.write(segments, release)

    def discard(self) -> None:
        """Forget what came: the transfer was aborted."""
        self._no_longer_doubtful()
        self._writer.discard()

    async def finish(self) -> int:
        """Let the instance exist if a flight takes it; the C-STORE-RSP's status."""
        try:
            stored = await self._writer.commit(self._admit)
            if self._flight is not None and self._named is not None:
                await self._identify(self._flight, self._named, stored)
        except Refused as refused:
            return self._turned_away(refused.reason)
        except StoreFull:
            self._fail("store_full")
            return OUT_OF_RESOURCES
        except Exception as error:
            _log.error("store_failed", source=self._source, **error_fields(error))
            self._fail("store_failed")
            return CANNOT_UNDERSTAND
        finally:
            self._no_longer_doubtful()
            if self._flight is not None and self._named is not None:
                self._flight.doubtful.discard(self._sop_instance_uid)
        self._active()
        _ARRIVED.labels(self._source).inc()
        flight = self._flight
        if flight is not None and not flight.closed:
            flight.stored(self._source, stored, self._patient_id)
        return STORED

    def _admit(self, header: InstanceHeader) -> StudyLease:
        """Say where an instance belongs. Runs in the store's writer thread: reads only."""
        flight = self._flights.flight_for(header.study_instance_uid, self._source)
        if flight is None:
            if self._flights.has_orders(self._source) and not self._flights.ended_lately(
                header.study_instance_uid
            ):
                # Sent in answer to an order, yet of a study that nobody ordered.
                raise Refused(OTHER_STUDY)
            raise Refused(NO_FLIGHT)
        self._flight = flight
        self._series_instance_uid = header.series_instance_uid
        named = flight.persons.of_header(header, self._source)
        if named is None:
            return flight.lease
        local_id = flight.persons.at_once(named, self._source)
        if local_id is None:
            # To be found out on the loop; until then nobody is given it.
            self._named = named
            flight.doubtful.add(self._sop_instance_uid)
            return flight.lease
        if flight.patient_id and local_id != flight.patient_id:
            raise Refused(IDENTITY_CONFLICT)
        self._patient_id = local_id
        return flight.lease

    async def _identify(self, flight: Flight, named: PatientId, stored: Stored) -> None:
        """Find out who the patient is here.

        Raises:
            Refused: nobody, or not the one agreed on; it has been taken back.
        """
        agrees = False
        try:
            self._patient_id = await flight.persons.here(named, self._source)
            agrees = flight.agrees(self._patient_id)
        except IdentityUnresolved as unresolved:
            self._unresolved = unresolved
            raise Refused(IDENTITY_UNRESOLVED) from None
        except CrossReferenceError:
            raise Refused(IDENTITY_UNKNOWN) from None
        finally:
            if not agrees and not flight.closed:
                flight.take_back(self._source, stored)
        if not agrees:
            raise Refused(IDENTITY_CONFLICT)

    def _turned_away(self, reason: str) -> int:
        self._fail(reason)
        if reason in (IDENTITY_UNRESOLVED, IDENTITY_UNKNOWN):
            unresolved = self._unresolved or IdentityUnresolved("no_answer")
            report_unresolved(self._source, unresolved, sop_instance_uid=self._sop_instance_uid)
        elif reason in (IDENTITY_CONFLICT, OTHER_STUDY):
            report_conflict(
                self._source,
                "other_patient" if reason == IDENTITY_CONFLICT else reason,
                sop_instance_uid=self._sop_instance_uid,
            )
        return _STATUS.get(reason, CANNOT_UNDERSTAND)

    def _fail(self, reason: str) -> None:
        """Have flights count the instance as Failed, and say why it was not taken."""
        self._active()
        _REFUSED.labels(self._source, reason).inc()
        _log.warning(
            "store_refused",
            source=self._source,
            sop_instance_uid=self._sop_instance_uid,
            reason=reason,
        )
        if self._flight is not None:
            self._flight.refused(self._source, self._sop_instance_uid, reason)
        elif reason != NO_FLIGHT:
            self._flights.refused(self._source, self._sop_instance_uid, reason)

    def _active(self) -> None:
        """Note a sign of life of the order that this is for.

        Which one that is may not be known before the header has been read. Those
        that wait for a tape must not pass for begun because another study comes, and
        those that have begun and stalled not for alive.
        """
        now = self._loop.time()
        orders = [order for order in self._flights.orders(self._source) if self._may_be_for(order)]
        for order in orders:
            order.last_possible_activity = now
            if len(orders) == 1 or self._flight is not None:
                order.last_activity = now
            elif order.last_activity and not self._over:
                first, _ = order.doubtful.get(self, (now, now))
                if self not in order.doubtful:
                    self._doubtful_for.append(order)
                order.doubtful[self] = (first, now)

    def _no_longer_doubtful(self) -> None:
        """Take back what may have been for orders: it is known now, or nothing more comes."""
        self._over = True
        for order in self._doubtful_for:
            order.doubtful.pop(self, None)
        self._doubtful_for.clear()

    def _may_be_for(self, order: RetrieveOrder) -> bool:
        flight = self._flight
        if flight is not None and flight.study_instance_uid not in order.study_instance_uids:
            return False
        series = self._series_instance_uid
        if series and order.series_instance_uids and series not in order.series_instance_uids:
            return False
        return not order.sop_instance_uids or self._sop_instance_uid in order.sop_instance_uids
