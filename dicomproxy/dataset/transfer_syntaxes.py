"""Transfer syntaxes by what they do to pixels, and the order in which we like them.

Instances pass through as they are held, so the best syntax is the one in which
the archive holds them. A sender proposes several where it could transcode:
lossless compression then travels fastest, and a lossy syntax is taken only
where nothing else is offered, since taking it could make the sender lose detail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from dicomproxy.dataset.header import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
)

_PREFIX: Final = "1.2.840.10008.1.2"

LOSSLESS: Final = (
    f"{_PREFIX}.4.70",  # JPEG Lossless, Selection Value 1
    f"{_PREFIX}.4.90",  # JPEG 2000 Lossless
    f"{_PREFIX}.4.80",  # JPEG-LS Lossless
    f"{_PREFIX}.5",  # RLE Lossless
    f"{_PREFIX}.4.57",  # JPEG Lossless, Process 14
    f"{_PREFIX}.4.201",  # High-Throughput JPEG 2000 Lossless
    f"{_PREFIX}.4.202",  # the same with RPCL
    f"{_PREFIX}.4.110",  # JPEG XL Lossless
    f"{_PREFIX}.4.92",  # JPEG 2000 Part 2 Multi-component Lossless
    f"{_PREFIX}.8.1",  # Deflated Image Frame Compression
)
UNCOMPRESSED: Final = (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    f"{_PREFIX}.1.98",  # Encapsulated Uncompressed
)
LOSSY: Final = (
    f"{_PREFIX}.4.50",  # JPEG Baseline
    f"{_PREFIX}.4.51",  # JPEG Extended
    f"{_PREFIX}.4.91",  # JPEG 2000
    f"{_PREFIX}.4.81",  # JPEG-LS Near-Lossless
    f"{_PREFIX}.4.203",  # High-Throughput JPEG 2000
    f"{_PREFIX}.4.111",  # JPEG XL JPEG Recompression
    f"{_PREFIX}.4.112",  # JPEG XL
    f"{_PREFIX}.4.93",  # JPEG 2000 Part 2 Multi-component
    *(f"{_PREFIX}.4.{number}" for number in ("102", "103", "104", "105", "106", "107", "108")),
    f"{_PREFIX}.4.100",  # MPEG2 Main Profile
    f"{_PREFIX}.4.101",
    *(
        f"{_PREFIX}.4.{number}"
        for number in ("100.1", "101.1", "102.1", "103.1", "104.1", "105.1", "106.1")
    ),
)

DEFAULT_ORDER: Final = (*LOSSLESS, *UNCOMPRESSED, *LOSSY)
"""What is accepted from a source, best first, unless its configuration says otherwise."""


_HELD_MOST: Final = (
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLICIT_VR_LITTLE_ENDIAN,
    f"{_PREFIX}.4.70",
    f"{_PREFIX}.4.90",
    f"{_PREFIX}.4.50",
    f"{_PREFIX}.4.80",
    f"{_PREFIX}.4.91",
    f"{_PREFIX}.5",
    f"{_PREFIX}.4.57",
    f"{_PREFIX}.4.51",
    f"{_PREFIX}.4.81",
    EXPLICIT_VR_BIG_ENDIAN,
    f"{_PREFIX}.4.201",
)
"""Roughly in the order in which archives hold them."""


def chooser(accept: Sequence[str] | None) -> Callable[[Sequence[str]], str | None]:
    """Return how one of the proposed transfer syntaxes is chosen.

    Args:
        accept: all that is accepted, in order; ``None`` is the default order,
            and then a syntax nobody knows, a private one, is taken where it is
            all that is proposed.
    """
    order = DEFAULT_ORDER if accept is None else tuple(accept)

    def choose(proposed: Sequence[str]) -> str | None:
        for syntax in order:
            if syntax in proposed:
                return syntax
        return proposed[0] if accept is None and proposed else None

    return choose


def within_bytes(accept: Sequence[str], most_bytes: int) -> tuple[str, ...]:
    """Return as many of *accept* as their sub-items fit into *most_bytes*, in that order.

    All where there is room, else those that archives hold most; at least one.
    """
    if sum(map(_item_bytes, accept)) <= most_bytes:
        return tuple(accept)
    ranked = [syntax for syntax in _HELD_MOST if syntax in accept]
    ranked.extend(syntax for syntax in accept if syntax not in ranked)
    kept, left = {ranked[0]}, most_bytes - _item_bytes(ranked[0])
    for syntax in ranked[1:]:
        if (left := left - _item_bytes(syntax)) < 0:
            break
        kept.add(syntax)
    return tuple(syntax for syntax in accept if syntax in kept)


def _item_bytes(syntax: str) -> int:
    return 4 + len(syntax)  # a Transfer Syntax Sub-Item (PS3.8 Table 9-15)


def context_groups(accept: Sequence[str], contexts: int) -> list[tuple[str, ...]]:
    """Spread *accept* over at most *contexts* presentation contexts of one SOP Class.

    The more contexts have a single syntax, the more often a sender finds the
    one in which it holds an instance; what does not fit shares the last one.
    """
    if len(accept) <= contexts:
        return [(syntax,) for syntax in accept]
    alone = [(syntax,) for syntax in accept[: contexts - 1]]
    return [*alone, tuple(accept[contexts - 1 :])]
