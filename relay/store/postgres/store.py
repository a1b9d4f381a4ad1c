"""The store in a PostgreSQL database."""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from relay import __version__
from relay.base.clock import Clock
from relay.config.effective import Digests
from relay.errors import StorageError, StorageUnavailableError
from relay.model import News, WorkerStatus
from relay.store import Listener, Nodes, Resolve, Route, Rules
from relay.store.claims import Claims
from relay.store.ledger import counts_of
from relay.store.nodes import OneNode
from relay.store.postgres.audit import PostgresAudit
from relay.store.postgres.backlog import SharedLimits
from relay.store.postgres.commit import PostgresCommitter
from relay.store.postgres.connection import (
    ERRORS,
    Address,
    Connection,
    Database,
    code_of,
    connect,
    connect_raw,
    finish_closing,
    is_transient,
    refused,
    text_of,
)
from relay.store.postgres.deliveries import PostgresDeliveries
from relay.store.postgres.events import PostgresEvents
from relay.store.postgres.ledger import TOTALS_SQL, PostgresLedger
from relay.store.postgres.logins import PostgresLogins
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.owner import RENEW_EVERY, Owner, place_of, refuse_single
from relay.store.postgres.partitions import LOCK_SQL, has_long_users, make_partitions
from relay.store.postgres.queries import PostgresQueries
from relay.store.postgres.refused import PostgresRefused
from relay.store.postgres.rows import IdSequences, first_id
from relay.store.postgres.schema import META, MIGRATIONS, REMOVALS, problem_of, refuse_unsuitable
from relay.store.postgres.shards import assign_for_ever
from relay.store.postgres.transitions import AHEAD_SQL
from relay.store.postgres.upkeep import PostgresUpkeep
from relay.store.postgres.worker_rows import load_roster
from relay.store.postgres.workers import SharedWorkers
from relay.store.postgres.writer import PostgresWriter
from relay.store.transitions import AHEAD, report_ahead
from relay.store.workers import StoredWorkers

log = logging.getLogger("relay.store")

OLDEST = 15
"""The oldest major version of PostgreSQL."""

COUNT_EVERY = 1.0
"""Seconds between two readings of the ledger for deliveries that other nodes have created and ended."""

LOCK_PATIENCE = "5s"
"""Time that a migration waits for another one."""

TABLE_PATIENCE = "300ms"
"""Time that a migration waits for a table. Statements of other nodes wait behind it, or it waits behind them
while they wait for it: then it must give up, and try again, before the server calls that a deadlock."""

TABLES_FOR = 30.0
"""Seconds for which a migration tries to lock the tables, before the daemon begins again."""

MIGRATION_TIMEOUT = 3600.0
"""Seconds that a migration may take."""

PARTITIONS_EVERY = 3600.0
"""Seconds between two checks for missing partitions."""

USED_SQL = "SELECT EXISTS (SELECT FROM events) OR EXISTS (SELECT FROM ledger) OR EXISTS (SELECT FROM stats)"
SET_META_SQL = "INSERT INTO meta VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = $2"
OLDER_SQL = """
    SELECT name || ' (' || version || ')' FROM nodes
     WHERE schema < $1 AND seen > clock_timestamp() - interval '30 seconds'
     UNION ALL
    SELECT coalesce(standing ->> 'host', 'another daemon') FROM leases
     WHERE name = 'daemon' AND until > clock_timestamp()
"""
STOPPED_SQL = """
    SELECT (extract(epoch FROM least(max(until), clock_timestamp())) * 1000000)::bigint
      FROM leases WHERE until > '-infinity'
"""
"""The end of the latest lease: a node that stops ends its leases, and other nodes may still run."""

HIGHEST_SQL = """
    SELECT (SELECT coalesce(max(id), 0) FROM events), (SELECT coalesce(max(id), 0) FROM deliveries),
           (SELECT coalesce(max(id), 0) FROM attempts)
"""


class PostgresStore:
    """`relay.store.Store` in PostgreSQL; `relay.store.opening.make_store` describes the arguments."""

    def __init__(
        self,
        address: Address,
        folder: Path,
        clock: Clock,
        *,
        route: Route,
        resolve: Resolve,
        rules: Rules,
        listeners: Sequence[Listener],
        on_status_change: Callable[[str, WorkerStatus], None],
        observe_seconds: Callable[[float], None],
        observe_requests: Callable[[float], None],
        on_fatal: Callable[[str], None],
        full: bool,
        node: str,
        cluster: float | None,
        digests: Callable[[], Digests],
        listen_address: Address | None,
        find_former: Callable[[], Awaitable[str | None]],
    ) -> None:
        """Take `cluster` and `find_former`.

        `cluster` is the length of a lease in seconds; None: this daemon uses the database alone.
        `find_former` describes the former database; None without events in it.
        """
        self.location = address.location
        self.files: Mapping[str, Path] = {}
        self.stopped_at = 0
        self.unsaved = False  # committed data is on the server
        self._address = address
        self._listen_address = listen_address
        self._clock = clock
        self._rules = rules
        self._listeners = listeners
        self._observers = observe_seconds, observe_requests
        self._on_fatal = on_fatal
        self._sync = "on" if full else "off"
        self._folder = folder
        self._find_former = find_former
        self._owner = Owner(folder)
        self.database = Database(address)
        self.claims = Claims()
        # None: this daemon uses the database alone, which its lease ensures.
        self._shared = None if cluster is None else self._make_nodes(node, cluster, digests)
        self._shared_workers: SharedWorkers | None = None
        if self._shared is not None and cluster is not None:
            self._shared_workers = SharedWorkers(
                self.database, clock, rules, incarnation=self._shared.incarnation, lease=cluster
            )
        self.workers = self._shared_workers or StoredWorkers(self.database, clock, rules)
        self.deliveries = PostgresDeliveries(self.database, self.claims, clock, self._shared)
        self.queries = PostgresQueries(self.database)
        self.ledger = PostgresLedger(self.database)
        self.refused = PostgresRefused(self.database)
        self.logins = PostgresLogins(self.database)
        self.audit = PostgresAudit(self.database)
        self.upkeep = PostgresUpkeep(self.database, clock)
        self.nodes: Nodes = self._shared or OneNode(clock, node, digests)
        self.events = PostgresEvents(
            self.database,
            deliveries=self.deliveries,
            queries=self.queries,
            workers=self.workers,
        )
        self._committer = PostgresCommitter(
            clock=clock,
            claims=self.claims,
            cancel_later=self.deliveries.cancel_later,
            workers=self.workers,
            ledger=self.ledger,
            route=route,
            resolve=resolve,
            rules=rules,
            listeners=listeners,
            on_status_change=on_status_change,
        )
        self._committer.nodes, self._committer.shared_workers = self._shared, self._shared_workers
        self._committer.note_retry = self.deliveries.note_retry
        if self._shared is not None:
            self._committer.limits = SharedLimits(self._shared, self.ledger)
        self._maintenance: asyncio.Task[None] | None = None
        self._assigning: asyncio.Task[None] | None = None  # of slots, in a cluster
        self.opened = False
        self.failure: str | None = None  # see `Store.failure`; of the latest `open`, then of the writer

    def explain(self, error: Exception) -> StorageError | None:
        """See `Store.explain`."""
        return refused(self._address, error) if isinstance(error, ERRORS) else None

    @property
    def commits(self) -> int:
        """Number of transactions with requests and outcomes that were committed since `open`."""
        return self.database.writer.commits

    @property
    def busy(self) -> float:
        """See `Store.busy`."""
        return self.database.writer.busy if self.opened else 0.0

    async def open(self) -> None:
        """See `Store.open`."""
        try:
            connection = await connect(self._address, writes=True)
            try:
                await self._open(connection)
            except BaseException:
                connection.terminate()
                raise
        except ERRORS as error:
            found = refused(self._address, error)
            if isinstance(found, StorageUnavailableError):
                self._set_closed(found)
            raise found from error
        except StorageUnavailableError as error:
            self._set_closed(error)
            raise
        self.opened, self.failure = True, None

    def _set_closed(self, error: StorageUnavailableError) -> None:
        self.failure = error.message
        self.database.set_closed(error.message, error.hint)

    async def _open(self, connection: Connection) -> None:
        await self._check(connection)
        await self._migrate(connection)
        await self._refuse_loss(connection)
        self.stopped_at = await connection.value(STOPPED_SQL) or 0
        if self._shared is None:
            await self._owner.take(connection)
        else:
            await refuse_single(connection, self._folder)
            await self._shared.join()
        await make_partitions(connection, self._clock.wall())
        ahead = self._clock.wall() + AHEAD
        report_ahead(len(await connection.fetch(AHEAD_SQL, self._clock.steady(), ahead, first_id(ahead))))
        roster = await load_roster(connection)
        [highest] = await connection.fetch(HIGHEST_SQL)
        self._committer.sequences = IdSequences(highest, 0 if self._shared is None else self._shared.slot)
        await self._count_pending(connection)
        roster.take_over(self.workers.roster, self._rules)
        self.workers.roster = roster
        if self._shared_workers is not None:
            await self._shared_workers.reload(connection)
        writer = PostgresWriter(
            connection,
            self._committer,
            opening=self,
            sync=self._sync,
            on_fatal=self._on_fatal,
            on_failure=self._set_failure,
            observers=self._observers,
        )
        self.database.writer = writer
        self.database.set_open()
        writer.start()
        self._maintenance = asyncio.create_task(self._maintain(), name="store lease")
        if self._shared is not None:
            self._assigning = asyncio.create_task(assign_for_ever(self.database, self._shared))

    async def _check(self, connection: Connection) -> None:
        if connection.server_version < OLDEST:
            raise StorageError(
                f"{self.location} has version {connection.server_version}, the relay needs {OLDEST} or newer",
                hint="upgrade the server",
            )
        await refuse_unsuitable(connection, self._address)

    async def _refuse_loss(self, connection: Connection) -> None:
        """Do not use an empty database while the former database has events.

        Senders are refused until the data is moved; otherwise the pending deliveries would be lost unnoticed.
        """
        if await connection.value(USED_SQL) or (former := await self._find_former()) is None:
            return
        raise StorageUnavailableError(
            f"{self.location} is empty, but {former}; stop the relay and move them with `relay db move`"
            " (docs/storage.md), or rename the file to begin without them"
        )

    async def _migrate(self, connection: Connection) -> None:
        """Create or migrate the tables; nodes of the previous version may use them meanwhile."""
        deadline = time.monotonic() + TABLES_FOR
        while True:
            try:
                await self._migrate_once(connection)
            except asyncpg.PostgresError as error:
                if code_of(error) not in {"55P03", "40P01"} or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(random.uniform(0.05, 0.3))  # noqa: S311 - no secret
            else:
                return

    async def _migrate_once(self, connection: Connection) -> None:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_PATIENCE}'; {LOCK_SQL}")
            await connection.execute(META)
            meta = {row["name"]: row["value"] for row in await connection.fetch("SELECT * FROM meta")}
            version, least = int(meta.get("version", 0)), int(meta.get("least", 1))
            if "moving" in meta:
                raise StorageError(
                    f"{self.location} has the data of an unfinished move",
                    hint="run the same `relay db move` again: it continues",
                )
            if 0 < version < len(MIGRATIONS):
                await self._lock_tables(connection, version)
            older: list[str] = []
            for number in range(version + 1, len(MIGRATIONS) + 1):
                wanted = REMOVALS.get(number, least)
                if wanted > least and (
                    older := [row[0] for row in await connection.fetch(OLDER_SQL, wanted)]
                ):
                    break
                await connection.execute(MIGRATIONS[number - 1], seconds=MIGRATION_TIMEOUT)
                version, least = number, wanted
                for name, value in (("version", version), ("least", least), ("program", __version__)):
                    await connection.execute(SET_META_SQL, name, str(value))
            if (problem := problem_of(version, least)) is not None:
                program = meta.get("program", "a newer version")
                hint = f"run hookferry {program}, which migrated it, or a newer version"
                if older:
                    hint = f"stop the nodes of older versions first: {', '.join(older)}"
                raise StorageError(f"{self.location}: {problem}", hint=hint)
        if older:
            log.info("a migration waits until these nodes of older versions stop: %s", ", ".join(older))
        if version > len(MIGRATIONS):
            log.info("a newer version has migrated the tables; this version can use them")

    async def _lock_tables(self, connection: Connection, version: int) -> None:
        """Lock the tables of a version for its migration.

        Raises:
            StorageUnavailableError: another program reads them, so all nodes would wait for the attempt.
        """
        if await has_long_users(connection.fetch):
            raise StorageUnavailableError(
                f"{self.location}: the migration waits for another program, which reads the tables",
                hint="wait until the dump has ended; the relay then continues automatically",
            )
        tables = sorted(re.findall(r"CREATE TABLE (\w+)", "".join(MIGRATIONS[:version])))
        await connection.execute(
            f"SET LOCAL lock_timeout = '{TABLE_PATIENCE}'; LOCK TABLE {', '.join(tables)}"
        )

    async def _count_pending(self, connection: Connection) -> None:
        totals = counts_of(await connection.fetch(TOTALS_SQL))
        self.ledger.pending_counts.clear()
        self.ledger.pending_counts.update({name: each.pending for name, each in totals.items()})

    async def connect(self) -> Connection:
        """Open the writing connection again, and check that no other daemon uses the database."""
        connection = await connect(self._address, writes=True)
        try:
            if self._shared is None:
                await self._owner.take(connection)
        except StorageError as error:
            connection.terminate()
            self._lose(error.message)
            raise
        except BaseException:
            connection.terminate()
            raise
        self.database.renew_readers()
        return connection

    async def refresh(self, connection: Connection) -> None:
        """Read the numbers of pending deliveries again, and let all lanes look for due ones."""
        await self._count_pending(connection)
        if self._shared_workers is not None:
            await self._shared_workers.reload(connection)
        names = frozenset(name for name, count in self.ledger.pending_counts.items() if count)
        for name in names:
            self.deliveries.forget_cursor(name)
        for listen in self._listeners:
            try:
                listen(News(woken=names))
            except Exception:
                log.exception(
                    "a listener failed after the database came back; lanes find due deliveries by polling"
                )

    async def make_partitions(self, connection: Connection) -> None:
        """Make the partitions for today and the next days."""
        await make_partitions(connection, self._clock.wall())

    async def _maintain(self) -> None:
        """Renew the lease, and create partitions in advance."""
        writer, partitions_at = self.database.writer, time.monotonic() + PARTITIONS_EVERY
        while True:
            await asyncio.sleep(RENEW_EVERY if self._shared is None else COUNT_EVERY)
            try:
                if self._shared is not None:
                    await writer.call(self._count_pending)  # other nodes create and end deliveries, too
                elif not await writer.call(self._owner.renew):
                    self._lose("another daemon has taken over the database")
                    return
                if time.monotonic() > partitions_at:
                    await writer.call(self.make_partitions)
                    partitions_at = time.monotonic() + PARTITIONS_EVERY
            except StorageError as error:  # the writer tries to connect again
                log.debug("the lease could not be renewed: %s", error.message)
            except ERRORS as error:
                log.warning("cannot create the partitions of the next days: %s", text_of(error))

    def _lose(self, why: str) -> None:
        """Stop writing, because another daemon uses the database now."""
        self.database.writer.halt(why)
        self._on_fatal(why)

    def _make_nodes(self, name: str, lease: float, digests: Callable[[], Digests]) -> PostgresNodes:
        async def connect_for_leases() -> _Leases:
            return _Leases(self._address, await _reachable(self._address), max(1.0, min(5.0, lease / 6)))

        def connecting(address: Address) -> Callable[[], Awaitable["asyncpg.Connection[asyncpg.Record]"]]:
            return lambda: connect_raw(address)

        listen, send = self._listen_address, None
        if listen is not None or self._address.is_pooled:
            send = connecting(self._address)
        else:
            listen = self._address

        return PostgresNodes(
            connect_for_leases,
            self._clock,
            name=name,
            lease=lease,
            schema=len(MIGRATIONS),
            listen=None if listen is None else connecting(listen),
            send=send,
            digests=digests,
            place=partial(place_of, self._folder),
        )

    def _set_failure(self, why: str | None) -> None:
        if why is not None:
            why = " ".join(why.split())  # the server's hints are lines of their own
            why = why if self.location in why else f"{self.location}: {why}"
        self.failure = why

    async def close(self) -> None:
        """See `Store.close`."""
        if not self.opened:
            return
        self.deliveries.release(tuple(self.claims.cancelled))  # their attempts were cut off
        writer = self.database.writer
        assert isinstance(writer, PostgresWriter)  # noqa: S101 - `opened` ensures it
        try:
            if writer.failure is None:
                with suppress(StorageError):  # heartbeats only; the next ones report the same
                    await self.workers.flush()
            for task in (self._maintenance, self._assigning):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
            await writer.stop()
            if self._shared is not None:
                await self._shared.close()
            elif writer.failure is None:
                with suppress(*ERRORS):  # then the lease expires
                    await self._owner.give(writer.connection)
        finally:
            self.opened = False
            await self.database.close()
            await writer.connection.close()
            await finish_closing()


class _Leases:
    """The connection of `PostgresNodes`: it must answer long before a lease ends."""

    def __init__(self, address: Address, connection: Connection, seconds: float) -> None:
        self._address = address
        self._connection = connection
        self._seconds = seconds  # of one statement

    async def fetch(self, sql: str, *values: Any) -> Sequence[Any]:
        """Run a statement.

        Raises:
            StorageError: it failed.
        """
        try:
            return await self._connection.fetch(sql, *values, seconds=self._seconds)
        except ERRORS as error:
            raise refused(self._address, error) from error

    async def close(self) -> None:
        """Close the connection."""
        self._connection.terminate()


async def _reachable(address: Address) -> Connection:
    """Open a connection; raises the errors of the store."""
    try:
        return await connect(address, writes=True)
    except ERRORS as error:
        raise refused(address, error) from error


def is_failure(error: Exception) -> bool:
    """Return whether an exception comes from the server or the network; False: a faulty statement."""
    return isinstance(error, ERRORS) and is_transient(error)
