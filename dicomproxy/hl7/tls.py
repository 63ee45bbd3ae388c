"""TLS for connections of our own: contexts from files, at least version 1.2 (PS3.15 B.12).

Files are read here, in whatever thread calls: not on an event loop's.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How one side presents itself and whom it trusts.

    Args:
        ca_file: PEM certificates of those whose peers are trusted. A client without
            it trusts the system's; a server without it asks its callers for none.
        certificate_file: PEM chain that is shown to the peer; a server needs one.
        key_file: its key, where it is not in the same file.
        check_hostname: whether a server's certificate must name the host called.
    """

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    check_hostname: bool = True


def client_context(settings: TlsSettings) -> ssl.SSLContext:
    """Return what a client connects with; the server's certificate is always verified.

    Raises:
        OSError: a file cannot be read, or holds no certificate or key
            (:class:`ssl.SSLError` is one).
    """
    cafile = str(settings.ca_file) if settings.ca_file else None
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=cafile)
    context.check_hostname = settings.check_hostname
    return _finished(context, settings)


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """Return what a server listens with; with ``ca_file`` callers need a certificate.

    Raises:
        OSError: as for :func:`client_context`.
        ValueError: no certificate is configured.
    """
    if settings.certificate_file is None:
        raise ValueError("a TLS server needs a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if settings.ca_file is not None:
        context.load_verify_locations(cafile=str(settings.ca_file))
        context.verify_mode = ssl.CERT_REQUIRED
    return _finished(context, settings)


def _finished(context: ssl.SSLContext, settings: TlsSettings) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certificate_file is not None:
        key = str(settings.key_file) if settings.key_file else None
        # An encrypted key must fail, not ask a terminal for its password.
        context.load_cert_chain(str(settings.certificate_file), key, password=lambda: b"")
    return context
