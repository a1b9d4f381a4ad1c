"""The store in one SQLite file."""

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from relay.base.clock import Clock
from relay.config.effective import Digests
from relay.errors import StorageError, StorageUnavailableError
from relay.model import (
    WorkerStatus,
)
from relay.store import Listener, Resolve, Route, Rules
from relay.store.batch import Sequences
from relay.store.claims import Claims
from relay.store.ledger import counts_of
from relay.store.nodes import OneNode
from relay.store.queries import PagedQueries
from relay.store.sqlite.audit import SqliteAudit
from relay.store.sqlite.commit import SqliteCommitter
from relay.store.sqlite.compact import empty_log
from relay.store.sqlite.connection import (
    check_companions,
    check_library,
    damaged,
    has_wal_reset_bug,
    migrate,
    open_reader,
    open_writer,
    quick_check,
    unreadable,
)
from relay.store.sqlite.database import Database
from relay.store.sqlite.deliveries import SqliteDeliveries
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.events import SqliteEvents
from relay.store.sqlite.file_watch import FileWatch
from relay.store.sqlite.files import Files
from relay.store.sqlite.ledger import TOTALS_SQL, SqliteLedger
from relay.store.sqlite.logins import SqliteLogins
from relay.store.sqlite.losses import check_after_open, check_before_open
from relay.store.sqlite.mark import HIGHEST_SQL, mark_in
from relay.store.sqlite.queries import SqliteReader
from relay.store.sqlite.refused import SqliteRefused
from relay.store.sqlite.transitions import AHEAD_SQL
from relay.store.sqlite.upkeep import SqliteUpkeep
from relay.store.sqlite.wal import log_of
from relay.store.sqlite.workers import load_roster
from relay.store.sqlite.writer import TRANSIENT, SqliteWriter
from relay.store.transitions import AHEAD, report_ahead
from relay.store.workers import StoredWorkers

log = logging.getLogger("relay.store")


class SqliteStore:
    """`relay.store.Store` in one SQLite file; `relay.store.opening.make_store` describes the arguments."""

    def __init__(
        self,
        path: Path,
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
        disk: Disk,
        node: str,
        digests: Callable[[], Digests],
    ) -> None:
        self.path = path
        self.location = str(path)
        self.files = {"main": path, "wal": log_of(path)}
        self.disk = disk
        self._clock = clock
        self._rules = rules
        self._observers = observe_seconds, observe_requests
        self._on_fatal = on_fatal
        self._full = full
        self.database = Database(path)
        self.claims = Claims()
        self.workers = StoredWorkers(self.database, clock, rules)
        self.deliveries = SqliteDeliveries(self.database, self.claims, clock)
        self.queries = PagedQueries(SqliteReader(self.database))
        self.ledger = SqliteLedger(self.database)
        self.refused = SqliteRefused(self.database)
        self.logins = SqliteLogins(self.database)
        self.audit = SqliteAudit(self.database)
        self.upkeep = SqliteUpkeep(self.database, clock, self.disk)
        self.nodes = OneNode(clock, node, digests)
        self.events = SqliteEvents(
            self.database, deliveries=self.deliveries, queries=self.queries, workers=self.workers
        )
        self._committer = SqliteCommitter(
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
        self._watched = Files(path)
        self._losses: list[str] | None = None  # found before the files were opened; None: not checked yet
        self.opened = False
        self._is_checked = False  # whether the file was checked for damage, or its last stop was clean
        self.failure: str | None = None  # see `Store.failure`; of the latest `open`, then of the writer

    @property
    def unsaved(self) -> bool:
        """See `Store.unsaved`."""
        return self.database.writer.broken is not None and not self._file_watch.saved

    @property
    def stopped_at(self) -> int:
        """See `Store.stopped_at`: when the files were last written."""
        return max(map(_written_at, self.files.values()))

    def explain(self, error: Exception) -> StorageError | None:
        """See `Store.explain`."""
        return unreadable(self.path, error) if isinstance(error, sqlite3.Error) else None

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
        check_library()
        if has_wal_reset_bug() and self._losses is None:
            log.info("this SQLite has the WAL-reset bug: no other program may write to %s", self.path.name)
        self._loop = asyncio.get_running_loop()
        try:
            check_companions(self.path)
            if self._losses is None:
                self._losses = await asyncio.to_thread(check_before_open, self.path, self._clock.wall())
            await asyncio.to_thread(self.disk.prepare)
            try:
                await self._open()
            except sqlite3.Error as error:
                if _code(error) != sqlite3.SQLITE_FULL or not self.disk.release_reserve():
                    raise
                await self._open()
        except sqlite3.Error as error:
            if _code(error) not in TRANSIENT:
                raise damaged(self.path, str(error)) from error
            self._set_closed(str(error), _hint(error))
            raise StorageUnavailableError(str(error), hint=_hint(error)) from error
        except StorageUnavailableError as error:
            self._set_closed(error.message, error.hint)
            raise

    def _set_failure(self, why: str | None) -> None:
        self.failure = why

    def _set_closed(self, why: str, hint: str) -> None:
        self.failure = why
        self.database.set_closed(why, hint)

    async def _open(self) -> None:
        self.database.connection = await open_writer(self.path, full=self._full)
        try:
            await migrate(self.database.connection, self.path)
            if not self._is_checked and await self._meta("stopped") != "cleanly":
                await quick_check(self.database.connection, self.path)
            self._is_checked = True  # so that on a full disk, not every attempt reads the whole file
            await self._set_meta("stopped", "not yet")
            moments = {"now": self._clock.steady(), "ahead": self._clock.wall() + AHEAD}
            report_ahead((await self.database.connection.execute(AHEAD_SQL, moments)).rowcount)
            roster = await load_roster(self.database.connection)
            [highest] = map(mark_in, await self.database.connection.execute_fetchall(HIGHEST_SQL))
            with suppress(sqlite3.Error):  # the disk is full
                # Otherwise SQLite writes over the frames that it dropped, and the rest looks like a new loss.
                await empty_log(self.database.connection)
            self._committer.sequences = Sequences(highest.events, highest.deliveries)
            rows = await self.database.connection.execute_fetchall(TOTALS_SQL)
            totals = counts_of(rows)
            self.ledger.pending_counts = Counter({name: each.pending for name, each in totals.items()})
            self.database.reader = await open_reader(self.path, self._note_error)
            try:
                # Every 15 s, a large backlog is counted, which takes a while: no list must wait for that.
                self.database.counter = await open_reader(self.path, self._note_error)
                try:
                    self._watched.open()
                except OSError as error:
                    await self.database.counter.close()
                    raise StorageUnavailableError(f"{self.path}: {error.strerror}") from error
            except BaseException:
                await self.database.reader.close()
                raise
        except BaseException:
            await self.database.connection.close()
            raise
        check_after_open(self.path, self._clock.wall(), highest, self._losses or [])
        roster.take_over(self.workers.roster, self._rules)
        self.workers.roster = roster
        self.database.writer = SqliteWriter(
            self.database.connection,
            self._committer,
            on_fatal=self._on_fatal,
            on_failure=self._set_failure,
            observers=self._observers,
            disk=self.disk,
        )
        self.database.writer.start()
        self._file_watch = FileWatch(
            self.path,
            writer=self.database.writer,
            reader=self.database.counter,
            files=self._watched,
            disk=self.disk,
            clock=self._clock,
        )
        self._file_watch.start()
        self.opened, self.failure = True, None

    async def close(self) -> None:
        """See `Store.close`."""
        if not self.opened:
            return
        self.deliveries.release(tuple(self.claims.cancelled))  # their attempts were cut off
        try:
            if self.database.writer.failure is None:
                with suppress(StorageError):  # heartbeats only; the next ones report the same
                    await self.workers.flush()
            await self.database.writer.stop()
            await self._file_watch.stop()
            if self.database.writer.failure is None:
                with suppress(sqlite3.Error):  # then the next start checks the whole file
                    await self._set_meta("stopped", "cleanly")
        finally:
            self.opened = False
            self.disk.close()
            await self.database.counter.close()
            await self.database.reader.close()
            await self.database.connection.close()
            self._watched.close()

    def _note_error(self, error: Exception) -> None:
        """Pass an error of a reader, which runs in a separate thread, on to the writer."""
        self._loop.call_soon_threadsafe(lambda: self.opened and self.database.writer.note_error(error))

    async def _meta(self, name: str) -> str | None:
        rows = await self.database.connection.execute_fetchall(
            "SELECT value FROM meta WHERE name = ?", (name,)
        )
        return next((value for (value,) in rows), None)

    async def _set_meta(self, name: str, value: str) -> None:
        await self.database.connection.execute("REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary code of an error; 0 for other errors."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _hint(error: sqlite3.Error) -> str:
    hints = {
        sqlite3.SQLITE_FULL: "free disk space; the relay then continues automatically",
        sqlite3.SQLITE_BUSY: "find the program that keeps the file open: fuser -v relay.db",
        sqlite3.SQLITE_CANTOPEN: "chown relay.db, relay.db-wal and relay.db-shm to the user of the relay",
        sqlite3.SQLITE_READONLY: "chown relay.db, relay.db-wal and relay.db-shm to the user of the relay",
    }
    return hints.get(_code(error), "check the disk; the relay continues automatically once the disk works")


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns // 1000
    except OSError:  # there is no file yet, or `open` reports the error
        return 0
