"""The store in one SQLite file."""

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Never, cast

import aiosqlite

from relay.base.clock import Clock
from relay.config.schema import WorkerRules
from relay.errors import StorageError, StorageUnavailableError
from relay.model import (
    Born,
    Claim,
    DestinationState,
    News,
    Outcome,
    Receipt,
    StoredEvent,
)
from relay.store import OPERATOR_EVENTS, Acceptance, Listener, Route, Rules
from relay.store.backlog import backlog
from relay.store.backup import BackingUp
from relay.store.balance import COUNTS_SQL, balance
from relay.store.batch import Batch, Sequences
from relay.store.care import Caretaker
from relay.store.claim import claim
from relay.store.commit import sums, write
from relay.store.compact import Compacting, empty_log
from relay.store.connection import (
    check_companions,
    check_library,
    damaged,
    migrate,
    open_reader,
    open_writer,
    quick_check,
)
from relay.store.counts import Backlog, Counts
from relay.store.dedupe import Key, Keys, identity
from relay.store.disk import Disk
from relay.store.doctor import Examining
from relay.store.dump import Exporting, Importing
from relay.store.expunge import Expunging
from relay.store.files import Files
from relay.store.held import Holding
from relay.store.holds import Holds
from relay.store.losses import look_after, look_before
from relay.store.mark import HIGHEST_SQL, mark_in
from relay.store.measure import Measuring
from relay.store.prune import Pruning
from relay.store.queries.lists import Listing
from relay.store.stats import Tallying
from relay.store.transaction import Transaction
from relay.store.watching import Watching
from relay.store.workers import Roster, load_roster
from relay.store.writer import TRANSIENT, Job, Writer

log = logging.getLogger("relay.store")


def _nowhere(_event: StoredEvent) -> tuple[()]:
    return ()


def _by_default(_source: str, _worker: str) -> WorkerRules:
    return WorkerRules()


def _deaf(_news: News) -> None:
    return


class _Unopened:
    """Stands for connections and writer of a store that could not be opened yet: asking it says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, _name: str) -> Never:
        raise StorageUnavailableError(f"the store cannot be opened: {self._why}")


class SqliteStore(
    BackingUp,
    Compacting,
    Examining,
    Exporting,
    Expunging,
    Holding,
    Importing,
    Listing,
    Measuring,
    Pruning,
    Tallying,
    Watching,
):
    """See `relay.store.Store` for what each verb promises."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        full: bool = True,
        on_fatal: Callable[[str], None] = lambda _why: None,
        disk: Disk | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.disk = disk or Disk(path)
        self.route: Route = _nowhere
        self.rules: Rules = _by_default
        self.listener: Listener = _deaf
        self.on_commit: Callable[[float, int], None] = lambda _seconds, _jobs: None
        self._clock = clock
        self._full = full
        self._on_fatal = on_fatal
        self._holds = Holds()
        self._roster = Roster(is_loaded=False)
        self._pending: Counter[str] = Counter()  # by destination
        self._files = Files(path)
        self._before: list[str] | None = None  # what was seen of the files before they were opened
        self.opened = False
        self._sound = False  # whether the file has been looked at after an unclean stop
        self._unopened: str | None = None  # why the latest try to open it failed
        self._be_closed("it is not open yet")
        self._unopened = None

    @property
    def failure(self) -> str | None:
        """See `Store.failure`."""
        return self._writer.failure if self.opened else self._unopened

    @property
    def unsaved(self) -> bool:
        """Whether the files were taken away or damaged, and no copy could be made of what was committed."""
        return self._writer.broken is not None and not self._caretaker.saved

    @property
    def commits(self) -> int:
        """How many transactions of requests and outcomes have been committed since `open`."""
        return self._writer.commits

    @property
    def busy(self) -> float:
        """Seconds that the writer has spent on the step under way; 0 while it waits for work."""
        return self._writer.busy if self.opened else 0.0

    async def open(self) -> None:
        """See `Store.open`."""
        check_library()
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
        closed = _Unopened(why)
        self._connection = self._reader = self._counter = cast("aiosqlite.Connection", closed)
        self._writer = cast("Writer", closed)

    async def _open(self) -> None:
        self._connection = await open_writer(self.path, full=self._full)
        try:
            await migrate(self._connection, self.path)
            if not self._sound and await self._meta("stopped") != "cleanly":
                await quick_check(self._connection, self.path)
            self._sound = True  # a disk that is full does not have the whole file read at each try
            await self._set_meta("stopped", "not yet")
            roster = await load_roster(self._connection)
            [highest] = map(mark_in, await self._connection.execute_fetchall(HIGHEST_SQL))
            with suppress(sqlite3.Error):  # the disk is full
                # SQLite would write on in the middle of what it dropped, and the rest look like a loss again.
                await empty_log(self._connection)
            self._sequences = Sequences(highest.events, highest.deliveries)
            self._pending = Counter(
                {
                    row[0]: row[1]
                    for row in await self._connection.execute_fetchall(
                        "SELECT destination, created - delivered - dead - expired - cancelled FROM ledger"
                    )
                }
            )
            self._reader = await open_reader(self.path, self._heed)
            try:
                # Counting a large backlog takes its time, every quarter of a minute: no list waits for it.
                self._counter = await open_reader(self.path, self._heed)
                try:
                    self._files.open()
                except OSError as error:
                    await self._counter.close()
                    raise StorageUnavailableError(f"{self.path}: {error.strerror}") from error
            except BaseException:
                await self._reader.close()
                raise
        except BaseException:
            await self._connection.close()
            raise
        look_after(self.path, self._clock.wall(), highest, self._before or [])
        roster.take_over(self._roster, self.rules)
        self._roster = roster
        self._writer = Writer(self._connection, self, self._on_fatal, self.on_commit, self.disk)
        self._writer.start()
        self._caretaker = Caretaker(
            self.path,
            writer=self._writer,
            reader=self._counter,
            files=self._files,
            disk=self.disk,
            clock=self._clock,
        )
        self._caretaker.start()
        self.opened = True

    async def close(self) -> None:
        """See `Store.close`."""
        if not self.opened:
            return
        self.release(tuple(self._holds.unwanted))  # their attempts were cut off
        try:
            if self._writer.failure is None:
                with suppress(StorageError):  # heartbeats only; the next ones say the same
                    await self.flush()
            await self._writer.stop()
            await self._caretaker.stop()
            if self._writer.failure is None:
                with suppress(sqlite3.Error):  # then the next start has a look at the whole file
                    await self._set_meta("stopped", "cleanly")
        finally:
            self.opened = False
            self.disk.close()
            await self._counter.close()
            await self._reader.close()
            await self._connection.close()
            self._files.close()

    # --- the writer's side ---

    async def begin(self, transaction: Transaction, jobs: Iterable[Job[Any]]) -> Batch:
        """See `Gatherer.begin`: look the batch's keys up and start gathering."""
        keys = Keys()
        if asked := [job.key for job in jobs if job.key is not None]:
            await keys.look_up(transaction, asked, self._clock.steady())
        return Batch(
            clock=self._clock,
            sequences=self._sequences,
            route=self.route,
            roster=self._roster,
            rules=self.rules,
            keys=keys,
            pending=self._pending,
        )

    async def write(self, transaction: Transaction, batch: Batch) -> None:
        """See `Gatherer.write`."""
        await write(batch, transaction, self._holds)

    def forget(self) -> None:
        """See `Gatherer.forget`."""
        self._holds.spare()
        self._roster.moving.clear()
        self._roster.heeded.clear()  # their rows have it, as nothing replaced them

    def publish(self, batch: Batch) -> None:
        """See `Gatherer.publish`: in one step of the loop, so that no claim can come between."""
        turned = batch.fleet.publish()
        self._holds.release(outcome.delivery.id for outcome in batch.outcomes)
        self._holds.release(batch.ended)
        self._cancel_again(self._holds.unwant(batch.unwanted))
        self._holds.spare()
        self._holds.add(batch.due)
        books = sums(batch)
        for destination, columns in books.items():
            self._pending[destination] += 2 * columns["created"] - sum(columns.values())
        outcomes = [outcome for outcome in batch.outcomes if outcome.delivery.id in batch.settled]
        hurried = frozenset(batch.hurried.values())
        if books or batch.events or batch.woken or outcomes or hurried or turned:
            due, ended = batch.due, batch.ended
            try:
                self.listener(News(batch.events, due, batch.woken, ended, books, outcomes, hurried, turned))
            except Exception:  # it is durable all the same, and its senders must hear so
                log.exception("what was committed could not be handed on; lanes will find it in the store")

    # --- verbs ---

    async def append(self, acceptance: Acceptance) -> Receipt:
        """See `Store.append`."""
        if (receipt := self._beat(acceptance)) is not None:
            return receipt
        event, key = acceptance.event, None
        if event is not None and acceptance.key:
            request = identity(event, acceptance.path)
            key = Key(acceptance.source, acceptance.key, request, event.sha256)
        job = Job(
            lambda batch: batch.accept(acceptance, key),
            size=len(event.body) if event is not None else 0,
            key=key,
        )
        if acceptance.change is not None:
            return await self._change(acceptance.source, acceptance.change, job)
        return await self._writer.submit(job, bounded=True)

    async def settle(self, outcome: Outcome) -> bool:
        """See `Store.settle`."""

        def apply(batch: Batch) -> bool:
            batch.outcomes.append(outcome)
            return True

        job = Job(apply, answer=lambda batch, _: outcome.delivery.id in batch.settled)
        return await self._writer.submit(job)

    async def expire(self) -> int:
        """See `Store.expire`."""

        def apply_(batch: Batch) -> int:
            batch.expiring = True
            batch.fleet.expire_commands()
            return 0

        return await self._writer.submit(Job(apply_, answer=lambda batch, _: len(batch.ended)))

    async def claim(self, destination: str, limit: int, *, retries: bool) -> Claim:
        """See `Store.claim`."""

        async def ask(connection: aiosqlite.Connection) -> Claim:
            now = self._clock.steady()
            return await claim(connection, self._holds, destination, limit, retries=retries, now=now)

        return await self._writer.errand(ask)

    def begin_attempt(self, delivery_id: int) -> bool:
        """See `Store.begin_attempt`."""
        return self._holds.begin(delivery_id)

    def release(self, delivery_ids: Iterable[int]) -> None:
        """See `Store.release`."""
        self._cancel_again(self._holds.release(delivery_ids))

    async def set_destination(self, state: DestinationState, tell: Born | None = None) -> None:
        """See `Store.set_destination`."""

        def apply_(batch: Batch) -> None:
            batch.states.append(state)
            if tell is not None:
                batch.bear(OPERATOR_EVENTS, tell)

        await self._writer.submit(Job(apply_))

    async def paused_sources(self) -> frozenset[str]:
        """See `Store.paused_sources`."""
        rows = await self._reader.execute_fetchall("SELECT name FROM sources WHERE paused")
        return frozenset(row[0] for row in rows)

    async def pause_source(self, name: str, *, paused: bool) -> None:
        """See `Store.pause_source`."""
        await self._writer.submit(Job(lambda batch: batch.pauses.append((name, paused))))

    async def backlog(self, now: int) -> dict[str, Backlog]:
        """See `Store.backlog`."""
        return await backlog(self._counter, now)

    async def counts(self) -> dict[str, Counts]:
        """See `Store.counts`."""
        return balance(await self._counter.execute_fetchall(COUNTS_SQL))

    def owed(self) -> dict[str, int]:
        """See `Store.owed`; kept in step with the ledger."""
        return {name: pending for name, pending in self._pending.items() if pending}

    def _heed(self, error: Exception) -> None:
        """Have the writer hear of what a reader met, in its thread."""
        self._loop.call_soon_threadsafe(lambda: self.opened and self._writer.heed(error))

    async def _meta(self, name: str) -> str | None:
        rows = await self._connection.execute_fetchall("SELECT value FROM meta WHERE name = ?", (name,))
        return next((row[0] for row in rows), None)

    async def _set_meta(self, name: str, value: str) -> None:
        await self._connection.execute("REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))


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
