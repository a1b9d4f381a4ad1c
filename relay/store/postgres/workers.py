"""The registry of workers in a cluster: `SharedWorkers` keeps it the same on all nodes.

Any node may receive any request of a worker. Each node keeps all rows in memory, and compares heartbeats with
them. The `version` of a row is the id of the transaction that wrote it last, so a node recognizes an outdated
row:

* A heartbeat that changes only gauges stays in memory. `flush` writes it if the row still has the version
  that the node knows; otherwise it reads the row and applies the heartbeat again.
* Any other change locks the rows that it concerns, reads those that are outdated, and applies the rules. So
  each change of status creates one event.
* Every two seconds, each node reads the rows that others have changed.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from relay.base.clock import SECOND, Clock
from relay.errors import StorageUnavailableError
from relay.model import Command, Heartbeat, Receipt, Register, SessionSeen, Unregister, Worker, WorkerChange
from relay.model import WorkerStatus as Status
from relay.store import Acceptance, Rules
from relay.store.batch import Batch
from relay.store.postgres.connection import Connection, Database
from relay.store.postgres.rows import text
from relay.store.postgres.transaction import Transaction
from relay.store.postgres.worker_rows import METRICS, QUEUED_SQL, columns_of
from relay.store.roster import MOST_REFUSED, WorkerKey
from relay.store.rows import command_of, measurement_row, worker_of, worker_row
from relay.store.worker_changes import StoredWorkerChanges, is_measurement_due
from relay.store.workers import ROWS_AT_ONCE, StoredWorkers
from relay.store.writer import Job
from relay.workers.rules import TOMBSTONE, Now, Step, apply, identifies_worker, note_refused, silent

T = TypeVar("T")
Fetch = Callable[..., Awaitable[Sequence[Any]]]
"""Runs a statement with its values and returns the rows."""

GRACE = 4 * SECOND
"""Two flushes: another node may keep a heartbeat in memory for this long."""

AWAY = 5 * SECOND
"""Time without a flush after which this node may have missed changes of the other nodes."""

STALE = SECOND
"""Time after such a gap in which this node may still read requests that arrived during the gap."""

SETTLE = 10 * SECOND
"""Time after such a gap in which the other nodes connect again and write their heartbeats."""

# --- statements -----------------------------------------------------------------------------------

QUEUED_FOR_SQL = (
    f"{QUEUED_SQL} AND (source, worker_id) IN (SELECT * FROM unnest($1::text[], $2::text[]) AS t (a, b))"  # noqa: S608 - constants
)

# A version that no transaction of this server can have written comes from a restored dump.
FOREIGN_VERSIONS_SQL = """
    UPDATE workers SET version = 0 WHERE version >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""

ID_SQL = "SELECT pg_current_xact_id()::text::bigint"

# All transactions before `xmin` had ended, so a later call needs only rows with a version from `xmin` on. All
# rows of a transaction become visible together, so those of a known one need not be read again.
CHANGED_SQL = """
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xmin,
           (SELECT count(*) FROM workers) AS total, w.source, w.id, w.version, w.record
      FROM (VALUES (1)) AS one (row)
      LEFT JOIN workers AS w ON w.version >= $1 AND w.version <> ALL($2::bigint[])
     ORDER BY w.last_heartbeat
"""

LOCK_SQL = """
    WITH given AS (
         SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[]) WITH ORDINALITY
                       AS g (source, id, known, number)),
    locked AS MATERIALIZED (
         SELECT g.number, w.version, CASE WHEN w.version IS DISTINCT FROM g.known THEN w.record END AS record
           FROM given AS g JOIN workers AS w USING (source, id)
          ORDER BY w.source, w.id FOR UPDATE OF w)
    SELECT pg_current_xact_id()::text::bigint AS transaction, l.number, l.version, l.record
      FROM (VALUES (1)) AS one (row) LEFT JOIN locked AS l ON true
"""

REGISTER_LOCK_SQL = "SELECT pg_advisory_xact_lock(hashtext('hookferry workers'))"
"""Taken by registrations that must be alone at their endpoint."""

_GIVEN_SQL = """
    given AS MATERIALIZED (
         SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bytea[],
                              $7::bigint[]) WITH ORDINALITY
                       AS g (source, id, status, last_heartbeat, deadline, record, known, number))
"""

_SET_SQL = """
    status = g.status, last_heartbeat = g.last_heartbeat, deadline = g.deadline, record = g.record
"""

FLUSH_SQL = f"""
    WITH {_GIVEN_SQL},
    locked AS MATERIALIZED (
         SELECT g.number FROM given AS g JOIN workers AS w USING (source, id)
          WHERE w.version = g.known ORDER BY w.source, w.id FOR UPDATE OF w)
    UPDATE workers AS w SET version = pg_current_xact_id()::text::bigint, {_SET_SQL}
      FROM given AS g JOIN locked USING (number)
     WHERE w.source = g.source AND w.id = g.id
    RETURNING g.number, w.version
"""  # noqa: S608 - only constants

WRITE_SQL = f"""
    WITH {_GIVEN_SQL},
    changed AS (
         UPDATE workers AS w SET version = $8, {_SET_SQL}
           FROM given AS g
          WHERE w.source = g.source AND w.id = g.id AND w.version = g.known
         RETURNING 1),
    added AS (
         INSERT INTO workers (source, id, version, status, last_heartbeat, deadline, record)
         SELECT source, id, $8::bigint, status, last_heartbeat, deadline, record
           FROM given WHERE known IS NULL
         ON CONFLICT DO NOTHING
         RETURNING 1)
    SELECT (SELECT count(*) FROM changed) + (SELECT count(*) FROM added)
"""  # noqa: S608 - only constants

FORGET_SQL = """
    DELETE FROM workers AS w USING unnest($1::text[], $2::text[], $3::bigint[]) AS f (source, id, known)
     WHERE w.source = f.source AND w.id = f.id AND w.version = f.known
"""

FLUSHED_SQL = "UPDATE nodes SET flushed = $2 WHERE incarnation = $1::uuid"

# A node that has left has no row; one that was killed keeps it for a while.
FLUSHES_SQL = """
    SELECT coalesce(flushed, (extract(epoch FROM started) * 1000000)::bigint) AS flushed FROM nodes
"""

SWEPT_SQL = "SELECT standing::text FROM leases WHERE name = 'job:sweep'"
NOTE_SWEPT_SQL = """
    INSERT INTO leases (name, standing) VALUES ('job:sweep', $1::text::jsonb)
        ON CONFLICT (name) DO UPDATE SET standing = excluded.standing
"""

# --- decisions, without I/O -----------------------------------------------------------------------


class Note(msgspec.Struct, frozen=True):
    """A request that a node has applied in memory only."""

    change: WorkerChange
    now: Now
    is_refused: bool


class Sweep(msgspec.Struct, frozen=True):
    """The stored times of the latest sweep by any node; steady clock."""

    at: int = 0
    resumed: int = 0  # when heartbeats could arrive again after the whole cluster was away


def is_obsolete(row: Worker, note: Note, now: int, patience: int) -> bool:
    """Return whether a row contains the request of a note, or a later one.

    `now` is steady, `patience` the worker's `offline_after` in microseconds.
    """
    then, heard = note.now.steady, row.deadline - patience
    if isinstance(note.change, Unregister):
        return heard > then and (not row.last_beat or heard - then >= TOMBSTONE)
    has_left = row.unregistered_at is not None and row.unregistered_at >= then
    return heard >= then or then + patience <= now or has_left


def judged_until(moment: int, now: int, flushes: Iterable[int], hold: int) -> int:
    """Return the time until which the heartbeats of all nodes are known.

    `flushes` are the times until which the nodes have written theirs. A node without a flush for `hold` is
    gone, and its heartbeats with it.
    """
    return min([moment, *(flushed for flushed in flushes if flushed > now - hold)])


# --- the registry ---------------------------------------------------------------------------------


class WorkerRaceError(Exception):
    """Another node has changed a worker's row meanwhile; the batch must be applied again."""

    sqlstate = "40001"


class SharedWorkers(StoredWorkers):
    """`relay.store.Workers` on one of several nodes."""

    def __init__(
        self, database: Database, clock: Clock, rules: Rules, *, incarnation: str, lease: float
    ) -> None:
        """Take the node's incarnation, and the length of a lease in seconds."""
        super().__init__(database, clock, rules)
        self._postgres = database
        self._incarnation = incarnation
        self._hold = int(lease * SECOND) + GRACE
        self._versions: dict[WorkerKey, int] = {}  # of the rows in memory
        self._since = 0  # earlier transactions had ended at the latest refresh
        self._seen: set[int] = set()  # later transactions whose rows are in memory
        self._notes: dict[WorkerKey, list[Note]] = {}  # in memory only, oldest first
        self._outdated: set[WorkerKey] = set()  # their notes change more than gauges, on the current row
        self._concerned: dict[Job[Any], Callable[[], Sequence[WorkerKey]] | None] = {}
        self._registers_alone: set[Job[Any]] = set()
        self._transaction = 0  # id of the current transaction; 0: not known
        self._has_raced = False
        self._flushed = self._flushing_since = 0  # steady clock
        self._stale_until = 0  # steady clock
        self._swept = Sweep()
        self._owes_extension = False  # a sweep with `extend` has not been made yet

    # --- requests

    def apply_in_memory(self, acceptance: Acceptance) -> Receipt | None:
        """See `StoredWorkers.apply_in_memory`; not while the node does not write its heartbeats in time.

        Otherwise the other nodes would take such a worker for silent.
        """
        change = acceptance.change
        if change is None or (acceptance.source, change.worker_id) in self._outdated:
            return None
        if self._clock.steady() - self._flushed > GRACE or self._was_away() or not self._can_write():
            return None
        receipt = super().apply_in_memory(acceptance)
        if receipt is not None:
            self._note(acceptance.source, change, is_refused=False)
        return receipt

    def note_refused(self, source: str, change: WorkerChange) -> Status | None:
        """See `Workers.note_refused`."""
        status = super().note_refused(source, change)
        if (source, change.worker_id) in self.roster.dirty:
            self._note(source, change, is_refused=True)
        return status

    async def submit(self, source: str, change: WorkerChange, job: Job[Receipt]) -> Receipt:
        """See `StoredWorkers.submit`; a node that was away refuses requests.

        They may have arrived while it was frozen, and their workers have sent others since then.
        """
        if not isinstance(change, SessionSeen) and self._was_away():
            self.note_refused(source, change)
            raise StorageUnavailableError("this node was suspended and reads the worker registry again")
        self._concerned[job] = partial(self._keys, source, change)
        if isinstance(change, Register) and change.reject_conflict:
            self._registers_alone.add(job)
        try:
            return await super().submit(source, change, job)
        finally:
            self._concerned.pop(job, None)
            self._registers_alone.discard(job)

    def _was_away(self) -> bool:
        now = self._clock.steady()
        return self._flushed > 0 and (now < self._stale_until or now - self._flushed > AWAY)

    def _can_write(self) -> bool:
        try:
            return self._database.writer.failure is None
        except StorageUnavailableError:
            return False

    def _note(self, source: str, change: WorkerChange, *, is_refused: bool) -> None:
        notes = self._notes.setdefault((source, change.worker_id), [])
        if notes and type(notes[-1].change) is type(change) and notes[-1].is_refused == is_refused:
            notes.pop()
        notes.append(Note(change, self._now(), is_refused))
        del notes[:-MOST_REFUSED]

    def _keys(self, source: str, change: WorkerChange) -> Sequence[WorkerKey]:
        """Return the workers whose rows a request may change. Any others are compared by their version."""
        if isinstance(change, SessionSeen) and not change.worker_id:
            return self.roster.reporters(source, change.session.id)[:1]
        key = (source, change.worker_id)
        if isinstance(change, Register) and identifies_worker(change.endpoint):
            return [key, *self.roster.at_endpoint(source, change.endpoint)]
        return [key]

    async def _submit(self, apply_: Callable[[Batch], T], keys: Sequence[WorkerKey] | None) -> T:
        job: Job[T] = Job(apply_)
        self._concerned[job] = None if keys is None else lambda: keys
        try:
            return await self._database.writer.submit(job)
        finally:
            self._concerned.pop(job, None)

    # --- one transaction

    async def prepare(self, transaction: Transaction, jobs: Sequence[Job[Any]]) -> None:
        """Lock the rows that the jobs of a batch concern, and read those that other nodes have changed."""
        self._transaction = 0
        concerned = [self._concerned[job] for job in jobs if job in self._concerned]
        if not concerned:
            return
        if not self._registers_alone.isdisjoint(jobs):
            await transaction.fetch(REGISTER_LOCK_SQL)
        if self._has_raced or None in concerned or not self._registers_alone.isdisjoint(jobs):
            await self._refresh(transaction.fetch)
        self._has_raced = False
        keys = list(dict.fromkeys(key for find in concerned if find is not None for key in find()))
        if not keys:
            return
        known = [self._versions.get(key) for key in keys]
        rows = await transaction.fetch(LOCK_SQL, *columns_of(keys, 2), known)
        missing = set(keys)
        for id_, number, version, record in rows:
            self._transaction = id_
            if number is not None:
                missing.discard(keys[number - 1])
                self._take(keys[number - 1], version, record)
        for key in missing:
            self._drop(key)
        queued = await transaction.fetch(QUEUED_FOR_SQL, *columns_of(keys, 2))
        self._take_commands(keys, [command_of(tuple(row)) for row in queued])

    def note_undone(self) -> None:
        """Note that a batch was not written; the next one reads all rows that other nodes have changed."""
        self._has_raced = True

    async def write(self, changes: StoredWorkerChanges, transaction: Transaction) -> None:
        """Write the rows that a batch has changed.

        Raises:
            WorkerRaceError: another node has changed one of them meanwhile.
        """
        workers = {**changes.seen, **changes.workers}
        keys = [key for key in sorted(workers) if key not in changes.forgotten]
        if keys:
            if not self._transaction:
                [[self._transaction]] = await transaction.fetch(ID_SQL)
            rows = columns_of([worker_row(workers[key]) for key in keys], 2)
            known = [self._versions.get(key) for key in keys]
            [[written]] = await transaction.fetch(WRITE_SQL, *rows, known, self._transaction)
            if written != len(keys):
                raise WorkerRaceError("another node has changed a worker at the same time")
        if changes.forgotten:
            gone = sorted(changes.forgotten)
            known = [self._versions.get(key) for key in gone]
            await transaction.fetch(FORGET_SQL, *columns_of(gone, 2), known)

    def note_committed(self, changes: StoredWorkerChanges) -> None:
        """Note the versions of the rows that a committed batch has written."""
        for key in changes.seen.keys() | changes.workers.keys():
            self._versions[key] = self._transaction
        for key in changes.forgotten:
            self._forget(key)
        self._seen.add(self._transaction)

    # --- changes of other nodes

    async def reload(self, connection: Connection) -> None:
        """Compare all rows with the database, after it was opened or unreachable."""
        self._versions.clear()  # a promoted standby may give ids of lost transactions again
        self._seen.clear()
        await connection.execute(FOREIGN_VERSIONS_SQL)
        await self._refresh(connection.fetch, everything=True)
        self._note_flush(self._clock.steady())

    async def _refresh(self, fetch: Fetch, *, everything: bool = False) -> None:
        """Read the rows that other nodes have changed, and the queued commands."""
        rows = await fetch(CHANGED_SQL, *((0, []) if everything else (self._since, list(self._seen))))
        self._since, total = rows[0]["xmin"], rows[0]["total"]
        for _, _, source, id_, version, record in rows:
            if version is not None and self._versions.get((source, id_)) != version:
                worker = worker_of(record)
                self._take((worker.source, worker.id), version, record)
        self._seen |= {row["version"] for row in rows if row["version"] is not None}
        self._seen = {version for version in self._seen if version >= self._since}
        if everything or total != len(self.roster):
            there = {tuple(row) for row in await fetch("SELECT source, id FROM workers")}
            for source, id_ in [(worker.source, worker.id) for worker in self.roster]:
                if (text(source), text(id_)) not in there:
                    self._drop((source, id_))
        queued = [command_of(tuple(row)) for row in await fetch(QUEUED_SQL)]
        self._take_commands(list(self.roster.commands), queued)

    def _take(self, key: WorkerKey, version: int, record: bytes | None) -> None:
        """Use a row of the database; without a record, the row in memory is the current one."""
        self._versions[key] = version
        if record is None:
            return
        row, former = worker_of(record), self.roster.get(key)
        if former is not None and former.sessions == row.sessions:
            row = msgspec.structs.replace(row, sessions=former.sessions)
        self._outdated.discard(key)
        for note in self._notes.get(key, ()):
            step = self._apply_again(row, note)
            if not step.quiet or step.worker is None:
                self._outdated.add(key)
                break
            row = step.worker
        self.roster.put(row)

    def _apply_again(self, row: Worker, note: Note) -> Step:
        """Apply a note to a row that another node has changed meanwhile."""
        rules = self._rules(row.source, row.id)
        if is_obsolete(row, note, self._clock.steady(), int(rules.offline_after * SECOND)):
            return Step(worker=row, quiet=True)
        if note.is_refused:
            return Step(worker=note_refused(row, note.change, note.now, rules), quiet=True)
        return apply(row, note.change, row.source, note.now, rules)

    def _drop(self, key: WorkerKey) -> None:
        if self.roster.get(key) is not None:
            self.roster.drop(key)
        self._forget(key)

    def _forget(self, key: WorkerKey) -> None:
        self._versions.pop(key, None)
        self._notes.pop(key, None)
        self._outdated.discard(key)

    def _take_commands(self, keys: Iterable[WorkerKey], queued: Iterable[Command]) -> None:
        for key in keys:
            self.roster.commands.pop(key, None)
        for command in queued:
            self.roster.keep_command(command)

    # --- jobs

    async def flush(self) -> None:
        """See `Workers.flush`; also reads the changes of other nodes."""
        moment = self._clock.steady()
        keys, self.roster.dirty = list(self.roster.dirty), set()
        try:
            await self._write_quiet([key for key in keys if self.roster.get(key) is not None])
            self._forget_notes(keys, moment)
            await self._database.writer.call(partial(self._exchange, moment))
        except Exception:
            self.roster.dirty.update(keys)
            raise
        self._note_flush(moment)

    def _note_flush(self, moment: int) -> None:
        if moment - self._flushed > AWAY:
            self._flushing_since = moment
            self._stale_until = moment + STALE if self._flushed else 0
        self._flushed = moment

    async def _write_quiet(self, keys: Sequence[WorkerKey]) -> None:
        missed = [key for key in keys if key in self._outdated]
        quiet = [key for key in keys if key not in self._outdated]
        for at in range(0, len(quiet), ROWS_AT_ONCE):
            some = quiet[at : at + ROWS_AT_ONCE]
            missed += await self._database.writer.call(partial(self._write_unchanged, some))
        for at in range(0, len(missed), ROWS_AT_ONCE):
            some = missed[at : at + ROWS_AT_ONCE]
            await self._submit(partial(self._write_changed, some), some)

    async def _write_unchanged(self, keys: Sequence[WorkerKey], connection: Connection) -> list[WorkerKey]:
        """Write rows that no other node has changed; returns the keys of the others."""
        found = [(key, worker) for key in keys if (worker := self.roster.get(key)) is not None]
        if not found:
            return []
        rows = columns_of([worker_row(worker) for _, worker in found], 2)
        known = [self._versions.get(key) for key, _ in found]
        written = await connection.fetch(FLUSH_SQL, *rows, known)
        missed = dict(found)
        for number, version in written:
            key = found[number - 1][0]
            self._versions[key] = version
            self._seen.add(version)
            del missed[key]
        await self._measure([worker for key, worker in found if key not in missed], connection)
        return list(missed)

    async def _measure(self, workers: Sequence[Worker], connection: Connection) -> None:
        now, wall = self._clock.steady(), self._clock.wall()
        if due := [each for each in workers if is_measurement_due(self.roster, each, now)]:
            rows = columns_of([measurement_row(each, wall) for each in due], 2)
            await connection.fetch(f"WITH {METRICS.sql} SELECT 1", *rows)
            self.roster.measured.update({(each.source, each.id): now for each in due})

    def _write_changed(self, keys: Sequence[WorkerKey], batch: Batch) -> None:
        """Write heartbeats whose rows other nodes have changed; `prepare` has read these rows."""
        changes = batch.workers
        for key in keys:
            row = self.roster.get(key)
            if row is None:
                continue
            for note in self._notes.get(key, ()) if key in self._outdated else ():
                step = self._apply_again(row, note)
                if isinstance(note.change, Heartbeat) and step.worker is not row:
                    changes.change(row.source, note.change)
            if key not in changes.workers:
                changes.flush((key,))

    def _forget_notes(self, keys: Iterable[WorkerKey], moment: int) -> None:
        for key in keys:
            later = [note for note in self._notes.get(key, ()) if note.now.steady > moment]
            if later:
                self._notes[key] = later
                self.roster.dirty.add(key)
            else:
                self._notes.pop(key, None)
                self._outdated.discard(key)

    async def _exchange(self, moment: int, connection: Connection) -> None:
        """Note that all heartbeats until `moment` are written, and read the changes of other nodes."""
        await connection.execute(FLUSHED_SQL, self._incarnation, moment)
        await self._refresh(connection.fetch)

    async def sweep(self, *, extend: bool = False, at: int | None = None) -> tuple[Worker, ...]:
        """See `Workers.sweep`.

        Heartbeats that other nodes have not written yet count as well. With `extend`, this node has not swept
        lately; the deadlines are extended unless other nodes did so meanwhile.
        """
        moment = self._clock.steady() if at is None else at
        until = await self._begin_sweep(moment, extend=extend) if moment > 0 else 0
        due = [(row.source, row.id) for row in tuple(self.roster) if self._is_silent(row, until)]
        marked: list[Worker] = []
        for start in range(0, len(due), ROWS_AT_ONCE):
            some = due[start : start + ROWS_AT_ONCE]
            marked += await self._submit(partial(self._mark_silent, some, until), some)
        return tuple(marked)

    async def _begin_sweep(self, moment: int, *, extend: bool) -> int:
        """Note that this node sweeps; returns the time that is compared with the deadlines, 0: with none."""
        now = self._clock.steady()
        self._owes_extension |= extend
        if now - self._flushed > AWAY:
            return 0
        stored = await self._postgres.value(SWEPT_SQL)
        former = Sweep() if stored is None else msgspec.json.decode(stored, type=Sweep)
        was_away = self._flushing_since > former.at
        self._swept = Sweep(now, now if self._owes_extension and was_away else former.resumed)
        note = msgspec.json.encode(self._swept).decode()
        await self._database.writer.call(lambda connection: connection.execute(NOTE_SWEPT_SQL, note))
        self._owes_extension = False
        if now - self._flushing_since < SETTLE:
            return 0
        flushes = await self._postgres.fetch(FLUSHES_SQL)
        return judged_until(moment, now, (flushed for (flushed,) in flushes), self._hold)

    def _is_silent(self, row: Worker, until: int) -> bool:
        if silent(row, Now(wall=0, steady=until)) is None:
            return False
        if row.leaving is not None:
            return True
        rules = self._rules(row.source, row.id)
        return until > self._swept.resumed + int(max(rules.offline_after, rules.startup_hold) * SECOND)

    def _mark_silent(self, keys: Sequence[WorkerKey], until: int, batch: Batch) -> list[Worker]:
        marked = []
        for key in keys:
            row = batch.workers.get(key)
            if row is not None and key not in self._outdated and self._is_silent(row, until):
                after = batch.workers.mark_silent(key, until)
                marked += [] if after is None else [after]
        return marked
