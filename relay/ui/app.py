"""The routes of the dashboard, its static files and its error pages."""

import logging
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from relay.api.auth import PAGES
from relay.api.logins import Logins
from relay.api.responses import error_of
from relay.base.clock import Clock
from relay.errors import RelayError, StorageUnavailableError
from relay.store.opening import is_storage_failure
from relay.ui import (
    audit,
    daemon,
    deliveries,
    destinations,
    events,
    login,
    now,
    refused,
    replays,
    sources,
    workers,
)
from relay.ui.markup import tag
from relay.ui.page import STATIC, Ask, Screen, Visit
from relay.ui.parts import linked

log = logging.getLogger("relay.ui")

SCREENS: Mapping[str, Screen] = {
    "/": now.show,
    "/events": events.list_,
    "/events/{id}": events.show,
    "/deliveries": deliveries.list_,
    "/deliveries/{id}": deliveries.show,
    "/attempts": deliveries.attempts,
    "/replays": replays.list_,
    "/replays/{id}": replays.show,
    "/destinations": destinations.list_,
    "/destinations/{name}": destinations.show,
    "/sources": sources.list_,
    "/sources/{name}": sources.show,
    "/workers": workers.list_,
    "/workers/{source}/{id:[^/]+}": workers.show,
    "/jobs": daemon.jobs,
    "/config": daemon.config,
    "/doctor": daemon.doctor,
    "/nodes": daemon.nodes,
    "/audit": audit.list_,
    "/refused": refused.list_,
    "/refused/{id}": refused.show,
}
"""The function that makes each page, by the path below `/ui`. A path takes no final slash."""

_YEAR = 365 * 86_400


class Dashboard:
    """The pages at `/ui/`."""

    def __init__(self, ask: Ask, logins: Logins, clock: Clock, node: str) -> None:
        """Take `relay.api.app.Api.ask`, which returns the data of pages, and the name of this node."""
        self._ask = ask
        self._logins = logins
        self._clock = clock
        self._node = node

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of all pages."""
        return [
            web.get("/", _to_root),
            web.get(PAGES, _to_root),
            web.get(f"{PAGES}/static/{{name}}", _static),
            *login.routes(self._logins, f"{PAGES}{login.PATH}"),
            *(web.get(f"{PAGES}{path}", self._serve(screen)) for path, screen in SCREENS.items()),
            web.get(f"{PAGES}/{{rest:.*}}", self._serve(_missing)),
        ]

    def _serve(self, screen: Screen) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            visit = Visit(request, self._ask, self._clock, self._node)
            if visit.operator is None:
                return login.page(visit)
            try:
                return await screen(visit)
            except RelayError as error:
                return _failed(visit, error)
            except Exception as error:
                if is_storage_failure(error):
                    what = f"cannot read the database: {error}"
                    return _failed(visit, StorageUnavailableError(what, hint="run: relay doctor"))
                log.exception("the page %s failed", request.path)
                hint = "this is a bug in the relay; the traceback is in its log"
                return visit.page("Internal error", tag("p", hint), status=500)

        return answer


def _failed(visit: Visit, error: RelayError) -> web.Response:
    status, shown = error_of(error)
    hint = tag("p", shown["hint"]) if shown["hint"] else None
    title = {404: "Not found", 503: "Unavailable"}.get(status, "Invalid request")
    what = tag("p", linked(visit, shown["message"]), class_="error", role="alert")
    return visit.page(title, what, hint, status=status)


async def _missing(visit: Visit) -> web.Response:
    back = tag("a", "Now", href=visit.link())
    return visit.page("Not found", tag("p", "This page does not exist. Go to ", back, "."), status=404)


async def _to_root(_request: web.Request) -> web.Response:
    """Send a browser from `/` or `/ui` to `/ui/`; a relative address works behind a proxy with any path."""
    return web.Response(status=308, headers={"Location": "ui/"})


async def _static(request: web.Request) -> web.Response:
    """Return a static file.

    During an upgrade, another node may have made the page, so a name with another digest gets this version,
    which browsers must not keep.
    """
    name = request.match_info["name"]
    found = STATIC.get(name)
    caching = "no-store" if found is None else f"public, max-age={_YEAR}, immutable"
    if found is None:
        stem, _, ending = name.partition(".")[0], *name.rpartition(".")[1:]
        same = [each for each in STATIC.values() if _matches(each.name, stem, ending)]
        if not same:
            return web.Response(status=404, text="not found")
        found = same[0]
    return web.Response(
        body=found.content,
        content_type=found.content_type,
        charset="utf-8",
        headers={"Cache-Control": caching},
    )


def _matches(name: str, stem: str, ending: str) -> bool:
    return name.startswith(f"{stem}.") and name.endswith(f".{ending}")
