"""Events: list, show, explain, export, import, delete and count them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import IdPage, Lines, Page, endpoint
from relay.api.query_params import (
    EventQuery,
    EventsQuery,
    ExportQuery,
    Filter,
    ImportQuery,
    StatsQuery,
    TypesQuery,
)
from relay.api.responses import LINES, CountView, check_selected_once, respond, stream_lines
from relay.api.views import (
    EventShown,
    EventView,
    ReplyView,
    StatView,
    TypeView,
    about,
    list_items,
    list_stats,
    list_types,
    show_event,
)
from relay.base.clock import rfc3339
from relay.errors import RelayError, UnknownError
from relay.ingest.replies import MOST_REPLIES
from relay.model import Expunged, Imported, StoredEvent
from relay.routing.router import explained
from relay.store import Store

LONGEST_LINE = 64 * 2**20
"""Bytes of one exported event that every import accepts, unless a source has a larger `max_body`."""

MOST_COPIES = 4
"""Maximum length of the line of an event, as a multiple of its body: text is up to twice as long, and so is
data that is not part of the body."""

CHUNK = 64 * 1024

REPLIES = "show the replies"
"""The request to another node."""

PATIENCE = 1.0  # seconds to wait for the other nodes


class MatchView(msgspec.Struct):
    """Whether an event goes to a destination, and why."""

    name: str
    matches: bool
    reason: Literal["matched", "no_pattern", "taken_away", "where"]
    lines: Annotated[
        tuple[str, ...],
        msgspec.Meta(description="The reason in words; for a failed condition, with the event's value."),
    ]
    held: Annotated[
        str | None, about("Why its deliveries wait now; null if they do not, or it does not match.")
    ]
    options: Annotated[
        tuple[str, ...],
        about("The effects of grouping, order, expiry and `on_dead` on this event, in words."),
    ]
    retries: Annotated[
        str | None,
        msgspec.Meta(description="Which responses are retried, and for how long; null if it does not match."),
    ]


class Explanation(msgspec.Struct):
    """Where an event goes, and why."""

    id: str
    type: str
    destinations: tuple[MatchView, ...]


class DeletionBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The events to delete: their ids, or a filter."""

    events: tuple[str, ...] | None = None
    filter: Filter | None = None
    dry_run: bool = False  # only count


class DeletedView(msgspec.Struct):
    """Progress of a deletion."""

    count: int
    deleted: int
    cancelled: int


async def load_event(store: Store, given: str) -> StoredEvent:
    """Return an event with its body, by its id or a unique prefix of it.

    Raises:
        RelayError: no event has this id, or several have this prefix.
    """
    [chosen] = await store.queries.name_events([given])
    event = (await store.events.load([chosen.event_id])).get(chosen.event_id)
    if event is None:
        raise UnknownError("the event has just been deleted")
    return event


class EventsApi:
    """Endpoints under `/api/events`, and those that export, import and count events."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._dispatcher = context.dispatcher
        self._clock = context.clock
        self._state = context.state
        self._ingest = context.ingest
        context.store.nodes.handle(REPLIES, self._replies_here)
        self._check_names = context.check_names

    @endpoint(
        "GET", "/api/events", "listEvents",
        "List events, newest first. A page may be shorter than its limit when matches are rare.",
        query=EventsQuery, returns=IdPage[EventView],
    )  # fmt: skip
    async def _list(self, _request: web.Request, query: EventsQuery) -> dict[str, Any]:
        filters = msgspec.structs.asdict(query)
        return await list_items(
            self._store,
            "events",
            limit=filters.pop("limit"),
            cursor=filters.pop("cursor"),
            filters=filters,
            now=self._clock.wall(),
            sources=self._state.ingest.mounts.keys(),
            destinations=self._dispatcher.lanes.keys(),
        )

    @endpoint(
        "GET", "/api/events/{id}", "showEvent", "Show an event with its deliveries.",
        query=EventQuery, returns=EventShown,
    )  # fmt: skip
    async def _show(self, request: web.Request, query: EventQuery) -> dict[str, Any]:
        shown = await show_event(self._store, request.match_info["id"], query.payload)
        return {**shown, "replies": await self._replies_to(shown["id"], 1 + shown["repetitions"])}

    async def _replies_to(self, event_id: str, count: int) -> list[ReplyView]:
        """Return the known replies about an event; ask the other nodes if some are missing here."""
        found = await self._replies_here("", event_id)
        if len(found) < min(count, MOST_REPLIES) and not self._store.nodes.alone:
            answers = await self._store.nodes.ask_others(REPLIES, event_id, PATIENCE)
            found += [each for _, given in answers.read(list[ReplyView])[0] for each in given]
        return sorted(found, key=lambda reply: reply.received_at)

    async def _replies_here(self, _to: str, event_id: str) -> list[ReplyView]:
        return [
            ReplyView(
                received_at=rfc3339(sent.received_at),
                status=sent.status,
                duration_ms=round(sent.duration / 1000, 1),
                heard=sent.heard,
            )
            for sent in self._ingest.replies.of(event_id)
        ]

    @endpoint(
        "GET", "/api/events/{id}/body", "eventBody", "Return the request body of an event, byte for byte.",
        returns=str, content="application/octet-stream",
    )  # fmt: skip
    async def _body(self, request: web.Request) -> web.Response:
        """Return the body as a download, so that no browser shows it as a page of the relay."""
        event = await load_event(self._store, request.match_info["id"])
        headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=event.body, content_type="application/octet-stream", headers=headers)

    @endpoint(
        "GET", "/api/events/{id}/explain", "explainEvent",
        "Show for each destination whether the event goes there, and why.", returns=Explanation,
    )  # fmt: skip
    async def _explain(self, request: web.Request) -> dict[str, Any]:
        event = await load_event(self._store, request.match_info["id"])
        matches = explained(self._state.router, event, self._state.config.destinations)
        for each in matches:
            if each["matches"] and (lane := self._dispatcher.lanes.get(each["name"])) is not None:
                held, until = lane.held, lane.health.held_until or 0
                is_future = held is not None and until > self._clock.steady()
                each["held"] = f"{held} until {rfc3339(until)}" if is_future else held
        return {"id": event.public_id, "type": event.type, "destinations": matches}

    @endpoint(
        "GET", "/api/export", "exportEvents", "Export events as lines of JSON, oldest first.",
        query=ExportQuery, returns=dict[str, Any], content=LINES,
    )  # fmt: skip
    async def _export(self, request: web.Request, query: ExportQuery) -> web.StreamResponse:
        """Send one line per event. If the export fails, the connection is closed early."""
        selection = query.selection(self._clock, everything=True)
        await self._check_names(selection)
        span = await self._store.queries.span(selection)
        if query.dry_run:
            return respond(
                CountView(sum([len(page) async for page in self._store.queries.select(selection, span)]))
            )
        lines = web.StreamResponse(headers={"Content-Type": LINES, "Cache-Control": "no-store"})
        await lines.prepare(request)
        async for line in self._store.queries.export(selection, span, deliveries=query.deliveries):
            await lines.write(line)
        await lines.write_eof()
        return lines

    @endpoint(
        "POST", "/api/import", "importEvents", "Import the lines of an export. Known events are skipped.",
        query=ImportQuery, body=LINES, returns=Imported, scope="admin",
    )  # fmt: skip
    async def _import(self, request: web.Request, query: ImportQuery) -> Imported:
        largest = max((mount.config.max_body for mount in self._ingest.mounts.values()), default=0)
        lines = _lines(request, max(LONGEST_LINE, MOST_COPIES * largest))
        steps = [done async for done in self._store.events.import_lines(lines, deliver=query.deliver)]
        return steps[-1]

    @endpoint(
        "POST", "/api/events/delete", "deleteEvents", "Delete events of any age, or count them.",
        body=DeletionBody, returns=CountView | Lines[DeletedView], scope="admin",
    )  # fmt: skip
    async def _delete(self, request: web.Request, body: DeletionBody) -> web.StreamResponse:
        check_selected_once("events", body.events, body.filter)
        if body.filter is not None:
            selection = body.filter.selection(self._clock)
            await self._check_names(selection)
            span = await self._store.queries.span(selection)
            count = sum([len(page) async for page in self._store.queries.select(selection, span)])
            work = Deletion(self._store, count, self._store.events.expunge_selected(selection, span))
        else:
            named = [chosen.event_id for chosen in await self._store.queries.name_events(body.events or ())]
            work = Deletion(self._store, len(named), _expunge(self._store, named))
        if body.dry_run:
            return respond(CountView(work.count))
        return await stream_lines(
            request, work.run(), progress=work.progress, result=lambda _: work.progress()
        )

    @endpoint(
        "GET", "/api/stats", "listStats", "Count events per hour, source and type, including deleted events.",
        query=StatsQuery, returns=Page[StatView],
    )  # fmt: skip
    async def _stats(self, _request: web.Request, query: StatsQuery) -> dict[str, Any]:
        filter_ = Filter(source=query.source, type=query.type, since=query.since, until=query.until)
        selection = filter_.selection(self._clock, everything=True)
        return await list_stats(
            self._store,
            selection,
            limit=query.limit,
            cursor=query.cursor,
            sources=self._state.ingest.mounts.keys(),
        )

    @endpoint(
        "GET", "/api/types", "listTypes", "List the types of events that arrived, the most frequent first.",
        query=TypesQuery, returns=Page[TypeView],
    )  # fmt: skip
    async def _types(self, _request: web.Request, query: TypesQuery) -> dict[str, Any]:
        selection = Filter(source=query.source, since=query.since).selection(self._clock, everything=True)
        sources = self._state.ingest.mounts.keys()
        return await list_types(self._store, selection, limit=query.limit, sources=sources)


class Deletion:
    """One deletion and its progress."""

    PATIENCE = 20  # seconds to wait for deliveries in flight, longer than an attempt takes by default

    def __init__(self, store: Store, count: int, steps: AsyncIterator[Expunged]) -> None:
        self._store = store
        self._steps = steps
        self.count = count
        self.deleted = self.cancelled = 0

    async def run(self) -> None:
        """Delete the events, except those with a delivery that stays in flight for `PATIENCE`."""
        left: list[int] = []
        async for step in self._steps:
            left += self._add(step)
        for _ in range(self.PATIENCE):
            if not left:
                return
            await asyncio.sleep(1)
            left = [*self._add(await self._store.events.expunge(left))]

    def _add(self, step: Expunged) -> tuple[int, ...]:
        self.deleted += step.events
        self.cancelled += step.cancelled
        return step.left

    def progress(self) -> dict[str, int]:
        """Return the numbers of selected events, deleted events and cancelled deliveries."""
        return {"count": self.count, "deleted": self.deleted, "cancelled": self.cancelled}


async def _expunge(store: Store, event_ids: list[int]) -> AsyncIterator[Expunged]:
    yield await store.events.expunge(event_ids)


async def _lines(request: web.Request, most: int) -> AsyncIterator[bytes]:
    """Yield the lines of a request body, without empty lines.

    Raises:
        RelayError: a line has more than `most` bytes, or the body ends early.
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
            if size > most:
                hint = "import the output of `relay events export`; larger events need a larger `max_body`"
                raise RelayError("a line is longer than any event of this relay's sources", hint=hint)
    except (web.RequestPayloadError, ConnectionError) as error:
        hint = "run it again: events that are already stored are skipped"
        raise RelayError(f"the import stopped: {error}", hint=hint) from None
    if (line := b"".join(parts)).strip():
        yield line
