"""Claims, in memory: which pending deliveries a lane has, and which are in flight. A crash releases all."""

from collections import Counter
from collections.abc import Iterable

from relay.model import Delivery

GROUP_BYTES = 4 * 2**20
"""Bytes of the bodies of one group; all of them are in memory while its message is written."""


class Claims:
    """Sets of delivery ids; every change is one step of the event loop."""

    def __init__(self) -> None:
        self._destinations: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._in_flight: set[int] = set()
        self._ending: set[int] = set()  # the current transaction ends them without an attempt
        self.cancelled: set[int] = set()  # in flight; cancelled unless the attempt succeeds
        self.superseded: set[int] = set()  # in flight; not retried if the attempt fails
        # Events of claimed deliveries with a `latest_by` key, by destination and key; and these, by delivery.
        self._latest: dict[tuple[str, str], dict[int, int]] = {}
        self._keys: dict[int, tuple[str, str]] = {}

    def __contains__(self, delivery_id: int) -> bool:
        return delivery_id in self._destinations

    def destination_of(self, delivery_id: int) -> str | None:
        """Return the destination of a claimed delivery."""
        return self._destinations.get(delivery_id)

    def of(self, destination: str) -> int:
        """Return how many of a destination's deliveries are claimed."""
        return self._counts[destination]

    def add(self, deliveries: Iterable[Delivery]) -> None:
        """Claim deliveries."""
        for delivery in deliveries:
            self._destinations[delivery.id] = delivery.destination
            self._counts[delivery.destination] += 1
            if delivery.latest_key is not None:
                self._supersede_by(delivery, delivery.latest_key)

    def begin(self, delivery_id: int) -> bool:
        """Mark a delivery as in flight; False: the current transaction ends it, so do not send it."""
        if delivery_id in self._ending:
            return False
        self._in_flight.add(delivery_id)
        return True

    def end(self, delivery_id: int) -> bool:
        """Mark a delivery as ending; False: it is in flight, and its outcome decides."""
        if delivery_id in self._in_flight:
            return False
        self._ending.add(delivery_id)
        return True

    def clear_ending(self) -> None:
        """Drop the marks of `end`: the transaction is committed or rolled back."""
        self._ending.clear()

    def cancel(self, delivery_ids: Iterable[int]) -> list[int]:
        """Cancel deliveries in flight once their outcome is known; returns those not in flight."""
        landed = []
        for delivery_id in delivery_ids:
            if delivery_id in self._in_flight:
                self.cancelled.add(delivery_id)
            else:
                landed.append(delivery_id)
        return landed

    def _supersede_by(self, newer: Delivery, latest_key: str) -> None:
        """Supersede deliveries in flight by a claimed one that another node may have stored."""
        key = self._keys[newer.id] = newer.destination, latest_key
        same = self._latest.setdefault(key, {})
        self.supersede(id_ for id_, event_id in same.items() if (event_id, id_) < (newer.event_id, newer.id))
        same[newer.id] = newer.event_id

    def supersede(self, delivery_ids: Iterable[int]) -> None:
        """Let deliveries in flight expire if their attempt fails, because a newer event replaces them."""
        self.superseded.update(self._in_flight.intersection(delivery_ids))

    def release(self, delivery_ids: Iterable[int]) -> list[int]:
        """Release deliveries, claimed or not; returns the cancelled ones among them."""
        cancelled = []
        for delivery_id in delivery_ids:
            self._in_flight.discard(delivery_id)
            self.superseded.discard(delivery_id)
            if delivery_id in self.cancelled:
                self.cancelled.remove(delivery_id)
                cancelled.append(delivery_id)
            destination = self._destinations.pop(delivery_id, None)
            if destination is not None:
                self._counts[destination] -= 1
            if (key := self._keys.pop(delivery_id, None)) is not None:
                self._latest[key].pop(delivery_id)
                if not self._latest[key]:
                    del self._latest[key]
        return cancelled

    def choose_followers(
        self, first: Delivery, candidates: Iterable[Delivery], together: int
    ) -> tuple[Delivery, ...]:
        """Return the unclaimed deliveries that fit into one message with the first one of their group.

        `together` is the largest number of deliveries of a message; `GROUP_BYTES` limits their bodies.
        """
        found: list[Delivery] = []
        size = first.size
        for delivery in candidates:
            if delivery.id in self:
                continue
            size += delivery.size
            if len(found) + 1 == together or size > GROUP_BYTES:
                break
            found.append(delivery)
        return tuple(found)
