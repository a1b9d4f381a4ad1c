"""One destination's lane: its slots, feeds and rests. No lane ever waits for another."""

import asyncio
import logging
from collections.abc import Collection, Coroutine, Iterable
from typing import Any, TypeVar

from relay.base.clock import SECOND, Clock
from relay.config.schema import DestinationConfig
from relay.delivery.attempt import BLOCKED_REST, Sender, corrupt, outdated, unspent
from relay.delivery.destination_health import Standing
from relay.delivery.feed import Feed
from relay.delivery.http.http_client import LackError
from relay.delivery.http.result import Answer
from relay.delivery.http.timings import Times
from relay.delivery.limits import Slots
from relay.delivery.log_lines import ids, tell_attempt, tell_end
from relay.delivery.memory import Memory
from relay.delivery.meter import Meter
from relay.delivery.pace import Pace
from relay.delivery.retry import Verdict
from relay.errors import StorageError
from relay.metrics import Metrics
from relay.model import Delivery, DestinationState, Outcome, StoredEvent
from relay.process.logs import Sparing, fields
from relay.store import Store

log = logging.getLogger("relay.delivery")
T = TypeVar("T")

POLL = 30 * SECOND
"""A lane looks into the store at least this often: the safety net under being told."""

TICK = 0.001  # seconds; uvloop's timers ring up to half of that early, and must not ring in a row

LACK_REST = SECOND
"""How long a destination rests after an attempt for which this machine had no descriptor or memory left."""

STORAGE_PAUSE = 1.0  # seconds between tries while the store cannot be read or written
NO_STORAGE = "waiting for storage"
"""Why a lane is held while nothing can be written: an attempt whose outcome is lost would be made again."""


class Lane:
    """Sends what one destination is owed."""

    def __init__(
        self,
        config: DestinationConfig,
        sender: Sender,
        *,
        store: Store,
        clock: Clock,
        metrics: Metrics,
        slots: Slots,
        memory: Memory,
        state: DestinationState,
        lacking: Sparing,
    ) -> None:
        self.config = config
        self.name = config.name
        self.standing = Standing(config, state, store=store, clock=clock, metrics=metrics)
        self._sender = sender
        self._former: set[Sender] = set()  # replaced, with attempts still under way
        self._store = store
        self._clock = clock
        self._meter = Meter(metrics, self.name)
        self._slots = slots
        self._memory = memory
        self._lacking = lacking  # the log of what this machine has run out of, for all lanes
        self._first = Feed(memory, retries=False)
        self._retry = Feed(memory, retries=True)
        self._feeds = (self._first, self._retry)
        self._latest = self._retry  # the feed whose turn it was last
        self._pace = Pace(config.rate_limit, clock.steady())
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0  # steady clock
        self._outcomes_wait = False  # for a store that cannot be written; the log has it
        self._stopping = False
        self._left = False  # the config has no such destination any more

    @property
    def in_flight(self) -> int:
        """How many attempts are being made."""
        return self._first.active + self._retry.active

    @property
    def held(self) -> str | None:
        """Why nothing is sent for now; None: it is."""
        return self._held_at(self._clock.steady())

    @property
    def looks(self) -> tuple[tuple[int, bool], ...]:
        """Of each feed: how often it has looked into the store, and whether one more is due or under way."""
        now, probing = self._clock.steady(), self.standing.circuit.is_open
        idle = self._stopping or self.held is not None
        return tuple(
            (feed.looks, feed.refilling or (not idle and feed.wants(now, probing=probing)))
            for feed in self._feeds
        )

    def offer(self, delivery: Delivery) -> None:
        """Take a fresh delivery, which is held already, or give it back to the store for later."""
        feed, now = self._first, self._clock.steady()
        if self._stopping or self._held_at(now) is not None:
            self._store.deliveries.release((delivery.id,))
            feed.due = 0
        elif feed.room <= 0 or feed.due <= now:
            # The store has older ones: what is new must not overtake them for ever.
            self._store.deliveries.release((delivery.id,))
            feed.due = 0
            self.turn()
        elif len(feed) or not self._may_begin():
            feed.put((delivery,))
            self._set_timer(now)
        else:
            self._begin(feed, delivery)

    def wake(self, *, retries: bool = False) -> None:
        """Look into the store: something that was waiting there is due."""
        (self._retry if retries else self._first).due = 0
        self.turn()

    def drop(self, delivery_ids: Collection[int]) -> None:
        """Forget deliveries that ended without an attempt."""
        for feed in self._feeds:
            feed.drop(delivery_ids)

    def turn(self) -> None:
        """Go on: fill free slots from the feeds, the feeds from the store, and set the timer."""
        if self._stopping:
            return
        # Read once: what is not due yet must not be past already when it comes to setting the timer.
        now = self._clock.steady()
        if self._held_at(now) is None:
            while (feed := self._next()) is not None and self._may_begin():
                self._begin(feed, feed.take())
            for feed in self._feeds:
                if feed.wants(now, probing=self.standing.circuit.is_open):
                    feed.refilling = True
                    self._spawn(self._refill(feed))
        self._set_timer(now)

    async def set_state(self, state: DestinationState) -> None:
        """Pause, resume, disable or enable, durably."""
        await self.standing.steer(state)
        if self.held is not None:
            self._let_go()
        for feed in self._feeds:
            feed.due = 0
        self.turn()

    async def ping(self, event: StoredEvent, times: Times) -> tuple[Answer, Verdict]:
        """Send an event that nobody is owed, whatever holds deliveries; it counts for nothing here."""
        # A task of the lane's own: a sender that a reload replaces is closed after it.
        return await asyncio.shield(self._spawn(self._sender.ping(event, times)))

    def change(self, config: DestinationConfig, sender: Sender) -> None:
        """Go by another config from now on; attempts under way end by the one that they began with."""
        self._former.add(self._sender)
        self._spawn(self._see_off(self._sender, tuple(self._tasks)))
        former, self.config, self._sender = self.config, config, sender
        if config != former:
            self.standing.go_by(config)
            self._spawn(self.standing.forgive())
        if config.rate_limit != former.rate_limit:
            self._pace = Pace(config.rate_limit, self._clock.steady())
        for feed in self._feeds:
            feed.due = 0
        self.turn()

    def renew(self) -> None:
        """Make the next attempt at the address that the destination's name has by then."""
        self._sender.renew()

    def leave(self) -> None:
        """Begin nothing more, as the destination is not in the config; the store keeps what it is owed."""
        self._left = True
        self.standing.leave()
        self._halt()

    async def stop(self, deadline: float | None) -> None:
        """Begin nothing more and wait for what is in flight until `deadline` (loop time), then cut it off.

        None: however long that takes.
        """
        self._halt()
        if self._tasks:
            now = asyncio.get_running_loop().time()
            left = None if deadline is None else max(0.0, deadline - now)
            await asyncio.wait(self._tasks, timeout=left)
        if self.in_flight:
            log.warning("%s: %d attempts cut off; they will be made again", self.name, self.in_flight)
        cut_off = tuple(self._tasks)
        for task in cut_off:
            task.cancel()
        await asyncio.gather(*cut_off, return_exceptions=True)
        for sender in (*self._former, self._sender):
            await sender.close()

    def _halt(self) -> None:
        self._stopping = True
        self._let_go()
        if self._timer is not None:
            self._timer.cancel()

    async def _see_off(self, sender: Sender, under_way: Collection[asyncio.Task[Any]]) -> None:
        """Close a sender that was replaced, as soon as no attempt is under way that began with it."""
        if under_way:
            await asyncio.wait(under_way)
        await sender.close()
        self._former.discard(sender)

    def _held_at(self, now: int) -> str | None:
        held = self.standing.held_at(now)
        return NO_STORAGE if held is None and self._store.failure is not None else held

    # --- slots ---

    @property
    def _most_retries(self) -> int:
        """All slots but a quarter, kept for first attempts: retries must not hold up what is new."""
        most = self.config.concurrency
        return most - -(-most // 4) if most > 1 else most

    def _next(self) -> Feed | None:
        """Choose whose turn it is: the feed with fewer attempts under way, within its share.

        With one at a time, or few in a second, none is under way: then they take turns.
        """
        ready = [
            feed
            for feed in self._feeds
            if len(feed) and (not feed.retries or feed.active < self._most_retries)
        ]
        return min(ready, key=lambda feed: (feed.active, feed is self._latest)) if ready else None

    def _may_begin(self) -> bool:
        """Take a slot for one more attempt, if circuit, concurrency, cap and rate allow it."""
        now, active = self._clock.steady(), self.in_flight
        if active >= self.standing.circuit.limit(now) or not self._pace.allows(now):
            return False
        if not self._slots.take(self, active):
            return False
        self._pace.take(now)
        return True

    def _begin(self, feed: Feed, delivery: Delivery) -> None:
        feed.active += 1
        self._latest = feed
        self._spawn(self._work(feed, delivery))

    def _spawn(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _work(self, feed: Feed, delivery: Delivery) -> None:
        """Fill one slot with one delivery.

        A lack on this machine, or a store that fails, leaves it pending; any other error is a failed attempt.
        """
        try:
            await self._deliver(delivery)
        except LackError as error:
            self._hold_for(error)
            self._store.deliveries.release((delivery.id,))
        except Exception as error:
            log.exception("%s: a delivery could not be tried", self.name, extra=ids(delivery))
            if isinstance(error, StorageError) or not await self._spend(delivery, error):
                self._store.deliveries.release((delivery.id,))
                feed.due = min(feed.due, self._clock.steady() + POLL)
        finally:
            feed.active -= 1
            self._slots.give(self.in_flight)
        self.turn()

    def _hold_for(self, error: LackError) -> None:
        """Hold everything for a moment: what this machine lacks is no failure of the receiver."""
        line = f"{error}: deliveries are held, none has spent an attempt"
        self._lacking.warning(error.what, line, destination=self.name, held=error.what)
        self.standing.rest(LACK_REST, error.what)
        self._let_go()

    async def _spend(self, delivery: Delivery, error: Exception) -> bool:
        """Record a failed attempt for an error of the relay's own, which might come again and again."""
        try:
            if not self._store.deliveries.begin_attempt(delivery.id):
                return False
            await self._record(self._sender.failed(delivery, error))
        except Exception:
            log.exception("%s: an attempt could not be recorded", self.name, extra=ids(delivery))
            return False
        return True

    # --- one delivery ---

    async def _deliver(self, delivery: Delivery) -> None:
        event = delivery.event
        if event is None:
            event = (await self._store.events.load((delivery.event_id,))).get(delivery.event_id)
            dead = corrupt(delivery, event, self._clock.wall())
            if dead is not None:
                what = "%s: a delivery is dead: its stored body cannot be trusted"
                log.error(what, self.name, extra=ids(delivery))
                await self._record(dead)
                return
            delivery.event = event
        assert event is not None  # noqa: S101 - `corrupt` judged that
        if self._store.failure is not None or not self._store.deliveries.begin_attempt(delivery.id):
            # Or it is just being ended otherwise; should that fail, the store has it for us again.
            self._store.deliveries.release((delivery.id,))
            self._first.due = self._retry.due = 0
            return
        if delivery.expires_at is not None and delivery.expires_at <= self._clock.steady():
            stale = Outcome(delivery=delivery, attempt=None, state="expired", reason="ttl", counts=False)
            await self._record(stale)
            return
        circuit, sender = self.standing.circuit, self._sender
        probing, openings = circuit.is_open, circuit.openings
        outcome, meaning = await sender.attempt(delivery, event)
        tell_attempt(outcome)
        if sender is not self._sender or self._left:
            outcome = outdated(outcome, meaning, self._clock.steady(), probing=probing)
        else:
            await self._take_in(outcome, meaning, event, openings)
            if probing and circuit.is_open and meaning.kind != "ok":
                outcome = unspent(outcome, circuit.open_until)
        await self._record(outcome)

    async def _take_in(self, outcome: Outcome, meaning: Verdict, event: StoredEvent, openings: int) -> None:
        """Take what an attempt says about the destination; should that fail, its outcome still counts."""
        try:
            if meaning.kind == "ok":
                await self.standing.succeed(event, openings)
            else:
                await self._fail(outcome, meaning, event, openings)
        except Exception:
            log.exception("%s: its state could not be changed", self.name, extra=ids(outcome.delivery))

    async def _fail(self, outcome: Outcome, meaning: Verdict, event: StoredEvent, openings: int) -> None:
        """Take what a failed attempt says about the destination."""
        attempt = outcome.attempt
        assert attempt is not None  # noqa: S101 - a sender makes one
        why = attempt.error or attempt.result
        if meaning.kind == "hold":
            log.error("%s: held, %s", self.name, why, extra=fields(destination=self.name))
            self.standing.rest(BLOCKED_REST)
        elif meaning.pause:
            self.standing.rest(int(meaning.pause * SECOND))
        disable = (meaning.reason or "asked") if meaning.kind == "disable" else None
        await self.standing.fail(attempt.result, event, why, openings, disable=disable)
        if self.held is not None:
            self._let_go()

    async def _record(self, outcome: Outcome) -> None:
        """Write what became of an attempt; while the disk is full this waits, it never gives up."""
        counted = await self._patiently(outcome)
        attempt, delivery = outcome.attempt, outcome.delivery
        if attempt is not None:
            self._meter.attempted(delivery, attempt)
        if not counted:
            return
        if outcome.state == "pending":
            feed = self._retry if delivery.attempts + outcome.counts else self._first
            feed.due = min(feed.due, outcome.next_attempt_at or 0)
        elif outcome.state == "delivered":
            self._meter.delivered(delivery, self._clock.wall())
        else:
            tell_end(outcome)

    async def _patiently(self, outcome: Outcome) -> bool:
        while True:
            try:
                settled = await self._store.deliveries.settle(outcome)
            except StorageError as error:
                if not self._outcomes_wait:  # once, however many there are and however long it lasts
                    self._outcomes_wait = True
                    told = ids(outcome.delivery)
                    log.warning("%s: outcomes wait for the store: %s", self.name, error.message, extra=told)
                await asyncio.sleep(STORAGE_PAUSE)
            else:
                self._outcomes_wait = False
                return settled

    # --- the store ---

    async def _refill(self, feed: Feed) -> None:
        """Claim what is due, and read as many bodies as memory allows."""
        feed.due = self._clock.steady() + POLL
        try:
            wanted = 1 if self.standing.circuit.is_open else feed.room
            claim = await self._store.deliveries.claim(self.name, wanted, retries=feed.retries)
            if claim.next_due is not None:
                feed.due = min(feed.due, claim.next_due)
            await self._load(claim.deliveries)
            if self._stopping or self.held is not None:
                self._store.deliveries.release(delivery.id for delivery in claim.deliveries)
                feed.due = 0
            else:
                feed.put(claim.deliveries)
        except StorageError as error:
            told = fields(destination=self.name)
            log.warning("%s: cannot look for due deliveries: %s", self.name, error.message, extra=told)
            feed.due = self._clock.steady() + int(STORAGE_PAUSE * SECOND)
        except Exception:
            log.exception("%s: cannot look for due deliveries", self.name)
            feed.due = self._clock.steady() + int(STORAGE_PAUSE * SECOND)
        finally:
            feed.refilling = False
            feed.looks += 1
        self.turn()

    async def _load(self, deliveries: Iterable[Delivery]) -> None:
        """Read the bodies of the first of them, in one go; the others are read when a slot is free."""
        wanted, size = [], 0
        for delivery in deliveries:
            size += delivery.size
            if not self._memory.room(size):
                break
            wanted.append(delivery)
        if not wanted:
            return
        try:
            events = await self._store.events.load([delivery.event_id for delivery in wanted])
        except Exception:  # each is read again when it has a slot, and its failure is its own there
            log.exception("%s: cannot read due deliveries ahead", self.name)
            return
        for delivery in wanted:
            event = events.get(delivery.event_id)
            if corrupt(delivery, event, 0) is None:
                delivery.event = event

    def _let_go(self) -> None:
        """Give the feeds back to the store: what is held does not wait in memory."""
        for feed in self._feeds:
            self._store.deliveries.release(delivery.id for delivery in feed.empty())
            feed.due = 0

    def _set_timer(self, now: int) -> None:
        """See to it that `turn` is called when something may have changed; too early does no harm."""
        until = self.standing.held_until
        if until is None:
            return
        if until > now:
            at = until
        elif self._store.failure is not None:
            at = now + int(STORAGE_PAUSE * SECOND)
        else:
            waits = [*(feed.due for feed in self._feeds), self._pace.until]
            at = min((wait for wait in waits if wait > now), default=now)
        if at <= now or (self._timer is not None and now < self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        wait = max((at - now) / SECOND, TICK)
        self._timer = asyncio.get_running_loop().call_later(wait, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.turn()
