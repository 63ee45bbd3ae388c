"""pynetdicom as a third peer: what its archives and workstations have in common.

They run on pynetdicom's own threads, so a test awaits their calls while the
event loop serves the other side. What happened is kept in plain lists, and what
shall go wrong is set in plain attributes, at any time:

* ``reject``: None, ``"transient"`` or ``"permanent"``, for new associations;
* ``hold()`` and ``release()``: a gate before each answer and each instance;
* ``delay_seconds``: a pause before each instance;
* ``fail``: a final failure status by service (``find``, ``move``, ``get``, ``store``).
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Literal, Self

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, evt

from dicomproxy.demo.peers import Entity as OneReader
from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.process import PeerFailed

VERIFICATION: Final = "1.2.840.10008.1.1"
FIND: Final = {"P": "1.2.840.10008.5.1.4.1.2.1.1", "S": "1.2.840.10008.5.1.4.1.2.2.1"}
MOVE: Final = {"P": "1.2.840.10008.5.1.4.1.2.1.2", "S": "1.2.840.10008.5.1.4.1.2.2.2"}
GET: Final = {"P": "1.2.840.10008.5.1.4.1.2.1.3", "S": "1.2.840.10008.5.1.4.1.2.2.3"}
UNCOMPRESSED: Final = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
STORAGE: Final = tuple(str(one.abstract_syntax) for one in AllStoragePresentationContexts)
MOST_CONTEXTS: Final = 128
WAIT_SECONDS: Final = 60.0

Root = Literal["P", "S"]
Service = Literal["find", "move", "get", "store"]


class Entity(ABC):
    """A pynetdicom AE that serves from ``async with`` to the end of the block."""

    def __init__(self, ae_title: str) -> None:
        self.ae_title = ae_title
        self.host = "127.0.0.1"
        self.port = 0
        self.reject: Literal["transient", "permanent"] | None = None
        self.delay_seconds = 0.0
        self.fail: dict[Service, int] = {}
        self.associations = 0
        self._gate = threading.Event()
        self._gate.set()
        self.lock = threading.Lock()
        self._held = threading.Semaphore(0)
        self._server: Any = None

    @property
    def node(self) -> Node:
        return Node(self.ae_title, self.host, self.port)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)

    def start(self) -> None:
        """Listen; on the same port again after a stop."""
        for _ in range(5):
            port = self.port or free_port()
            try:
                self._server = self.make_entity().start_server(
                    (self.host, port), block=False, evt_handlers=self._all_handlers()
                )
            except OSError:
                continue  # taken meanwhile
            self.port = port
            return
        raise PeerFailed(f"{self.ae_title} finds no port")

    def stop(self) -> None:
        """End, with every association aborted."""
        self.release()
        server, self._server = self._server, None
        if server is None:
            return
        for association in list(server.active_associations):
            association.abort()
        server.shutdown()

    def abort(self) -> None:
        """Abort every association that is open now, and go on serving."""
        for association in list(self._server.active_associations):
            association.abort()

    def hold(self) -> None:
        """Answer nothing further and send nothing further until :meth:`release`."""
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    async def held(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until something has come to the closed gate.

        Raises:
            TimeoutError: nothing came.
        """
        if not await asyncio.to_thread(self._held.acquire, True, seconds):
            raise TimeoutError(f"nothing came to the gate of {self.ae_title}")

    def wait_at_gate(self) -> None:
        if not self._gate.is_set():
            self._held.release()
            self._gate.wait(WAIT_SECONDS)

    def _all_handlers(self) -> list[tuple[Any, Callable[[Any], Any]]]:
        return [
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_ESTABLISHED, self._established),
            (evt.EVT_C_ECHO, lambda event: 0x0000),
            *self.handlers(),
        ]

    def _requested(self, event: Any) -> None:
        # The two rejections that pynetdicom decides by itself: an unknown calling
        # AE title, and a limit below what its setter would take.
        entity = event.assoc.ae
        entity.require_calling_aet = ["NOBODY AT ALL"] if self.reject == "permanent" else []
        entity._maximum_associations = 0 if self.reject == "transient" else 100

    def _established(self, event: Any) -> None:
        with self.lock:
            self.associations += 1

    @abstractmethod
    def make_entity(self) -> AE:
        """Return the application entity with the contexts it supports."""

    @abstractmethod
    def handlers(self) -> list[tuple[Any, Callable[[Any], Any]]]:
        """Return what answers each event."""


def new_entity(ae_title: str) -> AE:
    # With plain AEs two threads may read one association, and under load a sender
    # then waits for a response that the other thread took.
    entity = OneReader(ae_title=ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = WAIT_SECONDS
    entity.maximum_pdu_size = 0
    return entity


def titles(event: Any) -> tuple[str, str]:
    requestor = event.assoc.requestor
    return str(requestor.ae_title).strip(), str(requestor.primitive.called_ae_title).strip()
