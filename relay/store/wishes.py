"""What an operator wishes for deliveries: once more, now, or not at all."""

import asyncio
import logging
from collections.abc import Iterable, Sequence

import msgspec

from relay.model import Outcome, Owed, StoredEvent
from relay.store import Cancelled
from relay.store.batch import Batch, Repeat
from relay.store.holds import Holds
from relay.store.statements import fetch
from relay.store.transaction import Transaction
from relay.store.writer import Job, Writer

log = logging.getLogger("relay.store")


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


class Wishing:
    """The writing verbs of the store that an operator's wishes need."""

    _holds: Holds
    _writer: Writer

    async def cancel(self, delivery_ids: Sequence[int]) -> Cancelled:
        """See `Store.cancel`."""

        def apply_(batch: Batch) -> Cancelled:
            batch.cancelling += delivery_ids
            return Cancelled()

        def answer(batch: Batch, _: Cancelled) -> Cancelled:
            wished = frozenset(delivery_ids)
            return Cancelled(ended=len(wished & batch.ended.keys()), in_flight=len(wished & batch.unwanted))

        return await self._writer.submit(Job(apply_, answer=answer))

    def _cancel_again(self, delivery_ids: Sequence[int]) -> None:
        """Cancel what was in flight and came back without an outcome."""
        if delivery_ids:
            job = Job(lambda batch: batch.cancelling.extend(delivery_ids))
            self._writer.submit(job).add_done_callback(_complain)

    async def hurry(self, delivery_ids: Sequence[int]) -> int:
        """See `Store.hurry`."""

        def apply_(batch: Batch) -> int:
            batch.hurrying += delivery_ids
            return 0

        def answer(batch: Batch, _: int) -> int:
            return sum(delivery_id in batch.hurried for delivery_id in set(delivery_ids))

        return await self._writer.submit(Job(apply_, answer=answer))

    async def repeat(self, wishes: Sequence[tuple[StoredEvent, Owed]]) -> tuple[bool, ...]:
        """See `Store.repeat`."""
        repeats = [Repeat(event, owed) for event, owed in wishes]

        def apply_(batch: Batch) -> tuple[bool, ...]:
            batch.repeating += repeats
            return ()

        job = Job(apply_, answer=lambda _batch, _none: tuple(wish.done for wish in repeats))
        return await self._writer.submit(job)


def _complain(done: "asyncio.Future[None]") -> None:
    """Nobody waits for this one: say that it failed, so that the operator cancels again."""
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("a delivery that was to be cancelled stays pending: %s", error)
