"""One event or one delivery for operators, with everything that belongs to it; and a body as it came."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from relay.api.context import Parts
from relay.api.query_params import FIELDS, ExportQuery, Filter, ImportQuery, StatsQuery
from relay.api.responses import LINES, body_of, query_of, say, tell
from relay.api.views import list_stats, show_delivery, show_event
from relay.errors import RelayError, UnknownError
from relay.model import Expunged, StoredEvent
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


LONGEST_LINE = 64 * 2**20
"""Bytes of one exported event; the largest body there can be, in base64, is far below."""

CHUNK = 64 * 1024


class _Deletion(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    events: tuple[str, ...] | None = None
    filter: Filter | None = None
    dry_run: bool = False  # only count


class TransferApi:
    """The part of the admin API that moves or removes many events."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/export", self._export),
            web.post("/api/import", self._import),
            web.post("/api/events/delete", self._delete),
        ]

    async def _export(self, request: web.Request) -> web.StreamResponse:
        """Answer with a line per event; an answer that breaks off was not the whole of it."""
        query = query_of(request, ExportQuery)
        selection = query.selection(self._clock, everything=True)
        span = await self._store.queries.span(selection)
        if query.dry_run:
            count = sum([len(page) async for page in self._store.queries.select(selection, span)])
            return say({"count": count})
        lines = web.StreamResponse(headers={"Content-Type": LINES, "Cache-Control": "no-store"})
        await lines.prepare(request)
        async for line in self._store.queries.export(selection, span, deliveries=query.deliveries):
            await lines.write(line)
        await lines.write_eof()
        return lines

    async def _import(self, request: web.Request) -> web.Response:
        query = query_of(request, ImportQuery)
        steps = [done async for done in self._store.events.import_lines(_lines(request), owe=query.deliver)]
        return say(steps[-1])

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        hint = f"it has events or filter, and dry_run; a filter {FIELDS}"
        asked = await body_of(request, _Deletion, hint)
        if (asked.events is None) == (asked.filter is None):
            raise RelayError('either "events" or "filter" says which', hint=hint)
        if asked.filter is not None:
            selection = asked.filter.selection(self._clock)
            span = await self._store.queries.span(selection)
            count = sum([len(page) async for page in self._store.queries.select(selection, span)])
            work = Deleting(self._store, count, self._store.events.expunge_selected(selection, span))
        else:
            named = [chosen.event_id for chosen in await self._store.queries.name_events(asked.events or ())]
            work = Deleting(self._store, len(named), _at_once(self._store, named))
        if asked.dry_run:
            return say({"count": work.count})
        return await tell(request, work.run(), progress=work.told, result=lambda _: work.told())


class Deleting:
    """One deletion, and how far it is."""

    PATIENCE = 20  # seconds for what is just being sent: longer than an attempt takes by default

    def __init__(self, store: Store, count: int, steps: AsyncIterator[Expunged]) -> None:
        self._store = store
        self._steps = steps
        self.count = count
        self.deleted = self.cancelled = 0

    async def run(self) -> None:
        """Delete them all; an event of which something is being sent all the time stays."""
        left: list[int] = []
        async for gone in self._steps:
            left += self._add(gone)
        for _ in range(self.PATIENCE):
            if not left:
                return
            await asyncio.sleep(1)
            left = [*self._add(await self._store.events.expunge(left))]

    def _add(self, gone: Expunged) -> tuple[int, ...]:
        self.deleted += gone.events
        self.cancelled += gone.cancelled
        return gone.left

    def told(self) -> dict[str, int]:
        """Return how far it is."""
        return {"count": self.count, "deleted": self.deleted, "cancelled": self.cancelled}


async def _at_once(store: Store, event_ids: list[int]) -> AsyncIterator[Expunged]:
    yield await store.events.expunge(event_ids)


async def _lines(request: web.Request) -> AsyncIterator[bytes]:
    """Yield the lines of a request's body, whatever the pieces in which it comes; empty ones are none.

    Raises:
        RelayError: one is longer than any event, or the rest of them does not come.
    """
    parts: list[bytes] = []  # of a line that has not ended
    size = 0
    try:
        async for chunk in request.content.iter_chunked(CHUNK):
            *ended, rest = chunk.split(b"\n")
            for end in ended:
                line, parts, size = b"".join((*parts, end)), [], 0
                if line.strip():
                    yield line
            parts.append(rest)
            size += len(rest)
            if size > LONGEST_LINE:
                hint = "import what `relay events export` wrote"
                raise RelayError("a line is longer than any event", hint=hint)
    except (web.RequestPayloadError, ConnectionError) as error:
        hint = "run it again: an event that is in counts once"
        raise RelayError(f"the import broke off: {error}", hint=hint) from None
    if (line := b"".join(parts)).strip():
        yield line


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
