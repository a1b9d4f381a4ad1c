"""Answers 503 in place of the daemon while config.toml is invalid and systemd owns the sockets.

If the daemon exited instead, each connection would start it again until systemd gives up on the service and
its sockets; then even a corrected configuration would not start.
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from relay.api.audit import Trail
from relay.api.auth import Access, name_requests, set_headers
from relay.api.guesses import Guesses
from relay.api.listener import listen
from relay.api.responses import body_of, error_response, errors, respond
from relay.api.scrape import Scrape
from relay.base.clock import SystemClock
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.paths import socket_path
from relay.config.problems import ConfigError
from relay.config.schema import Admin, Config
from relay.config.tables import bind_tables
from relay.errors import RelayError, Unavailable
from relay.ingest.implementation import implementation_of
from relay.ingest.replies import Response, plain
from relay.ingest.request import Request
from relay.ingest.server import Server
from relay.metrics import Metrics
from relay.plugin_loading.loader import Setup
from relay.process.logs import in_one_line
from relay.process.sockets import bind_unix
from relay.process.state_dir import StateDir
from relay.process.systemd import Inherited, Notifier
from relay.process.watchdog import Watchdog
from relay.reload import ReloadBody, Reloaded

log = logging.getLogger("relay.hold")

RETRY_AFTER = 30
"""Seconds in `Retry-After`: somebody has to correct a file first."""

LAZYCHAT_PROBE = "settings.checking_connection"
"""LazyChat's plugin logs its shop out unless this probe gets 200; a person has to log in again.

See docs/contracts/lazychat.md#connection-check.
"""

HINT = "correct it, then `relay reload` or `systemctl restart relay`"


class Standby:
    """Answers 503 in place of a daemon that cannot start."""

    def __init__(
        self, path: Path, error: RelayError, load: Callable[[], Setup], environ: Mapping[str, str]
    ) -> None:
        """Prepare.

        Args:
            path: config.toml.
            error: the fault that prevents the start.
            load: reads config.toml again; called in a thread.
            environ: the environment with the daemon's directories.
        """
        self._path = path
        self._error = error
        self._load = load
        self._environ = environ
        self._setup: Setup | None = None
        self._done = asyncio.Event()
        self._lock = asyncio.Lock()  # held during a reload
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener, _ = implementation_of("fast")
        # Without any reload, relay_config_last_reload_successful is 0 here, which raises its alert.
        self._metrics = Metrics(listener=self._listener)
        self._scrape = Scrape(self._metrics.registry)
        self._watchdog = Watchdog(Notifier(environ), stuck=list, status=self._status)

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> Setup | None:
        """Answer 503 until the configuration is valid, and return it; None: a signal stopped it first.

        Raises:
            RelayError: the sockets cannot be used.
        """
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as life:
            self._watchdog.start()
            life.callback(self._watchdog.stop)
            sockets = Inherited(self._environ).lend()
            for sock in sockets.values():
                life.callback(sock.close)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._done.set)
                life.callback(loop.remove_signal_handler, number)
            loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
            life.callback(loop.remove_signal_handler, signal.SIGHUP)
            await self._open_admin_socket(life)
            if (admin := sockets.pop("admin", None)) is not None:
                runner = await listen(self._app(api=False), admin, grace=1.0)
                life.push_async_callback(runner.cleanup)
            for sock in sockets.values():
                server = Server(self._refuse, implementation=self._listener)
                await server.listen(sock)
                life.push_async_callback(self._close, server)
            log.error("answering 503 until %s is valid: %s; %s", self._path, self._why, HINT)
            self._watchdog.started()
            on_ready()
            await self._done.wait()
            if self._setup is None:
                self._watchdog.stopping()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return self._setup

    @property
    def _why(self) -> str:
        return in_one_line(self._error.message)

    def _status(self) -> str:
        return f"not serving: {self._why}" if self._setup is None else "starting"

    async def _open_admin_socket(self, life: AsyncExitStack) -> None:
        """Listen on the admin socket, unless another daemon owns the state directory."""
        config = self._config()
        state_dir = StateDir(config.state_dir)
        try:
            state_dir.take()
            life.callback(state_dir.release)
            path = socket_path(config, self._environ)
            unix = bind_unix(path)
        except RelayError as error:
            log.warning("the admin socket is not available, reload with SIGHUP: %s", in_one_line(error))
            return
        life.callback(path.unlink, missing_ok=True)
        runner = await listen(self._app(api=True), unix, grace=1.0)
        life.push_async_callback(runner.cleanup)

    def _config(self) -> Config:
        """Return the valid part of the configuration, for the state directory and the name of the socket."""
        folder = Path(self._environ.get("STATE_DIRECTORY", "").partition(":")[0] or self._path.parent)
        with suppress(ConfigError):
            return bind_tables(Binder(read(self._path), self._environ, lenient=True))
        return Config(path=self._path.absolute(), state_dir=folder.absolute())

    async def _close(self, server: Server) -> None:
        server.leave()
        await server.stop_listening()
        await server.close(grace=1.0)

    async def _refuse(self, request: Request) -> Response:
        if request.headers.get("X-Event-Type") == LAZYCHAT_PROBE:
            return Response(200, b'{"success":true}')
        return plain(Unavailable(retry_after=RETRY_AFTER))

    def _app(self, *, api: bool) -> web.Application:
        middlewares = [name_requests(SystemClock()), errors]
        if api:
            clock = SystemClock()
            access, trail = Access(Admin(), _no_login, Guesses(clock)), Trail(None, clock)
            middlewares[1:] = [access.at_socket(), trail.middleware(), errors]
        app = web.Application(middlewares=middlewares)
        app.on_response_prepare.append(set_headers)
        app.add_routes([web.get("/health", self._alive), web.get("/ready", self._ready)])
        app.router.add_get("/metrics", self._scrape.answer)
        if api:
            app.router.add_post("/api/reload", self._answer_reload)
        app.router.add_route("*", "/{rest:.*}", self._unavailable)
        return app

    async def _alive(self, _request: web.Request) -> web.Response:
        return respond({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.Response:
        return respond({"ready": False, "reasons": [self._why], "warnings": []}, 503)

    async def _unavailable(self, _request: web.Request) -> web.Response:
        response = error_response(503, "unavailable", f"the daemon cannot start: {self._error.message}", HINT)
        response.headers["Retry-After"] = str(RETRY_AFTER)
        return response

    async def _answer_reload(self, request: web.Request) -> web.Response:
        body = await body_of(request, ReloadBody, optional=True)
        if body.dry_run:
            return respond(self._loaded(await asyncio.to_thread(self._load)))
        return respond(await self._reload())

    async def _reload(self) -> Reloaded:
        """Read config.toml again; if it is valid, `run` ends.

        Raises:
            RelayError: it is still invalid.
        """
        async with self._lock:
            with self._watchdog.reloading():
                try:
                    setup = self._setup = await asyncio.to_thread(self._load)
                except RelayError as error:
                    self._error = error
                    log.error("config.toml is still invalid: %s", self._why)  # noqa: TRY400 - the message has the reason
                    raise
        self._done.set()
        log.info("%s is valid: starting", self._path)
        return self._loaded(setup)

    def _loaded(self, setup: Setup) -> Reloaded:
        """Return the tables that the daemon starts with."""
        tables: dict[str, Any] = {"sources": setup.config.sources, "destinations": setup.config.destinations}
        added = tuple(f"{kind}.{name}" for kind, table in tables.items() for name in table)
        return Reloaded(path=str(self._path), added=added, warnings=setup.config.warnings)

    def _reload_soon(self) -> None:
        task = asyncio.create_task(self._reload_in_background())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload_in_background(self) -> None:
        with suppress(RelayError):  # `_reload` logs it
            await self._reload()


async def _no_login(_request: web.Request) -> None:
    """Return None: without a store, there are no logins."""
