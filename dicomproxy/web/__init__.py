"""Health, metrics and a status page over HTTP, read-only and without patient values."""

from __future__ import annotations

from dicomproxy.web.server import WebServer
from dicomproxy.web.status import (
    CacheStatus,
    FailureStatus,
    Hl7Status,
    OperationStatus,
    SourceStatus,
    StatusSnapshot,
)

__all__ = [
    "CacheStatus",
    "FailureStatus",
    "Hl7Status",
    "OperationStatus",
    "SourceStatus",
    "StatusSnapshot",
    "WebServer",
]
