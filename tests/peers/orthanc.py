"""A real Orthanc: a small archive with DICOM and REST, in a directory of its own."""

from __future__ import annotations

import asyncio
import json
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.process import PeerFailed, PeerProcess, require


class Orthanc:
    """One Orthanc process, from ``async with`` to the end of the block.

    It answers whoever asks and delivers to the AE titles in *modalities*.
    Nothing of the system's own configuration or storage is used.

    Args:
        ae_title: its AE title.
        modalities: symbolic name to AE title, host and port; every C-MOVE
            destination must be among them.
        directory: where to keep configuration, storage and log; default a
            temporary directory removed at the end.
        settings: further configuration, which wins.
    """

    def __init__(
        self,
        ae_title: str,
        modalities: Mapping[str, tuple[str, str, int]] | None = None,
        *,
        directory: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._program = require("Orthanc")
        self.ae_title = ae_title
        self.host = "127.0.0.1"
        self.port = 0
        self.http_port = 0
        self._modalities = dict(modalities or {})
        self._settings = dict(settings or {})
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="orthanc-")
        self.directory = directory or Path(self._temporary.name if self._temporary else ".")
        self._process: PeerProcess | None = None

    # ------------------------------------------------------------- lifetime

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._temporary is None:
            await self.stop()
            return
        # An orderly end takes seconds, and nothing is kept.
        if self._process:
            await asyncio.to_thread(self._process.kill)
        await asyncio.to_thread(self._temporary.cleanup)

    async def start(self) -> None:
        """Start on free ports (the same ones again after a stop) and wait for readiness."""
        await asyncio.to_thread(self._start)

    async def stop(self) -> None:
        """End in order; what was stored is there again after the next start."""
        if self._process:
            await asyncio.to_thread(self._process.stop)

    def kill(self) -> None:
        """End at once, in the middle of whatever is under way."""
        self._running.kill()

    def pause(self) -> None:
        """Fall silent with every connection open."""
        self._running.pause()

    def resume(self) -> None:
        self._running.resume()

    @property
    def node(self) -> Node:
        return Node(self.ae_title, self.host, self.port)

    @property
    def log(self) -> str:
        """What the process has printed so far; may hold patient values."""
        return self._running.log.read_text(encoding="utf-8", errors="replace")

    @property
    def _running(self) -> PeerProcess:
        if self._process is None:
            raise PeerFailed("Orthanc was not started")
        return self._process

    def _start(self) -> None:
        for _ in range(5):
            if not self.port:
                self.port, self.http_port = free_port(), free_port()
            self._process = PeerProcess(
                [self._program, "--verbose", str(self._write_configuration())],
                self.directory / "orthanc.log",
                self.directory,
            )
            if self._process.wait_ready(self._ready):
                return
            self._process.kill()
            self.port = 0  # most likely taken meanwhile; the log knows otherwise
        raise PeerFailed(f"Orthanc does not start, see {self._running.log.name}")

    def _ready(self) -> bool:
        try:
            return bool(self._request("GET", "/system")["DicomPort"] == self.port)
        except (OSError, ValueError, KeyError):
            return False

    def _write_configuration(self) -> Path:
        storage = self.directory / "storage"
        storage.mkdir(exist_ok=True)
        configuration: dict[str, Any] = {
            "Name": self.ae_title,
            "StorageDirectory": str(storage),
            "IndexDirectory": str(storage),
            "Plugins": [],
            "HttpServerEnabled": True,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomServerEnabled": True,
            "DicomAet": self.ae_title,
            "DicomPort": self.port,
            "DicomCheckCalledAet": False,
            "DicomCheckModalityHost": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
            "DicomModalitiesInDatabase": False,
            "DicomModalities": {
                name: {
                    "AET": ae_title,
                    "Host": host,
                    "Port": port,
                    "AllowEcho": True,
                    "AllowFind": True,
                    "AllowGet": True,
                    "AllowMove": True,
                    "AllowStore": True,
                }
                for name, (ae_title, host, port) in self._modalities.items()
            },
            "UnknownSopClassAccepted": True,
            "OverwriteInstances": False,
            "StableAge": 1,
            "SaveJobs": False,
            "JobsHistorySize": 1000,
            "StoreDicom": True,
            "SynchronousCMove": True,
            "HttpRequestTimeout": 30,
            **self._settings,
        }
        path = self.directory / "orthanc.json"
        path.write_text(json.dumps(configuration, indent=1), encoding="utf-8")
        return path

    # ----------------------------------------------------------------- REST

    async def request(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Call the REST interface; JSON comes back decoded, anything else as bytes.

        Raises:
            urllib.error.HTTPError: an answer other than 2xx.
        """
        return await asyncio.to_thread(self._request, method, path, body)

    async def upload(self, instances: Iterable[bytes | Path]) -> list[str]:
        """Store Part 10 files; return Orthanc's own identifiers."""

        def upload() -> list[str]:
            return [
                self._request(
                    "POST",
                    "/instances",
                    instance.read_bytes() if isinstance(instance, Path) else instance,
                )["ID"]
                for instance in instances
            ]

        return await asyncio.to_thread(upload)

    async def statistics(self) -> dict[str, Any]:
        """Return the counts of patients, studies, series and instances."""
        return dict(await self.request("GET", "/statistics"))

    async def sop_instance_uids(self) -> set[str]:
        """Return the SOP Instance UIDs of everything stored."""
        rows = await self.request("GET", "/instances?expand")
        return {row["MainDicomTags"]["SOPInstanceUID"] for row in rows}

    async def instance_file(self, sop_instance_uid: str) -> bytes:
        """Return one instance as the Part 10 file that Orthanc holds.

        Raises:
            KeyError: it is not stored.
        """
        found = await self.request("POST", "/tools/lookup", sop_instance_uid.encode("ascii"))
        for row in found:
            if row["Type"] == "Instance":
                content = await self.request("GET", f"/instances/{row['ID']}/file")
                assert isinstance(content, bytes)
                return content
        raise KeyError(sop_instance_uid)

    async def delete_study(self, study_instance_uid: str) -> None:
        """Forget a study."""
        found = await self.request("POST", "/tools/lookup", study_instance_uid.encode("ascii"))
        for row in found:
            if row["Type"] == "Study":
                await self.request("DELETE", f"/studies/{row['ID']}")

    def served(self, service: str) -> int:
        """Count the requests for *service* (``Echo``, ``Find``, ``Move``, ``Get``, ``Store``)."""
        return self.log.count(f"Incoming {service} request")

    def _request(self, method: str, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}{path}", data=body, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            content = response.read()
            if "json" in response.headers.get("Content-Type", ""):
                return json.loads(content)
            return content
