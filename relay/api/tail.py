"""`GET /api/tail`: events and attempts as they happen, sent to followers after each commit."""

from collections.abc import Callable
from functools import lru_cache

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import EVENT_STREAM, endpoint
from relay.api.query_params import TailQuery
from relay.api.stream import Followers, LostView, frame, stream
from relay.api.views import Time, unknown
from relay.base.clock import rfc3339
from relay.errors import RelayError
from relay.model import OPERATOR_SOURCE, DeliveryState, News, Outcome, StoredEvent
from relay.routing.subscription import Patterns

ROOM = 1000
"""Items that wait for a slow follower. Beyond that, the oldest are dropped and counted."""

_TYPES = 4096  # types whose match is remembered; bounded, because senders choose types


class TailEvent(msgspec.Struct):
    """An event that was stored."""

    id: str
    source: str
    type: str
    subject: str | None
    received_at: Time
    size: int


class TailAttempt(msgspec.Struct):
    """An attempt that was recorded. The event's fields are null if the event is unreadable."""

    delivery_id: str
    event_id: str | None
    destination: str
    type: str | None
    attempt: int
    result: str
    status: int | None
    error: str | None
    duration_ms: float
    state: DeliveryState
    reason: str | None
    next_attempt_at: Time | None
    started_at: Time


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The events and attempts that one follower wants."""

    source: str | None = None
    destination: str | None = None  # attempts to it; no events
    matches: Callable[[str], bool] | None = None  # of the full type
    failed: bool = False  # only failed attempts

    def event(self, event: StoredEvent) -> bool:
        """Return whether the follower wants an event."""
        if self.failed or self.destination is not None:
            return False
        return self._fits(event)

    def attempt(self, outcome: Outcome) -> bool:
        """Return whether the follower wants an attempt."""
        attempt, event = outcome.attempt, outcome.delivery.event
        if attempt is None or (self.failed and attempt.result == "ok"):
            return False
        if self.destination is not None and outcome.delivery.destination != self.destination:
            return False
        if event is None:  # it could not be read, so its source and type are unknown
            return self.source is None and self.matches is None
        return self._fits(event)

    def _fits(self, event: StoredEvent) -> bool:
        if self.source is not None and event.source != self.source:
            return False
        return self.matches is None or self.matches(event.type)


class TailApi:
    """The endpoint `/api/tail`."""

    def __init__(self, context: Context) -> None:
        self._ingest = context.ingest
        self._dispatcher = context.dispatcher
        self._followers: Followers[Wanted] = Followers(ROOM)
        self._listeners = context.listeners

    def _listen(self, news: News) -> None:
        """Send the events and attempts of one commit to the followers; called only while there are any."""
        for outcome in news.outcomes:  # first, because they may have created some of the events
            item = None
            for follower in self._followers:
                if follower.wanted.attempt(outcome):
                    item = item or frame("attempt", _attempt(outcome))
                    follower.put(item)
        for event in news.events:
            item = None
            for follower in self._followers:
                if follower.wanted.event(event):
                    item = item or frame("event", _event(event), event.public_id)
                    follower.put(item)

    def end(self) -> None:
        """End all streams, because the daemon stops."""
        self._followers.end()

    @endpoint(
        "GET", "/api/tail", "tail",
        "Stream events and attempts as server-sent events `event`, `attempt` and `lost`.",
        query=TailQuery, returns=TailEvent | TailAttempt | LostView, content=EVENT_STREAM,
    )  # fmt: skip
    async def _tail(self, request: web.Request, query: TailQuery) -> web.StreamResponse:
        wanted = self._wanted(query)
        if self._listen not in self._listeners:
            self._listeners.append(self._listen)
        try:
            return await stream(request, self._followers, wanted)
        finally:
            if not self._followers:
                self._listeners.remove(self._listen)

    def _wanted(self, query: TailQuery) -> Wanted:
        source, destination = query.source, query.destination
        if source is not None and source not in self._ingest.mounts and source != OPERATOR_SOURCE:
            raise unknown("source", source, self._ingest.mounts)
        if destination is not None and destination not in self._dispatcher.lanes:
            raise unknown("destination", destination, self._dispatcher.lanes)
        return Wanted(
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


def _event(event: StoredEvent) -> TailEvent:
    return TailEvent(
        id=event.public_id,
        source=event.source,
        type=event.type,
        subject=event.subject,
        received_at=rfc3339(event.received_at),
        size=len(event.body),
    )


def _attempt(outcome: Outcome) -> TailAttempt:
    delivery, attempt, again = outcome.delivery, outcome.attempt, outcome.next_attempt_at
    assert attempt is not None  # noqa: S101 - `Wanted.attempt` accepts no other outcome
    event = delivery.event
    return TailAttempt(
        delivery_id=delivery.public_id,
        event_id=None if event is None else event.public_id,
        destination=delivery.destination,
        type=None if event is None else event.type,
        attempt=delivery.attempts + 1,
        result=attempt.result,
        status=attempt.status,
        error=attempt.error,
        duration_ms=round(attempt.duration_ms, 1),
        state=outcome.state,
        reason=outcome.reason,
        next_attempt_at=None if again is None or outcome.state != "pending" else rfc3339(again),
        started_at=rfc3339(attempt.started_at),
    )
