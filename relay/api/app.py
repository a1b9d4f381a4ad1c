"""The two apps that operators ask: one for the unix socket, one for the admin listener."""

from importlib.resources import files
from typing import Any

from aiohttp import web

from relay import __version__
from relay.api.auth import audit, guard, named, show
from relay.api.context import Parts
from relay.api.database import DatabaseApi
from relay.api.destinations import DestinationsApi
from relay.api.events import EventsApi, StatsApi, TransferApi
from relay.api.jobs import JobsApi
from relay.api.lists import ListsApi
from relay.api.replays import RepeatsApi
from relay.api.responses import errors, say
from relay.api.scrape import Scrape
from relay.api.sources import SourcesApi
from relay.api.tail import TailApi
from relay.api.top import TopApi
from relay.api.workers import WorkersApi
from relay.config.effective import effective
from relay.config.secrets import Secret
from relay.model import News

_DESCRIPTION = (files("relay.api") / "openapi.json").read_bytes()
"""What all of this is in OpenAPI's words; tests hold it to the routes and to real answers."""


class SetupApi:
    """The part of the admin API that says what the relay was made of."""

    def __init__(self, parts: Parts) -> None:
        self._state = parts.state

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/config", self._config),
            web.get("/api/plugins", self._plugins),
        ]

    async def _config(self, _request: web.Request) -> web.Response:
        config = self._state.config
        return say({"path": config.path, "config": effective(config), "warnings": config.warnings})

    async def _plugins(self, _request: web.Request) -> web.Response:
        items = [offering.shown() for offering in self._state.setup.offers]
        return say({"items": items, "next_cursor": None})


RESOURCES = (
    ListsApi, TransferApi, EventsApi, RepeatsApi, DestinationsApi, SourcesApi, WorkersApi, JobsApi, StatsApi,
    DatabaseApi, SetupApi,
)  # fmt: skip


class Api:
    """Answers operators; both listeners share it, only what they let through differs."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._began = parts.clock.steady()
        self._tail, self._top = TailApi(parts), TopApi(parts)
        self._resources = (*(resource(parts) for resource in RESOURCES), self._tail, self._top)

    def listen(self, news: News) -> None:
        """Tell who follows what one commit stored (see `relay.store.Listener`)."""
        self._tail.listen(news)

    def hang_up(self) -> None:
        """End all streams, which else never would: nothing waits for them at a stop."""
        self._tail.end()
        self._top.end()

    def socket_app(self) -> web.Application:
        """Return the app for the unix socket, whose file permissions are its access control."""
        return self._app(audit, errors)

    def tcp_app(self, tokens: tuple[Secret, ...]) -> web.Application:
        """Return the app for the admin listener: health and metrics, the API only with a token."""
        return self._app(guard(tokens), audit, errors)

    def _app(self, *middlewares: Any) -> web.Application:
        app = web.Application(middlewares=[named(self._parts.clock), *middlewares])
        app.on_response_prepare.append(show)
        app.add_routes(self.routes())
        return app

    def routes(self) -> list[web.RouteDef]:
        """Return all that is answered."""
        return [
            web.get("/health", self._alive),
            web.get("/ready", self._ready),
            web.get("/metrics", Scrape(self._parts.registry).answer),
            web.get("/api/openapi.json", self._describe),
            web.get("/api/status", self._status),
            web.post("/api/reload", self._reload),
            *(route for resource in self._resources for route in resource.routes()),
        ]

    async def _describe(self, _request: web.Request) -> web.Response:
        return web.Response(body=_DESCRIPTION, content_type="application/json")

    async def _alive(self, _request: web.Request) -> web.Response:
        return say({"status": "ok", "version": __version__})

    async def _ready(self, _request: web.Request) -> web.Response:
        reasons = self._parts.health.reasons()
        return say({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _status(self, _request: web.Request) -> web.Response:
        reasons = self._parts.health.reasons()
        return say(
            {
                "version": __version__,
                "ready": not reasons,
                "reasons": reasons,
                "uptime_seconds": (self._parts.clock.steady() - self._began) // 1_000_000,
                "sources": sorted(self._parts.ingest.mounts),
                "destinations": sorted(self._parts.engine.lanes),
            }
        )

    async def _reload(self, _request: web.Request) -> web.Response:
        return say(await self._parts.reloads.reload())
