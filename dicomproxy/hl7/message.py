"""An HL7 v2 message as read: its fields by position, unescaped. Pure.

Nothing is validated but what is needed to answer: a message is often not what its
profile says, and is read all the same. Values come as text, the HL7 null (two
quotation marks) included; a value that could not be decoded holds U+FFFD. Blanks at
the end of a segment are not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import hl7kit

from dicomproxy.hl7.charset import decode
from dicomproxy.hl7.errors import MalformedMessage

NULL: Final = '""'
"""HL7's "delete what you hold", which is no value (2.5.3)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A segment: its name and which one of that name, from 1."""

    segment: str
    occurrence: int = 1


class Message:
    """A message that was parsed; made by :func:`parse`."""

    def __init__(self, parsed: hl7kit.Message) -> None:
        self._parsed = parsed

    def __repr__(self) -> str:
        # What is sent as a type may be anything; neither it nor any other value is shown.
        return f"<Message, {len(self._parsed.segments())} segments>"

    @property
    def code(self) -> str:
        """Message code, MSH-9.1: ``ADT``."""
        return self.get("MSH", 9, 1)

    @property
    def trigger(self) -> str:
        """Trigger event, MSH-9.2: ``A40``."""
        return self.get("MSH", 9, 2)

    @property
    def control_id(self) -> str:
        """Message control ID, MSH-10."""
        return self.get("MSH", 10)

    @property
    def version(self) -> str:
        """Version ID, MSH-12.1: ``2.5``."""
        return self.get("MSH", 12, 1)

    def get(
        self,
        segment: str | Place,
        field: int,
        component: int = 1,
        subcomponent: int | None = None,
        *,
        repetition: int = 1,
    ) -> str:
        """Return a value, empty where there is none. All positions count from 1.

        Without *subcomponent* the component is taken whole: a sender that forgot
        to escape an ampersand must not have an ID cut short.
        """
        path = f"{_path(segment, field)}[{repetition}].{component}"
        if subcomponent is not None:
            path += f".{subcomponent}"
        return self._parsed.get(path) or ""

    def repetitions(self, segment: str | Place, field: int, most: int | None = None) -> range:
        """Return the numbers of a field's repetitions, empty ones included; *most* at most."""
        path = _path(segment, field)
        count = 0
        while count != most and self._parsed.get(f"{path}[{count + 1}]") is not None:
            count += 1
        return range(1, count + 1)

    def segments(self) -> Iterator[Place]:
        """Yield every segment in the order of the message, its name in capitals."""
        seen: dict[str, int] = {}
        for name in map(str.upper, self._parsed.segments()):
            seen[name] = seen.get(name, 0) + 1
            yield Place(name, seen[name])

    def has(self, segment: str) -> bool:
        """Tell whether a segment of that name is there."""
        return any(place.segment == segment for place in self.segments())


def parse(frame: bytes) -> Message:
    """Read the content of one MLLP frame, by its own character set and separators.

    Raises:
        UnknownCharacterSet: what it declares is not known.
        MalformedMessage: it is no message, or a line of it is no segment: a value
            that was torn by a line end could be half an ID.
    """
    return _parsed(decode(frame))


def parse_header(frame: bytes) -> Message:
    """Read a message that cannot be read as a whole far enough to answer it: its header.

    Raises:
        MalformedMessage: it is no message.
    """
    return _parsed(re.split(rb"[\r\n]", frame, maxsplit=1)[0].decode("ascii", "replace"))


def _parsed(text: str) -> Message:
    try:
        return Message(hl7kit.parse(text))
    except hl7kit.ParseError:
        pass  # its text quotes the message
    raise MalformedMessage("no_message")


def _path(segment: str | Place, field: int) -> str:
    place = segment if isinstance(segment, Place) else Place(segment)
    return f"{place.segment}[{place.occurrence}]-{field}"
