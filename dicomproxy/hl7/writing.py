"""Writing HL7 v2: segments from values, every value escaped (2.7). Pure.

A field is a text, or its components: a sequence whose items are texts or, once
more, subcomponents. Separators are the usual ones. Repetitions are a
:class:`Repeated`. Trailing empty pieces are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from dicomproxy.hl7.charset import DEFAULT, encode
from dicomproxy.hl7.message import Message

Components = Sequence["str | Sequence[str]"]

_ENCODING_CHARACTERS: Final = "^~\\&"
_ESCAPES: Final = str.maketrans(
    {
        "|": "\\F\\",
        "^": "\\S\\",
        "~": "\\R\\",
        "\\": "\\E\\",
        "&": "\\T\\",
        # Control characters would end a segment or a frame.
        **{chr(code): f"\\X{code:02X}\\" for code in (*range(0x20), 0x7F)},
    }
)


@dataclass(frozen=True, slots=True)
class Repeated:
    """A field's repetitions."""

    items: Sequence[str | Components]


Field = str | Components | Repeated


def escape(value: str) -> str:
    """Return *value* so that it reads as one value."""
    return value.translate(_ESCAPES)


def segment(name: str, *fields: Field) -> str:
    """Return a segment, without its carriage return; *fields* from the first one on."""
    return "|".join([name, *_trimmed(map(_field, fields))])


@dataclass(frozen=True, slots=True)
class Header:
    """The MSH segment of a message of ours, without what the message itself decides.

    ``sending`` and ``receiving`` are application and facility, each an HD as its
    components.
    """

    sending: tuple[Components, Components]
    receiving: tuple[Components, Components]
    message_type: tuple[str, ...]
    control_id: str
    at: datetime
    version: str = "2.5"
    processing_id: str = "P"


def message(header: Header, segments: Sequence[str], *, charset: str = DEFAULT) -> bytes:
    """Return a message as it goes into a frame.

    MSH-18 is set, and *charset* used, only where ASCII does not do.

    Raises:
        MalformedMessage: a value cannot be written in *charset*.
    """
    text = _text(header, segments, "")
    if text.isascii():
        return text.encode("ascii")
    return encode(_text(header, segments, charset), charset)


def acknowledgement(
    received: Message,
    code: str,
    *,
    control_id: str,
    at: datetime,
    error: int | None = None,
    location: Sequence[str] = (),
) -> bytes:
    """Return the answer to *received* in original mode (2.9.2).

    Args:
        received: what is answered; its control ID comes back in MSA-2.
        code: ``AA``, ``AE`` or ``AR``.
        control_id: of the answer itself.
        at: now.
        error: of table 0357; told in ERR-3, which exists since v2.5.
        location: the components of ERR-2.
    """
    header = Header(
        sending=(_hd(received, 5), _hd(received, 6)),
        receiving=(_hd(received, 3), _hd(received, 4)),
        message_type=tuple(part for part in ("ACK", received.trigger, "ACK") if part)
        if received.trigger
        else ("ACK",),
        control_id=control_id,
        at=at,
        version=received.version or "2.5",
        processing_id=received.get("MSH", 11) or "P",
    )
    segments = [segment("MSA", code, received.control_id)]
    if error is not None and _has_error_code(received.version):
        segments.append(segment("ERR", "", location, (str(error), "", "HL70357"), "E"))
    return message(header, segments)


def _text(header: Header, segments: Sequence[str], charset: str) -> str:
    first = segment(
        "MSH",
        *header.sending,
        *header.receiving,
        header.at.strftime("%Y%m%d%H%M%S%z"),
        "",
        header.message_type,
        header.control_id,
        header.processing_id,
        header.version,
        *[""] * 5,
        charset,
    )
    # The encoding characters are the one field that is not escaped.
    first = first.replace("MSH|", f"MSH|{_ENCODING_CHARACTERS}|", 1)
    return "".join(f"{line}\r" for line in (first, *segments))


def _hd(received: Message, field: int) -> Components:
    return [received.get("MSH", field, component) for component in (1, 2, 3)]


def _has_error_code(version: str) -> bool:
    numbers = [int(part) for part in version.split(".") if part.isdecimal() and len(part) < 3]
    return numbers >= [2, 5] if numbers else True


def _field(value: Field) -> str:
    if isinstance(value, Repeated):
        return "~".join(map(_repetition, value.items))
    return _repetition(value)


def _repetition(value: str | Components) -> str:
    if isinstance(value, str):
        return escape(value)
    return "^".join(_trimmed(map(_component, value)))


def _component(value: str | Sequence[str]) -> str:
    if isinstance(value, str):
        return escape(value)
    return "&".join(_trimmed(map(escape, value)))


def _trimmed(pieces: Iterable[str]) -> list[str]:
    kept = list(pieces)
    while kept and not kept[-1]:
        kept.pop()
    return kept
