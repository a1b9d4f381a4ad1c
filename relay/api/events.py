"""One event or one delivery for operators, with everything that belongs to it; and a body as it came."""

from aiohttp import web

from relay.api.context import Parts
from relay.api.responses import say
from relay.api.views import show_delivery, show_event
from relay.errors import UnknownError
from relay.model import StoredEvent
from relay.store import Store


async def whole(store: Store, given: str) -> StoredEvent:
    """Return an event with its body, by its id, which may be shortened.

    Raises:
        RelayError: there is none, or there are several.
    """
    [chosen] = await store.queries.name_events([given])
    event = (await store.events.load([chosen.event_id])).get(chosen.event_id)
    if event is None:
        raise UnknownError("the event was deleted just now")
    return event


class EventsApi:
    """The part of the admin API about single events and deliveries; ids may be shortened while unique."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/events/{id}", self._event),
            web.get("/api/events/{id}/body", self._body),
            web.get("/api/deliveries/{id}", self._delivery),
        ]

    async def _event(self, request: web.Request) -> web.Response:
        return say(await show_event(self._store, request.match_info["id"]))

    async def _delivery(self, request: web.Request) -> web.Response:
        return say(await show_delivery(self._store, request.match_info["id"]))

    async def _body(self, request: web.Request) -> web.Response:
        """Answer with the sender's bytes; as a download, so that no browser takes them for a page of ours."""
        event = await whole(self._store, request.match_info["id"])
        headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=event.body, content_type="application/octet-stream", headers=headers)
