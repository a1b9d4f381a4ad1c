"""The store in one SQLite file."""

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from relay.base.clock import Clock
from relay.errors import StorageError, StorageUnavailableError
from relay.model import (
    News,
    WorkerStatus,
)
from relay.store import Listener, Route, Rules
from relay.store.batch import Batch, Sequences
from relay.store.care import Caretaker
from relay.store.claims import Claims
from relay.store.commit import sums, write
from relay.store.compact import empty_log
from relay.store.connection import (
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
from relay.store.database import Database
from relay.store.dedupe import Keys
from relay.store.deliveries import SqliteDeliveries
from relay.store.disk import Disk
from relay.store.events import SqliteEvents
from relay.store.files import Files
from relay.store.ledger import SqliteLedger
from relay.store.losses import look_after, look_before
from relay.store.mark import HIGHEST_SQL, mark_in
from relay.store.queries import SqliteQueries
from relay.store.roster import load_roster
from relay.store.transaction import Transaction
from relay.store.upkeep import SqliteUpkeep
from relay.store.wal import log_of
from relay.store.workers import SqliteWorkers
from relay.store.writer import TRANSIENT, Job, Writer

log = logging.getLogger("relay.store")


class SqliteStore:
    """`relay.store.Store` in one SQLite file; `relay.store.opening.make_store` describes the arguments."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        route: Route,
        rules: Rules,
        listeners: Sequence[Listener],
        on_status_change: Callable[[str, WorkerStatus], None],
        on_commit: Callable[[float, int], None],
        on_fatal: Callable[[str], None],
        full: bool,
        disk: Disk,
    ) -> None:
        self.path = path
        self.location = str(path)
        self.files = {"main": path, "wal": log_of(path)}
        self.disk = disk
        self._clock = clock
        self._route = route
        self._rules = rules
        self._listeners = listeners
        self._on_status_change = on_status_change
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._full = full
        self.database = Database(path)
        self.claims = Claims()
        self.workers = SqliteWorkers(self.database, clock, rules)
        self.deliveries = SqliteDeliveries(self.database, self.claims, clock)
        self.queries = SqliteQueries(self.database)
        self.ledger = SqliteLedger(self.database)
        self.upkeep = SqliteUpkeep(self.database, clock, self.disk)
        self.events = SqliteEvents(
            self.database, deliveries=self.deliveries, queries=self.queries, workers=self.workers
        )
        self._watched = Files(path)
        self._before: list[str] | None = None  # what was seen of the files before they were opened
        self.opened = False
        self._sound = False  # whether the file has been looked at after an unclean stop
        self._unopened: str | None = None  # why the latest try to open it failed

    @property
    def failure(self) -> str | None:
        """See `Store.failure`."""
        return self.database.writer.failure if self.opened else self._unopened

    @property
    def unsaved(self) -> bool:
        """Whether the files were taken away or damaged, and no copy could be made of what was committed."""
        return self.database.writer.broken is not None and not self._caretaker.saved

    def explain(self, error: Exception) -> StorageError | None:
        """See `Store.explain`."""
        return unreadable(self.path, error) if isinstance(error, sqlite3.Error) else None

    @property
    def commits(self) -> int:
        """How many transactions of requests and outcomes have been committed since `open`."""
        return self.database.writer.commits

    @property
    def busy(self) -> float:
        """Seconds that the writer has spent on the step under way; 0 while it waits for work."""
        return self.database.writer.busy if self.opened else 0.0

    async def open(self) -> None:
        """See `Store.open`."""
        check_library()
        if has_wal_reset_bug() and self._before is None:
            log.info("the linked SQLite has the WAL-reset bug: no other program may write %s", self.path.name)
        self._loop = asyncio.get_running_loop()
        try:
            check_companions(self.path)
            if self._before is None:
                self._before = await asyncio.to_thread(look_before, self.path, self._clock.wall())
            await asyncio.to_thread(self.disk.prepare)
            try:
                await self._open()
            except sqlite3.Error as error:
                if _code(error) != sqlite3.SQLITE_FULL or not self.disk.throw_off():
                    raise
                await self._open()
        except sqlite3.Error as error:
            if _code(error) not in TRANSIENT:
                raise damaged(self.path, str(error)) from error
            self._be_closed(str(error))
            raise StorageUnavailableError(str(error), hint=_hint(error)) from error
        except StorageUnavailableError as error:
            self._be_closed(error.message)
            raise

    def _be_closed(self, why: str) -> None:
        self._unopened = why
        self.database.be_closed(why)

    async def _open(self) -> None:
        self.database.connection = await open_writer(self.path, full=self._full)
        try:
            await migrate(self.database.connection, self.path)
            if not self._sound and await self._meta("stopped") != "cleanly":
                await quick_check(self.database.connection, self.path)
            self._sound = True  # a disk that is full does not have the whole file read at each try
            await self._set_meta("stopped", "not yet")
            roster = await load_roster(self.database.connection)
            [highest] = map(mark_in, await self.database.connection.execute_fetchall(HIGHEST_SQL))
            with suppress(sqlite3.Error):  # the disk is full
                # SQLite would write on in the middle of what it dropped, and the rest look like a loss again.
                await empty_log(self.database.connection)
            self._sequences = Sequences(highest.events, highest.deliveries)
            self.ledger.pending_counts = Counter(
                {
                    row[0]: row[1]
                    for row in await self.database.connection.execute_fetchall(
                        "SELECT destination, created - delivered - dead - expired - cancelled FROM ledger"
                    )
                }
            )
            self.database.reader = await open_reader(self.path, self._heed)
            try:
                # Counting a large backlog takes its time, every quarter of a minute: no list waits for it.
                self.database.counter = await open_reader(self.path, self._heed)
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
        look_after(self.path, self._clock.wall(), highest, self._before or [])
        roster.take_over(self.workers.roster, self._rules)
        self.workers.roster = roster
        self.database.writer = Writer(
            self.database.connection, self, self._on_fatal, self._on_commit, self.disk
        )
        self.database.writer.start()
        self._caretaker = Caretaker(
            self.path,
            writer=self.database.writer,
            reader=self.database.counter,
            files=self._watched,
            disk=self.disk,
            clock=self._clock,
        )
        self._caretaker.start()
        self.opened = True

    async def close(self) -> None:
        """See `Store.close`."""
        if not self.opened:
            return
        self.deliveries.release(tuple(self.claims.cancelled))  # their attempts were cut off
        try:
            if self.database.writer.failure is None:
                with suppress(StorageError):  # heartbeats only; the next ones say the same
                    await self.workers.flush()
            await self.database.writer.stop()
            await self._caretaker.stop()
            if self.database.writer.failure is None:
                with suppress(sqlite3.Error):  # then the next start has a look at the whole file
                    await self._set_meta("stopped", "cleanly")
        finally:
            self.opened = False
            self.disk.close()
            await self.database.counter.close()
            await self.database.reader.close()
            await self.database.connection.close()
            self._watched.close()

    # --- the writer's side ---

    async def begin(self, transaction: Transaction, jobs: Iterable[Job[Any]]) -> Batch:
        """See `Gatherer.begin`: look the batch's keys up and start gathering."""
        keys = Keys()
        if asked := [job.key for job in jobs if job.key is not None]:
            await keys.look_up(transaction, asked, self._clock.steady())
        return Batch(
            clock=self._clock,
            sequences=self._sequences,
            route=self._route,
            roster=self.workers.roster,
            rules=self._rules,
            keys=keys,
            pending=self.ledger.pending_counts,
        )

    async def write(self, transaction: Transaction, batch: Batch) -> None:
        """See `Gatherer.write`."""
        await write(batch, transaction, self.claims)

    def forget(self) -> None:
        """See `Gatherer.forget`."""
        self.claims.clear_ending()
        self.workers.roster.moving.clear()
        self.workers.roster.heeded.clear()  # their rows have it, as nothing replaced them

    def publish(self, batch: Batch) -> None:
        """See `Gatherer.publish`: in one step of the loop, so that no claim can come between."""
        turned = batch.fleet.publish()
        self.claims.release(outcome.delivery.id for outcome in batch.outcomes)
        self.claims.release(batch.ended)
        self.deliveries.cancel_later(self.claims.cancel(batch.unwanted))
        self.claims.clear_ending()
        self.claims.add(batch.due)
        books = sums(batch)
        for destination, columns in books.items():
            self.ledger.pending_counts[destination] += 2 * columns["created"] - sum(columns.values())
        outcomes = [outcome for outcome in batch.outcomes if outcome.delivery.id in batch.settled]
        hurried = frozenset(batch.hurried.values())
        for source, status in turned:
            self._on_status_change(source, status)
        if books or batch.events or batch.woken or outcomes or hurried:
            news = News(batch.events, batch.due, batch.woken, batch.ended, books, outcomes, hurried)
            for listen in self._listeners:
                try:
                    listen(news)
                except Exception:  # the commit is durable, and its senders must get their replies
                    log.exception("a listener failed after a commit; lanes find the deliveries in the store")

    def _heed(self, error: Exception) -> None:
        """Have the writer hear of what a reader met, in its thread."""
        self._loop.call_soon_threadsafe(lambda: self.opened and self.database.writer.heed(error))

    async def _meta(self, name: str) -> str | None:
        rows = await self.database.connection.execute_fetchall(
            "SELECT value FROM meta WHERE name = ?", (name,)
        )
        return next((row[0] for row in rows), None)

    async def _set_meta(self, name: str, value: str) -> None:
        await self.database.connection.execute("REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary code of an error, 0 where it is none of its."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _hint(error: sqlite3.Error) -> str:
    hints = {
        sqlite3.SQLITE_FULL: "make room on the disk; the relay goes on by itself",
        sqlite3.SQLITE_BUSY: "find the program that keeps the file open: fuser -v relay.db",
        sqlite3.SQLITE_CANTOPEN: "chown relay.db, relay.db-wal and relay.db-shm to the user of the relay",
        sqlite3.SQLITE_READONLY: "chown relay.db, relay.db-wal and relay.db-shm to the user of the relay",
    }
    return hints.get(_code(error), "see the disk's health; the relay goes on by itself")
