"""What a registry tells unasked: two records were merged, or a person's IDs changed.

ADT^A40 (ITI-8, merge: MRG-1 into PID-3) and ADT^A31 (ITI-10, update notification:
PID-3 lists every ID the person has now). Both say that what is remembered of these
IDs is out of date; neither is believed any further. Whoever remembers gets one
notice after the other and may get the same one again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.errors import Refusal
from dicomproxy.hl7.inbox import DATA_TYPE_ERROR, REQUIRED_FIELD_MISSING, Inbox
from dicomproxy.hl7.message import Message, Place
from dicomproxy.identity.cx import MOST_IDS, UNNAMED, UnreadableId, read_ids

MERGE = ("ADT", "A40")
UPDATE = ("ADT", "A31")


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
        default: the domain of IDs that name none, as a hospital's own feed often sends.
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
        """Refuse a message that names nobody, or not whom it is about (AE, 101 or 102)."""
        for _ in self._notices(message):
            pass

    async def handle(self, message: Message) -> None:
        """Hand on what *message* says."""
        for notice in self._notices(message):
            await self._handler(notice)

    def _notices(self, message: Message) -> Iterator[IdentityNotice]:
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
