"""Claiming: due deliveries that nobody holds, oldest due first, first attempts and retries apart."""

import aiosqlite

from relay.model import Claim
from relay.store.claims import Holds
from relay.store.rows import CLAIM_COLUMNS, delivery_of

# The condition is written out as the partial indexes have it, or SQLite would not use them.
_FIRST = "d.state = 'pending' AND d.attempts = 0"
_RETRY = "d.state = 'pending' AND d.attempts > 0"


async def claim(
    connection: aiosqlite.Connection,
    holds: Holds,
    destination: str,
    limit: int,
    *,
    retries: bool,
    now: int,
) -> Claim:
    """Hold up to `limit` of them; see `relay.store.Deliveries.claim`."""
    share = _RETRY if retries else _FIRST
    rows = await connection.execute_fetchall(
        f"""
        SELECT {CLAIM_COLUMNS}
          FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
         WHERE d.destination = ? AND {share} AND d.next_attempt_at <= ?
         ORDER BY d.next_attempt_at, d.id
         LIMIT ?
        """,  # noqa: S608 - constants of ours
        (destination, now, limit + holds.of(destination)),
    )
    claimed = tuple(delivery_of(tuple(row)) for row in rows if row[0] not in holds)[:limit]
    holds.add(claimed)
    if len(claimed) == limit:
        return Claim(claimed, now)
    later = await connection.execute_fetchall(
        f"""
        SELECT min(d.next_attempt_at) FROM deliveries AS d
         WHERE d.destination = ? AND {share} AND d.next_attempt_at > ?
        """,  # noqa: S608 - constants of ours
        (destination, now),
    )
    return Claim(claimed, next(iter(later))[0])
