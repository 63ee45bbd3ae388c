"""The HTTP server: four pages, GET and HEAD only, nothing to log in to and nothing to change.

Rules kept: a request is never logged, its path and headers are a stranger's
text; an error shows its number only; nothing blocks the loop; a connection
that says nothing is closed, and the number of connections has a bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dicomproxy.logs import error_fields, get_logger
from dicomproxy.web.metrics import render_metrics
from dicomproxy.web.page import CONTENT_SECURITY_POLICY, render_page
from dicomproxy.web.status import StatusSnapshot

_KEEPALIVE_SECONDS: Final = 15.0
_METRICS_SECONDS: Final = 10.0
_SHUTDOWN_SECONDS: Final = 2.0
_MOST_CONNECTIONS: Final = 100
_BACKLOG: Final = 64

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "Server": "dicomproxy",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_log = get_logger()

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebServer:
    """Serves health, metrics and the status page.

    Args:
        host: address to listen on.
        port: TCP port, 0 for any free one.
        readiness: whether associations are accepted now.
        status: takes a snapshot; called on the loop for each page and each scrape.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        readiness: Callable[[], bool],
        status: Callable[[], StatusSnapshot],
    ) -> None:
        self._host = host
        self._port = port
        self._readiness = readiness
        self._status = status
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; return the bound port.

        Raises:
            OSError: the address cannot be listened on.
        """
        app = web.Application(middlewares=[_contain_errors])
        app.router.add_get("/", self._page)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.on_response_prepare.append(_add_headers)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            shutdown_timeout=_SHUTDOWN_SECONDS,
            handler_cancellation=True,
        )
        await self._runner.setup()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._protocol, self._host, self._port, backlog=_BACKLOG
            )
        except BaseException:
            await self.close()
            raise
        port: int = self._server.sockets[0].getsockname()[1]
        _log.info("web_listening", host=self._host, port=port)
        return port

    async def close(self) -> None:
        """Stop listening, let answers under way end, close every connection."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def _protocol(self) -> asyncio.BaseProtocol:
        served = self._runner.server if self._runner is not None else None
        if served is None or len(served.connections) >= _MOST_CONNECTIONS:
            return _Refused()
        return served()

    # ------------------------------------------------------------------- pages

    async def _live(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def _ready(self, _request: web.Request) -> web.Response:
        if self._readiness():
            return web.json_response({"status": "ready"})
        # No snapshot: while starting there may be nothing to take one of.
        return web.json_response({"status": "not ready"}, status=503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        snapshot = self._status()
        async with asyncio.timeout(_METRICS_SECONDS):
            body = await asyncio.to_thread(render_metrics, snapshot)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _page(self, _request: web.Request) -> web.Response:
        return web.Response(text=render_page(self._status(), time.time()), content_type="text/html")


class _Refused(asyncio.Protocol):
    """Ends a connection beyond the most that are served at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - told to mypy
        transport.abort()


@web.middleware
async def _contain_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer every error with its number alone: texts may repeat what was asked."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as refusal:
        allow = {"Allow": ", ".join(sorted(refusal.allowed_methods))}
        return web.Response(status=405, text="405\n", headers=allow)
    except web.HTTPException as refusal:
        return web.Response(status=refusal.status, text=f"{refusal.status}\n")
    except Exception as error:
        _log.error("web_request_failed", **error_fields(error))
        return web.Response(status=500, text="500\n")


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
