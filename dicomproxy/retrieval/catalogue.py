"""What one holder says it has of one study, and the asking for it.

The last manifest stands until the next one has come. What a source no longer
lists is dropped, except what arrived after it was asked, which may be newer
than its answer; whose study it is is checked before anything is believed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Final

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import PatientId
from dicomproxy.identity.crossref import IdentityUnresolved
from dicomproxy.identity.reports import report, report_unresolved
from dicomproxy.identity.safety import Verdict
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.ports import CrossReferenceError, Failure, Source, SourceError
from dicomproxy.retrieval.batches import MAX_UIDS
from dicomproxy.retrieval.manifest import Listing, Manifest, load_manifest
from dicomproxy.retrieval.selection import Selection

if TYPE_CHECKING:
    from dicomproxy.retrieval.flight import Flight

_log = get_logger()

MANIFEST_FRESH_SECONDS: Final = 5.0
"""A manifest younger than this serves a retrieve that begins now."""


class Catalogue:
    """Asks one source for its manifests of one flight's study.

    Args:
        flight: woken when more is listed that can be asked for, and at the end.
        name: of the source.
        listed: called when a manifest has been taken, or with why none has come.
        is_begun: tells whether the source was asked for instances already.
    """

    def __init__(
        self,
        flight: Flight,
        name: str,
        *,
        listed: Callable[[Failure | None], None],
        is_begun: Callable[[], bool],
    ) -> None:
        self._flight = flight
        self._name = name
        self._listed = listed
        self._is_begun = is_begun
        self.manifest: Manifest | None = None
        self.conflict = False
        """The source has the study under another patient than was agreed on."""
        self.loading: Source | None = None
        """Whom a manifest is being asked of."""
        self.is_judged = False
        """It is known that its study is that of the patient agreed on, or is not to be known."""
        self.so_far: Listing = {}
        """What has been listed since it was asked for: SOP Instance UIDs by series."""
        self._judgement: tuple[Identifier | None, int, tuple[PatientId | None, bool, bool]] | None
        self._judgement = None
        self._rows = 0
        self._loaded_at = float("-inf")
        self._vanishable: set[str] = set()

    @property
    def verified(self) -> bool:
        """Whether the manifest, if there is one, lists every instance."""
        return self.manifest is not None and self.manifest.verified

    @property
    def is_first(self) -> bool:
        """Whether the first manifest is being asked for."""
        return self.manifest is None and self.loading is not None

    @property
    def is_fresh(self) -> bool:
        """Whether the last manifest has come a moment ago."""
        return asyncio.get_running_loop().time() - self._loaded_at < MANIFEST_FRESH_SECONDS

    def lists(self, sop_instance_uid: str) -> bool:
        """Tell whether the manifest names the instance."""
        return self.manifest is not None and any(
            sop_instance_uid in instances for instances in self.manifest.series.values()
        )

    def load(self, source: Source, likely: Collection[str] = ()) -> None:
        """Begin to ask *source*; *likely* are series that somebody believes are there."""
        flight = self._flight
        self.loading = source
        self.so_far, self._rows = {}, 0
        if not likely:
            likely = flight.flights.listed_series(flight.study_instance_uid, self._name)
        known = self.manifest.listed(Selection()) if self.manifest is not None else {}
        # What arrives from now on may be newer than the listing that is coming.
        self._vanishable = {
            uid
            for uid, instance in list(flight.lease.instances.items())
            if instance.source == self._name and (uid in known or uid in flight.initial)
        }
        flight.spawn(self._load(source, likely), f"manifest:{self._name}")

    async def _load(self, source: Source, likely: Collection[str]) -> None:
        failure: Failure | None = None
        try:
            await self._take(await self._ask(source, likely))
        except SourceError as error:
            failure = error.failure
        except Exception as error:  # a fault of ours, or the store's; nobody may wait for ever
            _log.error("flight_failed", source=self._name, **error_fields(error))
            failure = Failure.PROTOCOL
        try:
            self._listed(failure)
        finally:
            self.loading = None
            self.is_judged = True
            self._loaded_at = asyncio.get_running_loop().time()
            self._flight.relist()
            self._flight.wake()

    async def _ask(self, source: Source, likely: Collection[str]) -> Manifest:
        """Ask for it, and once more if that failed although instances are coming already.

        Without a listing the whole study would be asked for, those a second time.
        """
        study = self._flight.study_instance_uid
        more: dict[str, Any] = {
            "series": likely,
            "progress": self._row_listed,
            "interactive": self._flight.is_wanted(),
            "returned": self._flight.persons.returned(self._name),
            "judge": self._judge,
        }
        try:
            return await load_manifest(source, study, into=self.so_far, **more)
        except SourceError as error:
            begun = self.manifest is None and self._is_begun()
            if not begun or error.failure is Failure.UNREACHABLE:
                raise
            self.so_far = {}
            return await load_manifest(source, study, into=self.so_far, **more)

    def _row_listed(self) -> None:
        """Let it be decided at the first row, and whenever a list may be full."""
        self._rows += 1
        if self.manifest is None and self._rows % MAX_UIDS in (0, 1):
            self._flight.wake()

    async def _take(self, manifest: Manifest) -> None:
        """Accept a manifest: the patient it names, and what it no longer lists.

        Raises:
            SourceError: it cannot be found out who that is here.
        """
        flight = self._flight
        named, agrees, contradicts = await self._judged(manifest)
        self.manifest = manifest
        if not agrees:
            self.conflict = True
            await flight.patient_changed(self._name, named)
            return
        if contradicts:
            self.conflict = True
            await flight.contradicted(self._name)
            return
        flight.flights.remember_series(flight.study_instance_uid, self._name, manifest.series)
        if not manifest.held:
            flight.not_held(self._name)
        if not manifest.verified:
            return
        listed = manifest.listed(Selection())
        gone = [uid for uid in self._vanishable if uid not in listed]
        if gone:
            await flight.remove(gone)
        if flight.lease.complete and any(uid not in flight.lease.instances for uid in listed):
            # At once: a crash must not leave a part that passes for the whole.
            await flight.lease.set_complete(False)

    async def _judge(self, whose: Manifest) -> None:
        """Let instances be delivered as soon as it is known that they are the patient's."""
        if self._flight.persons.policy(self._name) is None:
            return
        try:
            _, agrees, contradicts = await self._judged(whose)
        except SourceError:
            return  # told when the listing is complete
        if agrees and not contradicts and not self.is_judged:
            self.is_judged = True
            self._flight.tell()

    async def _judged(self, manifest: Manifest) -> tuple[PatientId | None, bool, bool]:
        """Return whom a manifest names, whether that is the patient agreed on, and is contradicted.

        Asked about the same row again it says the same again, and reports it once.
        """
        version = self._flight.persons.version
        if self._judgement is not None and manifest.row is not None:
            row, of_version, judgement = self._judgement
            if row is manifest.row and of_version == version:
                return judgement
        named, agrees = await self._is_agreed(manifest)
        judgement = named, agrees, agrees and await self._contradicts(manifest)
        self._judgement = manifest.row, version, judgement
        return judgement

    async def _is_agreed(self, manifest: Manifest) -> tuple[PatientId | None, bool]:
        """Return whom a manifest names, and whether that may be the patient agreed on."""
        flight, persons = self._flight, self._flight.persons
        study = flight.study_instance_uid
        named: PatientId | None = None
        try:
            named = persons.of_manifest(manifest, self._name)
            local_id = await flight.local_id(named, self._name)
        except IdentityUnresolved as unresolved:
            report_unresolved(self._name, unresolved, study_instance_uid=study)
            return named, False
        except CrossReferenceError as error:
            # Without knowing whose it is nothing is asked of it.
            raise SourceError(
                self._name, Failure.UNREACHABLE, detail=f"not identified: {error.failure}"
            ) from None
        return named, flight.agrees(local_id)

    async def _contradicts(self, manifest: Manifest) -> bool:
        """Tell whether a listing describes the patient as somebody else than the local PACS."""
        flight = self._flight
        comparison = await flight.persons.compare_listed(manifest, flight.patient_id, self._name)
        conflict = comparison.verdict is Verdict.CONFLICT
        if conflict:
            uid = flight.study_instance_uid
            report(self._name, comparison, shown=False, study_instance_uid=uid)
        return conflict
