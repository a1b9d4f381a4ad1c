"""One destination's lane: its slots, its window of held deliveries, its rests. No lane waits for another."""

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine

from relay.clock import SECOND, Clock
from relay.config.model import DestinationConfig
from relay.delivery.memory import Memory
from relay.delivery.sender import BLOCKED_REST, Sender, corrupt
from relay.delivery.slots import Slots
from relay.errors import StorageError
from relay.metrics import Metrics
from relay.model import Delivery, DestinationState, Outcome
from relay.retry import Verdict
from relay.store import Store

log = logging.getLogger("relay.delivery")

WINDOW = 256
"""Held deliveries that a lane keeps in memory; the rest of its backlog stays in the store."""

POLL = 30 * SECOND
"""A lane looks into the store at least this often: the safety net under being told."""

STORAGE_PAUSE = 1.0  # seconds between tries while the store cannot be read or written


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
    ) -> None:
        self.config = config
        self.name = config.name
        self.state = state
        self._sender = sender
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._slots = slots
        self._memory = memory
        self._window: deque[Delivery] = deque()
        self._active = 0  # attempts being made
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0  # steady clock: when to look into the store
        self._rest_until = 0  # steady clock: a receiver asked for it, or its address is refused
        self._refilling = False
        self._stopping = False

    @property
    def in_flight(self) -> int:
        """How many attempts are being made."""
        return self._active

    @property
    def held(self) -> str | None:
        """Why nothing is sent for now; None: it is."""
        if self.state.paused:
            return "paused"
        if self.state.disabled_at is not None:
            return f"disabled: {self.state.disabled_reason}"
        if self._rest_until > self._clock.steady():
            return "resting"
        return None

    def offer(self, delivery: Delivery) -> None:
        """Take a fresh delivery, which is held already, or give it back to the store for later."""
        if self._stopping or self.held is not None or len(self._window) >= WINDOW:
            self._store.release((delivery.id,))
            self._due = 0
        elif self._window or not self._begin(delivery):
            self._memory.keep(delivery)
            self._window.append(delivery)

    def turn(self) -> None:
        """Go on: fill free slots from the window, the window from the store, and set the timer."""
        if self._stopping:
            return
        if self.held is None:
            while self._window and self._begin(self._window[0]):
                self._memory.drop(self._window.popleft())
            self._look()
        self._set_timer()

    async def set_state(self, state: DestinationState) -> None:
        """Pause, resume, disable or enable, durably."""
        await self._store.set_destination(state)
        self.state = state
        self._metrics.disabled.labels(self.name).set(state.disabled_at is not None)
        if self.held is not None:
            self._let_go()
        self._due = 0
        self.turn()

    async def stop(self, deadline: float) -> None:
        """Begin nothing more and wait for what is in flight until `deadline` (loop time), then cut it off."""
        self._stopping = True
        self._let_go()
        if self._timer is not None:
            self._timer.cancel()
        if self._tasks:
            left = max(0.0, deadline - asyncio.get_running_loop().time())
            await asyncio.wait(self._tasks, timeout=left)
        if self._active:
            log.warning("%s: %d attempts cut off; they will be made again", self.name, self._active)
        cut_off = tuple(self._tasks)
        for task in cut_off:
            task.cancel()
        await asyncio.gather(*cut_off, return_exceptions=True)
        await self._sender.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin(self, delivery: Delivery) -> bool:
        """Start sending in a slot of its own, if there is one."""
        if self._active >= self.config.concurrency or not self._slots.take(self, self._active):
            return False
        self._active += 1
        self._spawn(self._work(delivery))
        return True

    async def _work(self, delivery: Delivery) -> None:
        """Keep one slot busy until the window is empty."""
        try:
            while True:
                await self._deliver_or_keep(delivery)
                if self._stopping or self.held is not None or not self._window:
                    break
                delivery = self._window.popleft()
                self._memory.drop(delivery)
                self._look()
        finally:
            self._active -= 1
            self._slots.give(self._active)
        self.turn()

    async def _deliver_or_keep(self, delivery: Delivery) -> None:
        """Deliver; whatever fails on our side leaves the delivery pending, for the next look."""
        try:
            await self._deliver(delivery)
        except Exception:
            log.exception("%s: %s could not be tried", self.name, delivery.public_id)
            self._store.release((delivery.id,))
            self._due = min(self._due, self._clock.steady() + POLL)

    async def _deliver(self, delivery: Delivery) -> None:
        event = delivery.event
        if event is None:
            event = (await self._store.load((delivery.event_id,))).get(delivery.event_id)
            dead = corrupt(delivery, event, self._clock.wall())
            if dead is not None:
                log.error("%s: %s is dead: %s", self.name, delivery.public_id, dead.attempt.error)
                await self._record(dead)
                return
        assert event is not None  # noqa: S101 - `corrupt` judged that
        outcome, meaning = await self._sender.attempt(delivery, event)
        if meaning.kind != "ok":
            self._note(outcome, meaning)
        await self._record(outcome)
        if meaning.kind == "disable":
            await self._disable(meaning.reason or "asked")

    def _note(self, outcome: Outcome, meaning: Verdict) -> None:
        """Say what failed, and rest if that is what it means."""
        now, attempt = self._clock.steady(), outcome.attempt
        log.info(
            "%s: %s attempt %d failed: %s",
            self.name,
            outcome.delivery.public_id,
            outcome.delivery.attempts + 1,
            attempt.error or attempt.result,
        )
        if meaning.kind == "hold":
            self._rest_until = now + BLOCKED_REST
            log.error("%s: held, %s", self.name, attempt.error)
        elif meaning.pause:
            self._rest_until = max(self._rest_until, now + int(meaning.pause * SECOND))
        if self.held is not None:
            self._let_go()

    async def _record(self, outcome: Outcome) -> None:
        """Write what became of an attempt; while the disk is full this waits, it never gives up."""
        while True:
            try:
                counted = await self._store.settle(outcome)
                break
            except StorageError as error:
                log.warning("%s: an outcome waits for the store: %s", self.name, error.message)
                await asyncio.sleep(STORAGE_PAUSE)
        metrics, attempt = self._metrics, outcome.attempt
        metrics.attempts.labels(self.name, attempt.result).inc()
        metrics.attempt_seconds.labels(self.name).observe(attempt.duration_ms / 1000)
        if not counted:
            return
        if outcome.state == "pending":
            if outcome.next_attempt_at is not None:
                self._due = min(self._due, outcome.next_attempt_at)
            return
        metrics.finished.labels(self.name, outcome.state).inc()
        if outcome.state == "delivered":
            waited = self._clock.wall() - outcome.delivery.created_at
            metrics.latency.labels(self.name).observe(waited / SECOND)
        else:
            log.warning(
                "%s: %s is %s: %s", self.name, outcome.delivery.public_id, outcome.state, outcome.reason
            )

    async def _disable(self, reason: str) -> None:
        if self.state.disabled_at is None:
            log.error("%s: disabled by its receiver (%s); its deliveries are held", self.name, reason)
            state = DestinationState(
                name=self.name,
                paused=self.state.paused,
                disabled_at=self._clock.wall(),
                disabled_reason=reason,
            )
            await self.set_state(state)

    def _look(self) -> None:
        """Refill the window once it is half empty and something may be due."""
        if self._refilling or self._due > self._clock.steady() or len(self._window) > WINDOW // 2:
            return
        self._refilling = True
        self._spawn(self._refill())

    async def _refill(self) -> None:
        """Claim what is due, and read as many bodies as memory allows."""
        self._due = self._clock.steady() + POLL
        try:
            claim = await self._store.claim(self.name, WINDOW - len(self._window))
            if claim.next_due is not None:
                self._due = min(self._due, claim.next_due)
            await self._load(claim.deliveries)
            if self._stopping or self.held is not None:
                self._store.release(delivery.id for delivery in claim.deliveries)
            else:
                for delivery in claim.deliveries:
                    self._memory.keep(delivery)
                    self._window.append(delivery)
        except Exception:
            log.exception("%s: cannot look for due deliveries", self.name)
            self._due = self._clock.steady() + int(STORAGE_PAUSE * SECOND)
        finally:
            self._refilling = False
        self.turn()

    async def _load(self, deliveries: tuple[Delivery, ...]) -> None:
        """Read the bodies of the first of them, in one go; the others are read when a slot is free."""
        wanted, size = [], 0
        for delivery in deliveries:
            size += delivery.size
            if not self._memory.room(size):
                break
            wanted.append(delivery)
        if not wanted:
            return
        events = await self._store.load([delivery.event_id for delivery in wanted])
        for delivery in wanted:
            event = events.get(delivery.event_id)
            if corrupt(delivery, event, 0) is None:
                delivery.event = event

    def _let_go(self) -> None:
        """Give the window back to the store: what is held does not wait in memory."""
        for delivery in self._window:
            self._memory.drop(delivery)
        self._store.release(delivery.id for delivery in self._window)
        self._window.clear()
        self._due = 0

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock.steady()
        at = self._rest_until if self._rest_until > now else self._due
        if at > now and self.state.disabled_at is None and not self.state.paused:
            self._timer = asyncio.get_running_loop().call_later((at - now) / SECOND, self.turn)
