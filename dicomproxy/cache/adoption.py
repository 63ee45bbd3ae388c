"""At start: making the table of studies agree with what is on disk.

After an orderly shutdown rows are believed. Otherwise every study's journal is
read and compared with the files: what is missing, short or long is struck out,
what no journal names is deleted. Contents are not read here: their CRC-32 is
checked when an instance is first opened. Runs in the writer thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dicomproxy.cache.index import StudyRecord
from dicomproxy.cache.journal import (
    Journal,
    JournalContent,
    complete_line,
    read_journal,
    remove_line,
)
from dicomproxy.cache.keeper import Keeper
from dicomproxy.cache.layout import JOURNAL_NAME, delete, study_name
from dicomproxy.cache.studies import Study
from dicomproxy.logs import get_logger

_log = get_logger()


@dataclass(slots=True)
class Adopted:
    """What the start found."""

    studies: int = 0
    adopted: int = 0
    dropped: int = 0
    missing: int = 0


def adopt(keeper: Keeper, rows: Mapping[str, StudyRecord], *, clean: bool) -> Adopted:
    """Fill the table from *rows* and directories; *clean* says that rows can be believed.

    Raises:
        OSError: the directory of studies cannot be read.
    """
    found = Adopted()
    by_name = {study_name(uid): (uid, record) for uid, record in rows.items()}
    with os.scandir(keeper.layout.studies) as entries:
        paths = [Path(entry.path) for entry in entries]
    for path in paths:
        row = by_name.pop(path.name, None)
        if row is not None and clean and not row[1].open:
            study = Study.from_record(*row)
        else:
            known = None if row is None else row[1]
            taken = _from_journal(keeper, path, known, found)
            if taken is None:
                found.dropped += 1
                _remove(keeper, path)
                if row is not None:
                    keeper.rows.delete(row[0])
                continue
            study = taken
            found.adopted += 1
        keeper.table.insert(study)
        if study.row_is_stale:
            keeper.save_row(study)
        found.studies += 1
    for study_instance_uid, _record in by_name.values():
        keeper.rows.delete(study_instance_uid)
    return found


def _from_journal(
    keeper: Keeper, path: Path, known: StudyRecord | None, found: Adopted
) -> Study | None:
    """Return the study in *path* as its journal and files have it; None if it is none."""
    try:
        content = read_journal(path)
        uid = content.study_instance_uid
        if not uid or study_name(uid) != path.name:
            return None
        found.missing += _strike_out(path, content)
        if not content.instances and not content.pinned:
            return None
        last_used = known.last_used if known is not None else path.stat().st_mtime
    except OSError:
        return None
    record = StudyRecord(
        size_bytes=content.size_bytes,
        instances=len(content.instances),
        last_used=last_used,
        pinned=content.pinned,
        complete=content.complete,
        # What the last process checked, it checked in its own epoch.
        epoch=known.epoch if known is not None else 0,
    )
    study = Study.from_record(uid, record)
    study.row_is_stale = record != known
    return study


def _strike_out(path: Path, content: JournalContent) -> int:
    """Remove from *content* what has no whole file, and files without a line; the count.

    Raises:
        OSError: the journal could not be corrected.
    """
    with os.scandir(path) as entries:
        sizes = {
            entry.name: entry.stat(follow_symlinks=False).st_size
            for entry in entries
            if entry.is_file(follow_symlinks=False)
        }
    missing = [
        held.sop_instance_uid
        for held in content.instances.values()
        if sizes.get(held.file_name) != held.data_set_offset + held.size
    ]
    if missing:
        lines = b"".join(remove_line(uid) for uid in missing)
        journal = Journal.open(path, content.study_instance_uid)
        try:
            journal.append(complete_line(False, len(content.instances)) + lines)
        finally:
            journal.close()
        for uid in missing:
            del content.instances[uid]
        content.complete = False
    named = {held.file_name for held in content.instances.values()} | {JOURNAL_NAME}
    for name in sizes.keys() - named:
        delete(path / name)
    return len(missing)


def _remove(keeper: Keeper, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        keeper.room.trash(path)
    else:
        delete(path)
