"""Partitions: one per day (UTC) for each large table, by ranges of row ids; created seven days in advance."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from relay.base.clock import SECOND
from relay.store.postgres.connection import Connection
from relay.store.postgres.rows import first_id
from relay.store.postgres.schema import PARTITIONED

AHEAD = 7
"""Days after the current one for which partitions exist."""

LOCK_SQL = "SELECT pg_advisory_xact_lock(hashtext('hookferry'))"
"""Taken by every transaction that changes tables."""

LOOKS_APART = 1.0
"""Seconds between two looks at the transactions that use the tables."""

USERS_SQL = """
    SELECT DISTINCT virtualtransaction FROM pg_locks
     WHERE locktype = 'relation' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND relation = ANY(SELECT name::regclass FROM unnest($1::text[]) AS t (name))
"""

EXISTING_SQL = (
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relname = ANY($1)"
)


def days_from(micros: int, ahead: int) -> list[datetime]:
    """Return the day of a moment and the days that follow it."""
    today = datetime.fromtimestamp(micros // SECOND, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return [today + timedelta(days=number) for number in range(ahead + 1)]


async def make_partitions(connection: Connection, wall: int, ahead: int | None = None) -> int:
    """Make the missing partitions of the current day and of the next days; returns their number.

    A new table is attached, because that blocks neither writers nor readers of the other partitions.
    """
    days = days_from(wall, AHEAD if ahead is None else ahead)
    names = [_name(table, day) for table in PARTITIONED for day in days]
    if len(await connection.fetch(EXISTING_SQL, names)) == len(names):
        return 0
    async with connection.transaction():
        await connection.execute("SET LOCAL lock_timeout = '1s'")  # senders wait meanwhile
        await connection.execute(LOCK_SQL)
        known = {name for (name,) in await connection.fetch(EXISTING_SQL, names)}
        statements = [
            _partition(table, day) for table in PARTITIONED for day in days if _name(table, day) not in known
        ]
        if statements:
            await connection.execute("\n".join(statements))
    return len(statements)


async def has_long_users(fetch: Callable[..., Awaitable[Sequence[Any]]]) -> bool:
    """Return whether a long transaction of another session, such as a dump, uses the partitioned tables.

    A lock that excludes it would make all later statements wait. `fetch` runs a statement and returns rows.
    """

    async def users() -> set[str]:
        return {id_ for (id_,) in await fetch(USERS_SQL, PARTITIONED)}

    if not (before := await users()):
        return False
    await asyncio.sleep(LOOKS_APART)
    return not before.isdisjoint(await users())


def _name(table: str, day: datetime) -> str:
    return f"{table}_{day:%Y%m%d}"


def _partition(table: str, day: datetime) -> str:
    name = _name(table, day)
    start, end = (first_id(int(moment.timestamp()) * SECOND) for moment in (day, day + timedelta(days=1)))
    return (
        f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL) WITH (parallel_workers = 0);"
        f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({start}) TO ({end});"
    )
