"""Where a list finds candidates, newest first: along an index, so that no statement reads more than it must.

A filter may have several ways to its rows, and which is shorter depends on what is stored: of a source that
is busy, with a subject that is rare; of a state that is rare, until a receiver dies. So the ways are tried:
the one whose candidates reach furthest back passes over the most rows that nobody asked for.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import aiosqlite
import msgspec

from relay.model import Selection
from relay.routing.filters import Patterns

PROBED = 2000
"""Which candidate is compared."""

MOST_TERMS = 64
"""Statements that one way may be made of, each along its own stretch of an index."""

MOST_TYPES = 500
"""Types that a pattern is tried on, a step along their index each."""

MOST_LISTED = 5000
"""Rows that are read from an index in another order than the list's, and put into order in memory."""

ENDED = ("dead", "expired", "cancelled")
"""States that few deliveries are in: partial indexes have them."""

# Each has its index; the states are written out because the partial indexes demand it.
EVENTS = {
    "subject": """
        SELECT id FROM events WHERE subject = ? AND id < ? AND id >= ? ORDER BY id DESC LIMIT ?
    """,
    "type": "SELECT id FROM events WHERE type = ? AND id < ? AND id >= ? ORDER BY id DESC LIMIT ?",
    "source": "SELECT id FROM events WHERE source = ? AND id < ? AND id >= ? ORDER BY id DESC LIMIT ?",
    "all": "SELECT id FROM events WHERE id < ? AND id >= ? ORDER BY id DESC LIMIT ?",
    "lost": """
        SELECT event_id FROM deliveries
         WHERE state IN ('dead', 'expired', 'cancelled') AND state = ?
           AND event_id < ? AND event_id >= ? ORDER BY event_id DESC LIMIT ?
    """,
    "lost_to": """
        SELECT event_id FROM deliveries
         WHERE destination = ? AND state IN ('dead', 'expired', 'cancelled') AND state = ?
           AND event_id < ? AND event_id >= ? ORDER BY event_id DESC LIMIT ?
    """,
}
"""Ways to events, by row id of events."""

DELIVERIES = {
    "event": "SELECT id FROM deliveries WHERE event_id = ? AND id < ? AND id >= ? ORDER BY id DESC LIMIT ?",
    "lost_to": """
        SELECT id FROM deliveries
         WHERE destination = ? AND state IN ('dead', 'expired', 'cancelled') AND state = ?
           AND id < ? AND id >= ? ORDER BY id DESC LIMIT ?
    """,
    "destination": """
        SELECT id FROM deliveries
         WHERE destination = ? AND id > 0 AND id < ? AND id >= ? ORDER BY id DESC LIMIT ?
    """,
    "all": "SELECT id FROM deliveries WHERE id < ? AND id >= ? ORDER BY id DESC LIMIT ?",
}
"""Ways to deliveries, by row id of deliveries."""

SHORT = {
    "first": "SELECT id FROM deliveries WHERE destination = ? AND state = 'pending' AND attempts = 0 LIMIT ?",
    "retry": "SELECT id FROM deliveries WHERE destination = ? AND state = 'pending' AND attempts > 0 LIMIT ?",
    "destination": "SELECT id FROM deliveries WHERE destination = ? AND id > 0 LIMIT ?",
}
"""What may be few enough to be put into order in memory: row ids of deliveries."""

TYPES_SQL = """
    WITH RECURSIVE found (type) AS (
         SELECT min(type) FROM events WHERE type >= :first AND type < :end
         UNION ALL
         SELECT (SELECT min(type) FROM events WHERE type > found.type AND type < :end)
           FROM found WHERE found.type IS NOT NULL LIMIT :most)
    SELECT type FROM found WHERE type IS NOT NULL
"""
NAMES_SQL = "SELECT destination FROM ledger"
EVENT_IDS_SQL = "SELECT event_id FROM deliveries WHERE id IN ({marks})"


class Lead(msgspec.Struct, frozen=True):
    """One way: a statement over each of several values, or all candidates there are."""

    sql: str = ""
    terms: Sequence[tuple[Any, ...]] = ()
    ids: Sequence[int] | None = None  # newest first

    async def take(
        self, reader: aiosqlite.Connection, before: int, after: int, count: int
    ) -> tuple[list[int], int | None]:
        """Return candidates from `after` on and before `before`, newest first, and how far they are complete.

        That is a row id from which on none is missing; None: there are no others.
        """
        if self.ids is not None:
            found = [id_ for id_ in self.ids if after <= id_ < before][:count]
            return found, found[-1] if len(found) == count else None
        rows = await self._read(reader, "", (before, after, count))
        oldest = [ids[-1] for ids in rows if len(ids) == count]
        floor = max(oldest, default=None)
        merged = {id_ for ids in rows for id_ in ids if floor is None or id_ >= floor}
        return sorted(merged, reverse=True), floor

    async def reach(self, reader: aiosqlite.Connection, before: int, after: int) -> int | None:
        """Return the row id of the candidate that is compared; None: there are fewer."""
        if self.ids is not None:
            return None
        rows = await self._read(reader, " OFFSET ?", (before, after, 1, PROBED - 1))
        return max((ids[0] for ids in rows if ids), default=None)

    async def _read(
        self, reader: aiosqlite.Connection, more: str, values: tuple[int, ...]
    ) -> list[list[int]]:
        """Return row ids of each term."""
        if len(self.terms) == 1:
            found = await reader.execute_fetchall(self.sql + more, (*self.terms[0], *values))
            return [[row[0] for row in found]]
        parts = [f"SELECT {number}, * FROM ({self.sql}{more})" for number in range(len(self.terms))]  # noqa: S608 - constants of ours
        told = [value for term in self.terms for value in (*term, *values)]
        rows: list[list[int]] = [[] for _ in self.terms]
        for number, id_ in await reader.execute_fetchall(" UNION ALL ".join(parts), told):
            rows[number].append(id_)
        return rows


NOTHING = Lead(ids=())


async def choose(reader: aiosqlite.Connection, leads: Sequence[Lead], before: int, after: int) -> Lead:
    """Return the shortest way of several."""
    if len(leads) == 1:
        return leads[0]
    best, furthest = leads[0], before
    for lead in leads:
        reached = await lead.reach(reader, before, after)
        if reached is None:
            return lead
        if reached < furthest:
            best, furthest = lead, reached
    return best


async def to_events(
    reader: aiosqlite.Connection, wanted: Selection, types: Sequence[str] | None
) -> list[Lead]:
    """Return the ways to the events of a selection; `types` are what its pattern comes to, if few."""
    found = []
    if wanted.subject is not None:
        found.append(Lead(EVENTS["subject"], [(wanted.subject,)]))
    if wanted.state in ENDED and wanted.destination is not None:
        found.append(Lead(EVENTS["lost_to"], [(wanted.destination, wanted.state)]))
    elif wanted.state in ENDED:
        found.append(Lead(EVENTS["lost"], [(wanted.state,)]))
    elif (listed := await few(reader, wanted)) is not None:
        found.append(Lead(ids=await _events_of(reader, listed)))
    if types is not None:
        found.append(Lead(EVENTS["type"], [(each,) for each in types]))
    elif wanted.source is not None:
        found.append(Lead(EVENTS["source"], [(wanted.source,)]))
    return found or [Lead(EVENTS["all"], [()])]


async def to_deliveries(reader: aiosqlite.Connection, wanted: Selection) -> list[Lead]:
    """Return the way to deliveries by destination and state, without looking at their events."""
    if wanted.state in ENDED:
        names = await _names(reader, wanted)
        if names is not None:
            terms = [(name, wanted.state) for name in names]
            return [Lead(DELIVERIES["lost_to"], terms) if terms else NOTHING]
    elif wanted.state == "pending" and (listed := await few(reader, wanted)) is not None:
        return [Lead(ids=sorted(listed, reverse=True))]
    if wanted.destination is not None:
        return [Lead(DELIVERIES["destination"], [(wanted.destination,)])]
    return [Lead(DELIVERIES["all"], [()])]


async def types_of(reader: aiosqlite.Connection, wanted: Selection) -> tuple[str, ...] | None:
    """Return the types that a selection's pattern comes to; None: it has none, or too many to go by them."""
    if wanted.type is None:
        return None
    literal = _literal(wanted.type)
    if literal == wanted.type:
        found = [wanted.type]
    else:
        values: dict[str, Any] = {"first": literal, "end": f"{literal}\U0010ffff", "most": MOST_TYPES}
        rows = await reader.execute_fetchall(TYPES_SQL, values)
        found = [row[0] for row in rows]
        if len(found) >= MOST_TYPES - 1:
            return None
        patterns = Patterns((wanted.type,))
        found = [each for each in found if patterns.matches(each)]
    if wanted.source is not None:
        found = [each for each in found if each.startswith(f"{wanted.source}.")]
    return tuple(found) if len(found) <= MOST_TERMS else None


def _literal(pattern: str) -> str:
    """Return a pattern up to its first special character."""
    return next((pattern[:at] for at, letter in enumerate(pattern) if letter in "*?["), pattern)


async def few(reader: aiosqlite.Connection, wanted: Selection) -> list[int] | None:
    """Return all deliveries that are pending, or owed to a destination, if they are few."""
    if wanted.state == "pending":
        shelves = [SHORT["first"], SHORT["retry"]]
    elif wanted.destination is not None:
        shelves = [SHORT["destination"]]
    else:
        return None
    names = await _names(reader, wanted)
    found: list[int] = []
    for name in names or ():
        for sql in shelves:
            rows = await reader.execute_fetchall(sql, (name, MOST_LISTED + 1 - len(found)))
            found += [row[0] for row in rows]
            if len(found) > MOST_LISTED:
                return None
    return None if names is None else found


async def _names(reader: aiosqlite.Connection, wanted: Selection) -> list[str] | None:
    """Return the destinations that are meant; None: too many to look at each."""
    if wanted.destination is not None:
        return [wanted.destination]
    names = [row[0] for row in await reader.execute_fetchall(NAMES_SQL)]
    return names if len(names) <= MOST_TERMS else None


async def _events_of(reader: aiosqlite.Connection, deliveries: Sequence[int]) -> list[int]:
    found: set[int] = set()
    for some in chunks(deliveries):
        sql = EVENT_IDS_SQL.format(marks=", ".join("?" * len(some)))
        found.update(row[0] for row in await reader.execute_fetchall(sql, some))
    return sorted(found, reverse=True)


def chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """Cut into what one statement names."""
    return (ids[at : at + 1000] for at in range(0, len(ids), 1000))
