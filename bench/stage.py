"""What the rows stand on: data, peers that are started when first needed, proxies, measures.

Routes: ``near`` is loopback; ``far`` and ``capped`` lead through a relay in both
directions of travel, to the archive and from it back to whoever receives. A
title at the end of a route carries the route's suffix, so that an archive
delivers to it by that way.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.archive import TITLE as GENERATED
from bench.control import Child
from bench.data import Study
from bench.subjects import BenchOrthanc, BenchProxy, MissingPeer, WrongOutcome
from tests.e2e.support import configuration
from tests.peers.ports import free_port
from tests.peers.process import find_program

READING: Final = "READING"
CROWD: Final = tuple(f"W{number:02d}" for number in range(1, 17))
ORTHANC: Final = "ORTHANC"
PROXY: Final = "DICOMPROXY"


def _identity(directory: Path, sources: Iterable[str]) -> dict[str, Any]:
    """Return the keys by which a patient has another ID at *sources*, and write the table."""
    table = directory.with_suffix(".csv")
    ids = [("LOCAL-1", "BENCH-1"), ("LOCAL-2", "BENCH-2")]
    rows = [("local", *sources), *((here, *(there,) * len(sources)) for here, there in ids)]
    table.write_text("".join(",".join(row) + "\n" for row in rows), "utf-8")
    return {
        "local": {"patient_id_issuer": {"namespace": "HERE", "universal_id": "1.2.3.9"}},
        "cross_references": [{"name": "table", "type": "table", "file": str(table)}],
        "sources": {
            "patient_id_issuer": {"namespace": "NORTH", "universal_id": "1.2.3.1"},
            "identity": {"cross_reference": "table"},
            "coerce": {"study_description_prefix": "[NORTH] "},
        },
    }


@dataclass(frozen=True, slots=True)
class Route:
    """A way to the archive and back; *suffix* marks the titles at its end."""

    name: str
    suffix: str
    delay_seconds: float = 0.0
    bytes_per_second: float | None = None


NEAR: Final = Route("near", "")
FAR: Final = Route("far", "F", delay_seconds=0.015)
CAPPED: Final = Route("capped", "C", bytes_per_second=125e6)
ROUTES: Final = (NEAR, FAR, CAPPED)
_PROXY_TITLES: Final = tuple(
    f"PROXY{number}{route.suffix}" for route in ROUTES for number in (1, 2)
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is moved, and how often."""

    ct: Study
    mr: Study
    crowd: tuple[Study, ...]
    find_studies: int
    memory_bytes: int
    rounds: int | None
    """For every row; None leaves it to the row."""


def sizes(*, quick: bool, full: bool) -> Sizes:
    """Return the default sizes; small ones for a smoke test; with memory rows of 2 GB if full."""
    pixels = 512 * 512 * 2
    return Sizes(
        ct=Study(10, "CT", 30 if quick else 300, pixels),
        mr=Study(11, "MR", 50 if quick else 1000, 128 * 128 * 2),
        crowd=tuple(Study(20 + at, "CT", 4 if quick else 100, pixels) for at in range(16)),
        find_studies=6 if quick else 40,
        memory_bytes=(20 if quick else 2000 if full else 300) * 1_000_000,
        rounds=1 if quick else None,
    )


class Stage:
    """Everything that is shared by rows; ``async with`` ends whatever was started.

    Args:
        directory: for data, logs and caches.
        disk: for caches of rows that only read them.
        what: how much is moved, how often.
    """

    def __init__(self, directory: Path, disk: Path, what: Sizes) -> None:
        self.directory = directory
        self._disk = disk
        self.sizes = what
        self.ports = {
            name: free_port()
            for name in (
                *("fast", "ordinary", "generated", "empty", "pynetdicom", "silent"),
                *(ORTHANC, "ORTHANC2", "LOCAL", "NORTH", "SOUTH"),
                *_PROXY_TITLES,
            )
        }
        self._relayed = {
            (route.name, name): free_port()
            for route in ROUTES[1:]
            for name in (ORTHANC, "fast", *_PROXY_TITLES)
        }
        self._stack = AsyncExitStack()
        self._started: dict[str, Any] = {}
        self._filled: set[tuple[str, int]] = set()
        self._extra: list[Study] = []
        self._proxies = 0

    async def __aenter__(self) -> Stage:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def rounds(self, usual: int) -> int:
        """Return how often a row is measured."""
        return self.sizes.rounds or usual

    # ------------------------------------------------------------------- peers

    async def _once(self, name: str, start: Callable[[], Awaitable[Any]]) -> Any:
        if name not in self._started:
            self._started[name] = await start()
        return self._started[name]

    async def _child(self, name: str, module: str, settings: Any) -> Child:
        async def start() -> Child:
            child = await Child.start(module, settings, self.directory / f"{name}.log")
            self._stack.push_async_callback(child.stop)
            return child

        made: Child = await self._once(name, start)
        return made

    async def workstation(self, kind: str = "fast") -> Child:
        """Return the receiver that acknowledges at once, or the ``ordinary`` one."""
        return await self._child(
            kind,
            "workstation",
            {"port": self.ports[kind], "delayed_acks": kind == "ordinary"},
        )

    async def pynetdicom(self) -> Child:
        """Return the pynetdicom peer."""
        received = str(self.directory / "pynetdicom")
        return await self._child(
            "pynetdicom",
            "pynetdicom_peer",
            {"port": self.ports["pynetdicom"], "directory": received},
        )

    async def archive(self) -> Child:
        """Return the archive that generates what it holds.

        Raises:
            MissingPeer: DCMTK is not installed.
        """
        storescu = find_program("storescu")
        if storescu is None:
            raise MissingPeer("storescu is not installed")
        studies = [self.sizes.ct, self.sizes.mr, *self.sizes.crowd, *self.memory_studies()]
        studies += self.find_studies()
        mr = self.sizes.mr.study_instance_uid
        return await self._child(
            "archive",
            "archive",
            {
                "port": self.ports["generated"],
                "empty_port": self.ports["empty"],
                "studies": [asdict(study) for study in studies],
                "destinations": {title: self.ports[title] for title in _PROXY_TITLES},
                "storescu": storescu,
                "files": {mr: str(self.directory / "files" / "MR")},
            },
        )

    def memory_studies(self) -> tuple[Study, Study, Study]:
        """Return one object, a study of small ones, and the CT: for the memory rows."""
        total, small = self.sizes.memory_bytes, 512 * 1024
        return (
            Study(50, "CT", 1, total),
            Study(51, "CT", total // small, small),
            Study(52, "CT", self.sizes.ct.instances, self.sizes.ct.pixel_bytes),
        )

    def find_studies(self) -> tuple[Study, ...]:
        """Return the studies of one patient that the query rows ask for."""
        return tuple(
            Study(60 + at, "CT", 1, 512, patient_id="BENCH-2")
            for at in range(self.sizes.find_studies)
        )

    async def files(self, study: Study) -> Path:
        """Return a directory with the study's Part 10 files."""
        path = self.directory / "files" / study.modality

        async def write() -> Path:
            await asyncio.to_thread(study.write_files, path)
            return path

        await self._once(f"files {study.modality}", write)
        return path

    async def relay(self, route: Route) -> None:
        """Start the relay of a route."""
        if route is NEAR:
            return
        links = [
            {
                "port": self._relayed[route.name, name],
                "host": "127.0.0.1",
                "to": self.ports[name],
                "from_source": name != ORTHANC,
            }
            for name in (ORTHANC, "fast", *_PROXY_TITLES)
        ]
        await self._child(
            f"relay {route.name}",
            "relay",
            {
                "links": links,
                "delay_seconds": route.delay_seconds,
                "bytes_per_second": route.bytes_per_second,
            },
        )

    def port_of(self, route: Route, name: str) -> int:
        """Return where *name* is reached over *route*."""
        return self.ports[name] if route is NEAR else self._relayed[route.name, name]

    async def orthanc(self, name: str = ORTHANC) -> BenchOrthanc:
        """Return an Orthanc; it delivers to every title, by the route of its suffix."""
        modalities = {"ORTHANC2": ("ORTHANC2", "127.0.0.1", self.ports["ORTHANC2"])}
        for route in ROUTES:
            fast = self.port_of(route, "fast")
            for title in (READING, *CROWD):
                modalities[title + route.suffix] = (title + route.suffix, "127.0.0.1", fast)
            for title in _PROXY_TITLES:
                if title.endswith(route.suffix) and (route.suffix or title[-1].isdigit()):
                    modalities[title] = (title, "127.0.0.1", self.port_of(route, title))
        if name == "ORTHANC2":
            modalities[ORTHANC] = (ORTHANC, "127.0.0.1", self.ports[ORTHANC])

        async def start() -> BenchOrthanc:
            made = BenchOrthanc(name, self.ports[name], modalities, self.directory / name)
            return await self._stack.enter_async_context(made)

        started: BenchOrthanc = await self._once(name, start)
        return started

    async def fill(self, name: str, *studies: Study) -> BenchOrthanc:
        """Have an Orthanc hold *studies*, and return it."""
        orthanc, archive = await self.orthanc(name), await self.archive()
        for study in studies:
            if (name, study.number) not in self._filled:
                await archive.ask(
                    "send", port=orthanc.port, called=name, study=study.study_instance_uid
                )
                self._filled.add((name, study.number))
        return orthanc

    async def silent(self) -> tuple[str, str, int]:
        """Return an archive that takes connections and never says anything."""

        async def start() -> asyncio.Server:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(asyncio.Protocol, "127.0.0.1", self.ports["silent"])
            self._stack.callback(server.close)
            return server

        await self._once("silent", start)
        return "SILENT", "127.0.0.1", self.ports["silent"]

    # ----------------------------------------------------------------- proxies

    @asynccontextmanager
    async def proxy(
        self,
        sources: dict[str, tuple[str, str, int]],
        *,
        title: str = "PROXY1",
        reading: str = "fast",
        local: tuple[str, str, int] | None = None,
        ceiling: int = 4,
        on_disk: bool = False,
        coerces: bool = False,
    ) -> AsyncIterator[BenchProxy]:
        """Start a proxy of its own, with an empty cache, and end it afterwards.

        Args:
            sources: archives by name.
            title: by which archives know it as destination.
            reading: which receiver stands behind READING.
            local: its local PACS; by default one that holds nothing.
            ceiling: associations at a source, at most.
            on_disk: keep its cache on an ordinary file system, where a row is about
                reading: file systems in memory lack what makes that quick.
            coerces: the patient has another ID here than at the sources, and what
                comes from them is made local.
        """
        self._proxies += 1
        directory = (self._disk if on_disk else self.directory) / f"proxy-{self._proxies}"
        identity = _identity(directory, sources) if coerces else {}
        own = identity.pop("sources", {})
        await self.archive()  # the empty local PACS is one of its ports
        made = BenchProxy(
            directory,
            configuration(
                directory,
                pacs=local or ("EMPTY", "127.0.0.1", self.ports["empty"]),
                sources=sources,
                workstations=[
                    {
                        "ae_title": name,
                        "host": "127.0.0.1",
                        "port": self.ports[receiver],
                        "query_budget": "5s",
                    }
                    for name, receiver in [(READING, reading), *((one, "fast") for one in CROWD)]
                ],
                port=self.ports[title],
                # What is measured is what is shipped; tests are more patient.
                local={
                    "connect_timeout": "3s",
                    "query_timeout": "10s",
                    **identity.pop("local", {}),
                },
                **identity,
                **{
                    name: {
                        "calling_ae_title": title,
                        "parallel_associations": ceiling,
                        "connect_timeout": "3s",
                        "query_timeout": "5s",
                        **own,
                    }
                    for name in sources
                },
            ),
        )
        try:
            await made.start()
            yield made
        finally:
            if made.running:
                made.signal(signal.SIGTERM)
                try:
                    await made.ended(10)
                except Exception:
                    made.kill()

    def generated(self) -> dict[str, tuple[str, str, int]]:
        """Return the archive that generates what it holds, as a source."""
        return {"north": (GENERATED, "127.0.0.1", self.ports["generated"])}

    def through(self, route: Route) -> dict[str, tuple[str, str, int]]:
        """Return Orthanc as a source, over a route."""
        return {"north": (ORTHANC, "127.0.0.1", self.port_of(route, ORTHANC))}

    # --------------------------------------------------------------- transfers

    async def retrieve(
        self,
        port: int,
        called: str,
        studies: Sequence[Study],
        titles: Sequence[str] = (READING,),
        *,
        arrives: bool = True,
        seconds: float = 300,
    ) -> dict[str, Any]:
        """Have the workstation retrieve *studies*, each under the title beside it.

        Args:
            arrives: whether it is this workstation that receives them.

        Raises:
            WrongOutcome: not every instance came, once, with its pixels.
        """
        workstation = await self.workstation()
        result: dict[str, Any] = await workstation.ask(
            "move",
            seconds,
            moves=[
                {
                    "port": port,
                    "called": called,
                    "calling": title,
                    "study": study.study_instance_uid,
                }
                for study, title in zip(studies, titles, strict=True)
            ],
        )
        wanted = sum(study.instances for study in studies)
        pixels = sum(study.instances * study.pixel_bytes for study in studies)
        whole = result["status"] == 0 and result["completed"] == wanted and not result["failed"]
        if arrives:
            whole = whole and result["instances"] == wanted and result["bytes"] > pixels
        if not whole:
            raise WrongOutcome(
                f"status {result['status']:04X}, {result['completed']} completed, "
                f"{result['failed']} failed, {result['instances']} of {wanted} arrived"
            )
        return result

    async def direct(
        self, route: Route, studies: Sequence[Study], titles: Sequence[str] = (READING,)
    ) -> dict[str, Any]:
        """Retrieve from Orthanc itself over *route*."""
        there = [title + route.suffix for title in titles]
        return await self.retrieve(self.port_of(route, ORTHANC), ORTHANC, studies, there)

    async def proxied(
        self,
        proxy: BenchProxy,
        studies: Sequence[Study],
        titles: Sequence[str] = (READING,),
        **more: Any,
    ) -> dict[str, Any]:
        """Retrieve through the proxy."""
        proxy.fetched_studies.update(study.study_instance_uid for study in studies)
        return await self.retrieve(proxy.port, PROXY, studies, titles, **more)
