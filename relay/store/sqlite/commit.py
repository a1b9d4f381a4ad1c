"""Commits batches: writes their statements in the necessary order, and applies them to memory afterwards.

Deliveries end first, because a new delivery may have to wait for an earlier one of its order key.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from relay.model import Delivery
from relay.store.batch import LEDGER, Batch, count_transitions
from relay.store.claims import Claims
from relay.store.dedupe import Key, Keys
from relay.store.rows import (
    ATTEMPT_COLUMNS,
    DELIVERY_COLUMNS,
    EVENT_COLUMNS,
    STATE_COLUMNS,
    STATS_COLUMNS,
    attempt_row,
    delivery_row,
    event_row,
)
from relay.store.sqlite import event_times
from relay.store.sqlite.transaction import Transaction
from relay.store.sqlite.transitions import cancel, end, expire, expire_held, free, make_due, repeat
from relay.store.sqlite.workers import write_workers
from relay.store.transitions import (
    SUPERSEDED,
    Reported,
    add_reports,
    end_in_flight,
    group_times,
    handle_dead,
    supersede,
)
from relay.store.writer import Committer

log = logging.getLogger("relay.store")

REPEATED_SQL = """
    WITH repeated (public_id, requests) AS (VALUES {values})
    INSERT INTO repetitions (event_id, requests)
    SELECT e.id, repeated.requests FROM repeated JOIN events AS e USING (public_id) WHERE true
        ON CONFLICT (event_id) DO UPDATE SET requests = requests + excluded.requests
"""

KEYS_SQL = """
    WITH request (source, key, identity, body, now) AS (VALUES {values})
    SELECT request.source, request.key, request.identity,
           (SELECT event_id FROM dedupe AS d
             WHERE d.source = request.source AND d.key = request.key
               AND d.identity IN (request.identity, request.body) AND d.expires_at > request.now
             ORDER BY d.expires_at LIMIT 1),
           EXISTS (SELECT 1 FROM dedupe AS d
                    WHERE d.source = request.source AND d.key = request.key AND d.expires_at > request.now)
      FROM request
"""

RETRIED_SQL = """
    WITH retried (public_id, event_id, at) AS (VALUES {values})
    UPDATE refused SET retried_at = retried.at, event_id = retried.event_id
      FROM retried WHERE refused.public_id = retried.public_id
"""

REPORTED_SQL = """
    WITH changed (name) AS (VALUES {values})
    SELECT name, disabled_at IS NOT NULL, circuit_opened IS NOT NULL
      FROM changed JOIN destinations USING (name)
"""

KNOWN_SQL = """
    WITH imported (id) AS (VALUES {values})
    SELECT imported.id FROM imported JOIN events ON public_id = imported.id
"""


def _adding(*columns: str) -> str:
    return ", ".join(f"{column} = {column} + excluded.{column}" for column in columns)


ADD_TO_LEDGER = f"ON CONFLICT (destination) DO UPDATE SET {_adding(*LEDGER)}"
ADD_TO_STATS = f"ON CONFLICT (hour, source, type) DO UPDATE SET {_adding('events', 'duplicates', 'bytes')}"


async def look_up(transaction: Transaction, keys: Keys, used: Sequence[Key], now: int) -> None:
    """Look up idempotency keys, and note the known ones in `keys`; `now` is steady."""
    rows = [(key.source, key.text, key.identity, key.body, now) for key in used]
    for source, text, identity, first, is_used in await transaction.fetch_rows(KEYS_SQL, rows):
        keys.note(source, text, identity, first, is_used=is_used)


def write_keys(transaction: Transaction, keys: Keys) -> None:
    """Write the new idempotency keys inside the transaction."""
    if keys.new:
        columns = "source, key, identity, event_id, expires_at"
        transaction.insert("dedupe", columns, keys.new, verb="REPLACE")


async def write(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """Write a batch inside the transaction that the caller began."""
    if batch.worker_changes is not None:
        batch.add_all_generated()
    if batch.outcomes:
        if claims.cancelled or claims.superseded:
            batch.outcomes = end_in_flight(batch.outcomes, claims)
        await _write_outcomes(batch, transaction)
    if (  # an operator or a periodic job requests changes
        batch.expire_overdue
        or batch.held
        or batch.to_cancel
        or batch.to_make_due
        or batch.to_repeat
        or batch.to_restore
        or batch.states
        or batch.pauses
        or batch.retried
    ):
        await _write_requested(batch, transaction, claims)
    if batch.stats or batch.events or batch.restored:
        _write_events(batch, transaction)
    if batch.deliveries:
        await _write_deliveries(batch, transaction, claims)
    if batch.keys is not None:
        write_keys(transaction, batch.keys)
    if batch.worker_changes is not None:
        write_workers(batch.worker_changes, transaction, batch.wall)
    batch.ledger = count_transitions(batch)
    if batch.ledger:
        totals = [(name, *columns.values()) for name, columns in batch.ledger.items()]
        transaction.insert("ledger", f"destination, {', '.join(LEDGER)}", totals, then=ADD_TO_LEDGER)


async def _write_requested(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """Write the changes that operators and periodic jobs request."""
    if batch.expire_overdue:
        await expire(batch, transaction, claims)
    if batch.held is not None:
        await expire_held(batch, transaction, claims, batch.held)
    if batch.to_cancel:
        await cancel(batch, transaction, claims)
    if batch.to_make_due:
        await make_due(batch, transaction)
    if batch.to_repeat:
        await repeat(batch, transaction)
    if batch.to_restore:
        await _restore(batch, transaction)
    if batch.states:
        await _write_states(batch, transaction)
    if batch.pauses:
        transaction.insert("sources", "name, paused", batch.pauses, verb="REPLACE")
    if batch.retried:
        transaction.run_rows(RETRIED_SQL, [(*each, batch.wall) for each in batch.retried.items()])


async def _write_states(batch: Batch, transaction: Transaction) -> None:
    """Write the states of destinations, and add the operator events about their changes."""
    if batch.reports:
        rows = await transaction.fetch_rows(REPORTED_SQL, [(state.name,) for state, _ in batch.reports])
        add_reports(batch, {name: Reported(bool(disabled), bool(open_)) for name, disabled, open_ in rows})
    states = [msgspec.structs.astuple(state) for state in batch.states]
    transaction.insert("destinations", STATE_COLUMNS, states, verb="REPLACE")


async def _restore(batch: Batch, transaction: Transaction) -> None:
    """Add the events of an export that are not stored yet."""
    rows = await transaction.fetch_rows(KNOWN_SQL, [(each.event.public_id,) for each in batch.to_restore])
    known = {public_id for (public_id,) in rows}
    for each in batch.to_restore:
        each.done = each.event.public_id not in known
        if each.done:
            known.add(each.event.public_id)
            batch.put_back(each)


def _write_events(batch: Batch, transaction: Transaction) -> None:
    if batch.stats:
        counted = [(*key, *counts) for key, counts in batch.stats.items()]
        transaction.insert("stats", STATS_COLUMNS, counted, then=ADD_TO_STATS)
    if batch.repetitions:
        transaction.run_rows(REPEATED_SQL, list(batch.repetitions.items()))
    events = batch.events + batch.restored
    if not events:
        return
    transaction.insert("events", EVENT_COLUMNS, [event_row(event) for event in events])
    times: dict[int, tuple[int, int]] = {}
    for event in events:
        block, at = event.id >> event_times.SHIFT, event.received_at
        first, last = times.get(block, (at, at))
        times[block] = (min(first, at), max(last, at))
    rows = [(block, *between) for block, between in times.items()]
    transaction.insert("event_times", "block, first, last", rows, then=event_times.WIDEN)


async def _write_outcomes(batch: Batch, transaction: Transaction) -> None:
    """Write every attempt, and the new state of each delivery that is still pending (compare-and-set)."""
    settled = await transaction.fetch_rows(
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
        [
            (
                outcome.delivery.id,
                outcome.state,
                outcome.reason,
                outcome.delivery.attempts + outcome.counts,
                outcome.next_attempt_at if outcome.state == "pending" else None,
                None if outcome.state == "pending" else batch.wall,
                outcome.attempt.status if outcome.attempt is not None else None,
                outcome.attempt.error if outcome.attempt is not None else outcome.reason,
            )
            for outcome in batch.outcomes
        ],
    )
    batch.settled = frozenset(id_ for (id_,) in settled)
    attempts = [
        attempt_row(outcome.delivery.id, outcome.attempt)
        for outcome in batch.outcomes
        if outcome.attempt is not None
    ]
    if batch.with_groups:
        _write_group_attempts(batch, transaction, attempts)
    elif attempts:
        transaction.insert("attempts", ATTEMPT_COLUMNS, attempts)
    freed = [
        (outcome.delivery.destination, outcome.delivery.order_key)
        for outcome in batch.outcomes
        if outcome.state != "pending" and outcome.delivery.order_key is not None
    ]
    if freed:
        await free(batch, transaction, freed)
    dead = [each for each in batch.outcomes if each.state == "dead" and each.delivery.id in batch.settled]
    if dead:
        handle_dead(batch, dead)


def _write_group_attempts(batch: Batch, transaction: Transaction, attempts: Sequence[Any]) -> None:
    """Write attempts, including those of one message for several deliveries, and split groups."""
    made = [outcome.attempt for outcome in batch.outcomes if outcome.attempt is not None]
    rows = [
        (*row[:-1], attempt.group_id, attempt.group_size, row[-1])
        for row, attempt in zip(attempts, made, strict=True)
    ]
    *columns, last = ATTEMPT_COLUMNS.split(", ")
    transaction.insert("attempts", ", ".join((*columns, "group_id", "group_size", last)), rows)
    if batch.ungrouped:
        transaction.run_rows(
            """
            WITH alone (id) AS (VALUES {values})
            UPDATE deliveries SET group_key = NULL FROM alone WHERE deliveries.id = alone.id
            """,
            [(delivery_id,) for delivery_id in batch.ungrouped],
        )


async def _write_deliveries(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """Insert new deliveries. They may supersede older ones, or wait behind an earlier one of their key."""
    ordered = [d for d in batch.deliveries if d.order_key is not None]
    latest = [d for d in batch.deliveries if d.latest_key is not None]
    if latest:
        await _supersede(batch, transaction, claims, latest)
    busy: set[tuple[str, str | None]] = await _busy_keys(transaction, ordered) if ordered else set()
    times = await _group_times(batch, transaction) if batch.groupings else {}
    rows, grouped = [], []
    for delivery in batch.deliveries:
        if (ending := batch.ended_early.get(delivery.id)) is not None:
            rows.append(delivery_row(delivery, ending[0], ending[1], None, batch.wall))
            continue
        key = (delivery.destination, delivery.order_key)
        behind = delivery.order_key is not None and key in busy
        busy.add(key)
        if delivery.id in times:
            at = None if behind else times[delivery.id]
            grouped.append((*delivery_row(delivery, "pending", None, at, None), delivery.group_key))
            if at is not None:
                batch.later[delivery.destination] = min(at, batch.later.get(delivery.destination, at))
            continue
        rows.append(delivery_row(delivery, "pending", None, None if behind else batch.steady, None))
        if not behind:
            batch.due.append(delivery)
    transaction.insert("deliveries", DELIVERY_COLUMNS, rows)
    if grouped:
        transaction.insert("deliveries", f"{DELIVERY_COLUMNS}, group_key", grouped)


async def _group_times(batch: Batch, transaction: Transaction) -> dict[int, int]:
    """Return when each new delivery is due: together with a waiting group, or with a new one.

    The first delivery of a group begins its wait, and all have the same due time. A group that is due
    already, because it is in flight or its destination is held, takes no more. A full group is due at once.
    """
    wanted = [d for d in batch.deliveries if d.id in batch.groupings and d.id not in batch.ended_early]
    places = list({(d.destination, d.group_key) for d in wanted})
    if not places:
        return {}
    waiting = await transaction.fetch_rows(
        f"""
        WITH asked (destination, group_key) AS (VALUES {{values}})
        SELECT asked.destination, asked.group_key, count(*), min(d.next_attempt_at)
          FROM asked JOIN deliveries AS d USING (destination, group_key)
         WHERE d.state = 'pending' AND d.attempts = 0 AND d.next_attempt_at > {int(batch.steady)}
         GROUP BY 1, 2
        """,  # noqa: S608 - only an integer
        places,
    )
    times, full = group_times(batch, wanted, waiting)
    if full:
        transaction.run_rows(
            f"""
            WITH filled (destination, group_key) AS (VALUES {{values}})
            UPDATE deliveries SET next_attempt_at = {int(batch.steady)} FROM filled
             WHERE deliveries.destination = filled.destination AND deliveries.group_key = filled.group_key
               AND deliveries.state = 'pending' AND deliveries.attempts = 0
               AND deliveries.next_attempt_at > {int(batch.steady)}
            """,  # noqa: S608 - only an integer
            full,
        )
    return times


async def _busy_keys(transaction: Transaction, deliveries: Sequence[Delivery]) -> set[tuple[str, str | None]]:
    """Return those (destination, order key) pairs of deliveries that have an earlier pending delivery."""
    keys = list({(d.destination, d.order_key) for d in deliveries})
    rows = await transaction.fetch_rows(
        """
        WITH wanted (destination, order_key) AS (VALUES {values})
        SELECT destination, order_key FROM wanted
         WHERE EXISTS (SELECT 1 FROM deliveries AS d
                        WHERE d.destination = wanted.destination AND d.order_key = wanted.order_key
                          AND d.state = 'pending')
        """,
        keys,
    )
    return {(destination, order_key) for destination, order_key in rows}


async def _supersede(
    batch: Batch, transaction: Transaction, claims: Claims, deliveries: Sequence[Delivery]
) -> None:
    """Expire deliveries that a newer event of the same `latest_by` key supersedes, stored and in this batch.

    Events are compared, not deliveries: a replay of an old event does not supersede a newer event.
    """
    generated = [d for d in deliveries if d.id not in batch.ended_early]
    pending = await transaction.fetch_rows(
        """
        WITH wanted (destination, latest_key) AS (VALUES {values})
        SELECT d.id, d.destination, d.order_key, d.latest_key, d.event_id
          FROM wanted JOIN deliveries AS d USING (destination, latest_key)
         WHERE d.state = 'pending'
        """,
        list({(d.destination, d.latest_key) for d in generated}),
    )
    older = supersede(batch, generated, pending)
    await end(batch, transaction, claims, older, SUPERSEDED)


class SqliteCommitter(Committer):
    """Writes batches to SQLite."""

    async def _look_up(self, transaction: Transaction, keys: Keys, used: Sequence[Key]) -> None:
        await look_up(transaction, keys, used, self._clock.steady())

    async def write(self, transaction: Transaction, batch: Batch) -> None:
        """Write a batch inside its transaction."""
        await write(batch, transaction, self._claims)
