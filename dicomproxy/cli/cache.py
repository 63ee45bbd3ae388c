"""``dicomproxy cache stats | list | evict STUDY | verify``.

Works beside a running service: then it only reads, and asks the service to
evict. Without one it takes the cache itself. Shows UIDs and measures; the cache
records nothing else of a study.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from dicomproxy.cache.index import IndexDamaged, IndexUnusable, StudyRecord, read_rows
from dicomproxy.cache.journal import JournalContent, read_journal
from dicomproxy.cache.layout import CacheLocked, Layout, study_name
from dicomproxy.cache.reader import whole_instances
from dicomproxy.cache.requests import ask_to_evict
from dicomproxy.cache.settings import CachedStudy, CacheSettings
from dicomproxy.cache.store import DiskInstanceStore

_ANSWER_SECONDS: Final = 15.0
_REFUSALS: Final = {
    "not_held": "the cache does not hold this study",
    "in_use": "the study is in use; try again when its transfer has ended",
    "failed": "the disk does not let it go",
    "pinned": "the study is pinned",
    "no_answer": "the running service did not answer",
}


def run(action: str, settings: CacheSettings, *, study: str | None = None) -> int:
    """Do *action* and return the exit code: 0, 1 if it failed, 2 if it makes no sense."""
    if action == "evict" and not study:
        _complain("which study? dicomproxy cache evict STUDY_INSTANCE_UID")
        return 2
    if action not in ("stats", "list", "evict", "verify"):
        _complain(f"unknown action {action!r}: expected stats, list, evict or verify")
        return 2
    layout = Layout(settings.directory)
    if not layout.studies.is_dir():
        _complain(f"there is no cache in {settings.directory}")
        return 1
    try:
        if action == "stats":
            return _stats(settings, layout)
        if action == "list":
            return _list(layout)
        if action == "evict":
            return _evict(settings, layout, study or "")
        return _verify(settings, layout)
    except OSError as error:
        _complain(f"the cache in {settings.directory} cannot be used: {error.strerror}")
        return 1


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


# ---------------------------------------------------------------- reading only


def _directories(layout: Layout) -> Iterator[tuple[Path, JournalContent]]:
    for path in sorted(layout.studies.iterdir()):
        try:
            content = read_journal(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # evicted meanwhile, or none of ours
        yield path, content


def _studies(layout: Layout) -> list[CachedStudy]:
    """What is held, the last used first, by the rows or else by the journals."""
    try:
        rows = dict(read_rows(layout.index))
    except (IndexUnusable, IndexDamaged):
        rows = {}
    known = {study_name(uid): (uid, record) for uid, record in rows.items()}
    found = []
    for path in layout.studies.iterdir():
        uid, record = known.get(path.name, ("", None))
        try:
            if record is None or record.open:
                content = read_journal(path)
                uid, record = content.study_instance_uid, _record(content, record, path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if uid and (record.instances or record.pinned):
            found.append(
                CachedStudy(
                    study_instance_uid=uid,
                    size_bytes=record.size_bytes,
                    instances=record.instances,
                    complete=record.complete,
                    pinned=record.pinned,
                    in_use=record.open,
                    last_used=record.last_used,
                )
            )
    return sorted(found, key=lambda study: study.last_used, reverse=True)


def _record(content: JournalContent, row: StudyRecord | None, path: Path) -> StudyRecord:
    read = StudyRecord(
        size_bytes=content.size_bytes,
        instances=len(content.instances),
        last_used=path.stat().st_mtime,
        pinned=content.pinned,
        complete=content.complete,
    )
    return read if row is None else replace(read, last_used=row.last_used, open=row.open)


def _stats(settings: CacheSettings, layout: Layout) -> int:
    studies = _studies(layout)
    used = sum(study.size_bytes for study in studies)
    disk = shutil.disk_usage(layout.root)
    rows = [
        ("directory", str(settings.directory)),
        ("size", f"{_size(used)} of {_size(settings.max_size_bytes)}"),
        ("used", f"{used / settings.max_size_bytes:.1%}"),
        ("studies", str(len(studies))),
        ("  complete", str(sum(study.complete for study in studies))),
        ("  pinned", str(sum(study.pinned for study in studies))),
        ("  receiving", str(sum(study.in_use for study in studies))),
        ("instances", str(sum(study.instances for study in studies))),
        ("disk free", f"{_size(disk.free)} of {_size(disk.total)}"),
    ]
    for name, value in rows:
        print(f"{name:<12} {value}")
    return 0


def _list(layout: Layout) -> int:
    studies = _studies(layout)
    width = max((len(study.study_instance_uid) for study in studies), default=0)
    for study in studies:
        used = datetime.fromtimestamp(study.last_used, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        state = "complete" if study.complete else "partial"
        pinned = "pinned" if study.pinned else "-"
        print(
            f"{_shown(study.study_instance_uid):<{width}}  {_size(study.size_bytes):>10}"
            f"  {study.instances:>6}  {state:<8}  {pinned:<6}  {used}"
        )
    return 0


# -------------------------------------------------------------------- changing


def _evict(settings: CacheSettings, layout: Layout, study_instance_uid: str) -> int:
    async def alone() -> str:
        store = DiskInstanceStore(settings)
        await store.start()
        try:
            return await store.evict(study_instance_uid)
        finally:
            await store.close()

    try:
        outcome = asyncio.run(alone())
    except CacheLocked:
        outcome = ask_to_evict(layout.requests, study_instance_uid, _ANSWER_SECONDS)
    if outcome == "evicted":
        print(f"evicted {_shown(study_instance_uid)}")
        return 0
    _complain(_REFUSALS.get(outcome, f"not evicted: {outcome}"))
    return 1


def _verify(settings: CacheSettings, layout: Layout) -> int:
    async def alone() -> tuple[int, int]:
        store = DiskInstanceStore(settings)
        await store.start()
        try:
            damaged = 0
            studies = store.studies()
            for study in studies:
                if bad := await store.verify(study.study_instance_uid):
                    damaged += 1
                    await store.drop(study.study_instance_uid)
                    _report(study.study_instance_uid, len(bad), study.instances, "dropped")
            return len(studies), damaged
        finally:
            await store.close()

    try:
        checked, damaged = asyncio.run(alone())
    except CacheLocked:
        print("the service is running: nothing is changed")
        checked, damaged = _verify_beside(layout)
    print(f"{checked} studies checked, {damaged} damaged")
    return 1 if damaged else 0


def _verify_beside(layout: Layout) -> tuple[int, int]:
    checked = damaged = 0
    for path, content in _directories(layout):
        bad = content.instances.keys() - whole_instances(path, content.instances.values())
        if bad:
            # The service may have removed or replaced some meanwhile: what counts
            # is what a journal read since then still claims.
            try:
                now = read_journal(path)
            except FileNotFoundError:
                continue
            claimed = [now.instances[uid] for uid in bad if uid in now.instances]
            bad = {held.sop_instance_uid for held in claimed} - whole_instances(path, claimed)
        checked += 1
        if bad:
            damaged += 1
            _report(content.study_instance_uid, len(bad), len(content.instances), "not dropped")
    return checked, damaged


def _report(study_instance_uid: str, damaged: int, instances: int, outcome: str) -> None:
    print(f"{_shown(study_instance_uid)}: {damaged} of {instances} instances damaged, {outcome}")


def _shown(uid: str) -> str:
    """A UID as sources sent it, or that it is none."""
    plain = uid.isascii() and set(uid) <= set("0123456789.")
    return uid if plain else "(not a UID)"


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
