"""What the proxy remembers between restarts: one SQLite file, one thread."""

from __future__ import annotations

from dicomproxy.state.store import StateStore

__all__ = ["StateStore"]
