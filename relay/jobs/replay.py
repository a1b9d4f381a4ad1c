"""Replays: deliver stored events again, at a limited rate, so that new events are not delayed.

Replays live in memory: a restart ends them. The deliveries that they created until then stay.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from relay.base.clock import SECOND, Clock, rfc3339
from relay.base.ids import REPLAY, dashed, new_id
from relay.base.rate import TokenBucket
from relay.base.units import Rate, render_rate
from relay.config.problems import ambiguous, shown
from relay.errors import RelayError, StorageError, StorageUnavailableError, UnknownError
from relay.model import Chosen, Named, Selection, StoredEvent, Target
from relay.routing.router import Router
from relay.store import Span, Store

log = logging.getLogger("relay.replay")

State = Literal["running", "cancelling", "done", "cancelled", "failed"]

DEFAULT_RATE = Rate(100, 1)
TICK = 0.1  # seconds; a shorter pause would only make smaller transactions
STORAGE_PAUSE = 1.0  # seconds between attempts to write while the storage is unavailable
STOP_WITHIN = 2.0  # seconds that a stop waits for the transaction in progress
MOST_RUNNING = 10
KEPT = 100  # ended replays that are still listed
ROUTES = "*"
"""In place of a destination's name: route each event by the current subscriptions."""
MOST_EVENTS = 100  # in one transaction, so that it does not delay the transactions of senders
MOST_BYTES = 8 * 2**20  # of bodies in memory at once; a single larger event is allowed


Pages = Callable[[int], AsyncIterator[Sequence[Chosen]]]
"""Reads the events of a request after a row id, page by page; 0: all of them."""


class ReplayRequest(msgspec.Struct, kw_only=True, frozen=True):
    """The events to replay, their destination (see `Repeater.repeat`) and the rate."""

    what: Selection | tuple[Chosen, ...]
    to: str | None = None
    rate: Rate = DEFAULT_RATE  # events


class Retried(msgspec.Struct, frozen=True):
    """The result of retrying deliveries manually."""

    created: int  # new deliveries, for those that had ended
    hurried: int  # pending deliveries whose next attempt is due now
    skipped: int  # already due, in flight, deleted, or to a destination that is not in the config


class Repeater:
    """Creates new deliveries of stored events; the caller splits the work into portions (`portion`)."""

    def __init__(self, store: Store, router: Router) -> None:
        self._store = store
        self._router = router

    async def repeat(self, chosen: Sequence[Chosen], to: str | None) -> list[int]:
        """Return the number of new deliveries for each event.

        `to` is a destination, or `ROUTES` for the current subscriptions. None: the destinations of the
        selected deliveries, or the current subscriptions if events were selected. A deleted or damaged
        event gets no delivery.
        """
        events = await self._store.events.load([one.event_id for one in chosen])
        requested = [
            (number, event, target)
            for number, one in enumerate(chosen)
            if (event := events.get(one.event_id)) is not None and _is_whole(event)
            for target in self._targets(event, one.destinations, to)
        ]
        created = [0] * len(chosen)
        if requested:
            done = await self._store.deliveries.repeat([(event, target) for _, event, target in requested])
            for (number, _, _), is_new in zip(requested, done, strict=True):
                created[number] += is_new
        return created

    def _targets(self, event: StoredEvent, destinations: Sequence[str], to: str | None) -> Sequence[Target]:
        if to == ROUTES or (to is None and not destinations):
            return self._router.route(event)
        names = destinations if to is None else (to,)
        return [target for name in names if (target := self._router.resolve(name, event)) is not None]


def portion(chosen: Sequence[Chosen], start: int, may: Callable[[], bool] = lambda: True) -> Sequence[Chosen]:
    """Return the events from `start` on that fit into one transaction, while `may()` is true."""
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
    log.error("%s is not replayed: the stored body does not match its sha256", event.public_id)
    return False


class Replay:
    """One replay and its progress."""

    def __init__(self, request: ReplayRequest, total: int, repeater: Repeater, clock: Clock) -> None:
        self.id = new_id(REPLAY, clock.wall())
        self.request = request
        self.total = total  # events, counted before the start
        self.done = 0  # events processed
        self.skipped = 0  # processed events without a new delivery: no destination, or still pending
        self.created = 0  # deliveries
        self.reached: int | None = None  # time of receipt of the last processed event: where to continue
        self.error: str | None = None
        self.began_at = clock.wall()
        self.ended_at: int | None = None
        self._state: State = "running"
        self._repeater = repeater
        self._clock = clock
        self._began = clock.steady()
        self._ended: int | None = None
        self._bucket = TokenBucket(request.rate, self._began)
        self._wait = 0.0  # seconds until the bucket has a token
        self._stop = asyncio.Event()

    @property
    def state(self) -> State:
        """The state, as the API shows it."""
        return "cancelling" if self._state == "running" and self._stop.is_set() else self._state

    @property
    def per_second(self) -> float:
        """Processed events per second since the start."""
        seconds = ((self._ended or self._clock.steady()) - self._began) / SECOND
        return self.done / seconds if seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until the end; None: ended or unknown."""
        rate = self.per_second
        return max(0, self.total - self.done) / rate if self._state == "running" and rate > 0 else None

    def cancel(self) -> None:
        """Stop after the transaction in progress."""
        self._stop.set()

    async def run(self, pages: Pages) -> None:
        """Replay the events of all pages, until the last page or a cancellation."""
        log.info("replay %s: %d events at %s", self.id, self.total, render_rate(self.request.rate))
        try:
            async for page in self._read(pages):
                await self._page(page)
                if self._stop.is_set():
                    break
            self._state = "cancelled" if self._stop.is_set() else "done"
        except StorageError as error:
            self._state, self.error = "failed", error.message
        except Exception as error:
            log.exception("replay %s failed", self.id)
            self._state, self.error = "failed", repr(error)
        finally:
            self.ended_at, self._ended = self._clock.wall(), self._clock.steady()
            log.info(
                "replay %s is %s: %d of %d events, %d deliveries, %d events skipped",
                *(self.id, self._state, self.done, self.total, self.created, self.skipped),
            )

    async def _read(self, pages: Pages) -> AsyncIterator[Sequence[Chosen]]:
        """Read all pages; wait while the storage is unavailable, and continue after the last event."""
        after = 0
        while not self._stop.is_set():
            try:
                async for page in pages(after):
                    yield page
                    after = page[-1].event_id if page else after
            except StorageUnavailableError as error:
                log.warning("replay %s waits for the store: %s", self.id, error.message)
                await self._rest(STORAGE_PAUSE)
            else:
                return

    async def _page(self, page: Sequence[Chosen]) -> None:
        at = 0
        while at < len(page) and not self._stop.is_set():
            chosen = portion(page, at, self._may)
            if not chosen:
                await self._rest(max(self._wait, TICK))
                continue
            created = await self._repeat_or_wait(chosen)
            if created is None:
                return
            at += len(chosen)
            self.done += len(chosen)
            self.created += sum(created)
            self.skipped += created.count(0)
            self.reached = chosen[-1].received_at

    def _may(self) -> bool:
        self._wait = self._bucket.take(self._clock.steady())
        return not self._wait

    async def _repeat_or_wait(self, chosen: Sequence[Chosen]) -> list[int] | None:
        """Replay these events; wait while the storage is unavailable. None: cancelled."""
        while not self._stop.is_set():
            try:
                return await self._repeater.repeat(chosen, self.request.to)
            except StorageUnavailableError as error:
                log.warning("replay %s waits for the store: %s", self.id, error.message)
                await self._rest(STORAGE_PAUSE)
        return None

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


class Replays:
    """All running replays, and the last `KEPT` that have ended since the daemon started."""

    def __init__(self, *, store: Store, router: Router, clock: Clock) -> None:
        self._store = store
        self._router = router
        self._clock = clock
        self._repeater = Repeater(store, router)
        self._replays: dict[str, Replay] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def count(self, request: ReplayRequest) -> int:
        """Return the number of events of a request."""
        return (await self._measure(request))[0]

    async def count_deliveries(self, selection: Selection) -> int:
        """Return the number of deliveries that a retry of a selection would send."""
        span = await self._store.queries.span(selection)
        pages = self._store.queries.select(selection, span)
        return sum([len(one.destinations) async for page in pages for one in page])

    async def start(self, request: ReplayRequest) -> Replay:
        """Count the events and start the replay.

        Raises:
            UnknownError: the destination `to` does not exist.
            RelayError: too many replays are running.
        """
        if request.to not in (None, ROUTES, *self._router.destinations):
            known = ", ".join(self._router.destinations)
            raise UnknownError(f"unknown destination {shown(request.to)}", hint=f"destinations: {known}")
        total, span = await self._measure(request)
        if len(self._tasks) >= MOST_RUNNING:
            raise RelayError(f"{MOST_RUNNING} replays are running", hint="wait until one ends, or cancel one")
        replay = Replay(request, total, self._repeater, self._clock)
        for ended in [id_ for id_ in self._replays if id_ not in self._tasks][: -KEPT + 1]:
            del self._replays[ended]
        self._replays[replay.id] = replay

        def pages(after: int) -> AsyncIterator[Sequence[Chosen]]:
            return self._pages(request, Span(max(span.first, after + 1), span.last))

        task = asyncio.create_task(replay.run(pages), name=f"replay {replay.id}")
        self._tasks[replay.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(replay.id))
        return replay

    def all(self) -> list[Replay]:
        """Return all known replays, newest first."""
        return [*reversed(self._replays.values())]

    def get(self, id_: str) -> Replay:
        """Return one replay by its id, of which any unique prefix is enough.

        Raises:
            UnknownError: the id is unknown; a restart forgets all replays.
            RelayError: the id is ambiguous.
        """
        digits = id_.lower().removeprefix(REPLAY)
        found = [each for each in self._replays if digits and each.startswith(REPLAY + dashed(digits))]
        if not found:
            hint = "a restart ends all replays; the log names the `since` to continue with"
            raise UnknownError(f"unknown replay {shown(id_)}", hint=hint)
        if len(found) > 1:
            raise ambiguous("replay", id_, found)
        return self._replays[found[0]]

    async def cancel(self, id_: str) -> Replay:
        """Cancel a replay and wait up to `STOP_WITHIN` for its last transaction. Raises as `get` does."""
        replay = self.get(id_)
        replay.cancel()
        if (task := self._tasks.get(replay.id)) is not None:
            await asyncio.wait((task,), timeout=STOP_WITHIN)
        return replay

    async def retry(self, named: Sequence[Named]) -> Retried:
        """Create new deliveries for ended ones, and make pending ones due now."""
        pending = [one.id for one in named if one.state == "pending"]
        ended = [one.chosen for one in named if one.state != "pending"]
        hurried = await self._store.deliveries.make_due(pending) if pending else 0
        created = at = 0
        while chosen := portion(ended, at):
            created += sum(await self._repeater.repeat(chosen, None))
            at += len(chosen)
        return Retried(created, hurried, len(named) - hurried - created)

    async def stop(self) -> None:
        """Cancel all replays and wait up to `STOP_WITHIN` for their last transactions."""
        tasks = set(self._tasks.values())
        stopped = [self._replays[id_] for id_ in self._tasks]
        for replay in stopped:
            replay.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_WITHIN)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replay in stopped:
            if replay.done < replay.total:
                since = "the same `since`" if replay.reached is None else f"since = {rfc3339(replay.reached)}"
                log.warning(
                    "replay %s stopped with the daemon; to continue, start a replay with %s", replay.id, since
                )

    async def _measure(self, request: ReplayRequest) -> tuple[int, Span]:
        if not isinstance(request.what, Selection):
            return len(request.what), Span(0, 0)
        span = await self._store.queries.span(request.what)
        return sum([len(page) async for page in self._pages(request, span)]), span

    async def _pages(self, request: ReplayRequest, span: Span) -> AsyncIterator[Sequence[Chosen]]:
        if not isinstance(request.what, Selection):
            yield request.what
            return
        async for page in self._store.queries.select(request.what, span):
            yield page
