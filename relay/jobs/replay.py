"""Replays: events owed once more, paced so that fresh ones are not kept waiting.

They live in memory: a restart ends them. What they owed by then stays owed.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from relay.base.clock import SECOND, Clock, rfc3339
from relay.base.ids import replay_id
from relay.base.rate import TokenBucket
from relay.base.units import Rate, render_rate
from relay.errors import RelayError, StorageError, StorageUnavailableError, UnknownError
from relay.jobs.repeat import ROUTES, Repeater, portion
from relay.model import Chosen, Named, Selection
from relay.routing.filters import Router
from relay.store import Span, Store

log = logging.getLogger("relay.replay")

State = Literal["running", "cancelling", "done", "cancelled", "failed"]

DEFAULT_RATE = Rate(100, 1)
TICK = 0.1  # seconds: shorter rests would only make smaller transactions
STORAGE_PAUSE = 1.0  # seconds between tries while the store cannot be written
STOP_WITHIN = 2.0  # seconds for the transaction under way when the relay stops
MOST_RUNNING = 10
KEPT = 100  # replays that have ended and can still be looked at


class Wish(msgspec.Struct, kw_only=True, frozen=True):
    """What an operator wants replayed, and where to (see `Repeater.repeat`)."""

    what: Selection | tuple[Chosen, ...]
    to: str | None = None
    rate: Rate = DEFAULT_RATE  # events


class Retried(msgspec.Struct, frozen=True):
    """What came of retrying deliveries by hand."""

    created: int  # new deliveries, of those that had ended
    hurried: int  # pending ones that waited for their next attempt, which is now
    skipped: int  # pending and due anyhow, in flight, gone, or of a destination that is not in the config


class Replay:
    """One replay and how far it is."""

    def __init__(self, wish: Wish, total: int, repeater: Repeater, clock: Clock) -> None:
        self.id = replay_id(clock.wall())
        self.wish = wish
        self.total = total  # events, counted beforehand
        self.done = 0  # events dealt with
        self.skipped = 0  # of these: nothing was owed, or it was pending already
        self.created = 0  # deliveries
        self.reached: int | None = None  # when the last of these events came in: where to go on
        self.error: str | None = None
        self.began_at = clock.wall()
        self.ended_at: int | None = None
        self._state: State = "running"
        self._repeater = repeater
        self._clock = clock
        self._began = clock.steady()
        self._ended: int | None = None
        self._bucket = TokenBucket(wish.rate, self._began)
        self._wait = 0.0  # seconds until the bucket has a token
        self._stop = asyncio.Event()

    @property
    def state(self) -> State:
        """Where it stands."""
        return "cancelling" if self._state == "running" and self._stop.is_set() else self._state

    @property
    def per_second(self) -> float:
        """Events dealt with per second so far."""
        seconds = ((self._ended or self._clock.steady()) - self._began) / SECOND
        return self.done / seconds if seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds that are left; None: it has ended, or nobody knows."""
        rate = self.per_second
        return max(0, self.total - self.done) / rate if self._state == "running" and rate > 0 else None

    def cancel(self) -> None:
        """Begin no further transaction."""
        self._stop.set()

    async def run(self, pages: AsyncIterator[Sequence[Chosen]]) -> None:
        """Repeat what is on the pages until they or the operator's patience end."""
        log.info("replay %s: %d events at %s", self.id, self.total, render_rate(self.wish.rate))
        try:
            async for page in pages:
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

    async def _page(self, page: Sequence[Chosen]) -> None:
        at = 0
        while at < len(page) and not self._stop.is_set():
            chosen = portion(page, at, self._may)
            if not chosen:
                await self._rest(max(self._wait, TICK))
                continue
            created = await self._patiently(chosen)
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

    async def _patiently(self, chosen: Sequence[Chosen]) -> list[int] | None:
        """Repeat them, however long the disk is full; None: cancelled meanwhile."""
        while not self._stop.is_set():
            try:
                return await self._repeater.repeat(chosen, self.wish.to)
            except StorageUnavailableError as error:
                log.warning("replay %s waits for the store: %s", self.id, error.message)
                await self._rest(STORAGE_PAUSE)
        return None

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


class Replays:
    """All replays since the relay started, as far as they are remembered."""

    def __init__(self, *, store: Store, router: Router, clock: Clock) -> None:
        self._store = store
        self._router = router
        self._clock = clock
        self._repeater = Repeater(store, router)
        self._replays: dict[str, Replay] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def count(self, wish: Wish) -> int:
        """Return how many events a wish is about."""
        return (await self._measure(wish))[0]

    async def start(self, wish: Wish) -> Replay:
        """Count and begin.

        Raises:
            UnknownError: there is no destination `to`.
            RelayError: too many are running.
        """
        if wish.to not in (None, ROUTES, *self._router.destinations):
            known = ", ".join(self._router.destinations)
            raise UnknownError(f"no destination {wish.to!r}", hint=f"there are {known}")
        total, span = await self._measure(wish)
        if len(self._tasks) >= MOST_RUNNING:
            raise RelayError(f"{MOST_RUNNING} replays are running", hint="wait for one, or cancel one")
        replay = Replay(wish, total, self._repeater, self._clock)
        for ended in [id_ for id_ in self._replays if id_ not in self._tasks][: -KEPT + 1]:
            del self._replays[ended]
        self._replays[replay.id] = replay
        task = asyncio.create_task(replay.run(self._pages(wish, span)), name=f"replay {replay.id}")
        self._tasks[replay.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(replay.id))
        return replay

    def all(self) -> list[Replay]:
        """Return those that are remembered, newest first."""
        return [*reversed(self._replays.values())]

    def get(self, id_: str) -> Replay:
        """Return one.

        Raises:
            UnknownError: there is none, or a restart made the relay forget it.
        """
        replay = self._replays.get(id_)
        if replay is None:
            hint = "replays end with the relay; its log says with which `since` to go on"
            raise UnknownError(f"no replay {id_!r}", hint=hint)
        return replay

    async def cancel(self, id_: str) -> Replay:
        """Cancel one, and wait a moment for its last transaction; raises what `get` raises."""
        replay = self.get(id_)
        replay.cancel()
        if (task := self._tasks.get(id_)) is not None:
            await asyncio.wait((task,), timeout=STOP_WITHIN)
        return replay

    async def retry(self, named: Sequence[Named]) -> Retried:
        """Repeat what has ended where it was owed, and make due now what is pending."""
        pending = [one.id for one in named if one.state == "pending"]
        ended = [one.chosen for one in named if one.state != "pending"]
        hurried = await self._store.hurry(pending) if pending else 0
        created = at = 0
        while chosen := portion(ended, at):
            created += sum(await self._repeater.repeat(chosen, None))
            at += len(chosen)
        return Retried(created, hurried, len(named) - hurried - created)

    async def stop(self) -> None:
        """Let every transaction under way finish, and no other begin."""
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
                log.warning("replay %s ended with the relay: go on with %s", replay.id, since)

    async def _measure(self, wish: Wish) -> tuple[int, Span]:
        if not isinstance(wish.what, Selection):
            return len(wish.what), Span(0, 0)
        span = await self._store.span(wish.what)
        return sum([len(page) async for page in self._pages(wish, span)]), span

    async def _pages(self, wish: Wish, span: Span) -> AsyncIterator[Sequence[Chosen]]:
        if not isinstance(wish.what, Selection):
            yield wish.what
            return
        async for page in self._store.select(wish.what, span):
            yield page
