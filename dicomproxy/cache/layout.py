"""Directories and names of the cache.

Names on disk are digests of UIDs, never the UIDs: what a peer sends names no
file. Directories are 0700 and files 0600, since instances are patient data.
Every directory lies on one file system, so that a rename is atomic.

::

    lock        held while a process owns the cache
    clean       present after an orderly shutdown only
    incoming/   instances being received, *.part
    studies/    one directory per study: instance files and a journal
    trash/      evicted studies waiting to be unlinked
    index/      the database of studies
    requests/   what the command line asks of the running process
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import Final

JOURNAL_NAME: Final = "journal"
_DIGEST_BYTES: Final = 16


class CacheLocked(Exception):
    """Another process owns the cache directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        super().__init__(f"the cache directory {directory} is in use by another process")


def study_name(study_instance_uid: str) -> str:
    """Return the directory name of a study."""
    return _digest(study_instance_uid)


def instance_name(sop_instance_uid: str) -> str:
    """Return the file name of an instance within its study."""
    return _digest(sop_instance_uid) + ".dcm"


def _digest(uid: str) -> str:
    data = uid.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


class Layout:
    """The paths below one cache directory, *root*."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = root / "lock"
        self.clean = root / "clean"
        self.incoming = root / "incoming"
        self.studies = root / "studies"
        self.trash = root / "trash"
        self.index = root / "index"
        self.requests = root / "requests"

    def study(self, study_instance_uid: str) -> Path:
        return self.studies / study_name(study_instance_uid)

    def create(self) -> None:
        """Make what is missing.

        Raises:
            OSError: it cannot be made.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.incoming, self.studies, self.trash, self.index, self.requests):
            path.mkdir(mode=0o700, exist_ok=True)

    def sweep(self) -> None:
        """Delete what an earlier process left half received or half deleted."""
        for path in (self.incoming, self.trash, self.requests):
            for entry in os.scandir(path):
                delete(Path(entry.path))


def delete(path: Path) -> None:
    """Delete a file or a directory with everything in it; what is gone already is no error.

    Raises:
        OSError: something could not be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return


class DirectoryLock:
    """Ownership of a cache directory, released by the kernel if the process dies."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CacheLocked: another process, or another store of this one, has it.
            OSError: the lock file cannot be opened.
        """
        fd = os.open(self._layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise CacheLocked(self._layout.root) from None
            raise
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
