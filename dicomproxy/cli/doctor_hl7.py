"""What ``dicomproxy doctor`` tries of the HL7 listener: the files that its TLS needs.

Whether its senders reach it cannot be seen from here: they call, nobody calls them.
"""

from __future__ import annotations

import asyncio
import ssl

from dicomproxy.cli.doctor_identity import Step, StepFailed
from dicomproxy.config import Settings
from dicomproxy.config.hl7 import TlsServerSection
from dicomproxy.wiring_hl7 import read_tls


async def try_listener(settings: Settings, step: Step) -> None:
    """Try it, if there is one and it speaks TLS."""
    section = settings.hl7
    if section is None or section.tls is None:
        return
    tls: TlsServerSection = section.tls

    async def files() -> str:
        try:
            await asyncio.to_thread(read_tls, tls)
        except ssl.SSLError as error:
            # OpenSSL's word for it, such as KEY_VALUES_MISMATCH; most have one.
            reason = (error.reason or "no certificate or key").replace("_", " ").lower()
            raise StepFailed(reason) from None
        except OSError as error:
            raise StepFailed(error.strerror or type(error).__name__) from None
        return "certificate and key fit"

    print(f"\nhl7: listens on {section.host}:{section.port}")
    await step("files", files)
