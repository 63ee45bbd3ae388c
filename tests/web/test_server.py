"""The HTTP server: health flips, metrics parse, strangers learn nothing and block nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dicomproxy.web import StatusSnapshot, WebServer, server
from tests.sentinel import PATIENT_ID, PATIENT_NAME
from tests.support.log_watch import LogWatch
from tests.web.test_page import FULL


class Proxy:
    """Stands for the proxy: what the server asks it, changed as a test goes."""

    def __init__(self) -> None:
        self.ready = True
        self.snapshot: StatusSnapshot = FULL
        self.error: Exception | None = None
        self.threads: set[str] = set()

    def status(self) -> StatusSnapshot:
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return self.snapshot


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
async def port(proxy: Proxy) -> AsyncIterator[int]:
    web = WebServer("127.0.0.1", 0, readiness=lambda: proxy.ready, status=proxy.status)
    yield await web.start()
    await web.close()


@pytest.fixture
async def http(port: int) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as session:
        yield session


async def test_live_whether_ready_or_not(http: aiohttp.ClientSession, proxy: Proxy) -> None:
    """A process that drains is alive."""
    proxy.ready = False
    async with http.get("/health/live") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "live"})


async def test_readiness_flips(http: aiohttp.ClientSession, proxy: Proxy) -> None:
    """Ready follows the proxy both ways, with the state in JSON."""
    seen: list[tuple[int, Any]] = []
    # Not even a snapshot may be had yet.
    proxy.error = RuntimeError()
    for ready in (False, True, False):
        proxy.ready = ready
        async with http.get("/health/ready") as answer:
            assert answer.content_type == "application/json"
            seen.append((answer.status, await answer.json()))
    assert seen == [
        (503, {"status": "not ready"}),
        (200, {"status": "ready"}),
        (503, {"status": "not ready"}),
    ]


async def test_metrics_parse_and_hold_what_was_counted(http: aiohttp.ClientSession) -> None:
    """Both the process's counters and the snapshot's moments are in one valid page."""
    async with http.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = await answer.text()
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    expected = {
        ("dicomproxy_ready",): 1,
        ("dicomproxy_build_info", "0.1.0"): 1,
        ("dicomproxy_source_up", "local"): 1,
        ("dicomproxy_source_up", "north"): 0,
        ("dicomproxy_source_associations", "north", "idle"): 2,
        ("dicomproxy_operations_running", "retrieve"): 1,
        ("dicomproxy_operations_stuck",): 1,
        ("dicomproxy_tasks",): 12,
        ("dicomproxy_cache_max_bytes",): 200e9,
    }
    assert expected.items() <= samples.items()
    assert ("dicomproxy_log_lines_lost_total",) in samples
    assert "process_cpu_seconds" in text


async def test_scrape_reads_files_off_the_loop_and_the_snapshot_on_it(
    http: aiohttp.ClientSession, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process's figures are read in another thread; the proxy is asked in its own."""
    threads: list[str] = []
    original = server.render_metrics

    def rendering(snapshot: StatusSnapshot) -> bytes:
        threads.append(threading.current_thread().name)
        return original(snapshot)

    monkeypatch.setattr(server, "render_metrics", rendering)
    async with http.get("/metrics") as answer:
        assert answer.status == 200
    here = threading.current_thread().name
    assert proxy.threads == {here}
    assert len(threads) == 1
    assert threads[0] != here


async def test_page_is_served_with_a_strict_policy(http: aiohttp.ClientSession) -> None:
    """The status page is HTML that nobody stores, frames or extends."""
    async with http.get("/") as answer:
        assert (answer.status, answer.content_type, answer.charset) == (200, "text/html", "utf-8")
        assert "op-stuck" in await answer.text()
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Server"] == "dicomproxy"


async def test_head_is_answered_without_a_body(http: aiohttp.ClientSession) -> None:
    """Monitors may ask for the head alone."""
    async with http.head("/health/live") as answer:
        assert (answer.status, await answer.read()) == (200, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_other_methods_are_refused(http: aiohttp.ClientSession, method: str) -> None:
    """There is nothing to change here."""
    async with http.request(method, "/", data=b"x" * 1000) as answer:
        assert (answer.status, await answer.text()) == (405, "405\n")
        assert answer.headers["Allow"] == "GET, HEAD"


async def test_unknown_path_is_neither_echoed_nor_logged(
    http: aiohttp.ClientSession, log_watch: LogWatch
) -> None:
    """A stranger's path, query and headers appear in no answer and in no line."""
    before = len(log_watch.entries)
    headers = {"User-Agent": PATIENT_ID, "Referer": f"http://x/{PATIENT_ID}"}
    for path in (f"/{PATIENT_ID}", f"/health/{PATIENT_NAME}?PatientID={PATIENT_ID}", "/../etc"):
        async with http.get(path, headers=headers) as answer:
            assert (answer.status, await answer.text()) == (404, "404\n")
            assert answer.headers["Cache-Control"] == "no-store"
    assert log_watch.entries[before:] == []


async def test_broken_snapshot_is_one_failed_request(
    http: aiohttp.ClientSession, proxy: Proxy, log_watch: LogWatch
) -> None:
    """An error inside is logged by type, shown as its number, and the next request works."""
    proxy.error = RuntimeError(PATIENT_NAME)
    for path in ("/", "/metrics"):
        async with http.get(path) as answer:
            assert (answer.status, await answer.text()) == (500, "500\n")
    assert [line["error_type"] for line in log_watch.named("web_request_failed")] == [
        "RuntimeError",
        "RuntimeError",
    ]
    proxy.error = None
    async with http.get("/") as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nBad Header\r\n\r\n", b"A" * 100_000],
    ids=["tls", "bad_header", "endless_line"],
)
async def test_garbage_does_not_harm_the_next_request(
    port: int, http: aiohttp.ClientSession, log_watch: LogWatch, sent: bytes
) -> None:
    """What is no HTTP ends its own connection only."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        writer.write_eof()
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.0 400") or b" 400 " in answer[:20]
        writer.close()
    async with http.get("/health/live") as alive:
        assert alive.status == 200


async def test_silent_connection_is_closed(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects and says nothing is let go after a while."""
    monkeypatch.setattr(server, "_KEEPALIVE_SECONDS", 0.05)
    web = WebServer("127.0.0.1", 0, readiness=lambda: True, status=proxy.status)
    port = await web.start()
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
    await web.close()


async def test_connections_beyond_the_bound_are_ended_at_once(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers cannot pile up connections; those there already are served."""
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 2)
    async with asyncio.timeout(60):
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in kept:
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass
        for _, open_writer in [*kept, (reader, writer)]:
            open_writer.close()


async def test_taken_port_is_the_callers_to_report(port: int, proxy: Proxy) -> None:
    """Listening on a port in use raises, and what was half started can be closed."""
    second = WebServer("127.0.0.1", port, readiness=lambda: True, status=proxy.status)
    with pytest.raises(OSError):
        await second.start()
    await second.close()


async def test_close_frees_the_port_and_ends_open_connections(proxy: Proxy) -> None:
    """After close nobody is served, and a second close is harmless."""
    web = WebServer("127.0.0.1", 0, readiness=lambda: True, status=proxy.status)
    port = await web.start()
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await web.close()
        await web.close()
        await reader.read()
        writer.close()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
