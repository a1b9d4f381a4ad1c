"""What came in, counted per source, type and hour; the counts outlive the events."""

from aiohttp import web

from relay.api.context import Parts
from relay.api.query_params import Filter, StatsQuery
from relay.api.responses import query_of, say
from relay.api.views import list_stats


class StatsApi:
    """The part of the admin API under `/api/stats`."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [web.get("/api/stats", self._list)]

    async def _list(self, request: web.Request) -> web.Response:
        query = query_of(request, StatsQuery)
        filter_ = Filter(source=query.source, type=query.type, since=query.since, until=query.until)
        selection = filter_.selection(self._clock, everything=True)
        return say(await list_stats(self._store, selection, limit=query.limit, cursor=query.cursor))
