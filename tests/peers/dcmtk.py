"""DCMTK's programs: SCUs as functions, SCPs as context managers."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset

from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.process import PeerFailed, PeerProcess, listening, require, run_program

Keys = Mapping[str, str]
"""Keyword or ``gggg,eeee`` to value; an empty value asks for the attribute."""

_STATUS = re.compile(r"DIMSE Status\s+: 0x([0-9a-f]{4})")
_ECHO_STATUS = re.compile(r"Received Echo Response \((?:(Success)|.*0x([0-9a-fA-F]{4})|.*)\)")
_COUNT = re.compile(r"(Remaining|Completed|Failed|Warning) Suboperations\s+: (\d+|none)")
_NAMES = {
    "Remaining": "remaining",
    "Completed": "completed",
    "Failed": "failed",
    "Warning": "warning",
}


@dataclass(frozen=True, slots=True)
class Response:
    """One DIMSE response as DCMTK printed it; a count it did not carry is None."""

    status: int
    remaining: int | None = None
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None

    @property
    def pending(self) -> bool:
        return self.status in (0xFF00, 0xFF01)


@dataclass(frozen=True, slots=True)
class ScuResult:
    """What one run of an SCU came to.

    ``output`` is everything it printed and may hold patient values, so it is
    for looking into, not for printing.
    """

    exit_code: int
    responses: tuple[Response, ...]
    datasets: tuple[Dataset, ...] = field(repr=False, default=())
    output: str = field(repr=False, default="")

    @property
    def final(self) -> Response:
        """The last response.

        Raises:
            PeerFailed: there was none, since the association came to nothing.
        """
        if not self.responses:
            raise PeerFailed("no response came")
        return self.responses[-1]

    @property
    def rejected(self) -> bool:
        return "Association Rejected" in self.output

    @property
    def aborted(self) -> bool:
        return "Association Aborted" in self.output or "Peer aborted Association" in self.output


async def echoscu(
    port: int,
    *,
    calling: str = "ECHOSCU",
    called: str = "ANY-SCP",
    options: Sequence[str] = (),
    seconds: float = 120.0,
) -> ScuResult:
    """Verify a peer with C-ECHO."""
    return await _scu("echoscu", port, calling, called, [], options, [], seconds)


async def findscu(
    port: int,
    keys: Keys,
    *,
    root: str = "-S",
    calling: str = "FINDSCU",
    called: str = "ANY-SCP",
    options: Sequence[str] = (),
    seconds: float = 120.0,
) -> ScuResult:
    """Ask for matches; they are the result's ``datasets``.

    Args:
        root: ``-S`` Study Root, ``-P`` Patient Root, ``-W`` modality worklist.
    """
    arguments = [root, *_keys(keys), "-X"]
    return await _scu("findscu", port, calling, called, arguments, options, [], seconds)


async def movescu(
    port: int,
    keys: Keys,
    destination: str,
    *,
    root: str = "-S",
    calling: str = "MOVESCU",
    called: str = "ANY-SCP",
    options: Sequence[str] = (),
    seconds: float = 120.0,
) -> ScuResult:
    """Have a study sent to *destination* (an AE title)."""
    arguments = [root, *_keys(keys), "-aem", destination]
    return await _scu("movescu", port, calling, called, arguments, options, [], seconds)


async def getscu(
    port: int,
    keys: Keys,
    *,
    root: str = "-S",
    calling: str = "GETSCU",
    called: str = "ANY-SCP",
    options: Sequence[str] = (),
    seconds: float = 120.0,
) -> ScuResult:
    """Retrieve over the same association; instances are the result's ``datasets``."""
    arguments = [root, *_keys(keys), "+B"]
    return await _scu("getscu", port, calling, called, arguments, options, [], seconds)


async def storescu(
    port: int,
    instances: Iterable[bytes | Path],
    *,
    calling: str = "STORESCU",
    called: str = "ANY-SCP",
    options: Sequence[str] = (),
    seconds: float = 120.0,
) -> ScuResult:
    """Send Part 10 files as they are: one proposal for each syntax that occurs."""
    arguments = ["-R"]
    return await _scu("storescu", port, calling, called, arguments, options, instances, seconds)


def _keys(keys: Keys) -> list[str]:
    return [part for name, value in keys.items() for part in ("-k", f"{name}={value}")]


async def _scu(
    program: str,
    port: int,
    calling: str,
    called: str,
    arguments: Sequence[str],
    options: Sequence[str],
    instances: Iterable[bytes | Path],
    seconds: float,
) -> ScuResult:
    path = require(program)
    with tempfile.TemporaryDirectory(prefix=f"{program}-") as name:
        directory = Path(name)
        sent = [
            _as_file(instance, directory / f"send{number:05d}.dcm")
            for number, instance in enumerate(instances)
        ]
        received = directory / "received"
        received.mkdir()
        # -d prints every response in full: statuses and counts are read from it.
        command = [path, "-d", "-aet", calling, "-aec", called, *arguments, *options]
        command += ["127.0.0.1", str(port), *map(str, sent)]
        exit_code, output = await run_program(command, received, seconds)
        datasets = await asyncio.to_thread(_read_all, received)
    return ScuResult(exit_code, _responses(output), datasets, output)


def _as_file(instance: bytes | Path, path: Path) -> Path:
    if isinstance(instance, Path):
        return instance
    path.write_bytes(instance)
    return path


def _read_all(directory: Path) -> tuple[FileDataset, ...]:
    return tuple(dcmread(path, force=True) for path in sorted(directory.iterdir()))


def _responses(output: str) -> tuple[Response, ...]:
    """Read the responses from debug output; counts stand above the status they belong to."""
    responses: list[Response] = []
    counts: dict[str, int | None] = {}
    for line in output.splitlines():
        if count := _COUNT.search(line):
            value = count.group(2)
            counts[_NAMES[count.group(1)]] = None if value == "none" else int(value)
        elif status := _STATUS.search(line):
            responses.append(Response(int(status.group(1), 16), **counts))
            counts = {}
        elif echo := _ECHO_STATUS.search(line):
            # echoscu names the status; those it has words for are refusals.
            code = "0000" if echo.group(1) else echo.group(2) or "0122"
            responses.append(Response(int(code, 16)))
    return tuple(responses)


class _Scp(ABC):
    """A DCMTK server process in a directory of its own."""

    program = ""

    def __init__(self, ae_title: str) -> None:
        self._path = require(self.program)
        self.ae_title = ae_title
        self.host = "127.0.0.1"
        self.port = 0
        self._temporary = tempfile.TemporaryDirectory(prefix=f"{self.program}-")
        self.directory = Path(self._temporary.name)
        self._process: PeerProcess | None = None

    @property
    def node(self) -> Node:
        return Node(self.ae_title, self.host, self.port)

    @property
    def log(self) -> str:
        """What the process has printed so far; may hold patient values."""
        return self._running.log.read_text(encoding="latin-1")

    async def __aenter__(self) -> Self:
        try:
            await self._prepare()
            await asyncio.to_thread(self.start)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _prepare(self) -> None:  # noqa: B027  (most programs need nothing)
        """Do what must be done once before the program starts."""

    async def __aexit__(self, *_: object) -> None:
        if self._process:
            await asyncio.to_thread(self._process.kill)
        await asyncio.to_thread(self._temporary.cleanup)

    def start(self) -> None:
        """Start, on another port where the chosen one was taken meanwhile."""
        for _ in range(5):
            self.port = self.port or free_port()
            log = self.directory / f"{self.program}.log"
            self._process = PeerProcess([self._path, *self.arguments()], log, self.directory)
            if self._process.wait_ready(lambda: listening(self.port)):
                return
            self._process.kill()
            self.port = 0
        raise PeerFailed(f"{self.program} does not start")

    @abstractmethod
    def arguments(self) -> list[str]:
        """Return what the program is started with."""

    def kill(self) -> None:
        """End at once; :meth:`start` brings it back on the same port."""
        self._running.kill()

    def pause(self) -> None:
        """Fall silent with every connection open."""
        self._running.pause()

    def resume(self) -> None:
        self._running.resume()

    @property
    def _running(self) -> PeerProcess:
        if self._process is None:
            raise PeerFailed(f"{self.program} was not started")
        return self._process


class StoreScp(_Scp):
    """storescp as a workstation: takes every SOP Class and syntax, keeps bytes as received.

    Args:
        ae_title: its AE title (it answers to any).
        options: further options, such as ``--sleep-during 1`` or ``--abort-after``.
        syntaxes: which transfer syntaxes it takes; ``+xi`` is Implicit VR LE alone.
    """

    program = "storescp"

    def __init__(
        self, ae_title: str, *, options: Sequence[str] = (), syntaxes: str = "+xa"
    ) -> None:
        super().__init__(ae_title)
        self._options = list(options)
        self._syntaxes = syntaxes
        self.received = self.directory / "received"
        self.received.mkdir()

    def arguments(self) -> list[str]:
        arguments = ["-v", "-aet", self.ae_title, self._syntaxes, "-pm", "+B"]
        return [*arguments, *self._options, "-od", str(self.received), str(self.port)]

    def files(self) -> list[Path]:
        """Return what arrived, as Part 10 files."""
        return sorted(path for path in self.received.iterdir() if path.is_file())

    def datasets(self) -> list[FileDataset]:
        """Return what arrived, decoded."""
        return [dcmread(path, force=True) for path in self.files()]


class Dcmqrscp(_Scp):
    """dcmqrscp as an archive: C-FIND, C-MOVE, C-GET and C-STORE over files and an index.

    Args:
        ae_title: its AE title, also that of its one storage area.
        destinations: AE title, host and port of every C-MOVE destination.
        instances: Part 10 files that it holds from the start.
        options: further options; ``-xv`` and ``+xv``, for one, have it send and take
            JPEG 2000 lossless too, which by default it does not.
    """

    program = "dcmqrscp"

    def __init__(
        self,
        ae_title: str,
        destinations: Iterable[tuple[str, str, int]] = (),
        *,
        instances: Iterable[bytes | Path] = (),
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(ae_title)
        self._indexer = require("dcmqridx")
        self._destinations = list(destinations)
        self._instances = list(instances)
        self._options = list(options)
        self.storage = self.directory / "storage"
        self.storage.mkdir()

    async def _prepare(self) -> None:
        files = [
            self._keep(instance, self.storage / f"held{number:05d}.dcm")
            for number, instance in enumerate(self._instances)
        ]
        for first in range(0, len(files), 500):
            names = [str(path) for path in files[first : first + 500]]
            command = [self._indexer, "-q", str(self.storage), *names]
            exit_code, _ = await run_program(command, self.directory, 60.0)
            if exit_code:
                raise PeerFailed("dcmqridx could not index the instances")

    def arguments(self) -> list[str]:
        configuration = self.directory / "dcmqrscp.cfg"
        lines = ["MaxPDUSize = 65536", "MaxAssociations = 32", "HostTable BEGIN"]
        lines += [
            f"host{number} = ({ae_title}, {host}, {port})"
            for number, (ae_title, host, port) in enumerate(self._destinations)
        ]
        lines += ["HostTable END", "VendorTable BEGIN", "VendorTable END", "AETable BEGIN"]
        lines += [f"{self.ae_title} {self.storage} RW (1000, 10gb) ANY", "AETable END", ""]
        configuration.write_text("\n".join(lines), encoding="ascii")
        return ["-v", "-dhl", "-c", str(configuration), *self._options, str(self.port)]

    def _keep(self, instance: bytes | Path, path: Path) -> Path:
        if isinstance(instance, Path):
            shutil.copyfile(instance, path)
        else:
            path.write_bytes(instance)
        return path
