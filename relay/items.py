"""Events, deliveries and attempts as operators see them: the JSON of lists, and of one with its parts."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from relay.clock import moment, rfc3339
from relay.errors import RelayError
from relay.model import Chosen, Named, Selection, Stat

MOST_ROWS = 500
"""Rows that one answer may have."""

_PLACE = re.compile(r"([0-9]{1,18})/([^/]+)/(.+)", re.DOTALL)  # of a count: hour, source, type
_TIMES = ("received_at", "created_at", "finished_at", "next_attempt_at", "started_at")


class Reads(Protocol):
    """What of a store is read here; see `relay.store.Store`."""

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """See `Store.find`."""
        ...

    async def name_events(self, ids: Sequence[str]) -> tuple[Chosen, ...]:
        """See `Store.name_events`."""
        ...

    async def name_deliveries(self, ids: Sequence[str]) -> tuple[Named, ...]:
        """See `Store.name_deliveries`."""
        ...


class Tells(Protocol):
    """What of a store is read for counts; see `relay.store.Store`."""

    def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """See `Store.stats`."""
        ...


async def list_items(
    reads: Reads, kind: str, *, limit: int, before: int | None, filters: Mapping[str, Any], now: int
) -> dict[str, Any]:
    """Return one page, newest first, and the cursor of the next; `since` and `until` come as text.

    Raises:
        RelayError: no such list, it has no such filter, or a time is none.
    """
    limit = min(limit, MOST_ROWS)
    wanted = dict(filters)
    for name in ("since", "until"):
        if wanted.get(name) is not None:
            wanted[name] = _moment(name, wanted[name], now)
    rows = await reads.find(kind, limit=limit, before=before, **wanted)
    more = str(rows[-1]["row"]) if len(rows) == limit else None
    return {"items": [item(row) for row in rows], "next_cursor": more}


async def list_stats(reads: Tells, selection: Selection, *, limit: int, cursor: str | None) -> dict[str, Any]:
    """Return one page of the counts per hour, source and type, the latest first.

    Raises:
        RelayError: the selection is by more than source, type and time, or the cursor is none of this list.
    """
    after = None
    if cursor is not None:
        place = _PLACE.fullmatch(cursor)
        if place is None:
            hint = "send the next_cursor of the page before"
            raise RelayError("the cursor is none of this list", hint=hint)
        after = (int(place[1]), place[2], place[3])
    found: list[Stat] = []
    async for page in reads.stats(selection, after=after):
        found += page
        if len(found) > limit:
            break
    last = found[limit - 1] if len(found) > limit else None
    return {
        "items": [{**msgspec.structs.asdict(each), "hour": rfc3339(each.hour)} for each in found[:limit]],
        "next_cursor": None if last is None else f"{last.hour}/{last.source}/{last.type}",
    }


def _moment(name: str, text: str, now: int) -> int:
    try:
        return moment(text, now)
    except ValueError as error:
        raise RelayError(f'"{name}": {error}') from None


async def show_event(reads: Reads, given: str) -> dict[str, Any]:
    """Return one event by its id, which may be shortened, with its deliveries and their count by state.

    Raises:
        RelayError: there is none, or there are several.
    """
    [chosen] = await reads.name_events([given])
    [row] = await reads.find("events", limit=1, before=chosen.event_id + 1)
    owed = await reads.find("deliveries", limit=MOST_ROWS, event_id=row["id"])
    states = sorted(each["state"] for each in owed)
    return {
        **item(row),
        "states": {state: states.count(state) for state in states},
        "deliveries": [item(each) for each in owed],
    }


async def show_delivery(reads: Reads, given: str) -> dict[str, Any]:
    """Return one delivery likewise, with the latest of its attempts first.

    Raises:
        RelayError: there is none, or there are several.
    """
    [named] = await reads.name_deliveries([given])
    [row] = await reads.find("deliveries", limit=1, before=named.id + 1)
    tries = await reads.find("attempts", limit=MOST_ROWS, delivery_id=row["id"])
    return {**item(row), "tries": [item(each) for each in tries]}


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a list as JSON has it: times in RFC 3339, an answer as text."""
    shown = {name: value for name, value in row.items() if name != "row"}
    for name in _TIMES:
        if shown.get(name) is not None:
            shown[name] = rfc3339(shown[name])
    if "answer" in shown:
        shown["answer"] = shown["answer"].decode("utf-8", "replace")
        shown["truncated"] = bool(shown["truncated"])
    return shown
