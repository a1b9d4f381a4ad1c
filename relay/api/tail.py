"""`GET /api/tail`: events and attempts as they happen, sent to followers after each commit.

With `since`, stored items come first, oldest first. At the seam, an item is neither missing nor sent twice.

In a cluster, the node that a client follows asks the others twice a second for their items. Each of them
collects items for as long as it is asked.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from operator import itemgetter
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay.api.context import Context
from relay.api.endpoints import EVENT_STREAM, endpoint
from relay.api.query_params import MOST_ROWS, TailQuery, read_field
from relay.api.stream import (
    MOST,
    Follower,
    Followers,
    Group,
    LostView,
    NewItemsView,
    Seam,
    SilentView,
    frame,
    stream,
)
from relay.api.views import PAYLOAD, Time, about
from relay.base.clock import SECOND, moment, rfc3339
from relay.errors import RelayError
from relay.model import DeliveryState, News, Outcome, StoredEvent
from relay.routing.subscription import Patterns

log = logging.getLogger("relay.api")

ROOM = 5000
"""Maximum number of items that wait for a slow follower, enough for the events of the largest request. Beyond
that, the oldest are dropped and counted."""

KEEP = 5.0
"""Seconds after the end of a follower's history during which live items are compared with the history."""

KEEP_IN_CLUSTER = 30.0
"""`KEEP` in a cluster, because the items of other nodes arrive later."""

OVERLAP = 60 * SECOND
"""Time between the start of an item and its commit, in addition to the timeout of an attempt."""

CATCH_UP = 2 * SECOND
"""If a part took no longer than this, the next part is the last one; live items begin with it."""

AHEAD = 3600 * SECOND
"""The last part of a history ends this far in the future, because the clock may have been ahead."""

MOST_PARTS = 10
"""Parts of a history after which live items begin in any case."""

NARROWEST = 1000
"""Microseconds of history that are read at once if it has many items; a quiet time is read in wider parts."""

COLLECT = "collect items"
"""The request of another node whose clients follow this one's items."""

COLLECT_EVERY = 0.5  # seconds
PATIENCE = 2.0  # seconds within which the other nodes must answer
FOLLOWED = 10.0  # seconds after the latest request of another node for which this one collects items

_TYPES = 4096  # types whose match is remembered; bounded, because senders choose types


class TailEvent(msgspec.Struct):
    """An event that was stored."""

    id: str
    source: str
    type: str
    subject: str | None
    received_at: Time
    size: int
    payload: (
        Annotated[str, about("With `payload=1`: the first 16 KiB of the body; invalid UTF-8 is replaced.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    payload_truncated: bool | msgspec.UnsetType = msgspec.UNSET


class TailAttempt(msgspec.Struct):
    """An attempt that was recorded. The event's fields are null if the event is unreadable.

    For a stored attempt, `attempt`, `reason` and `next_attempt_at` are null, and so is `state` unless it is
    `delivered`.
    """

    delivery_id: str
    event_id: str | None
    destination: str
    type: str | None
    attempt: int | None
    result: str
    status: int | None
    error: str | None
    duration_ms: float
    state: DeliveryState | None
    reason: str | None
    next_attempt_at: Time | None
    started_at: Time


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The events and attempts that one follower wants."""

    source: str | None = None
    destination: str | None = None  # attempts to it; no events
    type: str | None = None  # pattern of the full type
    matches: Callable[[str], bool] | None = None  # tests a full type against this pattern
    failed: bool = False  # only failed attempts
    attempts: bool = True  # otherwise only events
    payload: bool = False  # events with the start of their bodies
    count: bool = False  # only the numbers of live items
    brief: bool = False  # only the keys of items, for another node that counts them

    @property
    def events(self) -> bool:
        """Whether the follower wants any events."""
        return not self.failed and self.destination is None

    def event(self, event: StoredEvent) -> bool:
        """Return whether an event passes the filter, if the follower wants events."""
        return self._fits(event.source, event.type)

    def attempt(self, outcome: Outcome) -> bool:
        """Return whether an attempt passes the filter, if the follower wants attempts."""
        attempt, event = outcome.attempt, outcome.delivery.event
        if attempt is None or (self.failed and attempt.result == "ok"):
            return False
        if self.destination is not None and outcome.delivery.destination != self.destination:
            return False
        if event is None:  # it could not be read, so its source and type are unknown
            return self.source is None and self.matches is None
        return self._fits(event.source, event.type)

    def stored_attempt(self, row: Mapping[str, Any]) -> bool:
        """Return whether the follower wants a stored attempt to its destination."""
        return self._fits(row["type"].partition(".")[0], row["type"])

    def _fits(self, source: str, type_: str) -> bool:
        if self.source is not None and source != self.source:
            return False
        return self.matches is None or self.matches(type_)

    def query(self) -> dict[str, Any]:
        """Return the filter as a query, for another node."""
        flags = ("failed", "attempts", "payload", "count")
        given = {name: getattr(self, name) for name in ("source", "destination", "type")}
        return given | {name: "1" if getattr(self, name) else "0" for name in flags}


class _Frames:
    """The frames of one commit's items. Each is made once for all followers."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool, bool], bytes] = {}

    def of_event(self, event: StoredEvent, wanted: Wanted) -> bytes:
        """Return the frame of an event for these followers."""
        form = (id(event), wanted.brief, wanted.payload)
        if form not in self._made:
            shown: Any = {"id": event.public_id} if wanted.brief else _event(event, payload=wanted.payload)
            self._made[form] = frame("event", shown, event.public_id)
        return self._made[form]

    def of_attempt(self, outcome: Outcome, wanted: Wanted) -> bytes:
        """Return the frame of an attempt for these followers."""
        form = (id(outcome), wanted.brief, False)
        if form not in self._made:
            shown: Any = _attempt(outcome)
            if wanted.brief:
                shown = {"delivery_id": shown.delivery_id, "started_at": shown.started_at}
            self._made[form] = frame("attempt", shown)
        return self._made[form]


def _send_attempts(outcomes: Iterable[Outcome], group: Group[Wanted], frames: _Frames) -> None:
    """Send the attempts of a commit to the members of a group that wants them."""
    wanted, compares = group.wanted, group.compares
    for outcome in outcomes:
        if wanted.attempt(outcome):
            key = _key_of(outcome) if compares else None
            if wanted.count:
                group.count("attempts", key)
            else:
                group.put(frames.of_attempt(outcome, wanted), key)


def _send_events(events: Iterable[StoredEvent], group: Group[Wanted], frames: _Frames) -> None:
    """Send the events of a commit to the members of a group that wants them."""
    wanted, compares = group.wanted, group.compares
    for event in events:
        if wanted.event(event):
            key = event.public_id if compares else None
            if wanted.count:
                group.count("events", key)
            else:
                group.put(frames.of_event(event, wanted), key)


class _Remote:
    """The followers on one other node."""

    def __init__(self) -> None:
        self.followers: Followers[Wanted] = Followers(ROOM)
        self.timer: asyncio.TimerHandle | None = None  # ends them
        self._by_number: dict[str, Follower[Wanted]] = {}

    def keep(self, queries: Mapping[str, TailQuery], wanted: Callable[[TailQuery], Wanted]) -> None:
        """Add the followers that are new, and remove those that are gone."""
        for number in self._by_number.keys() - queries:
            self.followers.discard(self._by_number.pop(number))
        for number in queries.keys() - self._by_number:
            wishes = wanted(queries[number])
            brief = msgspec.structs.replace(wishes, count=False, brief=wishes.count)
            self._by_number[number] = self.followers.add(brief, lambda: None)

    def take(self) -> Iterator[tuple[str, bytes]]:
        """Yield the waiting frames of each follower that has any."""
        for number, follower in self._by_number.items():
            if frames := follower.take():
                yield number, frames


class _Wish(msgspec.Struct):
    """A request to the other nodes to collect items."""

    number: str
    followers: int = 0


class TailApi:
    """The endpoint `/api/tail`."""

    def __init__(self, context: Context) -> None:
        self._check_names = context.check_names
        self._dispatcher = context.dispatcher
        self._store = context.store
        self._clock = context.clock
        self._followers: Followers[Wanted] = Followers(ROOM)
        self._listeners = context.listeners
        self._streams = 0  # requests for a stream in progress
        self._nodes = context.store.nodes
        self._nodes.handle(COLLECT, self._collect_here)
        self._numbers = itertools.count(1)
        self._asked: dict[Wanted, _Wish] = {}  # the items that the other nodes collect
        self._silent: dict[Follower[Wanted], SilentView] = {}  # as last sent to it
        self._collecting: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # held while the other nodes are asked
        self._remote: dict[str, _Remote] = {}  # followers on other nodes, by incarnation

    def _listen(self, news: News) -> None:
        """Send the events and attempts of one commit to the followers; called only while there are any."""
        groups = [*self._followers.groups]
        for remote in self._remote.values():
            groups += remote.followers.groups
        frames = _Frames()
        for group in groups:
            if group.wanted.attempts:  # first, because they may have created some of the events
                _send_attempts(news.outcomes, group, frames)
            if group.wanted.events:
                _send_events(news.events, group, frames)

    def end(self) -> None:
        """End all streams, because the daemon stops."""
        self._followers.end()
        if self._collecting is not None:
            self._collecting.cancel()
        for incarnation in list(self._remote):
            self._forget(incarnation)

    @endpoint(
        "GET", "/api/tail", "tail",
        "Stream events and attempts as server-sent events `event`, `attempt`, `count`, `lost` and `silent`.",
        query=TailQuery, content=EVENT_STREAM,
        returns=TailEvent | TailAttempt | NewItemsView | LostView | SilentView,
    )  # fmt: skip
    async def _tail(self, request: web.Request, query: TailQuery) -> web.StreamResponse:
        now = self._clock.wall()
        since = None if query.since is None else read_field("since", partial(moment, now=now), query.since)
        await self._check(query)
        wanted, seam = self._wanted(query), None if since is None else Seam()
        past = None if since is None or seam is None else self._past(wanted, seam, since)
        self._streams += 1
        self._attend()
        try:
            async with self._followed_elsewhere(wanted):
                return await stream(request, self._followers, wanted, past, seam=seam, counts=wanted.count)
        finally:
            self._streams -= 1
            self._attend()

    def _attend(self) -> None:
        """Listen to commits while there are followers."""
        wanted = self._streams > 0 or bool(self._remote)
        if wanted and self._listen not in self._listeners:
            self._listeners.append(self._listen)
        elif not wanted and self._listen in self._listeners:
            self._listeners.remove(self._listen)

    @asynccontextmanager
    async def _followed_elsewhere(self, wanted: Wanted) -> AsyncIterator[None]:
        """Let the other nodes collect the items that a follower wants, for the duration of the block."""
        if self._nodes.alone or self._followers.ended or self._followers.full:
            yield
            return
        wish = self._asked.setdefault(wanted, _Wish(str(next(self._numbers))))
        wish.followers += 1
        try:
            await self._collect()
            if self._collecting is None or self._collecting.done():
                self._collecting = asyncio.create_task(self._collect_for_ever())
            yield
        finally:
            wish.followers -= 1
            if not wish.followers:
                del self._asked[wanted]

    async def _collect_for_ever(self) -> None:
        while self._asked:
            await asyncio.sleep(COLLECT_EVERY)
            try:
                await self._collect()
            except Exception:
                log.exception("cannot collect the items of other nodes")

    async def _collect(self) -> None:
        """Ask the other nodes for the items of all followers, and send them.

        A follower that joins during the request gets its items with the next one.
        """
        async with self._lock:
            numbers = {wanted: wish.number for wanted, wish in self._asked.items()}
            queries = {number: wanted.query() for wanted, number in numbers.items()}
            asked = {"node": self._nodes.incarnation, "queries": queries}
            answers = await self._nodes.ask_others(COLLECT, asked, PATIENCE)
            parts, unable = answers.read(dict[str, str])
            missing = SilentView(answers.silent, unable)
            known, self._silent = self._silent, dict.fromkeys(self._followers, missing)
            for follower in self._followers:
                if missing != known.get(follower, SilentView(())):
                    follower.put(frame("silent", missing))
            for group in self._followers.groups:
                for _, found in parts:
                    for item in _frames_of(found.get(numbers.get(group.wanted, ""), "")):
                        _pass_on(item, group)

    async def _collect_here(self, _to: str, asked: Mapping[str, Any]) -> dict[str, str]:
        """Return the items that this node has collected for the followers of another one, by number."""
        if self._followers.ended:
            return {}
        incarnation, queries = asked["node"], asked["queries"]
        remote = self._remote.setdefault(incarnation, _Remote())
        if remote.timer is not None:
            remote.timer.cancel()
        remote.timer = asyncio.get_running_loop().call_later(FOLLOWED, self._forget, incarnation)
        remote.keep(
            {name: msgspec.convert(query, TailQuery) for name, query in queries.items()}, self._wanted
        )
        self._attend()
        return {name: frames.decode() for name, frames in remote.take()}

    def _forget(self, incarnation: str) -> None:
        """Stop collecting items for the followers of another node."""
        if (timer := self._remote.pop(incarnation).timer) is not None:
            timer.cancel()
        self._attend()

    async def _check(self, query: TailQuery) -> None:
        if query.attempts == "0" and (query.destination is not None or query.failed == "1"):
            name = "failed" if query.destination is None else "destination"
            hint = f'"{name}" selects attempts; omit one of them'
            raise RelayError(f'"attempts=0" and "{name}" exclude each other', hint=hint)
        await self._check_names(query)

    def _wanted(self, query: TailQuery) -> Wanted:
        return Wanted(
            source=query.source,
            destination=query.destination,
            type=query.type,
            matches=None if query.type is None else _matcher(query.type),
            failed=query.failed == "1",
            attempts=query.attempts == "1",
            payload=query.payload == "1",
            count=query.count == "1",
        )

    async def _past(self, wanted: Wanted, seam: Seam, since: int) -> AsyncIterator[bytes]:
        """Yield the frames of stored items since a time (wall clock), oldest first, up to the live ones.

        An item is stored some time after it began, so each part begins before the end of the previous part.
        """
        timeouts = [lane.config.timeout for lane in self._dispatcher.lanes.values()]
        overlap = OVERLAP + int(max(timeouts, default=0) * SECOND)
        start, parts = since, 0
        while True:
            began, parts = self._clock.wall(), parts + 1
            is_last = began - start <= overlap + CATCH_UP or parts == MOST_PARTS
            if is_last:
                seam.open()
            async for at, key, item in self._between(wanted, start, began + AHEAD if is_last else began):
                if not key:
                    yield b""
                elif seam.takes_stored(key, keep=at >= began - overlap):
                    yield item
            if is_last:
                break
            start = max(since, began - overlap)
        seam.close(KEEP if self._nodes.alone else KEEP_IN_CLUSTER)

    async def _between(self, wanted: Wanted, start: int, end: int) -> AsyncIterator[tuple[int, str, bytes]]:
        """Yield time, key and frame of the stored items of a time span (wall clock), oldest first.

        An empty key means that the search continues.
        """
        width = 60 * SECOND
        while start < end:
            until = min(start + width, end)
            found = await self._window(wanted, start, until, whole=width == NARROWEST)
            if found is None:
                width = max(width // 8, NARROWEST)
                continue
            for at, row in sorted(found, key=itemgetter(0)):
                if "size" in row:
                    event = await self._stored_event(row, payload=wanted.payload)
                    yield at, row["id"], frame("event", event, row["id"])
                else:
                    attempt = _stored_attempt(row)
                    yield at, f"{attempt.delivery_id} {attempt.started_at}", frame("attempt", attempt)
            yield until, "", b""
            start = until
            width *= 4 if len(found) < MOST_ROWS // 8 else 1

    async def _window(
        self, wanted: Wanted, start: int, end: int, *, whole: bool
    ) -> list[tuple[int, dict[str, Any]]] | None:
        """Return times and rows of the items of a time span; None: more than one page, unless `whole`."""
        lists: dict[str, dict[str, Any]] = {}
        if wanted.attempts:
            lists["attempts"] = {"destination": wanted.destination, "failed": wanted.failed or None}
        if wanted.events:
            lists["events"] = {"source": wanted.source, "type": wanted.type}
        found = []
        for kind, filters in lists.items():
            time, cursor = "received_at" if kind == "events" else "started_at", None
            while True:
                page = await self._store.queries.page(
                    kind, limit=MOST_ROWS, cursor=cursor, since=start, until=end, **filters
                )
                found += [
                    (row[time], row) for row in page.rows if kind == "events" or wanted.stored_attempt(row)
                ]
                cursor = page.cursor
                if cursor is None:
                    break
                if not whole:
                    return None
        return found

    async def _stored_event(self, row: Mapping[str, Any], *, payload: bool) -> TailEvent:
        shown = {name: row[name] for name in ("id", "source", "type", "subject", "size")}
        event = TailEvent(**shown, received_at=rfc3339(row["received_at"]))
        if payload:
            stored = (await self._store.events.load([row["row"]])).get(row["row"])
            _add_payload(event, b"" if stored is None else stored.body)
        return event


@lru_cache(MOST)
def _matcher(pattern: str) -> Callable[[str], bool]:
    try:
        patterns = Patterns((pattern,))
    except ValueError as error:
        raise RelayError(f'"type": {error}') from None
    return lru_cache(maxsize=_TYPES)(patterns.matches)


def _event(event: StoredEvent, *, payload: bool) -> TailEvent:
    shown = TailEvent(
        id=event.public_id,
        source=event.source,
        type=event.type,
        subject=event.subject,
        received_at=rfc3339(event.received_at),
        size=len(event.body),
    )
    if payload:
        _add_payload(shown, event.body)
    return shown


def _add_payload(event: TailEvent, body: bytes) -> None:
    event.payload = body[:PAYLOAD].decode("utf-8", "replace")
    event.payload_truncated = len(body) > PAYLOAD


def _frames_of(text: str) -> list[bytes]:
    """Return the frames in a text. Only the end of a frame is an empty line."""
    return [each.encode() + b"\n\n" for each in text.split("\n\n")[:-1]]


def _pass_on(item: bytes, group: Group[Wanted]) -> None:
    """Pass an item of another node to the followers that want it."""
    kind = next((kind for head, kind in _KINDS.items() if item.startswith(head)), None)
    key = _key_in(item, kind) if kind is not None and group.compares else None
    if kind is not None and group.wanted.count:
        group.count(kind, key)
    else:
        group.put(item, key)


_KINDS = {b"event: event\n": "events", b"event: attempt\n": "attempts"}
"""Kinds of items, by the beginning of their frames."""


def _key_in(item: bytes, kind: str) -> str:
    """Return the key of the event or attempt in a frame."""
    data = msgspec.json.decode(item.partition(b"data: ")[2])
    return str(data["id"]) if kind == "events" else f"{data['delivery_id']} {data['started_at']}"


def _key_of(outcome: Outcome) -> str:
    """Return the key of a live attempt; the stored attempt has the same key."""
    assert outcome.attempt is not None  # noqa: S101 - `Wanted.attempt` accepts no other outcome
    return f"{outcome.delivery.public_id} {rfc3339(outcome.attempt.started_at)}"


def _stored_attempt(row: Mapping[str, Any]) -> TailAttempt:
    same = ("delivery_id", "event_id", "destination", "type", "result", "status", "error")
    return TailAttempt(
        **{name: row[name] for name in same},
        attempt=None,
        duration_ms=round(row["duration_ms"], 1),
        state="delivered" if row["result"] == "ok" else None,
        reason=None,
        next_attempt_at=None,
        started_at=rfc3339(row["started_at"]),
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
