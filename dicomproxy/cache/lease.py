"""A study in use. Used from the event loop; implements the port StudyLease."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from dicomproxy.cache.keeper import Keeper
from dicomproxy.cache.studies import Study
from dicomproxy.cache.thread import WriterThread
from dicomproxy.ports import CachedInstance

_NONE: Mapping[str, CachedInstance] = MappingProxyType({})


class Lease:
    """Keeps one study from eviction until it is released. Each caller has its own."""

    def __init__(
        self, thread: WriterThread, keeper: Keeper, study: Study, give_back: Callable[[Study], None]
    ) -> None:
        self._thread = thread
        self._keeper = keeper
        self._give_back = give_back
        self.study = study
        self.released = False

    def __repr__(self) -> str:
        state = "released" if self.released else "held"
        return f"<Lease {self.study.study_instance_uid} {state}>"

    @property
    def study_instance_uid(self) -> str:
        return self.study.study_instance_uid

    @property
    def instances(self) -> Mapping[str, CachedInstance]:
        """Whole instances by SOP Instance UID; live, and changed between awaits only."""
        contents = self.study.contents
        if contents is None or self.released:
            return _NONE
        return MappingProxyType(contents.live)

    @property
    def complete(self) -> bool:
        """Whether these instances were said to be all of the study.

        Any instance more or less makes it False until it is said again.
        """
        return self.study.complete

    async def set_complete(self, complete: bool) -> None:
        """Say that the instances held now are the whole study, or are not.

        Raises:
            ThreadStopped: the store is closed.
            TimeoutError: the disk does not answer.
        """
        await self._thread.ask(partial(self._keeper.set_complete, self.study, complete))

    async def remove(self, sop_instance_uids: Sequence[str]) -> None:
        """Drop instances; those open for reading are read to their end.

        Raises:
            ThreadStopped: the store is closed.
            TimeoutError: the disk does not answer.
        """
        await self._thread.ask(partial(self._remove, tuple(sop_instance_uids)))

    def touch(self) -> None:
        """Count as used now; saved on release."""
        self.study.touch()

    def release(self) -> None:
        """Let the study be evicted, as far as this lease goes; twice is no error."""
        if not self.released:
            self.released = True
            self._give_back(self.study)

    def _remove(self, sop_instance_uids: Sequence[str]) -> None:
        contents = self.study.contents
        if contents is None:
            return
        for uid in self._keeper.remove(self.study, sop_instance_uids):
            self._thread.post(partial(contents.live.pop, uid, None))
