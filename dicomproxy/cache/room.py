"""Room for instances: counting it, making it, and saying when there is none.

Used by the writer thread only. Rules kept: the maximum size is never passed;
only whole studies go, never one that is in use or pinned; a directory is
renamed to the trash before anything in it is deleted.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import Counter, Gauge

from dicomproxy.cache import eviction
from dicomproxy.cache.layout import Layout, delete
from dicomproxy.cache.rows import Rows
from dicomproxy.cache.settings import CacheSettings
from dicomproxy.cache.studies import StudyTable
from dicomproxy.logs import get_logger

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_FREE_SHARE: Final = 0.02
_LONGEST_CREDIT_BYTES: Final = 64 * 1024 * 1024

_EVICTIONS = Counter("dicomproxy_cache_evictions_total", "Studies evicted from the cache.")
_EVICTED_BYTES = Counter("dicomproxy_cache_evicted_bytes_total", "Bytes freed by eviction.")
_BYTES = Gauge("dicomproxy_cache_bytes", "Bytes of the instance files in the cache.")
_SPOOLED_BYTES = Gauge(
    "dicomproxy_cache_spooled_bytes", "Bytes of instances held in memory for want of disk space."
)
_STUDIES = Gauge("dicomproxy_cache_studies", "Studies in the cache.")
_DEGRADED = Gauge(
    "dicomproxy_cache_degraded", "1 while instances are kept in memory or refused, else 0."
)

_log = get_logger()


class Room:
    """What the cache takes of the disk, and what it may take."""

    def __init__(
        self, settings: CacheSettings, layout: Layout, table: StudyTable, rows: Rows
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._table = table
        self._rows = rows
        self.incoming_bytes = 0
        self.spooled_bytes = 0
        self.evictions = 0
        self.evicted_bytes = 0
        # True once something was not recorded as it is: the next start then
        # believes the files and not the records.
        self.in_doubt = False
        self._state = "ok"
        self._credit = 0
        self._nothing_to_evict_at = -1
        self._names = 0

    def degraded(self, state: str, reason: str, size_bytes: int = 0) -> None:
        """Say that instances go to memory, or are refused; once per change."""
        if state != self._state:
            self._state = state
            _DEGRADED.set(1)
            _log.warning(
                "cache_degraded",
                state=state,
                reason=reason,
                size_bytes=size_bytes,
                used_bytes=self.used_bytes,
            )

    def working(self) -> None:
        """Say that the disk takes instances again."""
        if self._state != "ok":
            self._state = "ok"
            _DEGRADED.set(0)
            _log.info("cache_recovered", used_bytes=self.used_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of instance files, those being received included."""
        return self._table.used_bytes + self.incoming_bytes

    def show_measures(self) -> None:
        _BYTES.set(self.used_bytes)
        _SPOOLED_BYTES.set(self.spooled_bytes)
        _STUDIES.set(len(self._table))

    def new_name(self) -> str:
        """A name for a file that is on its way, in or out."""
        self._names += 1
        return f"{os.getpid():x}-{time.time_ns():x}-{self._names:x}"

    def make_room(self, size_bytes: int) -> bool:
        """See to it that *size_bytes* may be written; False if they may not.

        Above the high watermark, or with too little left on the file system,
        studies are evicted; the maximum size is never passed.
        """
        settings = self._settings
        missing = self._missing_free(size_bytes)
        needed = eviction.bytes_to_free(
            self.used_bytes,
            size_bytes,
            high_bytes=settings.high_bytes,
            low_bytes=settings.low_bytes,
            missing_free_bytes=missing,
        )
        if needed and self._evict(needed):
            self._credit = 0
            missing = self._missing_free(size_bytes)
        return missing == 0 and self.used_bytes + size_bytes <= settings.max_size_bytes

    def evict_after_refusal(self, size_bytes: int) -> bool:
        """The file system is full: evict at least that much; False if nothing may go."""
        self._credit = 0
        return self._evict(max(size_bytes, self.used_bytes - self._settings.low_bytes))

    def wrote(self, size_bytes: int) -> None:
        self.incoming_bytes += size_bytes
        self._credit -= size_bytes

    def _missing_free(self, size_bytes: int) -> int:
        """How much the file system lacks; asked now and then, not for every block."""
        if size_bytes <= self._credit:
            return 0
        found = os.statvfs(self._layout.root)
        keep = self._settings.min_free_bytes
        if keep is None:
            keep = int(found.f_blocks * found.f_frsize * _FREE_SHARE)
        spare = found.f_bavail * found.f_frsize - keep
        self._credit = min(max(spare, 0), _LONGEST_CREDIT_BYTES)
        return max(0, size_bytes - spare)

    def _evict(self, free_bytes: int) -> bool:
        """Evict the least recently used studies; True if any went."""
        if self._nothing_to_evict_at == self._table.changes:
            return False
        changes = self._table.changes
        chosen = eviction.least_recently_used(self._table.uses(), free_bytes)
        went = [uid for uid in chosen if self.evict(uid, "room") == "evicted"]
        if not went:
            self._nothing_to_evict_at = changes
        return bool(went)

    def evict(self, study_instance_uid: str, reason: str) -> str:
        """Evict one study: ``evicted``, or why not.

        ``not_held``, ``in_use``, ``pinned``, or ``failed``: the disk left it where it was.
        """
        study = self._table.get(study_instance_uid)
        if study is None or not (study.instances or study.pinned):
            return "not_held"
        if study.pinned:
            return "pinned"
        if not self._table.take(study):
            return "in_use"
        try:
            self._trash(self._layout.study(study_instance_uid))
        except OSError as error:
            self._table.put_back(study)
            self.not_recorded("not_evicted", error)
            return "failed"
        self._rows.delete(study_instance_uid)
        self.evictions += 1
        self.evicted_bytes += study.size_bytes
        _EVICTIONS.inc()
        _EVICTED_BYTES.inc(study.size_bytes)
        _log.info(
            "study_evicted",
            study_instance_uid=study_instance_uid,
            reason=reason,
            instances=study.instances,
            size_bytes=study.size_bytes,
        )
        return "evicted"

    def evict_unused(self) -> None:
        """Evict what was not used for the maximum age."""
        if self._settings.max_age_seconds is not None:
            moment = time.time() - self._settings.max_age_seconds
            for study_instance_uid in eviction.unused_since(self._table.uses(), moment):
                self.evict(study_instance_uid, "age")

    def trash(self, directory: Path) -> bool:
        """Take a study's directory away at once, and its files after that; False if none."""
        try:
            return self._trash(directory)
        except OSError as error:
            self.not_recorded("not_deleted", error)
            return True

    def _trash(self, directory: Path) -> bool:
        """As :meth:`trash`.

        Raises:
            OSError: it is where it was, with everything in it.
        """
        target = self._layout.trash / self.new_name()
        try:
            directory.rename(target)
        except FileNotFoundError:
            return False
        try:
            delete(target)
        except OSError as error:
            self.not_recorded("not_deleted", error)
        return True

    def with_room(self, action: Callable[[], object]) -> None:
        """Do *action*, again after evicting for as long as the disk is full.

        Raises:
            OSError: it fails with nothing left to evict, or for another reason.
        """
        while True:
            try:
                action()
                return
            except OSError as error:
                if error.errno not in NO_SPACE or not self.evict_after_refusal(1):
                    raise

    def reserve_memory(self, size_bytes: int) -> bool:
        """Count *size_bytes* as held in memory, unless that would be too many."""
        if self.spooled_bytes + size_bytes > self._settings.memory_spool_bytes:
            return False
        self.spooled_bytes += size_bytes
        return True

    def free_memory(self, size_bytes: int) -> None:
        self.spooled_bytes -= size_bytes

    def not_recorded(self, reason: str, error: OSError) -> None:
        """Something on disk is not as the records say; logged, and remembered."""
        self.in_doubt = True
        _log.warning(
            "cache_degraded", reason=reason, errno=errno.errorcode.get(error.errno or 0, "")
        )
