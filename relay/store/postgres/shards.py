"""The slots of deliveries in PostgreSQL: claims of some of them, and slots for deliveries without one."""

import asyncio
import logging
from functools import lru_cache

from relay.base.shards import SLOTS, Shards
from relay.store.postgres.connection import Database
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.rows import CLAIM_COLUMNS

log = logging.getLogger("relay.store")

LOOK_EVERY = 0.5  # seconds
AT_ONCE = 5000
"""Deliveries that get slots in one statement, which takes about 100 ms."""

SLOT_SQL = f"""
    (CASE WHEN coalesce(order_key, group_key, latest_key) IS NULL
          THEN get_byte(uuid_send(public_id), 14) * 256 + get_byte(uuid_send(public_id), 15)
          ELSE get_byte(sha256(convert_to(coalesce(order_key, group_key, latest_key), 'UTF8')), 0) * 256
               + get_byte(sha256(convert_to(coalesce(order_key, group_key, latest_key), 'UTF8')), 1)
      END % {SLOTS})::smallint
"""
"""The same as `relay.base.shards.slot_of`."""

ASSIGN_SQL = f"""
    WITH chosen AS MATERIALIZED (
         SELECT id FROM owed WHERE destination = $1 AND slot IS NULL AND id > $2
          ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED),
         given AS (
         UPDATE owed AS o SET slot = {SLOT_SQL} FROM chosen WHERE o.id = chosen.id)
    SELECT max(id) FROM chosen
"""  # noqa: S608 - only constants
"""Gives slots to the oldest deliveries without one; returns the highest row id, or NULL.

It skips rows that are being changed: waiting for them could cause a deadlock. A later pass finds them."""


@lru_cache(maxsize=256)
def due_sql(share: str, shards: Shards) -> str:
    """Return the claim of deliveries of some shards; `share` as in `DUE_SQL` of `deliveries.py`.

    The ranges of the index, one per slot, are already in the order of the result, so the server merges them
    and reads no more rows than it returns. With `slot = ANY(…)`, the server would read and sort all due rows.
    It would also do so without a limit per range, because a generic plan for a small table sorts.
    """
    return _merged(
        f"SELECT {CLAIM_COLUMNS}, next_attempt_at FROM owed WHERE destination = $1 AND attempts {share} 0"  # noqa: S608 - only constants
        " AND next_attempt_at <= $2 AND next_attempt_at > $3",
        shards,
        "$5",
        "LIMIT $4",
    )


@lru_cache(maxsize=256)
def next_sql(share: str, shards: Shards) -> str:
    """Return the statement for the due time of the next delivery of some shards after $2."""
    return _merged(
        f"SELECT next_attempt_at, id FROM owed WHERE destination = $1 AND attempts {share} 0"  # noqa: S608 - only constants
        " AND next_attempt_at > $2",
        shards,
        "$3",
        "LIMIT 1",
    )


def _merged(sql: str, shards: Shards, slots: str, limit: str) -> str:
    """Repeat a statement for each slot in the parameter `slots`, and merge the results."""
    order = f"ORDER BY next_attempt_at, id {limit}"
    if shards.is_all:
        # Leave out deliveries without a slot. `coalesce` makes the planner use the index over all slots.
        return f"{sql} AND coalesce(slot, -1) >= 0 AND {slots}::int[] IS NOT NULL {order}"
    numbers = range(1, len(shards.slots) + 1)
    parts = (f"({sql} AND slot = ({slots}::int[])[{number}] {order})" for number in numbers)
    return f"{' UNION ALL '.join(parts)} {order}"


async def assign_for_ever(database: Database, nodes: PostgresNodes) -> None:
    """Give slots to the deliveries without one, for the destinations that this node divides."""
    while True:
        await asyncio.sleep(LOOK_EVERY)
        for name in nodes.to_assign:
            last = 0
            try:
                while (found := await database.value(ASSIGN_SQL, name, last, AT_ONCE)) is not None:
                    last = found
            except Exception as error:  # noqa: BLE001 - the next look tries again
                log.debug("%s: cannot divide its deliveries into shards: %s", name, error)
            else:
                nodes.note_assigned(name)
