"""What came in, counted per source, type and hour; the counts outlive the events."""

from aiohttp import web

from relay.api.context import Parts
from relay.api.responses import limit_of, query_of, say
from relay.api.selection import filter_of
from relay.api.views import list_stats

FILTERS = ("source", "type", "since", "until")


class StatsApi:
    """The part of the admin API under `/api/stats`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [web.get("/api/stats", self._list)]

    async def _list(self, request: web.Request) -> web.Response:
        query = query_of(request, (*FILTERS, "limit", "cursor"))
        wanted = {name: query[name] for name in FILTERS if name in query}
        selection = filter_of(wanted).selection(self._clock, everything=True)
        cursor = query.get("cursor")
        return say(await list_stats(self._store, selection, limit=limit_of(query), cursor=cursor))
