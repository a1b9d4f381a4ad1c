"""A PostgreSQL database without a daemon: read and check it. Nothing here changes the data."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from relay.errors import StorageError
from relay.model import Backup, Check, Measured
from relay.store import Stop, StoredData
from relay.store.postgres.connection import ERRORS, Address, Connection, Database, connect, refused
from relay.store.postgres.doctor import Examined, examine, versions
from relay.store.postgres.ledger import PostgresLedger
from relay.store.postgres.queries import PostgresQueries
from relay.store.postgres.schema import problem_of
from relay.store.postgres.upkeep import measure, refuse_backup

T = TypeVar("T")


class Reading:
    """`relay.store.StoredData` over a PostgreSQL database."""

    def __init__(self, database: Database) -> None:
        self.queries = PostgresQueries(database)
        self.ledger = PostgresLedger(database)


class PostgresOffline:
    """`relay.store.OfflineStore` over a PostgreSQL database."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def read(self) -> AbstractAsyncContextManager[StoredData]:
        """See `OfflineStore.read`."""
        return self._read()

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[Reading]:
        await self._run(_check)
        database = Database(self._address)
        database.set_open()
        try:
            yield Reading(database)
        except ERRORS as error:
            raise refused(self._address, error) from error
        finally:
            await database.close()

    def measure(self, stop: Stop) -> Measured:
        """See `OfflineStore.measure`."""
        _ = stop

        async def run(connection: Connection) -> Measured:
            await _check(connection)
            return await measure(self._address.location, connection)

        return asyncio.run(self._run(run))

    def examine(
        self,
        stop: Stop,
        *,
        now: int,
        min_free: int = 0,
        destinations: Collection[str] | None = None,
        config: Path | None = None,
    ) -> list[Check]:
        """See `OfflineStore.examine`."""
        _ = stop, min_free, config
        examined = Examined(location=self._address.location, now=now, destinations=destinations)
        return asyncio.run(self._run(lambda connection: examine(examined, self._address, connection)))

    def back_up(self, target: Path, stop: Stop, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """See `OfflineStore.back_up`."""
        _ = target, stop, replace, keep_free
        refuse_backup()

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run work on a connection; raises `StorageError` for the errors of the server and the network."""
        try:
            connection = await connect(self._address, writes=False)
            try:
                return await work(connection)
            finally:
                await connection.close()
        except ERRORS as error:
            raise refused(self._address, error) from error


async def _check(connection: Connection) -> None:
    """Check that the database has the tables of this program.

    Raises:
        StorageError: it has none, or those of another version.
    """
    if not await connection.value(
        "SELECT to_regclass('meta') IS NOT NULL AND to_regclass('events') IS NOT NULL"
    ):
        raise StorageError(
            "the database has no tables yet", hint="they are created when the relay first runs"
        )
    version, least = await versions(connection)
    if (problem := problem_of(version, least)) is not None:
        raise StorageError(
            f"the database cannot be read: {problem}",
            hint="use the program that migrated it, or start the relay, which migrates it",
        )
