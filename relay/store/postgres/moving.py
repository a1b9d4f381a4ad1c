"""A PostgreSQL database as source and target of a move to another engine."""

from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec

from relay.errors import StorageError
from relay.model import Counts
from relay.store.ledger import counts_of
from relay.store.moving import ATTEMPT, EVENT, SMALL, Position, Row
from relay.store.postgres.connection import BEGIN, ERRORS, Address, Connection, connect, refused
from relay.store.postgres.ledger import AUDIT_SQL
from relay.store.postgres.partitions import LOCK_SQL, make_partitions
from relay.store.postgres.rows import STEP as ID_STEP
from relay.store.postgres.rows import first_id, micros_of, text, uuid_of
from relay.store.postgres.schema import META, MIGRATIONS

LONG = 600.0  # seconds of one statement
IDS_AT_ONCE = 200_000
MOVING = "moving"  # name in `meta`

STEP_SQL = {
    "events": f"""
        SELECT {", ".join(EVENT).replace("public_id", "'evt_' || public_id")}
          FROM events WHERE id > $1 ORDER BY id LIMIT $2
    """,  # noqa: S608 - constants
    "deliveries": """
        SELECT d.id, 'dlv_' || d.public_id, d.event_id, d.destination, coalesce(x.state, 'pending'), x.reason,
               coalesce(x.attempts, o.attempts, 0), d.created_at, o.next_attempt_at, x.finished_at,
               coalesce(x.last_status, o.last_status), coalesce(x.last_error, o.last_error), d.order_key,
               d.latest_key, coalesce(o.expires_at, d.expires_at), d.on_dead, d.replay_of,
               CASE WHEN x.state IS NULL THEN o.group_key ELSE d.group_key END, coalesce(o.size, 0)
          FROM (SELECT * FROM deliveries WHERE id > $1 ORDER BY id LIMIT $2) AS d
          LEFT JOIN ends AS x ON x.delivery_id = d.id LEFT JOIN owed AS o ON o.id = d.id
         ORDER BY d.id
    """,
    "attempts": f"SELECT {', '.join(ATTEMPT)} FROM attempts WHERE id > $1 ORDER BY id LIMIT $2",  # noqa: S608 - constants
}
ROWS_SQL = {
    table: f"SELECT {', '.join(columns)} FROM {table}"  # noqa: S608 - constants
    for table, columns in SMALL.items()
} | {
    "ledger": """
        SELECT destination, sum(created)::bigint, sum(delivered)::bigint, sum(dead)::bigint,
               sum(expired)::bigint, sum(cancelled)::bigint FROM ledger GROUP BY destination
    """,
    "stats": """
        SELECT hour, source, type, sum(events)::bigint, sum(duplicates)::bigint, sum(bytes)::bigint
          FROM stats GROUP BY hour, source, type
    """,
    "refused": f"SELECT {', '.join(SMALL['refused'])} FROM refused ORDER BY id",  # noqa: S608 - constants
    "audit": f"SELECT {', '.join(SMALL['audit'])} FROM audit ORDER BY id",  # noqa: S608 - constants
    "dedupe": """
        SELECT source, key, identity, 'evt_' || event_id, expires_at FROM dedupe WHERE identity <> ''
    """,
}  # fmt: skip
DELIVERY = (
    "id", "public_id", "event_id", "destination", "created_at", "order_key", "latest_key", "expires_at",
    "on_dead", "replay_of", "group_key",
)  # fmt: skip
END = (
    "delivery_id", "event_id", "destination", "state", "reason", "attempts", "finished_at", "last_status",
    "last_error",
)  # fmt: skip
OWED = (
    "id", "public_id", "event_id", "destination", "attempts", "created_at", "size", "next_attempt_at",
    "order_key", "latest_key", "expires_at", "on_dead", "replay_of", "group_key", "last_status", "last_error",
)  # fmt: skip
IN_USE_SQL = """
    SELECT coalesce(standing ->> 'host', name) FROM leases WHERE until > clock_timestamp() LIMIT 1
"""
EMPTY_SQL = "SELECT NOT EXISTS (SELECT FROM events) AND NOT EXISTS (SELECT FROM workers)"
ORDER_KEYS_SQL = """
    INSERT INTO order_keys SELECT destination, order_key, count(*) FROM owed
     WHERE order_key IS NOT NULL GROUP BY destination, order_key
"""


class _Side:
    """The common part of source and target."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.location = address.location
        self._connection: Connection

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """See `Side.opened`."""
        try:
            self._connection = await connect(self._address, writes=True)
            try:
                await self._check()
                yield
            finally:
                await self._connection.close()
        except ERRORS as error:
            raise refused(self._address, error) from error

    async def _check(self) -> None:
        """Check the version of the tables, and that no daemon uses them."""
        has_tables = await self._connection.value("SELECT to_regclass('meta') IS NOT NULL")
        version = int(await self._meta("version") or 0) if has_tables else 0
        if not version:
            raise StorageError(
                f"{self.location} has no tables of the relay, so there is nothing to move",
                hint="check the order of the arguments: relay db move FROM TO",
            )
        if version != len(MIGRATIONS):
            raise StorageError(
                f"{self.location} has schema version {version}, this program knows {len(MIGRATIONS)}",
                hint="start and stop the relay once on this database; it migrates the tables",
            )
        if host := await self._connection.value(IN_USE_SQL):
            raise StorageError(
                f"a daemon uses {self.location}: {host}", hint="stop all daemons, then run the command again"
            )

    async def _meta(self, name: str) -> str | None:
        found: str | None = await self._connection.value("SELECT value FROM meta WHERE name = $1", name)
        return found

    async def totals(self) -> dict[str, int]:
        """See `Side.totals`."""
        found: dict[str, int] = {}
        for table in STEP_SQL:
            found[table] = await self._long(f"SELECT count(*) FROM {table}")  # noqa: S608 - constants
        for table, sql in ROWS_SQL.items():
            found[table] = await self._long(f"SELECT count(*) FROM ({sql}) AS rows")  # noqa: S608 - constants
        states = await self._connection.fetch("SELECT state, count(*) FROM ends GROUP BY state", seconds=LONG)
        found |= dict(map(tuple, states))
        if pending := await self._long("SELECT count(*) FROM owed"):
            found["pending"] = pending
        return found | {"bytes": await self._long("SELECT coalesce(sum(size), 0)::bigint FROM events")}

    async def _long(self, sql: str) -> int:
        [(count,)] = await self._connection.fetch(sql, seconds=LONG)
        return int(count)

    async def audit(self) -> dict[str, Counts]:
        """See `Side.audit`."""
        return counts_of(await self._connection.fetch(AUDIT_SQL, seconds=LONG))

    async def ids(self, table: str) -> "array[int]":
        """See `Side.ids`."""
        found = array("q", [0])
        sql = f"SELECT id FROM {table} WHERE id > $1 ORDER BY id LIMIT {IDS_AT_ONCE}"  # noqa: S608 - constants
        while rows := await self._connection.fetch(sql, found[-1], seconds=LONG):
            found.extend(id_ for (id_,) in rows)
        return found[1:]


class PostgresSource(_Side):
    """`relay.store.moving.Source` over a PostgreSQL database."""

    async def _check(self) -> None:
        await super()._check()
        if await self._meta(MOVING) is not None:
            raise StorageError(
                f"{self.location} has only a part of the data: a move into it is not complete",
                hint="run that `relay db move` again: it continues",
            )

    async def step(self, table: str, after: int, count: int, most: int) -> Sequence[Row]:
        """See `Source.step`."""
        count = max(1, count // 10) if table == "events" else count  # bodies may be large
        found: list[Row] = []
        for row in await self._connection.fetch(STEP_SQL[table], after, count, seconds=LONG):
            found.append(tuple(row))
            most -= len(row[-1]) if table == "events" else 0
            if most <= 0:
                break
        return found

    async def rows(self, table: str) -> AsyncIterator[Sequence[Row]]:
        """See `Source.rows`."""
        rows = await self._connection.fetch(ROWS_SQL[table], seconds=LONG)
        yield list(map(tuple, rows))


class PostgresTarget(_Side):
    """`relay.store.moving.Target` over a PostgreSQL database; it creates the tables."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._days: set[int] = set()

    async def _check(self) -> None:
        async with self._connection.transaction():
            await self._connection.execute(LOCK_SQL)
            await self._connection.execute(META)
            if not await self._meta("version"):
                for script in MIGRATIONS:
                    await self._connection.execute(script)
                sql = "INSERT INTO meta VALUES ('version', $1)"
                await self._connection.execute(sql, str(len(MIGRATIONS)))
        await super()._check()

    async def position(self) -> Position | None:
        """See `Target.position`."""
        if (found := await self._meta(MOVING)) is not None:
            return msgspec.json.decode(found, type=Position)
        if not await self._connection.value(EMPTY_SQL):
            raise StorageError(
                f"{self.location} already contains data",
                hint="name an empty database; if an earlier move was complete, only start the relay",
            )
        return None

    def next_id(self, previous: int, moment: int) -> int:
        """See `Target.next_id`."""
        return max(previous // ID_STEP * ID_STEP + ID_STEP, first_id(moment))

    async def write(self, table: str, rows: Sequence[Row], position: Position) -> None:
        """See `Target.write`."""
        for day in {micros_of(row[0]) // 86_400_000_000 for row in rows} - self._days:
            await make_partitions(self._connection, day * 86_400_000_000, ahead=0)
            self._days.add(day)
        async with self._connection.transaction():
            if table == "deliveries":
                await self._write_deliveries(rows)
            elif table == "events":
                await self._copy("events", EVENT, [(row[0], uuid_of(row[1]), *row[2:]) for row in rows])
            else:
                booleans = [(*row[:7], bool(row[7]), *row[8:]) for row in rows]
                await self._copy("attempts", ATTEMPT, booleans)
            await self._note(position)

    async def _write_deliveries(self, rows: Sequence[Row]) -> None:
        made, ended, owed = [], [], []
        for (
            id_, public_id, event, name, state, reason, attempts, created, due, finished, status, error,
            order, latest, expires, on_dead, replay_of, group, size,
        ) in rows:  # fmt: skip
            uuid = uuid_of(public_id)
            made.append((id_, uuid, event, name, created, order, latest, expires, on_dead, replay_of, group))
            if state == "pending":
                owed.append(
                    (
                        id_, uuid, event, name, attempts, created, size, due, order, latest, expires, on_dead,
                        replay_of, group, status, error,
                    )
                )  # fmt: skip
            else:
                ended.append((id_, event, name, state, reason, attempts, finished or created, status, error))
        await self._copy("deliveries", DELIVERY, made)
        await self._copy("ends", END, ended)
        await self._copy("owed", OWED, owed)

    async def write_all(self, table: str, rows: AsyncIterator[Sequence[Row]], position: Position) -> None:
        """See `Target.write_all`."""
        columns, change = SMALL[table], _CHANGES.get(table, tuple)
        if table in {"ledger", "stats"}:
            columns = ("slot", *columns)
        # Without `SHORT`: the source may take long for its rows, and no node waits meanwhile.
        async with self._connection.transaction(BEGIN):
            await self._connection.execute(f"DELETE FROM {table}", seconds=LONG)  # noqa: S608 - constants
            async for some in rows:
                await self._copy(table, columns, [change(row) for row in some])
            await self._note(position)

    async def _copy(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        clean = [tuple(text(value) if isinstance(value, str) else value for value in row) for row in rows]
        await self._connection.copy(table, columns, clean, seconds=LONG)

    async def _note(self, position: Position) -> None:
        value = msgspec.json.encode(position).decode()
        sql = "INSERT INTO meta VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = $2"
        await self._connection.execute(sql, MOVING, value)

    async def finish(self) -> None:
        """See `Target.finish`."""
        async with self._connection.transaction():
            await self._connection.execute("DELETE FROM order_keys")
            await self._connection.execute(ORDER_KEYS_SQL, seconds=LONG)
            await self._connection.execute("DELETE FROM meta WHERE name = $1", MOVING)
        await self._connection.execute("ANALYZE", seconds=LONG)


_CHANGES: Mapping[str, Callable[[Row], Row]] = {
    "ledger": lambda row: (0, *row),  # of the first node
    "stats": lambda row: (0, *row),
    "dedupe": lambda row: (*row[:3], uuid_of(row[3]), row[4]),
    "destinations": lambda row: (row[0], bool(row[1]), *row[2:]),
    "sources": lambda row: (row[0], bool(row[1])),
    "held": lambda row: (*row[:2], bool(row[2])),
}
"""Changes of rows of small tables."""
