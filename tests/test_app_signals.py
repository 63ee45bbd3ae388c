"""A signal that comes before the proxy has started, and one while it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dicomproxy import app as app_module
from dicomproxy.app import Application
from dicomproxy.cli.main import main
from tests.e2e.support import configuration
from tests.peers.ports import free_port
from tests.support.log_watch import LogWatch

SECONDS = 60.0
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def outliving() -> Iterator[None]:
    """Keep a signal that the proxy does not heed from ending the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in HEEDED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_proxy_told_to_stop_while_it_starts_stops_in_order(
    tmp_path: Path, log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends as soon as it has started, with 0, and leaves nothing half done."""
    monkeypatch.setattr(app_module.logs, "configure", lambda *_: None)
    monkeypatch.setattr(app_module.logs, "claim_output", lambda: None)
    start, unheeded = Application._start, threading.Event()

    async def interrupted(self: Application) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await start(self)

    def tell_again() -> None:
        unheeded.set()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Application, "_start", interrupted)
    file = tmp_path / "dicomproxy.yaml"
    local = ("LOCALPACS", "127.0.0.1", free_port())
    content = configuration(tmp_path, pacs=local, sources={}, workstations=[])
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    watchdog = threading.Timer(SECONDS, tell_again)
    watchdog.start()
    try:
        assert main(["serve", "--config", str(file)]) == 0
    finally:
        watchdog.cancel()
    assert not unheeded.is_set()
    assert log_watch.entries[-1]["event"] == "stopped"


def test_proxy_told_again_while_it_ends_ends_in_order(
    tmp_path: Path, log_watch: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that comes after the first signal ends it halfway, up to its very exit."""
    monkeypatch.setattr(app_module.logs, "configure", lambda *_: None)
    monkeypatch.setattr(app_module.logs, "claim_output", lambda: None)
    start, close, handlers = Application._start, Application.close, set()

    async def told(self: Application) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await start(self)

    async def told_again(self: Application) -> None:
        handlers.update(signal.getsignal(number) for number in HEEDED)
        if signal.SIG_DFL not in handlers:  # else they would end the tests
            for number in HEEDED:
                os.kill(os.getpid(), number)
        await close(self)

    monkeypatch.setattr(Application, "_start", told)
    monkeypatch.setattr(Application, "close", told_again)
    file = tmp_path / "dicomproxy.yaml"
    local = ("LOCALPACS", "127.0.0.1", free_port())
    content = configuration(tmp_path, pacs=local, sources={}, workstations=[])
    file.write_text(yaml.safe_dump(content), encoding="utf-8")

    assert main(["serve", "--config", str(file)]) == 0

    assert signal.SIG_DFL not in handlers
    assert {signal.getsignal(number) for number in HEEDED} == {signal.SIG_IGN}
    assert log_watch.entries[-1]["event"] == "stopped"
