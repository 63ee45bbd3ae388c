"""Notices of merged records in the running proxy: it starts whole or not, and reload loses none."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dicomproxy import app as app_module
from dicomproxy.app import Application
from dicomproxy.config import Settings
from dicomproxy.config import load as config_load
from dicomproxy.identity.notices import IdentityNotice, LiveIdentities
from dicomproxy.snapshot import snapshot
from dicomproxy.wiring import Routing
from dicomproxy.wiring_identity import Identity
from tests.peers.adt_feed import a40, acknowledged, tell
from tests.peers.ports import free_port
from tests.sentinel import PATIENT_ID
from tests.support.certificates import authority, calling
from tests.support.log_watch import LogWatch
from tests.test_app import SECONDS, File, associate, configured_logs, http, running, settled, taken

__all__ = ["configured_logs"]  # a fixture

MERGE = a40(PATIENT_ID, "99")


@pytest.fixture
def file(tmp_path: Path) -> File:
    """Return a configuration with one domain and a listener."""
    return listening(tmp_path)


def listening(directory: Path, **hl7: Any) -> File:
    made = File(directory)
    made.content["local"]["patient_id_issuer"] = "HOSPITAL"
    made.content["hl7"] = {
        "host": "127.0.0.1",
        "port": free_port(),
        "allow_from": "127.0.0.1",
        **hl7,
    }
    made.write()
    return made


def port_of(file: File) -> int:
    return int(file.content["hl7"]["port"])


async def heeded(application: Application, count: int) -> None:
    await settled(lambda: application.identities.stats.merges >= count)


async def test_no_listener_unless_asked_for(tmp_path: Path, log_watch: LogWatch) -> None:
    """Without the section nothing is opened, and the page says nothing of it."""
    async with running(File(tmp_path)) as application:
        assert application.hl7 is None
        assert snapshot(application).hl7 is None
    assert not log_watch.named("mllp_listening")
    assert not (tmp_path / "cache" / "state" / "hl7").exists()


async def test_notices_are_taken_between_start_and_close(file: File) -> None:
    """And leave port, file and threads free again, so that it starts on them once more."""
    threads = set(threading.enumerate())
    for _ in range(2):
        async with running(file) as application:
            assert acknowledged(await tell(port_of(file), MERGE)) == ("AA", "1")
            await heeded(application, 1)
            shown = snapshot(application).hl7
            assert shown is not None
            assert (shown.acknowledged, shown.refused, shown.merges) == (1, 0, 1)
            assert shown.address == f"127.0.0.1:{port_of(file)}"
        assert await tell(port_of(file), MERGE) == ""
    left = {one for one in threading.enumerate() if not one.name.startswith("asyncio_")}
    assert left <= threads


@pytest.mark.parametrize("obstacle", ["port", "journal", "certificate", "key"])
async def test_start_that_fails_is_taken_back(tmp_path: Path, obstacle: str) -> None:
    """Whatever is in the way of the listener: an error, nothing left, and a start without it."""
    threads = set(threading.enumerate())
    certificate = authority().certificate_file(tmp_path)
    key = tmp_path / "key.pem"
    authority().issuer.issue_cert("other").private_key_pem.write_to_path(str(key))
    tls = {
        "certificate": {"certificate_file": str(tmp_path / "missing.pem")},
        "key": {"certificate_file": str(certificate), "key_file": str(key)},
    }.get(obstacle)
    file = listening(tmp_path, tls=tls) if tls else listening(tmp_path)
    if obstacle == "port":
        with taken(port_of(file)), pytest.raises(OSError):
            await (await file.application()).start()
    else:
        state = tmp_path / "cache" / "state"
        if obstacle == "journal":
            state.mkdir(parents=True)
            (state / "hl7").write_text("a file where a directory should be")
        with pytest.raises(OSError):
            await (await file.application()).start()
        if obstacle == "journal":
            (state / "hl7").unlink()
    assert await http(file.web_port) == 0
    left = {one for one in threading.enumerate() if not one.name.startswith("asyncio_")}
    assert left <= threads
    file.content["hl7"].pop("tls", None)
    file.write()
    async with running(file):
        assert acknowledged(await tell(port_of(file), MERGE)) == ("AA", "1")


async def test_start_that_fails_after_it_closes_the_listener(file: File) -> None:
    """What comes after it in the start takes it back, too."""
    with taken(file.port), pytest.raises(OSError):
        await (await file.application()).start()
    assert await tell(port_of(file), MERGE) == ""


async def test_nothing_is_acknowledged_before_it_is_on_disk(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk has not confirmed, its sender waits; what waits is heeded by nobody."""
    begun, go = threading.Event(), threading.Event()
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread().name.startswith("inbox-journal"):
            begun.set()
            assert go.wait(SECONDS)
        original(descriptor)

    async with running(file) as application:
        monkeypatch.setattr(os, "fsync", fsync)
        telling = asyncio.create_task(tell(port_of(file), MERGE))
        assert await asyncio.to_thread(begun.wait, SECONDS)
        assert not telling.done()
        assert application.identities.stats.merges == 0
        go.set()
        assert acknowledged(await telling) == ("AA", "1")
        await heeded(application, 1)


async def test_a_disk_that_fails_is_told_as_an_error(
    file: File, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch
) -> None:
    """AE: its sender keeps it and comes again; the next one is taken once there is room."""

    def full(*_: object) -> int:
        raise OSError(28, "no space left")

    async with running(file) as application:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            assert acknowledged(await tell(port_of(file), MERGE)) == ("AE", "1")
        assert application.identities.stats.merges == 0
        assert acknowledged(await tell(port_of(file), MERGE)) == ("AA", "1")
        await heeded(application, 1)
    (line,) = log_watch.named("mllp_journal_failed")
    assert (line["reason"], line["errno"]) == ("disk", "ENOSPC")


async def test_notices_are_taken_until_the_last_operation_ends(file: File) -> None:
    """While the proxy drains, what is still under way is told of merges."""
    async with running(file) as application:
        operation = application.operations.begin(
            "retrieve", association_id="a", caller_ae_title="READING1", peer_address="127.0.0.1"
        )
        draining = asyncio.create_task(application.drain())
        await settled(lambda: application.draining)
        assert acknowledged(await tell(port_of(file), MERGE)) == ("AA", "1")
        await heeded(application, 1)
        application.operations.end(operation, 0x0000)
        async with asyncio.timeout(SECONDS):
            await draining


# ------------------------------------------------------------------------ reload


async def test_the_listener_outlives_a_reload(file: File, log_watch: LogWatch) -> None:
    """Its keys need a restart; both configurations are told, the former until nobody uses it."""
    async with running(file) as application:
        standing = await associate(file)
        before = port_of(file)
        file.content["hl7"]["port"] = free_port()
        file.write()
        assert await application.reload()
        (line,) = log_watch.named("reload_needs_restart")
        assert line["keys"] == ["hl7"]
        assert repr(application.identities) == "<LiveIdentities 2 services>"
        assert acknowledged(await tell(before, MERGE)) == ("AA", "1")
        await heeded(application, 1)
        await standing.release(SECONDS)
        await settled(lambda: repr(application.identities) == "<LiveIdentities 1 services>")
    assert repr(application.identities) == "<LiveIdentities 0 services>"


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_configuration_that_does_not_start_is_closed(
    file: File, monkeypatch: pytest.MonkeyPatch, log_watch: LogWatch, cancelled: bool
) -> None:
    """Whether it fails or is given up: the former one goes on, alone."""
    begun, closed = asyncio.Event(), []
    original = Routing.close

    async def start(_self: Identity) -> None:
        begun.set()
        if cancelled:
            await asyncio.Event().wait()
        raise LookupError

    async def close(self: Routing) -> None:
        closed.append(self)
        await original(self)

    async with running(file) as application:
        serving = application.routing
        monkeypatch.setattr(Routing, "close", close)
        with monkeypatch.context() as patched:
            patched.setattr(Identity, "start", start)
            reloading = asyncio.create_task(application.reload())
            await begun.wait()
            if cancelled:
                reloading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reloading
            else:
                assert not await reloading
                assert len(log_watch.named("reload_refused")) == 1
        assert application.routing is serving
        assert len(closed) == 1
        assert closed != [serving]
        assert repr(application.identities) == "<LiveIdentities 1 services>"
        assert await application.reload()


async def test_a_reload_that_draining_overtakes_is_given_up(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would put in force takes in work that is being turned away."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def start(_self: Identity) -> None:
        begun.set()
        await go.wait()

    async with running(file) as application:
        serving = application.routing
        monkeypatch.setattr(Identity, "start", start)
        reloading = asyncio.create_task(application.reload())
        await begun.wait()
        async with asyncio.timeout(SECONDS):
            await application.drain()
        go.set()
        assert not await reloading
        assert application.routing is serving
        assert repr(application.identities) == "<LiveIdentities 1 services>"


async def test_the_last_of_several_reloads_counts(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told twice, the proxy follows the file as it is the second time."""
    read, go = threading.Event(), threading.Event()
    original = config_load
    seconds: list[float] = []

    def load(path: Path) -> Settings:
        settings = original(path)
        if not read.is_set():
            read.set()
            assert go.wait(SECONDS)
        seconds.append(settings.proxy.pending_interval)
        return settings

    async with running(file) as application:
        monkeypatch.setattr(app_module, "load", load)
        file.content["proxy"]["pending_interval"] = "3s"
        file.write()
        first = asyncio.create_task(application.reload())
        assert await asyncio.to_thread(read.wait, SECONDS)
        file.content["proxy"]["pending_interval"] = "4s"
        file.write()
        second = asyncio.create_task(application.reload())
        await settled(lambda: bool(application._reloading._waiters) or second.done())
        go.set()
        assert await first
        assert await second
        assert application.settings.proxy.pending_interval == 4
    assert seconds == [3, 4]


async def test_a_notice_during_a_reload_reaches_both(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that begins to remember is told before it serves anybody."""
    begun, go = asyncio.Event(), asyncio.Event()
    told: list[str] = []
    original = LiveIdentities.__call__

    async def call(self: LiveIdentities, notice: IdentityNotice) -> None:
        told.append(repr(self))
        await original(self, notice)

    async def start(_self: Identity) -> None:
        begun.set()
        await go.wait()

    monkeypatch.setattr(LiveIdentities, "__call__", call)
    async with running(file) as application:
        monkeypatch.setattr(Identity, "start", start)
        reloading = asyncio.create_task(application.reload())
        await begun.wait()
        assert acknowledged(await tell(port_of(file), MERGE)) == ("AA", "1")
        await heeded(application, 1)
        go.set()
        assert await reloading
    assert told == ["<LiveIdentities 2 services>"]


async def test_notices_over_tls(tmp_path: Path, log_watch: LogWatch) -> None:
    """With a certificate configured, plain TCP is not spoken."""
    certificate = authority().certificate_file(tmp_path)
    file = listening(tmp_path, tls={"certificate_file": str(certificate)})
    async with running(file):
        assert await tell(port_of(file), MERGE) == ""
        theirs = await asyncio.to_thread(calling, tmp_path)
        assert acknowledged(await tell(port_of(file), MERGE, theirs)) == ("AA", "1")
    (line,) = log_watch.named("mllp_connection_closed")
    assert line["reason"] == "tls"
