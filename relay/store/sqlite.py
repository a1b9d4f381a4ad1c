"""The store in one SQLite file."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiosqlite

from relay.clock import Clock
from relay.config.model import WorkerRules
from relay.errors import StorageError
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
from relay.store.claim import claim
from relay.store.commit import sums, write
from relay.store.compact import Compacting
from relay.store.connection import check_library, migrate, open_reader, open_writer, quick_check
from relay.store.counts import Backlog, Counts
from relay.store.dedupe import Key, Keys, identity
from relay.store.doctor import Examining
from relay.store.dump import Exporting, Importing
from relay.store.expunge import Expunging
from relay.store.find import Listing
from relay.store.held import Holding
from relay.store.holds import Holds
from relay.store.measure import Measuring
from relay.store.prune import Pruning
from relay.store.stats import Tallying
from relay.store.transaction import Transaction
from relay.store.watching import Watching
from relay.store.workers import Roster, load_roster
from relay.store.writer import Job, Writer

log = logging.getLogger("relay.store")


def _nowhere(_event: StoredEvent) -> tuple[()]:
    return ()


def _by_default(_source: str, _worker: str) -> WorkerRules:
    return WorkerRules()


def _deaf(_news: News) -> None:
    return


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
    ) -> None:
        super().__init__()
        self.path = path
        self.route: Route = _nowhere
        self.rules: Rules = _by_default
        self.listener: Listener = _deaf
        self.on_commit: Callable[[float, int], None] = lambda _seconds, _jobs: None
        self._clock = clock
        self._full = full
        self._on_fatal = on_fatal
        self._holds = Holds()
        self._roster = Roster()
        self._opened = False

    @property
    def failure(self) -> str | None:
        """Why writes fail at the moment; None while they work."""
        return self._writer.failure

    @property
    def commits(self) -> int:
        """How many transactions of requests and outcomes have been committed since `open`."""
        return self._writer.commits

    @property
    def busy(self) -> float:
        """Seconds that the writer has spent on the step under way; 0 while it waits for work."""
        return self._writer.busy

    async def open(self) -> None:
        """See `Store.open`."""
        check_library()
        self._connection = await open_writer(self.path, full=self._full)
        try:
            await migrate(self._connection, self.path)
            if await self._meta("stopped") != "cleanly":
                await quick_check(self._connection, self.path)
            await self._set_meta("stopped", "not yet")
            self._roster = await load_roster(self._connection)
            ids = await self._connection.execute_fetchall(
                "SELECT coalesce((SELECT max(id) FROM events), 0), (SELECT max(id) FROM deliveries)"
            )
            [(event, delivery)] = ids
            self._sequences = Sequences(event, delivery or 0)
            self._pending = Counter(
                {
                    row[0]: row[1]
                    for row in await self._connection.execute_fetchall(
                        "SELECT destination, created - delivered - dead - expired - cancelled FROM ledger"
                    )
                }
            )
            self._reader = await open_reader(self.path)
            try:
                # Counting a large backlog takes its time, every quarter of a minute: no list waits for it.
                self._counter = await open_reader(self.path)
            except BaseException:
                await self._reader.close()
                raise
        except BaseException:
            await self._connection.close()
            raise
        self._writer = Writer(self._connection, self, self._on_fatal, self.on_commit)
        self._writer.start()
        self._opened = True

    async def close(self) -> None:
        """See `Store.close`."""
        if not self._opened:
            return
        self._opened = False
        self.release(tuple(self._holds.unwanted))  # their attempts were cut off
        try:
            if self._writer.failure is None:
                with suppress(StorageError):  # heartbeats only; the next ones say the same
                    await self.flush()
            await self._writer.stop()
            if self._writer.failure is None:
                await self._set_meta("stopped", "cleanly")
        finally:
            await self._counter.close()
            await self._reader.close()
            await self._connection.close()

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
            return await self._change((acceptance.source, acceptance.change.worker_id), job)
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

    async def _meta(self, name: str) -> str | None:
        rows = await self._connection.execute_fetchall("SELECT value FROM meta WHERE name = ?", (name,))
        return next((row[0] for row in rows), None)

    async def _set_meta(self, name: str, value: str) -> None:
        await self._connection.execute("REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))
