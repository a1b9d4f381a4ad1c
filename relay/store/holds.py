"""Which pending deliveries some lane holds: in memory, so a crash lets go of all of them."""

from collections import Counter
from collections.abc import Iterable

from relay.model import Delivery


class Holds:
    """A set of delivery ids, counted by destination."""

    def __init__(self) -> None:
        self._destinations: dict[int, str] = {}
        self._counts: Counter[str] = Counter()

    def __contains__(self, delivery_id: int) -> bool:
        return delivery_id in self._destinations

    def of(self, destination: str) -> int:
        """Return how many of a destination's deliveries are held."""
        return self._counts[destination]

    def add(self, deliveries: Iterable[Delivery]) -> None:
        """Hold these."""
        for delivery in deliveries:
            self._destinations[delivery.id] = delivery.destination
            self._counts[delivery.destination] += 1

    def release(self, delivery_ids: Iterable[int]) -> None:
        """Let go of these; ids that nobody holds are ignored."""
        for delivery_id in delivery_ids:
            destination = self._destinations.pop(delivery_id, None)
            if destination is not None:
                self._counts[destination] -= 1
