"""Certificates for loopback: an authority, who it certifies, and a stranger."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trustme

from dicomproxy.hl7.tls import TlsSettings, client_context, server_context


@dataclass(frozen=True)
class Authority:
    """Issues certificates, and writes them where :class:`TlsSettings` looks for them."""

    issuer: trustme.CA

    def ca_file(self, directory: Path) -> Path:
        path = directory / "ca.pem"
        self.issuer.cert_pem.write_to_path(str(path))
        return path

    def certificate_file(self, directory: Path, name: str = "127.0.0.1") -> Path:
        path = directory / f"{name}.pem"
        self.issuer.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(path))
        return path


@cache
def authority() -> Authority:
    """Return the one that everybody trusts."""
    return Authority(trustme.CA())


@cache
def stranger() -> Authority:
    """Return one that nobody trusts."""
    return Authority(trustme.CA())


def serving(
    directory: Path, *, by: Authority | None = None, name: str = "127.0.0.1"
) -> ssl.SSLContext:
    """Return a server's context, certified for *name*; it asks for no client certificate."""
    who = by or authority()
    return server_context(TlsSettings(certificate_file=who.certificate_file(directory, name)))


def calling(directory: Path, *, trusts: Authority | None = None) -> ssl.SSLContext:
    """Return a client's context without a certificate of its own."""
    return client_context(TlsSettings(ca_file=(trusts or authority()).ca_file(directory)))
