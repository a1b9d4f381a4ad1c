"""Claims, in memory: which pending deliveries a lane has, and which are in flight. A crash releases all."""

from collections import Counter
from collections.abc import Iterable

import aiosqlite

from relay.model import Claim, Delivery
from relay.store.sqlite.rows import CLAIM_COLUMNS, GROUP_CLAIM_COLUMNS, delivery_of, grouped_delivery_of

GROUP_BYTES = 4 * 2**20
"""Bytes of the bodies of one group; all of them are in memory while its message is written."""


class Claims:
    """Sets of delivery ids; every change is one step of the event loop."""

    def __init__(self) -> None:
        self._destinations: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._in_flight: set[int] = set()
        self._ending: set[int] = set()  # the current transaction ends them without an attempt
        self.cancelled: set[int] = set()  # in flight; cancelled unless the attempt succeeds

    def __contains__(self, delivery_id: int) -> bool:
        return delivery_id in self._destinations

    def of(self, destination: str) -> int:
        """Return how many of a destination's deliveries are claimed."""
        return self._counts[destination]

    def add(self, deliveries: Iterable[Delivery]) -> None:
        """Claim deliveries."""
        for delivery in deliveries:
            self._destinations[delivery.id] = delivery.destination
            self._counts[delivery.destination] += 1

    def begin(self, delivery_id: int) -> bool:
        """Mark a delivery as in flight; False: the current transaction ends it, so do not send it."""
        if delivery_id in self._ending:
            return False
        self._in_flight.add(delivery_id)
        return True

    def end(self, delivery_id: int) -> bool:
        """Mark a delivery as ending; False: it is in flight, and its outcome decides."""
        if delivery_id in self._in_flight:
            return False
        self._ending.add(delivery_id)
        return True

    def clear_ending(self) -> None:
        """Drop the marks of `end`: the transaction is committed or rolled back."""
        self._ending.clear()

    def cancel(self, delivery_ids: Iterable[int]) -> list[int]:
        """Cancel deliveries in flight once their outcome is known; returns those not in flight."""
        landed = []
        for delivery_id in delivery_ids:
            if delivery_id in self._in_flight:
                self.cancelled.add(delivery_id)
            else:
                landed.append(delivery_id)
        return landed

    def release(self, delivery_ids: Iterable[int]) -> list[int]:
        """Release deliveries, claimed or not; returns the cancelled ones among them."""
        cancelled = []
        for delivery_id in delivery_ids:
            self._in_flight.discard(delivery_id)
            if delivery_id in self.cancelled:
                self.cancelled.remove(delivery_id)
                cancelled.append(delivery_id)
            destination = self._destinations.pop(delivery_id, None)
            if destination is not None:
                self._counts[destination] -= 1
        return cancelled


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
    except BaseException:  # the caller will not hear of them
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
    found: list[Delivery] = []
    size = first.size
    for row in rows:
        delivery = grouped_delivery_of(tuple(row))
        if delivery.id in claims:
            continue
        size += delivery.size
        if len(found) + 1 == together or size > GROUP_BYTES:
            break
        found.append(delivery)
    return tuple(found)
