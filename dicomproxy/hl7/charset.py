"""Character sets of HL7 v2: what MSH-18 says, as Python codecs (table 0211). Pure.

Rules kept: text is decoded before it is split, since in the Japanese sets a
separator's byte may be half a character. What does not decode becomes U+FFFD
instead of an error: one misspelt name must not cost the message, and who takes a
value as an identity refuses one that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from dicomproxy.hl7.errors import MalformedMessage, UnknownCharacterSet

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"

DEFAULT: Final = "UNICODE UTF-8"
"""What we declare where ASCII does not do."""

_CODECS: Final = {
    "ASCII": "ascii",
    "ISOIR6": "ascii",
    **{f"8859{part}": f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))},
    **{f"ISO8859{part}": f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))},
    "ISOIR13": "shift_jis",
    "ISOIR14": "iso2022_jp_2",
    "ISOIR87": "iso2022_jp_2",
    "ISOIR159": "iso2022_jp_2",
    "ISOIR100": "iso8859-1",
    "ISOIR192": "utf-8",
    "GB180302000": "gb18030",
    "GB18030": "gb18030",
    "KSX1001": "euc_kr",
    "BIG5": "big5",
    "UNICODE": "utf-8",
    "UNICODEUTF8": "utf-8",
    "UTF8": "utf-8",
    "WINDOWS1250": "cp1250",
    "WINDOWS1251": "cp1251",
    "WINDOWS1252": "cp1252",
}
"""By the letters and digits of the term; what the field writes for it included.

UTF-16 and UTF-32 are missing: their bytes collide with those of a frame.
"""

_MULTIBYTE_ESCAPES: Final = "iso2022_jp_2"


def codec_for(terms: Iterable[str]) -> str | None:
    """Return the Python codec for the repetitions of MSH-18, None if none is known.

    The first term holds for the message, the others for what is switched to by
    escape sequences; only the Japanese sets are switched that way in practice.
    No term at all means ASCII (HL7 v2.5.1, 2.15.9.18); then the answer is UTF-8,
    which reads ASCII and what many senders leave undeclared.
    """
    known = [_CODECS.get(re.sub(r"[^A-Z0-9]", "", term.upper())) for term in terms if term.strip()]
    if not known:
        return "utf-8"
    return _MULTIBYTE_ESCAPES if _MULTIBYTE_ESCAPES in known else known[0]


def declared(frame: bytes) -> tuple[str, ...]:
    """Return the repetitions of MSH-18 of an undecoded message."""
    segment = re.split(rb"[\r\n]", frame, maxsplit=1)[0]
    separator = segment[3:4]
    if not separator:
        return ()
    fields = segment.split(separator)
    # MSH-1 is the separator itself, so that field n is piece n - 1.
    if len(fields) < 18:
        return ()
    repetition = fields[1][1:2] or b"~"
    return tuple(term.decode("ascii", "replace") for term in fields[17].split(repetition))


def decode(frame: bytes) -> str:
    """Return the text of a message, by its own MSH-18.

    Raises:
        UnknownCharacterSet: a set nobody knows, in a message that needs one.
    """
    codec = codec_for(declared(frame))
    if codec is None:
        if not frame.isascii() or b"\x1b" in frame:
            raise UnknownCharacterSet
        codec = "ascii"
    return frame.decode(codec, "replace")


def encode(text: str, term: str) -> bytes:
    """Return *text* in the set that MSH-18 calls *term*.

    Raises:
        UnknownCharacterSet: nobody knows it.
        MalformedMessage: it does not have the characters.
    """
    codec = codec_for([term])
    if codec is None:
        raise UnknownCharacterSet
    try:
        return text.encode(codec)
    except UnicodeEncodeError:
        pass
    raise MalformedMessage("not_in_character_set")
