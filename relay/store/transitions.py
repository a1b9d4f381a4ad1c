"""Ends without an attempt: expired, cancelled, superseded; and who may go once such a one has ended."""

from collections.abc import Sequence

from relay.store.batch import Batch, Ending
from relay.store.claims import Holds
from relay.store.rows import Row
from relay.store.statements import fetch, run
from relay.store.transaction import Transaction

EXPIRE_AT_ONCE = 1000
"""Most deliveries that one transaction expires; the next follows at once."""


async def expire(batch: Batch, transaction: Transaction, holds: Holds) -> None:
    """End what is past its time to live; what is being sent ends by its outcome."""
    rows = await transaction.fetch(
        """
        SELECT id, destination, order_key FROM deliveries
         WHERE state = 'pending' AND expires_at <= ? ORDER BY expires_at LIMIT ?
        """,
        (batch.steady, EXPIRE_AT_ONCE),
    )
    await end(batch, transaction, holds, rows, ("expired", "ttl"))


async def cancel(batch: Batch, transaction: Transaction, holds: Holds) -> None:
    """End what an operator does not want any more; what is being sent ends by its outcome."""
    rows = await fetch(
        transaction,
        """
        WITH asked (id) AS (VALUES {values})
        SELECT id, destination, order_key FROM deliveries
         WHERE id IN (SELECT id FROM asked) AND state = 'pending'
        """,
        [(delivery_id,) for delivery_id in dict.fromkeys(batch.cancelling)],
    )
    await end(batch, transaction, holds, rows, ("cancelled", "operator"))
    batch.unwanted = {row[0] for row in rows} - batch.ended.keys()


async def end(
    batch: Batch, transaction: Transaction, holds: Holds, rows: Sequence[Row], ending: Ending
) -> None:
    """End pending deliveries (id, destination, order key) without an attempt, but for those in flight.

    One whose outcome has just been written by this very transaction is in flight no more.
    """
    doomed = [row for row in rows if row[0] in batch.settled or holds.doom(row[0])]
    if not doomed:
        return
    state, reason = ending
    run(
        transaction,
        """
        WITH ends (id, state, reason, finished_at) AS (VALUES {values})
        UPDATE deliveries
           SET state = ends.state, reason = ends.reason, finished_at = ends.finished_at,
               next_attempt_at = NULL
          FROM ends
         WHERE deliveries.id = ends.id
        """,
        [(row[0], state, reason, batch.wall) for row in doomed],
    )
    batch.ended.update({row[0]: (row[1], ending) for row in doomed})
    await free(batch, transaction, [(row[1], row[2]) for row in doomed if row[2] is not None])


async def free(batch: Batch, transaction: Transaction, keys: Sequence[Row]) -> None:
    """Make the next delivery of each (destination, order key) due, now that its head has ended."""
    if not keys:
        return
    rows = await fetch(
        transaction,
        f"""
        WITH freed (destination, order_key) AS (VALUES {{values}})
        UPDATE deliveries SET next_attempt_at = {int(batch.steady)}
         WHERE next_attempt_at IS NULL AND id IN (
               SELECT (SELECT min(id) FROM deliveries AS d
                        WHERE d.destination = freed.destination AND d.order_key = freed.order_key
                          AND d.state = 'pending')
                 FROM freed)
        RETURNING destination
        """,  # noqa: S608 - an integer of ours
        keys,
    )
    batch.woken.update(row[0] for row in rows)
