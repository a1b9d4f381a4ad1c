"""What is still owed, as far as gauges show it."""

import aiosqlite

from relay.store import Backlog

_SQL = """
    WITH pending AS (
        SELECT destination, next_attempt_at, id FROM deliveries WHERE state = 'pending' AND attempts = 0
         UNION ALL
        SELECT destination, next_attempt_at, id FROM deliveries WHERE state = 'pending' AND attempts > 0
    ), summed AS (
        SELECT destination, sum(coalesce(next_attempt_at <= ?, 0)) AS due, min(id) AS oldest
          FROM pending GROUP BY destination
    )
    SELECT summed.destination, summed.due, deliveries.created_at
      FROM summed JOIN deliveries ON deliveries.id = summed.oldest
"""


async def backlog(reader: aiosqlite.Connection, now: int) -> dict[str, Backlog]:
    """See `Store.backlog`: two walks along the indexes that lanes claim by, and a row per destination."""
    rows = await reader.execute_fetchall(_SQL, (now,))
    return {name: Backlog(due, oldest) for name, due, oldest in map(tuple, rows)}
