"""The kinds of value that a configuration holds, each with its words and its JSON Schema.

A kind converts the text of a YAML scalar, or takes a value that is converted
already, and says in one phrase what it expects. That phrase is what a fault
message and the reference show, so that they cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dicomproxy.config.faults import closest, show_text
from dicomproxy.config.transfer_syntaxes import BY_KEYWORD

Network = IPv4Network | IPv6Network


# By identity: a schema is a mapping, which has no hash.
@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of scalar: what it expects, how it converts, how an editor checks it.

    *convert* raises ValueError for what it refuses; the error's text, if any,
    is a hint that is added to the message.
    """

    expected: str
    convert: Callable[[object], Any]
    json: Mapping[str, Any]

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(self.json)

    def _validate(self, value: object) -> Any:
        try:
            return self.convert(value)
        except ValueError as error:
            hint = f" ({error})" if str(error) else ""
            raise _unexpected(self.expected + hint) from None


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """A list whose single member may stand without brackets; no member twice."""

    at_least: int = 0
    check: Callable[[tuple[Any, ...]], None] | None = None

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        members = core_schema.no_info_before_validator_function(_as_list, handler(source))
        return core_schema.no_info_after_validator_function(self._validate, members)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        many = {**handler(schema), "uniqueItems": True}
        if self.at_least:
            many["minItems"] = self.at_least
        return {"anyOf": [many["items"], many]}

    def _validate(self, members: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(members) < self.at_least:
            raise _unexpected("at least one member (leave the key out for its default)")
        if len(set(members)) < len(members):
            raise _unexpected("each member once")
        if self.check is not None:
            try:
                self.check(members)
            except ValueError as error:
                raise _unexpected(str(error)) from None
        return members


def _unexpected(expected: str) -> PydanticCustomError:
    # Braces would be taken for placeholders, so the phrase travels as one.
    return PydanticCustomError("unexpected", "{expected}", {"expected": expected})


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError
    return value


# ------------------------------------------------------------------- quantities

_NUMBER: Final = r"[0-9]+(?:\.[0-9]+)?"
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES: Final = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_DURATION: Final = re.compile(rf"({_NUMBER}) ?(ms|s|m|h|d|)")
_SIZE: Final = re.compile(rf"({_NUMBER}) ?((?:[kmgt]i?)?b|)", re.IGNORECASE)
_LONGEST_SECONDS: Final = 3650 * 86400
_LARGEST_BYTES: Final = 10**18


def _quantity(
    value: object, form: re.Pattern[str], units: Mapping[str, float], plain: str
) -> float:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int | float):
        return value
    found = form.fullmatch(_text(value))
    if found is None or len(found[1]) > 20:
        raise ValueError
    return float(found[1]) * units[found[2].lower() or plain]


def duration(at_most: str = "", *, zero: bool = False) -> Kind:
    """Return the kind of a time span in seconds; *zero* allows none at all."""
    most = _to_seconds(at_most) if at_most else _LONGEST_SECONDS
    limits = f"at most {at_most or '3650d'}"

    def convert(value: object) -> float:
        seconds = _to_seconds(value)
        if not 0 <= seconds <= most or (seconds == 0 and not zero):
            raise ValueError(limits if zero else f"more than 0, {limits}")
        return seconds

    return Kind(
        f"a duration such as 500ms or 5s, {limits}"
        if at_most
        else "a duration such as 500ms, 5s, 2m, 1h or 7d",
        convert,
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^{_NUMBER} ?(ms|s|m|h|d)?$"},
                {"type": "number", "minimum" if zero else "exclusiveMinimum": 0},
            ]
        },
    )


def _to_seconds(value: object) -> float:
    return float(_quantity(value, _DURATION, _SECONDS, "s"))


def size(at_least: str, at_most: str = "") -> Kind:
    """Return the kind of a number of bytes between two sizes, both included."""
    least = _to_bytes(at_least)
    most = _to_bytes(at_most) if at_most else _LARGEST_BYTES
    limits = f"from {at_least} to {at_most}" if at_most else f"at least {at_least}"

    def convert(value: object) -> int:
        amount = _to_bytes(value)
        if not least <= amount <= most:
            raise ValueError(limits)
        return amount

    return Kind(
        "a size such as 64KiB, 500MB or 200GB",
        convert,
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^{_NUMBER} ?([kKmMgGtT][iI]?)?[bB]?$"},
                {"type": "integer", "minimum": least},
            ]
        },
    )


def _to_bytes(value: object) -> int:
    return round(_quantity(value, _SIZE, _BYTES, "b"))


def whole(at_least: int, at_most: int, noun: str = "a whole number") -> Kind:
    """Return the kind of a whole number within limits, both included."""

    def convert(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        # A leading zero is octal to some readers of YAML and decimal to others.
        if isinstance(value, str) and not re.fullmatch(r"0|[1-9][0-9]{0,18}", value):
            raise ValueError
        number = int(value)
        if not at_least <= number <= at_most:
            raise ValueError
        return number

    return Kind(
        f"{noun} from {at_least} to {at_most}",
        convert,
        {"type": "integer", "minimum": at_least, "maximum": at_most},
    )


def _fraction(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError
    return float(value)


_FLAGS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in _FLAGS:
        raise ValueError
    return _FLAGS[value.lower()]


def choice(*words: str, later: tuple[str, ...] = ()) -> Kind:
    """Return the kind of one word among several; *later* are words of a coming version."""

    def convert(value: object) -> str:
        text = _text(value)
        if text in later:
            raise ValueError(f"{text} is not available in this version")
        if text not in words:
            meant = closest(text, words)
            raise ValueError(f"did you mean {meant}?" if meant and len(words) > 1 else "")
        return text

    return Kind(" or ".join(words), convert, {"enum": list(words)})


Fraction = Annotated[
    float,
    Kind(
        "a fraction above 0, at most 1, such as 0.95",
        _fraction,
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    ),
]
Duration = Annotated[float, duration()]
Pause = Annotated[float, duration(zero=True)]
Minutes = Annotated[float, duration("1h")]
Flag = Annotated[bool, Kind("true or false", _flag, {"type": "boolean"})]
Port = Annotated[int, whole(1, 65535, "a port")]
BindPort = Annotated[int, whole(0, 65535, "a port (0 takes a free one),")]


# ------------------------------------------------------------------- addressing

_LABEL: Final = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_NUMERIC: Final = re.compile(r"[0-9]*\.[0-9.]*(/.*)?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(/.*)?")


def _bind_host(value: object) -> str:
    text = _text(value)
    if _NUMERIC.fullmatch(text):
        return str(ip_address(text)) if _is_address(text) else _refuse(text)
    if not _HOST_NAME.fullmatch(text) or len(text) > 253:
        _refuse(text)
    return text


def _peer_host(value: object) -> str:
    host = _bind_host(value)
    if _is_address(host) and ip_address(host).is_unspecified:
        raise ValueError("an address that can be connected to")
    return host


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _refuse(text: str) -> str:
    name, colon, port = text.rpartition(":")
    if colon and port.isdecimal() and ":" not in name:
        raise ValueError("the port is a key of its own")
    raise ValueError


def _network(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    text = _text(value)
    if not _NUMERIC.fullmatch(text):
        raise ValueError
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        wider = ip_network(text, strict=False)
    except ValueError:
        raise ValueError from None
    raise ValueError(f"the network is {wider}")


def _ae_title(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    # Leading and trailing spaces are not significant (PS3.5 section 6.2).
    title = value.strip(" ")
    if not title or len(title) > 16 or not re.fullmatch(r"[ -\[\]-~]+", title):
        raise ValueError
    return title


def _sender(value: object) -> str | Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if isinstance(value, str) and _NUMERIC.fullmatch(value):
        return _network(value)
    return _ae_title(value)


_AE_TITLE_JSON: Final = {
    "type": "string",
    "pattern": r"^(?=.*[^ ])[ -\[\]-~]{1,16}$",
}
AETitle = Annotated[
    str, Kind("an AE title: 1 to 16 ASCII characters, no backslash", _ae_title, _AE_TITLE_JSON)
]
AETitles = Annotated[tuple[AETitle, ...], OneOrMany()]
PeerHost = Annotated[
    str, Kind("a host name or an IP address", _peer_host, {"type": "string", "minLength": 1})
]
BindHost = Annotated[
    str,
    Kind("a host name or an IP address to listen on", _bind_host, {"type": "string"}),
]
Networks = Annotated[
    tuple[
        Annotated[
            Network,
            Kind(
                "an IP address or a network such as 10.0.1.0/24",
                _network,
                {"type": "string", "pattern": r"^[0-9A-Fa-f:.]+(/[0-9]+)?$"},
            ),
        ],
        ...,
    ],
    OneOrMany(at_least=1),
]
Senders = Annotated[
    tuple[
        Annotated[
            str | Network,
            Kind("an AE title, an IP address or a network", _sender, {"type": "string"}),
        ],
        ...,
    ],
    OneOrMany(at_least=1),
]


# ------------------------------------------------------------------ DICOM terms


def _uid(value: object) -> str:
    text = _text(value)
    # No component but 0 begins with 0 (PS3.5 section 9.1).
    if len(text) > 64 or not re.fullmatch(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+", text):
        raise ValueError
    return text


def _transfer_syntax(value: object) -> str:
    text = _text(value)
    if text in BY_KEYWORD:
        return BY_KEYWORD[text]
    if not text[:1].isdigit():
        meant = closest(text, BY_KEYWORD)
        raise ValueError(f"did you mean {meant}?" if meant else "")
    uid = _uid(text)
    # Other organizations register syntaxes under roots of their own.
    if uid.startswith("1.2.840.10008.") and uid not in BY_KEYWORD.values():
        raise ValueError(f"no instance can be sent in {show_text(uid)}")
    return uid


# PS3.3 C.12.1.1.2: Tables C.12-2 (alone), C.12-3 and C.12-4 (code extensions), C.12-5 (alone).
_LATIN: Final = (100, 101, 109, 110, 126, 127, 138, 144, 148, 166)
_ALONE: Final = (
    "ISO_IR 13",
    *(f"ISO_IR {number}" for number in _LATIN),
    "ISO_IR 192",
    "GB18030",
    "GBK",
)
_SINGLE_BYTE: Final = tuple(f"ISO 2022 IR {number}" for number in (6, 13, *_LATIN))
_MULTI_BYTE: Final = tuple(f"ISO 2022 IR {number}" for number in (58, 87, 149, 159))
CHARACTER_SETS: Final = (*_ALONE, *_SINGLE_BYTE, *_MULTI_BYTE)


def _character_set(value: object) -> str:
    text = _text(value)
    if text not in CHARACTER_SETS:
        meant = closest(text.replace(" ", "_"), CHARACTER_SETS)
        raise ValueError(f"did you mean {meant}?" if meant else "")
    return text


def _check_charset(terms: tuple[str, ...]) -> None:
    if terms[0] in _MULTI_BYTE:
        raise ValueError(f"a single-byte set such as ISO 2022 IR 6 before {terms[0]}")
    if len(terms) > 1 and not set(terms).isdisjoint(_ALONE):
        raise ValueError("sets with code extensions (ISO 2022 ...) where there are several")


_SOURCE_NAME: Final = r"[a-z0-9_-]{1,32}"


def _source_name(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(_SOURCE_NAME, text):
        raise ValueError
    if text == "local":
        raise ValueError("local is the local PACS, which every query asks")
    return text


SourceName = Annotated[
    str,
    Kind(
        "a name of 1 to 32 of a-z, 0-9, _ and -",
        _source_name,
        {"type": "string", "pattern": rf"^(?!local$){_SOURCE_NAME}$"},
    ),
]
SourceNames = Annotated[tuple[SourceName, ...], OneOrMany()]


def _provider_name(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(_SOURCE_NAME, text):
        raise ValueError
    if text == "same":
        raise ValueError("same is there without being listed")
    return text


ProviderName = Annotated[
    str,
    Kind(
        "a name of 1 to 32 of a-z, 0-9, _ and -",
        _provider_name,
        {"type": "string", "pattern": rf"^(?!same$){_SOURCE_NAME}$"},
    ),
]
ProviderNames = Annotated[
    tuple[
        Annotated[
            str,
            Kind(
                "same, or the name of one of cross_references",
                lambda value: value if value == "same" else _provider_name(value),
                {"type": "string", "pattern": rf"^{_SOURCE_NAME}$"},
            ),
        ],
        ...,
    ],
    OneOrMany(at_least=1),
]
Uid = Annotated[
    str, Kind("a UID", _uid, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)+$", "maxLength": 64})
]
TransferSyntaxes = Annotated[
    tuple[
        Annotated[
            str,
            Kind(
                "a transfer syntax, by UID or by keyword",
                _transfer_syntax,
                {
                    "anyOf": [
                        {"enum": list(BY_KEYWORD)},
                        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)+$"},
                    ]
                },
            ),
        ],
        ...,
    ],
    OneOrMany(at_least=1),
]
Charset = Annotated[
    tuple[
        Annotated[
            str,
            Kind(
                "a defined term of Specific Character Set, such as ISO_IR 100",
                _character_set,
                {"enum": list(CHARACTER_SETS)},
            ),
        ],
        ...,
    ],
    OneOrMany(at_least=1, check=_check_charset),
]


# --------------------------------------------------------------------- identity


def _significant(longest: int, refused: str) -> Callable[[object], str]:
    """Return what takes a text of at most *longest* characters, without any of *refused*."""

    def convert(value: object) -> str:
        # Leading and trailing spaces are not significant (PS3.5 section 6.2).
        text = _text(value).strip(" ")
        if not text or len(text) > longest or not set(text).isdisjoint(refused):
            raise ValueError
        return text

    return convert


Namespace = Annotated[
    str,
    Kind(
        "a name of 1 to 64 characters, no backslash",
        _significant(64, "\\"),
        {"type": "string", "minLength": 1, "maxLength": 64},
    ),
]
IssuerText = Annotated[
    str,
    Kind(
        "1 to 199 characters, no backslash",
        _significant(199, "\\"),
        {"type": "string", "minLength": 1, "maxLength": 199},
    ),
]
AccessionPrefix = Annotated[
    str,
    Kind(
        "1 to 8 characters that may begin an accession number",
        _significant(8, "\\*?"),
        {"type": "string", "minLength": 1, "maxLength": 8},
    ),
]
_URL: Final = re.compile(r"https?://[^\s/?#@\\]+(?:/[^\s?#@\\]*)?", re.IGNORECASE)


def _http_url(value: object) -> str:
    text = _text(value)
    if not _URL.fullmatch(text):
        raise ValueError
    return text.rstrip("/")


HttpUrl = Annotated[
    str,
    Kind(
        "a URL that begins with https:// or http://, without user, query and fragment",
        _http_url,
        {"type": "string", "pattern": r"^[Hh][Tt][Tt][Pp][Ss]?://[^\s?#@]+$"},
    ),
]


# ------------------------------------------------------------------------ files


def _path(value: object) -> Path:
    if isinstance(value, Path):
        return value
    text = _text(value)
    if not text.strip() or text.startswith("~"):
        # Not expanded: a service has no home directory worth writing to.
        raise ValueError("written out, ~ is not expanded" if text else "")
    return Path(text)


FilePath = Annotated[Path, Kind("a path", _path, {"type": "string", "minLength": 1})]
