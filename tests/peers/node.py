"""Where a peer is found."""

from __future__ import annotations

from typing import NamedTuple


class Node(NamedTuple):
    """AE title, host and port of an application entity; also a plain tuple of the three."""

    ae_title: str
    host: str
    port: int
