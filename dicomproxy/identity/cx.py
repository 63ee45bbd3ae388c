"""Patient IDs as HL7 writes them: CX with its assigning authority, an HD (2.A.14). Pure.

``ID^^^NAMESPACE&UNIVERSAL ID&TYPE`` and back. An ID that was not read exactly is no
ID: one with a character that could not be decoded is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.charset import REPLACEMENT
from dicomproxy.hl7.message import NULL, Message, Place
from dicomproxy.hl7.writing import Components

MOST_IDS: Final = 500
"""IDs read from one field; who has more is no person."""

UNNAMED: Final = Domain()
"""The domain of an ID that names none."""

_ISO: Final = "ISO"


class UnreadableId(Exception):
    """A field holds an ID that cannot be taken as it stands; ``reason`` is log-safe."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def components(patient: PatientId) -> Components:
    """Return the components of a CX."""
    return [patient.value, "", "", authority(patient.domain)]


def authority(domain: Domain) -> tuple[str, ...]:
    """Return the subcomponents of an assigning authority."""
    kind = domain.universal_id_type or (_ISO if domain.universal_id else "")
    return (domain.namespace, domain.universal_id, kind)


def read_ids(
    message: Message, segment: str | Place, field: int, default: Domain = UNNAMED
) -> Iterator[PatientId]:
    """Yield the IDs in the repetitions of a field, in order; empty ones and nulls are skipped.

    Args:
        message: as parsed.
        segment: the segment, or which of several.
        field: its field, from 1.
        default: the domain of IDs that name none.

    Raises:
        UnreadableId: one holds what could not be decoded, or there are too many.
    """
    for repetition in message.repetitions(segment, field, MOST_IDS + 1):
        if repetition > MOST_IDS:
            raise UnreadableId("too_many_ids")
        value = message.get(segment, field, repetition=repetition).strip()
        if not value or value == NULL:
            continue
        pieces = [
            message.get(segment, field, 4, part, repetition=repetition).strip()
            for part in (1, 2, 3)
        ]
        domain = Domain(*("" if piece == NULL else piece for piece in pieces))
        if REPLACEMENT in value or any(REPLACEMENT in piece for piece in pieces):
            raise UnreadableId("undecoded_id")
        yield PatientId(value, domain if domain.is_named else default)
