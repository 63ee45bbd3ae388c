"""An archive made of pynetdicom, answering from a list of data sets in memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydicom import Dataset
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, build_context, evt

from tests.peers.entity import (
    FIND,
    GET,
    MOST_CONTEXTS,
    MOVE,
    STORAGE,
    UNCOMPRESSED,
    VERIFICATION,
    Entity,
    Root,
    Service,
    new_entity,
    titles,
)
from tests.peers.node import Node

_KEYS: Final = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; the identifier may hold patient values."""

    service: str
    calling_ae_title: str
    called_ae_title: str
    message_id: int
    priority: int = 0
    sop_class_uid: str = ""
    destination: str = ""
    identifier: Dataset = field(repr=False, default_factory=Dataset)

    @property
    def level(self) -> str:
        return str(self.identifier.get("QueryRetrieveLevel", ""))


class Archive(Entity):
    """An archive that answers C-FIND, C-MOVE, C-GET and C-STORE from a list in memory.

    Instances are sent in the syntax of their file meta information, encoded as
    ``tests.support.datasets.data_set_bytes`` does.

    Args:
        ae_title: its AE title (it answers to any).
        instances: what it holds; what is stored to it comes on top.
        destinations: every C-MOVE destination that it knows.
        study_root_only: offer no Patient Root.
    """

    def __init__(
        self,
        ae_title: str,
        instances: Iterable[Dataset] = (),
        destinations: Iterable[tuple[str, str, int]] = (),
        *,
        study_root_only: bool = False,
    ) -> None:
        super().__init__(ae_title)
        self.instances = list(instances)
        self.destinations = {one[0]: Node(*one) for one in destinations}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        """How often each SOP Instance UID left, by C-MOVE or C-GET."""
        self.withhold: set[str] = set()
        """SOP Instance UIDs that it lists but cannot send."""
        self.cancelled = 0
        self._roots: Sequence[Root] = ("S",) if study_root_only else ("P", "S")

    def asked(self, service: Service, level: str = "") -> list[Request]:
        """Return the requests for *service* so far, at *level* if given."""
        with self.lock:
            return [
                one
                for one in self.requests
                if one.service == service and (not level or one.level == level)
            ]

    def matching(self, identifier: Dataset) -> list[Dataset]:
        """Return the instances that the unique keys of *identifier* name."""
        with self.lock:
            found = list(self.instances)
        for keyword in _KEYS.values():
            value = identifier.get(keyword)
            if value:
                wanted = {value} if isinstance(value, str) else set(map(str, value))
                found = [one for one in found if str(one.get(keyword, "")) in wanted]
        return found

    def make_entity(self) -> AE:
        entity = new_entity(self.ae_title)
        entity.add_supported_context(VERIFICATION, UNCOMPRESSED)
        for root in self._roots:
            for models in (FIND, MOVE, GET):
                entity.add_supported_context(models[root], UNCOMPRESSED)
        held = {str(one.SOPClassUID) for one in self.instances}
        for sop_class in held | set(STORAGE):
            # Both roles: it takes C-STORE, and sends by it within a C-GET.
            entity.add_supported_context(sop_class, ALL_TRANSFER_SYNTAXES, True, True)
        return entity

    def handlers(self) -> list[tuple[Any, Callable[[Any], Any]]]:
        return [
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_C_MOVE, self._move),
            (evt.EVT_C_GET, self._get),
            (evt.EVT_C_STORE, self._store),
        ]

    def _record(self, service: str, event: Any) -> Dataset:
        calling, called = titles(event)
        identifier = Dataset() if service == "store" else event.identifier
        request = Request(
            service,
            calling,
            called,
            event.request.MessageID,
            event.request.Priority,
            str(event.request.AffectedSOPClassUID),
            str(getattr(event.request, "MoveDestination", None) or "").strip(),
            identifier,
        )
        with self.lock:
            self.requests.append(request)
        return identifier

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        identifier = self._record("find", event)
        rows: dict[str, list[Dataset]] = {}
        level = str(identifier.QueryRetrieveLevel)
        for one in self.matching(identifier):
            rows.setdefault(str(one.get(_KEYS[level], "")), []).append(one)
        self.wait_at_gate()
        for instances in rows.values():
            self.wait_at_gate()
            if self._is_cancelled(event):
                yield 0xFE00, None
                return
            yield 0xFF00, self._row(identifier, instances)
        if "find" in self.fail:
            yield self.fail["find"], None

    def _is_cancelled(self, event: Any) -> bool:
        if not event.is_cancelled:
            return False
        with self.lock:
            self.cancelled += 1
        return True

    def _row(self, identifier: Dataset, instances: list[Dataset]) -> Dataset:
        first = instances[0]
        computed = {
            "QueryRetrieveLevel": identifier.QueryRetrieveLevel,
            "RetrieveAETitle": self.ae_title,
            "ModalitiesInStudy": sorted({str(one.get("Modality", "OT")) for one in instances}),
            "NumberOfStudyRelatedSeries": len({one.SeriesInstanceUID for one in instances}),
            "NumberOfStudyRelatedInstances": len(instances),
            "NumberOfSeriesRelatedInstances": len(instances),
        }
        row = Dataset()
        if "SpecificCharacterSet" in first:
            row.SpecificCharacterSet = first.SpecificCharacterSet
        for element in identifier:
            if element.keyword in computed:
                setattr(row, element.keyword, computed[element.keyword])
            elif element.keyword != "SpecificCharacterSet":
                held = first[element.tag].value if element.tag in first else None
                row.add_new(element.tag, element.VR, held)
        return row

    def _move(self, event: Any) -> Iterator[Any]:
        identifier = self._record("move", event)
        self.wait_at_gate()
        node = self.destinations.get(str(event.move_destination).strip())
        if node is None:
            yield None, None
            return
        found = self.matching(identifier)
        pairs = sorted({(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in found})
        contexts = [build_context(*pair) for pair in pairs[:MOST_CONTEXTS]]
        yield node.host, node.port, {"ae_title": node.ae_title, "contexts": contexts}
        yield from self._send(event, found, "move")

    def _get(self, event: Any) -> Iterator[Any]:
        identifier = self._record("get", event)
        self.wait_at_gate()
        yield from self._send(event, self.matching(identifier), "get")

    def _send(self, event: Any, found: list[Dataset], service: Service) -> Iterator[Any]:
        yield len(found)
        for one in found:
            self.wait_at_gate()
            if self.delay_seconds:
                time.sleep(self.delay_seconds)
            if self._is_cancelled(event):
                yield 0xFE00, None
                return
            if service in self.fail:
                yield self.fail[service], None
                return
            uid = str(one.SOPInstanceUID)
            if uid in self.withhold:
                # A data set without file meta cannot be sent: pynetdicom counts it Failed.
                broken = Dataset()
                broken.SOPInstanceUID = uid
                yield 0xFF00, broken
                continue
            with self.lock:
                self.sent[uid] += 1
            yield 0xFF00, one

    def _store(self, event: Any) -> int:
        self._record("store", event)
        self.wait_at_gate()
        if "store" in self.fail:
            return self.fail["store"]
        stored = event.dataset
        stored.file_meta = event.file_meta
        with self.lock:
            self.instances.append(stored)
        return 0x0000
