"""The table `event_times`: the earliest and the latest time of receipt of each block of 1,024 row ids.

It turns a range of times into a range of row ids. Row ids are the order of acceptance, and times nearly
follow that order, except where a clock was set back or an import stored old events. So no index leads to the
first and the last row id of a range of times. The blocks give a range that may be too wide, but never too
narrow.
"""

import aiosqlite

from relay.store import Span

SHIFT = 10
"""A block is 2**10 row ids. The 10,000 blocks of ten million events are read in a millisecond."""

FIRST_SQL = "SELECT block FROM event_times WHERE last >= ? AND first < ? ORDER BY block LIMIT 1"
LAST_SQL = "SELECT block FROM event_times WHERE last >= ? AND first < ? ORDER BY block DESC LIMIT 1"
FORGET_SQL = "DELETE FROM event_times WHERE block < (SELECT min(id) FROM events) >> 10"

WIDEN = (
    "ON CONFLICT (block) DO UPDATE SET first = min(first, excluded.first), last = max(last, excluded.last)"
)


async def span(reader: aiosqlite.Connection, since: int | None, until: int | None) -> Span | None:
    """Return a range of row ids that contains all events of a range of times; None without such events.

    Times are microseconds UTC; None leaves an end open. `since` is included, `until` is not.
    """
    values = (-(2**63) if since is None else since, 2**63 - 1 if until is None else until)
    first = list(await reader.execute_fetchall(FIRST_SQL, values))
    last = list(await reader.execute_fetchall(LAST_SQL, values))
    if not first or not last:
        return None
    return Span(first[0][0] << SHIFT, ((last[0][0] + 1) << SHIFT) - 1)
