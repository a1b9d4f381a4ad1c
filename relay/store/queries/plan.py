"""Query plans: the index along which a list finds its candidates.

Several filters may have an index. The stored data decides which index leads to the fewest candidates: a busy
source may have a rare subject, and a state is rare until a receiver fails. So the plans are probed. The plan
whose 2,000th candidate is the oldest reads the fewest rows that do not match.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from relay.model import Selection
from relay.routing.subscription import Patterns
from relay.store.queries.reader import DeliveryPath, EventPath, Path, Reader

PROBED = 2000
"""Position of the candidate by which plans are compared."""

MOST_TERMS = 64
"""Values of one filter that one plan combines, each along its own stretch of an index."""

MOST_TYPES = 500
"""Event types that are compared with a pattern; each costs one step along the index of types."""

TYPES_AT_ONCE = 100
"""Event types that one statement reads."""

TYPES_SECONDS = 0.010
"""Time limit for reading event types. In PostgreSQL, each type costs a step in every partition."""

MOST_LISTED = 5000
"""Rows that a plan may read at once and sort in memory, because no index has them in the list's order."""

ENDED = ("dead", "expired", "cancelled")
"""States of few deliveries; partial indexes cover them."""


def events_by(name: EventPath) -> Path:
    """Return the path to events by filters."""
    return Path("events", name)


def deliveries_by(name: DeliveryPath) -> Path:
    """Return the path to deliveries by filters."""
    return Path("deliveries", name)


class QueryPlan(msgspec.Struct, frozen=True):
    """Where candidates come from: a path with one or several values, or a list of all candidates."""

    path: Path | None = None
    terms: Sequence[tuple[Any, ...]] = ((),)  # values of the path's condition; each term is read separately
    ids: Sequence[int] = ()  # without a path: all candidates, newest first

    async def take(
        self, reader: Reader, end: int, start: int, count: int, *, newest_first: bool = True
    ) -> tuple[list[int], int | None]:
        """Return about `count` candidates of the row ids from `start` to before `end`, in order.

        Also returns the row id at which the next call continues: its `end`, or its `start` minus 1 if the
        oldest are first. None: no candidate is left.
        """
        if self.path is None:
            ordered = self.ids if newest_first else reversed(self.ids)
            found = [id_ for id_ in ordered if start <= id_ < end][:count]
            return found, found[-1] if len(found) == count else None
        rows = await reader.candidates(self.path, self.terms, end, start, count, newest_first=newest_first)
        reached = [ids[-1] for ids in rows if len(ids) == count]
        if not reached:
            return sorted({id_ for ids in rows for id_ in ids}, reverse=newest_first), None
        limit = max(reached) if newest_first else min(reached)  # beyond it a term may have more
        complete = {id_ for ids in rows for id_ in ids if (id_ >= limit if newest_first else id_ <= limit)}
        return sorted(complete, reverse=newest_first), limit

    async def reach(self, reader: Reader, end: int, start: int) -> int | None:
        """Return the row id of the 2,000th candidate, which compares plans; None: fewer candidates exist."""
        if self.path is None:
            return None
        found = await reader.candidate(self.path, self.terms, end, start, PROBED)
        return max(found, default=None)


async def cheapest(reader: Reader, plans: Sequence[QueryPlan], end: int, start: int) -> QueryPlan:
    """Return the plan that reads the fewest rows that do not match."""
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


async def plans_of_events(reader: Reader, wanted: Selection, types: Sequence[str] | None) -> list[QueryPlan]:
    """Return the plans that lead to the events of a selection; `types` are those that its pattern matches."""
    found = []
    if wanted.subject is not None:
        found.append(QueryPlan(events_by("subject"), [(wanted.subject,)]))
    if wanted.state in ENDED and wanted.destination is not None:
        found.append(QueryPlan(events_by("destination and state"), [(wanted.destination, wanted.state)]))
    elif wanted.state in ENDED:
        found.append(QueryPlan(events_by("state"), [(wanted.state,)]))
    elif (listed := await few_deliveries(reader, wanted)) is not None:
        found.append(QueryPlan(ids=await _events_of(reader, listed)))
    elif wanted.state == "pending" and reader.has_queue:
        found.append(QueryPlan(events_by("pending")))
    if types is not None:
        found.append(QueryPlan(events_by("type"), [(type_,) for type_ in types]))
    elif wanted.source is not None:
        found.append(QueryPlan(events_by("source"), [(wanted.source,)]))
    return found or [QueryPlan(events_by("all"))]


async def plan_of_deliveries(reader: Reader, wanted: Selection) -> QueryPlan:
    """Return the plan that leads to deliveries by destination and state, without reading their events."""
    if wanted.state in ENDED:
        names = await _destinations(reader, wanted)
        if names is not None:
            terms = [(name, wanted.state) for name in names]
            return QueryPlan(deliveries_by("destination and state"), terms) if terms else QueryPlan()
    elif wanted.state == "pending" and (listed := await few_deliveries(reader, wanted)) is not None:
        return QueryPlan(ids=sorted(listed, reverse=True))
    elif wanted.state == "pending" and reader.has_queue:
        return QueryPlan(deliveries_by("pending"))
    if wanted.destination is not None:
        return QueryPlan(deliveries_by("destination"), [(wanted.destination,)])
    return QueryPlan(deliveries_by("all"))


async def types_matching(reader: Reader, wanted: Selection) -> tuple[str, ...] | None:
    """Return the stored types that a selection's pattern matches; None: no pattern, or too many types."""
    if wanted.type is None:
        return None
    prefix = next((wanted.type[:at] for at, letter in enumerate(wanted.type) if letter in "*?["), wanted.type)
    if prefix == wanted.type:
        found = [wanted.type]
    else:
        stored = await _types_with(reader, prefix)
        if stored is None:
            return None
        patterns = Patterns((wanted.type,))
        found = [type_ for type_ in stored if patterns.matches(type_)]
    if wanted.source is not None:
        found = [type_ for type_ in found if type_.startswith(f"{wanted.source}.")]
    return tuple(found) if len(found) <= MOST_TERMS else None


async def _types_with(reader: Reader, prefix: str) -> list[str] | None:
    """Return the stored types that begin with a prefix; None: there are too many."""
    clock = asyncio.get_running_loop().time
    deadline, first, found = clock() + TYPES_SECONDS, prefix, list[str]()
    while True:
        some = await reader.types_between(first, f"{prefix}\U0010ffff", TYPES_AT_ONCE)
        found += some[:TYPES_AT_ONCE]
        if len(some) <= TYPES_AT_ONCE:
            return found
        if len(found) >= MOST_TYPES or clock() > deadline:
            return None
        first = some[TYPES_AT_ONCE]


async def few_deliveries(reader: Reader, wanted: Selection) -> list[int] | None:
    """Return all pending deliveries, or all of a destination, unsorted; None: more than `MOST_LISTED`."""
    if wanted.state == "pending":
        read = reader.pending_of
    elif wanted.destination is not None:
        read = reader.deliveries_of
    else:
        return None
    names = await _destinations(reader, wanted)
    found: list[int] = []
    for name in names or ():
        found += await read(name, MOST_LISTED + 1 - len(found))
        if len(found) > MOST_LISTED:
            return None
    return None if names is None else found


def chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """Cut row ids into the portions that one statement takes."""
    return (ids[at : at + 1000] for at in range(0, len(ids), 1000))


async def _destinations(reader: Reader, wanted: Selection) -> list[str] | None:
    """Return the selected destination, or all of them; None: there are more than a plan can combine."""
    if wanted.destination is not None:
        return [wanted.destination]
    names = await reader.destinations()
    return names if len(names) <= MOST_TERMS else None


async def _events_of(reader: Reader, deliveries: Sequence[int]) -> list[int]:
    """Return the row ids of the deliveries' events, newest first."""
    found: set[int] = set()
    for some in chunks(deliveries):
        found |= await reader.events_of(some)
    return sorted(found, reverse=True)
