"""The usual Python application entity: ``python -m bench.pynetdicom_peer SETTINGS``.

A Storage SCP that writes what it receives to files as it came, without decoding
it, and a Storage SCU that sends files read beforehand: neither does more than
moving instances asks for.

Settings: ``port``, ``directory`` for what is received.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, StoragePresentationContexts, evt

from bench.control import obey
from dicomproxy.demo.peers import Entity


def receive(port: int, directory: Path) -> Any:
    """Receive on *port*, each instance into a file."""

    def handle(event: Any) -> int:
        path = directory / f"{event.request.AffectedSOPInstanceUID}.dcm"
        path.write_bytes(event.encoded_dataset())
        return 0x0000

    entity = AE(ae_title="PYNETDICOM")
    entity.maximum_pdu_size = 0
    for context in StoragePresentationContexts:
        entity.add_supported_context(str(context.abstract_syntax), ExplicitVRLittleEndian)
    return entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, handle)]
    )


def send(port: int, files: str) -> float:
    """Send the files of a directory on one association; seconds, reading excluded.

    Raises:
        RuntimeError: the association or an instance was refused.
    """
    datasets = [dcmread(path) for path in sorted(Path(files).iterdir())]
    # With a plain AE two threads now and then read one association, and the sender
    # waits in vain for a response that the other took.
    entity = Entity(ae_title="PYNETDICOM")
    entity.add_requested_context(datasets[0].SOPClassUID, ExplicitVRLittleEndian)
    began = time.monotonic()
    association = entity.associate("127.0.0.1", port, ae_title="READING", max_pdu=0)
    if not association.is_established:
        raise RuntimeError("no association")
    for dataset in datasets:
        status = association.send_c_store(dataset)
        if not status or status.Status != 0x0000:
            association.abort()
            raise RuntimeError("an instance was not taken")
    took = time.monotonic() - began
    association.release()
    return took


async def main(settings: dict[str, Any]) -> None:
    """Receive, and send what the driver says."""
    logging.disable(logging.CRITICAL)
    directory = Path(settings["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    server = receive(settings["port"], directory)

    async def sending(port: int, files: str) -> float:
        return await asyncio.to_thread(send, port, files)

    async def clear() -> None:
        for path in directory.iterdir():
            path.unlink()

    try:
        await obey({"send": sending, "clear": clear})
    finally:
        server.shutdown()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
