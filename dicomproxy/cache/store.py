"""The store of instances as the rest of the proxy sees it.

Durability: an instance is not synced when it is stored, since it can be
fetched again; files and journals are synced in the background once a study is
complete or no longer in use, and at the end. A directory that was not closed
in an orderly way is opened with doubt: lengths are compared at the start, and
each instance's CRC-32 before it is first served. So whatever a crash or a power
failure leaves, only whole instances are served.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from prometheus_client import Counter

from dicomproxy.cache.adoption import adopt
from dicomproxy.cache.incoming import IncomingInstance
from dicomproxy.cache.keeper import Keeper
from dicomproxy.cache.layout import DirectoryLock
from dicomproxy.cache.lease import Lease
from dicomproxy.cache.reader import (
    FileReader,
    Files,
    MemoryReader,
    NotWhole,
    OpenedAhead,
    open_ahead,
    open_whole,
)
from dicomproxy.cache.requests import answer_requests
from dicomproxy.cache.settings import CachedStudy, CacheSettings, CacheStats
from dicomproxy.cache.studies import Study
from dicomproxy.cache.syncing import sync_path
from dicomproxy.cache.thread import ThreadStopped, WriterThread
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import CachedInstance, InstanceReader, Refused
from dicomproxy.tasks import TaskOwner

_READER_THREADS: Final = 4
_REQUEST_INTERVAL_SECONDS: Final = 1.0
_AGE_INTERVAL_SECONDS: Final = 60.0

_HITS = Counter("dicomproxy_cache_hits_total", "Instances that a retrieve found in the cache.")
_MISSES = Counter("dicomproxy_cache_misses_total", "Instances that a retrieve had to fetch.")

_log = get_logger()


class DiskInstanceStore:
    """The bounded cache on disk; implements the port InstanceStore."""

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._keeper = Keeper(settings)
        self._thread = WriterThread(self._keeper.room.show_measures)
        self._readers = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="cache-reader")
        self._files = Files(self._readers)
        self._tasks = TaskOwner("cache")
        self._lock = DirectoryLock(self._keeper.layout)
        self._hits = 0
        self._misses = 0

    def __repr__(self) -> str:
        return f"<DiskInstanceStore {self._settings.directory} studies={len(self._keeper.table)}>"

    # --------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Take the directory, and find out what it holds.

        Raises:
            CacheLocked: another process has it.
            OSError: it cannot be made or read.
        """
        self._thread.start()
        try:
            await self._thread.ask(self._open_directory)
        except BaseException:
            await self._end_threads()
            raise
        self._tasks.spawn(self._look_for_requests(), name="requests")
        if self._settings.max_age_seconds is not None:
            self._tasks.spawn(self._look_for_old_studies(), name="age")

    async def close(self) -> None:
        """Put everything on disk and let the directory go; twice is no error.

        Leases lose their instances; what is still being received is dropped.
        """
        await self._tasks.close()
        if not self._thread.running:
            return
        try:
            await self._thread.ask(self._close_directory)
        except TimeoutError:
            _log.error("cache_degraded", reason="close_timed_out")
        await self._end_threads()

    async def _end_threads(self) -> None:
        self._thread.stop()
        self._files.flush()
        self._readers.shutdown(wait=False)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _open_directory(self) -> None:
        layout = self._keeper.layout
        new = not layout.studies.exists()
        layout.create()
        self._lock.acquire()
        try:
            clean = new or layout.clean.exists()
            if clean and not new:
                layout.clean.unlink()
                # Else a power failure could bring the marker back.
                sync_path(layout.root)
            layout.sweep()
            rows, believed = self._keeper.rows.load(clean=clean)
            found = adopt(self._keeper, rows, clean=believed)
            # The limits may be lower than they were when this was stored.
            self._keeper.room.make_room(0)
        except BaseException:
            self._keeper.rows.close()
            self._lock.release()
            raise
        _log.info(
            "cache_opened",
            state="clean" if believed else "unclean",
            studies=found.studies,
            adopted=found.adopted,
            dropped=found.dropped,
            missing=found.missing,
            used_bytes=self._keeper.room.used_bytes,
        )

    def _close_directory(self) -> None:
        layout = self._keeper.layout
        try:
            if self._keeper.finish():
                layout.clean.touch(mode=0o600)
                sync_path(layout.clean)
                sync_path(layout.root)
        except OSError as error:
            _log.warning("cache_degraded", reason="not_cleanly_closed", **error_fields(error))
        finally:
            self._lock.release()

    # ---------------------------------------------------------------- studies

    async def lease(self, study_instance_uid: str) -> Lease:
        """Open a study for use, creating it empty if it is not held.

        Raises:
            ThreadStopped: the store is not open.
            TimeoutError: the disk does not answer.
            OSError: the process has no descriptor or memory left.
        """
        study = self._keeper.table.lease(study_instance_uid)
        try:
            if study.contents is None:
                await self._thread.ask(partial(self._keeper.load, study))
        except BaseException:
            self._give_back(study)
            raise
        return Lease(self._thread, self._keeper, study, self._give_back)

    def _give_back(self, study: Study) -> None:
        if self._keeper.table.release(study):
            self._thread.submit(partial(self._keeper.settle, study))

    async def drop(self, study_instance_uid: str) -> None:
        """Forget a study, even if leased or pinned; its leases stay good for new instances.

        What is open for reading is read to its end.

        Raises:
            As :meth:`lease`.
        """
        lease = await self.lease(study_instance_uid)
        try:
            await self._thread.ask(partial(self._drop, lease.study))
        finally:
            lease.release()

    def _drop(self, study: Study) -> None:
        if study.contents is not None:
            self._keeper.drop(study)
            self._thread.post(study.contents.live.clear)

    async def evict(self, study_instance_uid: str) -> str:
        """Evict a study if it may go.

        Returns ``evicted``, or why not: ``not_held``, ``in_use``, ``pinned`` or ``failed``.
        """
        return await self._thread.ask(partial(self._evict_as_asked, study_instance_uid))

    async def pin(self, study_instance_uid: str, pinned: bool) -> bool:
        """Keep a study from eviction and ageing, or no longer; False if it is not held.

        Raises:
            OSError: it could not be recorded.
            Otherwise as :meth:`lease`.
        """
        lease = await self.lease(study_instance_uid)
        try:
            return await self._thread.ask(partial(self._keeper.pin, lease.study, pinned))
        finally:
            lease.release()

    def studies(self) -> list[CachedStudy]:
        """Every study held, the last used first."""
        return self._keeper.table.listing()

    def is_complete(self, study_instance_uid: str) -> bool:
        """Tell whether a study is held whole."""
        study = self._keeper.table.get(study_instance_uid)
        return study is not None and study.complete

    async def verify(self, study_instance_uid: str) -> list[str]:
        """Compare every instance of a study with its CRC-32; remove and return the damaged ones.

        Raises:
            As :meth:`lease`.
        """
        lease = await self.lease(study_instance_uid)
        try:
            contents = lease.study.contents
            if contents is None:
                raise ThreadStopped
            contents.unchecked.update(uid for uid in lease.instances if uid not in contents.spool)
            damaged = []
            for instance in tuple(lease.instances.values()):
                try:
                    reader = await self.open(instance)
                except Refused:
                    damaged.append(instance.sop_instance_uid)
                except FileNotFoundError:
                    continue  # dropped meanwhile
                else:
                    await reader.close()
            return damaged
        finally:
            lease.release()

    # -------------------------------------------------------------- instances

    def receive(
        self, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source: str
    ) -> IncomingInstance:
        """Begin to receive an instance, which *source* announced with these UIDs."""
        return IncomingInstance(
            self._thread,
            self._keeper,
            sop_class_uid,
            sop_instance_uid,
            transfer_syntax_uid,
            source,
        )

    async def open(self, instance: CachedInstance) -> InstanceReader:
        """Open an instance for reading; its study is leased until the reader is closed.

        Raises:
            FileNotFoundError: it is not, or no longer, held.
            Refused: ``damaged``: its file is not what was stored. It is removed.
            OSError: it cannot be opened now.
            Otherwise as :meth:`lease`.
        """
        lease = await self.lease(instance.study_instance_uid)
        try:
            return await self._open(lease, instance)
        except BaseException:
            lease.release()
            raise

    async def _open(self, lease: Lease, instance: CachedInstance) -> InstanceReader:
        study, contents, uid = lease.study, lease.study.contents, instance.sop_instance_uid
        if contents is None or lease.instances.get(uid) != instance:
            raise FileNotFoundError(uid)
        if (data := contents.spool.get(uid)) is not None:
            return MemoryReader(data, lease.release)
        check_crc = uid in contents.unchecked
        path = self._keeper.layout.study(study.study_instance_uid) / instance.file_name
        loop = asyncio.get_running_loop()
        opened = loop.run_in_executor(
            self._readers, partial(open_whole, path, instance, check_crc=check_crc)
        )
        try:
            fd = await asyncio.shield(opened)
        except asyncio.CancelledError:
            opened.add_done_callback(_close_unwanted)
            raise
        except NotWhole:
            await self._thread.ask(partial(self._remove_damaged, study, instance))
            if uid in lease.instances:
                raise FileNotFoundError(uid) from None  # replaced while it was opened
            raise Refused("damaged") from None
        if check_crc:
            contents.unchecked.discard(uid)
            if not contents.unchecked:
                self._thread.submit(partial(self._keeper.checked, study))
        return FileReader(fd, instance, self._files, lease.release)

    async def open_several(
        self, instances: Sequence[CachedInstance], head_bytes: int = 0
    ) -> list[InstanceReader | None]:
        """Open what can be opened without more ado, at the price of one; see the port."""
        leases: dict[int, Lease] = {}
        paths: dict[int, str] = {}
        files: list[OpenedAhead | None] = []
        readers: list[InstanceReader | None] = [None] * len(instances)
        try:
            for number, instance in enumerate(instances):
                uid, study_uid = instance.sop_instance_uid, instance.study_instance_uid
                study = self._keeper.table.get(study_uid)
                if study is None or (contents := study.contents) is None:
                    continue
                if contents.live.get(uid) != instance or uid in contents.unchecked:
                    continue
                lease = await self.lease(study_uid)
                if (data := contents.spool.get(uid)) is not None:
                    readers[number] = MemoryReader(data, lease.release)
                    continue
                leases[number] = lease
                directory = self._keeper.layout.study(study_uid)
                paths[number] = os.path.join(directory, instance.file_name)
            if leases:
                files = await self._open_ahead(
                    [(path, instances[at]) for at, path in paths.items()], head_bytes
                )
        except BaseException:
            for reader in readers:
                if reader is not None:  # of those in memory
                    await reader.close()
            raise
        finally:
            for number, file in itertools.zip_longest(leases, files):
                if file is None:
                    leases[number].release()
                else:
                    readers[number] = FileReader(
                        file.fd,
                        instances[number],
                        self._files,
                        leases[number].release,
                        file.head,
                        file.arrived,
                    )
        return readers

    async def _open_ahead(
        self, wanted: list[tuple[str, CachedInstance]], head_bytes: int
    ) -> list[OpenedAhead | None]:
        try:
            opened = asyncio.get_running_loop().run_in_executor(
                self._readers, open_ahead, wanted, head_bytes
            )
        except RuntimeError:
            return []  # the threads have ended: open() says so
        try:
            return await asyncio.shield(opened)
        except asyncio.CancelledError:
            opened.add_done_callback(_close_all_unwanted)
            raise

    def _remove_damaged(self, study: Study, instance: CachedInstance) -> None:
        contents = study.contents
        uid = instance.sop_instance_uid
        if contents is None or contents.held.get(uid) != instance:
            return
        self._keeper.remove(study, [uid])
        self._thread.post(partial(contents.live.pop, uid, None))
        _log.warning(
            "cache_degraded",
            reason="instance_damaged",
            study_instance_uid=study.study_instance_uid,
            sop_instance_uid=uid,
        )

    # ---------------------------------------------------------------- figures

    def count_hits(self, instances: int) -> None:
        """Count instances that a retrieve found here."""
        self._hits += instances
        _HITS.inc(instances)

    def count_misses(self, instances: int) -> None:
        """Count instances that a retrieve had to fetch."""
        self._misses += instances
        _MISSES.inc(instances)

    def stats(self) -> CacheStats:
        """A snapshot."""
        keeper, room, studies = self._keeper, self._keeper.room, self.studies()
        return CacheStats(
            bytes=room.used_bytes,
            max_size_bytes=self._settings.max_size_bytes,
            instances=sum(study.instances for study in studies),
            studies=len(studies),
            pinned=sum(study.pinned for study in studies),
            in_use=sum(study.in_use for study in keeper.table.snapshot()),
            spooled_bytes=room.spooled_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=room.evictions,
            evicted_bytes=room.evicted_bytes,
        )

    # ----------------------------------------------------------- housekeeping

    async def _look_for_requests(self) -> None:
        directory = self._keeper.layout.requests
        await self._every(
            _REQUEST_INTERVAL_SECONDS, partial(answer_requests, directory, self._evict_as_asked)
        )

    async def _look_for_old_studies(self) -> None:
        interval = min(_AGE_INTERVAL_SECONDS, max(0.1, (self._settings.max_age_seconds or 0) / 4))
        await self._every(interval, self._keeper.room.evict_unused)

    async def _every(self, interval_seconds: float, job: Callable[[], None]) -> None:
        while True:
            try:
                await self._thread.ask(job)
            except (OSError, TimeoutError) as error:
                _log.warning("cache_housekeeping_failed", **error_fields(error))
            await asyncio.sleep(interval_seconds)

    def _evict_as_asked(self, study_instance_uid: str) -> str:
        return self._keeper.room.evict(study_instance_uid, "asked")


def _close_unwanted(opened: asyncio.Future[int]) -> None:
    """Close what was opened for somebody who no longer waits."""
    if not opened.cancelled() and opened.exception() is None:
        os.close(opened.result())


def _close_all_unwanted(opened: asyncio.Future[list[OpenedAhead | None]]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        for file in opened.result():
            if file is not None:
                os.close(file.fd)
