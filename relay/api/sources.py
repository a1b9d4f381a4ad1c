"""Sources for operators: who may send, and telling them to keep it for a while."""

import logging
from typing import Any

from aiohttp import web

from relay.api.context import Parts
from relay.api.responses import say
from relay.api.views import item, unknown
from relay.config.effective import effective_source
from relay.ingest.routes import Mount
from relay.process.logs import fields

log = logging.getLogger("relay.ingest")


class SourcesApi:
    """The part of the admin API under `/api/sources`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._ingest = parts.ingest

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/sources", self._list),
            web.get("/api/sources/{name}", self._show),
            web.post("/api/sources/{name}/{verb:pause|resume}", self._steer),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        items = [_source(mount) for mount in self._ingest.mounts.values()]
        return say({"items": items, "next_cursor": None})

    async def _show(self, request: web.Request) -> web.Response:
        mount = self._mount(request)
        latest = await self._store.queries.find("events", source=mount.name, limit=1)
        settings = effective_source(mount.config)
        return say({**_source(mount), "settings": settings, "latest": item(latest[0]) if latest else None})

    async def _steer(self, request: web.Request) -> web.Response:
        name = self._mount(request).name
        paused = request.match_info["verb"] == "pause"
        await self._store.events.pause_source(name, paused=paused)
        if (mount := self._ingest.mounts.get(name)) is not None:  # unless a reload has removed it
            mount.paused = paused
        log.info("%s: %s by an operator", name, "paused" if paused else "resumed", extra=fields(source=name))
        return say({"name": name, "paused": paused})

    def _mount(self, request: web.Request) -> Mount:
        name = request.match_info["name"]
        if name not in self._ingest.mounts:
            raise unknown("source", name, self._ingest.mounts)
        return self._ingest.mounts[name]


def _source(mount: Mount) -> dict[str, Any]:
    return {
        "name": mount.name,
        "plugin": mount.config.plugin,
        "prefix": mount.config.prefix,
        "paused": mount.paused,
    }
