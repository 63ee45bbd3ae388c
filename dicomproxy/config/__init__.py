"""Configuration: one YAML file becomes one frozen model, or a list of faults.

Text becomes values here and nowhere else. A fault is found before the first
association is accepted, and names the file, the line, the YAML path, what was
found and what was expected.
"""

from __future__ import annotations

from dicomproxy.config.faults import ConfigError, Fault
from dicomproxy.config.loader import json_schema, load, loads
from dicomproxy.config.model import (
    AuditSection,
    BreakerSection,
    CacheSection,
    CallerEntry,
    LimitsSection,
    LocalSection,
    LogSection,
    ProxySection,
    RetrieveSection,
    Settings,
    SourceEntry,
    StateSection,
    TimersSection,
    WebSection,
    WorkstationEntry,
)

__all__ = [
    "AuditSection",
    "BreakerSection",
    "CacheSection",
    "CallerEntry",
    "ConfigError",
    "Fault",
    "LimitsSection",
    "LocalSection",
    "LogSection",
    "ProxySection",
    "RetrieveSection",
    "Settings",
    "SourceEntry",
    "StateSection",
    "TimersSection",
    "WebSection",
    "WorkstationEntry",
    "json_schema",
    "load",
    "loads",
]
