"""Peers that are programs: finding, starting, watching and ending them.

Everything here works from any event loop or none: a peer may live as long as a
module's fixture while each test has a loop of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

_PACKAGES = {
    "Orthanc": "orthanc",
    "dciodvfy": "dicom3tools",
    "dcmqridx": "dcmtk",
    "dcmqrscp": "dcmtk",
    "echoscu": "dcmtk",
    "findscu": "dcmtk",
    "getscu": "dcmtk",
    "movescu": "dcmtk",
    "storescp": "dcmtk",
    "storescu": "dcmtk",
}

_running: set[subprocess.Popen[bytes]] = set()


class PeerFailed(RuntimeError):
    """A peer did not start, or ended by itself."""


def find_program(name: str) -> str | None:
    """Return where *name* is installed; daemons live outside an ordinary PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def require(name: str) -> str:
    """Return the path of a peer's program; without it skip the test, or fail under CI=true."""
    found = find_program(name)
    if found:
        return found
    package = _PACKAGES.get(name, name)
    hint = f"{name} is not installed (Debian: apt-get install {package})"
    if os.environ.get("CI") == "true":
        pytest.fail(hint)
    pytest.skip(hint)


@atexit.register
def _end_all() -> None:
    for process in list(_running):
        _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The peer leads a session of its own, so its forked children go with it.
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


class PeerProcess:
    """One running program with its output in a file.

    Args:
        command: program and arguments.
        log: where both output streams go.
        directory: working directory.
    """

    def __init__(self, command: Sequence[str], log: Path, directory: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                start_new_session=True,
            )
        _running.add(self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, ready: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Poll until *ready*; False if the program ended first.

        Raises:
            PeerFailed: still not ready after *seconds*.
        """
        deadline = time.monotonic() + seconds
        while self.alive:
            if ready():
                return True
            if time.monotonic() > deadline:
                self.kill()
                raise PeerFailed(f"{self.log.name}: not ready after {seconds:g} s")
            time.sleep(0.02)
        return False

    def pause(self) -> None:
        """Stop the program where it is: its connections stay open and silent."""
        _signal_group(self._process, signal.SIGSTOP)

    def resume(self) -> None:
        _signal_group(self._process, signal.SIGCONT)

    def stop(self, seconds: float = 5.0) -> None:
        """Ask it to end; kill it if it does not."""
        if self.alive:
            _signal_group(self._process, signal.SIGCONT)
            _signal_group(self._process, signal.SIGTERM)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """End it at once, with connections cut rather than closed in order."""
        _signal_group(self._process, signal.SIGKILL)
        self._process.wait()
        _running.discard(self._process)


def listening(port: int) -> bool:
    """Tell whether something accepts connections on *port* of the loopback interface."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


async def run_program(command: Sequence[str], directory: Path, seconds: float) -> tuple[int, str]:
    """Run a program to its end; return exit code and merged output.

    It is killed when *seconds* have passed or when the caller is cancelled.

    Raises:
        TimeoutError: it did not end in time.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode("latin-1")
