"""Sources for operators: who may send, and telling them to keep it for a while."""

from aiohttp import web

from relay.api.answers import say, unknown
from relay.api.parts import Parts


class SourcesApi:
    """The part of the admin API under `/api/sources`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._ingest = parts.ingest

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/sources", self._list),
            web.post("/api/sources/{name}/{verb:pause|resume}", self._steer),
        ]

    async def _list(self, _request: web.Request) -> web.Response:
        items = [
            {
                "name": mount.name,
                "plugin": mount.config.plugin,
                "prefix": mount.config.prefix,
                "paused": mount.paused,
            }
            for mount in self._ingest.mounts.values()
        ]
        return say({"items": items, "next_cursor": None})

    async def _steer(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._ingest.mounts:
            raise unknown("source", name, self._ingest.mounts)
        paused = request.match_info["verb"] == "pause"
        await self._store.pause_source(name, paused=paused)
        if (mount := self._ingest.mounts.get(name)) is not None:  # unless a reload has removed it
            mount.paused = paused
        return say({"name": name, "paused": paused})
