"""Retention over PostgreSQL, see `relay.store.pruning`.

A day with little data is deleted row by row, as in SQLite. A day with much data is dropped as a whole when
its last second is older than the general rule allows, so its events stay up to a day longer. Shorter rules of
sources and types still delete rows. Events that must stay are copied to a new partition before the old one is
dropped. If too many events must stay, the day is deleted row by row as well.
"""

import logging
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from typing import Any, TypeVar

import asyncpg
import msgspec

from relay.base.clock import SECOND, Clock
from relay.errors import StorageError
from relay.store.postgres.connection import Connection, Database
from relay.store.postgres.partitions import has_long_users
from relay.store.postgres.queries import EARLY, EVENT_PATHS, SLACK, PostgresReader
from relay.store.postgres.rows import first_id
from relay.store.pruning import COST, MOST_TYPES, PAGE, Candidate, Group, Retention, paced
from relay.store.retention_policy import Policy
from relay.store.writer import Writer

T = TypeVar("T")

log = logging.getLogger("relay.store")

BIG = 64 * 2**20
"""Bytes: a partition of events or of attempts with at least this much data is dropped as a whole."""

MOST_KEPT = 20_000
"""Events that stay when their partition is dropped; with more, rows are deleted instead."""

LOCK_TIMEOUT_SQL = "SET LOCAL lock_timeout = '500ms'"
"""While a statement waits for a table, all later statements wait behind it."""

NEEDED = 2**63 - 1  # a pending delivery needs its event, however old it is

PAGE_SQL = f"""
    SELECT e.id, e.source, e.type, e.received_at,
           10 + e.size / 4096,
           greatest((SELECT {NEEDED} FROM owed AS o WHERE o.event_id = e.id LIMIT 1),
                    (SELECT max(x.finished_at) FROM ends AS x WHERE x.state = 'dead' AND x.event_id = e.id))
      FROM events AS e WHERE e.id = ANY($1::bigint[]) AND e.id BETWEEN $2 AND $3 ORDER BY e.id
"""  # noqa: S608 - constants
DELETABLE_SQL = """
    SELECT e.id FROM unnest($1::bigint[], $2::bigint[]) AS candidate (id, dead)
      JOIN events AS e ON e.id = candidate.id
     WHERE e.id BETWEEN $3 AND $4
       AND NOT EXISTS (SELECT FROM owed AS o WHERE o.event_id = e.id)
       AND NOT EXISTS (SELECT FROM ends AS x WHERE x.event_id = e.id AND x.state = 'dead'
                                               AND x.finished_at > candidate.dead)
     ORDER BY e.id FOR UPDATE OF e
"""
# A statement that has waited for a row lock does not see what the holder has stored, such as a replay.
UNUSED_SQL = """
    SELECT id FROM unnest($1::bigint[]) AS e (id)
     WHERE NOT EXISTS (SELECT FROM owed AS o WHERE o.event_id = e.id)
"""
DELETE_SQL = {
    "deliveries": "DELETE FROM deliveries WHERE event_id = ANY($1::bigint[]) RETURNING id",
    "ends": "DELETE FROM ends WHERE delivery_id = ANY($1::bigint[]) AND delivery_id BETWEEN $2 AND $3",
    "attempts": "DELETE FROM attempts WHERE delivery_id = ANY($1::bigint[])",
    "repetitions": "DELETE FROM repetitions WHERE event_id = ANY($1::bigint[])",
    "events": "DELETE FROM events WHERE id = ANY($1::bigint[]) AND id BETWEEN $2 AND $3",
}
ROWS_SQL = {
    "attempts": (
        """
        DELETE FROM attempts WHERE id = ANY(ARRAY(
               SELECT id FROM attempts WHERE started_at < $1 AND id < $2
                ORDER BY started_at, id LIMIT {limit}))
        """,
        COST // 5,
    ),
    "keys": (
        """
        DELETE FROM dedupe WHERE ctid = ANY(ARRAY(
               SELECT ctid FROM dedupe WHERE expires_at <= $1 ORDER BY expires_at LIMIT {limit}))
        """,
        COST,
    ),
    "stats": (
        """
        DELETE FROM stats WHERE ctid = ANY(ARRAY(
               SELECT ctid FROM stats WHERE hour < $1 ORDER BY hour LIMIT {limit}))
        """,
        COST,
    ),
}
PARTITIONS_SQL = """
    SELECT right(c.relname, 8) AS day, pg_table_size(c.oid) AS bytes
      FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
     WHERE i.inhparent = to_regclass($1) AND c.relname ~ '_[0-9]{8}$' ORDER BY 1
"""
LEFT_SQL = """
    SELECT relname FROM pg_class
     WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace
       AND relname ~ '^(events|deliveries|ends|attempts)_[0-9]{8}_(old|([0-9a-z]+_)?kept)$' ORDER BY 1
"""
TYPES_SQL = """
    WITH RECURSIVE found (type, number) AS (
        (SELECT type, 1 FROM {events} ORDER BY type LIMIT 1)
         UNION ALL
         SELECT (SELECT e.type FROM {events} AS e WHERE e.type > found.type ORDER BY e.type LIMIT 1),
                number + 1
           FROM found WHERE found.type IS NOT NULL AND number <= $1::int)
    SELECT type FROM found WHERE type IS NOT NULL
"""
KEPT_SQL = """
    WITH rule AS (SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS rule (type, events, dead))
    SELECT e.id FROM {events} AS e JOIN rule ON rule.type = e.type
     WHERE e.type = ANY($4::text[]) AND e.received_at > rule.events
     UNION
    SELECT e.id FROM {events} AS e JOIN rule ON rule.type = e.type
     WHERE {early} AND e.received_at > rule.events
     UNION
    SELECT event_id FROM owed WHERE event_id >= $5 AND event_id < $6
     UNION
    SELECT e.id FROM ends AS x JOIN {events} AS e ON e.id = x.event_id JOIN rule ON rule.type = e.type
     WHERE x.state = 'dead' AND x.event_id >= $5 AND x.event_id < $6 AND x.finished_at > rule.dead
     LIMIT $7
"""
"""Events of a partition that must stay: by a longer rule, for a pending delivery, or for a young dead one."""

COPY_SQL = {
    "events": "INSERT INTO {new} SELECT * FROM {old} WHERE id = ANY($1::bigint[]) ON CONFLICT DO NOTHING",
    "deliveries": """
        INSERT INTO {new} SELECT * FROM {old} AS d WHERE event_id = ANY($1::bigint[]) ON CONFLICT DO NOTHING
    """,
    "ends": """
        INSERT INTO {new} SELECT x.* FROM {old} AS x
          JOIN {deliveries} AS d ON d.id = x.delivery_id ON CONFLICT DO NOTHING
    """,
}
OTHERS_SQL = """
    INSERT INTO {new} SELECT d.* FROM {old} AS d JOIN events AS e ON e.id = d.event_id
     WHERE d.event_id < $1 OR d.event_id >= $2 ON CONFLICT DO NOTHING
"""
"""Deliveries of a partition whose events are in another one: replays, and deliveries around midnight."""


class Day(msgspec.Struct, frozen=True):
    """A partition of each large table."""

    name: str  # YYYYMMDD
    bytes: int  # of its events, or of its attempts
    run: str = "0"  # unique id of the pass, because a node that was suspended may still be in a former pass

    def kept(self, table: str) -> str:
        """Return the name of the table for the rows to keep."""
        return f"{table}_{self.name}_{self.run}_kept"

    @property
    def start(self) -> int:
        """The first row id."""
        return first_id(self._begin)

    @property
    def end(self) -> int:
        """The row id after the last one."""
        return first_id(self.until)

    @property
    def until(self) -> int:
        """The end of the day, wall clock."""
        return self._begin + 86_400 * SECOND

    @property
    def _begin(self) -> int:
        return int(datetime.strptime(self.name, "%Y%m%d").replace(tzinfo=UTC).timestamp()) * SECOND


async def delete_events(candidates: Sequence[Candidate], connection: Connection) -> int:
    """Delete, in one transaction, those events that may still be deleted; returns their number.

    Their deliveries and attempts are deleted as well.
    """
    ids = [candidate.id for candidate in candidates]
    dead = [candidate.dead for candidate in candidates]
    async with connection.transaction():
        locked = await connection.fetch(DELETABLE_SQL, ids, dead, min(ids), max(ids))
        rows = await connection.fetch(UNUSED_SQL, [id_ for (id_,) in locked])
        if not rows:
            return 0
        events = [id_ for (id_,) in rows]
        deliveries = [id_ for (id_,) in await connection.fetch(DELETE_SQL["deliveries"], events)]
        if deliveries:
            await connection.execute(DELETE_SQL["ends"], deliveries, min(deliveries), max(deliveries))
            await connection.execute(DELETE_SQL["attempts"], deliveries)
        await connection.execute(DELETE_SQL["repetitions"], events)
        await connection.execute(DELETE_SQL["events"], events, min(events), max(events))
    return len(events)


class PostgresRetention(Retention[Connection]):
    """Deletes finished data of a PostgreSQL database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._statements = PostgresReader(database)
        super().__init__(self._statements, clock)
        self._database = database
        self._run = "0"
        self._waits = False  # for a transaction of another program
        self._limits = {
            "events": NEEDED,
            "attempts": NEEDED,
        }  # row ids; no row at or above them is deleted

    @property
    def _writer(self) -> Writer[Connection]:
        return self._database.writer

    async def _begin(self, policy: Policy, now: int, deleted: Counter[str]) -> None:
        self._run = secrets.token_hex(4)
        for (name,) in await self._database.fetch(LEFT_SQL):  # a pass was cut off
            await paced(self._writer, partial(_drop, name))
        self._limits = {"events": NEEDED, "attempts": NEEDED}
        for day in await self._days("attempts"):
            if day.bytes >= BIG and not await self._drop_attempts(day, now - policy.attempts, deleted):
                self._limits["attempts"] = day.start
                break
        for day in await self._days("events"):
            if day.bytes < BIG:
                continue
            if day.until > now - policy.default.events or await self._is_used():
                self._limits["events"] = day.start
                break
            deleted["events"] += await self._drop_events(day, policy, now)

    async def _days(self, table: str) -> list[Day]:
        """Return the partitions of a table, oldest first."""
        rows = await self._database.fetch(PARTITIONS_SQL, table)
        return [Day(name, size, self._run) for name, size in rows]

    async def _is_used(self) -> bool:
        """Return whether a long transaction of another program, such as a dump, reads the tables.

        A partition can be detached only after the end of that transaction, and all senders would wait behind
        an attempt before.
        """
        is_used = await has_long_users(self._database.fetch)
        if is_used and not self._waits:
            log.info("retention: another program reads the tables; whole days are deleted after that")
        self._waits = is_used
        return is_used

    async def _drop_attempts(self, day: Day, before: int, deleted: Counter[str]) -> bool:
        """Drop a partition of attempts if all of it is old enough; returns whether it was dropped."""
        if day.until > before or await self._is_used():
            return False
        table = f"attempts_{day.name}"
        count = await self._database.value(f"SELECT count(*) FROM {table}")  # noqa: S608 - a name of a partition
        await paced(self._writer, partial(_detach, day, ["attempts"]))
        await paced(self._writer, partial(_drop, f"{table}_old"))
        deleted["attempts"] += count
        return True

    async def _drop_events(self, day: Day, policy: Policy, now: int) -> int:
        """Drop a partition of events except those that must stay; returns the number of deleted events."""
        events = f"events_{day.name}"
        types = await self._database.fetch(TYPES_SQL.format(events=events), MOST_TYPES)
        if len(types) > MOST_TYPES:
            return 0
        rules = []
        for (type_,) in types:
            keep = policy.of(type_.partition(".")[0], type_)
            rules.append((type_, now - keep.events, now - keep.dead))
        longer = [type_ for type_, moment, _ in rules if moment < day.until]
        columns = [list(column) for column in zip(*rules, strict=True)] or [[], [], []]
        sql = KEPT_SQL.format(events=events, early=_of("e", EARLY))
        find = partial(_kept, sql, (*columns, longer, day.start, day.end))
        kept = await find(self._database)
        if kept is None:
            return 0
        count = await self._database.value(f"SELECT count(*) FROM {events}")  # noqa: S608 - a name of a partition
        if 2 * len(kept) > count:
            return 0  # it has been replaced before, or copying costs more than deleting
        await paced(self._writer, partial(_make, day))
        for at in range(0, len(kept), PAGE):
            await paced(self._writer, partial(_copy, day, kept[at : at + PAGE]))
        remaining = await paced(self._writer, partial(_swap, day, find, set(kept)))
        if remaining is None:
            return 0
        for table in _MADE:
            await paced(self._writer, partial(_drop, f"{table}_{day.name}_old"))
        more = True
        while more:
            more = await paced(self._writer, partial(_delete_orphans, day))
        log.info("retention: dropped the events of %s, kept %d of %d", day.name, remaining, count)
        return int(count) - remaining

    async def _last(self, group: Group, moment: int) -> int:
        last = min(first_id(moment + SLACK), await self._statements.newest("events"))
        return min(last, self._limits["events"] - 1) if group.kind == "all" else last

    async def _page(self, group: Group, end: int, start: int) -> Sequence[tuple[Any, ...]]:
        path = EVENT_PATHS[group.kind]
        arrays = [[group.name]] if path.columns else []
        rows = await self._database.fetch(path.sql(newest_first=False), *arrays, end, start, PAGE)
        ids = [id_ for _, id_ in rows]
        if not ids:
            return ()
        return list(map(tuple, await self._database.fetch(PAGE_SQL, ids, min(ids), max(ids))))

    async def _delete_events(self, candidates: Sequence[Candidate], connection: Connection) -> int:
        return await delete_events(candidates, connection)

    async def _delete_rows(self, name: str, before: int, connection: Connection) -> tuple[int, bool]:
        sql, limit = ROWS_SQL[name]
        values = (before, self._limits["attempts"]) if name == "attempts" else (before,)
        count = _count(await connection.execute(sql.format(limit=limit), *values))
        return count, count == limit

    async def _end(self, _deleted: Counter[str], _deadline: float) -> int:
        """Drop old partitions without rows; PostgreSQL itself returns their space."""
        yesterday = datetime.fromtimestamp(self._clock.wall() // SECOND, UTC) - timedelta(days=1)
        existing = {table: {day.name for day in await self._days(table)} for table in TABLES}
        for day in await self._days("events"):
            if day.name >= f"{yesterday:%Y%m%d}":
                break
            tables = [table for table in TABLES if day.name in existing[table]]
            some = " OR ".join(f"EXISTS (SELECT FROM {table}_{day.name})" for table in tables)
            if not await self._database.value(f"SELECT {some}") and not await self._is_used():
                await paced(self._writer, partial(_detach, day, tables))
                for table in tables:
                    await paced(self._writer, partial(_drop, f"{table}_{day.name}_old"))
        return 0


TABLES = ("events", "deliveries", "ends", "attempts")
_MADE = ("events", "deliveries", "ends")


def _of(alias: str, condition: str) -> str:
    """Return a condition about the columns of an alias."""
    return re.sub(r"\b(received_at|id)\b", rf"{alias}.\1", condition)


def _count(status: str) -> int:
    """Return the number of rows from the status of a statement, such as `DELETE 5`."""
    return int(status.rpartition(" ")[2])


async def _kept(sql: str, values: tuple[Any, ...], connection: Connection | Database) -> list[int] | None:
    """Return the events of a partition that must stay; None: too many."""
    found = [id_ for (id_,) in await connection.fetch(sql, *values, MOST_KEPT + 1)]
    return None if len(found) > MOST_KEPT else sorted(found)


def _of_one_pass(step: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Let a step fail if another pass has dropped its tables, while this node was suspended.

    Elsewhere, a missing table counts as a failure of the database, and stops the writer.
    """

    @wraps(step)
    async def run(*values: Any) -> T:
        try:
            return await step(*values)
        except asyncpg.UndefinedTableError as error:
            raise StorageError(f"another node has taken over this pass of retention: {error}") from error

    return run


async def _make(day: Day, connection: Connection) -> None:
    """Create the tables for the rows that stay."""
    async with connection.transaction():
        for table in _MADE:
            await connection.execute(f"DROP TABLE IF EXISTS {day.kept(table)}")
            await connection.execute(
                f"CREATE TABLE {day.kept(table)} (LIKE {table} INCLUDING ALL) WITH (parallel_workers = 0)"
            )


@_of_one_pass
async def _copy(day: Day, events: Collection[int], connection: Connection) -> None:
    """Copy events that stay, with their deliveries."""
    new = {table: day.kept(table) for table in _MADE}
    for table, sql in COPY_SQL.items():
        text = sql.format(new=new[table], old=f"{table}_{day.name}", deliveries=new["deliveries"])
        await connection.execute(text, *(() if table == "ends" else (list(events),)))


@_of_one_pass
async def _swap(day: Day, find: Any, copied: set[int], connection: Connection) -> int | None:
    """Replace a partition by the rows that stay; returns the number of its events, None if too many stay.

    Nothing else writes to the old partition meanwhile. Rows that came since the copy are copied now.
    """
    async with connection.transaction():
        await connection.execute(LOCK_TIMEOUT_SQL)
        names = ", ".join(f"{table}_{day.name}" for table in _MADE)
        await connection.execute(f"LOCK TABLE {names} IN EXCLUSIVE MODE")
        kept = await find(connection)
        if kept is None:
            return None
        await _copy(day, [id_ for id_ in kept if id_ not in copied] or [0], connection)
        gone = list(copied - set(kept))
        if gone:
            for table, column in (("events", "id"), ("deliveries", "event_id"), ("ends", "event_id")):
                sql = f"DELETE FROM {day.kept(table)} WHERE {column} = ANY($1::bigint[])"  # noqa: S608 - constants
                await connection.execute(sql, gone)
        others = OTHERS_SQL.format(new=day.kept("deliveries"), old=f"deliveries_{day.name}")
        await connection.execute(others, day.start, day.end)
        await _copy(day, [0], connection)  # the ends of those
        beyond = await connection.fetch(
            """
            DELETE FROM deliveries WHERE event_id >= $1 AND event_id < $2 AND (id < $1 OR id >= $2)
               AND event_id <> ALL($3::bigint[]) RETURNING id
            """,
            day.start, day.end, kept,
        )  # fmt: skip
        if ids := [id_ for (id_,) in beyond]:
            await connection.execute(DELETE_SQL["ends"], ids, min(ids), max(ids))
            await connection.execute(DELETE_SQL["attempts"], ids)
        await connection.execute(
            """
            DELETE FROM repetitions WHERE event_id >= $1 AND event_id < $2 AND event_id <> ALL($3::bigint[])
            """,
            day.start, day.end, kept,
        )  # fmt: skip
        await _exchange(day, connection)
    return len(kept)


@_of_one_pass
async def _detach(day: Day, tables: Sequence[str], connection: Connection) -> None:
    """Detach partitions without a replacement."""
    async with connection.transaction():
        await connection.execute(LOCK_TIMEOUT_SQL)
        for table in tables:
            await _take_off(table, day, connection)


async def _exchange(day: Day, connection: Connection) -> None:
    """Replace the partitions of a day by the tables with the rows that stay."""
    for table in _MADE:
        name = f"{table}_{day.name}"
        await _take_off(table, day, connection)
        await connection.execute(f"ALTER TABLE {day.kept(table)} RENAME TO {name}")
        bounds = f"FROM ({day.start}) TO ({day.end})"
        await connection.execute(f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES {bounds}")


async def _take_off(table: str, day: Day, connection: Connection) -> None:
    name = f"{table}_{day.name}"
    await connection.execute(f"ALTER TABLE {table} DETACH PARTITION {name}")
    await connection.execute(f"ALTER TABLE {name} RENAME TO {name}_old")


async def _delete_orphans(day: Day, connection: Connection) -> bool:
    """Delete attempts whose delivery was dropped, some at a time; returns whether more may exist."""
    status = await connection.execute(
        """
        DELETE FROM attempts WHERE id = ANY(ARRAY(
               SELECT a.id FROM attempts AS a WHERE a.delivery_id >= $1 AND a.delivery_id < $2
                  AND (SELECT d.id FROM deliveries AS d WHERE d.id = a.delivery_id) IS NULL LIMIT 1000))
        """,
        day.start, day.end,
    )  # fmt: skip
    return _count(status) == COST


async def _drop(name: str, connection: Connection) -> None:
    """Drop a table, unless another program such as a dump reads it; then a later pass does that."""
    with suppress(asyncpg.LockNotAvailableError):
        async with connection.transaction():
            await connection.execute(LOCK_TIMEOUT_SQL)
            await connection.execute(f"DROP TABLE IF EXISTS {name}")
