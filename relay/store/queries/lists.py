"""Lists, newest first, each along an index; every page is bounded, see `relay.store.queries.page`."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from relay.errors import RelayError
from relay.model import Selection
from relay.store import Page
from relay.store.queries.filters import FILTERS, Filter
from relay.store.queries.page import TOP, Cursor, PageBudget, Step, search
from relay.store.queries.plan import (
    QueryPlan,
    cheapest,
    chunks,
    deliveries_by,
    few_deliveries,
    plan_of_deliveries,
    plans_of_events,
    types_matching,
)
from relay.store.queries.reader import Reader

PORTION = 1000
"""Deliveries of an event that are read at once."""

WORKER_LISTS = ("worker_metrics", "worker_commands")
"""Lists about workers: one statement, sorted by a time."""


async def read_page(
    reader: Reader, kind: str, *, limit: int, cursor: Cursor | None, filters: Mapping[str, Any]
) -> Page:
    """Return a page of at most `limit` rows before a cursor; `id` and `event_id` may be row ids as well.

    Raises:
        RelayError: the list or one of its filters does not exist.
    """
    if kind not in FILTERS:
        raise RelayError(f"unknown list {kind!r}", hint=f"lists: {', '.join(FILTERS)}")
    if unknown := set(filters) - set(FILTERS[kind]):
        raise RelayError(
            f"unknown filter {min(unknown)!r} of {kind}", hint=f"filters: {', '.join(FILTERS[kind])}"
        )
    wanted = {name: value for name, value in filters.items() if value is not None}
    if kind in WORKER_LISTS:
        return await _worker_page(reader, kind, limit, cursor, wanted)
    if kind == "attempts":
        return await _attempts_page(reader, limit, cursor or TOP, wanted)
    return await _page(reader, kind, limit, cursor or TOP, wanted)


async def _row_of(reader: Reader, kind: str, given: str | int | None) -> int | None:
    """Return the row id of a public id; 0 (the id of no row) if it is unknown."""
    return await reader.row_of(kind, given) if isinstance(given, str) else given


# --- events and deliveries ---


async def _page(reader: Reader, kind: str, limit: int, cursor: Cursor, wanted: dict[str, Any]) -> Page:
    """Return a page of events or deliveries.

    Deliveries are sorted by their own ids. Filters about their events sort them by the ids of the events.
    """
    own = await _row_of(reader, kind, wanted.pop("id", None))
    event = await _row_of(reader, "events", wanted.pop("event_id", None))
    replayed: bool | None = wanted.pop("replayed", None)
    selection = Selection(**wanted)
    deliveries = kind == "deliveries"
    of_delivery = selection == Selection(destination=selection.destination, state=selection.state)
    by_event = not deliveries or (own is None and event is None and not of_delivery)

    end, start = _end(cursor), 0
    if selection.since is not None or selection.until is not None:
        span = await reader.span(selection.since, selection.until)
        if span is None:
            return Page([], None)
        if by_event:
            end, start = min(end, span.last + 1), span.first
    types = await types_matching(reader, selection)
    if types == ():
        return Page([], None)
    plans = await _plans(reader, selection, types, own=own, event=event, by_event=by_event)
    plan = await cheapest(reader, plans, end, start)
    matching = Filter(selection, types, deliveries=deliveries, by_event=by_event)

    async def step(before: Cursor, count: int) -> Step:
        ids, reached = await plan.take(reader, min(end, _end(before)), start, count)
        found = await _positions(reader, matching, ids, before, within_event=deliveries and by_event)
        if replayed is not None and found:
            later = await reader.later([position.id for position in found])
            found = [position for position in found if (position.id in later) == replayed]
        return Step(found, None if reached is None else Cursor(reached), len(ids))

    budget = PageBudget(reads_bodies=matching.reads_bodies)
    positions, following = await search(step, limit, cursor, budget)
    return await _filled(reader, kind, positions, following)


async def _plans(
    reader: Reader,
    selection: Selection,
    types: Sequence[str] | None,
    *,
    own: int | None,
    event: int | None,
    by_event: bool,
) -> list[QueryPlan]:
    """Return the plans that lead to the rows; `own` and `event` are row ids from filters."""
    if own is not None:
        is_of_event = event is None or own in await _deliveries_of(reader, event)
        return [QueryPlan(ids=(own,) if is_of_event else ())]
    if event is not None:
        return [QueryPlan(deliveries_by("event_id"), [(event,)])]
    if by_event:
        return await plans_of_events(reader, selection, types)
    return [await plan_of_deliveries(reader, selection)]


async def _positions(
    reader: Reader, matching: Filter, ids: Sequence[int], before: Cursor, *, within_event: bool
) -> list[Cursor]:
    """Return the positions of the matches among candidates; `within_event`: rows of one event share a key."""
    if matching.is_open and not within_event:
        return [Cursor(id_) for id_ in ids]
    matches = await matching.matches(reader, ids) if ids else []
    if within_event:
        found = (Cursor(match.event_id, match.row) for match in matches)
    else:
        found = (Cursor(match.row) for match in matches)
    return sorted((position for position in found if position < before), reverse=True)


def _end(cursor: Cursor) -> int:
    """Return the exclusive upper bound of a page's keys; a cursor with a row includes its own key."""
    return cursor.key + 1 if cursor.row else cursor.key


async def _filled(reader: Reader, kind: str, positions: Sequence[Cursor], following: Cursor | None) -> Page:
    """Return a page with the rows at `positions` that still exist, and the cursor `following`."""
    rows = {}
    if ids := [position.id for position in positions]:
        rows = {row["row"]: row for row in await reader.rows(kind, ids)}
    if kind == "deliveries" and rows:
        # A delivery is sent again only after its end.
        ended = [id_ for id_, row in rows.items() if row["state"] != "pending"]
        later = await reader.later(ended) if ended else {}
        rows = {id_: {**row, "replayed_by": later.get(id_)} for id_, row in rows.items()}
    found = [rows[id_] for id_ in ids if id_ in rows]
    return Page(found, None if following is None else str(following))


# --- attempts ---

_Take = Callable[[Cursor, int], Awaitable[Iterable[Any]]]  # candidates: key and row id


async def _attempts_page(reader: Reader, limit: int, cursor: Cursor, wanted: dict[str, Any]) -> Page:
    """Return a page of attempts: those of one delivery by id, all others by the time at which they began."""
    take, done = await _attempts_plan(reader, wanted)
    rest = {name: value for name, value in wanted.items() if name not in done}

    async def step(before: Cursor, count: int) -> Step:
        positions = [Cursor(key, id_) for key, id_ in await take(before, count)]
        found = positions
        if rest and positions:
            matches = await reader.matching_attempts(rest, [position.row for position in positions])
            found = [position for position in positions if position.row in matches]
        return Step(found, positions[-1] if len(positions) == count else None, len(positions))

    return await _filled(reader, "attempts", *await search(step, limit, cursor, PageBudget()))


async def _attempts_plan(reader: Reader, wanted: Mapping[str, Any]) -> tuple[_Take, tuple[str, ...]]:
    """Return a function that yields candidates, and the filters that all candidates fulfil."""
    of_event = None
    if (given := wanted.get("event_id")) is not None:
        of_event = await _deliveries_of(reader, await _row_of(reader, "events", given) or 0)
    if (given := wanted.get("delivery_id")) is not None:
        delivery = await _row_of(reader, "deliveries", given) or 0
        if of_event is not None and delivery not in of_event:
            delivery = 0

        async def take_own(before: Cursor, count: int) -> list[tuple[int, int]]:
            return [(id_, id_) for id_ in await reader.attempts_of(delivery, before.key, count)]

        return take_own, ("delivery_id", "event_id")
    listed, done = None, "destination"
    if of_event is not None:
        listed, done = of_event, "event_id"
    elif "destination" in wanted:
        listed = await few_deliveries(reader, Selection(destination=wanted["destination"]))
    if listed is not None:
        ordered: list[tuple[int, int]] = []
        for some in chunks(listed):
            ordered += await reader.attempts_of_all(some)
        ordered.sort(reverse=True)

        async def take(before: Cursor, count: int) -> list[tuple[int, int]]:
            return [row for row in ordered if row < (before.key, before.row)][:count]

        return take, (done,)
    since, until = wanted.get("since", 0), wanted.get("until", TOP.key)
    return (
        lambda before, count: reader.attempts_between(
            since, min(before.key, until - 1), (before.key, before.row), count
        ),
        ("since", "until"),
    )


async def _deliveries_of(reader: Reader, event: int) -> list[int]:
    """Return the row ids of all deliveries of an event, including replays."""
    plan, found, end = QueryPlan(deliveries_by("event_id"), [(event,)]), list[int](), TOP.key
    while True:
        ids, reached = await plan.take(reader, end, 0, PORTION)
        found += ids
        if reached is None:
            return found
        end = reached


# --- workers ---


async def _worker_page(
    reader: Reader, kind: str, limit: int, cursor: Cursor | None, wanted: Mapping[str, Any]
) -> Page:
    """Return a page of a list about workers."""
    rows = await reader.worker_rows(kind, wanted, None if cursor is None else cursor.key, limit)
    return Page(rows, str(Cursor(rows[-1]["row"])) if len(rows) == limit else None)
