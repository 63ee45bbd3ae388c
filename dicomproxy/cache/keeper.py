"""What becomes of studies on disk: loaded, added to, settled, evicted.

Everything here runs in the writer thread. Rules kept: an instance is renamed
into place before its journal line is written; whatever changes the set of a
study's instances first voids the statement that it is whole; what could not be
recorded leaves the cache marked as not cleanly closed, so that the next start
believes the files and not the records.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from dicomproxy.cache.index import StudyRecord
from dicomproxy.cache.journal import (
    Journal,
    JournalContent,
    add_line,
    complete_line,
    pin_line,
    read_journal,
    remove_line,
)
from dicomproxy.cache.layout import Layout, delete
from dicomproxy.cache.room import Room
from dicomproxy.cache.rows import Rows
from dicomproxy.cache.settings import CacheSettings
from dicomproxy.cache.studies import Contents, Study, StudyTable
from dicomproxy.cache.syncing import sync_study
from dicomproxy.logs import get_logger
from dicomproxy.ports import CachedInstance

_LOST_CAUSES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_log = get_logger()


class Arriving(Protocol):
    """An instance that is being received."""

    def end(self) -> None: ...


class Keeper:
    """Owns the directories, the rows and the room that studies take."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.layout = Layout(settings.directory)
        self.table = StudyTable()
        self.rows = Rows(self.layout.index, self._all_records)
        self.room = Room(settings, self.layout, self.table, self.rows)
        self.arriving: set[Arriving] = set()
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="cache-sync")

    # ---------------------------------------------------------------- studies

    def load(self, study: Study) -> None:
        """Read what *study* holds, unless that was done; none is an empty study.

        Raises:
            OSError: the process lacks the means to.
        """
        if study.contents is not None:
            return
        directory = self.layout.study(study.study_instance_uid)
        content = self._journal_content(study.study_instance_uid, directory)
        held = content.instances
        contents = Contents(str(directory), held=held, live=dict(held))
        if study.epoch != self.rows.epoch:
            if held:
                contents.unchecked = set(held)
            else:
                study.epoch = self.rows.epoch
        known_before = study.instances > 0
        study.complete = content.complete and (study.complete or not known_before)
        study.pinned = study.pinned or content.pinned
        self.table.resize(study, content.size_bytes, len(held))
        study.contents = contents

    def _journal_content(self, study_instance_uid: str, directory: Path) -> JournalContent:
        try:
            content = read_journal(directory)
        except FileNotFoundError:
            if not directory.exists():
                return JournalContent(study_instance_uid)
            content = JournalContent()
        except OSError as error:
            if error.errno in _LOST_CAUSES:
                raise
            content = JournalContent()
        if content.study_instance_uid != study_instance_uid:
            _log.warning(
                "cache_degraded", reason="journal_damaged", study_instance_uid=study_instance_uid
            )
            self.room.trash(directory)
            return JournalContent(study_instance_uid)
        return content

    def settle(self, study: Study) -> None:
        """Put away a study whose last lease was released."""
        contents = self.table.unload(study)
        if not study.instances and self.table.take(study):
            if self.room.trash(self.layout.study(study.study_instance_uid)):
                self.rows.delete(study.study_instance_uid)
            study.row_is_stale = study.row_is_open = False
        if contents is not None:
            self._put_away(study, contents)

    def _put_away(self, study: Study, contents: Contents) -> None:
        if contents.spool:
            study.complete = False
            self._free_spool(contents)
        self.sync(study, contents)
        if contents.journal is not None:
            contents.journal.close()
        if study.row_is_stale or study.row_is_open:
            self.save_row(study)

    def save_row(self, study: Study) -> None:
        self.rows.put(study.study_instance_uid, study.record())
        study.row_is_stale = study.row_is_open = False

    def sync(self, study: Study, contents: Contents) -> None:
        """Have what arrived since the last time on disk, in the background."""
        if not study.unsynced:
            return
        directory = self.layout.study(study.study_instance_uid)
        try:
            sync_journal = self.journal(study, contents).sync_later()
        except OSError as error:
            self.room.not_recorded("not_synced", error)
            return
        names, study.unsynced = study.unsynced, []
        self._syncing.submit(partial(self._sync, directory, names, sync_journal))

    def _sync(self, directory: Path, names: list[str], sync_journal: Callable[[], None]) -> None:
        try:
            sync_study(directory, names, sync_journal)
        except OSError as error:
            self.room.not_recorded("not_synced", error)

    def remove(self, study: Study, sop_instance_uids: Sequence[str]) -> list[str]:
        """Drop instances; return those that were held."""
        contents = study.contents
        if contents is None:
            return []
        gone = [uid for uid in sop_instance_uids if uid in contents.held]
        if gone:
            self._void_complete(study, contents)
        for uid in gone:
            instance = contents.held.pop(uid)
            contents.unchecked.discard(uid)
            if (data := contents.spool.pop(uid, None)) is not None:
                self.room.free_memory(len(data))
                continue
            size = instance.data_set_offset + instance.size
            self.table.resize(study, study.size_bytes - size, study.instances - 1)
            try:
                # The file first: on a full disk, that makes the room for the line.
                delete(Path(contents.path(instance)))
                self.journal(study, contents).append(remove_line(uid))
            except OSError as error:
                self.room.not_recorded("removal_not_recorded", error)
        if gone:
            study.row_is_stale = True
            self.table.changes += 1
        return gone

    def set_complete(self, study: Study, complete: bool) -> None:
        """Take down that a study is whole, or that it is not.

        With instances in memory it is whole only while they are there.
        """
        contents = study.contents
        if contents is None or complete == study.complete:
            return
        if not complete:
            self._void_complete(study, contents)
            return
        study.complete = study.row_is_stale = True
        if contents.spool or not contents.held:
            return
        try:
            self.journal(study, contents).append(complete_line(True, len(contents.held)))
        except OSError as error:
            # Only held against us: the next process will think that it lacks something.
            self.room.not_recorded("completeness_not_recorded", error)
            return
        self.sync(study, contents)
        self.save_row(study)

    def _void_complete(self, study: Study, contents: Contents) -> None:
        if not study.complete:
            return
        study.complete = False
        study.row_is_stale = True
        if len(contents.held) == len(contents.spool):
            return  # never recorded, since none of it is on disk
        try:
            self.append(study, contents, complete_line(False, len(contents.held)))
        except OSError as error:
            self.room.not_recorded("completeness_not_recorded", error)

    def pin(self, study: Study, pinned: bool) -> bool:
        """Keep a study from eviction, or no longer; False if nothing is held.

        Raises:
            OSError: it could not be recorded.
        """
        contents = study.contents
        if contents is None or not (study.instances or study.pinned):
            return False
        if pinned != study.pinned:
            self.append(study, contents, pin_line(pinned))
            study.pinned = pinned
            self.table.changes += 1
            self.save_row(study)
        return True

    def drop(self, study: Study) -> None:
        """Forget all that *study* holds, whoever uses it; it stays usable, and is empty."""
        contents = study.contents
        if contents is None:
            return
        if contents.journal is not None:
            contents.journal.close()
            contents.journal = None
        self.room.trash(self.layout.study(study.study_instance_uid))
        self.rows.delete(study.study_instance_uid)
        self._free_spool(contents)
        contents.held.clear()
        contents.unchecked.clear()
        study.unsynced.clear()
        study.complete = study.pinned = study.row_is_open = study.row_is_stale = False
        study.epoch = self.rows.epoch
        self.table.resize(study, 0, 0)
        self.table.changes += 1

    def checked(self, study: Study) -> None:
        """Every instance of *study* was checked since the unclean start."""
        if study.contents is not None and not study.contents.unchecked:
            study.epoch = self.rows.epoch
            study.row_is_stale = True

    # -------------------------------------------------------------- instances

    def place(self, study: Study, contents: Contents, part: str, instance: CachedInstance) -> None:
        """Make a received file an instance of *study*.

        Raises:
            OSError: no room even after evicting, or the disk failed; then *part*
                is where it was, and the study as it was.
        """
        target = contents.path(instance)
        self._void_complete(study, contents)
        self.room.with_room(lambda: self.journal(study, contents))
        self._open_row(study)
        self.room.with_room(lambda: os.rename(part, target))
        try:
            self.append(study, contents, add_line(instance))
        except OSError:
            os.rename(target, part)
            raise
        size = instance.data_set_offset + instance.size
        self.room.incoming_bytes -= size
        contents.held[instance.sop_instance_uid] = instance
        self.table.resize(study, study.size_bytes + size, study.instances + 1)
        study.unsynced.append(instance.file_name)
        study.touch()

    def heal(self, study: Study, contents: Contents, part: str, instance: CachedInstance) -> bool:
        """Put the same bytes in the place of those that nobody has checked yet."""
        held = contents.held[instance.sop_instance_uid]
        if instance.sop_instance_uid not in contents.unchecked or held != instance:
            return False
        os.rename(part, contents.path(instance))
        # Counted already; what came in is the instance now.
        self.room.incoming_bytes -= instance.data_set_offset + instance.size
        contents.unchecked.discard(instance.sop_instance_uid)
        study.unsynced.append(instance.file_name)
        self.checked(study)
        return True

    def hold(
        self, study: Study, contents: Contents, data: bytearray, instance: CachedInstance
    ) -> None:
        """Make an instance of *study* that exists in memory only, until the lease ends."""
        self._void_complete(study, contents)
        contents.held[instance.sop_instance_uid] = instance
        contents.spool[instance.sop_instance_uid] = data
        study.touch()

    def journal(self, study: Study, contents: Contents) -> Journal:
        """The open journal of a study, begun if there is none."""
        if contents.journal is None:
            directory = Path(contents.directory)
            directory.mkdir(mode=0o700, exist_ok=True)
            contents.journal = Journal.open(directory, study.study_instance_uid)
        return contents.journal

    def append(self, study: Study, contents: Contents, lines: bytes) -> None:
        """Write to a study's journal, evicting others if there is no room.

        Raises:
            OSError: it was not written.
        """
        self.room.with_room(lambda: self.journal(study, contents).append(lines))

    def _open_row(self, study: Study) -> None:
        """Say once that a study is growing, so that its size is not believed after a crash."""
        if not study.row_is_open:
            study.row_is_open = True
            self.rows.put(study.study_instance_uid, study.record(open=True))

    def _free_spool(self, contents: Contents) -> None:
        for uid, data in contents.spool.items():
            self.room.free_memory(len(data))
            contents.held.pop(uid, None)
        contents.spool.clear()
        self.table.changes += 1

    def _all_records(self) -> list[tuple[str, StudyRecord]]:
        return [
            (study.study_instance_uid, study.record(open=study.row_is_open))
            for study in self.table.snapshot()
            if study.instances or study.pinned
        ]

    # -------------------------------------------------------------------- end

    def finish(self) -> bool:
        """Put everything away and on disk; True if all of it is as recorded."""
        for arriving in tuple(self.arriving):
            arriving.end()
        for study in self.table.snapshot():
            contents, study.contents = study.contents, None
            if contents is not None:
                self._put_away(study, contents)
            elif study.row_is_stale:
                self.save_row(study)
        self._syncing.shutdown(wait=True)
        self.rows.close()
        return not (self.room.in_doubt or self.rows.incomplete)
