"""The durable record of disclosures: one JSON line per event, chained by hashes."""

from __future__ import annotations

from dicomproxy.audit.chain import Fault, verify
from dicomproxy.audit.file import FileAudit

__all__ = ["Fault", "FileAudit", "verify"]
