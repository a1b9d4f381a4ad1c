"""A lane's queue of held deliveries: one for first attempts, one for retries."""

from collections import deque
from collections.abc import Collection, Iterable

from relay.delivery.memory import Memory
from relay.model import Delivery

WINDOW = 128
"""Held deliveries that a feed keeps in memory; the rest of the backlog stays in the store."""


class Feed:
    """What is held in memory, how much of it is being sent, and when to look into the store again."""

    def __init__(self, memory: Memory, *, retries: bool) -> None:
        self.retries = retries
        self.active = 0  # attempts being made
        self.due = 0  # steady clock: when to look into the store
        self.refilling = False
        self.looks = 0  # into the store, come back
        self._memory = memory
        self._window: deque[Delivery] = deque()

    def __len__(self) -> int:
        return len(self._window)

    @property
    def room(self) -> int:
        """How many more fit."""
        return WINDOW - len(self._window)

    def wants(self, now: int, *, probing: bool) -> bool:
        """Say whether to refill: half empty, and something may be due. A probe needs one delivery."""
        few = 0 if probing else WINDOW // 2
        return not self.refilling and self.due <= now and len(self._window) <= few

    def put(self, deliveries: Iterable[Delivery]) -> None:
        """Add held deliveries; bodies beyond the budget are let go and read again later."""
        for delivery in deliveries:
            self._memory.keep(delivery)
            self._window.append(delivery)

    def take(self) -> Delivery:
        """Remove the oldest."""
        delivery = self._window.popleft()
        self._memory.drop(delivery)
        return delivery

    def drop(self, delivery_ids: Collection[int]) -> None:
        """Remove those that ended otherwise."""
        if not any(delivery.id in delivery_ids for delivery in self._window):
            return
        kept = [delivery for delivery in self.empty() if delivery.id not in delivery_ids]
        self.put(kept)

    def empty(self) -> list[Delivery]:
        """Remove and return all."""
        return [self.take() for _ in range(len(self._window))]
