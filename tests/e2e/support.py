"""The proxy as a user runs it, and small helpers that read what came out of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydicom import Dataset

from tests.peers import dcmtk
from tests.peers.dcmtk import Keys, ScuResult, StoreScp
from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.workstation import Received

DEADLINE_SECONDS: Final = 120.0
PATIENCE: Final = "60s"
"""For whatever may be slow because the machine is, and not because a test wants it so."""
PROXY_TITLE: Final = "DICOMPROXY"

Contents = dict[str, tuple[str, bytes]]
"""By SOP Instance UID: transfer syntax, and the data set's bytes."""


class ProxyFailed(RuntimeError):
    """The proxy did not start, or ended by itself; its log says why."""


def configuration(
    directory: Path,
    *,
    pacs: tuple[str, str, int],
    sources: Mapping[str, tuple[str, str, int]],
    workstations: Iterable[Node | Mapping[str, Any]] = (),
    port: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """Return a configuration as it stands in the file.

    Deadlines for peers that are well are long: a test about one sets its own.

    Args:
        pacs: the local one.
        sources: nodes by name.
        more: by section, keys that are added; a source's by its name; a list as it is.
    """
    patient = {"connect_timeout": PATIENCE, "query_timeout": PATIENCE}
    entries = [
        {
            "query_budget": PATIENCE,
            **(
                entry
                if isinstance(entry, Mapping)
                else {"ae_title": entry.ae_title, "host": entry.host, "port": entry.port}
            ),
        }
        for entry in workstations
    ]
    made: dict[str, Any] = {
        "proxy": {
            "ae_title": PROXY_TITLE,
            "host": "127.0.0.1",
            "port": port or free_port(),
            "shutdown_grace": "5s",
        },
        "local": {**dict(zip(("ae_title", "host", "port"), pacs, strict=True)), **patient},
        "workstations": entries,
        "sources": [
            {
                "name": name,
                "type": "dimse",
                **dict(zip(("ae_title", "host", "port"), node, strict=True)),
                **patient,
                **more.pop(name, {}),
            }
            for name, node in sources.items()
        ],
        "cache": {"directory": str(directory / "cache"), "max_size": "10GB", "min_free": "0B"},
        "web": {"host": "127.0.0.1", "port": free_port()},
    }
    for section, keys in more.items():
        made[section] = {**made.get(section, {}), **keys} if isinstance(keys, Mapping) else keys
    return made


class Proxy:
    """One ``dicomproxy serve`` process; its log is in a file of its own."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        self.config = directory / "dicomproxy.yaml"
        self.log_path = directory / "dicomproxy.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.program = [sys.executable, "-m", "dicomproxy"]
        self.write()

    @property
    def port(self) -> int:
        return int(self.settings["proxy"]["port"])

    @property
    def node(self) -> Node:
        return Node(PROXY_TITLE, "127.0.0.1", self.port)

    @property
    def cache_directory(self) -> Path:
        return Path(self.settings["cache"]["directory"])

    def write(self) -> None:
        """Write the file anew from ``settings``."""
        self.config.write_text(yaml.safe_dump(self.settings), encoding="utf-8")

    # ---------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Start it and wait until it accepts associations."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )
        await self.until(lambda: self.http("/health/ready")[0] == 200, "ready")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Wait for its end; the exit code."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, seconds)

    async def stop(self) -> int:
        """End it by SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.running and self.process is not None:
            self.process.kill()
            self.process.wait()

    async def until(
        self, condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS
    ) -> None:
        """Poll until *condition* holds.

        Raises:
            ProxyFailed: the proxy ended, or *seconds* passed.
        """
        deadline = time.monotonic() + seconds
        while not await asyncio.to_thread(condition):
            if not self.running:
                raise ProxyFailed(f"not {what}: it has ended, events {self.events()[-5:]}")
            if time.monotonic() > deadline:
                raise ProxyFailed(f"not {what} in {seconds:g} s, events {self.events()[-5:]}")
            await asyncio.sleep(0.02)

    async def command(self, *arguments: str, seconds: float = 120.0) -> tuple[int, str]:
        """Run another ``dicomproxy`` command; exit code and merged output."""
        return await command(*arguments, directory=self.directory, seconds=seconds)

    # ----------------------------------------------------------- asked by DCMTK

    async def findscu(
        self, keys: Keys, *, calling: str = "READING1", called: str = PROXY_TITLE, **more: Any
    ) -> ScuResult:
        return await dcmtk.findscu(self.port, keys, calling=calling, called=called, **more)

    async def movescu(
        self,
        keys: Keys,
        destination: str = "READING1",
        *,
        calling: str = "READING1",
        called: str = PROXY_TITLE,
        **more: Any,
    ) -> ScuResult:
        return await dcmtk.movescu(
            self.port, keys, destination, calling=calling, called=called, **more
        )

    # --------------------------------------------------------- what it tells

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def lines(self) -> list[dict[str, Any]]:
        """Return every line of the log, decoded; each must be one JSON object."""
        text = self.log
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines()]

    def events(self) -> list[str]:
        try:
            return [str(line["event"]) for line in self.lines()]
        except ValueError:
            return [self.log[-2000:]]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == event]

    def audit(self) -> list[dict[str, Any]]:
        """Return every record of the audit file."""
        path = self.cache_directory / "state" / "audit.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def http(self, path: str) -> tuple[int, str]:
        """GET *path*; status and body, 0 where nobody listens."""
        url = f"http://127.0.0.1:{self.settings['web']['port']}{path}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=30) as answer:
                return answer.status, answer.read().decode("utf-8")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode("utf-8")
        except OSError:
            return 0, ""

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry *labels*."""
        _, page = await asyncio.to_thread(self.http, "/metrics")
        total = 0.0
        for line in page.splitlines():
            found = re.fullmatch(rf"{name}(\{{(.*)\}})? ([0-9.e+-]+)", line)
            if found and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(found.group(3))
        return total

    def retrieves_running(self) -> int:
        """Count the retrieves under way; from another thread than the loop's."""
        prefix = 'dicomproxy_operations_running{kind="retrieve"} '
        lines = self.http("/metrics")[1].splitlines()
        return sum(int(float(one[len(prefix) :])) for one in lines if one.startswith(prefix))

    async def fetched(self) -> int:
        """Count the instances fetched from sources since the start."""
        return int(await self.metric("dicomproxy_instances_fetched_total"))

    def peak_bytes(self) -> int:
        """Return the largest resident memory it had so far."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found.group(1)) * 1024


async def command(*arguments: str, directory: Path, seconds: float = 120.0) -> tuple[int, str]:
    """Run a ``dicomproxy`` command to its end; exit code and merged output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "dicomproxy",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
        env={**os.environ, "COLUMNS": "200"},
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
    return process.returncode, output.decode("utf-8")


# --------------------------------------------------------------- what arrived


def file_contents(path: Path) -> tuple[str, str, bytes]:
    """Return SOP Instance UID, transfer syntax and the data set's bytes of a Part 10 file.

    Read by hand: what is compared must not have gone through a parser.
    """
    content = path.read_bytes()
    assert content[128:132] == b"DICM"
    end = 144 + int.from_bytes(content[140:144], "little")
    found = {}
    at = 144
    while at < end:
        element = int.from_bytes(content[at + 2 : at + 4], "little")
        long = content[at + 4 : at + 6] in (b"OB", b"UN")
        head = 12 if long else 8
        length = int.from_bytes(content[at + head - (4 if long else 2) : at + head], "little")
        found[element] = content[at + head : at + head + length]
        at += head + length
    uid, syntax = (found[number].rstrip(b"\0 ").decode("ascii") for number in (0x0003, 0x0010))
    return uid, syntax, content[end:]


def collect(storescp: StoreScp) -> Contents:
    """Return what *storescp* received since the last call; nothing twice."""
    got: Contents = {}
    for path in storescp.files():
        uid, syntax, data = file_contents(path)
        assert uid not in got
        got[uid] = syntax, data
        path.unlink()
    return got


def received(arrived: Iterable[Received]) -> Contents:
    """Return what a pynetdicom workstation received; nothing twice."""
    got: Contents = {}
    for one in arrived:
        assert one.sop_instance_uid not in got
        got[one.sop_instance_uid] = one.transfer_syntax_uid, one.data_set
    return got


def a_study(uid: str) -> dict[str, str]:
    """Name one study, or several separated by backslashes, in a request of DCMTK's."""
    return {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": uid}


def identifier(level: str, **keys: Any) -> Dataset:
    """Build a request's identifier."""
    made = Dataset()
    made.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(made, keyword, value)
    return made


def uids(instances: Iterable[Dataset]) -> list[str]:
    """Return their SOP Instance UIDs, sorted."""
    return sorted(str(one.SOPInstanceUID) for one in instances)
