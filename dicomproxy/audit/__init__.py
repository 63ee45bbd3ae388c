"""Edge: the durable record of what was disclosed to whom."""

from __future__ import annotations

from dicomproxy.audit.trail import FileAudit

__all__ = ["FileAudit"]
