"""The lane of one destination: its slots, its windows of deliveries in memory, its holds.

A lane never waits for another lane.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from relay.base.clock import SECOND, Clock
from relay.base.shards import Shards
from relay.config.schema import DestinationConfig
from relay.delivery.attempt import (
    BLOCKED_REST,
    AttemptRunner,
    Preview,
    corrupt,
    delivery_fields,
    log_attempt,
    log_end,
    outdated,
    overdue,
    unspent,
)
from relay.delivery.destination_health import NO_STORAGE, DestinationHealth
from relay.delivery.http.http_client import Certificate, OutOfResourcesError
from relay.delivery.http.result import HttpResult, Timing
from relay.delivery.limits import OWN_SLOTS, BodyBudget, RateLimit, Slots
from relay.delivery.retry import Verdict
from relay.delivery.window import Window
from relay.errors import StorageError
from relay.metrics import Metrics
from relay.model import RESULTS, Delivery, DestinationState, Outcome, StoredEvent
from relay.process.logs import RateLimitedLog, fields
from relay.store import FOREVER, Standing, Store

log = logging.getLogger("relay.delivery")
T = TypeVar("T")

WINDOW_SIZE = 128
"""Deliveries in a window; the rest of the backlog stays in the store."""

GROUPS = 8
"""Groups in a window of a destination with `group_by`; each has up to `group_max` deliveries."""

POLL = 30 * SECOND
"""A lane queries the store at least this often, in case a notification was missed."""

MIN_TIMER = 0.001  # seconds; timers of uvloop fire up to half of that early, and must not fire in a row

OUT_OF_RESOURCES_REST = SECOND
"""How long a destination rests after this machine ran out of descriptors or memory during an attempt."""

STORAGE_PAUSE = 1.0  # seconds between tries while the store cannot be read or written


class ShardElsewhere(NamedTuple):
    """A shard that another node owns, as that node has reported it."""

    number: int
    node: str  # "": no node owns it, or its name is unknown
    in_flight: int
    circuit: str | None  # why the circuit breaker is open; None: it is closed
    is_quiet: bool  # see `Standing`


class Lane:
    """Sends the deliveries of one destination."""

    def __init__(
        self,
        config: DestinationConfig,
        runner: AttemptRunner,
        *,
        store: Store,
        clock: Clock,
        metrics: Metrics,
        slots: Slots,
        budget: BodyBudget,
        state: DestinationState,
        resource_log: RateLimitedLog,
    ) -> None:
        self.config = config
        self.name = config.name
        self.health = DestinationHealth(config, state, store=store, clock=clock, metrics=metrics)
        self.in_flight = 0  # attempts
        self.last_success: int | None = None  # time of the latest 2xx since the start, wall clock
        self.last_failure: tuple[int, str] | None = None  # wall clock, error; the latest since the start
        self._runner = runner
        self._replaced: set[AttemptRunner] = set()  # by a reload, with attempts still in flight
        self._store = store
        self._clock = clock
        # Looked up once: a look-up costs three times as much as counting.
        self._attempt_counters = {result: metrics.attempts.labels(self.name, result) for result in RESULTS}
        self._attempt_seconds = metrics.attempt_seconds.labels(self.name)
        self._latency = metrics.latency.labels(self.name)
        self._slowest, self._slowest_at = 0.0, 0  # of the latest exemplar: milliseconds, wall clock
        self._slots = slots
        self._budget = budget
        self._resource_log = resource_log  # of all lanes together
        size = GROUPS if config.group_by is not None else WINDOW_SIZE
        self._first = Window(budget, retries=False, size=size)
        self._retry = Window(budget, retries=True, size=size)
        self._windows = (self._first, self._retry)
        self._latest = self._retry  # the window of the last attempt
        self._rate = self._rate_limit()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0  # steady clock
        self.node = ""  # the node that owns this lane, if it is another one and known
        self.shards: Shards | None = None  # shards that this node owns; None: the destination is not divided
        self.others: tuple[ShardElsewhere, ...] = ()  # the other shards
        self._term = 0  # counts the times that this node has begun to own the lane
        self._by_slot: Counter[int] = Counter()  # attempts in flight
        self._outcomes_wait = False  # for a store that cannot be written; logged once
        self._stopping = False
        self._removed = False  # the config no longer has this destination

    @property
    def held(self) -> str | None:
        """Return why deliveries are held, or None if they are not held."""
        held = self.health.held_at(self._clock.steady())
        return NO_STORAGE if held is None and self._store.failure is not None else held

    @property
    def certificate(self) -> Certificate | None:
        """Return the receiver's certificate at the latest connection; None: no TLS connection yet."""
        return self._runner.client.certificate

    @property
    def refills(self) -> tuple[tuple[int, bool], ...]:
        """For each window: its finished store queries, and whether one more is due or under way."""
        now, probing = self._clock.steady(), self.health.circuit.is_open
        idle = self._stopping or self.held is not None
        return tuple(
            (window.refills, window.refilling or (not idle and window.wants(now, probing=probing)))
            for window in self._windows
        )

    @property
    def is_owned(self) -> bool:
        """Whether this node owns the lane, so that no other node begins attempts."""
        return self.health.owned_until > self._clock.steady()

    def own(self, until: int, state: DestinationState | None, standing: Standing | None = None) -> None:
        """Own this lane until a time (steady clock), from now on or for longer than before.

        `state` is the stored state of the destination; None: the lane has read it already. `standing` is the
        report of the lane's former owner.
        """
        was_owned = self.is_owned
        if self.shards is not None:
            was_owned = False
            self._set_shards(None)
        if not was_owned and not self._store.nodes.alone:
            self._set_share(0.0)  # another node may have used the rate until now
            self._set_share(1.0)
        self.health.owned_until, self.node = until, ""
        if state is not None:
            self.health.restore(state, standing)
        if not was_owned:
            self._begin_term()
            self.turn()

    def disown(self, node: str = "") -> None:
        """Start no further attempts, and release the deliveries in memory: another node owns this lane."""
        if self.is_owned:
            self.health.clear_gauges()  # the other node exports them
        if self.shards is not None:
            self._set_shards(None)
        self.health.owned_until, self.node = 0, node
        self._release_windows()

    def own_shards(
        self,
        shards: Shards,
        until: int,
        state: DestinationState,
        standing: Standing | None = None,
        *,
        is_keeper: bool,
        node: str = "",
    ) -> None:
        """Own some shards of the destination until a time (steady clock).

        `is_keeper`: whether this node also keeps the state of the destination; if not, `node` does it.
        `state` is the stored state, `standing` the report of the shards' former owners.
        """
        former, was_owned, held = self.shards, self.is_owned and self.shards is not None, self.held
        was_keeper = former is not None and self.health.is_keeper
        self.node = node
        self.health.owned_until = until if shards.numbers else 0
        self.health.divide(is_divided=True, is_keeper=is_keeper)
        if shards != former:
            self._set_shards(shards)
        if is_keeper and was_keeper:
            state = self.health.state  # may be newer
        if shards.numbers and not was_owned:
            self.health.restore(state, standing)
            self._begin_term()
        else:
            self.health.follow(state)
        gains = former is None or shards.count != former.count or shards.numbers - former.numbers
        if gains or self.held != held:
            self.apply_hold()

    def release_shard(self, number: int) -> None:
        """Start no further attempts for a shard, so that another node can own it."""
        if self.shards is not None and number in self.shards.numbers:
            self._set_shards(Shards(self.shards.count, self.shards.numbers - {number}))
            if not self.shards.numbers:
                self.health.owned_until = 0

    async def released(self) -> None:
        """Wait until all attempts in flight belong to the shards that this node owns, within their limit."""
        while self._tasks and self.has_foreign:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    @property
    def has_foreign(self) -> bool:
        """Whether attempts in flight belong to shards that this node has released, or exceed its limit."""
        shards = self.shards
        if shards is None:
            return self.in_flight > 0 and not self.is_owned
        limit = shards.share(self.config.concurrency)
        return self.in_flight > limit or any(not shards.covers(slot) for slot in +self._by_slot)

    def in_flight_of(self, number: int) -> int:
        """Return the number of attempts in flight at a shard."""
        count = 1 if self.shards is None else self.shards.count
        return sum(active for slot, active in self._by_slot.items() if count and slot % count == number)

    @property
    def in_flight_everywhere(self) -> int:
        """Return the number of attempts in flight, including those at shards of other nodes."""
        return self.in_flight + sum(each.in_flight for each in self.others)

    @property
    def is_open_anywhere(self) -> bool:
        """Whether the circuit breaker is open, on this node or for a shard of another one."""
        return self.health.circuit.is_open or any(each.circuit is not None for each in self.others)

    @property
    def standing(self) -> dict[str, dict[str, Any]]:
        """The states of the lane or of the owned shards, as fields of `Standing`."""
        standing = self.health.standing
        if self.shards is None:
            return {self.name: standing} if self.health.has_news else {}
        found: dict[str, dict[str, Any]] = {
            f"{self.name}/{number}": {"in_flight": self.in_flight_of(number), **standing}
            for number in self.shards.numbers
        }
        if self.health.is_keeper:  # an older version reads the latest report there
            found[self.name] = {"circuit": self.health.state.circuit_opened, "is_quiet": False}
        return found

    def final_standing(self, name: str) -> dict[str, dict[str, Any]]:
        """The state of the lane or a shard that another node gets, after its last attempt; as `standing`."""
        return {} if self.shards is not None and name == self.name else {name: self.health.standing}

    def report_shards(self, opened: str | None) -> None:
        """Report to operators that the circuit of any shard has opened, or that all are closed again.

        Only the node that keeps the destination's state reports. `opened` is why the circuit of a shard is
        open, as the owners have stored it; None: all are closed. What this node alone knows does not count:
        a new keeper would not know it either.
        """
        if self.shards is None or not self.health.is_keeper:
            return
        if (self.health.state.circuit_opened is None) != (opened is None):
            self._spawn(self.health.report(None if opened is None else (opened, False)))

    @property
    def leases(self) -> list[str]:
        """The names of the lanes that this node owns for the destination."""
        if self.shards is None:
            return [self.name] if self.is_owned else []
        keeper = [self.name] if self.health.is_keeper else []
        return [*(f"{self.name}/{number}" for number in sorted(self.shards.numbers)), *keeper]

    @property
    def senders(self) -> list[str]:
        """The names of the owned lanes that send deliveries."""
        return self.leases if self.shards is None else [name for name in self.leases if "/" in name]

    @property
    def is_keeper(self) -> bool:
        """Whether this node keeps the state of the destination, and so handles operators' requests."""
        return self.is_owned if self.shards is None else self.health.is_keeper

    def _begin_term(self) -> None:
        """Use no delivery that was claimed before: another node may have owned the lane since, and sent it.

        A node that was suspended notices in one renewal that it has lost the lane and owns it again.
        """
        self._term += 1
        self._release_windows()

    def _set_shards(self, shards: Shards | None) -> None:
        """Limit the lane to the deliveries of some shards, and to their part of the limits."""
        before, self.shards = self.shards, shards
        if shards is None:
            self.others = ()
            self.health.divide(is_divided=False, is_keeper=True)
        if before is None or not before.numbers:
            self._set_share(0.0)
        self._apply_share()
        for window in self._windows:
            kept = []
            for delivery in window.empty():
                if self._covers(delivery):
                    kept.append(delivery)
                else:
                    self._store.deliveries.release(each.id for each in delivery.members)
            window.put(kept)

    def _apply_share(self) -> None:
        """Use the part of the limits that belongs to the owned shards."""
        if (shards := self.shards) is None:
            self.health.circuit.resize(self.config.concurrency)
            self._set_share(1.0)
        else:
            self.health.circuit.resize(shards.share(self.config.concurrency))
            self._set_share(len(shards.numbers) / shards.count if shards.count else 0.0)

    def _set_share(self, share: float) -> None:
        if self._rate is not None:
            self._rate.set_share(self._clock.steady(), share)

    def _covers(self, delivery: Delivery) -> bool:
        return self.shards is None or self.shards.covers(delivery.slot)

    async def drained(self) -> None:
        """Wait until no attempt is in flight and the outcomes are stored."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def offer(self, delivery: Delivery) -> None:
        """Take a fresh delivery that is held for this lane, or release it to the store for later."""
        window, now = self._first, self._clock.steady()
        if self.shards is not None and not self.shards.covers(delivery.slot):
            self._store.deliveries.release((delivery.id,))  # it is being handed over
            return
        limit = 0 if self._stopping or self._store.failure is not None else self.health.limit(now)
        if limit and window.due > now and len(window.deliveries) < window.size:
            if not window.deliveries and self._may_begin(now, limit):
                self._begin(window, delivery)
            else:
                window.put((delivery,))
                self._set_timer(now, limit)
            return
        # The lane is held, or the store has older deliveries, which new ones must not overtake for ever.
        self._store.deliveries.release((delivery.id,))
        window.due = 0
        if limit:
            self.turn()

    def wake(self, *, retries: bool = False) -> None:
        """Query the store: a delivery that waited there is due."""
        (self._retry if retries else self._first).due = 0
        self.turn()

    def expect(self, due: int) -> None:
        """Query the store at a time (steady clock): a group is due then."""
        if due < self._first.due:
            self._first.due = due
            self.turn()

    def drop(self, delivery_ids: Collection[int]) -> None:
        """Forget deliveries that ended without an attempt."""
        for window in self._windows:
            window.drop(delivery_ids)

    def turn(self) -> None:
        """Fill free slots from the windows and the windows from the store, and set the timer."""
        if self._stopping:
            return
        # Read the clock once, so that no delivery becomes due between this check and setting the timer.
        now = self._clock.steady()
        limit = 0 if self._store.failure is not None else self.health.limit(now)
        if limit:
            while (self._first.deliveries or self._retry.deliveries) and (
                (window := self._next()) is not None and self._may_begin(now, limit)
            ):
                self._begin(window, window.take())
            probing = self.health.circuit.open_until is not None
            for window in self._windows:
                if window.due <= now and window.wants(now, probing=probing):
                    window.refilling = True
                    self._spawn(self._refill(window))
        self._set_timer(now, limit)

    async def set_state(self, state: DestinationState) -> None:
        """Pause, resume, disable or enable, durably."""
        await self.health.set_by_operator(state)
        self.apply_hold()

    async def _end_pause(self) -> None:
        """Resume after a pause with an end."""
        await self.health.end_pause()
        self.apply_hold()

    def apply_hold(self) -> None:
        """Release the deliveries in memory if they are held now, and look for due ones otherwise."""
        if self.held is not None:
            self._release_windows()
        for window in self._windows:
            window.due = 0
        self.turn()

    async def close_circuit(self, reason: str) -> bool:
        """Close an open circuit, end a rest, and deliver; return False if there was neither."""
        if self._stopping or not await self.health.close_circuit(reason):
            return False
        for window in self._windows:
            window.due = 0
        self.turn()
        return True

    async def ping(self, event: StoredEvent, timing: Timing) -> tuple[HttpResult, Verdict]:
        """Send an event without a delivery, even while deliveries are held; no metric or limit counts it."""
        # The task is one of the lane's, so a runner that a reload replaces is closed only after it.
        return await asyncio.shield(self._spawn(self._runner.ping(event, timing)))

    def preview(self, event: StoredEvent) -> Preview:
        """Return the request that an attempt at an event would send now; raises as the runner does."""
        return self._runner.preview(event)

    def change(self, config: DestinationConfig, runner: AttemptRunner) -> None:
        """Apply another config; attempts in flight finish with the runner that they began with."""
        self._replaced.add(self._runner)
        self._spawn(self._close_replaced(self._runner, tuple(self._tasks)))
        if config.url == self.config.url and runner.client.certificate is None:
            runner.client.certificate = self.certificate
        former, self.config, self._runner = self.config, config, runner
        if config != former:
            self.health.reconfigure(config)
            self._spawn(self.health.forget_failures())
        longer = config.timeout - former.timeout
        if longer > 0 and self.health.owned_until not in {0, FOREVER}:
            # An attempt must end before the lease does, which is renewed for the new timeout within a second.
            self.health.owned_until -= int(longer * SECOND)
        if config.rate_limit != former.rate_limit:
            self._rate = self._rate_limit()
            if self.shards is not None:
                self._set_share(0.0)
        if self.shards is not None:
            self._apply_share()
        for window in self._windows:
            window.size = GROUPS if config.group_by is not None else WINDOW_SIZE
        self.apply_hold()

    def renew(self) -> None:
        """Resolve the destination's name again before the next attempt."""
        self._runner.renew()

    def remove(self) -> None:
        """Start no further attempts: the config lost the destination. The store keeps the deliveries."""
        self._removed = True
        self.health.clear_gauges()
        self._halt()

    async def stop(self, deadline: float | None) -> None:
        """Start no further attempts, wait for those in flight until `deadline` (loop time), cancel the rest.

        None: wait for them without a limit.
        """
        self._halt()
        if self._tasks:
            now = self._loop.time()
            await asyncio.wait(self._tasks, timeout=None if deadline is None else max(0.0, deadline - now))
        if self.in_flight:
            log.warning("%s: cancelled %d attempts; they will be repeated", self.name, self.in_flight)
        cancelled = tuple(self._tasks)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
        for runner in (*self._replaced, self._runner):
            await runner.close()

    def _halt(self) -> None:
        self._stopping = True
        self._release_windows()
        if self._timer is not None:
            self._timer.cancel()

    async def _close_replaced(self, runner: AttemptRunner, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Close a runner that was replaced, after the tasks that may use it."""
        if tasks:
            await asyncio.wait(tasks)
        await runner.close()
        self._replaced.discard(runner)

    def _rate_limit(self) -> RateLimit | None:
        rate = self.config.rate_limit
        return None if rate is None else RateLimit(rate, self._clock.steady())

    # --- slots ---

    def _next(self) -> Window | None:
        """Return the next window to send from: the window with fewer attempts in flight, within its share.

        Retries may use three quarters of the slots, so that they never delay first attempts. If both windows
        have the same number in flight, as with one slot or a low rate limit, they take turns.
        """
        slots = self.health.circuit.concurrency
        retry_slots = slots - -(-slots // 4) if slots > 1 else slots
        ready = [
            window
            for window in self._windows
            if window.deliveries and (not window.retries or window.active < retry_slots)
        ]
        return min(ready, key=lambda window: (window.active, window is self._latest)) if ready else None

    def _may_begin(self, now: int, limit: int) -> bool:
        """Take a slot for one more attempt, if the limit, the rate limit and the shared slots allow it."""
        active, rate = self.in_flight, self._rate
        if active >= limit or (rate is not None and not rate.allows(now)):
            return False
        if active >= OWN_SLOTS and not self._slots.take(self, active):
            return False
        if rate is not None:
            rate.take(now)
        return True

    def _begin(self, window: Window, delivery: Delivery) -> None:
        window.active += 1
        self.in_flight += 1
        self._latest = window
        if delivery.slot is not None:
            self._by_slot[delivery.slot] += 1
        self._spawn(self._work(window, delivery, self._term))

    def _spawn(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _work(self, window: Window, delivery: Delivery, term: int) -> None:
        """Fill one slot with one delivery that was claimed in a term.

        If this machine runs out of resources or the store cannot be read, the delivery stays pending. Any
        other error counts as a failed attempt.
        """
        try:
            await self._deliver(delivery, term)
        except OutOfResourcesError as error:
            line = f"{error}; deliveries are held and no attempt is counted"
            self._resource_log.warning(error.what, line, destination=self.name, held=error.what)
            self.health.rest(OUT_OF_RESOURCES_REST, error.what)
            self._release_windows()
            self._store.deliveries.release(each.id for each in delivery.members)
        except StorageError as error:
            line = f"{self.name}: cannot read the event of a delivery: {error.message}"
            self._resource_log.warning(f"{self.name}: cannot read", line, destination=self.name)
            self._store.deliveries.release(each.id for each in delivery.members)
            window.due = min(window.due, self._clock.steady() + int(STORAGE_PAUSE * SECOND))
        except (Exception, asyncio.CancelledError) as error:
            if _is_stopping(error):
                raise
            log.exception("%s: cannot attempt a delivery", self.name, extra=delivery_fields(delivery))
            if not await self._record_error(delivery, error):
                self._store.deliveries.release(each.id for each in delivery.members)
                window.due = min(window.due, self._clock.steady() + POLL)
        finally:
            window.active -= 1
            self.in_flight -= 1
            if delivery.slot is not None:
                self._by_slot[delivery.slot] -= 1
            if self.in_flight >= OWN_SLOTS:
                self._slots.give(self.in_flight)
        self.turn()

    async def _record_error(self, delivery: Delivery, error: BaseException) -> bool:
        """Record an internal error as a failed attempt, so that it cannot repeat for ever."""
        try:
            for each in delivery.members:
                if not self._store.deliveries.begin_attempt(each.id):
                    return False
                await self._record(self._runner.failed(each, error))
        except Exception:
            log.exception("%s: cannot record an attempt", self.name, extra=delivery_fields(delivery))
            return False
        return True

    # --- one delivery ---

    async def _deliver(self, delivery: Delivery, term: int) -> None:
        if delivery.followers:
            await self._deliver_group(delivery, term)
            return
        event = delivery.event
        if event is None and (event := await self._load_one(delivery)) is None:
            return
        if (
            self._store.failure is not None
            or ((until := self.health.owned_until) != FOREVER and until <= self._clock.steady())
            or (self.shards is not None and not self.shards.covers(delivery.slot))
            or term != self._term
            or not self._store.deliveries.begin_attempt(delivery.id)
        ):
            # Another node may own the lane now, or a transaction is ending the delivery. If that fails, the
            # store still has the delivery: look again.
            self._store.deliveries.release((delivery.id,))
            self._first.due = self._retry.due = 0
            return
        if delivery.expires_at is not None and (ended := overdue(delivery, self._clock.steady())) is not None:
            await self._record(ended)
            return
        circuit, runner = self.health.circuit, self._runner
        probing, openings = circuit.open_until is not None, circuit.openings
        outcome, verdict = await runner.attempt(delivery, event)
        if verdict.kind != "ok" or log.isEnabledFor(logging.DEBUG):
            log_attempt(outcome)
        if runner is not self._runner or self._removed:
            outcome = outdated(outcome, verdict, self._clock.steady(), probing=probing)
        else:
            await self._update_health(outcome, verdict, event, openings)
            if probing and circuit.open_until is not None and verdict.kind != "ok":
                outcome = unspent(outcome, circuit.open_until)
        await self._record(outcome)

    async def _deliver_group(self, first: Delivery, term: int) -> None:
        """Send one message about a group of deliveries, and settle them together."""
        members = await self._ready(first.members, term)
        if len(members) < 2:  # noqa: PLR2004 - the others have ended
            for each in members:
                each.followers = ()
                await self._deliver(each, term)
            return
        circuit, runner = self.health.circuit, self._runner
        probing, openings = circuit.open_until is not None, circuit.openings
        events = [each.event for each in members if each.event is not None]
        result = await runner.attempt_group(members, events)
        outcomes, verdict = result.outcomes, result.verdict
        if verdict.kind != "ok" or log.isEnabledFor(logging.DEBUG):
            log_attempt(outcomes[0])
        if runner is not self._runner or self._removed:
            now = self._clock.steady()
            outcomes = [outdated(outcome, verdict, now, probing=probing) for outcome in outcomes]
        else:
            await self._update_health(outcomes[0], verdict, events[0], openings)
            if probing and circuit.open_until is not None and verdict.kind != "ok":
                outcomes = [unspent(outcome, circuit.open_until) for outcome in outcomes]
        await self._record_group(outcomes, is_split=result.is_split)

    async def _ready(self, members: Sequence[Delivery], term: int) -> list[Delivery]:
        """Return the deliveries of a group that can be sent now, with their events; mark them as in flight.

        Deliveries that have expired or whose stored body is damaged end here.
        """
        missing = [each.event_id for each in members if each.event is None]
        found = await self._store.events.load(missing) if missing else {}
        ready = []
        for each in members:
            if each.event is None:
                event = found.get(each.event_id)
                if (dead := corrupt(each, event, self._clock.wall())) is not None:
                    message = "%s: a delivery is dead: its stored body is damaged"
                    log.error(message, self.name, extra=delivery_fields(each))
                    await self._record(dead)
                    continue
                each.event = event
            if (
                self._store.failure is not None
                or not self.is_owned
                or not self._covers(each)
                or term != self._term
                or not self._store.deliveries.begin_attempt(each.id)
            ):
                self._store.deliveries.release((each.id,))  # as in `_deliver`
                self._first.due = self._retry.due = 0
            elif (ended := overdue(each, self._clock.steady())) is not None:
                await self._record(ended)
            else:
                ready.append(each)
        return ready

    async def _load_one(self, delivery: Delivery) -> StoredEvent | None:
        """Read the delivery's event; if the stored body is damaged, end the delivery and return None."""
        event = (await self._store.events.load((delivery.event_id,))).get(delivery.event_id)
        dead = corrupt(delivery, event, self._clock.wall())
        if dead is None:
            delivery.event = event
            return event
        message = "%s: a delivery is dead: its stored body is damaged"
        log.error(message, self.name, extra=delivery_fields(delivery))
        await self._record(dead)
        return None

    async def _update_health(
        self, outcome: Outcome, verdict: Verdict, event: StoredEvent, openings: int
    ) -> None:
        """Update the destination's health by an attempt; if that fails, the outcome still counts."""
        try:
            if verdict.kind == "ok":
                await self.health.succeed(event, openings)
                return
            attempt = outcome.attempt
            assert attempt is not None  # noqa: S101 - every outcome of a runner has one
            reason = attempt.error or attempt.result
            self.last_failure = (self._clock.wall(), reason)
            if verdict.kind == "hold":
                log.error("%s: held: %s", self.name, reason, extra=fields(destination=self.name))
                self.health.rest(BLOCKED_REST)
            elif verdict.pause:
                self.health.rest(int(verdict.pause * SECOND))
            disable = (verdict.reason or "asked") if verdict.kind == "disable" else None
            await self.health.fail(attempt.result, event, reason, openings, disable=disable)
            if self.held is not None:
                self._release_windows()
        except Exception:
            extra = delivery_fields(outcome.delivery)
            log.exception("%s: cannot change the destination's state", self.name, extra=extra)

    async def _record(self, outcome: Outcome) -> None:
        """Store an outcome and count it. While the store fails, keep trying."""
        attempt, delivery, event = outcome.attempt, outcome.delivery, outcome.delivery.event
        while True:
            try:
                counted = await self._store.deliveries.settle(outcome)
                break
            except StorageError as error:
                self._log_waiting(delivery, error)
                await asyncio.sleep(STORAGE_PAUSE)
        self._outcomes_wait = False
        exemplar = None
        if attempt is not None:
            # Only for the slowest attempts of each second: an exemplar costs as much as an observation.
            if event is not None and (
                attempt.duration_ms > self._slowest or abs(attempt.started_at - self._slowest_at) >= SECOND
            ):
                self._slowest, self._slowest_at = attempt.duration_ms, attempt.started_at
                exemplar = {"event_id": event.public_id}
            self._attempt_counters[attempt.result].inc()
            self._attempt_seconds.observe(attempt.duration_ms / 1000, exemplar)
        if not counted:
            return
        if outcome.state == "delivered":
            self.last_success = now = self._clock.wall()
            self._latency.observe((now - delivery.created_at) / SECOND, exemplar)
        elif outcome.state == "pending":
            window = self._retry if delivery.attempts + outcome.counts else self._first
            window.due = min(window.due, outcome.next_attempt_at or 0)
        else:
            log_end(outcome)

    def _log_waiting(self, delivery: Delivery, error: StorageError) -> None:
        """Log that outcomes wait: once per failure of the store, not per outcome."""
        if not self._outcomes_wait:
            self._outcomes_wait = True
            extra = delivery_fields(delivery)
            log.warning("%s: cannot store results yet: %s", self.name, error.message, extra=extra)

    async def _record_group(self, outcomes: Sequence[Outcome], *, is_split: bool) -> None:
        """Store the outcomes of one attempt at several deliveries, as `_record` does for one."""
        while True:
            try:
                counted = await self._store.deliveries.settle_group(outcomes, split=is_split)
                break
            except StorageError as error:
                self._log_waiting(outcomes[0].delivery, error)
                await asyncio.sleep(STORAGE_PAUSE)
        self._outcomes_wait = False
        attempt = outcomes[0].attempt
        if attempt is not None:
            self._attempt_counters[attempt.result].inc()
            self._attempt_seconds.observe(attempt.duration_ms / 1000)
        for outcome in outcomes:
            delivery = outcome.delivery
            if delivery.id not in counted:
                continue
            if outcome.state == "delivered":
                self.last_success = now = self._clock.wall()
                self._latency.observe((now - delivery.created_at) / SECOND)
            elif outcome.state == "pending":
                window = self._retry if delivery.attempts + outcome.counts else self._first
                window.due = min(window.due, outcome.next_attempt_at or 0)
            else:
                log_end(outcome)

    # --- the store ---

    async def _refill(self, window: Window) -> None:
        """Claim due deliveries, and read their bodies until the memory budget is used up."""
        window.due = self._clock.steady() + POLL
        try:
            wanted = 1 if self.health.circuit.is_open else window.size - len(window.deliveries)
            together = self.config.group_max if self.config.group_by is not None else 1
            shards, term = self.shards, self._term
            claim = await self._store.deliveries.claim(
                self.name, wanted, retries=window.retries, together=together, shards=shards
            )
            if claim.next_due is not None:
                window.due = min(window.due, claim.next_due)
            if together == 1:
                await self._load(claim.deliveries)
            if self._stopping or self.held is not None or (shards, term) != (self.shards, self._term):
                self._store.deliveries.release(each.id for d in claim.deliveries for each in d.members)
                window.due = 0
            else:
                window.put(claim.deliveries)
        except StorageError as error:
            extra = fields(destination=self.name)
            log.warning("%s: cannot claim due deliveries: %s", self.name, error.message, extra=extra)
            window.due = self._clock.steady() + int(STORAGE_PAUSE * SECOND)
        except Exception:
            log.exception("%s: cannot claim due deliveries", self.name)
            window.due = self._clock.steady() + int(STORAGE_PAUSE * SECOND)
        finally:
            window.refilling = False
            window.refills += 1
        self.turn()

    async def _load(self, deliveries: Iterable[Delivery]) -> None:
        """Read the bodies of the first deliveries at once; other bodies are read when a slot is free."""
        wanted, size = [], 0
        for delivery in deliveries:
            size += delivery.size
            if not self._budget.has_room(size):
                break
            wanted.append(delivery)
        if not wanted:
            return
        try:
            events = await self._store.events.load([delivery.event_id for delivery in wanted])
        except Exception:  # each is read again in its slot, where a failure concerns that delivery alone
            log.exception("%s: cannot read the events of due deliveries", self.name)
            return
        for delivery in wanted:
            event = events.get(delivery.event_id)
            if corrupt(delivery, event, 0) is None:
                delivery.event = event

    def _release_windows(self) -> None:
        """Give the deliveries in both windows back to the store."""
        for window in self._windows:
            self._store.deliveries.release(each.id for d in window.empty() for each in d.members)
            window.due = 0

    def _set_timer(self, now: int, limit: int) -> None:
        """Call `turn` again when something may have changed; too early does no harm."""
        at = 0
        if limit:
            for wait in (self._first.due, self._retry.due, 0 if self._rate is None else self._rate.until):
                if wait > now and (not at or wait < at):
                    at = wait
        else:
            until = self.health.held_until
            if until is None:  # an operator ends the hold
                return
            at = until if until > now else now + int(STORAGE_PAUSE * SECOND)
        if at <= now or (self._timer is not None and now < self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        wait_seconds = max((at - now) / SECOND, MIN_TIMER)
        self._timer = self._loop.call_later(wait_seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        until = self.health.paused_until
        if until is not None and until <= self._clock.steady() and self.is_keeper and not self._stopping:
            self._spawn(self._end_pause())
        else:
            self.turn()


def _is_stopping(error: BaseException) -> bool:
    """Return whether an error is the cancellation of this task, and not of something that it awaits."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)
