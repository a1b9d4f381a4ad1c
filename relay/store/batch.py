"""Everything that one transaction will write, gathered in memory first."""

import hashlib
from collections.abc import Callable, Mapping

import aiosqlite
import msgspec

from relay import registry
from relay.clock import Clock
from relay.config.model import WorkerRules
from relay.errors import Conflict
from relay.ids import delivery_id, event_id
from relay.model import Born, Delivery, Outcome, Receipt, Register, StoredEvent, Worker, WorkerChange
from relay.store import DEDUPE_FOR, Acceptance, Route
from relay.store.rows import (
    ATTEMPT_COLUMNS,
    DELIVERY_COLUMNS,
    EVENT_COLUMNS,
    WORKER_COLUMNS,
    Row,
    attempt_row,
    delivery_row,
    event_row,
    worker_row,
)
from relay.store.statements import fetch, insert
from relay.store.workers import Roster, WorkerKey

BOOKS = ("created", "delivered", "dead", "expired", "cancelled")
_encode = msgspec.json.Encoder().encode


class Sequences:
    """The next row ids, counted in memory: known before the insert, without asking the database."""

    def __init__(self, event: int, delivery: int) -> None:
        self.event = event
        self.delivery = delivery


class Batch:
    """One transaction in the making."""

    def __init__(
        self,
        *,
        clock: Clock,
        sequences: Sequences,
        route: Route,
        roster: Roster,
        rules: Callable[[str], WorkerRules],
        known: Mapping[tuple[str, str], str],
    ) -> None:
        self.steady = clock.steady()
        self.wall = clock.wall()
        self._sequences = sequences
        self._route = route
        self._roster = roster
        self._rules = rules
        self._keys = dict(known)
        self._new_keys: list[Row] = []
        self.events: list[StoredEvent] = []
        self.deliveries: list[Delivery] = []
        self.workers: dict[WorkerKey, Worker] = {}
        self.outcomes: list[Outcome] = []
        self.settled: frozenset[int] = frozenset()  # deliveries that were pending until now

    def accept(self, acceptance: Acceptance) -> Receipt:
        """Take in one request.

        Raises:
            Conflict: the worker change contradicts the registry; nothing was taken in.
        """
        event, key = acceptance.event, acceptance.key
        if event is not None and key is not None:
            first = self._keys.get((acceptance.source, key))
            if first is not None:
                return Receipt(event_id=first, duplicate=True)
        worker = None
        if acceptance.change is not None:
            worker = self._change(acceptance.source, acceptance.change)
        elif acceptance.asks is not None:
            worker = self._worker((acceptance.source, acceptance.asks))
        if event is None:
            return Receipt(worker=worker)
        if key is not None:
            self._keys[acceptance.source, key] = event.public_id
            self._new_keys.append((acceptance.source, key, event.public_id, self.steady + DEDUPE_FOR))
        self._add(event)
        return Receipt(event_id=event.public_id, worker=worker)

    def sweep(self, *, hold: bool) -> tuple[Worker, ...]:
        """Take in the silence of every worker past its deadline; with `hold`, put deadlines off instead."""
        now, marked = registry.Now(wall=self.wall, steady=self.steady), []
        for worker in self._roster:
            key = (worker.source, worker.id)
            if hold:
                self.workers[key] = registry.hold(worker, now, self._rules(worker.source))
                continue
            silence = registry.silent(worker, now)
            if silence is not None:
                after, born = silence
                self.workers[key] = after
                self._bear(worker.source, born)
                marked.append(after)
        return tuple(marked)

    def _add(self, event: StoredEvent) -> None:
        sequences = self._sequences
        sequences.event += 1
        event.id = sequences.event
        self.events.append(event)
        for owed in self._route(event):
            sequences.delivery += 1
            self.deliveries.append(
                Delivery(
                    id=sequences.delivery,
                    public_id=delivery_id(self.wall),
                    event_id=event.id,
                    destination=owed.destination,
                    attempts=0,
                    created_at=self.wall,
                    size=len(event.body),
                    event=event,
                )
            )

    def _bear(self, source: str, born: Born) -> None:
        body = _encode(born.data)
        self._add(
            StoredEvent(
                id=0,
                public_id=event_id(self.wall),
                source=source,
                type=f"{source}.{born.type}",
                subject=born.subject,
                received_at=self.wall,
                data=body,
                context=b"{}",
                body=body,
                content_type="application/json",
                sha256=hashlib.sha256(body).digest(),
            )
        )

    def _worker(self, key: WorkerKey) -> Worker | None:
        return self.workers.get(key) or self._roster.get(key)

    def _change(self, source: str, change: WorkerChange) -> Worker | None:
        now = registry.Now(wall=self.wall, steady=self.steady)
        key = (source, change.worker_id)
        before = self._worker(key)
        step = registry.apply(before, change, source, now, self._rules(source))
        if step.worker is None:
            return None
        is_new = before is None or before.unregistered_at is not None
        if is_new and isinstance(change, Register):
            self._take_over(source, change, now)
        self.workers[key] = step.worker
        for born in step.born:
            self._bear(source, born)
        return step.worker

    def _take_over(self, source: str, change: Register, now: registry.Now) -> None:
        """A new id on an old endpoint: the ids that were there have less time to be heard again."""
        neighbours = [
            worker
            for key in self._roster.at_endpoint(source, change.endpoint)
            if (worker := self._worker(key)) is not None and worker.status == "ONLINE"
        ]
        if neighbours and change.reject_conflict:
            raise Conflict(f"{neighbours[0].id} is registered at {change.endpoint}")
        for worker in neighbours:
            self.workers[source, worker.id] = registry.former(worker, now)

    async def write(self, connection: aiosqlite.Connection) -> None:
        """Write everything, inside the transaction that the caller began."""
        if self.outcomes:
            await self._write_outcomes(connection)
        if self.events:
            await insert(connection, "events", EVENT_COLUMNS, [event_row(e) for e in self.events])
        if self.deliveries:
            rows = [delivery_row(d, self.steady) for d in self.deliveries]
            await insert(connection, "deliveries", DELIVERY_COLUMNS, rows)
        if self._new_keys:
            columns = "source, key, event_id, expires_at"
            await insert(connection, "dedupe", columns, self._new_keys, verb="REPLACE")
        if self.workers:
            rows = [worker_row(worker) for worker in self.workers.values()]
            await insert(connection, "workers", WORKER_COLUMNS, rows, verb="REPLACE")
        if books := self._books():
            adding = ", ".join(f"{column} = {column} + excluded.{column}" for column in BOOKS)
            await insert(
                connection,
                "ledger",
                f"destination, {', '.join(BOOKS)}",
                books,
                then=f"ON CONFLICT (destination) DO UPDATE SET {adding}",
            )

    async def _write_outcomes(self, connection: aiosqlite.Connection) -> None:
        """Move deliveries on where they are still pending (compare-and-set), and keep every attempt."""
        moves = [self._move(outcome) for outcome in self.outcomes]
        moved = await fetch(
            connection,
            """
            WITH moves (id, state, reason, attempts, next_attempt_at, finished_at, last_status, last_error)
                AS (VALUES {values})
            UPDATE deliveries
               SET state = moves.state, reason = moves.reason, attempts = moves.attempts,
                   next_attempt_at = moves.next_attempt_at, finished_at = moves.finished_at,
                   last_status = moves.last_status, last_error = moves.last_error
              FROM moves
             WHERE deliveries.id = moves.id AND deliveries.state = 'pending'
            RETURNING deliveries.id
            """,
            moves,
        )
        self.settled = frozenset(row[0] for row in moved)
        attempts = [attempt_row(outcome.delivery.id, outcome.attempt) for outcome in self.outcomes]
        await insert(connection, "attempts", ATTEMPT_COLUMNS, attempts)

    def _move(self, outcome: Outcome) -> Row:
        ended = outcome.state != "pending"
        return (
            outcome.delivery.id,
            outcome.state,
            outcome.reason,
            outcome.delivery.attempts + outcome.counts,
            None if ended else outcome.next_attempt_at,
            self.wall if ended else None,
            outcome.attempt.status,
            outcome.attempt.error,
        )

    def _books(self) -> list[Row]:
        """What this transaction adds to the ledger, a row per destination."""
        sums: dict[str, dict[str, int]] = {}

        def add(destination: str, column: str) -> None:
            columns = sums.setdefault(destination, dict.fromkeys(BOOKS, 0))
            columns[column] += 1

        for delivery in self.deliveries:
            add(delivery.destination, "created")
        for outcome in self.outcomes:
            if outcome.state != "pending" and outcome.delivery.id in self.settled:
                add(outcome.delivery.destination, outcome.state)
        return [(destination, *columns.values()) for destination, columns in sums.items()]
