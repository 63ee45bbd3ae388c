"""What a registry tells unasked: two records were merged, or a person's IDs changed.

ADT^A40 (ITI-8, merge: MRG-1 into PID-3) and ADT^A31 (ITI-10, update notification:
PID-3 lists every ID the person has now). Both say that what is remembered of these
IDs is out of date; neither is believed any further. Whoever remembers gets one
notice after the other and may get the same one again: not only those who serve what
comes now, but those of a former configuration too, as long as they serve anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from prometheus_client import Counter

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.errors import Refusal
from dicomproxy.hl7.inbox import (
    DATA_TYPE_ERROR,
    REQUIRED_FIELD_MISSING,
    SEGMENT_SEQUENCE_ERROR,
    Inbox,
)
from dicomproxy.hl7.message import Message, Place
from dicomproxy.identity.cx import MOST_IDS, UNNAMED, UnreadableId, read_ids
from dicomproxy.identity.domains import Domains, resolve
from dicomproxy.identity.service import IdentityService
from dicomproxy.logs import get_logger

MERGE: Final = ("ADT", "A40")
UPDATE: Final = ("ADT", "A31")

_MOST_SEGMENTS: Final = 2_000
"""In a message; finding one among many more would be felt by whoever waits meanwhile."""

_UNKNOWN_DOMAIN: Final = "unknown_domain"

_log = get_logger()

_NOTICES = Counter(
    "dicomproxy_identity_notices_total",
    "Notices that records were merged or IDs changed, by what they made forgotten.",
    ["operation", "outcome"],
)


@dataclass(frozen=True, slots=True)
class IdentityNotice:
    """IDs about which nothing remembered holds any more.

    Args:
        old: the ID that ceased to be used; None for an update.
        surviving: the ID that takes its place, of the same domain if there is one;
            None for an update.
        patient_ids: every ID named, *old* included, each once.
    """

    old: PatientId | None
    surviving: PatientId | None
    patient_ids: tuple[PatientId, ...]


class IdentityNotices:
    """Turns messages of the inbox into notices for *handler*.

    Args:
        handler: awaited for each notice; if it raises, the message is handled again.
        default: the domain of IDs that name none, as a hospital's own feed often sends;
            unnamed where *handler* knows better.
    """

    def __init__(
        self, handler: Callable[[IdentityNotice], Awaitable[None]], *, default: Domain = UNNAMED
    ) -> None:
        self._handler = handler
        self._default = default

    def subscribe_to(self, inbox: Inbox) -> None:
        """Ask *inbox* for the messages understood here."""
        for code, trigger in (MERGE, UPDATE):
            inbox.subscribe(code, trigger, self)

    def check(self, message: Message) -> None:
        """Refuse a message that names nobody, or not whom it is about (AE, 100 to 102)."""
        for _ in self._notices(message):
            pass

    async def handle(self, message: Message) -> None:
        """Hand on what *message* says."""
        for notice in self._notices(message):
            await self._handler(notice)

    def _notices(self, message: Message) -> Iterator[IdentityNotice]:
        if next(islice(message.segments(), _MOST_SEGMENTS, None), None) is not None:
            raise Refusal(SEGMENT_SEQUENCE_ERROR)
        if (message.code, message.trigger) == MERGE:
            yield from self._merges(message)
        else:
            ids = self._ids(message, Place("PID"), 3)
            yield IdentityNotice(None, None, ids)

    def _merges(self, message: Message) -> Iterator[IdentityNotice]:
        """Yield a notice per prior ID; each MRG belongs to the PID before it."""
        person: Place | None = None
        merged = 0
        for place in message.segments():
            if place.segment == "PID":
                person = place
            if place.segment != "MRG" or person is None:
                continue
            surviving = self._ids(message, person, 3)
            prior = self._ids(message, place, 1)
            merged += len(prior)
            if merged > MOST_IDS:
                raise Refusal(DATA_TYPE_ERROR, "MRG^1^1")
            named = tuple(dict.fromkeys((*prior, *surviving)))
            for old in prior:
                yield IdentityNotice(old, _successor(old, surviving), named)
        if person is None:
            raise Refusal(REQUIRED_FIELD_MISSING, "PID^1^3")
        if not merged:
            raise Refusal(REQUIRED_FIELD_MISSING, "MRG^1^1")

    def _ids(self, message: Message, place: Place, field: int) -> tuple[PatientId, ...]:
        location = f"{place.segment}^{place.occurrence}^{field}"
        try:
            found = tuple(dict.fromkeys(read_ids(message, place, field, self._default)))
        except UnreadableId:
            raise Refusal(DATA_TYPE_ERROR, location) from None
        if not found:
            raise Refusal(REQUIRED_FIELD_MISSING, location)
        return found


def _successor(old: PatientId, surviving: tuple[PatientId, ...]) -> PatientId:
    return next((one for one in surviving if one.domain.matches(old.domain)), surviving[0])


@dataclass(frozen=True, slots=True)
class NoticeStats:
    """How many notices were heeded; ``last_at`` in seconds since 1970, 0 for never.

    ``unknown_domain`` counts those that named no domain that is known here.
    """

    merges: int = 0
    updates: int = 0
    unknown_domain: int = 0
    last_at: float = 0.0


class LiveIdentities:
    """Everybody who remembers identities and still serves somebody; a handler of notices.

    Used from one event loop. A notice is heeded by all of them in one step: nobody
    answers from what another one has forgotten already.

    Args:
        now: seconds since 1970.
        rest_seconds: between two times that one forgets everything: a feed whose domain
            is unknown must not keep every lookup from ending.
    """

    def __init__(self, now: Callable[[], float] = time.time, *, rest_seconds: float = 1.0) -> None:
        self._now = now
        self._rest_seconds = rest_seconds
        self._services: list[IdentityService] = []
        # Who has just forgotten everything, and whether they have to once more.
        self._resting: dict[IdentityService, bool] = {}
        self._counts = dict.fromkeys(("merge", "update", _UNKNOWN_DOMAIN), 0)
        self._last_at = 0.0

    def __repr__(self) -> str:
        return f"<LiveIdentities {len(self._services)} services>"

    @property
    def stats(self) -> NoticeStats:
        """What was heeded so far."""
        counts = self._counts
        return NoticeStats(
            counts["merge"], counts["update"], counts[_UNKNOWN_DOMAIN], self._last_at
        )

    def add(self, service: IdentityService | None) -> None:
        """Tell *service* of what comes from now on; None is nobody."""
        if service is not None:
            self._services.append(service)

    def remove(self, service: IdentityService | None) -> None:
        """Tell *service* no more; one that is not told is ignored."""
        if service in self._services:
            self._services.remove(service)

    async def __call__(self, notice: IdentityNotice) -> None:
        """Have everybody forget what *notice* names, and everything if nobody knows its domains.

        Whoever fails does not keep the others from being told; the first error is
        raised after that, so that the notice comes again.
        """
        count, known, errors = 0, not self._services, []
        for service in tuple(self._services):
            try:
                forgotten = self._forget(service, notice)
            except Exception as error:
                errors.append(error)
                continue
            count = max(count, forgotten)
            known = known or forgotten > 0
        if errors:
            raise errors[0]
        operation = "update" if notice.old is None else "merge"
        outcome = "forgotten" if known else _UNKNOWN_DOMAIN
        self._counts[operation] += 1
        self._counts[_UNKNOWN_DOMAIN] += not known
        self._last_at = self._now()
        _NOTICES.labels(operation, outcome).inc()
        _log.info("identity_notice", operation=operation, outcome=outcome, count=count)

    def _forget(self, service: IdentityService, notice: IdentityNotice) -> int:
        """Return how many IDs were forgotten; none where all is, for want of a domain in common.

        A sender that calls a domain otherwise than it is configured speaks of somebody whom
        we may well know; who that is cannot be told.
        """
        domains: Domains = service.domains
        patients = [
            domains.canonical_id(PatientId(one.value, resolve(one.domain, domains.local)))
            for one in notice.patient_ids
        ]
        ours = set(domains)
        if any(patient.domain in ours for patient in patients):
            return len(service.identities.forget(*patients))
        self._forget_everything(service)
        return 0

    def _forget_everything(self, service: IdentityService) -> None:
        if service in self._resting:
            self._resting[service] = True
            return
        service.identities.forget_all(settle=True)
        self._resting[service] = False
        asyncio.get_running_loop().call_later(self._rest_seconds, self._rested, service)

    def _rested(self, service: IdentityService) -> None:
        if self._resting.pop(service):
            self._forget_everything(service)
