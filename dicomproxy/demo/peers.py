"""The demo's other application entities, made of pynetdicom: archives and a workstation."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydicom import Dataset
from pynetdicom import AE, build_context, evt
from pynetdicom.dsutils import encode

_UNIQUE: Final = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}
_VERIFICATION: Final = "1.2.840.10008.1.1"
_PATIENT_FIND: Final = "1.2.840.10008.5.1.4.1.2.1.1"
_PATIENT_MOVE: Final = "1.2.840.10008.5.1.4.1.2.1.2"
_STUDY_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
_STUDY_MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
_PENDING: Final = 0xFF00
_UNCOMPRESSED: Final = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")


@dataclass(frozen=True, slots=True)
class Node:
    """An application entity's address."""

    ae_title: str
    host: str
    port: int


class _Checkpoint(threading.Event):
    """Where an association's own thread waits while somebody else uses the association.

    pynetdicom's thread says that it waits a moment before it does. A sender that
    looks just then goes on, both read the next response, and if the wrong one
    gets it the sender waits for nothing. Here the thread takes its word back in
    the same step in which it is let through.
    """

    def __init__(self, association: Any) -> None:
        super().__init__()
        self._association = association
        self._step = threading.Lock()
        self.set()

    def wait(self, timeout: float | None = None) -> bool:
        while True:
            super().wait(timeout)
            with self._step:
                if self.is_set():
                    self._association._is_paused = False
                    return True

    def clear(self) -> None:
        with self._step:
            super().clear()


class Entity(AE):
    """An application entity whose outgoing associations are not read by two threads at once."""

    def associate(self, *args: Any, **kwargs: Any) -> Any:
        association = super().associate(*args, **kwargs)
        if association.is_established and hasattr(association, "_reactor_checkpoint"):
            association._reactor_checkpoint = _Checkpoint(association)
            time.sleep(0.005)  # its thread looks for the checkpoint every millisecond
        return association


class Archive:
    """An archive that answers C-FIND and C-MOVE from a list of instances."""

    def __init__(self, ae_title: str, instances: list[Dataset]) -> None:
        self.ae_title = ae_title
        self.instances = instances
        self.sent = 0
        self.destinations: dict[str, Node] = {}
        self._server: Any = None

    def start(self, port: int = 0) -> Node:
        """Listen on loopback."""
        entity = Entity(ae_title=self.ae_title)
        for sop_class in (
            _VERIFICATION,
            _PATIENT_FIND,
            _STUDY_FIND,
            _PATIENT_MOVE,
            _STUDY_MOVE,
        ):
            entity.add_supported_context(sop_class, list(_UNCOMPRESSED))
        self._server = entity.start_server(
            ("127.0.0.1", port),
            block=False,
            evt_handlers=[
                (evt.EVT_C_FIND, self._find),
                (evt.EVT_C_MOVE, self._move),
                (evt.EVT_C_ECHO, lambda event: 0x0000),
            ],
        )
        return Node(self.ae_title, "127.0.0.1", self._server.server_address[1])

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()

    def _matching(self, identifier: Dataset) -> list[Dataset]:
        found = self.instances
        for keyword in _UNIQUE.values():
            asked = identifier.get(keyword)
            if not asked:
                continue
            wanted = {str(asked)} if isinstance(asked, str) else {str(one) for one in asked}
            found = [instance for instance in found if str(instance.get(keyword)) in wanted]
        return found

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        identifier = event.identifier
        level = identifier.QueryRetrieveLevel
        rows: dict[str, list[Dataset]] = {}
        for instance in self._matching(identifier):
            rows.setdefault(str(instance.get(_UNIQUE[level])), []).append(instance)
        for instances in rows.values():
            if event.is_cancelled:
                yield 0xFE00, None
                return
            yield _PENDING, self._row(identifier, level, instances)

    def _row(self, identifier: Dataset, level: str, instances: list[Dataset]) -> Dataset:
        row = Dataset()
        counted = {
            "NumberOfStudyRelatedInstances": str(len(instances)),
            "NumberOfStudyRelatedSeries": str(
                len({str(instance.SeriesInstanceUID) for instance in instances})
            ),
            "NumberOfSeriesRelatedInstances": str(len(instances)),
            "ModalitiesInStudy": sorted({str(instance.Modality) for instance in instances}),
            "RetrieveAETitle": self.ae_title,
            "QueryRetrieveLevel": level,
        }
        for element in identifier:
            if element.keyword in counted:
                setattr(row, element.keyword, counted[element.keyword])
            elif element.tag in instances[0] and element.VR != "SQ":
                row[element.tag] = instances[0][element.tag]
            else:
                row.add_new(element.tag, element.VR, None)
        return row

    def _move(self, event: Any) -> Iterator[Any]:
        node = self.destinations.get(event.move_destination)
        if node is None:
            yield None, None
            return
        found = self._matching(event.identifier)
        pairs = {(one.SOPClassUID, one.file_meta.TransferSyntaxUID) for one in found}
        yield (
            node.host,
            node.port,
            {"ae_title": node.ae_title, "contexts": [build_context(*pair) for pair in pairs]},
        )
        yield len(found)
        for instance in found:
            if event.is_cancelled:
                yield 0xFE00, None
                return
            self.sent += 1
            yield _PENDING, instance


@dataclass(frozen=True, slots=True)
class Received:
    """One instance as it reached the workstation."""

    sop_instance_uid: str
    transfer_syntax_uid: str
    data_set: bytes


class Workstation:
    """A workstation: it queries, names itself as move destination, and receives."""

    def __init__(self, ae_title: str, proxy: Node | None = None) -> None:
        self.ae_title = ae_title
        self.proxy = proxy
        self.received: list[Received] = []
        self._lock = threading.Lock()
        self._server: Any = None

    def start(self, pairs: set[tuple[str, str]], port: int = 0) -> Node:
        """Listen on loopback for instances of *pairs*: SOP Class and transfer syntax."""
        entity = Entity(ae_title=self.ae_title)
        entity.maximum_pdu_size = 0
        for sop_class in {sop_class for sop_class, _ in pairs}:
            held = [syntax for other, syntax in pairs if other == sop_class]
            entity.add_supported_context(sop_class, [*held, *_UNCOMPRESSED])
        entity.add_supported_context(_VERIFICATION)
        self._server = entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        return Node(self.ae_title, "127.0.0.1", self._server.server_address[1])

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()

    def _store(self, event: Any) -> int:
        received = Received(
            str(event.request.AffectedSOPInstanceUID),
            str(event.context.transfer_syntax),
            event.request.DataSet.getvalue(),
        )
        with self._lock:
            self.received.append(received)
        return 0x0000

    def find(self, identifier: Dataset) -> tuple[int, list[Dataset]]:
        """Query the proxy; return the final status and the matches."""
        association = self._associate(_STUDY_FIND)
        rows: list[Dataset] = []
        status = 0xC000
        try:
            for answer, row in association.send_c_find(identifier, _STUDY_FIND):
                status = int(answer.Status) if answer else 0xC000
                if row is not None:
                    rows.append(row)
        finally:
            association.release()
        return status, rows

    def move(self, identifier: Dataset, progress: Callable[[int, int], None]) -> tuple[int, int]:
        """Have the proxy send to us; return final status and the number completed."""
        association = self._associate(_STUDY_MOVE)
        status, completed = 0xC000, 0
        try:
            for answer, _ in association.send_c_move(identifier, self.ae_title, _STUDY_MOVE):
                status = int(answer.Status) if answer else 0xC000
                completed = int(answer.get("NumberOfCompletedSuboperations", 0) or 0)
                remaining = int(answer.get("NumberOfRemainingSuboperations", 0) or 0)
                progress(completed, completed + remaining)
        finally:
            association.release()
        return status, completed

    def _associate(self, sop_class: str) -> Any:
        if self.proxy is None:
            raise RuntimeError("the workstation does not know the proxy yet")
        entity = Entity(ae_title=self.ae_title)
        entity.add_requested_context(sop_class, list(_UNCOMPRESSED))
        association = entity.associate(
            self.proxy.host, self.proxy.port, ae_title=self.proxy.ae_title
        )
        if not association.is_established:
            raise ConnectionError("the proxy did not accept the association")
        return association


def data_set_bytes(instance: Dataset) -> bytes:
    """Return the data set of *instance* as its archive sends it."""
    syntax = instance.file_meta.TransferSyntaxUID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = encode(instance, syntax.is_implicit_VR, syntax.is_little_endian)
    if encoded is None:
        raise ValueError("an instance of the demo does not encode")
    return encoded
