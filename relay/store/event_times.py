"""When the events of a stretch of row ids came in: a row per 1,024 of them, so that times narrow a search.

Row ids are the order of acceptance, and times nearly follow it: not where a clock was set back, nor
where an import brought old events. So no index finds the first and the last id of a time without reading
all of it; the earliest and the latest time of each block do, a little too wide and never too narrow.
"""

from collections.abc import Iterable

import aiosqlite

from relay.model import StoredEvent
from relay.store import Span
from relay.store.statements import insert
from relay.store.transaction import Transaction

SHIFT = 10
"""A block is 2**10 row ids. Ten million events have ten thousand blocks, which are read in a millisecond."""

FIRST_SQL = "SELECT block FROM event_times WHERE last >= ? AND first < ? ORDER BY block LIMIT 1"
LAST_SQL = "SELECT block FROM event_times WHERE last >= ? AND first < ? ORDER BY block DESC LIMIT 1"
FORGET_SQL = "DELETE FROM event_times WHERE block < (SELECT min(id) FROM events) >> 10"

_WIDEN = (
    "ON CONFLICT (block) DO UPDATE SET first = min(first, excluded.first), last = max(last, excluded.last)"
)


def note(transaction: Transaction, events: Iterable[StoredEvent]) -> None:
    """Write it for new events, inside their transaction."""
    found: dict[int, tuple[int, int]] = {}
    for event in events:
        block, at = event.id >> SHIFT, event.received_at
        first, last = found.get(block, (at, at))
        found[block] = (min(first, at), max(last, at))
    rows = [(block, *times) for block, times in found.items()]
    insert(transaction, "event_times", "block, first, last", rows, then=_WIDEN)


async def span(reader: aiosqlite.Connection, since: int | None, until: int | None) -> Span | None:
    """Return the row ids between which all events of a time are, among others; None: there is none.

    `since` counts itself, `until` does not; microseconds UTC, None: without that end.
    """
    values = (-(2**63) if since is None else since, 2**63 - 1 if until is None else until)
    first = list(await reader.execute_fetchall(FIRST_SQL, values))
    last = list(await reader.execute_fetchall(LAST_SQL, values))
    if not first or not last:
        return None
    return Span(first[0][0] << SHIFT, ((last[0][0] + 1) << SHIFT) - 1)
