"""The writer of a PostgreSQL database: its errors, and commits whose answer was lost."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from relay.errors import StorageError
from relay.store.postgres.commit import PostgresCommitter
from relay.store.postgres.connection import ERRORS, Connection, code_of, is_lost, is_transient, text_of
from relay.store.postgres.transaction import CONFIRM_SQL, Transaction
from relay.store.writer import Remedy, Writer

log = logging.getLogger("relay.store")

MOST_AGAIN = 5
"""Times that a batch is written again after a race or a deadlock, before it is written job by job."""

RESOLVE_FOR = 15.0
"""Seconds for which a lost connection is opened again to find out if its last commit is durable."""

RACES = {"40001", "40P01", "23502", "23514"}
"""SQLSTATE of a serialization failure, a deadlock, a key that another node stored, a missing partition."""

NO_PARTITION = "23514"

READ_ONLY = "25006"

END_SESSION_SQL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE pid = $1 AND usename = current_user AND application_name = 'hookferry'
"""


class Opening(Protocol):
    """Opens the database for the writer; see `relay.store.postgres.store.PostgresStore`."""

    async def connect(self) -> Connection:
        """Open the writing connection, and check that the database still belongs to this daemon."""
        ...

    async def refresh(self, connection: Connection) -> None:
        """Read the data that the store keeps in memory again, and wake the lanes."""
        ...

    async def make_partitions(self, connection: Connection) -> None:
        """Make the missing partitions."""
        ...


class Space:
    """Room for senders' requests: unlimited, because errors of a full disk of the server stop writes."""

    copies, overhead, released, is_near_floor = 0, 0, 0, False

    def __init__(self) -> None:
        self.room = float("inf")

    def admits(self, size: int, promised: int) -> bool:
        """See `relay.store.writer.Space`."""
        _ = size, promised
        return True


class UnknownCommitError(StorageError):
    """The connection was lost during a commit, and nothing shows if the commit is durable."""


class PostgresTransaction(Transaction):
    """A transaction whose commit either raises or is durable, even if its connection is lost meanwhile."""

    def __init__(self, writer: "PostgresWriter", sync: str) -> None:
        super().__init__(writer.connection, sync)
        self._writer = writer

    async def commit(self) -> None:
        """See `Transaction.commit`.

        Raises:
            UnknownCommitError: nothing shows if the changes are durable.
        """
        await self._writer.commit(self, super().commit())


class PostgresWriter(Writer[Connection]):
    """The only writer of this daemon."""

    def __init__(
        self,
        connection: Connection,
        committer: PostgresCommitter,
        *,
        opening: Opening,
        sync: str,
        on_fatal: Callable[[str], None],
        on_failure: Callable[[str | None], None],
        observers: tuple[Callable[[float], None], Callable[[float], None]],
    ) -> None:
        super().__init__(
            connection,
            committer,
            transaction=partial(PostgresTransaction, self, sync),
            space=Space(),
            on_fatal=on_fatal,
            on_failure=on_failure,
            observers=observers,
        )
        self._postgres = committer
        self._opening = opening
        self._sync = sync
        self._again = (0, 0)  # commits before, and how often the batch after them was written again

    @property
    def connection(self) -> Connection:
        """The current writing connection."""
        return self._connection

    async def commit(self, transaction: Transaction, commit: Coroutine[Any, Any, None]) -> None:
        """Commit a transaction, and find out whether it took effect if its connection is lost."""
        try:
            await commit
            if self._connection.is_unconfirmed:
                await self._confirm(self._connection)
        except ERRORS as error:
            if not transaction.is_committing or not is_lost(error, self._connection):
                raise
            self._connection.terminate()
            if not await self._find_out(transaction):
                raise
            log.warning("the connection was lost during a commit, which is durable: %s", text_of(error))
        else:
            self._postgres.note_committed(transaction)

    async def _find_out(self, transaction: Transaction) -> bool:
        """Return whether the commit of a lost connection is durable; opens a new connection.

        A synchronous commit follows, so that the answer is still true after a failover.
        """
        deadline = time.monotonic() + RESOLVE_FOR
        while True:
            try:
                connection = await self._opening.connect()
                try:
                    await _end_session(connection, transaction.connection.pid)
                    found = await self._postgres.look_again(connection, transaction)
                    if found:
                        await self._confirm(connection)
                except BaseException:
                    connection.terminate()
                    raise
            except ERRORS:
                if time.monotonic() > deadline or self.broken is not None:
                    return False
                await asyncio.sleep(0.2)
                continue
            except StorageError as error:  # another daemon has taken the database
                raise UnknownCommitError(error.message) from error
            self._connection = connection
            if found is None:
                raise UnknownCommitError("the connection to PostgreSQL was lost during a commit")
            return found

    async def _confirm(self, connection: Connection) -> None:
        """Commit synchronously: everything before it is then as durable as the server's settings require."""
        connection.is_unconfirmed = False
        await connection.fetch(CONFIRM_SQL, self._sync)
        if connection.is_unconfirmed:
            raise TimeoutError("a commit did not reach its standbys")

    async def _roll_back(self) -> None:
        await self._connection.roll_back()

    async def _judge(self, error: Exception) -> Remedy:
        code = code_of(error)
        if code in RACES:
            commits, count = self._again
            count = count + 1 if commits == self.commits else 1
            self._again = self.commits, count
            if count <= MOST_AGAIN:
                failure = await self._make_partitions() if code == NO_PARTITION else None
                if failure is None:
                    return Remedy.AGAIN
                error = failure
        if not isinstance(error, UnknownCommitError) and not is_transient(error):
            return Remedy.ONE_BY_ONE
        if is_lost(error, self._connection):
            self._connection.terminate()
            if self.failure is None:  # a call must not leave the writer without a connection
                self._set_failure(text_of(error))
        return Remedy.STOP

    async def _make_partitions(self) -> Exception | None:
        """Make the missing partitions; returns the error if that failed."""
        try:
            await self._opening.make_partitions(self._connection)
        except ERRORS as error:
            log.warning("cannot create the partition of today: %s", text_of(error))
            return error
        return None

    async def _probe(self) -> str | None:
        try:
            if self._connection.is_closed:
                self._connection = await self._opening.connect()
            await self._confirm(self._connection)
            await self._opening.refresh(self._connection)
        except (*ERRORS, StorageError) as error:
            await self._connection.roll_back()
            if code_of(error) == READ_ONLY:  # after a failover, another host of the URL accepts writes
                self._connection.terminate()
            return text_of(error)
        return None


async def _end_session(connection: Connection, pid: int) -> None:
    """End the session of a lost connection: the server may not know yet that its client is gone."""
    deadline = time.monotonic() + RESOLVE_FOR / 3
    while pid and time.monotonic() < deadline:
        if not await connection.fetch(END_SESSION_SQL, pid):
            return
        await asyncio.sleep(0.1)
