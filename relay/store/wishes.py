"""What an operator wishes for deliveries: once more, now, or not at all."""

from collections.abc import Iterable

import msgspec

from relay.model import Outcome
from relay.store.batch import Batch
from relay.store.claims import Holds
from relay.store.statements import fetch
from relay.store.transaction import Transaction


def as_wished(outcomes: Iterable[Outcome], holds: Holds) -> list[Outcome]:
    """Turn what became of attempts into an end where the delivery was cancelled meanwhile."""
    return [
        msgspec.structs.replace(outcome, state="cancelled", reason="operator", next_attempt_at=None)
        if outcome.state != "delivered" and outcome.delivery.id in holds.unwanted
        else outcome
        for outcome in outcomes
    ]


async def hurry(batch: Batch, transaction: Transaction) -> None:
    """Make retries due; what waits behind another one of its key goes on waiting."""
    rows = await fetch(
        transaction,
        f"""
        WITH asked (id) AS (VALUES {{values}})
        UPDATE deliveries SET next_attempt_at = {int(batch.steady)}
         WHERE id IN (SELECT id FROM asked) AND state = 'pending' AND next_attempt_at > {int(batch.steady)}
        RETURNING id, destination
        """,  # noqa: S608 - an integer of ours
        [(delivery_id,) for delivery_id in batch.hurrying],
    )
    batch.hurried = dict(rows)


async def repeat(batch: Batch, transaction: Transaction) -> None:
    """Owe events once more, unless they are gone or pending there as it is."""
    rows = await fetch(
        transaction,
        """
        WITH asked (event_id, destination) AS (VALUES {values})
        SELECT asked.event_id, asked.destination, max(d.id), coalesce(max(d.state = 'pending'), 0)
          FROM asked JOIN events AS e ON e.id = asked.event_id
          LEFT JOIN deliveries AS d ON d.event_id = asked.event_id AND d.destination = asked.destination
         GROUP BY asked.event_id, asked.destination
        """,
        [(wish.event.id, wish.owed.destination) for wish in batch.repeating],
    )
    latest = {(event_id, name): delivery_id for event_id, name, delivery_id, pending in rows if not pending}
    for wish in batch.repeating:
        key = (wish.event.id, wish.owed.destination)
        wish.done = key in latest
        if wish.done:
            size = len(wish.event.body)
            batch.owe(wish.owed, wish.event.id, size, wish.event, replay_of=latest.pop(key))
