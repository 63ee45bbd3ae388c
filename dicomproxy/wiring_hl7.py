"""From the configuration to whoever tells that records were merged: listener, inbox, notices.

Rules kept: what waits from the last time is handled before anything new is taken, and
nothing is taken any more once the inbox closes. Certificates are read off the event
loop. Whatever a start that fails has opened, :meth:`Hl7.close` closes.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final

from dicomproxy.config.hl7 import Hl7Section, TlsServerSection
from dicomproxy.hl7.inbox import Inbox, InboxStats
from dicomproxy.hl7.journal import Journal
from dicomproxy.hl7.listener import MllpListener
from dicomproxy.hl7.tls import TlsSettings, server_context
from dicomproxy.identity.notices import IdentityNotices, LiveIdentities

JOURNAL: Final = Path("hl7", "journal")
"""Where messages wait, below the state directory."""


def read_tls(section: TlsServerSection) -> ssl.SSLContext:
    """Return what the listener presents itself with. Blocks.

    Raises:
        OSError: a file cannot be read, holds no certificate or key, or they do not match.
    """
    return server_context(TlsSettings(section.ca_file, section.certificate_file, section.key_file))


class Hl7:
    """Receives notices about patients' IDs; made inside a running event loop.

    Args:
        section: who may send them, and how much.
        state_directory: keeps them until they are handled.
        identities: who is to be told.
    """

    def __init__(
        self, section: Hl7Section, state_directory: Path, identities: LiveIdentities
    ) -> None:
        self.section = section
        self.port = 0
        self._inbox = Inbox(
            Journal(
                state_directory / JOURNAL,
                max_bytes=section.max_journal,
                max_messages=section.max_waiting,
            )
        )
        # Each who is told has a local domain, for IDs that name none.
        IdentityNotices(identities).subscribe_to(self._inbox)
        self._listener: MllpListener | None = None

    async def start(self) -> None:
        """Handle what waits, then listen.

        Raises:
            OSError: journal, certificate or address cannot be used; to be closed.
        """
        section = self.section
        tls = await asyncio.to_thread(read_tls, section.tls) if section.tls is not None else None
        await self._inbox.start()
        self._listener = MllpListener(
            self._inbox.receive,
            tls=tls,
            allow_from=section.allow_from,
            max_connections=section.max_connections,
            max_message_bytes=section.max_message,
            handshake_seconds=section.frame_timeout,
            frame_seconds=section.frame_timeout,
            idle_seconds=section.idle_timeout,
        )
        self.port = await self._listener.start(section.host, section.port)

    async def close(self) -> None:
        """Take nothing more, then stop handling; what is left is handled after the next start."""
        if self._listener is not None:
            await self._listener.close()
        await self._inbox.close()

    @property
    def stats(self) -> InboxStats:
        """What became of messages."""
        return self._inbox.stats

    @property
    def connections(self) -> int:
        """How many senders are connected."""
        return self._listener.connections if self._listener is not None else 0

    @property
    def refused_connections(self) -> int:
        """How many callers were turned away."""
        return self._listener.refused if self._listener is not None else 0
