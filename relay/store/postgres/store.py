"""The store in a PostgreSQL database."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg

from relay.base.clock import Clock
from relay.errors import StorageError, StorageUnavailableError
from relay.model import News, WorkerStatus
from relay.store import Listener, Nodes, Resolve, Route, Rules
from relay.store.claims import Claims
from relay.store.ledger import counts_of
from relay.store.nodes import OneNode
from relay.store.postgres.audit import PostgresAudit
from relay.store.postgres.commit import PostgresCommitter
from relay.store.postgres.connection import (
    ERRORS,
    Address,
    Connection,
    Database,
    connect,
    connect_raw,
    is_transient,
    refused,
    text_of,
)
from relay.store.postgres.deliveries import PostgresDeliveries
from relay.store.postgres.events import PostgresEvents
from relay.store.postgres.ledger import TOTALS_SQL, PostgresLedger
from relay.store.postgres.logins import PostgresLogins
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.owner import RENEW_EVERY, Owner, refuse_single
from relay.store.postgres.partitions import LOCK_SQL, make_partitions
from relay.store.postgres.queries import PostgresQueries
from relay.store.postgres.refused import PostgresRefused
from relay.store.postgres.rows import IdSequences
from relay.store.postgres.schema import META, MIGRATIONS
from relay.store.postgres.upkeep import PostgresUpkeep
from relay.store.postgres.workers import SharedWorkers, load_roster
from relay.store.postgres.writer import PostgresWriter
from relay.store.workers import StoredWorkers

log = logging.getLogger("relay.store")

OLDEST = 15
"""The oldest major version of PostgreSQL."""

COUNT_EVERY = 1.0
"""Seconds between two readings of the ledger for deliveries that other nodes have created and ended."""

PARTITIONS_EVERY = 3600.0
"""Seconds between two checks for missing partitions."""

FOREIGN_SQL = """
    SELECT to_regclass('meta') IS NULL
           AND (to_regclass('events') IS NOT NULL OR to_regclass('deliveries') IS NOT NULL)
"""
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
        digest: Callable[[], bytes],
    ) -> None:
        """Take `cluster`, the seconds of a lease if other daemons may use the database at the same time."""
        self.location = address.location
        self.files: Mapping[str, Path] = {}
        self.unsaved = False  # committed data is on the server
        self._address = address
        self._clock = clock
        self._rules = rules
        self._listeners = listeners
        self._observers = observe_seconds, observe_requests
        self._on_fatal = on_fatal
        self._sync = "on" if full else "off"
        self._owner = Owner(folder)
        self.database = Database(address)
        self.claims = Claims()
        # None: this daemon uses the database alone, which its lease ensures.
        self._shared = None if cluster is None else self._make_nodes(node, cluster, digest)
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
        self.nodes: Nodes = self._shared or OneNode(clock, node, digest)
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
        self._maintenance: asyncio.Task[None] | None = None
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
                self.failure = found.message
                self.database.set_closed(found.message)
            raise found from error
        self.opened, self.failure = True, None

    async def _open(self, connection: Connection) -> None:
        await self._check(connection)
        await self._migrate(connection)
        if self._shared is None:
            await self._owner.take(connection)
        else:
            await refuse_single(connection)
            await self._shared.join()
        await make_partitions(connection, self._clock.wall())
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

    async def _check(self, connection: Connection) -> None:
        if connection.server_version < OLDEST:
            raise StorageError(
                f"{self.location} has version {connection.server_version}, the relay needs {OLDEST} or newer",
                hint="upgrade the server",
            )
        encoding = await connection.value("SELECT current_setting('server_encoding')")
        if encoding != "UTF8":
            raise StorageError(
                f"{self.location} has the encoding {encoding}, the relay needs UTF8",
                hint="create the database with: createdb --encoding=UTF8 --template=template0 NAME",
            )
        if await connection.value(FOREIGN_SQL):
            raise StorageError(
                f"{self.location} has tables named events or deliveries that belong to another program",
                hint="use a separate database or schema for the relay",
            )

    async def _migrate(self, connection: Connection) -> None:
        async with connection.transaction():
            await connection.execute(LOCK_SQL)
            await connection.execute(META)
            version = int(await connection.value("SELECT value FROM meta WHERE name = 'version'") or 0)
            newest = len(MIGRATIONS)
            if await connection.value("SELECT value FROM meta WHERE name = 'moving'") is not None:
                raise StorageError(
                    f"{self.location} has the data of an unfinished move",
                    hint="run the same `relay db move` again: it continues",
                )
            if version > newest:
                raise StorageError(
                    f"{self.location} has schema version {version}, this program knows {newest}",
                    hint="run the newer hookferry that wrote it, or restore the copy made before the upgrade",
                )
            for script in MIGRATIONS[version:]:
                await connection.execute(script)
            if version < newest:
                sql = "INSERT INTO meta VALUES ('version', $1) ON CONFLICT (name) DO UPDATE SET value = $1"
                await connection.execute(sql, str(newest))

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

    def _make_nodes(self, name: str, lease: float, digest: Callable[[], bytes]) -> PostgresNodes:
        async def connect_for_leases() -> _Leases:
            return _Leases(self._address, await _reachable(self._address), max(1.0, min(5.0, lease / 6)))

        async def listen() -> "asyncpg.Connection[asyncpg.Record]":
            return await connect_raw(self._address)

        return PostgresNodes(
            connect_for_leases,
            self._clock,
            name=name,
            lease=lease,
            schema=len(MIGRATIONS),
            digest=digest,
            listen=None if self._address.is_pooled else listen,
            polls=self._address.is_pooled,
        )

    def _set_failure(self, why: str | None) -> None:
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
            if self._maintenance is not None:
                self._maintenance.cancel()
                with suppress(asyncio.CancelledError):
                    await self._maintenance
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
