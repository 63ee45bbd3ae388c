"""``dicomproxy check``: say everything that is wrong with a configuration, or what it comes to.

Reads the file and nothing else: no name is resolved, no peer is called, no
directory is made. ``doctor`` does that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from dicomproxy.config import ConfigError, Settings, load
from dicomproxy.config.hl7 import Hl7Section


def run(path: Path) -> int:
    """Check the file at *path*: faults to stderr, one a line, and 2; a summary and 0."""
    try:
        settings = load(path)
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
        return 2
    print(f"{path}: fine")
    for name, value in _summary(settings):
        print(f"  {name:<13} {value}")
    return 0


def _summary(settings: Settings) -> Iterator[tuple[str, str]]:
    proxy, local, cache = settings.proxy, settings.local, settings.cache
    also = f", also called {', '.join(proxy.aliases)}" if proxy.aliases else ""
    yield "proxy", f"{proxy.ae_title} on {_address(proxy.host, proxy.port)}{also}"
    yield "local", f"{local.ae_title} at {_address(local.host, local.port)}, {local.deliver}"
    yield "workstations", ", ".join(entry.ae_title for entry in settings.workstations) or "none"
    if settings.callers:
        yield "callers", ", ".join(entry.ae_title for entry in settings.callers)
    sources = (
        f"{entry.name} ({entry.ae_title} at {_address(entry.host, entry.port)}, {entry.retrieve})"
        for entry in settings.sources
    )
    yield "sources", ", ".join(sources) or "none"
    if settings.local.patient_id_issuer.is_named:
        yield "patient IDs", ", ".join(_domains(settings))
    if settings.cross_references:
        yield (
            "references",
            ", ".join(f"{entry.name} ({entry.type})" for entry in settings.cross_references),
        )
    if settings.hl7 is not None:
        hl7 = settings.hl7
        tls = ", TLS" if hl7.tls is not None else ""
        yield "hl7", f"on {_address(hl7.host, hl7.port)}{tls}, from {_callers(hl7)}"
    yield "cache", f"{_size(cache.max_size)} in {cache.directory}"
    yield "audit", str(settings.audit_file)
    yield "web", _address(settings.web.host, settings.web.port)


def _callers(section: Hl7Section) -> str:
    shown = (
        str(one.network_address if one.prefixlen == one.max_prefixlen else one)
        for one in section.allow_from
    )
    return ", ".join(shown)


def _domains(settings: Settings) -> Iterator[str]:
    """Yield whose IDs are valid where."""
    named = [("local", settings.local.patient_id_issuer)]
    named += [(entry.name, entry.patient_id_issuer) for entry in settings.sources]
    for name, issuer in named:
        if issuer.is_named:
            yield f"{name} {issuer.namespace or issuer.universal_id}"


def _address(host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port or 'a free port'}"


def _size(amount: int) -> str:
    for power, unit in enumerate(("B", "kB", "MB", "GB")):
        if amount < 1000 ** (power + 1):
            return f"{amount / 1000**power:.4g} {unit}"
    return f"{amount / 1000**4:.4g} TB"
