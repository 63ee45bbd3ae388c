"""The proxy as a whole in one process: it starts in order or not at all, drains, and reloads."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicomproxy import __version__
from dicomproxy import app as app_module
from dicomproxy.app import Application
from dicomproxy.cache.layout import CacheLocked
from dicomproxy.cli.main import main
from dicomproxy.config import load
from dicomproxy.dimse.association import Association
from dicomproxy.dimse.command import CommandField, request
from dicomproxy.dimse.errors import AssociationError, AssociationRejected
from dicomproxy.dimse.layer import Proposal, Target, UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.dimse.negotiation import UNCOMPRESSED
from dicomproxy.dimse.operations import VERIFICATION
from dicomproxy.dimse.pdu import REJECT_CALLING, REJECT_CONGESTION
from dicomproxy.snapshot import snapshot
from tests.e2e.support import configuration
from tests.peers.ports import free_port
from tests.support.log_watch import LogWatch

SECONDS = 60.0
WORKSTATION = {"ae_title": "READING1"}
OTHER = {"ae_title": "READING2"}


class File:
    """A configuration file, written anew as a test goes."""

    def __init__(self, directory: Path, **more: Mapping[str, Any]) -> None:
        self.path = directory / "dicomproxy.yaml"
        self.content = configuration(
            directory,
            pacs=("LOCALPACS", "127.0.0.1", free_port()),
            sources={"north": ("NORTHPACS", "127.0.0.1", free_port())},
            workstations=[WORKSTATION],
            **more,
        )
        self.write()

    def write(self) -> None:
        self.path.write_text(yaml.safe_dump(self.content), encoding="utf-8")

    @property
    def port(self) -> int:
        return int(self.content["proxy"]["port"])

    @property
    def web_port(self) -> int:
        return int(self.content["web"]["port"])

    async def application(self) -> Application:
        return Application(await asyncio.to_thread(load, self.path), self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


@pytest.fixture(autouse=True)
def configured_logs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Keep logs where the tests read them; give what the proxy would have configured."""
    configured: list[tuple[str, ...]] = []
    monkeypatch.setattr(app_module.logs, "configure", lambda *given: configured.append(given))
    monkeypatch.setattr(app_module.logs, "claim_output", lambda: None)
    return configured


@asynccontextmanager
async def running(file: File) -> AsyncIterator[Application]:
    application = await file.application()
    async with asyncio.timeout(SECONDS):
        await application.start()
    try:
        yield application
    finally:
        async with asyncio.timeout(SECONDS):
            await application.close()


def get(port: int, path: str) -> tuple[int, str]:
    """GET *path*; status 0 where nobody listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode("utf-8")
    except OSError:
        return 0, ""


async def http(port: int, path: str = "/health/ready") -> int:
    return (await asyncio.to_thread(get, port, path))[0]


async def associate(file: File, calling: str = "READING1") -> Association:
    target = Target("127.0.0.1", file.port, "DICOMPROXY", calling)
    return await UpperLayer().request(target, Proposal(((VERIFICATION, UNCOMPRESSED),)))


async def echo(association: Association) -> int:
    command = request(CommandField.C_ECHO_RQ, VERIFICATION, 1, data_set=False)
    await association.send(association.context_for(VERIFICATION), command)
    return (await association.receive(SECONDS)).command.status


async def settled(condition: Callable[[], bool]) -> None:
    """Let other threads and the loop go on until *condition* holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  (what it reads has no event)
            await asyncio.sleep(0.005)


@contextmanager
def taken(port: int) -> Iterator[None]:
    """Have somebody else listen on *port*."""
    with socket.create_server(("127.0.0.1", port)):
        yield


# ------------------------------------------------------------------- start, stop


async def test_started_proxy_serves_and_stopped_one_leaves_nothing(
    file: File, log_watch: LogWatch
) -> None:
    """DICOM and HTTP answer between start and close, and never after; threads end too."""
    threads = set(threading.enumerate())
    async with running(file) as application:
        assert application.ready
        assert await http(file.web_port) == 200
        association = await associate(file)
        assert await echo(association) == 0x0000
        shown = snapshot(application)
        assert (shown.ready, shown.associations) == (True, 1)
        assert shown.address == f"127.0.0.1:{file.port}"
        assert [source.name for source in shown.sources] == ["local", "north"]
    assert await http(file.web_port) == 0
    await association.wait_closed()
    with pytest.raises(AssociationError):
        await associate(file)
    left = {one for one in threading.enumerate() if not one.name.startswith("asyncio_")}
    assert left <= threads
    (line,) = log_watch.named("started")
    assert (line["port"], line["sources"], line["version"]) == (file.port, ["north"], __version__)
    assert log_watch.entries[-1]["event"] == "stopped"


async def test_same_directory_serves_again(file: File) -> None:
    """What was stopped gave back its ports, its files and its lock."""
    for _ in range(2):
        async with running(file):
            assert await http(file.web_port) == 200


async def test_ready_only_once_associations_are_accepted(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last thing starts, the process is alive and says that it is not ready."""
    begun, go = asyncio.Event(), asyncio.Event()
    original = Listener.start

    async def start(self: Listener, host: str, port: int) -> int:
        begun.set()
        await go.wait()
        return await original(self, host, port)

    monkeypatch.setattr(Listener, "start", start)
    application = await file.application()
    starting = asyncio.create_task(application.start())
    await begun.wait()
    assert await http(file.web_port, "/health/live") == 200
    assert await http(file.web_port) == 503
    assert await http(file.web_port, "/") == 200
    go.set()
    await starting
    assert await http(file.web_port) == 200
    await application.close()


async def test_cancelled_start_leaves_nothing(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is given up half way is taken back."""
    begun = asyncio.Event()

    async def start(self: Listener, host: str, port: int) -> int:
        begun.set()
        await asyncio.Event().wait()
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(Listener, "start", start)
        application = await file.application()
        starting = asyncio.create_task(application.start())
        await begun.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert await http(file.web_port) == 0
    async with running(file):
        assert await http(file.web_port) == 200


@pytest.mark.parametrize("obstacle", ["dicom_port", "web_port", "cache", "state", "audit"])
async def test_start_that_fails_is_taken_back(file: File, tmp_path: Path, obstacle: str) -> None:
    """Whatever is in the way: an error, nothing left running, and a start once it is gone."""
    threads = set(threading.enumerate())
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a directory should be")
    content = file.content
    if obstacle in ("dicom_port", "web_port"):
        port = file.port if obstacle == "dicom_port" else file.web_port
        with taken(port), pytest.raises(OSError):
            await (await file.application()).start()
    else:
        sections = {
            "cache": ("cache", "directory", blocked / "cache"),
            "state": ("state", "directory", blocked / "state"),
            "audit": ("audit", "file", blocked / "audit.jsonl"),
        }
        section, key, path = sections[obstacle]
        before = dict(content.get(section, {}))
        content[section] = {**before, key: str(path)}
        file.write()
        with pytest.raises(OSError):
            await (await file.application()).start()
        content[section] = before
        file.write()
    assert await http(file.web_port) == 0
    left = {one for one in threading.enumerate() if not one.name.startswith("asyncio_")}
    assert left <= threads
    async with running(file):
        assert await http(file.web_port) == 200


async def test_cache_of_another_proxy_is_left_alone(file: File, tmp_path: Path) -> None:
    """Two proxies on one directory: the second does not start, the first goes on."""
    other = tmp_path / "other"
    other.mkdir()
    second = File(other)
    second.content["cache"] = file.content["cache"]
    second.write()
    async with running(file):
        with pytest.raises(CacheLocked):
            await (await second.application()).start()
        assert await http(second.web_port) == 0
        assert await http(file.web_port) == 200


# ------------------------------------------------------------------------- drain


async def test_draining_waits_for_what_is_under_way(file: File) -> None:
    """Not ready, no new associations but existing ones served, until the last operation ends."""
    async with running(file) as application:
        standing = await associate(file)
        operation = application.operations.begin(
            "retrieve", association_id="a", caller_ae_title="READING1", peer_address="127.0.0.1"
        )
        draining = asyncio.create_task(application.drain())
        await settled(lambda: application.draining)
        assert await http(file.web_port) == 503
        assert await http(file.web_port, "/health/live") == 200
        with pytest.raises(AssociationRejected) as caught:
            await associate(file)
        assert caught.value.rejection == REJECT_CONGESTION
        assert await echo(standing) == 0x0000
        assert not draining.done()
        application.operations.end(operation, 0x0000)
        async with asyncio.timeout(SECONDS):
            await draining
        assert not operation.cancelled


@pytest.mark.parametrize("obeys", [True, False])
async def test_draining_does_not_wait_for_ever(
    tmp_path: Path, log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch, obeys: bool
) -> None:
    """After the grace period everything is cancelled; what does not end then is left behind."""
    monkeypatch.setattr(app_module, "_CANCEL_SECONDS", 0.05)
    file = File(tmp_path, proxy={"shutdown_grace": "0s"})
    async with running(file) as application:
        operation = application.operations.begin(
            "retrieve", association_id="a", caller_ae_title="READING1", peer_address="127.0.0.1"
        )
        if obeys:
            operation.cancel = lambda: application.operations.end(operation, 0xFE00)
        async with asyncio.timeout(SECONDS):
            await application.drain()
        assert operation.cancelled
        application.operations.end(operation, None)
    assert len(log_watch.named("draining_cancelled")) == 1
    assert len(log_watch.named("draining_aborted")) == (0 if obeys else 1)


async def test_second_signal_ends_the_grace_period(tmp_path: Path) -> None:
    """Who asks twice means it: what is under way is cancelled at once."""
    file = File(tmp_path, proxy={"shutdown_grace": "600s"})
    application = await file.application()
    await application.start()
    running_ = asyncio.create_task(application.run())
    operation = application.operations.begin(
        "retrieve", association_id="a", caller_ae_title="READING1", peer_address="127.0.0.1"
    )
    operation.cancel = lambda: application.operations.end(operation, 0xFE00)
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await settled(lambda: application.draining)
    assert not operation.cancelled
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(SECONDS):
        await running_
    assert operation.cancelled
    assert await http(file.web_port) == 0


# ------------------------------------------------------------------------ reload


async def test_reload_admits_a_new_workstation_and_keeps_what_stands(
    file: File, log_watch: LogWatch, configured_logs: list[tuple[str, ...]]
) -> None:
    """New associations follow the new file, those that stand go on, until nobody uses the old."""
    async with running(file) as application:
        with pytest.raises(AssociationRejected) as caught:
            await associate(file, "READING2")
        assert caught.value.rejection == REJECT_CALLING
        standing = await associate(file)
        old = application.routing
        assert old is not None
        closed = asyncio.Event()
        original = old.close

        async def close() -> None:
            closed.set()
            await original()

        old.close = close  # type: ignore[method-assign]
        file.content["workstations"] = [OTHER]
        file.content["proxy"]["max_associations"] = 7
        file.content["log"] = {"level": "warning"}
        file.write()
        assert await application.reload()
        assert await echo(standing) == 0x0000
        assert await echo(await associate(file, "READING2")) == 0x0000
        with pytest.raises(AssociationRejected):
            await associate(file, "READING1")
        assert snapshot(application).max_associations == 7
        assert not closed.is_set()
        await standing.release(SECONDS)
        async with asyncio.timeout(SECONDS):
            await closed.wait()
    assert len(log_watch.named("reloaded")) == 1
    assert configured_logs == [("warning", "json")]


async def test_bad_file_changes_nothing(file: File, log_watch: LogWatch) -> None:
    """Every fault is logged with its line and key, and the old configuration goes on."""
    async with running(file) as application:
        file.content["workstations"] = [OTHER]
        file.content["proxy"]["prot"] = 11112
        file.content["log"] = {"level": "loud"}
        file.write()
        assert not await application.reload()
        assert await echo(await associate(file)) == 0x0000
        file.path.unlink()
        assert not await application.reload()
    lines = log_watch.named("reload_refused")
    assert {"proxy.prot", "log.level"} <= {line["key"] for line in lines}
    assert all(line["line"] for line in lines[:2])
    assert not log_watch.named("reloaded")


async def test_keys_that_need_a_restart_are_named(file: File, log_watch: LogWatch) -> None:
    """They keep their old values; the rest of the file is followed."""
    async with running(file) as application:
        old_port = file.port
        file.content["proxy"]["port"] = free_port()
        file.content["cache"]["max_size"] = "20GB"
        file.content["workstations"] = [WORKSTATION, OTHER]
        file.write()
        assert await application.reload()
        file.content["proxy"]["port"] = old_port
        assert await echo(await associate(file, "READING2")) == 0x0000
    (line,) = log_watch.named("reload_needs_restart")
    assert line["keys"] == ["proxy.port", "cache"]


async def test_keys_that_need_a_restart_are_named_until_it_comes(
    file: File, log_watch: LogWatch
) -> None:
    """What was started with is what counts, not what the file said at the last reload."""
    async with running(file) as application:
        before = file.content["cache"].get("max_size")
        file.content["cache"]["max_size"] = "20GB"
        file.write()
        assert await application.reload()
        assert await application.reload()
        assert len(log_watch.named("reload_needs_restart")) == 2
        file.content["cache"]["max_size"] = before
        file.write()
        assert await application.reload()
        assert len(log_watch.named("reload_needs_restart")) == 2


async def test_nothing_is_reloaded_while_draining(file: File) -> None:
    """A new configuration would take in the work that is being turned away."""
    async with running(file) as application:
        operation = application.operations.begin(
            "retrieve", association_id="a", caller_ae_title="READING1", peer_address="127.0.0.1"
        )
        draining = asyncio.create_task(application.drain())
        await settled(lambda: application.draining)
        assert not await application.reload()
        with pytest.raises(AssociationRejected):
            await associate(file)
        application.operations.end(operation, 0x0000)
        async with asyncio.timeout(SECONDS):
            await draining


async def test_hangup_reloads(file: File, log_watch: LogWatch) -> None:
    """SIGHUP reads the file again."""
    application = await file.application()
    await application.start()
    running_ = asyncio.create_task(application.run())
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGHUP)
    await settled(lambda: bool(log_watch.named("reloaded")))
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(SECONDS):
        await running_


async def test_tasks_are_logged_when_asked_for(file: File, log_watch: LogWatch) -> None:
    """SIGUSR1 says what the program waits for, and it goes on."""
    application = await file.application()
    await application.start()
    running_ = asyncio.create_task(application.run(), name="main")
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGUSR1)
    await settled(lambda: bool(log_watch.named("task")))
    (line,) = (line for line in log_watch.named("task") if line["task"] == "main")
    assert line["stack"][0].startswith("app.py:run:")
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(SECONDS):
        await running_


# ----------------------------------------------------------------- command line


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have uvloop, or not."""
    if request.param == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    else:
        pytest.importorskip("uvloop")
    return str(request.param)


def test_serve_runs_until_it_is_told_to_stop(
    file: File, loop: str, log_watch: LogWatch, configured_logs: list[tuple[str, ...]]
) -> None:
    """With and without uvloop: ready, then SIGTERM, then 0."""

    def stop() -> None:
        deadline = time.monotonic() + SECONDS
        while get(file.web_port, "/health/ready")[0] != 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(get(file.web_port, "/metrics")[0])
        os.kill(os.getpid(), signal.SIGTERM)

    seen: list[int] = []
    stopping = threading.Thread(target=stop)
    stopping.start()
    assert main(["serve", "--config", str(file.path)]) == 0
    stopping.join()
    assert seen == [200]
    assert [line["mode"] for line in log_watch.named("started")] == [loop]
    assert log_watch.entries[-1]["event"] == "stopped"
    assert configured_logs == [("info", "json")]


@pytest.mark.parametrize("which", ["dicom", "web"])
def test_serve_on_a_port_in_use_fails(
    file: File, loop: str, which: str, log_watch: LogWatch
) -> None:
    """Exit code 1, and a line that says so."""
    with taken(file.port if which == "dicom" else file.web_port):
        assert main(["serve", "--config", str(file.path)]) == 1
    assert [line["error_type"] for line in log_watch.named("start_failed")] == ["OSError"]
    assert not log_watch.named("started")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The name and the number, and 0."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dicomproxy {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["serve"],
        ["serve", "--config"],
        ["check"],
        ["doctor"],
        ["cache"],
        ["cache", "stats"],
        ["cache", "evict", "--config", "x"],
        ["serve", "--config", "x", "--port", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and the usage, on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: dicomproxy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--config"],
        ["doctor", "--config"],
        ["cache", "stats", "--config"],
        ["cache", "list", "--config"],
        ["cache", "verify", "--config"],
        ["cache", "evict", "1.2.3", "--config"],
        ["check"],
    ],
    ids=" ".join,
)
def test_faulty_configuration(
    file: File, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 for every command, with all faults; a file that is not there is one too."""
    file.content["proxy"]["prot"] = 1
    file.content["local"].pop("port")
    file.write()
    assert main([*arguments, str(file.path)]) == 2
    faults = capsys.readouterr().err
    assert "proxy.prot" in faults
    assert "local.port" in faults
    assert main([*arguments, str(file.path) + ".not"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_check_says_what_a_sound_file_comes_to(
    file: File, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 and a summary; nothing is created."""
    assert main(["check", str(file.path)]) == 0
    output = capsys.readouterr().out
    assert "fine" in output
    assert "NORTHPACS" in output
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
