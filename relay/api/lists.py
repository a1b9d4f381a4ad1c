"""Lists of events, deliveries and attempts: every one with its filters, newest first."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from relay.api.answers import limit_of, number, query_of, say
from relay.api.parts import Parts
from relay.items import list_items

FILTERS = {
    "events": ("id", "source", "type", "subject", "since", "until"),
    "deliveries": ("id", "event_id", "destination", "state"),
    "attempts": ("delivery_id",),
}


class ListsApi:
    """The part of the admin API with the long lists."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [web.get(f"/api/{kind}", self._list(kind, filters)) for kind, filters in FILTERS.items()]

    def _list(self, kind: str, filters: tuple[str, ...]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            query = query_of(request, (*filters, "limit", "cursor"))
            limit = limit_of(query)
            before = number(query["cursor"], "cursor") if "cursor" in query else None
            wanted = {name: query.get(name) for name in filters}
            now = self._clock.wall()
            return say(
                await list_items(self._store, kind, limit=limit, before=before, filters=wanted, now=now)
            )

        return answer
