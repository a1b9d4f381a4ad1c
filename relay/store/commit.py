"""Writing a batch: the statements of one transaction, in the order that makes them right together.

Ends come first, because they free what new deliveries may have to wait for.
"""

from collections.abc import Sequence

from relay.model import OPERATOR_SOURCE, Born, Delivery, Outcome, Owed
from relay.store import event_times
from relay.store.batch import Batch
from relay.store.claims import Claims
from relay.store.rows import (
    ATTEMPT_COLUMNS,
    DELIVERY_COLUMNS,
    EVENT_COLUMNS,
    attempt_row,
    delivery_row,
    event_row,
)
from relay.store.transaction import Row, Transaction
from relay.store.transitions import apply_cancellations, cancel, end, expire, expire_held, free, hurry, repeat

REPEATED_SQL = """
    WITH asked (public_id, requests) AS (VALUES {values})
    INSERT INTO repetitions (event_id, requests)
    SELECT e.id, asked.requests FROM asked JOIN events AS e USING (public_id) WHERE true
        ON CONFLICT (event_id) DO UPDATE SET requests = requests + excluded.requests
"""

KNOWN_SQL = (
    "WITH asked (id) AS (VALUES {values}) SELECT asked.id FROM asked JOIN events ON public_id = asked.id"
)

BOOKS = ("created", "delivered", "dead", "expired", "cancelled")


async def write(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """Write everything, inside the transaction that the caller began."""
    batch.bear_all()
    await _write_ends(batch, transaction, claims)
    if batch.hurrying:
        await hurry(batch, transaction)
    if batch.repeating:
        await repeat(batch, transaction)
    if batch.restoring:
        await _restore(batch, transaction)
    _write_events(batch, transaction)
    if batch.deliveries:
        await _write_deliveries(batch, transaction, claims)
    batch.keys.write(transaction)
    batch.fleet.write(transaction)
    if batch.states:
        columns = "name, paused, failing_since, disabled_at, disabled_reason"
        states = [(s.name, s.paused, s.failing_since, s.disabled_at, s.disabled_reason) for s in batch.states]
        transaction.insert("destinations", columns, states, verb="REPLACE")
    if batch.pauses:
        transaction.insert("sources", "name, paused", batch.pauses, verb="REPLACE")
    if ledger := _books(batch):
        adding = ", ".join(f"{column} = {column} + excluded.{column}" for column in BOOKS)
        transaction.insert(
            "ledger",
            f"destination, {', '.join(BOOKS)}",
            ledger,
            then=f"ON CONFLICT (destination) DO UPDATE SET {adding}",
        )


async def _restore(batch: Batch, transaction: Transaction) -> None:
    """Take in the events of an export that are not stored yet."""
    rows = await transaction.fetch_rows(KNOWN_SQL, [(each.event.public_id,) for each in batch.restoring])
    known = {public_id for (public_id,) in rows}
    for each in batch.restoring:
        each.done = each.event.public_id not in known
        if each.done:
            known.add(each.event.public_id)
            batch.put_back(each)


def _write_events(batch: Batch, transaction: Transaction) -> None:
    if events := batch.events + batch.restored:
        transaction.insert("events", EVENT_COLUMNS, [event_row(event) for event in events])
        event_times.note(transaction, events)
    if batch.repetitions:
        transaction.run_rows(REPEATED_SQL, list(batch.repetitions.items()))
    batch.tallies.write(transaction)


async def _write_ends(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    if batch.outcomes:
        batch.outcomes = apply_cancellations(batch.outcomes, claims)
        await _write_outcomes(batch, transaction)
        _follow_deaths(batch)
    if batch.expiring:
        await expire(batch, transaction, claims)
    if batch.look is not None:
        await expire_held(batch, transaction, claims, batch.look)
    if batch.cancelling:
        await cancel(batch, transaction, claims)


async def _write_outcomes(batch: Batch, transaction: Transaction) -> None:
    """Move deliveries on where they are still pending (compare-and-set), and keep every attempt."""
    moved = await transaction.fetch_rows(
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
        [_move(outcome, batch.wall) for outcome in batch.outcomes],
    )
    batch.settled = frozenset(row[0] for row in moved)
    attempts = [
        attempt_row(outcome.delivery.id, outcome.attempt)
        for outcome in batch.outcomes
        if outcome.attempt is not None
    ]
    if attempts:
        transaction.insert("attempts", ATTEMPT_COLUMNS, attempts)
    freed = [
        (outcome.delivery.destination, outcome.delivery.order_key)
        for outcome in batch.outcomes
        if outcome.state != "pending" and outcome.delivery.order_key is not None
    ]
    await free(batch, transaction, freed)


def _move(outcome: Outcome, now: int) -> Row:
    ended = outcome.state != "pending"
    attempt = outcome.attempt
    return (
        outcome.delivery.id,
        outcome.state,
        outcome.reason,
        outcome.delivery.attempts + outcome.counts,
        None if ended else outcome.next_attempt_at,
        now if ended else None,
        attempt.status if attempt is not None else None,
        attempt.error if attempt is not None else outcome.reason,
    )


def _follow_deaths(batch: Batch) -> None:
    """A delivery that died is told of, and its event handed to the destination that stands in."""
    for outcome in batch.outcomes:
        delivery = outcome.delivery
        if outcome.state != "dead" or delivery.id not in batch.settled:
            continue
        if delivery.on_dead is not None:
            batch.owe(Owed(delivery.on_dead), delivery.event_id, delivery.size, delivery.event)
        if delivery.event is None or delivery.event.source != OPERATOR_SOURCE:
            batch.bear(OPERATOR_SOURCE, _death(outcome))


def _death(outcome: Outcome) -> Born:
    delivery, attempt = outcome.delivery, outcome.attempt
    event = delivery.event
    return Born(
        type="delivery.dead",
        subject=delivery.destination,
        data={
            "delivery": delivery.public_id,
            "event": event.public_id if event is not None else None,
            "type": event.type if event is not None else None,
            "destination": delivery.destination,
            "reason": outcome.reason,
            "attempts": delivery.attempts + outcome.counts,
            "last_status": attempt.status if attempt is not None else None,
            "last_error": attempt.error if attempt is not None else None,
        },
    )


async def _write_deliveries(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """Insert the new ones: some supersede older ones, some wait behind one of their key."""
    ordered = [d for d in batch.deliveries if d.order_key is not None]
    latest = [d for d in batch.deliveries if d.latest_key is not None]
    if latest:
        await _supersede(batch, transaction, claims, latest)
    busy: set[tuple[str, str | None]] = await _busy_keys(transaction, ordered) if ordered else set()
    rows = []
    for delivery in batch.deliveries:
        if (ending := batch.stillborn.get(delivery.id)) is not None:
            rows.append(delivery_row(delivery, ending[0], ending[1], None, batch.wall))
            continue
        key = (delivery.destination, delivery.order_key)
        behind = delivery.order_key is not None and key in busy
        busy.add(key)
        rows.append(delivery_row(delivery, "pending", None, None if behind else batch.steady, None))
        if not behind:
            batch.due.append(delivery)
    transaction.insert("deliveries", DELIVERY_COLUMNS, rows)


async def _busy_keys(transaction: Transaction, deliveries: Sequence[Delivery]) -> set[tuple[str, str | None]]:
    """Return the (destination, order key) pairs of these that have an earlier pending delivery."""
    keys = list({(d.destination, d.order_key) for d in deliveries})
    rows = await transaction.fetch_rows(
        """
        WITH asked (destination, order_key) AS (VALUES {values})
        SELECT destination, order_key FROM asked
         WHERE EXISTS (SELECT 1 FROM deliveries AS d
                        WHERE d.destination = asked.destination AND d.order_key = asked.order_key
                          AND d.state = 'pending')
        """,
        keys,
    )
    return {(row[0], row[1]) for row in rows}


async def _supersede(
    batch: Batch, transaction: Transaction, claims: Claims, deliveries: Sequence[Delivery]
) -> None:
    """Expire what a newer event of the same key makes pointless, in the store and in this batch.

    The event counts, not the delivery: an old one that is replayed does not supersede a newer one.
    """
    born = [d for d in deliveries if d.id not in batch.stillborn]
    pending = await transaction.fetch_rows(
        """
        WITH asked (destination, latest_key) AS (VALUES {values})
        SELECT d.id, d.destination, d.order_key, d.latest_key, d.event_id
          FROM asked JOIN deliveries AS d USING (destination, latest_key)
         WHERE d.state = 'pending'
        """,
        list({(d.destination, d.latest_key) for d in born}),
    )
    ages = [((d.destination, d.latest_key), (d.event_id, d.id)) for d in born]
    ages += [((row[1], row[3]), (row[4], row[0])) for row in pending]
    newest: dict[tuple[str, str | None], tuple[int, int]] = {}
    for key, age in ages:
        newest[key] = max(age, newest.get(key, age))
    for d in born:
        if newest[d.destination, d.latest_key] > (d.event_id, d.id):
            batch.stillborn[d.id] = ("expired", "superseded")
    older = [row for row in pending if newest[row[1], row[3]] > (row[4], row[0])]
    await end(batch, transaction, claims, older, ("expired", "superseded"))


def _books(batch: Batch) -> list[Row]:
    """What this transaction adds to the ledger, a row per destination."""
    return [(name, *columns.values()) for name, columns in sums(batch).items()]


def sums(batch: Batch) -> dict[str, dict[str, int]]:
    """Count, per destination, what a written batch created and ended."""
    found: dict[str, dict[str, int]] = {}

    def add(destination: str, column: str) -> None:
        found.setdefault(destination, dict.fromkeys(BOOKS, 0))[column] += 1

    for delivery in batch.deliveries:
        add(delivery.destination, "created")
        if delivery.id in batch.stillborn:
            add(delivery.destination, batch.stillborn[delivery.id][0])
    for outcome in batch.outcomes:
        if outcome.state != "pending" and outcome.delivery.id in batch.settled:
            add(outcome.delivery.destination, outcome.state)
    for destination, (state, _) in batch.ended.values():
        add(destination, state)
    return found
