"""The index as the store uses it: a convenience that may fail, and is then rebuilt.

Rows only spare the reading of journals at an orderly start. A row that cannot
be written is therefore logged and forgotten; a database that proves damaged is
set aside and written anew. Used by the writer thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dicomproxy.cache.index import (
    IndexDamaged,
    IndexUnusable,
    StudyIndex,
    StudyRecord,
    set_aside,
)
from dicomproxy.logs import get_logger

_log = get_logger()

Everything = Callable[[], Iterable[tuple[str, StudyRecord]]]


class Rows:
    """Reads and writes rows, without ever raising.

    Args:
        directory: where the database lies.
        everything: gives all rows as they should be, for a database begun anew.
    """

    def __init__(self, directory: Path, everything: Everything) -> None:
        self._directory = directory
        self._everything = everything
        self._index: StudyIndex | None = None
        self._unusable = False
        self._epoch_is_saved = True
        self.epoch = 0
        # Set whenever a row is missing or wrong: the next start must not trust them.
        self.incomplete = False

    def load(self, *, clean: bool) -> tuple[dict[str, StudyRecord], bool]:
        """Open the database; return its rows and whether they can be believed.

        The epoch names the last start at which they could not.
        """
        rows: dict[str, StudyRecord] = {}
        try:
            self._index = StudyIndex(self._directory)
            rows, self.epoch = self._index.rows(), self._index.epoch
        except IndexDamaged:
            self._begin_anew()
            clean = False
        except IndexUnusable as error:
            self._cannot(error)
            clean = False
        if not clean:
            # By the clock, so that a database that was lost and came back has no
            # rows of this epoch.
            self.epoch = max(self.epoch + 1, int(time.time()))
            self._epoch_is_saved = False
        return rows, clean

    def put(self, study_instance_uid: str, record: StudyRecord) -> None:
        self._attempt(lambda index: index.put(study_instance_uid, record))

    def delete(self, study_instance_uid: str) -> None:
        self._attempt(lambda index: index.delete(study_instance_uid))

    def close(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            try:
                index.close()
            except (IndexDamaged, IndexUnusable) as error:
                self._cannot(error)

    def _attempt(self, write: Callable[[StudyIndex], None]) -> None:
        try:
            index = self._opened()
            if not self._epoch_is_saved:
                # First of all: a row of this epoch says that its study was checked.
                index.set_epoch(self.epoch)
                self._epoch_is_saved = True
            write(index)
        except IndexUnusable as error:
            self._cannot(error)
        except IndexDamaged:
            self._begin_anew()
            self._rewrite()
        else:
            self._unusable = False

    def _opened(self) -> StudyIndex:
        if self._index is None:
            self._index = StudyIndex(self._directory)
        return self._index

    def _begin_anew(self) -> None:
        """Set the database aside; the next write begins another."""
        if self._index is not None:
            try:
                self._index.close()
            except (IndexDamaged, IndexUnusable):
                _log.debug("cache_index_not_closed")
        self._index = None
        self._epoch_is_saved = False
        try:
            aside = set_aside(self._directory)
        except OSError as error:
            self._cannot(error)
            return
        _log.warning("cache_degraded", reason="index_damaged", file=aside)

    def _rewrite(self) -> None:
        try:
            index = self._opened()
            index.set_epoch(self.epoch)
            self._epoch_is_saved = True
            for study_instance_uid, record in self._everything():
                index.put(study_instance_uid, record)
        except (IndexDamaged, IndexUnusable) as error:
            self._cannot(error)

    def _cannot(self, error: Exception) -> None:
        self.incomplete = True
        if not self._unusable:
            self._unusable = True
            _log.warning("cache_degraded", reason="index_unusable", error_type=str(error))
