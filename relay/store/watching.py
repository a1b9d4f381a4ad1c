"""The store's verbs about workers: heartbeats in memory, silence, and what operators and jobs wish."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import aiosqlite

from relay.base.clock import Clock
from relay.errors import StorageError, Unavailable
from relay.model import Heartbeat, Receipt, Worker, WorkerChange, WorkerStatus
from relay.store import Acceptance, FleetChange, Rules
from relay.store.batch import Batch
from relay.store.workers import Roster, WorkerKey
from relay.store.writer import Job, Writer
from relay.workers.rules import Now, apply

T = TypeVar("T")
PRUNE_AT_ONCE = 1000
"""Rows that one transaction deletes: senders do not notice a transaction of this size."""

ROWS_AT_ONCE = 500
"""Workers that one transaction marks or flushes: some milliseconds of the loop, however many there are."""


class Watching:
    """Workers in memory and their way to the disk."""

    _clock: Clock
    _roster: Roster
    rules: Rules
    _writer: Writer

    def __init__(self) -> None:
        self._queued: Counter[WorkerKey] = Counter()  # changes of a worker that wait to be written

    def _beat(self, acceptance: Acceptance) -> Receipt | None:
        """Take a heartbeat that moves only last-seen and gauges in memory; `flush` writes it.

        Not while anything else about its worker is on its way to the disk: order is part of the rules.
        """
        change = acceptance.change
        if acceptance.event is not None or not isinstance(change, Heartbeat):
            return None
        key = (acceptance.source, change.worker_id)
        if key in self._roster.commands or key in self._roster.moving or key in self._queued:
            return None
        step = apply(self._roster.get(key), change, key[0], self._now(), self.rules(*key))
        if not step.quiet or step.worker is None:
            return None
        self._roster.put(self._roster.fit(step.worker) if step.worker.sessions else step.worker)
        self._roster.dirty.add(key)
        return Receipt(worker=step.worker)

    async def _change(self, source: str, change: WorkerChange, job: Job[Receipt]) -> Receipt:
        """Write what a worker said; if that cannot be, note at least that it lives, or leaves."""
        key = (source, change.worker_id)
        self._queued[key] += 1
        try:
            return await self._writer.submit(job, bounded=True)
        except (Unavailable, StorageError):
            self.heed(source, change)
            raise
        finally:
            self._queued[key] -= 1
            if not self._queued[key]:
                del self._queued[key]

    def heed(self, source: str, change: WorkerChange) -> WorkerStatus | None:
        """See `Store.heed`; in memory, and written by `flush` as soon as it can be."""
        return self._roster.heed(source, change, self._now(), self.rules)

    def _now(self) -> Now:
        return Now(wall=self._clock.wall(), steady=self._clock.steady())

    async def flush(self) -> None:
        """See `Store.flush`."""
        dirty, self._roster.dirty = list(self._roster.dirty), set()
        while dirty:
            flush = partial(_flush, dirty[-ROWS_AT_ONCE:])
            try:
                await self._writer.submit(Job(flush))
            except StorageError:
                self._roster.dirty.update(dirty)
                raise
            del dirty[-ROWS_AT_ONCE:]

    async def sweep(self, *, hold: bool = False, at: int | None = None) -> tuple[Worker, ...]:
        """See `Store.sweep`."""
        # Fixed before it waits in the queue: heartbeats that queue behind it must not count as silence.
        moment = self._clock.steady() if at is None else at
        if hold:
            await self._writer.submit(Job(lambda batch: batch.fleet.hold()))
        marked: list[Worker] = []
        while True:
            some = await self._writer.submit(Job(lambda batch: batch.fleet.sweep(moment, ROWS_AT_ONCE)))
            marked += some
            if len(some) < ROWS_AT_ONCE:
                return tuple(marked)

    async def fleet(self, wish: Callable[[FleetChange], T]) -> T:
        """See `Store.fleet`."""
        return await self._writer.submit(Job(lambda batch: wish(batch.fleet)))

    async def prune_worker_metrics(self, before: int) -> int:
        """See `Store.prune_worker_metrics`."""

        async def prune(connection: aiosqlite.Connection) -> int:
            cursor = await connection.execute(
                """
                DELETE FROM worker_metrics WHERE (source, worker_id, at) IN (
                       SELECT source, worker_id, at FROM worker_metrics WHERE at < ? ORDER BY at LIMIT ?)
                """,
                (before, PRUNE_AT_ONCE),
            )
            return cursor.rowcount

        return await self._writer.errand(prune)

    async def prune_worker_commands(self, before: int) -> int:
        """See `Store.prune_worker_commands`."""

        async def prune(connection: aiosqlite.Connection) -> int:
            cursor = await connection.execute(
                """
                DELETE FROM worker_commands WHERE public_id IN (
                       SELECT public_id FROM worker_commands
                        WHERE state <> 'queued' AND created_at < ? ORDER BY created_at LIMIT ?)
                """,
                (before, PRUNE_AT_ONCE),
            )
            return cursor.rowcount

        return await self._writer.errand(prune)

    def workers(self) -> tuple[Worker, ...]:
        """See `Store.workers`; from memory."""
        return tuple(self._roster)

    def census(self, source: str, status: str) -> int:
        """See `Store.census`; from memory."""
        return self._roster.census[source, status]


def _flush(keys: Sequence[WorkerKey], batch: Batch) -> None:
    batch.fleet.flush(keys)
