"""The admin API: one app for the unix socket, one for the admin listener."""

import asyncio
import socket
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.audit import AuditApi, Trail
from relay.api.auth import Access, name_requests, set_headers
from relay.api.context import Context
from relay.api.database import DatabaseApi
from relay.api.deliveries import DeliveriesApi
from relay.api.destinations import DestinationsApi
from relay.api.endpoints import JSON, Page, document, endpoint, endpoints_of, routes_of
from relay.api.events import EventsApi
from relay.api.guesses import Guesses
from relay.api.history import HistoryApi
from relay.api.jobs import JobsApi
from relay.api.logins import Logins, LoginsApi
from relay.api.names import NamesApi
from relay.api.nodes import NodesApi
from relay.api.query_params import read_query
from relay.api.refused import RefusedApi
from relay.api.replays import ReplaysApi
from relay.api.responses import errors, respond
from relay.api.scrape import Scrape
from relay.api.sources import SourcesApi
from relay.api.status import SHOW, Problems, StatusView, problems_of, status_of
from relay.api.tail import TailApi
from relay.api.top import TopApi
from relay.api.views import about
from relay.api.workers import WorkersApi
from relay.base.turns import Turns
from relay.config.effective import fill
from relay.config.schema import Config
from relay.reload import ReloadBody, Reloaded


class HealthView(msgspec.Struct):
    """The process is up. Contains no version, because everybody may send this request."""

    status: str


class ReadyView(msgspec.Struct):
    """Whether the daemon accepts events, and if not, why."""

    ready: bool
    reasons: list[str]
    warnings: Annotated[
        list[str], about("Risks that do not keep the daemon from accepting events; the most severe first.")
    ]


class ConfigView(msgspec.Struct):
    """The effective configuration."""

    path: str
    config: dict[str, Any]
    origins: Annotated[
        Mapping[str, str],
        about(
            "File and line of each key that is set, and the place of its secret. Other keys have defaults."
        ),
    ]
    warnings: tuple[str, ...]


class OfferingView(msgspec.Struct):
    """One thing that a plugin provides."""

    name: str
    offer: str
    door: str
    version: str
    file: str


class DaemonApi:
    """Endpoints about the daemon itself: health, metrics, status, configuration and plugins."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._began = context.clock.steady()
        self._scrape = Scrape(context.registry)
        context.store.nodes.handle(SHOW, self._show_problems)
        self._shown: tuple[Config, ConfigView] | None = None  # until a reload

    @endpoint("GET", "/health", "health", "Check that the process is up.", returns=HealthView, public=True)
    async def _health(self, _request: web.Request) -> HealthView:
        return HealthView("ok")

    @endpoint(
        "GET", "/ready", "ready", "Check that the daemon accepts events.",
        returns=ReadyView, also={503: ReadyView}, public=True,
    )  # fmt: skip
    async def _ready(self, _request: web.Request) -> web.Response:
        reasons = self._context.health.reasons()
        warnings = [caution.what for caution in self._context.database_watch.cautions]
        return respond(ReadyView(not reasons, reasons, warnings), 503 if reasons else 200)

    @endpoint(
        "GET", "/metrics", "metrics", "Return all metrics for Prometheus.",
        returns=str, content="text/plain", public=True,
    )  # fmt: skip
    async def _metrics(self, request: web.Request) -> web.Response:
        return await self._scrape.answer(request)

    @endpoint("GET", "/api/openapi.json", "openapi", "Return this document.", returns=dict[str, Any])
    async def _document(self, _request: web.Request) -> dict[str, Any]:
        return await asyncio.to_thread(describe)

    @endpoint(
        "GET", "/api/status", "status", "Show version, readiness, backups, disk and problems.",
        returns=StatusView,
    )  # fmt: skip
    async def _status(self, _request: web.Request) -> StatusView:
        return await status_of(self._context, self._began)

    async def _show_problems(self, _to: str, _argument: None) -> Problems:
        """Return the problems of this node, for another node."""
        return problems_of(self._context)

    @endpoint(
        "POST",
        "/api/reload",
        "reload",
        "Reload config.toml: apply the whole file or nothing.",
        body=ReloadBody,
        optional_body=True,
        returns=Reloaded,
        scope="admin",
    )
    async def _reload(self, _request: web.Request, body: ReloadBody) -> Reloaded:
        reloads = self._context.reloads
        return await (reloads.preview() if body.dry_run else reloads.reload())

    @endpoint(
        "GET", "/api/config", "showConfig", "Show the effective configuration, including defaults.",
        returns=ConfigView,
    )  # fmt: skip
    async def _config(self, _request: web.Request) -> ConfigView:
        config = self._context.state.config
        if self._shown is None or self._shown[0] is not config:
            turns, tables = Turns(), dict[str, Any]()
            for _ in fill(tables, config):
                await turns.give()
            self._shown = config, ConfigView(str(config.path), tables, config.origins, config.warnings)
        return self._shown[1]

    @endpoint(
        "GET", "/api/plugins", "listPlugins", "List what the plugins provide.", returns=Page[OfferingView]
    )
    async def _plugins(self, _request: web.Request) -> Page[OfferingView]:
        offers = self._context.state.setup.offers
        return Page(tuple(OfferingView(**offering.shown()) for offering in offers), None)


RESOURCES = (
    DaemonApi, EventsApi, DeliveriesApi, ReplaysApi, DestinationsApi, SourcesApi, WorkersApi, JobsApi,
    DatabaseApi, NamesApi, HistoryApi, NodesApi, RefusedApi, AuditApi, LoginsApi,
)  # fmt: skip


@cache
def describe() -> dict[str, Any]:
    """Return the OpenAPI document of the admin API."""
    resources = (*RESOURCES, TailApi, TopApi)
    return document(each for resource in resources for each in endpoints_of(resource).values())


class _Inquiry(msgspec.Struct, frozen=True):
    """The part of a request that handlers of GET endpoints read."""

    match_info: Mapping[str, str]


class Api:
    """The admin API. Both listeners serve it; they differ in their access control."""

    def __init__(self, context: Context) -> None:
        config = context.state.config
        self._clock = context.clock
        self.logins = Logins(context.store, context.clock, config.admin)
        self._access = Access(config.admin, self.logins.find, Guesses(context.clock))
        self._trail = Trail(context.store.audit, context.clock, config.cluster.node or socket.gethostname())
        self._tail, self._top = TailApi(context), TopApi(context)
        self._resources = (*(resource(context) for resource in RESOURCES), self._tail, self._top)
        self._router = web.UrlDispatcher()  # both listeners share its resources
        for resource in self._resources:
            self._router.add_routes(routes_of(resource))
        self._reads = {
            each.name: (each, getattr(resource, method))
            for resource in self._resources
            for method, each in endpoints_of(type(resource)).items()
            if each.method == "GET" and each.content == JSON
        }

    async def ask(
        self, name: str, path: Mapping[str, str] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """Return the answer of a GET endpoint as JSON values, for a page that shows it.

        Args:
            name: operationId of the endpoint.
            path: values of the parameters in its path.
            query: its query parameters.

        Raises:
            RelayError: as the endpoint does.
        """
        endpoint, handler = self._reads[name]
        arguments = [] if endpoint.query is None else [read_query(query or {}, endpoint.query)]
        answer = await handler(_Inquiry(path or {}), *arguments)
        return msgspec.to_builtins(answer, enc_hook=str)

    def add_pages(self, routes: Iterable[web.RouteDef]) -> None:
        """Serve the pages of the dashboard on both listeners; call it before `socket_app` and `tcp_app`."""
        self._router.add_routes(routes)

    def end_streams(self) -> None:
        """End all streams; otherwise the listeners would wait for them and not close.

        Work for other nodes ends as well.
        """
        for resource in self._resources:
            if (end := getattr(resource, "end", None)) is not None:
                end()

    def socket_app(self) -> web.Application:
        """Return the app for the unix socket, whose file permissions are its access control."""
        return self._app(self._access.at_socket())

    def tcp_app(self) -> web.Application:
        """Return the app for the admin listener: the API needs an operator, health and metrics do not."""
        return self._app(self._access.at_listener())

    def _app(self, access: Any) -> web.Application:
        middlewares = (name_requests(self._clock), errors, access, self._trail.middleware(), errors)
        app = web.Application(middlewares=middlewares)
        app.on_response_prepare.append(set_headers)
        for resource in self._router.resources():
            app.router.register_resource(resource)
        return app
