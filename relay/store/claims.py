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
        self.unwanted: set[int] = set()  # in flight, and cancelled unless that delivers them

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

    def unwant(self, delivery_ids: Iterable[int]) -> list[int]:
        """Mark those in flight as cancelled once their outcome is known; return the others."""
        late = []
        for delivery_id in delivery_ids:
            if delivery_id in self._flying:
                self.unwanted.add(delivery_id)
            else:
                late.append(delivery_id)
        return late

    def release(self, delivery_ids: Iterable[int]) -> list[int]:
        """Let go of these, ignoring those that nobody holds; return the unwanted ones among them."""
        unwanted = []
        for delivery_id in delivery_ids:
            self._flying.discard(delivery_id)
            if delivery_id in self.unwanted:
                self.unwanted.remove(delivery_id)
                unwanted.append(delivery_id)
            destination = self._destinations.pop(delivery_id, None)
            if destination is not None:
                self._counts[destination] -= 1
        return unwanted
