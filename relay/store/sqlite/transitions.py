"""Transitions of pending deliveries inside a transaction, except those after an attempt.

Deliveries expire (past their time to live, superseded, or held for too long), are cancelled, are made due,
and are repeated as new deliveries. When a delivery of an order key ends, the next one of the key becomes due.
"""

from collections.abc import Sequence

from relay.store.batch import Batch, Ending, HeldDestinations
from relay.store.claims import Claims
from relay.store.sqlite.transaction import Row, Transaction
from relay.store.transitions import (
    CANCELLED,
    EXPIRE_AT_ONCE,
    HELD_AT_ONCE,
    MARKS,
    SUPERSEDED,
    Pending,
    by_ending,
    held_changes,
    is_warning_due,
    warn_of_expiry,
)

# A delivery that waits behind an earlier one of its order key has no due time; its creation time counts.
# Waiting deliveries end first, so that the end of an earlier one does not make them due.
WAITING_SQL = """
    SELECT id, destination, order_key FROM (
           SELECT id, destination, order_key, created_at FROM deliveries
            WHERE destination = ? AND state = 'pending' AND attempts = 0 AND next_attempt_at IS NULL
            ORDER BY id LIMIT ?)
     WHERE created_at <= ?
"""
DUE_SQL = """
    SELECT id, destination, order_key FROM deliveries
     WHERE destination = ? AND state = 'pending' AND attempts {share} 0 AND next_attempt_at <= ?
     ORDER BY next_attempt_at, id LIMIT ?
"""
AHEAD_SQL = """
    UPDATE deliveries SET next_attempt_at = :now
     WHERE state = 'pending' AND next_attempt_at > :now
       AND (event_id IN (SELECT id FROM events WHERE received_at > :ahead)
            OR id IN (SELECT delivery_id FROM attempts WHERE started_at > :ahead))
"""
FIRST_SQL = """
    SELECT min(next_attempt_at) FROM deliveries
     WHERE destination = ? AND state = 'pending' AND attempts {share} 0
"""
SHARES = ("=", ">")  # first attempts and retries, as the partial indexes have them


async def expire(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """End deliveries that have reached their `expires_at`; for those in flight, the outcome decides."""
    rows = await transaction.fetch(
        """
        SELECT id, destination, order_key, expires_at FROM deliveries
         WHERE state = 'pending' AND expires_at <= ? ORDER BY expires_at LIMIT ?
        """,
        (batch.steady, EXPIRE_AT_ONCE),
    )
    for ending, ended in by_ending(rows).items():
        await end(batch, transaction, claims, ended, ending)


async def cancel(batch: Batch, transaction: Transaction, claims: Claims) -> None:
    """Cancel deliveries for an operator; for those in flight, the outcome decides."""
    rows = await transaction.fetch_rows(
        """
        WITH chosen (id) AS (VALUES {values})
        SELECT id, destination, order_key FROM deliveries
         WHERE id IN (SELECT id FROM chosen) AND state = 'pending'
        """,
        [(delivery_id,) for delivery_id in dict.fromkeys(batch.to_cancel)],
    )
    await end(batch, transaction, claims, rows, CANCELLED)
    batch.cancelled_in_flight = {id_ for id_, _, _ in rows} - batch.ended.keys()


async def end(
    batch: Batch, transaction: Transaction, claims: Claims, rows: Sequence[Row], ending: Ending
) -> None:
    """End pending deliveries (id, destination, order key) without an attempt, except those in flight.

    A delivery whose outcome this transaction has written is no longer in flight. Those in flight that are
    cancelled or superseded are marked, because their outcomes may be lost in a crash.
    """
    candidates = [Pending(*row) for row in rows]
    ending_rows = [each for each in candidates if each.id in batch.settled or claims.end(each.id)]
    if len(ending_rows) < len(candidates) and (mark := MARKS.get(ending)) is not None:
        in_flight = {each.id for each in candidates} - {each.id for each in ending_rows}
        if ending == SUPERSEDED:
            batch.superseded_in_flight |= in_flight
        transaction.run_rows(
            f"""
            WITH marked (id) AS (VALUES {{values}})
            UPDATE deliveries SET expires_at = {mark} FROM marked
             WHERE deliveries.id = marked.id AND coalesce(expires_at, {mark + 1}) > {mark}
            """,  # noqa: S608 - only integers
            [(delivery_id,) for delivery_id in in_flight],
        )
    if not ending_rows:
        return
    state, reason = ending
    transaction.run_rows(
        """
        WITH ends (id, state, reason, finished_at) AS (VALUES {values})
        UPDATE deliveries
           SET state = ends.state, reason = ends.reason, finished_at = ends.finished_at,
               next_attempt_at = NULL
          FROM ends
         WHERE deliveries.id = ends.id
        """,
        [(each.id, state, reason, batch.wall) for each in ending_rows],
    )
    batch.ended.update({each.id: (each.destination, ending) for each in ending_rows})
    freed = [(each.destination, each.order_key) for each in ending_rows if each.order_key is not None]
    await free(batch, transaction, freed)


async def free(batch: Batch, transaction: Transaction, keys: Sequence[Row]) -> None:
    """Make the next delivery of each (destination, order key) due after an earlier one has ended."""
    if not keys:
        return
    rows = await transaction.fetch_rows(
        f"""
        WITH freed (destination, order_key) AS (VALUES {{values}})
        UPDATE deliveries SET next_attempt_at = {int(batch.steady)}
         WHERE next_attempt_at IS NULL AND id IN (
               SELECT (SELECT min(id) FROM deliveries AS d
                        WHERE d.destination = freed.destination AND d.order_key = freed.order_key
                          AND d.state = 'pending')
                 FROM freed)
        RETURNING destination
        """,  # noqa: S608 - only an integer
        keys,
    )
    batch.woken.update(destination for (destination,) in rows)


async def expire_held(batch: Batch, transaction: Transaction, claims: Claims, held: HeldDestinations) -> None:
    """Expire deliveries of destinations that accept nothing. The column `told` is 1 after the warning."""
    rows = await transaction.fetch("SELECT destination, since, told FROM held")
    changes = held_changes(batch, held, {name: (since, bool(told)) for name, since, told in rows})
    for name in changes.gone:
        transaction.run("DELETE FROM held WHERE destination = ?", (name,))
    for name in changes.new:
        transaction.run("INSERT INTO held (destination, since) VALUES (?, ?)", (name, batch.steady))
    for name, since in changes.to_warn.items():
        await _warn(batch, transaction, name, held.kept, since)
    for name in changes.to_expire:
        await _expire(batch, transaction, claims, name, changes.before)


async def _warn(batch: Batch, transaction: Transaction, name: str, kept: int, since: int) -> None:
    first = [
        due
        for share in SHARES
        for (due,) in await transaction.fetch(FIRST_SQL.format(share=share), (name,))
        if due is not None
    ]
    seconds = is_warning_due(batch, since, kept, min(first, default=None))
    if seconds is not None:
        transaction.run("UPDATE held SET told = 1 WHERE destination = ?", (name,))
        warn_of_expiry(batch, name, seconds, kept)


async def _expire(batch: Batch, transaction: Transaction, claims: Claims, name: str, before: int) -> None:
    rows = await transaction.fetch(WAITING_SQL, (name, HELD_AT_ONCE, before))
    if not rows:
        for share in SHARES:
            rows += await transaction.fetch(DUE_SQL.format(share=share), (name, before, HELD_AT_ONCE))
    await end(batch, transaction, claims, rows, ("expired", "held"))


async def make_due(batch: Batch, transaction: Transaction) -> None:
    """Make retries due; a delivery that waits behind another one of its order key keeps waiting."""
    rows = await transaction.fetch_rows(
        f"""
        WITH chosen (id) AS (VALUES {{values}})
        UPDATE deliveries SET next_attempt_at = {int(batch.steady)}
         WHERE id IN (SELECT id FROM chosen) AND state = 'pending' AND next_attempt_at > {int(batch.steady)}
        RETURNING id, destination
        """,  # noqa: S608 - only an integer
        [(delivery_id,) for delivery_id in batch.to_make_due],
    )
    batch.made_due = dict(rows)


async def repeat(batch: Batch, transaction: Transaction) -> None:
    """Create new deliveries of events, unless the event was deleted or one of its deliveries is pending."""
    rows = await transaction.fetch_rows(
        """
        WITH chosen (event_id, destination) AS (VALUES {values})
        SELECT chosen.event_id, chosen.destination, max(d.id), coalesce(max(d.state = 'pending'), 0)
          FROM chosen JOIN events AS e ON e.id = chosen.event_id
          LEFT JOIN deliveries AS d ON d.event_id = chosen.event_id AND d.destination = chosen.destination
         GROUP BY chosen.event_id, chosen.destination
        """,
        [(each.event.id, each.target.destination) for each in batch.to_repeat],
    )
    latest = {(event_id, name): delivery_id for event_id, name, delivery_id, pending in rows if not pending}
    for each in batch.to_repeat:
        key = (each.event.id, each.target.destination)
        each.done = key in latest
        if each.done:
            size = len(each.event.body)
            batch.add_delivery(each.target, each.event.id, size, each.event, replay_of=latest.pop(key))
