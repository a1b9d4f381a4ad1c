"""Pending deliveries: settle, expire, cancel and repeat them through the writer. Engines add the claims."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from relay.base.shards import Shards
from relay.model import Claim, DestinationState, GeneratedEvent, Outcome, StoredEvent, Target
from relay.store import Cancelled
from relay.store.batch import Batch, HeldDestinations, Repeat
from relay.store.claims import Claims
from relay.store.writer import HasWriter, Job

log = logging.getLogger("relay.store")


class StoredDeliveries(ABC):
    """`relay.store.Deliveries` without the claims."""

    def __init__(self, database: HasWriter, claims: Claims) -> None:
        self._database = database
        self._claims = claims
        self.begin_attempt = claims.begin  # see `Deliveries.begin_attempt`

    @abstractmethod
    async def claim(
        self, destination: str, limit: int, *, retries: bool, together: int = 1, shards: Shards | None = None
    ) -> Claim:
        """See `Deliveries.claim`."""

    def release(self, delivery_ids: Iterable[int]) -> None:
        """See `Deliveries.release`."""
        if cancelled := self._claims.release(delivery_ids):
            self.cancel_later(cancelled)

    async def settle(self, outcome: Outcome) -> bool:
        """See `Deliveries.settle`."""
        job: Job[bool] = Job(
            lambda batch: batch.outcomes.append(outcome),
            finish=lambda batch, _: outcome.delivery.id in batch.settled,
        )
        return await self._database.writer.submit(job)

    async def settle_group(self, outcomes: Sequence[Outcome], *, split: bool) -> frozenset[int]:
        """See `Deliveries.settle_group`."""
        ids = frozenset(outcome.delivery.id for outcome in outcomes)

        def apply_(batch: Batch) -> frozenset[int]:
            batch.outcomes += outcomes
            batch.with_groups = True
            if split:
                batch.ungrouped += ids
            return ids

        job = Job(apply_, finish=lambda batch, asked: asked & batch.settled)
        return await self._database.writer.submit(job)

    async def expire(self) -> int:
        """See `Deliveries.expire`."""

        def apply_(batch: Batch) -> int:
            batch.expire_overdue = True
            batch.workers.expire_commands()
            return 0

        return await self._database.writer.submit(Job(apply_, finish=lambda batch, _: len(batch.ended)))

    async def expire_held(self, names: Collection[str], kept: int) -> int:
        """See `Deliveries.expire_held`."""

        def apply_(batch: Batch) -> int:
            batch.held = HeldDestinations(frozenset(names), kept)
            return 0

        def finish(batch: Batch, _: int) -> int:
            return sum(ending == ("expired", "held") for _, ending in batch.ended.values())

        return await self._database.writer.submit(Job(apply_, finish=finish))

    async def cancel(self, delivery_ids: Sequence[int]) -> Cancelled:
        """See `Deliveries.cancel`."""

        def apply_(batch: Batch) -> Cancelled:
            batch.to_cancel += delivery_ids
            return Cancelled()

        def finish(batch: Batch, _: Cancelled) -> Cancelled:
            requested = frozenset(delivery_ids)
            in_flight = len(requested & batch.cancelled_in_flight)
            return Cancelled(ended=len(requested & batch.ended.keys()), in_flight=in_flight)

        return await self._database.writer.submit(Job(apply_, finish=finish))

    def cancel_later(self, delivery_ids: Sequence[int]) -> None:
        """Cancel deliveries whose attempt ended without an outcome."""
        if not delivery_ids:
            return
        job: Job[None] = Job(lambda batch: batch.to_cancel.extend(delivery_ids))
        self._database.writer.submit(job).add_done_callback(_report_failure)

    async def make_due(self, delivery_ids: Sequence[int]) -> int:
        """See `Deliveries.make_due`."""

        def apply_(batch: Batch) -> int:
            batch.to_make_due += delivery_ids
            return 0

        def finish(batch: Batch, _: int) -> int:
            return sum(delivery_id in batch.made_due for delivery_id in set(delivery_ids))

        return await self._database.writer.submit(Job(apply_, finish=finish))

    async def repeat(self, requests: Sequence[tuple[StoredEvent, Target]]) -> tuple[bool, ...]:
        """See `Deliveries.repeat`."""
        repeats = [Repeat(event, target) for event, target in requests]

        def apply_(batch: Batch) -> tuple[bool, ...]:
            batch.to_repeat += repeats
            return ()

        job = Job(apply_, finish=lambda _batch, _none: tuple(each.done for each in repeats))
        return await self._database.writer.submit(job)

    async def set_destination(self, state: DestinationState, event: GeneratedEvent | None = None) -> None:
        """See `Deliveries.set_destination`."""

        def apply_(batch: Batch) -> None:
            batch.states.append(state)
            if event is not None:
                batch.reports.append((state, event))

        await self._database.writer.submit(Job(apply_))


def _report_failure(done: "asyncio.Future[None]") -> None:
    """Log that a cancellation failed, because no caller waits for it; the operator cancels again."""
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("a delivery could not be cancelled and is still pending: %s", error)
