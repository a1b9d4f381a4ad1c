"""The deliveries that a lane holds in memory: one window for first attempts, one for retries."""

from collections import deque
from collections.abc import Collection, Iterable

from relay.delivery.limits import BodyBudget
from relay.model import Delivery


class Window:
    """Deliveries that a lane has claimed. In a group, one delivery has the others as its followers."""

    __slots__ = ("_budget", "active", "deliveries", "due", "refilling", "refills", "retries", "size")

    def __init__(self, budget: BodyBudget, *, retries: bool, size: int) -> None:
        self.size = size  # deliveries without their followers
        self.deliveries: deque[Delivery] = deque()
        self.retries = retries
        self.active = 0  # attempts in flight
        self.due = 0  # steady clock: when to query the store
        self.refilling = False  # a query of the store is under way
        self.refills = 0  # finished queries
        self._budget = budget

    def wants(self, now: int, *, probing: bool) -> bool:
        """Return whether to query the store: something may be due and the window is half empty.

        While probing, one delivery is enough.
        """
        few = 0 if probing else self.size // 2
        return self.due <= now and not self.refilling and len(self.deliveries) <= few

    def put(self, deliveries: Iterable[Delivery]) -> None:
        """Add deliveries that are held for this lane; bodies beyond the budget are read again later."""
        for delivery in deliveries:
            self._budget.add(delivery)
            self.deliveries.append(delivery)

    def take(self) -> Delivery:
        """Remove and return the oldest delivery."""
        delivery = self.deliveries.popleft()
        self._budget.remove(delivery)
        return delivery

    def drop(self, delivery_ids: Collection[int]) -> None:
        """Remove deliveries that ended without an attempt."""
        if any(each.id in delivery_ids for delivery in self.deliveries for each in delivery.members):
            self.put([kept for each in self.empty() if (kept := _without(each, delivery_ids)) is not None])

    def empty(self) -> list[Delivery]:
        """Remove and return all deliveries."""
        return [self.take() for _ in range(len(self.deliveries))]


def _without(delivery: Delivery, delivery_ids: Collection[int]) -> Delivery | None:
    """Return a delivery with its followers, without ended deliveries; None if all have ended."""
    left = [each for each in delivery.members if each.id not in delivery_ids]
    if not left:
        return None
    left[0].followers = tuple(left[1:])
    return left[0]
