"""Lists, newest first, each along an index; every page is bounded, see `relay.store.sqlite.queries.page`."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import aiosqlite
import msgspec

from relay.errors import RelayError
from relay.model import DeliveryState, Selection
from relay.store import Page
from relay.store.sqlite import event_times
from relay.store.sqlite.queries.filters import FILTERS, Filter
from relay.store.sqlite.queries.page import TOP, Cursor, PageBudget, Step, search
from relay.store.sqlite.queries.plan import (
    DELIVERY_PATHS,
    QueryPlan,
    cheapest,
    chunks,
    few_deliveries,
    plan_of_deliveries,
    plans_of_events,
    types_matching,
)
from relay.store.sqlite.rows import marks

EVENTS_SQL = """
    SELECT e.id AS row, e.public_id AS id, e.source, e.type, substr(e.subject, 1, 256) AS subject,
           e.received_at, e.size,
           EXISTS (SELECT 1 FROM repetitions AS r WHERE r.event_id = e.id) AS duplicate,
           (SELECT json_object({counts}) FROM deliveries AS d WHERE d.event_id = e.id) AS deliveries
      FROM events AS e WHERE e.id IN ({marks})
""".replace(
    "{counts}", ", ".join(f"'{state}', sum(d.state = '{state}')" for state in get_args(DeliveryState))
)
DELIVERIES_SQL = """
    SELECT d.id AS row, d.public_id AS id, v.public_id AS event_id, v.type, d.destination, d.state,
           d.reason, d.attempts, d.next_attempt_at, d.last_status, d.last_error, d.created_at,
           d.finished_at, (SELECT r.public_id FROM deliveries AS r WHERE r.id = d.replay_of) AS replay_of,
           d.group_key
      FROM deliveries AS d CROSS JOIN events AS v ON v.id = d.event_id WHERE d.id IN ({marks})
"""
ATTEMPTS_SQL = """
    SELECT a.id AS row, d.public_id AS delivery_id, a.started_at, a.duration_ms, a.result, a.status, a.error,
           a.truncated, a.group_id, a.group_size, a.answer
      FROM attempts AS a CROSS JOIN deliveries AS d ON d.id = a.delivery_id WHERE a.id IN ({marks})
"""
"""Rows of each list by row id, under the names that they have in a page."""

ROW_SQL = {
    "events": "SELECT id FROM events WHERE public_id = ?",
    "deliveries": "SELECT id FROM deliveries WHERE public_id = ?",
}
ATTEMPTS_OF_DELIVERY_SQL = """
    SELECT id, id FROM attempts WHERE delivery_id = ? AND id < ? ORDER BY id DESC LIMIT ?
"""
ATTEMPTS_BY_TIME_SQL = """
    SELECT started_at, id FROM attempts
     WHERE started_at BETWEEN ? AND ? AND (+started_at, id) < (?, ?)
     ORDER BY started_at DESC, id DESC LIMIT ?
"""
ATTEMPTS_OF_DELIVERIES_SQL = "SELECT started_at, id FROM attempts WHERE delivery_id IN ({marks})"
MATCHING_ATTEMPTS_SQL = """
    SELECT a.id FROM attempts AS a CROSS JOIN deliveries AS d ON d.id = a.delivery_id
     WHERE a.id IN ({marks}) AND {conditions}
"""


class WorkerList(msgspec.Struct, frozen=True):
    """A list about workers: one statement, sorted by a time."""

    sql: str
    time: str  # column


WORKER_LISTS: Mapping[str, WorkerList] = {
    "worker_metrics": WorkerList(
        """
        SELECT m.at AS row, m.source, m.worker_id, m.at, m.status, m.cpu, m.memory, m.uptime,
               m.message_count, m.sessions
          FROM worker_metrics AS m
        """,
        "m.at",
    ),
    "worker_commands": WorkerList(
        """
        SELECT c.created_at AS row, c.public_id AS id, c.source, c.worker_id, c.state, c.created_at,
               c.sent_at, c.expires_at, c.body
          FROM worker_commands AS c
        """,
        "c.created_at",
    ),
}


async def read_page(
    reader: aiosqlite.Connection, kind: str, *, limit: int, cursor: Cursor | None, filters: Mapping[str, Any]
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


async def _row_of(reader: aiosqlite.Connection, kind: str, given: str | int | None) -> int | None:
    """Return the row id of a public id; 0 (the id of no row) if it is unknown."""
    if not isinstance(given, str):
        return given
    rows = list(await reader.execute_fetchall(ROW_SQL[kind], (given,)))
    return next((id_ for (id_,) in rows), 0)


# --- events and deliveries ---


async def _page(
    reader: aiosqlite.Connection, kind: str, limit: int, cursor: Cursor, wanted: dict[str, Any]
) -> Page:
    """Return a page of events or deliveries.

    Deliveries are sorted by their own ids. Filters about their events sort them by the ids of the events.
    """
    own = await _row_of(reader, kind, wanted.pop("id", None))
    event = await _row_of(reader, "events", wanted.pop("event_id", None))
    selection = Selection(**wanted)
    deliveries = kind == "deliveries"
    of_delivery = selection == Selection(destination=selection.destination, state=selection.state)
    by_event = not deliveries or (own is None and event is None and not of_delivery)

    end, start = _end(cursor), 0
    if selection.since is not None or selection.until is not None:
        span = await event_times.span(reader, selection.since, selection.until)
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
        return Step(found, None if reached is None else Cursor(reached), len(ids))

    budget = PageBudget(reads_bodies=matching.reads_bodies)
    positions, following = await search(step, limit, cursor, budget)
    return await _filled(reader, DELIVERIES_SQL if deliveries else EVENTS_SQL, positions, following)


async def _plans(
    reader: aiosqlite.Connection,
    selection: Selection,
    types: Sequence[str] | None,
    *,
    own: int | None,
    event: int | None,
    by_event: bool,
) -> list[QueryPlan]:
    """Return the plans that lead to the rows; `own` and `event` are row ids from filters."""
    if own is not None:
        return [QueryPlan(ids=(own,))]
    if event is not None:
        return [QueryPlan(DELIVERY_PATHS["event_id"], [(event,)])]
    if by_event:
        return await plans_of_events(reader, selection, types)
    return [await plan_of_deliveries(reader, selection)]


async def _positions(
    reader: aiosqlite.Connection, matching: Filter, ids: Sequence[int], before: Cursor, *, within_event: bool
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
    """Return the key that a page's candidates are below; other rows with the cursor's own key come first."""
    return cursor.key + 1 if cursor.row else cursor.key


async def _filled(
    reader: aiosqlite.Connection, sql: str, positions: Sequence[Cursor], following: Cursor | None
) -> Page:
    """Return a page with the rows at `positions` that still exist, and the cursor `following`."""
    rows = {}
    if ids := [position.id for position in positions]:
        rows = {row["row"]: row for row in await _named(reader, sql.format(marks=marks(ids)), ids)}
    found = [rows[id_] for id_ in ids if id_ in rows]
    return Page(found, None if following is None else str(following))


async def _named(reader: aiosqlite.Connection, sql: str, values: Any) -> list[dict[str, Any]]:
    """Run a statement and return its rows by the names of their columns."""
    async with reader.execute(sql, values) as cursor:
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]


# --- attempts ---

_Take = Callable[[Cursor, int], Awaitable[Iterable[Any]]]  # candidates: key and row id


async def _attempts_page(
    reader: aiosqlite.Connection, limit: int, cursor: Cursor, wanted: dict[str, Any]
) -> Page:
    """Return a page of attempts: those of one delivery by id, all others by the time at which they began."""
    take, done = await _attempts_plan(reader, wanted)
    rest = {name: value for name, value in wanted.items() if name not in done}
    conditions = " AND ".join(str(FILTERS["attempts"][name]) for name in rest)

    async def step(before: Cursor, count: int) -> Step:
        positions = [Cursor(key, id_) for key, id_ in await take(before, count)]
        found = positions
        if rest and positions:
            ids = [position.row for position in positions]
            sql = MATCHING_ATTEMPTS_SQL.format(marks=marks(ids), conditions=conditions)
            matches = {id_ for (id_,) in await reader.execute_fetchall(sql, (*ids, *rest.values()))}
            found = [position for position in positions if position.row in matches]
        return Step(found, positions[-1] if len(positions) == count else None, len(positions))

    return await _filled(reader, ATTEMPTS_SQL, *await search(step, limit, cursor, PageBudget()))


async def _attempts_plan(
    reader: aiosqlite.Connection, wanted: Mapping[str, Any]
) -> tuple[_Take, tuple[str, ...]]:
    """Return a function that yields candidates, and the filters that all candidates fulfil."""
    if (given := wanted.get("delivery_id")) is not None:
        delivery = await _row_of(reader, "deliveries", given)
        return (
            lambda before, count: reader.execute_fetchall(
                ATTEMPTS_OF_DELIVERY_SQL, (delivery, before.key, count)
            ),
            ("delivery_id",),
        )
    listed = None
    if "destination" in wanted:
        listed = await few_deliveries(reader, Selection(destination=wanted["destination"]))
    if listed is not None:
        ordered: list[tuple[int, int]] = []
        for some in chunks(listed):
            sql = ATTEMPTS_OF_DELIVERIES_SQL.format(marks=marks(some))
            ordered += [(started_at, id_) for started_at, id_ in await reader.execute_fetchall(sql, some)]
        ordered.sort(reverse=True)

        async def take(before: Cursor, count: int) -> list[tuple[int, int]]:
            return [row for row in ordered if row < (before.key, before.row)][:count]

        return take, ("destination",)
    since, until = wanted.get("since", 0), wanted.get("until", TOP.key)
    return (
        lambda before, count: reader.execute_fetchall(
            ATTEMPTS_BY_TIME_SQL, (since, min(before.key, until - 1), before.key, before.row, count)
        ),
        ("since", "until"),
    )


# --- workers ---


async def _worker_page(
    reader: aiosqlite.Connection, kind: str, limit: int, cursor: Cursor | None, wanted: Mapping[str, Any]
) -> Page:
    """Return a page of a list about workers."""
    known = WORKER_LISTS[kind]
    conditions = [FILTERS[kind][name] for name in wanted]
    values = list(wanted.values())
    if cursor is not None:
        conditions.append(f"{known.time} < ?")
        values.append(cursor.key)
    where = f"WHERE {' AND '.join(map(str, conditions))}" if conditions else ""
    rows = await _named(reader, f"{known.sql} {where} ORDER BY {known.time} DESC LIMIT ?", (*values, limit))
    return Page(rows, str(Cursor(rows[-1]["row"])) if len(rows) == limit else None)
