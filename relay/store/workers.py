"""The worker registry: heartbeats in memory, deadlines, and changes by operators and jobs."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from relay.base.clock import Clock
from relay.errors import StorageError, Unavailable
from relay.model import Heartbeat, Receipt, Worker, WorkerChange, WorkerStatus
from relay.store import Acceptance, Rules, WorkerChanges
from relay.store.batch import Batch
from relay.store.roster import Roster, WorkerKey
from relay.store.writer import HasWriter, Job
from relay.workers.rules import Now, apply, follow_plan, patterns_of

T = TypeVar("T")
ROWS_AT_ONCE = 500
"""Workers that one transaction marks or flushes, so that the event loop waits for only a few milliseconds."""


class StoredWorkers:
    """`relay.store.Workers`."""

    def __init__(self, database: HasWriter, clock: Clock, rules: Rules) -> None:
        self._database = database
        self._clock = clock
        self._rules = rules
        self.roster = Roster(is_loaded=False)
        self._queued: Counter[WorkerKey] = Counter()  # changes of a worker that wait to be written

    def apply_in_memory(self, acceptance: Acceptance) -> Receipt | None:
        """Apply a heartbeat in memory if it changes only the time and the gauges; `flush` writes it.

        Returns None if the heartbeat must be written. While another change of its worker is being written, it
        must be written as well, because the rules depend on the order of the changes.
        """
        change = acceptance.change
        if acceptance.event is not None or not isinstance(change, Heartbeat):
            return None
        key = (acceptance.source, change.worker_id)
        if key in self.roster.commands or key in self.roster.being_written or key in self._queued:
            return None
        step = apply(self.roster.get(key), change, key[0], self._now(), self._rules(*key))
        if not step.quiet or step.worker is None:
            return None
        self.roster.put(self.roster.limit_sessions(step.worker) if step.worker.sessions else step.worker)
        self.roster.dirty.add(key)
        return Receipt(worker=step.worker)

    async def submit(self, source: str, change: WorkerChange, job: Job[Receipt]) -> Receipt:
        """Write a worker's request; if that fails, at least note that the worker is alive or unregisters."""
        key = (source, change.worker_id)
        self._queued[key] += 1
        try:
            return await self._database.writer.submit(job, bounded=True)
        except (Unavailable, StorageError):
            self.note_refused(source, change)
            raise
        finally:
            self._queued[key] -= 1
            if not self._queued[key]:
                del self._queued[key]

    def note_refused(self, source: str, change: WorkerChange) -> WorkerStatus | None:
        """See `Workers.note_refused`; `flush` writes it."""
        return self.roster.note_refused(source, change, self._now(), self._rules)

    def _now(self) -> Now:
        return Now(wall=self._clock.wall(), steady=self._clock.steady())

    async def flush(self) -> None:
        """See `Workers.flush`."""
        dirty, self.roster.dirty = list(self.roster.dirty), set()
        while dirty:
            some = dirty[-ROWS_AT_ONCE:]
            try:
                await self._submit(partial(_flush, some), some)
            except StorageError:
                self.roster.dirty.update(dirty)
                raise
            del dirty[-ROWS_AT_ONCE:]

    async def sweep(self, *, extend: bool = False, at: int | None = None) -> tuple[Worker, ...]:
        """See `Workers.sweep`."""
        # Fixed before the sweep waits in the queue: workers whose heartbeats queue behind it are not silent.
        moment = self._clock.steady() if at is None else at
        if extend:
            await self._submit(lambda batch: batch.workers.extend_deadlines(), ())
        marked: list[Worker] = []
        while True:
            some = await self._submit(lambda batch: batch.workers.sweep(moment, ROWS_AT_ONCE), ())
            marked += some
            if len(some) < ROWS_AT_ONCE:
                return tuple(marked)

    async def follow_plans(self) -> tuple[Worker, ...]:
        """See `Workers.follow_plans`; only rows that a plan changes are written."""
        now, rows = self._now(), tuple(self.roster)
        patterns, due = patterns_of(rows, now), list[WorkerKey]()
        for number, row in enumerate(rows):
            key = (row.source, row.id)
            if follow_plan(row, now, self._rules(*key), patterns) is not row:
                due.append(key)
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)  # others run meanwhile
        changed: list[Worker] = []
        while due:
            some, due = due[:ROWS_AT_ONCE], due[ROWS_AT_ONCE:]
            changed += await self._submit(partial(_follow_plans, some), some)
        return tuple(changed)

    async def change(self, request: Callable[[WorkerChanges], T]) -> T:
        """See `Workers.change`."""
        return await self._submit(lambda batch: request(batch.workers), None)

    async def _submit(self, apply_: Callable[[Batch], T], keys: Sequence[WorkerKey] | None) -> T:
        """Apply a change that concerns these workers, or any workers (None), in one transaction."""
        _ = keys
        return await self._database.writer.submit(Job(apply_))

    def all(self) -> tuple[Worker, ...]:
        """See `Workers.all`."""
        return tuple(self.roster)

    def count(self, source: str, status: str) -> int:
        """See `Workers.count`."""
        return self.roster.census[source, status]

    def queued(self, source: str, worker_id: str) -> int:
        """See `Workers.queued`."""
        return len(self.roster.commands.get((source, worker_id), ()))


def _follow_plans(keys: Sequence[WorkerKey], batch: Batch) -> list[Worker]:
    return batch.workers.follow_plans(keys)


def _flush(keys: Sequence[WorkerKey], batch: Batch) -> None:
    batch.workers.flush(keys)
