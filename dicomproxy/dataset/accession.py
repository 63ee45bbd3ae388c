"""Accession numbers made up for those of other sites, which may equal ours. Pure.

What a number is made from is the source and its own number, nothing else: an
answer to a query and a delivered object must come to the same number, and only
one of them may name an issuer. The hash has no key. It has nothing to hide,
since whoever sees the number may see the original in the object as well, and
without a key the numbers stay the same when the proxy's state is lost or the
proxy replaced, so that one written into a report still leads to its study once
that study was seen again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dicomproxy.dataset.patient import Domain

LONGEST: Final = 16
"""Characters of an SH (PS3.5 6.2)."""

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I, L, O, U
_MARK: Final = "X"
_DIGITS: Final = 13
"""65 bits: among ten million numbers, two are the same with a chance of one in a million."""

_PURPOSE: Final = b"accession number"  # so that no other hash of ours is the same
_UNKNOWN: Final = Domain()


class AccessionsUnavailable(Exception):
    """It cannot be known at the moment what an accession number stands for."""


@dataclass(frozen=True, slots=True)
class Origin:
    """An accession number where it comes from: as *source* has it, with its issuer if known."""

    source: str
    number: str
    issuer: Domain = _UNKNOWN

    def __repr__(self) -> str:
        # The number stays out: a representation may end in a log.
        return f"<Origin at {self.source}>"

    def is_same(self, other: Origin) -> bool:
        """Tell whether both are one number; a source's numbers are told apart by nothing else."""
        return (self.source, self.number) == (other.source, other.number)


def mint(origin: Origin, attempt: int = 0) -> str:
    """Return the number that stands for *origin*: 14 characters, the same each time.

    Args:
        origin: what it is made from; its issuer does not count.
        attempt: another number for the case that the one before is taken.
    """
    parts = (origin.source.encode(), origin.number.encode(), str(attempt).encode())
    digest = hashlib.blake2b(person=_PURPOSE, digest_size=16)
    for part in parts:
        # With their lengths, so that no two origins are one text.
        digest.update(len(part).to_bytes(4, "big") + part)
    value = int.from_bytes(digest.digest(), "big")
    digits = (_ALPHABET[value >> 5 * position & 31] for position in range(_DIGITS))
    return _MARK + "".join(digits)


def candidates(origin: Origin, prefix: str = "") -> Iterator[str]:
    """Yield numbers for *origin*, best first, without end.

    With a *prefix* that is the original behind it, if it fits.
    """
    prefixed = prefix + origin.number
    if prefix and len(prefixed) <= LONGEST:
        yield prefixed
    attempt = 0
    while True:
        yield mint(origin, attempt)
        attempt += 1
