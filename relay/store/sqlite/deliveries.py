"""Claims of due deliveries in SQLite."""

import aiosqlite

from relay.base.clock import Clock
from relay.base.shards import Shards
from relay.model import Claim, Delivery
from relay.store.claims import Claims
from relay.store.deliveries import StoredDeliveries
from relay.store.rows import CLAIM_COLUMNS, GROUP_CLAIM_COLUMNS, delivery_of, grouped_delivery_of
from relay.store.sqlite.database import Database


class SqliteDeliveries(StoredDeliveries):
    """`relay.store.Deliveries` over SQLite."""

    def __init__(self, database: Database, claims: Claims, clock: Clock) -> None:
        super().__init__(database, claims)
        self._clock = clock

    async def claim(
        self, destination: str, limit: int, *, retries: bool, together: int = 1, shards: Shards | None = None
    ) -> Claim:
        """See `Deliveries.claim`; this daemon owns all shards."""
        _ = shards

        async def claim_due(connection: aiosqlite.Connection) -> Claim:
            now = self._clock.steady()
            if together == 1:
                return await claim(connection, self._claims, destination, limit, retries=retries, now=now)
            return await claim_groups(
                connection, self._claims, destination, limit, retries=retries, together=together, now=now
            )

        return await self._database.writer.call(claim_due)


# The condition is written out as the partial indexes have it, or SQLite would not use them.
_FIRST = "d.state = 'pending' AND d.attempts = 0"
_RETRY = "d.state = 'pending' AND d.attempts > 0"


async def claim(
    connection: aiosqlite.Connection,
    claims: Claims,
    destination: str,
    limit: int,
    *,
    retries: bool,
    now: int,
) -> Claim:
    """Claim due deliveries; see `relay.store.Deliveries.claim`."""
    share = _RETRY if retries else _FIRST
    rows = await connection.execute_fetchall(
        f"""
        SELECT {CLAIM_COLUMNS}
          FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
         WHERE d.destination = ? AND {share} AND d.next_attempt_at <= ?
         ORDER BY d.next_attempt_at, d.id
         LIMIT ?
        """,  # noqa: S608 - only constants
        (destination, now, limit + claims.of(destination)),
    )
    claimed = tuple(delivery_of(tuple(row)) for row in rows if row[0] not in claims)[:limit]
    claims.add(claimed)
    if len(claimed) == limit:
        return Claim(claimed, now)
    later = await connection.execute_fetchall(
        f"""
        SELECT min(d.next_attempt_at) FROM deliveries AS d
         WHERE d.destination = ? AND {share} AND d.next_attempt_at > ?
        """,  # noqa: S608 - only constants
        (destination, now),
    )
    return Claim(claimed, next(iter(later))[0])


async def claim_groups(
    connection: aiosqlite.Connection,
    claims: Claims,
    destination: str,
    limit: int,
    *,
    retries: bool,
    together: int,
    now: int,
) -> Claim:
    """Claim up to `limit` due deliveries, each with up to `together - 1` followers of its group.

    A due first attempt takes followers of its group that are not due yet. Retries keep their due times.
    """
    share = _RETRY if retries else _FIRST
    most = limit + claims.of(destination)
    rows = await connection.execute_fetchall(
        f"""
        SELECT {GROUP_CLAIM_COLUMNS}
          FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
         WHERE d.destination = ? AND {share} AND d.next_attempt_at <= ?
         ORDER BY d.next_attempt_at, d.id
         LIMIT ?
        """,  # noqa: S608 - only constants
        (destination, now, most),
    )
    due = [grouped_delivery_of(tuple(row)) for row in rows]
    claimed: list[Delivery] = []
    try:
        for delivery in due:
            if len(claimed) == limit:
                break
            if delivery.id in claims:
                continue
            claims.add((delivery,))
            claimed.append(delivery)
            if delivery.group_key is not None:
                delivery.followers = await _followers(
                    connection, claims, delivery, share, together=together, now=now
                )
                claims.add(delivery.followers)
    except BaseException:  # the caller does not get them
        claims.release(each.id for delivery in claimed for each in delivery.members)
        raise
    if len(claimed) == limit or len(due) == most:
        return Claim(tuple(claimed), now)
    later = await connection.execute_fetchall(
        f"""
        SELECT min(d.next_attempt_at) FROM deliveries AS d
         WHERE d.destination = ? AND {share} AND d.next_attempt_at > ?
        """,  # noqa: S608 - only constants
        (destination, now),
    )
    return Claim(tuple(claimed), next(iter(later))[0])


async def _followers(
    connection: aiosqlite.Connection, claims: Claims, first: Delivery, share: str, *, together: int, now: int
) -> tuple[Delivery, ...]:
    """Return unclaimed deliveries of a group in order of acceptance, up to the maximum of one message."""
    latest = now if share == _RETRY else 2**62
    rows = await connection.execute_fetchall(
        f"""
        SELECT {GROUP_CLAIM_COLUMNS}
          FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
         WHERE d.destination = ? AND d.group_key = ? AND {share} AND d.next_attempt_at <= ?
         ORDER BY d.next_attempt_at, d.id
         LIMIT ?
        """,  # noqa: S608 - only constants
        (first.destination, first.group_key, latest, together + claims.of(first.destination)),
    )
    return claims.choose_followers(first, (grouped_delivery_of(tuple(row)) for row in rows), together)
