"""Which studies are held and which are in use, in memory.

The table knows every study by a few numbers; the instances of a study are
loaded from its journal while somebody has it leased, so that memory follows
what is in use and not what is cached.

The event loop and the writer thread both look here. Rules kept: lease counts
and membership change under the table's lock, which is never held over I/O;
everything else of a study is changed by the writer thread only, except
:attr:`Contents.live`, the loop's own copy, which replies keep in step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from dicomproxy.cache.eviction import StudyUse
from dicomproxy.cache.index import StudyRecord
from dicomproxy.cache.journal import Journal
from dicomproxy.cache.settings import CachedStudy
from dicomproxy.ports import CachedInstance


@dataclass(slots=True)
class Contents:
    """The instances of a study in use, and the directory of their files.

    ``spool`` has the bytes of those that found no room on disk; ``unchecked``
    names those whose CRC was not checked since an unclean start.
    """

    directory: str
    held: dict[str, CachedInstance] = field(default_factory=dict)
    live: dict[str, CachedInstance] = field(default_factory=dict)
    spool: dict[str, bytearray] = field(default_factory=dict)
    unchecked: set[str] = field(default_factory=set)
    journal: Journal | None = None

    def path(self, instance: CachedInstance) -> str:
        """Where the file of *instance* is; text, as a path object costs more than the lookup."""
        return f"{self.directory}/{instance.file_name}"


@dataclass(slots=True, eq=False)
class Study:
    """One study. ``size_bytes`` and ``instances`` count what is on disk."""

    study_instance_uid: str
    size_bytes: int = 0
    instances: int = 0
    last_used: float = field(default_factory=time.time)
    pinned: bool = False
    complete: bool = False
    epoch: int = 0
    leases: int = 0
    contents: Contents | None = None
    unsynced: list[str] = field(default_factory=list)
    row_is_open: bool = False
    row_is_stale: bool = False

    @classmethod
    def from_record(cls, study_instance_uid: str, record: StudyRecord) -> Study:
        return cls(
            study_instance_uid,
            size_bytes=record.size_bytes,
            instances=record.instances,
            last_used=float(record.last_used),
            pinned=record.pinned,
            complete=record.complete,
            epoch=record.epoch,
        )

    def record(self, *, open: bool = False) -> StudyRecord:
        return StudyRecord(
            size_bytes=self.size_bytes,
            instances=self.instances,
            last_used=self.last_used,
            pinned=self.pinned,
            complete=self.complete and not open,
            open=open,
            epoch=self.epoch,
        )

    @property
    def in_use(self) -> bool:
        return self.leases > 0 or self.contents is not None

    def touch(self) -> None:
        self.last_used = time.time()
        self.row_is_stale = True


class StudyTable:
    """Every study by UID, and what they take together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.used_bytes = 0
        # Counts what may have made a study evictable, so that a search that
        # found none is not repeated for every block that arrives.
        self.changes = 0
        self._studies: dict[str, Study] = {}

    def __len__(self) -> int:
        return len(self._studies)

    def get(self, study_instance_uid: str) -> Study | None:
        return self._studies.get(study_instance_uid)

    def insert(self, study: Study) -> None:
        with self.lock:
            self._studies[study.study_instance_uid] = study
            self.used_bytes += study.size_bytes

    def lease(self, study_instance_uid: str) -> Study:
        """Return the study, made if need be, with one lease more."""
        with self.lock:
            study = self._studies.get(study_instance_uid)
            if study is None:
                study = self._studies[study_instance_uid] = Study(study_instance_uid)
            study.leases += 1
            return study

    def release(self, study: Study) -> bool:
        """Take one lease off; True if it was the last."""
        with self.lock:
            study.leases -= 1
            return study.leases == 0

    def resize(self, study: Study, size_bytes: int, instances: int) -> None:
        """Let a study be of that size from now on."""
        with self.lock:
            self.used_bytes += size_bytes - study.size_bytes
            study.size_bytes = size_bytes
            study.instances = instances

    def take(self, study: Study) -> bool:
        """Remove *study* if nobody uses it; the next lease makes a new one."""
        with self.lock:
            known = self._studies.get(study.study_instance_uid) is study
            if not known or study.in_use or study.pinned:
                return False
            del self._studies[study.study_instance_uid]
            self.used_bytes -= study.size_bytes
            return True

    def put_back(self, study: Study) -> None:
        """Undo :meth:`take`, unless somebody has leased the study since, who will load it."""
        with self.lock:
            if self._studies.setdefault(study.study_instance_uid, study) is study:
                self.used_bytes += study.size_bytes

    def unload(self, study: Study) -> Contents | None:
        """Take the contents out of a study that nobody uses any more."""
        with self.lock:
            if study.leases:
                return None
            contents, study.contents = study.contents, None
            self.changes += 1
            return contents

    def snapshot(self) -> list[Study]:
        with self.lock:
            return list(self._studies.values())

    def uses(self) -> Iterator[StudyUse]:
        """What eviction chooses from."""
        for study in self.snapshot():
            yield StudyUse(
                study.study_instance_uid,
                study.size_bytes,
                study.last_used,
                in_use=study.in_use,
                pinned=study.pinned,
            )

    def listing(self) -> list[CachedStudy]:
        """Every study that holds something or is pinned, the last used first."""
        shown = [
            CachedStudy(
                study_instance_uid=study.study_instance_uid,
                size_bytes=study.size_bytes,
                instances=study.instances,
                complete=study.complete,
                pinned=study.pinned,
                in_use=study.in_use,
                last_used=study.last_used,
            )
            for study in self.snapshot()
            if study.instances or study.pinned
        ]
        return sorted(shown, key=lambda study: study.last_used, reverse=True)
