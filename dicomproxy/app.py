"""The proxy as a whole: construct, validate, start; stop in reverse, even after half a start."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from dicomproxy import __version__, logs
from dicomproxy.audit import FileAudit
from dicomproxy.cache import DiskInstanceStore
from dicomproxy.config import ConfigError, Settings, load
from dicomproxy.dimse.layer import UpperLayer
from dicomproxy.dimse.listener import Listener
from dicomproxy.identity.notices import LiveIdentities
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.retrieval.flights import Flights
from dicomproxy.services.operations import Operations
from dicomproxy.snapshot import snapshot
from dicomproxy.state import StateStore
from dicomproxy.state.accessions import AccessionMap
from dicomproxy.tasks import TaskOwner, log_tasks
from dicomproxy.web import WebServer
from dicomproxy.wiring import (
    Foundation,
    Routing,
    cache_settings,
    flight_settings,
    limits,
    timers,
)
from dicomproxy.wiring_hl7 import Hl7
from dicomproxy.wiring_identity import read_secrets

_CANCEL_SECONDS: Final = 5.0
_FAREWELL_SECONDS: Final = 2.0
_RETIRED_SECONDS: Final = 3600.0

_log = get_logger()

_NEEDS_RESTART: Final[dict[str, Callable[[Settings], object]]] = {
    "proxy.host": lambda settings: settings.proxy.host,
    "proxy.port": lambda settings: settings.proxy.port,
    "proxy.timers": lambda settings: settings.proxy.timers,
    "proxy.limits": lambda settings: settings.proxy.limits,
    "cache": lambda settings: settings.cache,
    "state": lambda settings: settings.state,
    "audit": lambda settings: settings.audit,
    "retrieve.attempts": lambda settings: settings.retrieve.attempts,
    "retrieve.finish_abandoned": lambda settings: settings.retrieve.finish_abandoned,
    "retrieve.retry_pause": lambda settings: settings.retrieve.retry_pause,
    "hl7": lambda settings: settings.hl7,
    "web": lambda settings: settings.web,
}
"""Keys that a reload cannot change, each with how to read it."""


class Application:
    """A running proxy. Make it inside a running event loop."""

    def __init__(self, settings: Settings, config_file: Path | None = None) -> None:
        self.settings = settings
        self.started_at = time.time()
        self.port = 0
        self.web_port = 0
        self.ready = False
        self.draining = False
        self.operations = Operations()
        self._started_with = settings
        self._config_file = config_file
        self._stack = AsyncExitStack()
        self._tasks = TaskOwner("app")
        self._stop = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._signals = 0
        self.layer: UpperLayer
        self.store: DiskInstanceStore
        self.flights: Flights
        self.listener: Listener | None = None
        self.routing: Routing | None = None
        self.identities = LiveIdentities()
        self.hl7: Hl7 | None = None
        self._foundation: Foundation

    async def start(self) -> None:
        """Start everything, associations last.

        Raises:
            OSError, CacheLocked: an address, a directory or a file cannot be used;
                whatever was started is stopped again.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        settings = self.settings
        web = WebServer(
            settings.web.host,
            settings.web.port,
            readiness=lambda: self.ready and not self.draining,
            status=lambda: snapshot(self),
        )
        self.layer = UpperLayer(timers(settings), limits(settings))
        self.store = DiskInstanceStore(cache_settings(settings))
        await self.store.start()
        self._stack.push_async_callback(self.store.close)
        locations = StateStore(settings.state_directory)
        await locations.start()
        self._stack.push_async_callback(locations.close)
        accessions = AccessionMap(settings.state_directory)
        await accessions.start()
        self._stack.push_async_callback(accessions.close)
        audit = FileAudit(settings.audit_file)
        await audit.start()
        self._stack.push_async_callback(audit.close)
        self.flights = Flights(self.store, flight_settings(settings), locations)
        self._foundation = Foundation(
            self.layer, self.store, locations, accessions, audit, self.flights, self.operations
        )
        self._stack.push_async_callback(self.layer.close, _FAREWELL_SECONDS)
        secrets = await asyncio.to_thread(read_secrets, settings)
        routing = self.routing = Routing(settings, self._foundation, secrets)
        self.identities.add(routing.identity)
        self._stack.push_async_callback(self._close_routing)
        await routing.start()
        if settings.hl7 is not None:
            hl7 = self.hl7 = Hl7(settings.hl7, settings.state_directory, self.identities)
            self._stack.push_async_callback(hl7.close)
            await hl7.start()
        # What they fetch is told to stop while there are associations to say it on.
        self._stack.push_async_callback(self.flights.close)
        self._stack.push_async_callback(self._tasks.close)
        listener = self.listener = Listener(
            self.layer,
            routing.acceptor,
            max_associations=settings.proxy.max_associations,
        )
        self._stack.push_async_callback(listener.close)
        self.web_port = await web.start()
        self._stack.push_async_callback(web.close)
        self.port = await listener.start(settings.proxy.host, settings.proxy.port)
        self.ready = True
        _log.info(
            "started",
            version=__version__,
            ae_title=settings.proxy.ae_title,
            host=settings.proxy.host,
            port=self.port,
            sources=[source.name for source in settings.sources],
            mode=type(asyncio.get_running_loop()).__module__.partition(".")[0],
        )

    async def _close_routing(self) -> None:
        if self.routing is not None:
            await self._end(self.routing)

    async def _end(self, routing: Routing) -> None:
        """Close a routing; until then it is told of merged records."""
        try:
            await routing.close()
        finally:
            self.identities.remove(routing.identity)

    # ----------------------------------------------------------------- running

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and stop.

        SIGHUP reloads, SIGUSR1 logs every task.
        """
        self.heed_signals()
        try:
            await self._stop.wait()
            await self.drain()
        finally:
            await self.close()

    def heed_signals(self) -> None:
        """Let no signal end the process halfway; told to stop while it starts, it stops then."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, self._hangup)
        loop.add_signal_handler(signal.SIGUSR1, log_tasks)

    def ignore_signals(self) -> None:
        """Let none end the process in its last moments: who tells it twice gets its exit code too.

        Not when a loop of somebody else's runs this: it is for the rest of the process.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _signalled(self, number: int) -> None:
        self._signals += 1
        _log.info("stopping", signal=signal.Signals(number).name)
        self._stop.set()
        if self._signals > 1:
            self.operations.cancel_all()  # asked twice: the grace period is over

    async def drain(self) -> None:
        """Take no more work, let what is under way end within the grace period, else cancel it."""
        self.draining = True
        if self.routing is not None:
            self.routing.acceptor.drain()
        try:
            async with asyncio.timeout(self.settings.proxy.shutdown_grace):
                await self.operations.wait_idle()
                return
        except TimeoutError:
            pass
        _log.warning("draining_cancelled", operations=len(self.operations.running))
        self.operations.cancel_all()
        try:
            async with asyncio.timeout(_CANCEL_SECONDS):
                await self.operations.wait_idle()
        except TimeoutError:
            _log.warning("draining_aborted", operations=len(self.operations.running))
            log_tasks()

    async def close(self) -> None:
        """Stop everything, in reverse."""
        self.ready = False
        await self._stack.aclose()
        _log.info("stopped")

    # ---------------------------------------------------------------- reloading

    def _hangup(self) -> None:
        if self.draining:
            return
        self._tasks.spawn(self.reload(), name="reload")

    async def reload(self) -> bool:
        """Read the configuration again; if it is sound, new associations follow it.

        Those that stand go on as they began. Keys that cannot change while
        running are named in the log and keep their old values.
        """
        # One after the other: what was read first must not come into force last.
        async with self._reloading:
            return await self._reload()

    async def _reload(self) -> bool:
        if self._config_file is None or self.listener is None or self.routing is None:
            return False
        try:
            settings = await asyncio.to_thread(load, self._config_file)
        except ConfigError as error:
            for fault in error.faults:
                _log.error(
                    "reload_refused",
                    file=fault.file,
                    line=fault.line,
                    key=fault.path,
                )
            return False
        try:
            secrets = await asyncio.to_thread(read_secrets, settings)
        except Exception as error:
            _log.error("reload_refused", **error_fields(error))
            return False
        started_with = self._started_with
        kept = [
            name for name, read in _NEEDS_RESTART.items() if read(settings) != read(started_with)
        ]
        if kept:
            _log.warning("reload_needs_restart", keys=kept)
        try:
            routing = Routing(settings, self._foundation, secrets)
        except Exception as error:
            _log.error("reload_refused", **error_fields(error))
            return False
        self.identities.add(routing.identity)
        try:
            await routing.start()
        except BaseException as error:
            await self._end(routing)
            if not isinstance(error, Exception):
                raise
            _log.error("reload_refused", **error_fields(error))
            return False
        if self.draining:  # it would take in the work that is being turned away
            await self._end(routing)
            return False
        retired, self.routing = self.routing, routing
        self.settings = settings
        self.listener.acceptor = routing.acceptor
        self.listener.max_associations = settings.proxy.max_associations
        logs.configure(settings.log.level, settings.log.format)
        self._tasks.spawn(self._retire(retired), name="retire")
        _log.info("reloaded", sources=[source.name for source in settings.sources])
        return True

    async def _retire(self, routing: Routing) -> None:
        """Close what a former configuration opened once nobody uses it any more."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETIRED_SECONDS):
                    await routing.acceptor.wait_idle()
            # A study may be fetched to its end although whoever asked for it has gone.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETIRED_SECONDS):
                    await self._foundation.flights.wait_unused(routing.sources)
        finally:
            await self._end(routing)


def serve(settings: Settings, config_file: Path) -> int:
    """Run the proxy until it is told to stop; return the exit code."""
    logs.claim_output()
    logs.configure(settings.log.level, settings.log.format)
    return run_on_loop(lambda: _serve(settings, config_file))


async def _serve(settings: Settings, config_file: Path) -> int:
    asyncio.get_running_loop().set_exception_handler(logs.loop_exception_handler)
    application = Application(settings, config_file)
    application.heed_signals()
    try:
        try:
            await application.start()
        except Exception as error:
            _log.critical("start_failed", **error_fields(error))
            return 1
        await application.run()
        return 0
    finally:
        application.ignore_signals()


def run_on_loop(main: Callable[[], object]) -> int:
    """Run *main* on the fastest event loop that is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop
    except ImportError:
        pass
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())  # type: ignore[arg-type]
