"""Starts and stops the demo's region: archives, the proxy's process, a workstation."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydicom import Dataset

from dicomproxy.demo.content import contents
from dicomproxy.demo.peers import Archive, Node, Workstation

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 15.0
_TITLES: Final = {"local": "LOCALPACS", "north": "NORTHPACS", "south": "SOUTHPACS"}


class DemoFailed(Exception):
    """Something of the demo did not come up, or differs from what was stored."""


class Region:
    """A local archive, two remote ones, the proxy and a workstation.

    Args:
        keep: prefer the usual ports, and admit a workstation of the user's.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.held: dict[str, list[Dataset]] = contents()
        self.archives = {
            origin: Archive(_TITLES[origin], instances) for origin, instances in self.held.items()
        }
        self.workstation = Workstation("READING1")
        self.viewer = Node("VIEWER", "127.0.0.1", 11113)
        self.web = ""
        self.web_port = 0
        self._keep = keep
        self._directory = tempfile.TemporaryDirectory(prefix="dicomproxy-demo-")
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Path = Path(self._directory.name) / "proxy.log"
        self.proxy: Node

    @property
    def log_file(self) -> Path:
        return self._log

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        nodes = {origin: archive.start() for origin, archive in self.archives.items()}
        pairs = {
            (str(one.SOPClassUID), str(one.file_meta.TransferSyntaxUID))
            for instances in self.held.values()
            for one in instances
        }
        reading = self.workstation.start(pairs)
        port = _free_port(11112 if self._keep else 0)
        self.web_port = web_port = _free_port(8080 if self._keep else 0)
        self.proxy = Node("DICOMPROXY", "127.0.0.1", port)
        self.web = f"http://127.0.0.1:{web_port}"
        for archive in self.archives.values():
            archive.destinations = {
                node.ae_title: node for node in (self.proxy, reading, self.viewer)
            }
        configuration = Path(self._directory.name) / "dicomproxy.yaml"
        configuration.write_text(self._yaml(nodes, reading, web_port), encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  (this interpreter, our own module)
                [sys.executable, "-m", "dicomproxy", "serve", "--config", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._wait_ready()
        self.workstation.proxy = self.proxy

    def _yaml(self, nodes: dict[str, Node], reading: Node, web_port: int) -> str:
        def node(one: Node) -> str:
            return f"ae_title: {one.ae_title}, host: {one.host}, port: {one.port}"

        sources = "\n".join(
            f"  - {{name: {origin}, type: dimse, {node(one)}, retrieve: c-move}}"
            for origin, one in nodes.items()
            if origin != "local"
        )
        cache = json.dumps(str(Path(self._directory.name) / "cache"))
        return (
            f"proxy: {{{node(self.proxy)}}}\n"
            f"local: {{{node(nodes['local'])}}}\n"
            f"workstations:\n  - {{{node(reading)}}}\n  - {{{node(self.viewer)}}}\n"
            f"sources:\n{sources}\n"
            f"cache: {{directory: {cache}, max_size: 1GB}}\n"
            f"web: {{host: 127.0.0.1, port: {web_port}}}\n"
            "log: {level: info, format: json}\n"
        )

    def _wait_ready(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if self._process is not None and self._process.poll() is not None:
                break
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.web_port, timeout=2)
                connection.request("GET", "/health/ready")
                if connection.getresponse().status == HTTPStatus.OK:
                    return
            except (http.client.HTTPException, OSError):
                pass  # not listening yet
            time.sleep(0.05)
        raise DemoFailed(f"the proxy did not start:\n{self._log.read_text(encoding='utf-8')}")

    def stop(self) -> int:
        """End everything; return the proxy's exit code, 0 where it never ran."""
        code = 0
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        self.workstation.stop()
        for archive in self.archives.values():
            archive.stop()
        self._directory.cleanup()
        return code


def _free_port(preferred: int) -> int:
    """Return *preferred* if nobody listens on it, else any free port of loopback."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            bound: int = probe.getsockname()[1]
            return bound
    raise DemoFailed("no free port on loopback")
