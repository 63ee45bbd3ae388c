"""``dicomproxy doctor``: 0 where every route works, else 1 and words for the step that fails."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from pynetdicom import AE, evt

from dicomproxy.cli import doctor
from dicomproxy.cli.main import main
from dicomproxy.config import load
from tests.e2e.support import configuration
from tests.peers import archive as archive_module
from tests.peers.archive import Archive
from tests.peers.entity import FIND, UNCOMPRESSED, VERIFICATION, Entity, new_entity
from tests.peers.node import Node
from tests.peers.ports import free_port
from tests.peers.workstation import Workstation
from tests.sentinel import sentinels_in
from tests.support.datasets import study

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture(autouse=True)
def kept_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the logs to the tests."""
    monkeypatch.setattr(doctor.logs, "configure", lambda *_: None)


@contextmanager
def up(*peers: Entity) -> Iterator[None]:
    with ExitStack() as stack:
        for peer in peers:
            peer.start()
            stack.callback(peer.stop)
        yield


@dataclass
class Peers:
    """A local PACS, one source and one workstation, up for all tests of this module."""

    local: Archive
    north: Archive
    reading: Workstation


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    # One class is enough here, and every class costs pynetdicom a copy for each association.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(archive_module, "STORAGE", (CT,))
        made = Peers(
            Archive("LOCALPACS", study(1, 1)),
            Archive("NORTHPACS", study(1, 2)),
            Workstation("READING1", accept=[CT]),
        )
        with up(made.local, made.north, made.reading):
            yield made


class Site:
    """What the configuration names, changed as a test goes, and the file that is made of it."""

    def __init__(self, directory: Path, peers: Peers) -> None:
        self.proxy_port = free_port()
        us = Node("DICOMPROXY", "127.0.0.1", self.proxy_port)
        for peer in (peers.local, peers.north, peers.reading):
            peer.reject = None
            peer.fail = {}
        for archive in (peers.local, peers.north):
            archive.destinations = {"DICOMPROXY": us}
            archive.requests.clear()
            archive.sent.clear()
        self.peers = peers
        self.local, self.north, self.reading = (
            peers.local.node,
            peers.north.node,
            peers.reading.node,
        )
        self.north_keys: dict[str, Any] = {
            "test_study": str(peers.north.instances[0].StudyInstanceUID)
        }
        self.more: dict[str, Any] = {}
        self._directory = directory

    def write(self) -> Path:
        content = configuration(
            self._directory,
            pacs=self.local,
            sources={"north": self.north},
            workstations=[self.reading],
            port=self.proxy_port,
            **{"north": self.north_keys, **self.more},
        )
        path = self._directory / "dicomproxy.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def run(self) -> int:
        return main(["doctor", "--config", str(self.write())])


@pytest.fixture
def site(tmp_path: Path, peers: Peers) -> Site:
    return Site(tmp_path, peers)


class Report:
    """What doctor printed: steps by route and name, each with its mark and words."""

    def __init__(self, text: str) -> None:
        assert sentinels_in(text) == []
        self.text = text
        self.steps: dict[tuple[str, str], tuple[str, str]] = {}
        route = ""
        for line in text.splitlines():
            if found := re.fullmatch(r"(workstation|[a-z]+): (\S+) at .*", line):
                route = found.group(1)
            elif found := re.fullmatch(r"  (ok|FAILED|-) +(\S.*?)(?:  +(.*)| (.*))?", line):
                mark, rest = found.group(1), line[9:]
                self.steps[route, rest[:14].strip()] = mark, rest[15:]

    @property
    def failed(self) -> dict[tuple[str, str], str]:
        return {step: words for step, (mark, words) in self.steps.items() if mark == "FAILED"}


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda: Report(capsys.readouterr().out)


# -------------------------------------------------------------------- all fine


@pytest.mark.parametrize(("retrieve", "step"), [("c-move", "C-MOVE to us"), ("c-get", "C-GET")])
def test_every_route_works(site: Site, report: Any, retrieve: str, step: str) -> None:
    """Each step of each route is named, one instance of the test study comes back, exit 0."""
    site.north_keys["retrieve"] = retrieve
    assert site.run() == 0
    printed = report()
    assert printed.failed == {}
    assert "All routes are fine." in printed.text
    ours = ("port", "association", "contexts", "C-ECHO")
    expected = {("local", one) for one in (*ours, "C-FIND")}
    expected |= {("north", one) for one in (*ours, "C-FIND", step)}
    expected |= {("workstation", one) for one in ours}
    assert set(printed.steps) == expected
    assert {mark for mark, _ in printed.steps.values()} == {"ok"}
    assert "one instance" in printed.steps["north", step][1]
    assert "the test study is there" in printed.steps["north", "C-FIND"][1]
    # One instance, and not the whole study.
    assert sum(site.peers.north.sent.values()) == 1
    assert site.peers.local.asked("move") == []


def test_local_pacs_sends_back_where_we_deliver_for_it(site: Site, report: Any) -> None:
    """Under deliver: proxy the local PACS is fetched from too, and tried likewise."""
    local_study = str(site.peers.local.instances[0].StudyInstanceUID)
    site.more = {"local": {"deliver": "proxy", "test_study": local_study}}
    assert site.run() == 0
    assert report().steps["local", "C-MOVE to us"][0] == "ok"


def test_without_a_test_study_the_way_back_is_not_tried(site: Site, report: Any) -> None:
    """Nothing is moved that nobody named; it is said, and is no failure."""
    del site.north_keys["test_study"]
    assert site.run() == 0
    mark, words = report().steps["north", "C-MOVE to us"]
    assert (mark, words) == ("-", "not tried: no test_study is configured")
    assert site.peers.north.asked("move") == []


def test_workstation_without_an_address_is_passed_over(site: Site, report: Any) -> None:
    """One that may only query has no route to try."""
    path = site.write()
    content = yaml.safe_load(path.read_text())
    content["workstations"] = [{"ae_title": "READING9"}]
    path.write_text(yaml.safe_dump(content))
    assert doctor.run(load(path)) == 0
    assert not any(route == "workstation" for route, _ in report().steps)


# -------------------------------------------------------------- failing steps


def steps_of(report: Report, route: str) -> list[str]:
    return [name for other, name in report.steps if other == route]


def test_nobody_listens(site: Site, report: Any) -> None:
    """The port fails, in words; the steps that need it are not tried, the other routes are."""
    site.north = site.north._replace(port=free_port())
    assert site.run() == 1
    printed = report()
    assert printed.failed == {("north", "port"): "connection refused: nothing listens there"}
    assert steps_of(printed, "north") == ["port"]
    assert "C-ECHO" in steps_of(printed, "workstation")
    assert "1 of the steps failed." in printed.text


def test_rejected(site: Site, report: Any) -> None:
    """The reason of the A-ASSOCIATE-RJ in the standard's own words."""
    site.peers.north.reject = "permanent"
    site.peers.reading.reject = "transient"
    assert site.run() == 1
    failed = report().failed
    assert failed["north", "association"] == "rejected, permanent: calling AE title not recognized"
    assert failed["workstation", "association"] == "rejected, transient: local limit exceeded"


def test_silent(site: Site, report: Any) -> None:
    """A port that accepts and never answers fails at the association."""
    site.more = {"proxy": {"timers": {"association": "1s"}}}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        site.north = site.north._replace(port=silent.getsockname()[1])
        assert site.run() == 1
    printed = report()
    assert printed.steps["north", "port"][0] == "ok"
    assert ("north", "association") in printed.failed
    assert steps_of(printed, "north") == ["port", "association"]


class Offering(Entity):
    """A peer that offers the services named, and answers C-ECHO with a status of its own."""

    def __init__(self, *sop_classes: str, echo: int = 0x0000) -> None:
        super().__init__("OFFERING")
        self.sop_classes, self.echo = sop_classes, echo

    def make_entity(self) -> AE:
        entity = new_entity(self.ae_title)
        for sop_class in self.sop_classes:
            entity.add_supported_context(sop_class, UNCOMPRESSED)
        return entity

    def handlers(self) -> list[Any]:
        return [(evt.EVT_C_ECHO, lambda event: self.echo)]


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        ((VERIFICATION,), "no Query/Retrieve FIND is accepted (accepted: none)"),
        (
            (VERIFICATION, FIND["S"]),
            "no Query/Retrieve MOVE is accepted (accepted: Study Root FIND)",
        ),
    ],
)
def test_archive_that_offers_too_little(
    site: Site, report: Any, offered: tuple[str, ...], words: str
) -> None:
    """What is missing is named beside what is there."""
    with up(peer := Offering(*offered)):
        site.north = peer.node
        assert site.run() == 1
    assert report().failed == {("north", "contexts"): words}


def test_workstation_that_takes_no_images(site: Site, report: Any) -> None:
    """Storage is what a workstation is for; a C-ECHO that fails is shown with its status."""
    with up(peer := Offering(VERIFICATION, echo=0x0122)):
        site.reading = peer.node
        assert site.run() == 1
    assert report().failed == {
        ("workstation", "contexts"): "does not accept CT Image Storage, uncompressed",
        ("workstation", "C-ECHO"): "status 0122",
    }


def test_workstation_without_verification(site: Site, report: Any) -> None:
    """A workstation that takes images but offers no C-ECHO is fine."""
    with up(peer := Offering(CT)):
        site.reading = peer.node
        assert site.run() == 0
    mark, words = report().steps["workstation", "C-ECHO"]
    assert (mark, words) == ("-", "not tried: Verification is not offered")


def test_query_that_is_refused(site: Site, report: Any) -> None:
    """The status is shown; what would need an answer is not tried."""
    site.peers.north.fail["find"] = 0xA700
    assert site.run() == 1
    printed = report()
    assert printed.failed == {("north", "C-FIND"): "status A700"}
    assert "C-MOVE to us" not in steps_of(printed, "north")


def test_test_study_that_is_not_there(site: Site, report: Any) -> None:
    """A mistyped test study is told from an archive that does not answer."""
    site.north_keys["test_study"] = "1.2.3.4.5.6"
    assert site.run() == 1
    assert report().failed == {("north", "C-FIND"): "the test study is not there"}


def test_archive_that_does_not_know_us(site: Site, report: Any) -> None:
    """An archive without our title as destination: its status, and what to look for."""
    site.peers.north.destinations = {}
    assert site.run() == 1
    words = report().failed["north", "C-MOVE to us"]
    assert "status A801" in words
    assert f"does it know DICOMPROXY at our address, port {site.proxy_port}?" in words


def test_archive_that_sends_elsewhere(site: Site, report: Any) -> None:
    """Success of the archive is no proof: the instance has to reach us."""
    site.peers.north.destinations = {"DICOMPROXY": site.peers.reading.node}
    assert site.run() == 1
    words = report().failed["north", "C-MOVE to us"]
    assert "no instance reached us; the archive said status 0000, 1 completed" in words


def test_archive_that_sends_under_a_title_we_do_not_know(site: Site, report: Any) -> None:
    """A sender that the running proxy would reject is rejected here as well."""
    site.north_keys["store_from"] = ["OTHERTITLE"]
    assert site.run() == 1
    assert ("north", "C-MOVE to us") in report().failed


# ---------------------------------------------------------- beside a running one


class Metrics(BaseHTTPRequestHandler):
    """Gives the number of instances that the proxy has answered so far."""

    stored: Any = None

    def do_GET(self) -> None:
        body = (
            "# HELP dicomproxy_stores_received_total C-STORE requests answered.\n"
            f'dicomproxy_stores_received_total{{status="0124"}} {type(self).stored()}\n'
            'dicomproxy_stores_received_total{status="0000"} 2.0\n'
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def metrics_of(proxy: Workstation) -> Iterator[int]:
    """Serve what *proxy* would tell of itself."""
    handler = type("Handler", (Metrics,), {"stored": staticmethod(lambda: len(proxy.received))})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_beside_a_running_proxy(site: Site, report: Any) -> None:
    """The instance goes to the proxy, whose metrics tell that it came."""
    proxy = Workstation("DICOMPROXY", accept=[CT])
    proxy.port = site.proxy_port
    with up(proxy), metrics_of(proxy) as web_port:
        site.more = {"web": {"port": web_port}}
        assert site.run() == 0
        assert len(proxy.received) == 1
    printed = report()
    assert f"Port {site.proxy_port} is in use: the proxy is taken to be running." in printed.text
    assert "one instance reached the running proxy" in printed.steps["north", "C-MOVE to us"][1]


def test_beside_something_that_is_not_our_proxy(site: Site, report: Any) -> None:
    """Without metrics nobody can say whether the instance arrived, and that is said."""
    proxy = Workstation("DICOMPROXY", accept=[CT])
    proxy.port = site.proxy_port
    with up(proxy):
        assert site.run() == 1
    words = report().failed["north", "C-MOVE to us"]
    assert words == (
        "the proxy's port is in use and its metrics cannot be read: "
        "whether the instance arrived is not known"
    )


def test_address_that_is_not_ours(site: Site, report: Any) -> None:
    """An address on which the proxy could not listen either is a failed step of its own."""
    site.more = {"proxy": {"host": "203.0.113.7"}}
    del site.north_keys["test_study"]
    assert site.run() == 1
    printed = report()
    assert "cannot listen on 203.0.113.7" in printed.text
    assert "1 of the steps failed." in printed.text
