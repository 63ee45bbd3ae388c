"""An archive of pynetdicom's as a process: ``python -m soak.threaded SETTINGS`` (JSON).

Settings as for :mod:`soak.archive`; it holds its few studies in memory.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicomproxy import logs
from soak.content import CT, Plan
from tests.peers.archive import Archive


def held(plan: Plan, holder: str) -> list[Dataset]:
    """Return the instances of *holder*, each as a file has it."""
    made = []
    for uid in plan.instances(plan.held_by(holder)):
        instance = plan.complete_dataset(uid)
        instance.file_meta = FileMetaDataset()
        instance.file_meta.MediaStorageSOPClassUID = UID(CT)
        instance.file_meta.MediaStorageSOPInstanceUID = UID(uid)
        instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.append(instance)
    return made


def main(settings: dict[str, Any]) -> None:
    """Answer for as long as the process lives."""
    logs.configure("error", stream=sys.stderr, hooks=False)
    plan = Plan(settings["seed"], settings["sources"])
    archive = Archive(
        settings["ae_title"],
        held(plan, settings["holder"]),
        [(title, "127.0.0.1", port) for title, port in settings["destinations"].items()],
    )
    archive.port = settings["port"]
    archive.start()
    signal.pause()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
