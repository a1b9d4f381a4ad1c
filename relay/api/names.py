"""Names and ids that begin with a text, for the completion of the command line."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import Page, endpoint
from relay.api.query_params import Filter, NamesQuery
from relay.api.views import about, list_types
from relay.base.clock import rfc3339
from relay.base.ids import REPLAY, dashed
from relay.errors import RelayError

MOST = 100
"""Names in one response."""

MOST_TYPES = 10_000
"""Types among which those with a prefix are searched."""

RECENT = 200
"""Latest events or deliveries whose ids are compared. An older id is found if its prefix is unique."""

_PREFIXES = {"event": "evt_", "delivery": "dlv_"}
_LISTS = {"event": "events", "delivery": "deliveries"}


class NameView(msgspec.Struct):
    """A name or an id."""

    name: str
    about: Annotated[str, about("A few words about it. May be empty.")]


class NamesApi:
    """The endpoint `/api/names`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @endpoint(
        "GET", "/api/names", "listNames",
        "List names and recent ids that begin with a prefix, for completion.",
        query=NamesQuery, returns=Page[NameView],
    )  # fmt: skip
    async def _list(self, _request: web.Request, query: NamesQuery) -> dict[str, Any]:
        if query.kind in _LISTS:
            found = await self._ids(query.kind, query.prefix)
        elif query.kind == "type":
            found = await self._types(query)
        elif query.kind == "replay":
            found = self._replays(query.prefix)
        else:
            found = [each for each in self._names(query) if each[0].startswith(query.prefix)]
        items = [NameView(name, about_) for name, about_ in found[:MOST]]
        return {"items": items, "next_cursor": None}

    async def _types(self, query: NamesQuery) -> list[tuple[str, str]]:
        """Return the types of the last week that begin with a text."""
        clock, sources = self._context.clock, self._context.ingest.mounts
        selection = Filter(source=query.source, since="7d").selection(clock)
        types = (await list_types(self._context.store, selection, limit=MOST_TYPES, sources=sources))["items"]
        return [
            (each.type, f"{each.events} in the last week")
            for each in types
            if each.type.startswith(query.prefix)
        ]

    def _names(self, query: NamesQuery) -> Iterator[tuple[str, str]]:
        context = self._context
        match query.kind:
            case "source":
                yield from ((name, mount.config.plugin) for name, mount in context.ingest.mounts.items())
            case "destination":
                yield from ((name, lane.held or "") for name, lane in context.dispatcher.lanes.items())
            case "job":
                yield from ((past.name, "") for past in context.jobs.all())
            case "worker":
                yield from sorted(
                    (worker.id, f"{worker.source}, {worker.status}")
                    for worker in context.store.workers.all()
                    if worker.unregistered_at is None and query.source in (None, worker.source)
                )

    def _replays(self, typed: str) -> list[tuple[str, str]]:
        return [
            (shown, f"{each.state}, {each.done} of {each.total} events")
            for each in self._context.replays.all()
            for shown in _as_typed(each.id, REPLAY, typed)
        ]

    async def _ids(self, kind: str, typed: str) -> list[tuple[str, str]]:
        """Return the latest ids that begin with a text, with or without prefix and dashes like the text."""
        queries, prefix = self._context.store.queries, _PREFIXES[kind]
        short, is_whole, is_plain = _read(typed, prefix)
        rows = await queries.find(_LISTS[kind], limit=RECENT)
        found = [row for row in rows if row["id"].startswith(prefix + dashed(short))]
        if not found and short:
            with suppress(RelayError):  # no id, or several old ids
                if kind == "event":
                    [row_id] = [each.event_id for each in await queries.name_events([short])]
                else:
                    [row_id] = [each.id for each in await queries.name_deliveries([short])]
                found = await queries.find(_LISTS[kind], limit=1, id=row_id)
        return [
            (_shown(row["id"], prefix, is_whole=is_whole, is_plain=is_plain), _about(row)) for row in found
        ]


def _read(typed: str, prefix: str) -> tuple[str, bool, bool]:
    """Return the digits that an operator typed, whether with the prefix, and whether without dashes."""
    is_whole = prefix.startswith(typed) or typed.startswith(prefix)
    short = "" if prefix.startswith(typed) else typed.lower().removeprefix(prefix)
    return short, is_whole, "-" not in short and len(short) > len("01234567")


def _as_typed(id_: str, prefix: str, typed: str) -> list[str]:
    """Return the id in the form in which it was begun; nothing if it does not begin with the text."""
    short, is_whole, is_plain = _read(typed, prefix)
    fits = id_.startswith(prefix + dashed(short))
    return [_shown(id_, prefix, is_whole=is_whole, is_plain=is_plain)] if fits else []


def _shown(id_: str, prefix: str, *, is_whole: bool, is_plain: bool) -> str:
    """Return an id as the operator began to type it: with or without prefix and dashes."""
    bare = id_.removeprefix(prefix)
    return (prefix if is_whole else "") + (bare.replace("-", "") if is_plain else bare)


def _about(row: dict[str, Any]) -> str:
    if "destination" in row:
        return f"{row['type']} to {row['destination']}, {row['state']}"
    return f"{row['type']} at {rfc3339(row['received_at'])}"
