"""Events and attempts as they happen: what every commit stored, told to whoever follows."""

from collections.abc import Callable
from functools import lru_cache

import msgspec
from aiohttp import web

from relay.api.context import Parts
from relay.api.query_params import TailQuery
from relay.api.responses import query_of
from relay.api.stream import Followers, frame, stream
from relay.api.views import unknown
from relay.base.clock import rfc3339
from relay.errors import RelayError
from relay.model import News, Outcome, StoredEvent
from relay.routing.filters import Patterns
from relay.store import OPERATOR_EVENTS

ROOM = 1000
"""Items that wait for a slow follower; older ones are lost, and it is told how many."""

_TYPES = 4096  # types whose match is remembered: senders choose them, so their number must have an end


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What one follower wants to hear of."""

    source: str | None = None
    destination: str | None = None  # attempts at it; no event has one
    matches: Callable[[str], bool] | None = None  # by full type
    failed: bool = False  # only attempts that did

    def event(self, event: StoredEvent) -> bool:
        """Say whether an event is meant."""
        if self.failed or self.destination is not None:
            return False
        return self._fits(event)

    def attempt(self, outcome: Outcome) -> bool:
        """Say whether an attempt is meant."""
        attempt, event = outcome.attempt, outcome.delivery.event
        if attempt is None or (self.failed and attempt.result == "ok"):
            return False
        if self.destination is not None and outcome.delivery.destination != self.destination:
            return False
        if event is None:  # gone from the disk: nothing is known of it
            return self.source is None and self.matches is None
        return self._fits(event)

    def _fits(self, event: StoredEvent) -> bool:
        if self.source is not None and event.source != self.source:
            return False
        return self.matches is None or self.matches(event.type)


class TailApi:
    """The part of the admin API under `/api/tail`."""

    def __init__(self, parts: Parts) -> None:
        self._ingest = parts.ingest
        self._engine = parts.engine
        self._followers: Followers[Wish] = Followers(ROOM)

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [web.get("/api/tail", self._tail, allow_head=False)]

    def listen(self, news: News) -> None:
        """Tell what one commit stored (see `relay.store.Listener`); nothing is done when nobody follows."""
        if not self._followers:
            return
        for outcome in news.outcomes:  # of events stored before; what they give birth to comes after them
            told = None
            for follower in self._followers:
                if follower.wish.attempt(outcome):
                    told = told or frame("attempt", _attempt(outcome))
                    follower.put(told)
        for event in news.events:
            told = None
            for follower in self._followers:
                if follower.wish.event(event):
                    told = told or frame("event", _event(event), event.public_id)
                    follower.put(told)

    def end(self) -> None:
        """End all streams: the relay stops."""
        self._followers.end()

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        return await stream(request, self._followers, self._wish(query_of(request, TailQuery)))

    def _wish(self, query: TailQuery) -> Wish:
        source, destination = query.source, query.destination
        if source is not None and source not in self._ingest.mounts and source != OPERATOR_EVENTS:
            raise unknown("source", source, self._ingest.mounts)
        if destination is not None and destination not in self._engine.lanes:
            raise unknown("destination", destination, self._engine.lanes)
        return Wish(
            source=source,
            destination=destination,
            matches=None if query.type is None else _matcher(query.type),
            failed=query.failed == "1",
        )


def _matcher(pattern: str) -> Callable[[str], bool]:
    try:
        patterns = Patterns((pattern,))
    except ValueError as error:
        raise RelayError(f'"type": {error}') from None
    return lru_cache(maxsize=_TYPES)(patterns.matches)


def _event(event: StoredEvent) -> dict[str, object]:
    """Return what a list says of an event."""
    return {
        "id": event.public_id,
        "source": event.source,
        "type": event.type,
        "subject": event.subject,
        "received_at": rfc3339(event.received_at),
        "size": len(event.body),
    }


def _attempt(outcome: Outcome) -> dict[str, object]:
    delivery, attempt, again = outcome.delivery, outcome.attempt, outcome.next_attempt_at
    assert attempt is not None  # noqa: S101 - `Wish.attempt` wants no other
    event = delivery.event
    return {
        "delivery_id": delivery.public_id,
        "event_id": None if event is None else event.public_id,
        "destination": delivery.destination,
        "type": None if event is None else event.type,
        "attempt": delivery.attempts + 1,
        "result": attempt.result,
        "status": attempt.status,
        "error": attempt.error,
        "duration_ms": round(attempt.duration_ms, 1),
        "state": outcome.state,
        "reason": outcome.reason,
        "next_attempt_at": None if again is None or outcome.state != "pending" else rfc3339(again),
        "started_at": rfc3339(attempt.started_at),
    }
