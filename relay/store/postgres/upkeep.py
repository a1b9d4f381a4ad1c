"""Upkeep over PostgreSQL: retention, sizes and checks. Backups are made with PostgreSQL's own tools."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Never

from relay.base.clock import Clock, SystemClock
from relay.errors import UnsupportedError
from relay.model import Backup, Check, Compacted, Measured, Observed, Pruned
from relay.store.postgres.connection import Connection, Database
from relay.store.postgres.doctor import LONG, Examined, examine
from relay.store.postgres.observing import observe
from relay.store.postgres.prune import PostgresRetention
from relay.store.pruning import PASS
from relay.store.retention_policy import Policy

PRUNE_AT_ONCE = 1000
"""Rows that one transaction deletes; a transaction of this size does not delay senders noticeably."""

METRICS_SQL = f"""
    DELETE FROM worker_metrics WHERE ctid = ANY(ARRAY(
           SELECT ctid FROM worker_metrics WHERE at < $1 ORDER BY at LIMIT {PRUNE_AT_ONCE}))
"""  # noqa: S608 - constants
COMMANDS_SQL = f"""
    DELETE FROM worker_commands WHERE ctid = ANY(ARRAY(
           SELECT ctid FROM worker_commands
            WHERE state <> 'queued' AND created_at < $1 ORDER BY created_at LIMIT {PRUNE_AT_ONCE}))
"""  # noqa: S608 - constants
MEASURE_SQL = """
    SELECT current_setting('server_version') AS server,
           (SELECT value::int FROM meta WHERE name = 'version') AS version,
           pg_database_size(current_database()) AS bytes,
           CASE WHEN $1 THEN (SELECT count(*) FROM events) END AS events,
           (SELECT received_at FROM events ORDER BY id LIMIT 1) AS oldest,
           (SELECT received_at FROM events ORDER BY id DESC LIMIT 1) AS newest,
           CASE WHEN $1 THEN (SELECT count(*) FROM owed)
                ELSE (SELECT coalesce(sum(created - delivered - dead - expired - cancelled), 0) FROM ledger)
                END::bigint AS pending
"""


class PostgresUpkeep:
    """`relay.store.Upkeep` over PostgreSQL."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._retention = PostgresRetention(database, clock)

    async def check_disk(self) -> None:
        """See `Upkeep.check_disk`: the relay cannot examine the server's disk; a full one refuses commits."""

    async def prune(self, policy: Policy, seconds: float = PASS) -> Pruned:
        """See `Upkeep.prune`."""
        return await self._retention.prune(policy, seconds)

    async def prune_worker_metrics(self, before: int) -> int:
        """See `Upkeep.prune_worker_metrics`."""
        return await self._database.writer.call(partial(_delete, METRICS_SQL, before))

    async def prune_worker_commands(self, before: int) -> int:
        """See `Upkeep.prune_worker_commands`."""
        return await self._database.writer.call(partial(_delete, COMMANDS_SQL, before))

    async def missing_space(self, folder: Path, *, keep_free: int = 0) -> int:
        """See `Upkeep.missing_space`."""
        _ = folder, keep_free
        refuse_backup()

    async def backup(self, target: Path, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """See `Upkeep.backup`."""
        _ = target, replace, keep_free
        refuse_backup()

    async def compact(self) -> Compacted:
        """See `Upkeep.compact`."""
        raise UnsupportedError(
            "PostgreSQL reuses and returns free space by itself",
            hint="autovacuum and the daily partitions do it; `relay doctor` checks both",
        )

    async def measure(self, *, counts: bool = True) -> Measured:
        """See `Upkeep.measure`."""
        async with self._database.snapshot() as connection:
            return await measure(self._database.address.location, connection, counts=counts)

    async def examine(
        self,
        *,
        min_free: int = 0,
        destinations: Collection[str] | None = None,
        sources: Collection[str] | None = None,
        config: Path | None = None,
    ) -> list[Check]:
        """See `Upkeep.examine`."""
        _ = min_free, config  # of a disk of this machine, and of a file on it
        examined = Examined(
            location=self._database.address.location,
            now=self._clock.wall(),
            destinations=destinations,
            sources=sources,
            is_in_use=True,
        )
        async with self._database.reader() as connection:
            return await examine(examined, self._database.address, connection)

    async def observe(self) -> Observed | None:
        """See `Upkeep.observe`."""
        async with self._database.reader() as connection:
            return await observe(connection, SystemClock().wall())  # a cluster's clock is the server's


async def measure(location: str, connection: Connection, *, counts: bool = True) -> Measured:
    """Return the space that events and deliveries take, and with `counts` their numbers."""
    [row] = await connection.fetch(MEASURE_SQL, counts, seconds=LONG)
    return Measured(
        path=location, engine=f"PostgreSQL {row['server']}", version=row["version"], bytes=row["bytes"],
        events=row["events"], oldest=row["oldest"], newest=row["newest"], pending=row["pending"],
    )  # fmt: skip


def refuse_backup() -> Never:
    """Raise the error of every command that would copy a file.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "the relay makes no backups of a PostgreSQL database",
        hint="use pg_basebackup, pgBackRest or WAL-G: see docs/storage.md, section PostgreSQL",
    )


async def _delete(sql: str, before: int, connection: Connection) -> int:
    """Run a deletion and return the number of rows."""
    return int((await connection.execute(sql, before)).rpartition(" ")[2])
