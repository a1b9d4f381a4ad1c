"""The writer of an SQLite file: the errors that stop it, and its work on a full disk."""

import logging
import sqlite3
from collections.abc import Callable
from functools import partial

from relay.store.sqlite.disk import Disk
from relay.store.sqlite.transaction import Transaction, WriterConnection
from relay.store.writer import Committer, Remedy, Writer

log = logging.getLogger("relay.store")

PROBE_SIZE = 64 * 2**10
"""Bytes written by an attempt while writes fail: about the size of a few outcomes with their responses."""

PROBE_SQL = "REPLACE INTO meta (name, value) VALUES ('probe', hex(zeroblob(? / 2)))"

TRANSIENT = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
             sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}  # fmt: skip

DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class SqliteWriter(Writer[WriterConnection]):
    """The only writer of a file."""

    def __init__(
        self,
        connection: WriterConnection,
        committer: Committer,
        *,
        disk: Disk,
        on_fatal: Callable[[str], None],
        on_failure: Callable[[str | None], None],
        observers: tuple[Callable[[float], None], Callable[[float], None]],
    ) -> None:
        super().__init__(
            connection,
            committer,
            transaction=partial(Transaction, connection),
            space=disk,
            on_fatal=on_fatal,
            on_failure=on_failure,
            observers=observers,
        )
        self._disk = disk

    async def _roll_back(self) -> None:
        if self._connection.in_transaction:
            await self._connection.execute("ROLLBACK")

    async def _judge(self, error: Exception) -> Remedy:
        code = self._code(error)
        if self._release_reserve(code):
            return Remedy.WITHOUT_SENDERS
        if code & 0xFF in TRANSIENT or self.note_error(error):
            return Remedy.STOP
        return Remedy.ONE_BY_ONE

    def _code(self, error: Exception) -> int:
        """Return SQLite's code of an error, 0 for other errors; stops the daemon if fsync failed."""
        code: int = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_IOERR_FSYNC:
            # The kernel may have dropped the pages: the database may differ from what SQLite read before.
            self._on_fatal(f"fsync failed: {error}")
        return code

    def note_error(self, error: Exception) -> bool:
        """Halt the writer if an error shows that the database is damaged; returns whether it does."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in DAMAGED:
            return False
        if self.broken is None:
            log.critical("the database is damaged, senders are refused with 503: %s", error)
            self.halt(f"the database is damaged: {error}")
        return True

    def _release_reserve(self, code: int) -> bool:
        """Delete the reserve file if the disk is full; False: the disk is not full, or the file is gone."""
        if code & 0xFF not in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
            return False
        if not self._disk.release_reserve():
            return False
        log.error("the disk is full: senders are refused, deliveries and retention use the reserve")
        return True

    async def _tidy(self) -> None:
        """Near the disk's floor, move the log into the file, so that the free space is exact."""
        if self.failure is not None:
            return
        await self._restart_log()
        self._disk.measure(self._bytes)

    async def _probe(self) -> str | None:
        try:
            await self._restart_log()
            await self._connection.execute("BEGIN IMMEDIATE")
            await self._connection.execute(PROBE_SQL, (PROBE_SIZE,))
            await self._connection.execute(PROBE_SQL, (0,))
            await self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            code = self._code(error)
            await self._roll_back()
            self._release_reserve(code)
            return f"{error}"
        return None

    async def _restart_log(self) -> None:
        """Move the log into the file, so that the log starts again from its beginning."""
        try:
            await self._connection.execute_fetchall("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            self._release_reserve(self._code(error))
