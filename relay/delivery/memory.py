"""The budget of bodies that wait in windows, over all lanes; beyond it a delivery holds ids only."""

from relay.model import Delivery

MOST = 32 * 2**20


class Memory:
    """Counts the bytes of bodies that windows hold."""

    def __init__(self, most: int) -> None:
        self._free = most

    def room(self, size: int) -> bool:
        """Say whether a body of that size may be held."""
        return size <= self._free

    def keep(self, delivery: Delivery) -> None:
        """Count a delivery that enters a window, or take its body away when there is no room."""
        if delivery.event is None:
            return
        if delivery.size > self._free:
            delivery.event = delivery.rendered = None
        else:
            self._free -= delivery.size

    def drop(self, delivery: Delivery) -> None:
        """Count a delivery that leaves a window."""
        if delivery.event is not None:
            self._free += delivery.size
