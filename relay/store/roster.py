"""The registry's rows in memory. Every heartbeat is compared with them, without a read."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec

from relay.config.schema import WorkerRules
from relay.model import Command, Register, Session, Unregister, Worker, WorkerChange, WorkerStatus
from relay.workers.rules import TOMBSTONE, Now, extend_deadline, note_refused

WorkerKey = tuple[str, str]
"""(source, worker id)."""

MOST_SESSIONS = 100_000
"""Sessions kept of all workers together. Further ones are only counted, as each worker reports them."""

MOST_UNREGISTERS = 16_384
"""Workers whose refused unregister request is remembered while the store cannot be opened."""

MOST_REFUSED = 8
"""Refused requests remembered per worker while its row is being written."""


class Roster:
    """All workers by key and by endpoint. Only commits and heartbeats in memory change them."""

    def __init__(
        self, workers: Iterable[Worker] = (), commands: Iterable[Command] = (), *, is_loaded: bool = True
    ) -> None:
        self._is_loaded = is_loaded
        self._rows: dict[WorkerKey, Worker] = {}
        self._endpoints: dict[tuple[str, str], set[WorkerKey]] = {}
        self._sessions: dict[tuple[str, str], WorkerKey] = {}  # the worker that reported a session last
        self._rivals: dict[tuple[str, str], list[WorkerKey]] = {}  # the other workers that report it
        self.sessions = 0  # in all rows
        self.census: Counter[tuple[str, str]] = (
            Counter()
        )  # by source and status, without unregistered workers
        self.being_written: set[WorkerKey] = set()  # changed by the transaction that is being written
        self.dirty: set[WorkerKey] = set()  # changed in memory, not yet flushed
        self.refused: dict[
            WorkerKey, list[tuple[WorkerChange, Now]]
        ] = {}  # while `being_written`: refused requests
        self.refused_unregisters: dict[
            WorkerKey, tuple[Unregister, Now]
        ] = {}  # refused, of workers that are not known
        self.measured: dict[WorkerKey, int] = {}  # when a row of metrics was last written (steady)
        self.commands: dict[WorkerKey, list[Command]] = {}  # queued, oldest first
        for worker in workers:
            self.put(worker)
        for command in commands:
            self.keep_command(command)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._rows.values())

    def get(self, key: WorkerKey) -> Worker | None:
        """Return a worker's row."""
        return self._rows.get(key)

    def at_endpoint(self, source: str, endpoint: str) -> tuple[WorkerKey, ...]:
        """Return the keys of all workers that last registered with this endpoint."""
        return tuple(self._endpoints.get((source, endpoint), ())) if endpoint else ()

    def reporters(self, source: str, session_id: str) -> tuple[WorkerKey, ...]:
        """Return the keys of all workers with a session, beginning with the one that reported it last."""
        last = self._sessions.get((source, session_id))
        return () if last is None else (last, *self._rivals.get((source, session_id), ()))

    def limit_sessions(self, worker: Worker, more: int = 0) -> Worker:
        """Return a row without the sessions that exceed `MOST_SESSIONS` together with `more` new ones."""
        former = self._rows.get((worker.source, worker.id))
        has = 0 if former is None else len(former.sessions)
        room = max(MOST_SESSIONS - self.sessions - more + has, 0)
        if len(worker.sessions) <= room:
            return worker
        return msgspec.structs.replace(worker, sessions=worker.sessions[:room])

    def put(self, worker: Worker) -> None:
        """Insert or replace a row."""
        key = (worker.source, worker.id)
        former = self._rows.get(key)
        self._rows[key] = worker
        place = former.endpoint if former is not None else ""
        if place != worker.endpoint:
            self._leave(place, key)
            if worker.endpoint:
                self._endpoints.setdefault((worker.source, worker.endpoint), set()).add(key)
        self._recount(former, worker)
        before = former.sessions if former is not None else ()
        if before != worker.sessions:
            self.sessions += len(worker.sessions) - len(before)
            self._index(key, before, worker.sessions)

    def note_refused(
        self, source: str, change: WorkerChange, now: Now, rules: Callable[[str, str], WorkerRules]
    ) -> WorkerStatus | None:
        """Note the sign of life of a worker in a refused request; returns its status, None if unknown."""
        key = (source, change.worker_id)
        row = self._rows.get(key)
        if row is None:
            if not self._is_loaded:
                self._keep_unregister(key, change, now)
            return None
        status = row.status if row.unregistered_at is None else None
        if (after := note_refused(row, change, now, rules(*key))) is row:
            return status
        self.put(after)
        self.dirty.add(key)
        if key in self.being_written:  # the row that is being written does not contain this change
            noted = self.refused.setdefault(key, [])
            if noted and type(noted[-1][0]) is type(change):
                noted.pop()
            noted.append((change, now))
            del noted[:-MOST_REFUSED]
        return status

    def _keep_unregister(self, key: WorkerKey, change: WorkerChange, now: Now) -> None:
        """Remember an unregister request that came before the rows were read, until a newer request comes.

        A heartbeat within `TOMBSTONE` of it may have been sent before it, and changes nothing.
        """
        if isinstance(change, Unregister):
            if len(self.refused_unregisters) < MOST_UNREGISTERS:
                self.refused_unregisters[key] = (change, now)
        elif key in self.refused_unregisters:
            _, then = self.refused_unregisters[key]
            if isinstance(change, Register) or now.steady - then.steady >= TOMBSTONE:
                del self.refused_unregisters[key]

    def take_over(self, before: "Roster", rules: Callable[[str, str], WorkerRules]) -> None:
        """Apply the refused unregister requests that came before the rows were read."""
        for (source, _), (change, now) in before.refused_unregisters.items():
            self.note_refused(source, change, now, rules)
        self.refused_unregisters.clear()

    def note_refused_again(self, rules: Callable[[str, str], WorkerRules]) -> None:
        """Apply refused requests to rows that were being written meanwhile."""
        refused, self.refused = self.refused, {}
        for key, noted in refused.items():
            row = self._rows.get(key)
            for change, now in noted:
                row = None if row is None else note_refused(row, change, now, rules(*key))
            if row is not None:
                self.put(row)
                self.dirty.add(key)

    def extend_deadlines(self, now: Now, rules: Callable[[str, str], WorkerRules]) -> None:
        """Extend every deadline."""
        for key, worker in self._rows.items():  # no key is new, and only the deadlines change
            self._rows[key] = extend_deadline(worker, now, rules(*key))

    def queued(self) -> list[Command]:
        """Return every command that waits for a heartbeat."""
        return [command for commands in self.commands.values() for command in commands]

    def keep_command(self, command: Command) -> None:
        """Keep a command if it is queued; drop it otherwise."""
        key = (command.source, command.worker_id)
        others = [each for each in self.commands.get(key, ()) if each.public_id != command.public_id]
        if command.state == "queued":
            others = sorted([*others, command], key=lambda each: each.created_at)
        if others:
            self.commands[key] = others
        else:
            self.commands.pop(key, None)

    def drop(self, key: WorkerKey) -> None:
        """Remove a row."""
        worker = self._rows.pop(key)
        self._count(worker, -1)
        self._leave(worker.endpoint, key)
        self.sessions -= len(worker.sessions)
        self._index(key, worker.sessions, ())
        self.dirty.discard(key)
        self.measured.pop(key, None)

    def _recount(self, former: Worker | None, worker: Worker) -> None:
        if (
            former is None
            or former.status != worker.status
            or former.unregistered_at != worker.unregistered_at
        ):
            self._count(former, -1)
            self._count(worker, 1)

    def _count(self, worker: Worker | None, one: int) -> None:
        if worker is not None and worker.unregistered_at is None:
            self.census[worker.source, worker.status] += one

    def _index(self, key: WorkerKey, before: Iterable[Session], after: Iterable[Session]) -> None:
        gone = {session.id: session for session in before}
        for session in after:
            if gone.pop(session.id, None) is not session:  # the worker has just reported it
                self._claim((key[0], session.id), key)
        for id_ in gone:
            self._give_up((key[0], id_), key)

    def _claim(self, session: tuple[str, str], key: WorkerKey) -> None:
        last = self._sessions.get(session)
        if last == key:
            return
        if last is not None:
            rivals = self._rivals.setdefault(session, [])
            rivals[:] = [*(each for each in rivals if each != key), last]
        self._sessions[session] = key

    def _give_up(self, session: tuple[str, str], key: WorkerKey) -> None:
        rivals = self._rivals.pop(session, [])
        if self._sessions.get(session) != key:
            rivals = [each for each in rivals if each != key]
        elif rivals:
            self._sessions[session] = rivals.pop()
        else:
            del self._sessions[session]
        if rivals:
            self._rivals[session] = rivals

    def _leave(self, endpoint: str, key: WorkerKey) -> None:
        place = (key[0], endpoint)
        keys = self._endpoints.get(place)
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._endpoints[place]
