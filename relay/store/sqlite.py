"""The store in one SQLite file."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import aiosqlite

from relay.clock import Clock
from relay.config.model import WorkerRules
from relay.errors import StorageError
from relay.model import Claim, Delivery, DestinationState, Heartbeat, Outcome, Receipt, StoredEvent, Worker
from relay.registry import Now, apply
from relay.store import Acceptance, Counts, Listener, Route
from relay.store.batch import BOOKS, Batch, Sequences
from relay.store.connection import check_library, migrate, open_reader, open_writer, quick_check
from relay.store.find import find
from relay.store.holds import Holds
from relay.store.rows import EVENT_COLUMNS, event_of, worker_of
from relay.store.statements import fetch
from relay.store.workers import Roster
from relay.store.writer import Job, Writer


def _nowhere(_event: StoredEvent) -> tuple[()]:
    return ()


def _deaf(_events: Sequence[StoredEvent], _deliveries: Sequence[Delivery]) -> None:
    return


class SqliteStore:
    """See `relay.store.Store` for what each verb promises."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        full: bool = True,
        rules: Callable[[str], WorkerRules] = lambda _source: WorkerRules(),
        on_fatal: Callable[[str], None] = lambda _why: None,
    ) -> None:
        self.path = path
        self.route: Route = _nowhere
        self.listener: Listener = _deaf
        self._clock = clock
        self._full = full
        self._rules = rules
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

    async def open(self) -> None:
        """See `Store.open`."""
        check_library()
        self._connection = await open_writer(self.path, full=self._full)
        try:
            await migrate(self._connection, self.path)
            if await self._meta("stopped") != "cleanly":
                await quick_check(self._connection, self.path)
            await self._set_meta("stopped", "not yet")
            rows = await self._connection.execute_fetchall("SELECT record FROM workers")
            self._roster = Roster(worker_of(row[0]) for row in rows)
            ids = await self._connection.execute_fetchall(
                "SELECT coalesce((SELECT max(id) FROM events), 0), (SELECT max(id) FROM deliveries)"
            )
            [(event, delivery)] = ids
            self._sequences = Sequences(event, delivery or 0)
            self._reader = await open_reader(self.path)
        except BaseException:
            await self._connection.close()
            raise
        self._writer = Writer(self._connection, self, self._on_fatal)
        self._writer.start()
        self._opened = True

    async def close(self) -> None:
        """See `Store.close`."""
        if not self._opened:
            return
        self._opened = False
        try:
            await self.flush()
            await self._writer.stop()
            if self._writer.failure is None:
                await self._set_meta("stopped", "cleanly")
        finally:
            await self._reader.close()
            await self._connection.close()

    # --- the writer's side ---

    async def begin(self, jobs: Iterable[Job[Any]]) -> Batch:
        """See `Gatherer.begin`: look the batch's keys up and start gathering."""
        keys = [job.key for job in jobs if job.key is not None]
        known: dict[tuple[str, str], str] = {}
        if keys:
            now = self._clock.steady()
            rows = await fetch(
                self._connection,
                """
                WITH asked (source, key) AS (VALUES {values})
                SELECT dedupe.source, dedupe.key, dedupe.event_id, dedupe.expires_at
                  FROM asked JOIN dedupe USING (source, key)
                """,
                keys,
            )
            known = {(source, key): first for source, key, first, expires in rows if expires > now}
        return Batch(
            clock=self._clock,
            sequences=self._sequences,
            route=self.route,
            roster=self._roster,
            rules=self._rules,
            known=known,
        )

    def publish(self, batch: Batch) -> None:
        """See `Gatherer.publish`: in one step of the loop, so that no claim can come between."""
        for worker in batch.workers.values():
            self._roster.put(worker)
        self._holds.release(outcome.delivery.id for outcome in batch.outcomes)
        self._holds.add(batch.deliveries)
        if batch.events:
            self.listener(batch.events, batch.deliveries)

    # --- verbs ---

    async def append(self, acceptance: Acceptance) -> Receipt:
        """See `Store.append`."""
        if (receipt := self._beat(acceptance)) is not None:
            return receipt
        event = acceptance.event
        key = (acceptance.source, acceptance.key) if event is not None and acceptance.key else None
        job = Job(
            lambda batch: batch.accept(acceptance),
            size=len(event.body) if event is not None else 0,
            key=key,
        )
        return await self._writer.submit(job, bounded=True)

    def _beat(self, acceptance: Acceptance) -> Receipt | None:
        """Take a heartbeat that moves only last-seen and gauges in memory; `flush` writes it."""
        change = acceptance.change
        if acceptance.event is not None or not isinstance(change, Heartbeat):
            return None
        key = (acceptance.source, change.worker_id)
        now = Now(wall=self._clock.wall(), steady=self._clock.steady())
        step = apply(self._roster.get(key), change, acceptance.source, now, self._rules(acceptance.source))
        if not step.quiet or step.worker is None:
            return None
        self._roster.put(step.worker)
        self._roster.dirty.add(key)
        return Receipt(worker=step.worker)

    async def flush(self) -> None:
        """See `Store.flush`."""
        if not self._roster.dirty:
            return
        dirty, self._roster.dirty = self._roster.dirty, set()

        def apply_(batch: Batch) -> None:
            for key in dirty:
                worker = self._roster.get(key)
                if worker is not None:
                    batch.workers.setdefault(key, worker)

        try:
            await self._writer.submit(Job(apply_))
        except StorageError:
            self._roster.dirty |= dirty
            raise

    async def settle(self, outcome: Outcome) -> bool:
        """See `Store.settle`."""

        def apply(batch: Batch) -> bool:
            batch.outcomes.append(outcome)
            return True

        job = Job(apply, answer=lambda batch, _: outcome.delivery.id in batch.settled)
        return await self._writer.submit(job)

    async def sweep(self, *, hold: bool = False) -> tuple[Worker, ...]:
        """See `Store.sweep`."""
        return await self._writer.submit(Job(lambda batch: batch.sweep(hold=hold)))

    async def claim(self, destination: str, limit: int) -> Claim:
        """See `Store.claim`."""

        async def ask(connection: aiosqlite.Connection) -> Claim:
            now = self._clock.steady()
            rows = await connection.execute_fetchall(
                """
                SELECT d.id, d.public_id, d.event_id, d.attempts, d.created_at, e.size
                  FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
                 WHERE d.destination = ? AND d.state = 'pending' AND d.next_attempt_at <= ?
                 ORDER BY d.next_attempt_at, d.id
                 LIMIT ?
                """,
                (destination, now, limit + self._holds.of(destination)),
            )
            claimed = tuple(
                Delivery(
                    id=row[0],
                    public_id=row[1],
                    event_id=row[2],
                    destination=destination,
                    attempts=row[3],
                    created_at=row[4],
                    size=row[5],
                )
                for row in rows
                if row[0] not in self._holds
            )[:limit]
            self._holds.add(claimed)
            if len(claimed) == limit:
                return Claim(claimed, now)
            later = await connection.execute_fetchall(
                """
                SELECT min(next_attempt_at) FROM deliveries
                 WHERE destination = ? AND state = 'pending' AND next_attempt_at > ?
                """,
                (destination, now),
            )
            return Claim(claimed, next(iter(later))[0])

        return await self._writer.errand(ask)

    def release(self, delivery_ids: Iterable[int]) -> None:
        """See `Store.release`."""
        self._holds.release(delivery_ids)

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Store.load`."""
        marks = ", ".join("?" * len(event_ids))
        rows = await self._reader.execute_fetchall(
            f"SELECT {EVENT_COLUMNS} FROM events WHERE id IN ({marks})",  # noqa: S608 - marks only
            event_ids,
        )
        return {row[0]: event_of(tuple(row)) for row in rows}

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `Store.destination_states`."""
        rows = await self._reader.execute_fetchall(
            "SELECT name, paused, disabled_at, disabled_reason FROM destinations"
        )
        return {
            row[0]: DestinationState(
                name=row[0], paused=bool(row[1]), disabled_at=row[2], disabled_reason=row[3]
            )
            for row in rows
        }

    async def set_destination(self, state: DestinationState) -> None:
        """See `Store.set_destination`."""

        async def write(connection: aiosqlite.Connection) -> None:
            await connection.execute(
                """
                REPLACE INTO destinations (name, paused, disabled_at, disabled_reason)
                VALUES (?, ?, ?, ?)
                """,
                (state.name, state.paused, state.disabled_at, state.disabled_reason),
            )

        await self._writer.errand(write)

    async def counts(self) -> dict[str, Counts]:
        """See `Store.counts`."""
        rows = await self._reader.execute_fetchall(
            """
            SELECT ledger.*, (SELECT count(*) FROM deliveries
                               WHERE deliveries.destination = ledger.destination AND state = 'pending')
              FROM ledger
            """
        )
        names = (*BOOKS, "pending")
        return {row[0]: Counts(**dict(zip(names, row[1:], strict=True))) for row in map(tuple, rows)}

    def workers(self) -> tuple[Worker, ...]:
        """Return the registry as it is now, from memory."""
        return tuple(self._roster)

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """See `Store.find`."""
        return await find(self._reader, kind, limit=limit, before=before, filters=filters)

    async def _meta(self, name: str) -> str | None:
        rows = await self._connection.execute_fetchall("SELECT value FROM meta WHERE name = ?", (name,))
        return next((row[0] for row in rows), None)

    async def _set_meta(self, name: str, value: str) -> None:
        await self._connection.execute("REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))
