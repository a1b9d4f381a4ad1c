"""Writes batches to PostgreSQL: one statement if possible, otherwise several in the right order.

A batch needs several statements if a delivery waits for others (order keys, groups, `latest_by`), dies, or
is ended by an operator or a job. Deliveries end first, because a new delivery may have to wait for an earlier
one of its order key. Rows that several nodes write are sorted, so that nodes do not deadlock.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from relay.model import Delivery, DestinationState, Outcome
from relay.store.batch import LEDGER, Batch, Scope, count_transitions
from relay.store.claims import Claims
from relay.store.dedupe import Key, Keys
from relay.store.postgres import transitions
from relay.store.postgres.backlog import SharedLimits
from relay.store.postgres.connection import Connection
from relay.store.postgres.nodes import PostgresNodes
from relay.store.postgres.rows import IdSequences, text, uuid_of
from relay.store.postgres.transaction import Part, Transaction
from relay.store.postgres.worker_rows import COMMANDS, FORGOTTEN, METRICS, WORKERS, columns_of
from relay.store.postgres.workers import SharedWorkers
from relay.store.rows import command_row, event_row, measurement_row, worker_row
from relay.store.transitions import end_in_flight, handle_dead
from relay.store.worker_changes import StoredWorkerChanges
from relay.store.writer import Committer, Job

ANY_REQUEST = b""
"""Identity in `dedupe` of a key that only one request may use."""

KEYS_SQL = """
    SELECT r.number,
           (SELECT d.event_id FROM dedupe AS d
             WHERE d.source = r.source AND d.key = r.key AND d.identity IN (r.identity, r.body)
               AND d.expires_at > $5
             ORDER BY d.expires_at LIMIT 1),
           EXISTS (SELECT 1 FROM dedupe AS d
                    WHERE d.source = r.source AND d.key = r.key AND d.expires_at > $5)
      FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bytea[]) WITH ORDINALITY
           AS r (source, key, identity, body, number)
"""

EVENTS = Part("""
    new_events AS (
        INSERT INTO events (id, public_id, source, type, subject, received_at, content_type, traceparent,
                            sha256, size, context, data_at, data_size, data, body)
        SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::bigint[],
                             $7::text[], $8::text[], $9::bytea[], $10::int[], $11::bytea[], $12::int[],
                             $13::int[], $14::bytea[], $15::bytea[]))
""")

PLAIN_DELIVERIES = Part("""
    fresh AS (
        SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::bigint[], $4::text[], $5::int[])
               AS f (id, public_id, event_id, destination, size)),
    new_deliveries AS (
        INSERT INTO deliveries (id, public_id, event_id, destination, created_at)
        SELECT id, public_id, event_id, destination, $6::bigint FROM fresh),
    new_owed AS (
        INSERT INTO owed (id, public_id, event_id, destination, created_at, size, next_attempt_at)
        SELECT id, public_id, event_id, destination, $6::bigint, size, $7::bigint FROM fresh)
""")

DELIVERIES = Part("""
    fresh AS (
        SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::bigint[], $4::text[], $5::int[], $6::bigint[],
                             $7::text[], $8::text[], $9::bigint[], $10::text[], $11::bigint[], $12::text[],
                             $13::text[], $14::text[], $15::int[])
               AS f (id, public_id, event_id, destination, size, due, order_key, latest_key, expires_at,
                     on_dead, replay_of, group_key, state, reason, slot)),
    new_deliveries AS (
        INSERT INTO deliveries (id, public_id, event_id, destination, created_at, order_key, latest_key,
                                expires_at, on_dead, replay_of, group_key)
        SELECT id, public_id, event_id, destination, $16::bigint, order_key, latest_key, expires_at, on_dead,
               replay_of, group_key
          FROM fresh),
    new_owed AS (
        INSERT INTO owed (id, public_id, event_id, destination, created_at, size, next_attempt_at, order_key,
                          latest_key, expires_at, on_dead, replay_of, group_key, slot)
        SELECT id, public_id, event_id, destination, $16::bigint, size, due, order_key, latest_key,
               expires_at, on_dead, replay_of, group_key, slot
          FROM fresh WHERE state IS NULL),
    new_ends AS (
        INSERT INTO ends (delivery_id, event_id, destination, state, reason, attempts, finished_at)
        SELECT id, event_id, destination, state, reason, 0, $16::bigint FROM fresh WHERE state IS NOT NULL)
""")

# An outcome counts only if its delivery is still pending and nobody has recorded another attempt meanwhile. A
# failure does not count, either, if another node owns the lane now: its attempt in flight may succeed.
ENDS = Part(
    """
    gone AS (
        DELETE FROM owed AS o
         USING unnest($1::bigint[], $2::int[], $3::int[], $4::text[], $5::text[], $6::int[], $7::text[],
                      $8::text[])
               AS s (id, before, attempts, state, reason, status, error, lease)
         WHERE o.id = s.id
           AND (s.state = 'delivered' OR NOT EXISTS (
                SELECT FROM leases AS l WHERE l.name = s.lease
                   AND l.incarnation <> $9::uuid AND l.until > clock_timestamp()))
           AND o.attempts = s.before
        RETURNING o.id, o.event_id, o.destination, s.state, s.reason, s.attempts, s.status, s.error),
    ended AS (
        INSERT INTO ends (delivery_id, event_id, destination, state, reason, attempts, finished_at,
                          last_status, last_error)
        SELECT id, event_id, destination, state, reason, attempts, $10::bigint, status, error FROM gone)
    """,
    "SELECT id FROM gone",
)

DELIVERED = Part(
    """
    done AS (
        SELECT * FROM unnest($1::bigint[], $2::int[], $3::bigint[], $4::bigint[], $5::float8[], $6::int[],
                             $7::bool[], $8::bytea[])
               AS d (id, before, attempt_id, started_at, duration_ms, status, truncated, answer)),
    gone AS (
        DELETE FROM owed AS o
         USING done AS s
         WHERE o.id = s.id AND o.attempts = s.before
        RETURNING o.id, o.event_id, o.destination, 'delivered'::text AS state, s.before + 1 AS attempts,
                  s.status),
    ended AS (
        INSERT INTO ends (delivery_id, event_id, destination, state, attempts, finished_at, last_status)
        SELECT id, event_id, destination, state, attempts, $9::bigint, status FROM gone),
    new_attempts AS (
        INSERT INTO attempts (id, delivery_id, started_at, duration_ms, result, status, truncated, answer)
        SELECT attempt_id, id, started_at, duration_ms, 'ok', status, truncated, answer FROM done)
    """,
    "SELECT id FROM gone",
)
"""`ENDS` and `ATTEMPTS` of a batch whose attempts were all successful: less than half as many values."""

RETRIES = Part(
    """
    again AS (
        UPDATE owed AS o
           SET attempts = s.attempts, next_attempt_at = s.due, last_status = s.status, last_error = s.error
          FROM unnest($1::bigint[], $2::int[], $3::int[], $4::bigint[], $5::int[], $6::text[], $7::text[])
               AS s (id, before, attempts, due, status, error, lease)
         WHERE o.id = s.id
           AND NOT EXISTS (
               SELECT FROM leases AS l WHERE l.name = s.lease
                  AND l.incarnation <> $8::uuid AND l.until > clock_timestamp())
           AND o.attempts = s.before
        RETURNING o.id)
    """,
    "SELECT id FROM again",
)

ATTEMPTS = Part("""
    new_attempts AS (
        INSERT INTO attempts (id, delivery_id, started_at, duration_ms, result, status, error, truncated,
                              group_id, group_size, answer)
        SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::float8[], $5::text[], $6::int[],
                             $7::text[], $8::bool[], $9::text[], $10::int[], $11::bytea[]))
""")

_LEDGER_SQL = f"""
    counted AS (
        INSERT INTO ledger AS l (slot, destination, {", ".join(LEDGER)})
        SELECT $1::int, t.destination, {", ".join(f"sum(t.{column})::bigint" for column in LEDGER)}
          FROM (SELECT * FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[],
                                     $7::bigint[])
                       AS u (destination, {", ".join(LEDGER)}) %s) AS t
         GROUP BY t.destination ORDER BY t.destination
        ON CONFLICT (slot, destination)
        DO UPDATE SET {", ".join(f"{column} = l.{column} + excluded.{column}" for column in LEDGER)})
"""  # noqa: S608 - only constants

# If another node has lowered the ceiling meanwhile, `created` becomes NULL, and the statement fails.
_CHECKED_SQL = _LEDGER_SQL.replace(
    "SET created = l.created + excluded.created",
    """SET created = CASE WHEN excluded.destination <> ALL($8::text[])
                                 OR l.created + excluded.created <= l.ceiling
                               THEN l.created + excluded.created END""",
)

_ENDED_SQL = ", ".join(f"(state = '{column}')::int" for column in LEDGER[1:])
_ENDED_SQL = f"UNION ALL SELECT destination, 0, {_ENDED_SQL} FROM gone"  # noqa: S608 - only constants

COUNTS, COUNTS_WITH_ENDS = Part(_LEDGER_SQL % ""), Part(_LEDGER_SQL % _ENDED_SQL)
"""The second also counts the deliveries that the part `ENDS` of the same statement has ended."""

CHECKED = {COUNTS: Part(_CHECKED_SQL % ""), COUNTS_WITH_ENDS: Part(_CHECKED_SQL % _ENDED_SQL)}
"""The same with a check of ceilings; see `relay.store.postgres.backlog`."""

STATS = Part("""
    hours AS (
        INSERT INTO stats AS s (slot, hour, source, type, events, duplicates, bytes)
        SELECT $1::int, * FROM unnest($2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                                      $7::bigint[])
        ON CONFLICT (hour, source, type, slot)
        DO UPDATE SET events = s.events + excluded.events, duplicates = s.duplicates + excluded.duplicates,
                      bytes = s.bytes + excluded.bytes)
""")

# A key that another node has stored meanwhile makes the statement fail: `expires_at` must not be NULL. The
# batch is then written again, and finds that key.
KEYS = Part("""
    new_keys AS (
        INSERT INTO dedupe AS d (source, key, identity, event_id, expires_at)
        SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::uuid[], $5::bigint[])
        ON CONFLICT (source, key, identity)
        DO UPDATE SET event_id = excluded.event_id,
                      expires_at = CASE WHEN d.expires_at <= $6::bigint THEN excluded.expires_at END)
""")

REPEATED = Part("""
    repeated AS (
        INSERT INTO repetitions AS p (event_id, requests)
        SELECT e.id, r.requests FROM unnest($1::uuid[], $2::int[]) AS r (public_id, requests)
          JOIN events AS e USING (public_id) ORDER BY e.id
        ON CONFLICT (event_id) DO UPDATE SET requests = p.requests + excluded.requests)
""")

REPEATED_HERE = Part("""
    repeated_here AS (
        INSERT INTO repetitions (event_id, requests) SELECT * FROM unnest($1::bigint[], $2::int[]))
""")
"""Repetitions of events that the same statement stores."""

_STATE_COLUMNS = DestinationState.__struct_fields__
_STATE_TYPES = {"name": "text", "paused": "bool", "disabled_reason": "text", "circuit_opened": "text"}
STATES = Part(f"""
    new_states AS (
        INSERT INTO destinations ({", ".join(_STATE_COLUMNS)})
        SELECT s.* FROM unnest({
    ", ".join(f"${n}::{_STATE_TYPES.get(c, 'bigint')}[]" for n, c in enumerate(_STATE_COLUMNS, 1))
}) AS s ({", ".join(_STATE_COLUMNS)})
         WHERE NOT EXISTS (
               SELECT FROM leases AS l WHERE l.name = 'lane:' || s.name
                  AND l.incarnation <> ${len(_STATE_COLUMNS) + 1}::uuid AND l.until > clock_timestamp())
        ON CONFLICT (name) DO UPDATE SET {", ".join(f"{c} = excluded.{c}" for c in _STATE_COLUMNS[1:])})
""")  # noqa: S608 - only constants

PAUSES = Part("""
    new_pauses AS (
        INSERT INTO sources (name, paused) SELECT * FROM unnest($1::text[], $2::bool[])
        ON CONFLICT (name) DO UPDATE SET paused = excluded.paused)
""")

RETRIED = Part("""
    retried AS (
        UPDATE refused AS r SET retried_at = $3::bigint, event_id = n.event_id
          FROM unnest($1::text[], $2::text[]) AS n (public_id, event_id) WHERE r.public_id = n.public_id)
""")


class PostgresCommitter(Committer):
    """Writes batches to PostgreSQL."""

    sequences: IdSequences
    nodes: PostgresNodes | None = None  # None: this daemon uses the database alone
    limits: SharedLimits | None = None  # None if `nodes` is None
    shared_workers: SharedWorkers | None = None  # None if `nodes` is None
    note_retry: Callable[[Outcome], None]  # see `PostgresDeliveries.note_retry`; set when the store is made

    async def begin(self, transaction: Transaction, jobs: Sequence[Job[Any]]) -> Batch:
        """Return an empty batch whose row ids begin at the current time."""
        if self.nodes is not None:
            if self.limits is not None and self.nodes.slot != self.sequences.slot:
                self.limits.forget()
            self.sequences.use(self.nodes.slot)
        self.sequences.lift(self._clock.wall())
        if self.shared_workers is not None:
            await self.shared_workers.prepare(transaction, jobs)
        batch = await super().begin(transaction, jobs)
        if self.nodes is not None:
            batch.scope, batch.incarnation = self.nodes.scope, self.nodes.incarnation
        return batch

    def publish(self, batch: Batch) -> None:
        """See `Committer.publish`; also wakes the lanes of other nodes."""
        if self.nodes is not None:
            self._wake_others(batch, self.nodes)
        super().publish(batch)
        for outcome in batch.outcomes:
            if outcome.next_attempt_at is not None:
                self.note_retry(outcome)
        if self.shared_workers is not None and batch.worker_changes is not None:
            self.shared_workers.note_committed(batch.worker_changes)

    def forget(self) -> None:
        """See `Committer.forget`."""
        super().forget()
        if self.shared_workers is not None:
            self.shared_workers.note_undone()
        if self.limits is not None:
            self.limits.forget()

    def _wake_others(self, batch: Batch, nodes: PostgresNodes) -> None:
        """Announce the due deliveries of lanes that other nodes own; this node does not claim them."""
        scope, mine = nodes.scope, nodes.scope.mine
        if scope.shards:
            mine = scope.whole
        names = {delivery.destination for delivery in batch.due}
        if names - mine:
            batch.due = [each for each in batch.due if scope.owns(each.destination, each.slot)]
        if batch.due and batch.scope is not scope:
            self._leave_regained(batch, scope, nodes)
        if others := (names | batch.woken | batch.later.keys()) - mine:
            nodes.announce(others, since=batch.steady)
        if hurried := set(batch.made_due.values()) - mine:
            nodes.announce(hurried, since=batch.steady, retries=True)

    def _leave_regained(self, batch: Batch, scope: Scope, nodes: PostgresNodes) -> None:
        """Let the lanes that this node has taken during the transaction read their new deliveries.

        Another node may have sent them between the commit and its answer.
        """
        before = {} if batch.scope is None else batch.scope.epochs
        kept, names = [], set()
        for delivery in batch.due:
            lane = scope.lane_of(delivery.destination, delivery.slot)
            if before.get(lane) == scope.epochs.get(lane):
                kept.append(delivery)
            else:
                names.add(delivery.destination)
        if names:
            batch.due = kept
            batch.woken |= names
            nodes.on_due(names, batch.steady, retries=False)

    async def _look_up(self, transaction: Transaction, keys: Keys, used: Sequence[Key]) -> None:
        rows = await transaction.connection.fetch(
            KEYS_SQL,
            [text(key.source) for key in used],
            [text(key.text) for key in used],
            [key.identity for key in used],
            [key.body for key in used],
            self._clock.steady(),
        )
        for number, first, is_used in rows:
            key = used[number - 1]
            found = None if first is None else f"evt_{first}"
            keys.note(key.source, key.text, key.identity, found, is_used=is_used)

    async def write(self, transaction: Transaction, batch: Batch) -> None:
        """Write a batch inside its transaction; parts that nothing depends on are written with the commit."""
        transaction.batch = batch
        if batch.reports:
            await transitions.report_changes(batch, transaction)
        if self.shared_workers is not None and batch.worker_changes is not None:
            await self.shared_workers.write(batch.worker_changes, transaction)
        with_workers = self.shared_workers is None
        await _write(batch, transaction, self._claims, self.sequences, self.limits, with_workers=with_workers)

    async def look_again(self, connection: Connection, transaction: Transaction) -> bool | None:
        """Return whether a batch is stored whose commit got no response; None: the database does not show it.

        All rows of a batch are stored or none, so one row is enough.
        """
        batch = transaction.batch
        if batch is None:
            return None
        for table, ids in (
            ("events", [event.id for event in batch.events + batch.restored]),
            ("deliveries", [delivery.id for delivery in batch.deliveries]),
            ("attempts", batch.attempt_ids),
        ):
            if ids:
                sql = f"SELECT 1 FROM {table} WHERE id = $1"  # noqa: S608 - only constants
                stored = await connection.value(sql, ids[0]) is not None
                if stored and not transaction.has_begun:
                    batch.settled = await _counted(connection, batch.outcomes)
                    batch.ledger = count_transitions(batch)
                return stored
        return None

    def note_committed(self, transaction: Transaction) -> None:
        """Note which outcomes the last statement has counted."""
        batch = transaction.batch
        if batch is not None and batch.outcomes and not transaction.has_begun:
            batch.settled = transaction.returned & {outcome.delivery.id for outcome in batch.outcomes}
            batch.ledger = count_transitions(batch)


async def _counted(connection: Connection, outcomes: Sequence[Outcome]) -> frozenset[int]:
    """Return the deliveries whose outcomes a commit without an answer has counted."""
    rows = await connection.fetch(
        """
        SELECT s.id FROM unnest($1::bigint[], $2::int[]) AS s (id, attempts)
         WHERE EXISTS (SELECT 1 FROM ends AS e WHERE e.delivery_id = s.id AND e.attempts = s.attempts)
            OR EXISTS (SELECT 1 FROM owed AS o WHERE o.id = s.id AND o.attempts = s.attempts)
        """,
        [outcome.delivery.id for outcome in outcomes],
        [outcome.delivery.attempts + outcome.counts for outcome in outcomes],
    )
    return frozenset(id_ for (id_,) in rows)


async def _write(
    batch: Batch,
    transaction: Transaction,
    claims: Claims,
    sequences: IdSequences,
    limits: SharedLimits | None,
    *,
    with_workers: bool,
) -> None:
    if batch.worker_changes is not None:
        batch.add_all_generated()
    if batch.outcomes and (claims.cancelled or claims.superseded):  # before keys are locked
        batch.outcomes = end_in_flight(batch.outcomes, claims)
    counts = COUNTS
    is_near = limits is not None and limits.is_near(batch)
    requested = transitions.NOTHING
    if transitions.is_requested(batch):
        requested = await transitions.find_requested(batch, transaction)
    await transitions.lock_keys(batch, transaction, requested, is_near=is_near)
    if batch.outcomes:
        counts = await _write_outcomes(batch, transaction, sequences, is_near=is_near)
    if transitions.is_requested(batch):
        await transitions.write_requested(batch, transaction, claims, requested)
    _add_events(batch, transaction, sequences.slot)
    if batch.deliveries:
        if batch.limits and limits is not None:
            await limits.decide(batch, transaction, sequences.slot)
        await _add_deliveries(batch, transaction, claims)
    await transitions.forget_reserved(transaction)
    _add_others(batch, transaction, with_workers=with_workers)
    batch.ledger = count_transitions(batch)
    if batch.ledger or counts is COUNTS_WITH_ENDS:
        rows, more = batch.ledger.values(), []
        if batch.checked:
            counts, more = CHECKED[counts], [list(batch.checked)]
        columns = [[row[column] for row in rows] for column in LEDGER]
        transaction.add(counts, sequences.slot, list(batch.ledger), *columns, *more)


async def _write_outcomes(
    batch: Batch, transaction: Transaction, sequences: IdSequences, *, is_near: bool
) -> Part:
    """Add the outcomes, and write them now if other statements follow; returns the ledger's part."""
    ends = _add_outcomes(batch, transaction, sequences)
    if not (
        transaction.has_begun
        or is_near
        or batch.ungrouped
        or transitions.is_requested(batch)
        or any(map(_has_consequences, batch.outcomes))
        or any(map(transitions.waits_for_others, batch.deliveries))
    ):
        return COUNTS_WITH_ENDS if ends else COUNTS
    await transaction.run()
    batch.settled = transaction.returned & {outcome.delivery.id for outcome in batch.outcomes}
    await transitions.after_outcomes(batch, transaction)
    if dead := [
        each for each in batch.outcomes if each.state == "dead" and each.delivery.id in batch.settled
    ]:
        handle_dead(batch, dead)
    return COUNTS


def _has_consequences(outcome: Outcome) -> bool:
    """Return whether an outcome creates events or deliveries, or makes another delivery due."""
    return outcome.state == "dead" or (outcome.state != "pending" and outcome.delivery.order_key is not None)


def _add_outcomes(batch: Batch, transaction: Transaction, sequences: IdSequences) -> bool:
    """Add the new states of deliveries, and the attempts; returns whether a delivery ends."""
    if all(map(_is_success, batch.outcomes)):
        _add_successes(batch, transaction, sequences)
        return True
    ends: dict[int, tuple[Any, ...]] = {}
    retries: dict[int, tuple[Any, ...]] = {}
    attempts = []
    for outcome in batch.outcomes:
        delivery, attempt = outcome.delivery, outcome.attempt
        status, error = (None, outcome.reason) if attempt is None else (attempt.status, attempt.error)
        before = delivery.attempts
        if outcome.state == "pending":
            retries[delivery.id] = (
                delivery.id, before, before + outcome.counts, outcome.next_attempt_at, status, text(error),
                _lease_of(batch, delivery),
            )  # fmt: skip
        elif delivery.id not in ends:
            ends[delivery.id] = (
                delivery.id, before, before + outcome.counts, outcome.state, outcome.reason, status,
                text(error), _lease_of(batch, delivery),
            )  # fmt: skip
        if attempt is not None:
            attempts.append(
                (
                    sequences.next_attempt(), delivery.id, attempt.started_at, attempt.duration_ms,
                    attempt.result, attempt.status, text(attempt.error), attempt.truncated, attempt.group_id,
                    attempt.group_size, attempt.answer,
                )
            )  # fmt: skip
    if ends:
        transaction.add(ENDS, *_columns(ends.values()), batch.incarnation, batch.wall)
    if retries:
        rows = _columns(row for id_, row in retries.items() if id_ not in ends)
        transaction.add(RETRIES, *rows, batch.incarnation)
    if attempts:
        batch.attempt_ids = [row[0] for row in attempts]
        transaction.add(ATTEMPTS, *_columns(attempts))
    return bool(ends)


def _lease_of(batch: Batch, delivery: Delivery) -> str | None:
    """Return the lease of a delivery's lane; None: this daemon uses the database alone."""
    if batch.scope is None:
        return None
    return f"lane:{batch.scope.lane_of(delivery.destination, delivery.slot)}"


def _is_success(outcome: Outcome) -> bool:
    """Return whether `DELIVERED` can write an outcome."""
    attempt = outcome.attempt
    return (
        outcome.state == "delivered"
        and outcome.counts
        and attempt is not None
        and attempt.result == "ok"
        and attempt.error is None
        and attempt.group_id is None
    )


def _add_successes(batch: Batch, transaction: Transaction, sequences: IdSequences) -> None:
    deliveries = [outcome.delivery for outcome in batch.outcomes]
    attempts = [outcome.attempt for outcome in batch.outcomes if outcome.attempt is not None]
    batch.attempt_ids = [sequences.next_attempt() for _ in attempts]
    transaction.add(
        DELIVERED,
        [delivery.id for delivery in deliveries],
        [delivery.attempts for delivery in deliveries],
        batch.attempt_ids,
        [attempt.started_at for attempt in attempts],
        [attempt.duration_ms for attempt in attempts],
        [attempt.status for attempt in attempts],
        [attempt.truncated for attempt in attempts],
        [attempt.answer for attempt in attempts],
        batch.wall,
    )


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return list(map(list, zip(*rows, strict=True)))


def _add_events(batch: Batch, transaction: Transaction, slot: int) -> None:
    if batch.stats:
        rows = sorted(batch.stats.items())
        transaction.add(
            STATS,
            slot,
            [hour for (hour, _, _), _ in rows],
            [text(source) for (_, source, _), _ in rows],
            [text(type_) for (_, _, type_), _ in rows],
            *_columns(counts for _, counts in rows),
        )
    events = batch.events + batch.restored if batch.restored else batch.events
    if batch.repetitions:
        _add_repetitions(batch, transaction)
    if not events:
        return
    columns = _columns(map(event_row, events))
    columns[1] = [uuid_of(public_id) for public_id in columns[1]]
    columns[3], columns[4] = list(map(text, columns[3])), list(map(text, columns[4]))
    transaction.add(EVENTS, *columns)


def _add_repetitions(batch: Batch, transaction: Transaction) -> None:
    here = {event.public_id: event.id for event in batch.events}
    known = [(here[id_], count) for id_, count in batch.repetitions.items() if id_ in here]
    others = sorted((uuid_of(id_), count) for id_, count in batch.repetitions.items() if id_ not in here)
    if known:
        transaction.add(REPEATED_HERE, *_columns(known))
    if others:
        transaction.add(REPEATED, *_columns(others))


async def _add_deliveries(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    if not batch.ended_early and not any(map(transitions.has_options, batch.deliveries)):
        batch.due += batch.deliveries
        transaction.add(
            PLAIN_DELIVERIES,
            [delivery.id for delivery in batch.deliveries],
            [uuid_of(delivery.public_id) for delivery in batch.deliveries],
            [delivery.event_id for delivery in batch.deliveries],
            [delivery.destination for delivery in batch.deliveries],
            [delivery.size for delivery in batch.deliveries],
            batch.wall,
            batch.steady,
        )
        return
    due = await transitions.due_times(batch, transaction, claims)
    rows = []
    for delivery in batch.deliveries:
        state, reason = batch.ended_early.get(delivery.id, (None, None))
        rows.append(
            (
                delivery.id, uuid_of(delivery.public_id), delivery.event_id, delivery.destination,
                delivery.size, due.get(delivery.id), delivery.order_key, delivery.latest_key,
                delivery.expires_at, delivery.on_dead, delivery.replay_of, delivery.group_key, state, reason,
                delivery.slot,
            )
        )  # fmt: skip
    transaction.add(DELIVERIES, *_columns(rows), batch.wall)


def _add_others(batch: Batch, transaction: Transaction, *, with_workers: bool) -> None:
    """Add new idempotency keys, changes to workers, and states of destinations and sources."""
    if batch.keys is not None and batch.keys.new:
        _add_keys(batch, transaction)
    if batch.worker_changes is not None:
        _add_workers(batch.worker_changes, transaction, batch.wall, with_rows=with_workers)
    if batch.states:
        states = {state.name: state for state in batch.states}.values()
        columns = [[getattr(s, column) for s in states] for column in _STATE_COLUMNS]
        columns[-1] = list(map(text, columns[-1]))
        transaction.add(STATES, *columns, batch.incarnation)
    if batch.pauses:
        pauses = dict(batch.pauses)
        transaction.add(PAUSES, list(pauses), list(pauses.values()))
    if batch.retried:
        transaction.add(RETRIED, list(batch.retried), list(batch.retried.values()), batch.wall)


def _add_keys(batch: Batch, transaction: Transaction) -> None:
    assert batch.keys is not None  # noqa: S101 - the caller has checked it
    rows: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for source, key, identity, event_id, expires_at in batch.keys.new:
        place = text(source), text(key)
        rows[*place, identity] = (*place, identity, uuid_of(event_id), expires_at)
        if (source, key) in batch.keys.exclusive:
            rows[*place, ANY_REQUEST] = (*place, ANY_REQUEST, uuid_of(event_id), expires_at)
    transaction.add(KEYS, *_columns(row for _, row in sorted(rows.items())), batch.steady)


def _add_workers(
    changes: StoredWorkerChanges, transaction: Transaction, wall: int, *, with_rows: bool
) -> None:
    """Add the gauges and commands of workers, and with `with_rows` their rows."""
    workers = {**changes.seen, **changes.workers} if with_rows else {}
    if rows := [worker_row(w) for key, w in sorted(workers.items()) if key not in changes.forgotten]:
        transaction.add(WORKERS, *columns_of(rows, 2))
    if changes.measured:
        measured = [measurement_row(worker, wall) for _, worker in sorted(changes.measured.items())]
        transaction.add(METRICS, *columns_of(measured, 2))
    if changes.commands:
        commands = [command_row(command) for _, command in sorted(changes.commands.items())]
        transaction.add(COMMANDS, *columns_of(commands, 3))
    if changes.forgotten and with_rows:
        transaction.add(FORGOTTEN, *columns_of(sorted(changes.forgotten), 2))
