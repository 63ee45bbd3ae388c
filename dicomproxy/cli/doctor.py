"""``dicomproxy doctor``: try every route of a configuration, and say in words what fails where.

A route is tried from the outside in: port, association, presentation contexts,
C-ECHO, C-FIND, and, where a test study is configured, one of its instances sent
back to us. What a failed step would have been needed for is not tried.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from dicomproxy import logs
from dicomproxy.app import run_on_loop
from dicomproxy.cli.doctor_hl7 import try_listener
from dicomproxy.cli.doctor_identity import StepFailed, try_cross_references
from dicomproxy.config import Settings
from dicomproxy.config.model import LocalSection, SourceEntry
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
)
from dicomproxy.dataset.transfer_syntaxes import chooser
from dicomproxy.dimse.association import Association, BytesSink, Message, Sink
from dicomproxy.dimse.command import Command, CommandField, response
from dicomproxy.dimse.command import request as request_command
from dicomproxy.dimse.errors import AssociationError, AssociationRejected, ConnectFailed
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import UNCOMPRESSED, Context, Supported, acceptance, negotiate
from dicomproxy.dimse.operations import VERIFICATION, receive_response
from dicomproxy.dimse.pdu import AssociateAccept, AssociateReject, AssociateRequest
from dicomproxy.ports import LOCAL, RetrieveOrder, SourceError, SourceQuery
from dicomproxy.services.access import AccessControl, Peer
from dicomproxy.services.sop_classes import is_storage
from dicomproxy.sources.archive import (
    PATIENT_ROOT_FIND,
    PATIENT_ROOT_MOVE,
    QUERY_RETRIEVE,
    STUDY_ROOT_FIND,
    STUDY_ROOT_MOVE,
    Archive,
    ArchiveSettings,
)
from dicomproxy.sources.dimse import DimseSource
from dicomproxy.wiring import (
    access_control,
    limits,
    local_archive_settings,
    source_archive_settings,
    timers,
)

_ECHO_SECONDS: Final = 10.0
_RELEASE_SECONDS: Final = 5.0
_MOVE_SECONDS: Final = 60.0
_CT_IMAGE_STORAGE: Final = "1.2.840.10008.5.1.4.1.1.2"
_NO_SUCH_STUDY: Final = "2.25.4002009127"
_STORES_METRIC: Final = re.compile(
    r"^dicomproxy_stores_received_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE
)


def run(settings: Settings) -> int:
    """Try every route; return 0 if all are fine, 1 otherwise."""
    logs.configure("error", "console")  # what happens is printed, step by step
    return run_on_loop(lambda: _Doctor(settings).run())


_Failed = StepFailed


@dataclass(slots=True)
class _Received:
    """What our own storage SCP took in."""

    instances: int = 0
    bytes: int = 0


class _Doctor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._layer = UpperLayer(timers(settings), limits(settings))
        self._received = _Received()
        self._failures = 0
        self._listening = False

    async def run(self) -> int:
        try:
            async with self._listener():
                local = self._settings.local
                await self._archive(
                    local_archive_settings(self._settings),
                    local,
                    retrieves=local.deliver == "proxy",
                )
                for entry in self._settings.sources:
                    await self._archive(
                        source_archive_settings(self._settings, entry), entry, retrieves=True
                    )
                await try_cross_references(self._settings, self._step)
                await try_listener(self._settings, self._step)
                for workstation in self._settings.workstations:
                    if workstation.host is None or workstation.port is None:
                        continue
                    target = Target(
                        workstation.host,
                        workstation.port,
                        workstation.ae_title,
                        workstation.deliver_as or self._settings.proxy.ae_title,
                        self._settings.local.connect_timeout,
                    )
                    await self._workstation(target)
        finally:
            await self._layer.close(1.0)
        print()
        if self._failures:
            print(f"{self._failures} of the steps failed.")
            return 1
        print("All routes are fine.")
        return 0

    # ------------------------------------------------------------------ routes

    async def _archive(
        self,
        settings: ArchiveSettings,
        entry: LocalSection | SourceEntry,
        *,
        retrieves: bool,
    ) -> None:
        print(
            f"\n{settings.name}: {settings.ae_title} at {settings.host}:{settings.port}, "
            f"called as {settings.calling_ae_title}"
        )
        target = Target(
            settings.host,
            settings.port,
            settings.ae_title,
            settings.calling_ae_title,
            settings.connect_timeout,
        )
        association = await self._associate(target, QUERY_RETRIEVE)
        if association is None:
            return
        moves = retrieves or settings.name == LOCAL
        if not await self._step("contexts", lambda: _check_contexts(association, settings, moves)):
            await association.release(_RELEASE_SECONDS)
            return
        await self._step("C-ECHO", lambda: _echo(association))
        await association.release(_RELEASE_SECONDS)
        archive = Archive(self._layer, settings)
        source = DimseSource(archive, _CountingArrivals(self._received))
        try:
            if await self._step("C-FIND", lambda: _find(source, entry.test_study)) and retrieves:
                await self._retrieve(source, settings, entry.test_study)
        finally:
            await archive.close()

    async def _retrieve(
        self, source: DimseSource, settings: ArchiveSettings, test_study: str | None
    ) -> None:
        name = "C-GET" if settings.retrieve == "c-get" else "C-MOVE to us"
        if test_study is None:
            self._say(name, "not tried: no test_study is configured", "-")
            return
        await self._step(name, lambda: self._fetch_one(source, settings, test_study))

    async def _workstation(self, target: Target) -> None:
        print(f"\nworkstation: {target.called_ae_title} at {target.host}:{target.port}")
        proposal = Proposal(((VERIFICATION, UNCOMPRESSED), (_CT_IMAGE_STORAGE, UNCOMPRESSED)))
        association = await self._associate(target, proposal)
        if association is None:
            return
        stores = any(
            context.abstract_syntax == _CT_IMAGE_STORAGE
            for context in association.contexts.values()
        )
        if stores:
            self._say("contexts", "takes CT Image Storage", "ok")
        else:
            self._fail("contexts", "does not accept CT Image Storage, uncompressed")
        if any(
            context.abstract_syntax == VERIFICATION for context in association.contexts.values()
        ):
            await self._step("C-ECHO", lambda: _echo(association))
        else:
            self._say("C-ECHO", "not tried: Verification is not offered", "-")
        await association.release(_RELEASE_SECONDS)

    # ------------------------------------------------------------------- steps

    async def _associate(self, target: Target, proposal: Proposal) -> Association | None:
        if not await self._step("port", lambda: _connect(target)):
            return None
        associations: list[Association] = []

        async def associate() -> str:
            associations.append(await self._layer.request(target, proposal))
            return ""

        return associations[0] if await self._step("association", associate) else None

    async def _fetch_one(self, source: DimseSource, settings: ArchiveSettings, study: str) -> str:
        series = await _first(source, Level.SERIES, study)
        series_uid = series.text(SERIES_INSTANCE_UID)
        image = await _first(source, Level.IMAGE, study, series_uid)
        before = self._received.instances, self._received.bytes, await self._seen_by_service()
        order = RetrieveOrder(
            Level.IMAGE,
            (study,),
            (series_uid,),
            (image.text(SOP_INSTANCE_UID),),
            patient_id=image.text(PATIENT_ID),
            sop_classes=tuple(filter(None, (image.text(0x00080016),))),
        )
        status, completed, failed = -1, 0, 0
        async with asyncio.timeout(_MOVE_SECONDS), aclosing(source.retrieve(order)) as steps:
            async for progress in steps:
                status, completed, failed = progress.status, progress.completed, progress.failed
        if self._received.instances > before[0]:
            return f"one instance, {self._received.bytes - before[1]} bytes"
        if not self._listening and settings.retrieve == "c-move":
            if await self._seen_by_service() > before[2]:
                return "one instance reached the running proxy"
            if before[2] < 0:
                raise _Failed(
                    "the proxy's port is in use and its metrics cannot be read: whether the "
                    "instance arrived is not known"
                )
        raise _Failed(
            f"no instance reached us; the archive said status {status:04X}, "
            f"{completed} completed, {failed} failed: does it know {settings.calling_ae_title} "
            f"at our address, port {self._settings.proxy.port}?"
        )

    async def _seen_by_service(self) -> float:
        """Return how many C-STOREs a running proxy has answered; -1 where there is none to ask."""
        if self._listening:
            return -1
        return await asyncio.to_thread(_stores_of, self._settings.web.host, self._settings.web.port)

    async def _step(self, name: str, act: Callable[[], Awaitable[str]]) -> bool:
        started = time.monotonic()
        try:
            words = await act()
        except (_Failed, AssociationError, SourceError, TimeoutError, OSError) as error:
            self._fail(name, _in_words(error))
            return False
        elapsed = f"{(time.monotonic() - started) * 1000:.0f} ms"
        self._say(name, f"{words}, {elapsed}" if words else elapsed, "ok")
        return True

    def _say(self, name: str, words: str, mark: str) -> None:
        print(f"  {mark:<6} {name:<14} {words}", flush=True)

    def _fail(self, name: str, words: str) -> None:
        self._failures += 1
        self._say(name, words, "FAILED")

    # --------------------------------------------------- our own storage SCP

    @asynccontextmanager
    async def _listener(self) -> AsyncIterator[None]:
        """Listen where the proxy would, unless it does."""
        acceptor = _StorageOnly(self._received, access_control(self._settings))
        listener = Listener(self._layer, acceptor, max_associations=16)
        proxy = self._settings.proxy
        try:
            await listener.start(proxy.host, proxy.port)
            self._listening = True
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                self._fail("listen", f"cannot listen on {proxy.host}:{proxy.port}")
            else:
                print(f"Port {proxy.port} is in use: the proxy is taken to be running.")
        try:
            yield
        finally:
            await listener.close()


class _CountingSink:
    """Counts an instance and forgets it."""

    def __init__(self, received: _Received) -> None:
        self._received = received
        self._bytes = 0

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        self._bytes += sum(map(len, segments))
        release()

    def discard(self) -> None:
        return

    async def finish(self) -> int:
        self._received.instances += 1
        self._received.bytes += self._bytes
        return 0x0000


class _CountingArrivals:
    """Takes what arrives within a C-GET."""

    def __init__(self, received: _Received) -> None:
        self._received = received

    def source_for(self, candidates: Sequence[str]) -> str | None:
        return candidates[0] if candidates else None

    def receive(
        self, source: str, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str
    ) -> _CountingSink:
        return _CountingSink(self._received)


class _StorageOnly:
    """Takes C-STOREs of senders that the configuration knows, and counts them."""

    def __init__(self, received: _Received, access: AccessControl) -> None:
        self._received = received
        self._access = access

    async def negotiate(
        self, association: Association, request: AssociateRequest
    ) -> tuple[AssociateAccept, dict[int, Context]] | AssociateReject:
        peer = await self._access.admit(
            request.calling_ae_title, request.called_ae_title, association.peer_address
        )
        if not isinstance(peer, Peer):
            return peer
        outcome = negotiate(
            request,
            lambda uid: (
                Supported(chooser(None)) if uid == VERIFICATION or is_storage(uid) else None
            ),
        )
        association.sink_for = self._sink_for
        return acceptance(request, outcome, max_length=256 * 1024), outcome.contexts

    def _sink_for(self, association: Association, context: Context, command: Command) -> Sink:
        if command.field == CommandField.C_STORE_RQ:
            return _CountingSink(self._received)
        return BytesSink(association.limits.max_identifier_bytes)

    async def serve(self, association: Association) -> None:
        try:
            while True:
                await self._answer(association, await association.receive(_MOVE_SECONDS))
        except AssociationError:
            return

    async def _answer(self, association: Association, message: Message) -> None:
        status = 0x0000
        if isinstance(message.sink, _CountingSink):
            status = await message.sink.finish()
        await association.send(message.context, response(message.command, status))


# ---------------------------------------------------------------------- details


async def _connect(target: Target) -> str:
    async with asyncio.timeout(target.connect_seconds):
        _, writer = await asyncio.open_connection(target.host, target.port)
    writer.close()
    return ""


async def _check_contexts(association: Association, settings: ArchiveSettings, moves: bool) -> str:
    accepted = {context.abstract_syntax for context in association.contexts.values()}
    named = {
        STUDY_ROOT_FIND: "Study Root FIND",
        PATIENT_ROOT_FIND: "Patient Root FIND",
        STUDY_ROOT_MOVE: "Study Root MOVE",
        PATIENT_ROOT_MOVE: "Patient Root MOVE",
    }
    offered = ", ".join(words for uid, words in named.items() if uid in accepted) or "none"
    if not accepted & {STUDY_ROOT_FIND, PATIENT_ROOT_FIND}:
        raise _Failed(f"no Query/Retrieve FIND is accepted (accepted: {offered})")
    needs_move = moves and settings.retrieve == "c-move"
    if needs_move and not accepted & {STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE}:
        raise _Failed(f"no Query/Retrieve MOVE is accepted (accepted: {offered})")
    return offered


async def _echo(association: Association) -> str:
    context = association.context_for(VERIFICATION)
    message_id = association.next_message_id()
    await association.send(
        context,
        request_command(CommandField.C_ECHO_RQ, VERIFICATION, message_id, data_set=False),
    )
    answer = await receive_response(association, message_id, CommandField.C_ECHO_RQ, _ECHO_SECONDS)
    if answer.status != 0x0000:
        raise _Failed(f"status {answer.status:04X}")
    return ""


async def _find(source: DimseSource, test_study: str | None) -> str:
    identifier = Identifier()
    identifier.set_text(STUDY_INSTANCE_UID, test_study or _NO_SUCH_STUDY)
    identifier.set_empty(PATIENT_ID)
    count = 0
    async with aclosing(source.find(SourceQuery(Level.STUDY, identifier, True))) as matches:
        async for _ in matches:
            count += 1
    if test_study is not None and not count:
        raise _Failed("the test study is not there")
    return "the test study is there" if test_study else "answers"


async def _first(
    source: DimseSource, level: Level, study: str, series: str | None = None
) -> Identifier:
    identifier = Identifier()
    identifier.set_text(STUDY_INSTANCE_UID, study)
    if series is None:
        identifier.set_empty(SERIES_INSTANCE_UID)
    else:
        identifier.set_text(SERIES_INSTANCE_UID, series)
        identifier.set_empty(SOP_INSTANCE_UID)
        identifier.set_empty(0x00080016)
    async with aclosing(source.find(SourceQuery(level, identifier, True))) as matches:
        async for match in matches:
            return match
    raise _Failed(f"the test study has nothing at {level} level")


def _stores_of(host: str, port: int) -> float:
    connection = http.client.HTTPConnection(
        "127.0.0.1" if host in ("0.0.0.0", "") else host, port, timeout=5
    )
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        if answer.status != http.HTTPStatus.OK:
            return -1
    except (OSError, http.client.HTTPException):
        return -1
    finally:
        connection.close()
    return sum(float(value) for value in _STORES_METRIC.findall(text))


def _in_words(error: BaseException) -> str:
    match error:
        case AssociationRejected():
            return f"rejected, {error.rejection.in_words()}"
        case ConnectFailed():
            return "no connection"
        case TimeoutError():
            return "no answer in time"
        case ConnectionRefusedError():
            return "connection refused: nothing listens there"
        case OSError():
            return f"no connection ({type(error).__name__})"
        case SourceError():
            if error.status is not None:
                return f"status {error.status:04X}"
            words = str(error.failure).replace("_", " ")
            return f"{words}, {error.detail}" if error.detail else words
        case _:
            return str(error)
