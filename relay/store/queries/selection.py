"""What an operator's selection means, read in pages that no transaction outlives.

A page looks at so many candidates, however few of them are meant: a selection that matches next to
nothing among ten million events still lets others read between its pages.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import groupby
from typing import Any

import aiosqlite

from relay.errors import RelayError, UnknownError
from relay.model import Chosen, Named, Selection, StoredEvent
from relay.routing.conditions import compile_where
from relay.routing.filters import Patterns
from relay.store import OPERATOR_EVENTS, Span, event_times
from relay.store.database import Database
from relay.store.queries.payloads import holding, load

PAGE = 1000
"""Candidates that one page looks at."""

MOST_IDS = 1000
"""Ids that one request may name."""

# Each has its index; the state is written out twice because the partial index demands it.
_CANDIDATES = {
    "state": """
        SELECT DISTINCT event_id AS id FROM deliveries
         WHERE state IN ('dead', 'expired', 'cancelled') AND state = :state
           AND (:destination IS NULL OR destination = :destination)
           AND event_id > :after AND event_id <= :last ORDER BY event_id LIMIT :page
    """,
    "subject": """
        SELECT id FROM events
         WHERE subject = :subject AND id > :after AND id <= :last ORDER BY id LIMIT :page
    """,
    "type": """
        SELECT id FROM events WHERE type = :type AND id > :after AND id <= :last ORDER BY id LIMIT :page
    """,
    "source": """
        SELECT id FROM events WHERE source = :source AND id > :after AND id <= :last ORDER BY id LIMIT :page
    """,
    "all": """
        SELECT id FROM events WHERE id > :after AND id <= :last ORDER BY id LIMIT :page
    """,
}
_EVENTS = """
    SELECT e.id, e.size, e.source, e.type, e.subject, e.received_at, NULL
      FROM ({candidates}) AS c JOIN events AS e ON e.id = c.id
     ORDER BY c.id
"""
# Of the deliveries of an event to a destination the latest counts: what has been repeated since is no
# more what it was.
_DELIVERIES = """
    SELECT e.id, e.size, e.source, e.type, e.subject, e.received_at, d.destination
      FROM ({candidates}) AS c JOIN events AS e ON e.id = c.id
      LEFT JOIN deliveries AS d ON d.event_id = c.id
                               AND (:destination IS NULL OR d.destination = :destination)
                               AND (:state IS NULL OR d.state = :state)
                               AND NOT EXISTS (SELECT 1 FROM deliveries AS later
                                                WHERE later.event_id = d.event_id
                                                  AND later.destination = d.destination
                                                  AND later.id > d.id)
     ORDER BY c.id
"""
# Where a destination's pending deliveries are, in the order in which they move on: reading the shelves
# in this order, and each by due time, passes over none that is moving meanwhile.
_SHELVES = (
    "d.attempts = 0 AND d.next_attempt_at IS NULL AND d.id > :id ORDER BY d.id",
    "d.attempts = 0 AND (d.next_attempt_at, d.id) > (:due, :id) ORDER BY d.next_attempt_at, d.id",
    "d.attempts > 0 AND (d.next_attempt_at, d.id) > (:due, :id) ORDER BY d.next_attempt_at, d.id",
)
_PENDING = """
    SELECT d.id, d.next_attempt_at, e.source, e.type, e.subject, e.received_at, e.id, e.size
      FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
     WHERE d.destination = :destination AND d.state = 'pending' AND d.id <= :last AND {shelf} LIMIT :page
"""
_PATTERN = re.compile(r"[*?\[!]")
_SHORT = re.compile(r"[0-9a-f-]{1,36}")


def select_sql(selection: Selection) -> str:
    """Return the statement for a page of a selection."""
    if selection.state in ("dead", "expired", "cancelled"):
        by = "state"
    elif selection.subject is not None:
        by = "subject"
    elif selection.type is not None and not _PATTERN.search(selection.type):
        by = "type"
    else:
        by = "source" if selection.source is not None else "all"
    return (_DELIVERIES if selection.of_deliveries else _EVENTS).format(candidates=_CANDIDATES[by])


def pending_sql() -> tuple[str, ...]:
    """Return the statements for a page of each shelf of a destination's pending deliveries."""
    return tuple(_PENDING.format(shelf=shelf) for shelf in _SHELVES)


class Selecting:
    """The reading verbs of the store that an operator's wishes need."""

    _database: Database

    @property
    def _reader(self) -> aiosqlite.Connection:
        return self._database.reader

    async def span(self, selection: Selection) -> Span:
        """See `Queries.span`."""
        [(newest,)] = await self._reader.execute_fetchall("SELECT max(id) FROM events")
        if selection.since is None and selection.until is None:
            return Span(1, newest or 0)
        found = await event_times.span(self._reader, selection.since, selection.until)
        return Span(1, 0) if found is None else Span(max(1, found.first), min(found.last, newest or 0))

    async def select(self, selection: Selection, span: Span) -> AsyncIterator[tuple[Chosen, ...]]:
        """See `Queries.select`."""
        sql, meant = select_sql(selection), judge(selection, deliveries=selection.of_deliveries)
        where = None if selection.where is None else compile_where(selection.where)
        values: dict[str, Any] = {
            "source": selection.source,
            "type": selection.type,
            "subject": selection.subject,
            "destination": selection.destination,
            "state": selection.state,
            "after": span.first - 1,
            "last": span.last,
            "page": PAGE,
        }
        while values["after"] < span.last:
            rows = list(await self._reader.execute_fetchall(sql, values))
            candidates = [list(group) for _, group in groupby(rows, key=lambda row: row[0])]
            found = tuple(
                Chosen(of[0][0], of[0][1], of[0][5], tuple(row[6] for row in of if row[6] is not None))
                for of in candidates
                if meant(*of[0][2:6]) and (not selection.of_deliveries or of[0][6] is not None)
            )
            if where is not None:
                held = await holding(self._reader, where, [(one.event_id, one.size) for one in found])
                found = tuple(one for one in found if one.event_id in held)
            yield found
            if len(candidates) < PAGE:
                return
            values["after"] = rows[-1][0]

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Events.load`."""
        return await load(self._reader, event_ids)

    async def pending(self, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
        """See `Queries.pending`."""
        meant = judge(selection, deliveries=True)
        where = None if selection.where is None else compile_where(selection.where)
        [(last,)] = await self._reader.execute_fetchall("SELECT max(id) FROM deliveries")
        if selection.destination is None:
            names = [row[0] for row in await self._reader.execute_fetchall("SELECT destination FROM ledger")]
        else:
            names = [selection.destination]
        for name in names:
            for sql in pending_sql():
                values = {"destination": name, "last": last, "due": -1, "id": 0, "page": PAGE}
                while rows := list(await self._reader.execute_fetchall(sql, values)):
                    found = [row for row in rows if meant(*tuple(row)[2:6])]
                    if where is not None:
                        held = await holding(self._reader, where, dict(row[6:8] for row in found).items())
                        found = [row for row in found if row[6] in held]
                    yield tuple(row[0] for row in found)
                    values["id"], values["due"] = rows[-1][0], rows[-1][1]

    async def name_events(self, ids: Sequence[str]) -> tuple[Chosen, ...]:
        """See `Queries.name_events`."""
        sql = "SELECT id, size, received_at FROM events WHERE public_id BETWEEN ? AND ? LIMIT 2"
        rows = await self._name("event", "evt_", sql, ids)
        return tuple(Chosen(*row) for row in sorted(set(rows)))

    async def name_deliveries(self, ids: Sequence[str]) -> tuple[Named, ...]:
        """See `Queries.name_deliveries`."""
        sql = """
            SELECT d.id, d.state, d.event_id, e.size, e.received_at, d.destination
              FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
             WHERE d.public_id BETWEEN ? AND ? LIMIT 2
        """
        rows = await self._name("delivery", "dlv_", sql, ids)
        return tuple(
            Named(id_, state, Chosen(event_id, size, received_at, (destination,)))
            for id_, state, event_id, size, received_at, destination in sorted(set(rows))
        )

    async def _name(self, noun: str, prefix: str, sql: str, ids: Sequence[str]) -> list[tuple[Any, ...]]:
        """Find the one row that each id means."""
        if len(ids) > MOST_IDS:
            raise RelayError(f"{len(ids)} ids, at most {MOST_IDS} at once", hint="use a filter instead")
        found = []
        for given in ids:
            short = given.lower().removeprefix(prefix)
            if not _SHORT.fullmatch(short):
                raise RelayError(f"{given!r:.60} is no {noun} id", hint=f"they look like {prefix}0190…")
            start = prefix + short
            rows = list(await self._reader.execute_fetchall(sql, (start, start + "~")))
            if not rows:
                raise UnknownError(f"no {noun} {given!r}", hint="the list of them shows what there is")
            if len(rows) > 1:
                raise RelayError(f"{given!r} is short for more than one {noun}", hint="type more of it")
            found.append(tuple(rows[0]))
        return found


def judge(selection: Selection, *, deliveries: bool) -> Callable[[str, str, str | None, int], bool]:
    """Compile what a candidate must be, given source, type, subject and time of receipt.

    Where events are chosen, the relay's own must be named, as everywhere.
    """
    own = deliveries or selection.source is not None or selection.type is not None
    patterns = Patterns((selection.type,)) if selection.type is not None else None
    exact = None if patterns is None or _PATTERN.search(selection.type or "") else selection.type

    def meant(source: str, type_: str, subject: str | None, received_at: int) -> bool:
        return (
            (own or source != OPERATOR_EVENTS)
            and (selection.source is None or source == selection.source)
            and (selection.subject is None or subject == selection.subject)
            and (selection.since is None or received_at >= selection.since)
            and (selection.until is None or received_at < selection.until)
            and (patterns is None or type_ == exact or (exact is None and patterns.matches(type_)))
        )

    return meant
