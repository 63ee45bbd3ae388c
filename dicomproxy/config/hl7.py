"""The section about HL7 messages that others send: who may, how much, and under what."""

from __future__ import annotations

from typing import Annotated

from dicomproxy.config.section import MAPPING, Section, key
from dicomproxy.config.values import (
    BindHost,
    BindPort,
    Duration,
    FilePath,
    Networks,
    size,
    whole,
)


class TlsServerSection(Section):
    """TLS towards callers; version 1.2 at least. With the section, nothing else is spoken."""

    certificate_file: FilePath = key("Our certificate, and those up to its authority's, PEM")
    key_file: FilePath | None = key("Its key, where it is not in the same file", None)
    ca_file: FilePath | None = key(
        "Certificates of those whose callers are let in, PEM (default: callers need none)", None
    )


class Hl7Section(Section):
    """The listener for HL7 v2 over MLLP: ADT^A40 and ADT^A31 about patients' IDs."""

    host: BindHost = key("Address to listen on", "0.0.0.0")
    port: BindPort = key("Port to listen on", "2575")
    allow_from: Networks = key("Addresses and networks that may call")
    tls: Annotated[TlsServerSection | None, MAPPING] = key("TLS (default: none)", None)
    max_connections: Annotated[int, whole(1, 1000)] = key(
        "Connections at a time; more are closed at once", "20"
    )
    max_message: Annotated[int, size("1KiB", "16MiB")] = key("Longest message accepted", "1MiB")
    frame_timeout: Duration = key("For a message that has begun, or a TLS handshake", "30s")
    idle_timeout: Duration = key("After which a silent connection is closed", "1h")
    max_waiting: Annotated[int, whole(1, 100_000)] = key(
        "Messages acknowledged and not handled yet, beyond which senders are told to come again",
        "10000",
    )
    max_journal: Annotated[int, size("32MiB", "16GiB")] = key(
        "Size of the file that they wait in", "64MiB"
    )
