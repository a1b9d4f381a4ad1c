"""Whether due deliveries are picked up; whether their receivers answer is another matter."""

from collections.abc import Mapping

from relay.base.clock import SECOND, Clock
from relay.delivery.lane import Lane

PATIENCE = 60 * SECOND
"""A look into the store takes milliseconds; SQLite itself waits 5 s for a lock."""


class Progress:
    """Notices lanes whose look into the store has been due, or under way, for a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waits: dict[tuple[str, int, int], int] = {}  # lane, feed, its look: waited for since

    def stuck(self, lanes: Mapping[str, Lane]) -> list[str]:
        """Return the names of lanes that do not get on; time counts from when this first saw them wait."""
        now, before = self._clock.steady(), self._waits
        self._waits = {
            (name, feed, look): before.get((name, feed, look), now)
            for name, lane in lanes.items()
            for feed, (look, waiting) in enumerate(lane.looks)
            if waiting
        }
        return sorted({name for (name, _, _), since in self._waits.items() if now - since > PATIENCE})
