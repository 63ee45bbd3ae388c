"""PIX: asking a cross-reference manager over HL7 v2.5 (ITI-9, IHE ITI TF-2 3.9).

Rules kept: "nobody there" is believed only where the manager says so in the words of
the transaction (NF, or 204 at the ID of the query). Every other answer, and none at
all, is a :class:`CrossReferenceError`: an outage must never look like a person without
priors. What the manager answers about another question or another domain is not
taken. Nothing is remembered here; each lookup asks.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.charset import DEFAULT, REPLACEMENT
from dicomproxy.hl7.client import MllpClient
from dicomproxy.hl7.errors import Fault, MalformedMessage, MllpError
from dicomproxy.hl7.message import Message, Place, parse
from dicomproxy.hl7.writing import Header, message, segment
from dicomproxy.identity.cx import MOST_IDS, UnreadableId, authority, components, read_ids
from dicomproxy.ports import CrossReferenceError, Failure

UNKNOWN_KEY: Final = "204"
"""Unknown key identifier, HL7 table 0357."""

_MOST_SEGMENTS: Final = 100
_MOST_ERRORS: Final = 100

_FAILURES: Final = {
    Fault.UNREACHABLE: Failure.UNREACHABLE,
    Fault.TLS: Failure.UNREACHABLE,
    Fault.CLOSED: Failure.ABORTED,
    Fault.TIMEOUT: Failure.TIMEOUT,
    Fault.PROTOCOL: Failure.PROTOCOL,
    Fault.BUSY: Failure.BUSY,
}


class SeveralIds(StrEnum):
    """What to make of a person who has several IDs in one domain."""

    ALL = "all"  # each is theirs
    NONE = "none"  # one of them is wrong, and nobody knows which


@dataclass(frozen=True, slots=True)
class PixSettings:
    """How the manager knows us, and what its answers are taken for.

    Applications and facilities are namespaces, or an HD as its components.
    """

    sending_application: str | tuple[str, ...] = "DICOMPROXY"
    sending_facility: str | tuple[str, ...] = ""
    receiving_application: str | tuple[str, ...] = ""
    receiving_facility: str | tuple[str, ...] = ""
    query_name: str = "IHE PIX Query"
    charset: str = DEFAULT
    several_ids: SeveralIds = SeveralIds.NONE


class PixCrossReference:
    """Implements :class:`dicomproxy.ports.CrossReference` by ITI-9.

    Args:
        client: the manager's MLLP port; closed with this object.
        settings: see there.
        now: the present moment, with its time zone.
    """

    def __init__(
        self,
        client: MllpClient,
        settings: PixSettings = PixSettings(),
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._settings = settings
        self._now = now
        self._prefix = uuid.uuid4().hex[:8].upper()
        self._numbers = itertools.count(1)

    async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
        """Return the person's IDs in *domain*, none if the manager knows of none.

        Raises:
            CrossReferenceError: it could not be found out.
        """
        if not patient.domain.is_named or not domain.is_named:
            raise CrossReferenceError(Failure.STATUS, "unknown_domain")
        if not patient.value or REPLACEMENT in patient.value:
            raise CrossReferenceError(Failure.STATUS, "unreadable_id")
        # At most 20 characters: MSH-10 and QPD-2 hold no more in v2.5.
        control_id = f"{self._prefix}{next(self._numbers)}"
        try:
            question = self._question(patient, domain, control_id)
            found = await self._client.exchange(
                question,
                lambda content: read_answer(content, control_id, domain, patient.value),
            )
        except MalformedMessage as error:  # our own: a character set that lacks a character
            raise CrossReferenceError(Failure.PROTOCOL, error.reason) from None
        except MllpError as error:
            reason = error.reason or ("tls" if error.fault is Fault.TLS else "")
            raise CrossReferenceError(_FAILURES[error.fault], reason) from None
        if len(found) > 1 and self._settings.several_ids is SeveralIds.NONE:
            raise CrossReferenceError(Failure.STATUS, "several_ids")
        return found

    def forget(self, patient: PatientId) -> None:
        """Do nothing: nothing is remembered."""

    async def close(self) -> None:
        """Close the connections to the manager."""
        await self._client.close()

    def _question(self, patient: PatientId, domain: Domain, control_id: str) -> bytes:
        settings = self._settings
        header = Header(
            sending=(settings.sending_application, settings.sending_facility),
            receiving=(settings.receiving_application, settings.receiving_facility),
            message_type=("QBP", "Q23", "QBP_Q21"),
            control_id=control_id,
            at=self._now(),
        )
        wanted = ["", "", "", authority(domain)]
        asked = segment("QPD", settings.query_name, control_id, components(patient), wanted)
        return message(header, [asked, segment("RCP", "I")], charset=settings.charset)


# ------------------------------------------------------------ reading an answer


def read_answer(
    content: bytes, control_id: str, domain: Domain, asked: str = ""
) -> tuple[PatientId, ...]:
    """Return the IDs that an RSP^K23 gives for *domain* (ITI TF-2 3.9.4.2.2.6).

    Args:
        content: of the frame.
        control_id: of the question, which is its query tag too.
        domain: the one asked for.
        asked: the ID asked about; an answer that repeats another one is not taken.

    Raises:
        CrossReferenceError: anything but "these" or "none".
    """
    try:
        answer = parse(content)
    except MalformedMessage as error:
        raise CrossReferenceError(Failure.PROTOCOL, error.reason) from None
    if sum(1 for _ in answer.segments()) > _MOST_SEGMENTS:
        # Each is looked up from the start: their number must not hold the loop up.
        raise CrossReferenceError(Failure.PROTOCOL, "too_many_segments")
    if answer.get("MSA", 2) != control_id:
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_control_id")
    accepted, status = answer.get("MSA", 1), answer.get("QAK", 2)
    if accepted not in ("AA", "AE", "AR"):
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_acknowledgement")
    if answer.get("QAK", 1) not in ("", control_id):
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_query_tag")
    if answer.get("QPD", 2) not in ("", control_id) or _repeats_another(answer, asked):
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_query_echo")
    if accepted != "AA" or status in ("AE", "AR"):
        # IHE says AE for an unknown key, table 0357 has it among the rejections: both occur.
        if _unknown_patient(answer):
            return ()
        raise CrossReferenceError(Failure.STATUS, _why(answer, "AR" in (accepted, status)))
    if (answer.code, answer.trigger) != ("RSP", "K23"):
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_message_type")
    if status == "NF":
        return _none(answer)
    if status != "OK":
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_query_status")
    return _ids(answer, domain)


def _repeats_another(answer: Message, asked: str) -> bool:
    """Tell whether the question, as the answer repeats it, is about another ID."""
    said = answer.get("QPD", 3).strip()
    # One written in another character set than it says is not another ID.
    return bool(asked and said) and REPLACEMENT not in said and said != asked.strip()


def _ids(answer: Message, domain: Domain) -> tuple[PatientId, ...]:
    try:
        found = [
            one
            for place in answer.segments()
            if place.segment == "PID"
            for one in read_ids(answer, place, 3)
        ]
    except UnreadableId as error:
        raise CrossReferenceError(Failure.PROTOCOL, error.reason) from None
    if not found:
        raise CrossReferenceError(Failure.PROTOCOL, "answer_without_ids")
    values = dict.fromkeys(one.value for one in found if one.domain.matches(domain))
    if not values:
        # Asked for one domain and answered for others: the two sides do not mean the
        # same by it, which says nothing about the person.
        raise CrossReferenceError(Failure.PROTOCOL, "answer_of_another_domain")
    return tuple(PatientId(value, domain) for value in values)


def _none(answer: Message) -> tuple[PatientId, ...]:
    """Return no IDs, unless the answer contradicts itself."""
    repetitions = answer.repetitions("PID", 3)
    if len(repetitions) > MOST_IDS or any(
        answer.get("PID", 3, repetition=one) for one in repetitions
    ):
        raise CrossReferenceError(Failure.PROTOCOL, "contradictory_answer")
    return ()


def _unknown_patient(answer: Message) -> bool:
    """Tell whether the one thing that is wrong is that the ID is not known."""
    errors = _errors(answer)
    return bool(errors) and all(
        code == UNKNOWN_KEY and location in (["3", "1", "1"], ["3", "", "1"])
        for code, location in errors
    )


def _why(answer: Message, rejected: bool) -> str:
    """Name what an AE or AR is about, by code and position alone."""
    unknown = [location for code, location in _errors(answer) if code == UNKNOWN_KEY]
    if any(one[:1] == ["4"] or (one[:1] == ["3"] and one[2:] == ["4"]) for one in unknown):
        return "unknown_domain"
    if unknown:
        return "unknown_key"
    return "rejected" if rejected else "application_error"


def _errors(answer: Message) -> list[tuple[str, list[str]]]:
    """Return code, and field, repetition and component, of each fault found in the QPD.

    One located in another segment, or nowhere, has no position.
    """
    found: list[tuple[str, list[str]]] = []
    for place in answer.segments():
        if place.segment != "ERR":
            continue
        code = answer.get(place, 3)
        places = answer.repetitions(place, 2)[:_MOST_ERRORS] or range(1, 2)
        found += [(code, _location(answer, place, repetition)) for repetition in places]
    return found


def _location(answer: Message, place: Place, repetition: int) -> list[str]:
    pieces = [answer.get(place, 2, component, repetition=repetition) for component in range(1, 6)]
    return pieces[2:] if pieces[0] == "QPD" else []
