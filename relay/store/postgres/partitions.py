"""Partitions: one per day (UTC) for each large table, by ranges of row ids; created seven days in advance."""

from datetime import UTC, datetime, timedelta

from relay.base.clock import SECOND
from relay.store.postgres.connection import Connection
from relay.store.postgres.rows import first_id
from relay.store.postgres.schema import PARTITIONED

AHEAD = 7
"""Days after the current one for which partitions exist."""

LOCK_SQL = "SELECT pg_advisory_xact_lock(hashtext('hookferry'))"
"""Taken by every transaction that changes tables."""

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


def _name(table: str, day: datetime) -> str:
    return f"{table}_{day:%Y%m%d}"


def _partition(table: str, day: datetime) -> str:
    name = _name(table, day)
    start, end = (first_id(int(moment.timestamp()) * SECOND) for moment in (day, day + timedelta(days=1)))
    return (
        f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL) WITH (parallel_workers = 0);"
        f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({start}) TO ({end});"
    )
