"""Lists of events, deliveries and attempts: every one with its filters, newest first."""

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from relay.api.context import Parts
from relay.api.query_params import AttemptsQuery, DeliveriesQuery, EventsQuery
from relay.api.responses import query_of, say
from relay.api.views import list_items

Query = EventsQuery | DeliveriesQuery | AttemptsQuery


class ListsApi:
    """The part of the admin API with the long lists."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._engine = parts.engine
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/events", self._list("events", EventsQuery)),
            web.get("/api/deliveries", self._list("deliveries", DeliveriesQuery)),
            web.get("/api/attempts", self._list("attempts", AttemptsQuery)),
        ]

    def _list(self, kind: str, type_: type[Query]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            query = query_of(request, type_)
            filters = msgspec.structs.asdict(query)
            page = await list_items(
                self._store,
                kind,
                limit=filters.pop("limit"),
                cursor=filters.pop("cursor"),
                filters=filters,
                now=self._clock.wall(),
                destinations=self._engine.lanes.keys(),
            )
            return say(page)

        return answer
