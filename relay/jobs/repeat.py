"""Owing stored events once more: loaded, checked, routed as of today, written as new deliveries."""

import hashlib
import logging
from collections.abc import Callable, Sequence

from relay.model import Chosen, Owed, StoredEvent
from relay.routing.filters import Router
from relay.store import Store

log = logging.getLogger("relay.replay")

ROUTES = "*"
"""Instead of a destination: wherever today's subscriptions lead."""

MOST_EVENTS = 100  # of one transaction, so that those of senders are not delayed by it
MOST_BYTES = 8 * 2**20  # of bodies in memory at once, unless one event alone is larger


class Repeater:
    """Repeats what was chosen, in portions that the caller cuts by `portion`."""

    def __init__(self, store: Store, router: Router) -> None:
        self._store = store
        self._router = router

    async def repeat(self, chosen: Sequence[Chosen], to: str | None) -> list[int]:
        """Return for each event how many new deliveries it was given.

        They go to the destination `to`, or by today's routes (`ROUTES`); None: to the destinations of the
        chosen deliveries, where those were chosen. An event that is gone or damaged gets none.
        """
        events = await self._store.load([one.event_id for one in chosen])
        wishes = [
            (number, event, owed)
            for number, one in enumerate(chosen)
            if (event := events.get(one.event_id)) is not None and _is_whole(event)
            for owed in self._owed(event, one.destinations, to)
        ]
        created = [0] * len(chosen)
        if wishes:
            done = await self._store.repeat([(event, owed) for _, event, owed in wishes])
            for (number, _, _), is_new in zip(wishes, done, strict=True):
                created[number] += is_new
        return created

    def _owed(self, event: StoredEvent, destinations: Sequence[str], to: str | None) -> Sequence[Owed]:
        if to == ROUTES or (to is None and not destinations):
            return self._router.route(event)
        names = destinations if to is None else (to,)
        return [owed for name in names if (owed := self._router.owed_to(name, event)) is not None]


def portion(chosen: Sequence[Chosen], start: int, may: Callable[[], bool] = lambda: True) -> Sequence[Chosen]:
    """Cut from `start` on what one transaction takes, as far as `may` allows one event more."""
    end, size = start, 0
    while end < len(chosen) and end - start < MOST_EVENTS:
        size += chosen[end].size
        if (end > start and size > MOST_BYTES) or not may():
            break
        end += 1
    return chosen[start:end]


def _is_whole(event: StoredEvent) -> bool:
    if hashlib.sha256(event.body).digest() == event.sha256:
        return True
    log.error("%s is not repeated: its stored body is not the one that came in", event.public_id)
    return False
