"""The admin side: health, metrics and the JSON API, on a loopback listener and a unix socket."""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from relay import __version__
from relay.api_events import EventsApi
from relay.api_repeats import RepeatsApi
from relay.api_workers import WorkersApi
from relay.clock import Clock, rfc3339
from relay.config.problem import ConfigError
from relay.config.secret import Secret
from relay.delivery.engine import Engine
from relay.delivery.lane import Lane
from relay.errors import RelayError, RestartNeededError, StorageError, UnknownError
from relay.filters import Router
from relay.health import Health
from relay.ingest.receive import Ingest
from relay.items import item, list_items
from relay.model import DestinationState
from relay.reload import Reloads
from relay.replay import Replays
from relay.store import Counts, Store

_encode = msgspec.json.Encoder(enc_hook=str, order="deterministic").encode

ABSENT = "not_in_config"
"""What holds the deliveries of a destination that is configured no more; its return resumes them."""


class Api:
    """Answers operators; both listeners share it, only what they let through differs."""

    def __init__(
        self,
        *,
        store: Store,
        ingest: Ingest,
        engine: Engine,
        health: Health,
        clock: Clock,
        registry: CollectorRegistry,
        replays: Replays,
        router: Router,
        reloads: Reloads,
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._engine = engine
        self._health = health
        self._clock = clock
        self._registry = registry
        self._began = clock.steady()
        self._reloads = reloads
        self._repeats = RepeatsApi(store, clock, replays, router)

    def socket_app(self) -> web.Application:
        """Return the app for the unix socket, whose file permissions are its access control."""
        app = web.Application(middlewares=[_errors])
        app.add_routes([*self._open_routes(), *self._api_routes()])
        return app

    def tcp_app(self, tokens: tuple[Secret, ...]) -> web.Application:
        """Return the app for the admin listener: health and metrics, the API only with a token."""
        app = web.Application(middlewares=[_errors, _guard(tokens)])
        app.add_routes([*self._open_routes(), *self._api_routes()])
        return app

    def _open_routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self._alive),
            web.get("/ready", self._ready),
            web.get("/metrics", make_aiohttp_handler(self._registry)),
        ]

    def _api_routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/status", self._status),
            web.post("/api/reload", self._reload),
            web.get("/api/events", self._list("events", "id", "source", "type", "subject", "since", "until")),
            web.get("/api/deliveries", self._list("deliveries", "id", "event_id", "destination", "state")),
            web.get("/api/attempts", self._list("attempts", "delivery_id")),
            *EventsApi(self._store).routes(),
            *self._repeats.routes(),
            *WorkersApi(self._store, self._clock).routes(),
            web.get("/api/destinations", self._destinations),
            web.get("/api/destinations/{name}", self._show_destination),
            web.post("/api/destinations/{name}/{verb:pause|resume|disable|enable}", self._steer),
            web.get("/api/sources", self._sources),
            web.post("/api/sources/{name}/{verb:pause|resume}", self._steer_source),
        ]

    async def _alive(self, _request: web.Request) -> web.Response:
        return _json({"status": "ok", "version": __version__})

    async def _ready(self, _request: web.Request) -> web.Response:
        reasons = self._health.reasons()
        return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _status(self, _request: web.Request) -> web.Response:
        reasons = self._health.reasons()
        return _json(
            {
                "version": __version__,
                "ready": not reasons,
                "reasons": reasons,
                "uptime_seconds": (self._clock.steady() - self._began) // 1_000_000,
                "sources": sorted(self._ingest.mounts),
                "destinations": sorted(self._engine.lanes),
            }
        )

    async def _reload(self, _request: web.Request) -> web.Response:
        return _json(await self._reloads.reload())

    def _list(self, kind: str, *filters: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            query = _known(request, (*filters, "limit", "cursor"))
            limit = _number(query.get("limit", "50"), "limit")
            before = _number(query["cursor"], "cursor") if "cursor" in query else None
            wanted = {name: query.get(name) for name in filters}
            now = self._clock.wall()
            return _json(
                await list_items(self._store, kind, limit=limit, before=before, filters=wanted, now=now)
            )

        return answer

    async def _destinations(self, _request: web.Request) -> web.Response:
        counts = await self._store.counts()
        items = [
            {**_destination(lane), **_counts(counts.get(lane.name))} for lane in self._engine.lanes.values()
        ]
        items += [
            {**self._absent(name), **_counts(books)}
            for name, books in counts.items()
            if name not in self._engine.lanes and books.pending
        ]
        return _json({"items": items, "next_cursor": None})

    async def _show_destination(self, request: web.Request) -> web.Response:
        counts, name = await self._store.counts(), request.match_info["name"]
        if name not in self._engine.lanes and name in counts:
            told = self._absent(name)
        else:
            lane = self._lane(request)
            told = {**_destination(lane), **_standing(lane)}
        latest = await self._store.find("deliveries", destination=name, limit=1)
        return _json(
            {**told, **_counts(counts.get(name)), "latest": item(latest[0]) if latest else None},
        )

    def _absent(self, name: str) -> dict[str, Any]:
        return {"name": name, "held": ABSENT, "in_flight": self._engine.in_flight(name)}

    def _lane(self, request: web.Request) -> Lane:
        name = request.match_info["name"]
        if name not in self._engine.lanes:
            raise _missing("destination", name, self._engine.lanes)
        return self._engine.lanes[name]

    async def _steer(self, request: web.Request) -> web.Response:
        lane = self._lane(request)
        now, state = self._clock.wall(), lane.standing.state
        changes: dict[str, dict[str, Any]] = {
            "pause": {"paused": True},
            "resume": {"paused": False},
            "disable": {"disabled_at": state.disabled_at or now, "disabled_reason": "operator"},
            "enable": {"disabled_at": None, "disabled_reason": None},
        }
        change = changes[request.match_info["verb"]]
        await lane.set_state(DestinationState(**{**msgspec.structs.asdict(state), **change}))
        return _json(_destination(lane))

    async def _sources(self, _request: web.Request) -> web.Response:
        items = [
            {
                "name": mount.name,
                "plugin": mount.config.plugin,
                "prefix": mount.config.prefix,
                "paused": mount.paused,
            }
            for mount in self._ingest.mounts.values()
        ]
        return _json({"items": items, "next_cursor": None})

    async def _steer_source(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._ingest.mounts:
            raise _missing("source", name, self._ingest.mounts)
        paused = request.match_info["verb"] == "pause"
        await self._store.pause_source(name, paused=paused)
        if (mount := self._ingest.mounts.get(name)) is not None:  # unless a reload has removed it
            mount.paused = paused
        return _json({"name": name, "paused": paused})


_ANSWERS: Mapping[type[RelayError], tuple[int, str]] = {
    UnknownError: (404, "not_found"),
    RestartNeededError: (409, "restart_needed"),
    StorageError: (503, "unavailable"),
    RelayError: (400, "bad_request"),
}


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Say every error as `{"error": {"code", "message", "hint"}}`."""
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        hint = "relay --help lists what there is" if error.status == web.HTTPNotFound.status_code else ""
        text = error.text if error.content_type == "application/json" else None
        if text is not None:
            return web.Response(status=error.status, text=text, content_type="application/json")
        response = _error(error.status, error.reason.lower().replace(" ", "_"), error.reason, hint)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConfigError as error:
        hint = "nothing was changed; correct the file and reload again"
        problems = [msgspec.structs.asdict(problem) for problem in error.problems]
        return _error(400, "bad_config", error.message, hint, problems=problems)
    except RelayError as error:
        status, code = next(answer for kind, answer in _ANSWERS.items() if isinstance(error, kind))
        return _error(status, code, error.message, error.hint)
    return response


def _guard(tokens: tuple[Secret, ...]) -> Any:
    """Let the API through only with a token, and only under a name that a web page cannot borrow."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if not request.path.startswith("/api/"):
            response: web.StreamResponse = await handler(request)
            return response
        if not _is_ours(request):
            return _error(403, "forbidden", "The Host header names neither this listener nor loopback")
        scheme, _, given = request.headers.get("Authorization", "").strip().partition(" ")
        presented = given.strip().encode("utf-8", "surrogateescape")
        known = [hmac.compare_digest(token.reveal().encode(), presented) for token in tokens]
        if scheme.lower() != "bearer" or not any(known):
            hint = "set [admin] tokens and send one as a Bearer token, or use the unix socket"
            return _error(401, "unauthorized", "Missing or unknown token", hint)
        if request.method != "GET" and request.content_type != "application/json":
            return _error(415, "unsupported_media_type", "Changes need Content-Type: application/json")
        return await handler(request)  # type: ignore[no-any-return]

    return check


def _is_ours(request: web.Request) -> bool:
    """Refuse DNS rebinding: the Host must be loopback or the address that was connected to."""
    host = request.host.rpartition(":")[0] if request.host.count(":") == 1 else request.host
    host = host.partition("]")[0].removeprefix("[")
    sockname = request.transport.get_extra_info("sockname") if request.transport else None
    if host == "localhost" or (sockname and host == sockname[0]):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=_encode(value), content_type="application/json")


def _error(status: int, code: str, message: str, hint: str = "", **more: Any) -> web.Response:
    return _json({"error": {"code": code, "message": message, "hint": hint, **more}}, status)


def _missing(kind: str, name: str, known: Mapping[str, Any]) -> web.HTTPNotFound:
    error = {"code": "not_found", "message": f"no {kind} {name!r}", "hint": f"there are {', '.join(known)}"}
    return web.HTTPNotFound(text=_encode({"error": error}).decode(), content_type="application/json")


def _known(request: web.Request, names: tuple[str, ...]) -> dict[str, str]:
    unknown = set(request.query) - set(names)
    if unknown:
        raise RelayError(f"unknown parameter {min(unknown)!r}", hint=f"there are {', '.join(names)}")
    return dict(request.query)


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 19):  # noqa: PLR2004 - digits of 2^63
        raise RelayError(f"{name} must be a whole number", hint=f"for example {name}=50")
    return int(text)


def _destination(lane: Lane) -> dict[str, Any]:
    return {"name": lane.name, "held": lane.held, "in_flight": lane.in_flight}


def _standing(lane: Lane) -> dict[str, Any]:
    """Say why it is not moving; without the URL, which may hold a token."""
    state, until = lane.standing.state, lane.standing.held_until
    times = {
        "failing_since": state.failing_since,
        "disabled_at": state.disabled_at,
        "held_until": until if lane.held else None,
    }
    shown = {name: None if moment is None else rfc3339(moment) for name, moment in times.items()}
    return {"events": lane.config.events, **shown}


def _counts(counts: Counts | None) -> dict[str, Any]:
    return msgspec.structs.asdict(counts or Counts())
