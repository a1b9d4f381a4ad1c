"""Events with their bodies, and which of them hold what a `where` asks for."""

from collections.abc import Iterable, Iterator, Sequence

import aiosqlite

from relay.model import StoredEvent
from relay.routing.conditions import Where
from relay.routing.envelope import EnvelopeView
from relay.store.rows import EVENT_COLUMNS, event_of

MOST_EVENTS = 100
MOST_BYTES = 2**20
"""Of bodies that are looked into in one step of the loop, unless one alone is larger: some milliseconds."""

LOAD_SQL = f"SELECT {EVENT_COLUMNS} FROM events WHERE id IN ({{marks}})"  # noqa: S608 - columns of ours


async def load(reader: aiosqlite.Connection, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
    """Read events by their row ids; one that is gone is missing from the answer."""
    sql = LOAD_SQL.format(marks=", ".join("?" * len(event_ids)))
    rows = await reader.execute_fetchall(sql, event_ids)
    return {row[0]: event_of(tuple(row)) for row in rows}


async def holding(
    reader: aiosqlite.Connection, where: Where, sizes: Iterable[tuple[int, int]]
) -> frozenset[int]:
    """Return those for which the conditions hold, of events given by row id and size of the body."""
    found: set[int] = set()
    for ids in _portions(sizes):
        events = await load(reader, ids)
        found.update(id_ for id_, event in events.items() if where.matches(EnvelopeView(event)))
    return frozenset(found)


def _portions(sizes: Iterable[tuple[int, int]]) -> Iterator[list[int]]:
    some: list[int] = []
    total = 0
    for id_, size in sizes:
        if some and (len(some) == MOST_EVENTS or total + size > MOST_BYTES):
            yield some
            some, total = [], 0
        some.append(id_)
        total += size
    if some:
        yield some
