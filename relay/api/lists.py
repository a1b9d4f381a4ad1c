"""Lists of events, deliveries and attempts: every one with its filters, newest first."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from relay.api.context import Parts
from relay.api.query_params import one_of, read_field
from relay.api.responses import limit_of, query_of, say
from relay.api.views import list_items
from relay.model import RESULTS
from relay.store.queries.lists import FILTERS as STORED

FILTERS = {kind: STORED[kind] for kind in ("events", "deliveries", "attempts")}


class ListsApi:
    """The part of the admin API with the long lists."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._engine = parts.engine
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [web.get(f"/api/{kind}", self._list(kind, filters)) for kind, filters in FILTERS.items()]

    def _list(self, kind: str, filters: tuple[str, ...]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            query = query_of(request, (*filters, "limit", "cursor"))
            limit = limit_of(query)
            wanted = {name: query.get(name) for name in filters}
            if wanted.get("result") is not None:
                read_field("result", lambda text: one_of(text, RESULTS), wanted["result"])
            page = await list_items(
                self._store,
                kind,
                limit=limit,
                cursor=query.get("cursor"),
                filters=wanted,
                now=self._clock.wall(),
                destinations=self._engine.lanes.keys(),
            )
            return say(page)

        return answer
