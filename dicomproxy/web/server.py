"""The HTTP server: health, metrics, status page. Read only, and without authentication.

Nothing of a request is logged, and nothing of one reaches a page.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from dicomproxy.logs import error_fields, get_logger
from dicomproxy.web.page import render
from dicomproxy.web.status import StatusSnapshot

_SHUTDOWN_SECONDS: Final = 1.0
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebServer:
    """Serves what ops look at.

    Args:
        readiness: whether associations are accepted.
        status: makes what the page shows.
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

    async def start(self) -> int:
        """Listen; return the port bound.

        Raises:
            OSError: the address cannot be bound.
        """
        application = web.Application(middlewares=[_guard])
        application.router.add_get("/", self._page)
        application.router.add_get("/health/live", self._live)
        application.router.add_get("/health/ready", self._ready)
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(
            application, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except BaseException:
            await self.close()
            raise
        port: int = self._runner.addresses[0][1]
        return port

    async def close(self) -> None:
        """Stop listening."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._readiness():
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready"}, status=503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=render(self._status()), content_type="text/html", charset="utf-8")


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put the headers on every answer, and log a crash by type only."""
    try:
        answer = await handler(request)
    except web.HTTPException as error:
        error.headers.update(_HEADERS)
        raise
    except Exception as error:
        _log.error("web_request_failed", **error_fields(error))
        answer = web.Response(status=500, text="500: Internal Server Error")
    answer.headers.update(_HEADERS)
    return answer
