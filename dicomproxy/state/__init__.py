"""What the proxy remembers between restarts: SQLite files, each with a thread of its own."""

from __future__ import annotations

from dicomproxy.state.accessions import AccessionMap
from dicomproxy.state.store import StateStore

__all__ = ["AccessionMap", "StateStore"]
