"""Text of a data set to and from Unicode (PS3.5 6.1, PS3.3 C.12.1.1.2).

Decoding never fails: an archive that declares the wrong character set still
gets its rows shown. Encoding is strict: what does not fit raises, so that the
caller can choose a character set that holds the value. Nothing here warns or
logs, since whatever it could say would contain a patient's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from pydicom.charset import CODES_TO_ENCODINGS, ENCODINGS_TO_CODES, python_encoding

UTF8: Final = ("ISO_IR 192",)
"""The defined terms of the character set into which every value fits."""

TEXT_VRS: Final = frozenset({"SH", "LO", "ST", "LT", "UC", "UT", "PN"})
"""The VRs that Specific Character Set governs (PS3.5 6.1.2.2)."""

_ESC: Final = b"\x1b"
_DEFAULT_CODEC: Final = "latin_1"  # a superset of ISO-IR 6, so that stray bytes survive
_STANDARD_TERM: Final = re.compile(r"ISO[ _-]?(2022[ _-]?)?IR[ _-]?(\d+)")
_ESCAPE: Final = re.compile(rb"\x1b(?:\$[()]?.|[(),\-./].)", re.DOTALL)
_ESCAPES_ITSELF: Final = frozenset({"iso2022_jp", "iso2022_jp_2"})
_JIS_X_0201: Final = "shift_jis"  # which the codec has among much else
_NOT_ASCII_IN_JIS: Final = frozenset("¥‾")
"""What JIS X 0201 has in the places of a backslash, which ends a value, and of a tilde."""
_NO_CODEC: Final = ""
_TO_ASCII: Final = b"\x1b(B"
_TO_JIS_X_0201: Final = b"\x1b(J"
# Code extensions end at these, and start anew behind them (PS3.5 6.1.2.5.3).
_DELIMITERS: Final = b"\\\r\n\t\x0c"
_NAME_DELIMITERS: Final = _DELIMITERS + b"^="
_PIECES: Final = re.compile(r"([\\\r\n\t\x0c])")
_NAME_PIECES: Final = re.compile(r"([\\\r\n\t\x0c^=])")


class CannotEncode(Exception):
    """A value has no representation in a character set. Carries no value."""


@lru_cache(maxsize=256)
def normalise(term: str) -> str:
    """Return the defined term that *term* means, or ``""`` where none is known.

    Archives write ``ISO-IR 100`` and ``ISO_IR_192``; those are understood.
    """
    cleaned = term.strip(" \0").upper()
    if found := _STANDARD_TERM.fullmatch(cleaned):
        cleaned = f"ISO {'2022 ' if found[1] else '_'}IR {found[2]}".replace("ISO _IR", "ISO_IR")
    return cleaned if cleaned in python_encoding else ""


@lru_cache(maxsize=256)
def _codecs(terms: tuple[str, ...]) -> tuple[str, ...]:
    """Return the Python codec of each term; the first decodes text without escapes."""
    names = []
    for term in terms or ("",):
        known = normalise(term)
        name = python_encoding.get(known, "") if known else ""
        names.append(_DEFAULT_CODEC if name in ("", "iso8859") else name)
    return tuple(names)


@lru_cache(maxsize=256)
def _encoders(terms: tuple[str, ...]) -> tuple[str, ...]:
    """Return the codec with which each term is written, :data:`_NO_CODEC` where ASCII is all."""
    names = []
    for term in terms:
        known = normalise(term)
        name = python_encoding.get(known, "") if known else ""
        names.append(_NO_CODEC if name in ("", "iso8859") else name)
    return tuple(names)


def decode(value: bytes, terms: tuple[str, ...], vr: str = "LO") -> str:
    """Return *value* as text; bytes without a meaning become U+FFFD.

    Args:
        value: an encoded value, all its values and padding included.
        terms: Specific Character Set; empty means the default repertoire, in
            which bytes beyond ASCII are read as Latin-1.
        vr: decides what resets a code extension.
    """
    if _ESC not in value:
        if value.isascii():
            return value.decode("ascii")
        return value.decode(_codecs(terms)[0], "replace")
    first = _codecs(terms)[0]
    delimiters = _NAME_DELIMITERS if vr == "PN" else _DELIMITERS
    parts = value.split(_ESC)
    text = [parts[0].decode(first, "replace")]
    text.extend(_decode_escaped(_ESC + part, first, delimiters) for part in parts[1:])
    return "".join(text)


def _decode_escaped(fragment: bytes, first: str, delimiters: bytes) -> str:
    """Decode what follows one escape sequence, up to the next one (PS3.5 6.1.2.5)."""
    code = fragment[: 4 if fragment[1:3] in (b"$(", b"$)") else 3]
    codec = CODES_TO_ENCODINGS.get(code)
    if codec is None:
        # An escape that nothing declares: shown without its escape character.
        return fragment[1:].decode(first, "replace")
    if codec in _ESCAPES_ITSELF:
        return fragment.decode(codec, "replace")
    body = fragment[len(code) :]
    end = next((at for at, byte in enumerate(body) if byte in delimiters), len(body))
    codec = _DEFAULT_CODEC if codec == "iso8859" else codec
    return body[:end].decode(codec, "replace") + body[end:].decode(first, "replace")


def encode(text: str, terms: tuple[str, ...], vr: str = "LO") -> bytes:
    """Return *text* in the character sets *terms*.

    Raises:
        CannotEncode: a character is in none of them.
    """
    if text.isascii():
        return text.encode("ascii")
    codecs = _encoders(terms)
    if not any(codecs):
        raise CannotEncode("beyond the default repertoire")
    if len(codecs) == 1 and codecs[0] not in _ESCAPES_ITSELF:
        encoded = _try(text, codecs[0])
        if encoded is None:
            raise CannotEncode(f"not in {terms[0]}")
        return encoded
    pieces = (_NAME_PIECES if vr == "PN" else _PIECES).split(text)
    return b"".join(_encode_piece(piece, codecs) for piece in pieces)


def _try(text: str, codec: str) -> bytes | None:
    if codec == _NO_CODEC:
        return None
    try:
        encoded = text.encode(codec)
    except UnicodeEncodeError:
        return None
    if codec in _ESCAPES_ITSELF and not _NOT_ASCII_IN_JIS.isdisjoint(text):
        return None
    if codec == _JIS_X_0201 and encoded.decode(codec) + "\0" * (len(encoded) - len(text)) != text:
        # Kanji are not in it, and a yen sign would be a backslash.
        return None
    return encoded


def _encode_piece(piece: str, codecs: tuple[str, ...]) -> bytes:
    """Encode text without delimiters with the first character set that holds it whole."""
    if piece.isascii():
        return piece.encode("ascii")
    for position, codec in enumerate(codecs):
        encoded = _try(piece, codec)
        if encoded is None:
            continue
        if codec in _ESCAPES_ITSELF:
            # The Japanese codecs know more escapes than the terms declare.
            if all(_declared(code, codecs) for code in _ESCAPE.findall(encoded)):
                if codecs[0] == _JIS_X_0201:
                    # What G0 was before, and goes back to, is not ASCII then (PS3.5 H.3.2).
                    encoded = encoded.replace(_TO_ASCII, _TO_JIS_X_0201)
                return encoded
        elif position == 0:
            return encoded
        elif codec in ENCODINGS_TO_CODES:
            return ENCODINGS_TO_CODES[codec] + encoded
    raise CannotEncode("in none of the character sets")


def _declared(code: bytes, codecs: tuple[str, ...]) -> bool:
    return code == _TO_ASCII or CODES_TO_ENCODINGS.get(code) in codecs


def choose(request_terms: tuple[str, ...], texts: Iterable[str]) -> tuple[str, ...]:
    """Return the character set for one answer: none if ASCII does, the request's, or UTF-8."""
    beyond = [text for text in texts if not text.isascii()]
    if not beyond:
        return ()
    try:
        for text in beyond:
            # As a name: its delimiters make the smaller pieces.
            encode(text, request_terms, "PN")
    except CannotEncode:
        return UTF8
    return request_terms
