"""Upkeep over SQLite: retention, backups, compaction, sizes and checks."""

import asyncio
from collections.abc import Collection
from functools import partial
from pathlib import Path

import aiosqlite

from relay.base.clock import Clock
from relay.errors import StorageUnavailableError
from relay.model import Backup, Check, Compacted, Measured, Pruned
from relay.store import DiskSpace
from relay.store.pruning import PASS, paced
from relay.store.retention_policy import Policy
from relay.store.sqlite.backup import back_up, lacks
from relay.store.sqlite.compact import SIZES_SQL, empty_log
from relay.store.sqlite.database import Database
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.doctor import Examined, examine
from relay.store.sqlite.measure import measure
from relay.store.sqlite.prune import SqliteRetention, vacuum_some
from relay.store.sqlite.read_only import in_thread

PRUNE_AT_ONCE = 1000
"""Rows that one transaction deletes; a transaction of this size does not delay senders noticeably."""


class SqliteUpkeep:
    """`relay.store.Upkeep` over SQLite."""

    def __init__(self, database: Database, clock: Clock, disk: Disk) -> None:
        self._database = database
        self._clock = clock
        self._disk = disk
        self._retention = SqliteRetention(database, clock, disk)

    async def check_disk(self) -> DiskSpace:
        """See `Upkeep.check_disk`."""
        if self._disk.released:
            await asyncio.to_thread(self._disk.restore_reserve)
        free = self._disk.measure()
        is_full = free < self._disk.floor or self._disk.released > 0
        return DiskSpace(self._database.path.parent, free, self._disk.floor, is_full, self._disk.lacking)

    async def prune(self, policy: Policy, seconds: float = PASS) -> Pruned:
        """See `Upkeep.prune`."""
        return await self._retention.prune(policy, seconds)

    async def prune_worker_metrics(self, before: int) -> int:
        """See `Upkeep.prune_worker_metrics`."""

        async def prune(connection: aiosqlite.Connection) -> int:
            cursor = await connection.execute(
                """
                DELETE FROM worker_metrics WHERE (source, worker_id, at) IN (
                       SELECT source, worker_id, at FROM worker_metrics WHERE at < ? ORDER BY at LIMIT ?)
                """,
                (before, PRUNE_AT_ONCE),
            )
            return cursor.rowcount

        return await self._database.writer.call(prune)

    async def prune_worker_commands(self, before: int) -> int:
        """See `Upkeep.prune_worker_commands`."""

        async def prune(connection: aiosqlite.Connection) -> int:
            cursor = await connection.execute(
                """
                DELETE FROM worker_commands WHERE public_id IN (
                       SELECT public_id FROM worker_commands
                        WHERE state <> 'queued' AND created_at < ? ORDER BY created_at LIMIT ?)
                """,
                (before, PRUNE_AT_ONCE),
            )
            return cursor.rowcount

        return await self._database.writer.call(prune)

    async def missing_space(self, folder: Path, *, keep_free: int = 0) -> int:
        """See `Upkeep.missing_space`."""
        self._check_source()
        return await in_thread(partial(lacks, self._database.path, folder, keep_free=keep_free))

    async def backup(self, target: Path, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """See `Upkeep.backup`."""
        self._check_source()
        copy = partial(back_up, self._database.path, target, replace=replace)
        return await in_thread(partial(copy, keep_free=keep_free) if keep_free else copy)

    def _check_source(self) -> None:
        """Refuse to back up a file that is not the open database; it would replace good backups."""
        if self._database.writer.broken is not None:
            raise StorageUnavailableError(f"no backup is possible: {self._database.writer.broken}")

    async def compact(self) -> Compacted:
        """See `Upkeep.compact`."""
        reader, writer = self._database.reader, self._database.writer
        [(before, _)] = await reader.execute_fetchall(SIZES_SQL)
        while await paced(writer, vacuum_some):
            pass
        whole = await writer.call(empty_log)
        [(after, _)] = await reader.execute_fetchall(SIZES_SQL)
        return Compacted(before=before, after=after, whole=whole)

    async def measure(self, *, counts: bool = True) -> Measured:
        """See `Upkeep.measure`."""
        return await in_thread(partial(measure, self._database.path, counts=counts))

    async def examine(
        self,
        *,
        min_free: int = 0,
        destinations: Collection[str] | None = None,
        sources: Collection[str] | None = None,
        config: Path | None = None,
    ) -> list[Check]:
        """See `Upkeep.examine`."""
        examined = Examined(
            path=self._database.path,
            now=self._clock.wall(),
            min_free=min_free,
            destinations=destinations,
            sources=sources,
            config=config,
        )
        return await in_thread(partial(examine, examined))

    async def observe(self) -> None:
        """See `Upkeep.observe`."""
