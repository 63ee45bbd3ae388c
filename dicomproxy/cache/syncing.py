"""Bringing a study's files to the disk, in a thread of its own.

Nobody waits for it while instances arrive: after a power failure, what had not
reached the disk does not match its CRC-32 and is not served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def sync_study(
    directory: Path, file_names: Iterable[str], sync_journal: Callable[[], None]
) -> None:
    """Sync files, then the journal that names them, then the names themselves.

    What was evicted meanwhile is passed over.

    Raises:
        OSError: something did not reach the disk.
    """
    try:
        for name in file_names:
            sync_path(directory / name)
    finally:
        sync_journal()  # owns a descriptor, so it runs in any case
    sync_path(directory)
    sync_path(directory.parent)


def sync_path(path: Path) -> None:
    """Sync a file or directory; one that is gone is no error.

    Raises:
        OSError: it did not reach the disk.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
