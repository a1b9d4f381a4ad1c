"""`max_pending` over several nodes: exact, and without a lock while a destination is far from its limit.

A node adds deliveries up to the `ceiling` of its row in `ledger`. `pending + unused parts of all ceilings <=
max_pending` holds for each destination, because only the holder of one lock raises a ceiling. The commit
checks the node's own ceiling in the row whose counts it changes anyway. A node whose ceiling is too low takes
the lock and reads the sums of all nodes; if there is no room, it resets the ceilings of the other nodes.
"""

from collections import Counter
from typing import NamedTuple

from relay.store.batch import Batch, Ending
from relay.store.ledger import PendingCounts
from relay.store.postgres import transitions
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.transaction import Transaction

LOCK_SQL = "SELECT pg_advisory_xact_lock(hashtext('hookferry backlog'))"
"""One lock for all destinations: with a lock for each, two transactions could wait for each other."""

SUMS_SQL = """
    SELECT destination, sum(created - delivered - dead - expired - cancelled)::bigint,
           coalesce(sum(greatest(ceiling - created, 0)) FILTER (WHERE slot <> $2), 0)::bigint
      FROM ledger WHERE destination = ANY($1::text[]) GROUP BY destination
"""
"""Pending deliveries, and the unused parts of the other nodes' ceilings."""

TAKE_BACK_SQL = """
    WITH others AS MATERIALIZED (
         SELECT slot, destination FROM ledger
          WHERE destination = ANY($1::text[]) AND slot <> $2 AND ceiling > created
          ORDER BY destination, slot FOR UPDATE)
    UPDATE ledger AS l SET ceiling = NULL FROM others AS o
     WHERE l.slot = o.slot AND l.destination = o.destination
"""
"""Waits for transactions that use the ceilings. Later transactions fail, and are repeated."""

RAISE_SQL = """
    INSERT INTO ledger AS l (slot, destination, created, delivered, dead, expired, cancelled, ceiling)
    SELECT $1, r.destination, 0, 0, 0, 0, 0, r.room
      FROM unnest($2::text[], $3::bigint[]) AS r (destination, room) ORDER BY r.destination
        ON CONFLICT (slot, destination) DO UPDATE SET ceiling = l.created + excluded.ceiling
"""

FULL: Ending = ("dead", "backlog_full")


class Room(NamedTuple):
    """Deliveries that this node may add to a destination without the lock."""

    limit: int  # `max_pending` when the ceiling was raised
    left: int


class SharedLimits:
    """The room of this node, by destination."""

    def __init__(self, nodes: PostgresNodes, ledger: PendingCounts) -> None:
        self._nodes = nodes
        self._ledger = ledger
        self._slot = nodes.slot  # this node's rows in `ledger`, which the current batch changes
        self._rooms: dict[str, Room] = {}

    def forget(self) -> None:
        """Forget all ceilings: the node has a new slot, or a commit failed, perhaps because of a ceiling."""
        self._rooms.clear()

    async def decide(self, batch: Batch, transaction: Transaction, slot: int) -> None:
        """Decide which new deliveries of a batch are dead because of `max_pending`.

        Call it before the deliveries are written. `batch.checked` has the destinations whose ceilings the
        commit must check.
        """
        self._slot = slot
        counts = batch.new_counts()
        near = self._near(batch, counts)
        batch.ended_early.clear()  # decided by counts that may be a second old
        batch.checked = set(batch.limits)
        for name in batch.limits.keys() - near:
            limit, left = self._rooms[name]
            self._rooms[name] = Room(limit, left - counts[name])
        if near:
            wanted = {name: counts[name] for name in near}
            rooms = await self._rooms_of(batch, transaction, wanted)
            self._refuse(batch, rooms)

    def is_near(self, batch: Batch) -> bool:
        """Return whether `decide` needs separate statements before the statement that writes the batch."""
        return bool(self._near(batch, batch.new_counts()))

    def _near(self, batch: Batch, counts: Counter[str]) -> set[str]:
        """Return the destinations whose new deliveries exceed the room of this node."""
        return {
            name
            for name, limit in batch.limits.items()
            if (room := self._rooms.get(name)) is None or room.limit != limit or room.left < counts[name]
        }

    @staticmethod
    def _refuse(batch: Batch, rooms: dict[str, int]) -> None:
        """End the deliveries for which `rooms` has no room; changes `rooms`."""
        for delivery in batch.deliveries:
            if (name := delivery.destination) in rooms:
                if rooms[name] <= 0 and delivery.id not in batch.unlimited:
                    batch.ended_early[delivery.id] = FULL
                else:
                    rooms[name] -= 1

    async def _rooms_of(
        self, batch: Batch, transaction: Transaction, wanted: dict[str, int]
    ) -> dict[str, int]:
        """Return how many deliveries each destination has room for, exactly if fewer than `wanted`."""
        limits, pending = batch.limits, self._ledger.pending_counts
        rooms: dict[str, int] = {}
        if full := [name for name in wanted if pending[name] >= limits[name]]:
            # A full destination gets no delivery, so it needs no lock.
            rooms = {
                name: 0
                for name, (count, _) in (await self._sums(transaction, full)).items()
                if count >= limits[name]
            }
            batch.checked -= rooms.keys()
            for name in rooms:
                self._rooms.pop(name, None)
        names = sorted(wanted.keys() - rooms.keys())
        if not names:
            return rooms
        await transitions.lock_new_keys(
            batch, transaction
        )  # before rows of `ledger`, so that nodes do not deadlock
        await transaction.fetch(LOCK_SQL)
        sums = await self._sums(transaction, names)
        rooms |= {name: limits[name] - sum(sums[name]) for name in names}
        if short := [name for name in names if rooms[name] < wanted[name] and sums[name][1]]:
            await transaction.fetch(TAKE_BACK_SQL, short, self._slot)
            rooms |= {
                name: limits[name] - sum(counts)
                for name, counts in (await self._sums(transaction, short)).items()
            }
        raised = []
        for name in names:
            share = max(0, rooms[name] - wanted[name]) // (2 * self._nodes.count)
            raised.append(wanted[name] + share)
            self._rooms[name] = Room(limits[name], share)
        await transaction.fetch(RAISE_SQL, self._slot, names, raised)
        return rooms

    async def _sums(self, transaction: Transaction, names: list[str]) -> dict[str, tuple[int, int]]:
        rows = await transaction.fetch(SUMS_SQL, names, self._slot)
        return dict.fromkeys(names, (0, 0)) | {name: (count, unused) for name, count, unused in rows}
