"""What is still owed, as far as gauges show it."""

import aiosqlite

from relay.store.counts import Backlog

# A walk along the two indexes that lanes claim by for each destination; nothing is put into order.
BACKLOG_SQL = """
    WITH owed AS (
        SELECT destination,
               (SELECT count(*) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts = 0
                   AND d.next_attempt_at <= :now)
             + (SELECT count(*) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts > 0
                   AND d.next_attempt_at <= :now) AS due,
               (SELECT min(d.id) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts = 0
               ) AS first,
               (SELECT min(d.id) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts > 0
               ) AS retry
          FROM ledger
    )
    SELECT owed.destination, owed.due, d.created_at, d.id
      FROM owed JOIN deliveries AS d ON d.id = coalesce(min(owed.first, owed.retry), owed.first, owed.retry)
"""


async def backlog(reader: aiosqlite.Connection, now: int) -> dict[str, Backlog]:
    """See `Store.backlog`."""
    rows = await reader.execute_fetchall(BACKLOG_SQL, {"now": now})
    return {name: Backlog(due, oldest, row) for name, due, oldest, row in map(tuple, rows)}
