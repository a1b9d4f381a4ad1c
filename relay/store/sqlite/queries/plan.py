"""Query plans: the index along which a list finds its candidates.

Several filters may have an index. The stored data decides which index leads to the fewest candidates: a busy
source may have a rare subject, and a state is rare until a receiver fails. So the plans are probed. The plan
whose 2,000th candidate is the oldest reads the fewest rows that do not match.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import aiosqlite
import msgspec

from relay.model import Selection
from relay.routing.subscription import Patterns
from relay.store.sqlite.rows import marks

PROBED = 2000
"""Position of the candidate by which plans are compared."""

MOST_TERMS = 64
"""Values of one filter that one plan combines, each along its own stretch of an index."""

MOST_TYPES = 500
"""Event types that are compared with a pattern; each costs one step along the index of types."""

MOST_LISTED = 5000
"""Rows that a plan may read at once and sort in memory, because no index has them in the list's order."""

ENDED = ("dead", "expired", "cancelled")
"""States of few deliveries; partial indexes cover them."""


class Path(msgspec.Struct, frozen=True):
    """Row ids along one index."""

    table: str
    condition: str = ""  # the columns of the index before the row id, one `?` for each value
    key: str = "id"  # column with the row id

    def sql(self, *, newest_first: bool = True) -> str:
        """Return a statement; its `?` are the condition's values, the end, the start and a limit."""
        condition = f"{self.condition} AND " if self.condition else ""
        order = " DESC" if newest_first else ""
        return (
            f"SELECT {self.key} FROM {self.table} WHERE {condition}{self.key} < ? AND {self.key} >= ?"  # noqa: S608 - constants
            f" ORDER BY {self.key}{order} LIMIT ?"
        )


_LOST = "state IN ('dead', 'expired', 'cancelled') AND state = ?"  # the partial indexes demand both parts

EVENT_PATHS = {
    "all": Path("events"),
    "source": Path("events", "source = ?"),
    "type": Path("events", "type = ?"),
    "subject": Path("events", "subject = ?"),
    "state": Path("deliveries", _LOST, "event_id"),
    "destination and state": Path("deliveries", f"destination = ? AND {_LOST}", "event_id"),
}
"""Paths to row ids of events by filters, whose values they take. Each has its index."""

DELIVERY_PATHS = {
    "all": Path("deliveries"),
    "event_id": Path("deliveries", "event_id = ?"),
    "destination": Path("deliveries", "destination = ? AND id > 0"),  # the index says so too
    "destination and state": Path("deliveries", f"destination = ? AND {_LOST}"),
}
"""Paths to row ids of deliveries by filters. Each has its index."""

SHORT = {
    "first": "SELECT id FROM deliveries WHERE destination = ? AND state = 'pending' AND attempts = 0 LIMIT ?",
    "retry": "SELECT id FROM deliveries WHERE destination = ? AND state = 'pending' AND attempts > 0 LIMIT ?",
    "destination": "SELECT id FROM deliveries WHERE destination = ? AND id > 0 LIMIT ?",
}
"""Statements that return row ids of deliveries in another order than the list's."""

TYPES_SQL = """
    WITH RECURSIVE found (type) AS (
         SELECT min(type) FROM events WHERE type >= :first AND type < :end
         UNION ALL
         SELECT (SELECT min(type) FROM events WHERE type > found.type AND type < :end)
           FROM found WHERE found.type IS NOT NULL LIMIT :most)
    SELECT type FROM found WHERE type IS NOT NULL
"""
DESTINATIONS_SQL = "SELECT destination FROM ledger"
EVENT_IDS_SQL = "SELECT event_id FROM deliveries WHERE id IN ({marks})"


class QueryPlan(msgspec.Struct, frozen=True):
    """Where candidates come from: a path with one or several values, or a list of all candidates."""

    path: Path | None = None
    terms: Sequence[tuple[Any, ...]] = ((),)  # values of the path's condition; each term is read separately
    ids: Sequence[int] = ()  # without a path: all candidates, newest first

    async def take(
        self, reader: aiosqlite.Connection, end: int, start: int, count: int, *, newest_first: bool = True
    ) -> tuple[list[int], int | None]:
        """Return about `count` candidates of the row ids from `start` to before `end`, in order.

        Also returns the row id at which the next call continues: its `end`, or its `start` minus 1 if the
        oldest are first. None: no candidate is left.
        """
        if self.path is None:
            ordered = self.ids if newest_first else reversed(self.ids)
            found = [id_ for id_ in ordered if start <= id_ < end][:count]
            return found, found[-1] if len(found) == count else None
        rows = await self._read(reader, self.path.sql(newest_first=newest_first), (end, start, count))
        reached = [ids[-1] for ids in rows if len(ids) == count]
        if not reached:
            return sorted({id_ for ids in rows for id_ in ids}, reverse=newest_first), None
        limit = max(reached) if newest_first else min(reached)  # beyond it a term may have more
        complete = {id_ for ids in rows for id_ in ids if (id_ >= limit if newest_first else id_ <= limit)}
        return sorted(complete, reverse=newest_first), limit

    async def reach(self, reader: aiosqlite.Connection, end: int, start: int) -> int | None:
        """Return the row id of the 2,000th candidate, which compares plans; None: fewer candidates exist."""
        if self.path is None:
            return None
        rows = await self._read(reader, f"{self.path.sql()} OFFSET ?", (end, start, 1, PROBED - 1))
        return max((ids[0] for ids in rows if ids), default=None)

    async def _read(self, reader: aiosqlite.Connection, sql: str, values: tuple[int, ...]) -> list[list[int]]:
        """Return the row ids of each term."""
        if len(self.terms) == 1:
            found = await reader.execute_fetchall(sql, (*self.terms[0], *values))
            return [[id_ for (id_,) in found]]
        parts = [f"SELECT {number}, * FROM ({sql})" for number in range(len(self.terms))]  # noqa: S608 - constants
        bound = [value for term in self.terms for value in (*term, *values)]
        rows: list[list[int]] = [[] for _ in self.terms]
        for number, id_ in await reader.execute_fetchall(" UNION ALL ".join(parts), bound):
            rows[number].append(id_)
        return rows


async def cheapest(
    reader: aiosqlite.Connection, plans: Sequence[QueryPlan], end: int, start: int
) -> QueryPlan:
    """Return the plan that passes over the fewest rows in vain."""
    if len(plans) == 1:
        return plans[0]
    best, oldest = plans[0], end
    for plan in plans:
        reached = await plan.reach(reader, end, start)
        if reached is None:
            return plan
        if reached < oldest:
            best, oldest = plan, reached
    return best


async def plans_of_events(
    reader: aiosqlite.Connection, wanted: Selection, types: Sequence[str] | None
) -> list[QueryPlan]:
    """Return the plans that lead to the events of a selection; `types` are those that its pattern matches."""
    found = []
    if wanted.subject is not None:
        found.append(QueryPlan(EVENT_PATHS["subject"], [(wanted.subject,)]))
    if wanted.state in ENDED and wanted.destination is not None:
        found.append(QueryPlan(EVENT_PATHS["destination and state"], [(wanted.destination, wanted.state)]))
    elif wanted.state in ENDED:
        found.append(QueryPlan(EVENT_PATHS["state"], [(wanted.state,)]))
    elif (listed := await few_deliveries(reader, wanted)) is not None:
        found.append(QueryPlan(ids=await _events_of(reader, listed)))
    if types is not None:
        found.append(QueryPlan(EVENT_PATHS["type"], [(type_,) for type_ in types]))
    elif wanted.source is not None:
        found.append(QueryPlan(EVENT_PATHS["source"], [(wanted.source,)]))
    return found or [QueryPlan(EVENT_PATHS["all"])]


async def plan_of_deliveries(reader: aiosqlite.Connection, wanted: Selection) -> QueryPlan:
    """Return the plan that leads to deliveries by destination and state, without reading their events."""
    if wanted.state in ENDED:
        names = await _destinations(reader, wanted)
        if names is not None:
            terms = [(name, wanted.state) for name in names]
            return QueryPlan(DELIVERY_PATHS["destination and state"], terms) if terms else QueryPlan()
    elif wanted.state == "pending" and (listed := await few_deliveries(reader, wanted)) is not None:
        return QueryPlan(ids=sorted(listed, reverse=True))
    if wanted.destination is not None:
        return QueryPlan(DELIVERY_PATHS["destination"], [(wanted.destination,)])
    return QueryPlan(DELIVERY_PATHS["all"])


async def types_matching(reader: aiosqlite.Connection, wanted: Selection) -> tuple[str, ...] | None:
    """Return the stored types that a selection's pattern matches; None: no pattern, or too many types."""
    if wanted.type is None:
        return None
    prefix = next((wanted.type[:at] for at, letter in enumerate(wanted.type) if letter in "*?["), wanted.type)
    if prefix == wanted.type:
        found = [wanted.type]
    else:
        found = await types_between(reader, prefix, f"{prefix}\U0010ffff", MOST_TYPES)
        if len(found) > MOST_TYPES:
            return None
        patterns = Patterns((wanted.type,))
        found = [type_ for type_ in found if patterns.matches(type_)]
    if wanted.source is not None:
        found = [type_ for type_ in found if type_.startswith(f"{wanted.source}.")]
    return tuple(found) if len(found) <= MOST_TERMS else None


async def types_between(reader: aiosqlite.Connection, first: str, end: str, most: int) -> list[str]:
    """Return the stored types from `first` to before `end`; `most` + 1 of them if more than `most` exist."""
    # The recursion ends with an empty row, which counts as well.
    values = {"first": first, "end": end, "most": most + 2}
    rows = await reader.execute_fetchall(TYPES_SQL, values)
    return [type_ for (type_,) in rows][: most + 1]


async def few_deliveries(reader: aiosqlite.Connection, wanted: Selection) -> list[int] | None:
    """Return all pending deliveries, or all of a destination, unsorted; None: more than `MOST_LISTED`."""
    if wanted.state == "pending":
        statements = [SHORT["first"], SHORT["retry"]]
    elif wanted.destination is not None:
        statements = [SHORT["destination"]]
    else:
        return None
    names = await _destinations(reader, wanted)
    found: list[int] = []
    for name in names or ():
        for sql in statements:
            rows = await reader.execute_fetchall(sql, (name, MOST_LISTED + 1 - len(found)))
            found += [id_ for (id_,) in rows]
            if len(found) > MOST_LISTED:
                return None
    return None if names is None else found


def chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """Cut row ids into the portions that one statement takes."""
    return (ids[at : at + 1000] for at in range(0, len(ids), 1000))


async def _destinations(reader: aiosqlite.Connection, wanted: Selection) -> list[str] | None:
    """Return the selected destination, or all; None: more than one plan can combine."""
    if wanted.destination is not None:
        return [wanted.destination]
    names = [name for (name,) in await reader.execute_fetchall(DESTINATIONS_SQL)]
    return names if len(names) <= MOST_TERMS else None


async def _events_of(reader: aiosqlite.Connection, deliveries: Sequence[int]) -> list[int]:
    """Return the row ids of the deliveries' events, newest first."""
    found: set[int] = set()
    for some in chunks(deliveries):
        rows = await reader.execute_fetchall(EVENT_IDS_SQL.format(marks=marks(some)), some)
        found.update(id_ for (id_,) in rows)
    return sorted(found, reverse=True)
