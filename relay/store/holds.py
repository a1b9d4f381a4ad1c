"""Which pending deliveries some lane holds, and which are in flight: in memory, gone at a crash."""

from collections import Counter
from collections.abc import Iterable

from relay.model import Delivery


class Holds:
    """Sets of delivery ids; all changes happen in single steps of the loop."""

    def __init__(self) -> None:
        self._destinations: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._flying: set[int] = set()
        self._doomed: set[int] = set()  # being ended without an attempt by the transaction at work

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

    def begin(self, delivery_id: int) -> bool:
        """Mark one as being sent; False: it is just being ended, do not send it."""
        if delivery_id in self._doomed:
            return False
        self._flying.add(delivery_id)
        return True

    def doom(self, delivery_id: int) -> bool:
        """Mark one as being ended; False: it is being sent, its outcome decides."""
        if delivery_id in self._flying:
            return False
        self._doomed.add(delivery_id)
        return True

    def spare(self) -> None:
        """Take all marks of `doom` back: the transaction is over, one way or the other."""
        self._doomed.clear()

    def release(self, delivery_ids: Iterable[int]) -> None:
        """Let go of these; ids that nobody holds are ignored."""
        for delivery_id in delivery_ids:
            self._flying.discard(delivery_id)
            destination = self._destinations.pop(delivery_id, None)
            if destination is not None:
                self._counts[destination] -= 1
