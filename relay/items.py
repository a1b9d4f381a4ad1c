"""Events, deliveries and attempts as operators see them: the JSON of lists, and of one with its parts."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from relay.clock import moment, rfc3339
from relay.errors import RelayError
from relay.model import Chosen, Named

MOST_ROWS = 500
"""Rows that one answer may have."""

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
