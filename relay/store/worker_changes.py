"""Changes to workers inside one transaction: by their requests, by deadlines, and by operators."""

from collections.abc import Callable, Iterable

import msgspec

from relay.base.clock import SECOND
from relay.config.schema import WorkerRules
from relay.errors import Conflict, Overloaded
from relay.model import (
    Command,
    GeneratedEvent,
    Heartbeat,
    Register,
    Session,
    SessionSeen,
    Worker,
    WorkerChange,
    WorkerStatus,
)
from relay.store.roster import Roster, WorkerKey
from relay.workers import rules
from relay.workers.rules import Now

MEASURE_EVERY = 60 * SECOND
"""A worker gets at most one row of `worker_metrics` in this time, however many heartbeats it sends."""

MOST_WORKERS = 20_000
"""Workers in the registry, over all sources. Anybody with a token can choose ids."""

FORGET_AT_ONCE = 200
"""Workers forgotten together, because the search for them reads all rows."""

COMMANDS_AT_ONCE = 20
"""Commands in the reply to one heartbeat."""


class StoredWorkerChanges:
    """The changes of one transaction; `Roster` holds the rows before it."""

    def __init__(
        self,
        roster: Roster,
        now: Now,
        rules: Callable[[str, str], WorkerRules],
    ) -> None:
        self._roster = roster
        self._now = now
        self._rules = rules
        self.generated: list[tuple[str, GeneratedEvent]] = []  # source and event, not yet in the batch
        self.workers: dict[WorkerKey, Worker] = {}
        self._sessions: dict[
            tuple[str, str], WorkerKey
        ] = {}  # the worker to which this transaction gave them
        self._unread: list[WorkerKey] = []  # changed rows whose sessions are not in `_sessions` yet
        self.seen: dict[WorkerKey, Worker] = {}  # rows to write as they are in memory
        self.extends_deadlines = False
        self.forgotten: set[WorkerKey] = set()
        self.measured: dict[WorkerKey, Worker] = {}
        self.commands: dict[str, Command] = {}  # new ones, and those whose state changed
        self._new = 0  # workers added by this transaction
        self._grown = 0  # sessions added by this transaction

    def get(self, key: WorkerKey) -> Worker | None:
        """Return a row with the changes of this transaction."""
        return None if key in self.forgotten else self.workers.get(key) or self._roster.get(key)

    def change(self, source: str, change: WorkerChange) -> tuple[Worker | None, tuple[Command, ...]]:
        """Apply a worker's request; returns the worker's row and the commands of the reply.

        Raises:
            Conflict: it contradicts the registry; nothing was changed.
            Overloaded: the worker is new and the registry is full; nothing was changed.
        """
        key = (source, change.worker_id)
        if isinstance(change, SessionSeen) and not change.worker_id:
            key = self._with_session(source, change.session.id) or key
        before = self.get(key)
        owner: WorkerKey | None = None  # of the sessions that the worker must restore
        if isinstance(change, Register) and change.recover:
            sessions, owner = self._recoverable(key, before, change.endpoint)
            change = msgspec.structs.replace(change, sessions=sessions)
        step = rules.apply(before, change, source, self._now, self._rules(*key))
        if step.worker is None:
            return None, ()
        is_new = before is None or before.unregistered_at is not None
        if is_new and isinstance(change, Register):
            self._take_over(source, change)
        if owner is not None and owner != key and (former := self.get(owner)) is not None:
            self._set(owner, msgspec.structs.replace(former, sessions=()))
        if before is None:
            self._make_room()
        self._set(key, self._limit_sessions(before, step.worker))
        for generated in step.generated:
            self.generated.append((source, generated))
        if not isinstance(change, Heartbeat) or step.worker.unregistered_at is not None:
            return step.worker, ()
        self._measure(key, step.worker)
        return step.worker, self._send(key)

    def _make_room(self) -> None:
        """If the registry is full, forget those workers that have been unregistered or offline for longest.

        Raises:
            Overloaded: all of them are online.
        """
        if len(self._roster) + self._new - len(self.forgotten) >= MOST_WORKERS:
            gone = [
                row for row in self._roster
                if row.status == "OFFLINE" or row.unregistered_at is not None
            ]  # fmt: skip
            keys = ((row.source, row.id) for row in sorted(gone, key=lambda row: row.deadline))
            old = [key for key in keys if key not in self.forgotten and key not in self.workers]
            if not old:
                raise Overloaded("Too many workers are registered")
            self.forget(old[:FORGET_AT_ONCE])
        self._new += 1

    def _limit_sessions(self, before: Worker | None, worker: Worker) -> Worker:
        """Return a row without the sessions that exceed the limit of all sessions."""
        fitting = self._roster.limit_sessions(worker, self._grown)
        grown = len(fitting.sessions) - (0 if before is None else len(before.sessions))
        self._grown += max(grown, 0)
        return fitting

    def extend_deadlines(self) -> None:
        """Extend every deadline, in memory only, because a start extends them as well."""
        self.extends_deadlines = True

    def sweep(self, at: int, most: int) -> list[Worker]:
        """Mark up to `most` workers as OFFLINE whose deadline had passed at `at` (steady).

        Workers whose unregister request was refused are unregistered.
        """
        marked: list[Worker] = []
        now = Now(wall=self._now.wall, steady=at)
        for row in self._roster:
            key = (row.source, row.id)
            silence = rules.silent(self.workers.get(key, row), now)
            if silence is not None and key not in self.forgotten:
                marked.append(self._mark(key, silence))
                if len(marked) == most:
                    break
        return marked

    def mark_silent(self, key: WorkerKey, at: int) -> Worker | None:
        """Mark one worker as `sweep` does; returns its new row, None: it is not silent."""
        row = self.get(key)
        silence = None if row is None else rules.silent(row, Now(wall=self._now.wall, steady=at))
        return None if silence is None else self._mark(key, silence)

    def _mark(self, key: WorkerKey, silence: tuple[Worker, GeneratedEvent]) -> Worker:
        after, generated = silence
        self._set(key, after)
        self.generated.append((after.source, generated))
        return after

    def _set(self, key: WorkerKey, worker: Worker) -> None:
        self.forgotten.discard(key)
        self.workers[key] = worker
        self._unread.append(key)
        self._roster.being_written.add(key)

    def to_report(self, key: WorkerKey) -> Worker | None:
        """Return a row without the sessions to restore that another live worker lists now."""
        row = self.get(key)
        if row is None or not row.recovering:
            return row
        sessions = tuple(
            session
            for session in row.sessions
            if session.id not in row.recovering or not self._is_listed_by_others(key, session.id)
        )
        return msgspec.structs.replace(row, sessions=sessions)

    def _recoverable(
        self, key: WorkerKey, row: Worker | None, endpoint: str
    ) -> tuple[tuple[Session, ...], WorkerKey | None]:
        """Return the sessions that a worker must restore, and the key of the worker that had them.

        The sessions are those of the worker's row; if it has no sessions, those of the OFFLINE worker at the
        same endpoint with the latest heartbeat.
        """
        rows = [row] if row is not None else []
        if rules.names_one_machine(endpoint):
            neighbours = [
                self.get(each) for each in self._roster.at_endpoint(key[0], endpoint) if each != key
            ]
            former = [each for each in neighbours if each is not None and not _is_live(each)]
            rows += sorted(former, key=lambda each: each.last_heartbeat, reverse=True)
        for each in rows:
            free = [one for one in each.sessions if not self._is_listed_by_others(key, one.id)]
            if free:
                return tuple(free), (each.source, each.id)
        return (), None

    def _is_listed_by_others(self, key: WorkerKey, session_id: str) -> bool:
        """Return whether another live worker has a session."""
        rows = [self.get(each) for each in self._reporters(key[0], session_id) if each != key]
        return any(
            _is_live(row) and any(session.id == session_id for session in row.sessions)
            for row in rows
            if row is not None
        )

    def _with_session(self, source: str, session_id: str) -> WorkerKey | None:
        """Return the key of the worker that reported a session last, this transaction included."""
        return next(iter(self._reporters(source, session_id)), None)

    def _reporters(self, source: str, session_id: str) -> list[WorkerKey]:
        """Return the keys of the workers that have or had a session, the latest reporter first."""
        for key in self._unread:
            former, worker = self._roster.get(key), self.workers[key]
            if former is None or former.sessions != worker.sessions:
                self._sessions.update({(key[0], session.id): key for session in worker.sessions})
        self._unread.clear()
        moved = self._sessions.get((source, session_id))
        known = self._roster.reporters(source, session_id)
        return [*known] if moved is None else [moved, *known]

    def flush(self, keys: Iterable[WorkerKey]) -> None:
        """Write rows that heartbeats changed in memory only."""
        for key in keys:
            worker = self._roster.get(key)
            if worker is not None:
                self.seen[key] = worker
                self._measure(key, worker)

    def forget(self, keys: Iterable[WorkerKey]) -> int:
        """Remove workers and their queued commands; returns how many existed."""
        found = {key for key in keys if self._roster.get(key) is not None}
        self.forgotten |= found
        for key in found:
            self._expire(self._roster.commands.get(key, ()), "cancelled")
        return len(found)

    def forget_old(self) -> int:
        """Remove rows that have been offline for longer than their rules keep them."""
        old = []
        for worker in self._roster:
            keep = int(self._rules(worker.source, worker.id).forget_after * SECOND)
            if worker.status == "OFFLINE" and self._now.steady - worker.deadline > keep:
                old.append((worker.source, worker.id))
        return self.forget(old)

    def follow_plans(self, keys: Iterable[WorkerKey]) -> list[Worker]:
        """Begin or end planned maintenance of workers; returns the rows that changed."""
        patterns, changed = rules.patterns_of(self._roster, self._now), []
        for key in keys:
            row = self.get(key)
            if row is None:
                continue
            after = rules.follow_plan(row, self._now, self._rules(*key), patterns)
            if after is not row:
                self._set(key, after)
                changed.append(after)
        return changed

    def maintain(self, key: WorkerKey, *, on: bool, plan: rules.Plan | None = None) -> Worker | None:
        """Begin or end maintenance; None: the worker is unknown or unregistered."""
        worker = self.get(key)
        if worker is None or worker.unregistered_at is not None:
            return None
        after = rules.maintain(worker, self._now, self._rules(*key), on=on, plan=plan)
        self._set(key, after)
        return after

    def queue(self, command: Command) -> None:
        """Queue a command for a worker's next heartbeat."""
        self.commands[command.public_id] = command

    def cancel_command(self, key: WorkerKey, public_id: str) -> bool:
        """Cancel a queued command; False: it is not queued."""
        found = [c for c in self._roster.commands.get(key, ()) if c.public_id == public_id]
        self._expire(found, "cancelled")
        return bool(found)

    def requeue(self, commands: Iterable[Command]) -> None:
        """Queue commands again whose reply could not be written."""
        for command in commands:
            again = msgspec.structs.replace(command, state="queued", sent_at=None)
            self.commands[command.public_id] = again

    def expire_commands(self) -> None:
        """End queued commands past their expiry."""
        late = [c for c in self._roster.queued() if c.expires_at <= self._now.steady]
        self._expire(late, "expired")

    def _expire(self, commands: Iterable[Command], state: str) -> None:
        for command in commands:
            self.commands[command.public_id] = msgspec.structs.replace(command, state=state)

    def _send(self, key: WorkerKey) -> tuple[Command, ...]:
        """Choose the commands of a heartbeat's reply and mark them as sent."""
        queued = [
            command
            for command in self._roster.commands.get(key, ())
            if command.public_id not in self.commands and command.expires_at > self._now.steady
        ]
        sent = tuple(
            msgspec.structs.replace(command, state="sent", sent_at=self._now.wall)
            for command in queued[:COMMANDS_AT_ONCE]
        )
        self.commands.update({command.public_id: command for command in sent})
        return sent

    def _measure(self, key: WorkerKey, worker: Worker) -> None:
        if is_measurement_due(self._roster, worker, self._now.steady):
            self.measured[key] = worker

    def _take_over(self, source: str, change: Register) -> None:
        """Shorten the deadlines of earlier ids at a new id's endpoint, or reject the new id.

        Private addresses are rejected as well, because the operator chose that; loopback addresses never.
        """
        if not rules.names_one_machine(change.endpoint):
            return
        neighbours = [
            worker
            for key in self._roster.at_endpoint(source, change.endpoint)
            if (worker := self.get(key)) is not None and worker.status == "ONLINE"
        ]
        if neighbours and change.reject_conflict:
            raise Conflict(f"{neighbours[0].id} is registered at {change.endpoint}")
        if not rules.identifies_worker(change.endpoint):
            return
        for worker in neighbours:
            key = (source, worker.id)
            self._set(key, rules.former(worker, self._now, self._rules(*key)))

    def publish(self) -> list[tuple[str, WorkerStatus]]:
        """Apply the committed changes to the roster; returns source and new status of each changed worker."""
        roster, changed = self._roster, []
        for key, worker in self.workers.items():
            if worker.unregistered_at is None and _status_of(roster.get(key)) != worker.status:
                changed.append((worker.source, worker.status))
            roster.put(worker)
        roster.being_written.clear()
        if roster.refused:
            roster.note_refused_again(self._rules)
        if self.extends_deadlines:
            roster.extend_deadlines(self._now, self._rules)
        for key in self.measured:
            roster.measured[key] = self._now.steady
        for command in self.commands.values():
            roster.keep_command(command)
        for key in self.forgotten:
            roster.drop(key)
        return changed


def is_measurement_due(roster: Roster, worker: Worker, now: int) -> bool:
    """Return whether a worker has gauges, and its next row of `worker_metrics` is due (`now` is steady)."""
    gauges = (worker.cpu, worker.memory, worker.uptime, worker.message_count)
    last = roster.measured.get((worker.source, worker.id), -MEASURE_EVERY)
    return now - last >= MEASURE_EVERY and any(gauge is not None for gauge in gauges)


def _is_live(worker: Worker) -> bool:
    return worker.status != "OFFLINE" and worker.unregistered_at is None


def _status_of(worker: Worker | None) -> WorkerStatus | None:
    return None if worker is None or worker.unregistered_at is not None else worker.status
