"""How a destination stands: paused, disabled, failing since when, its circuit; and telling of changes."""

import logging

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.schema import DestinationConfig
from relay.delivery.circuit_breaker import Circuit
from relay.errors import StorageError
from relay.metrics import Metrics
from relay.model import Born, DestinationState, StoredEvent
from relay.process.logs import fields
from relay.store import OPERATOR_EVENTS, Store

log = logging.getLogger("relay.delivery")

RESTING = "resting"


class Standing:
    """What is known of one destination beside its deliveries; changes are durable and told of."""

    def __init__(
        self,
        config: DestinationConfig,
        state: DestinationState,
        *,
        store: Store,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.state = state
        self.circuit = Circuit(config.circuit, config.concurrency)
        self.rest_until = 0  # steady clock: the receiver asked for it, or its address is refused
        self._resting = RESTING  # why it rests
        self._config = config
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._show()

    def held_at(self, now: int) -> str | None:
        """Return why nothing is sent at that moment (steady clock); None: it is."""
        if (held := self.state.held) is not None:
            return held
        if self.rest_until > now:
            return self._resting
        if self.circuit.limit(now) == 0:
            return "circuit open"
        return None

    @property
    def held_until(self) -> int | None:
        """When a hold ends by itself (steady clock); None: only an operator ends it."""
        if self.state.held is not None:
            return None
        return max(self.rest_until, self.circuit.open_until or 0)

    def go_by(self, config: DestinationConfig) -> None:
        """Take on another config: what failed with the one before may have been mended by it."""
        self._config = config
        self.rest_until = 0
        self.circuit.change(config.circuit, config.concurrency, self._clock.steady())

    def leave(self) -> None:
        """Stop showing what is no fact any more: the config has no such destination."""
        for gauge in (self._metrics.disabled, self._metrics.circuit):
            gauge.labels(self._config.name).set(0)

    async def forgive(self) -> None:
        """Count from anew how long it has been failing."""
        if self.state.failing_since is not None:
            await self._tolerantly(msgspec.structs.replace(self.state, failing_since=None))

    async def change(self, state: DestinationState, tell: Born | None = None) -> None:
        """Take a new state on, at once in memory, then durably; raises what the store raises."""
        self.state = state
        self._show()
        await self._store.deliveries.set_destination(state, tell)

    async def steer(self, state: DestinationState) -> None:
        """Take on what an operator decided; one who lets it go on means at once, and as if it were new."""
        before = self.state
        if before.held is not None and state.held is None:
            state = msgspec.structs.replace(state, failing_since=None)
            self.rest_until = 0
            self.circuit.probe_at(self._clock.steady())
        await self.change(state)
        for word in _decided(before, state):
            name = self._config.name
            log.info("%s: %s by an operator", name, word, extra=fields(destination=name))

    def rest(self, micros: int, why: str = RESTING) -> None:
        """Send nothing for so long."""
        until = self._clock.steady() + micros
        if until > self.rest_until:
            self.rest_until, self._resting = until, why

    async def succeed(self, event: StoredEvent, openings: int) -> None:
        """Take in an attempt that was delivered; see `Circuit.record` for `openings`."""
        await self.forgive()
        await self._record("ok", event, "ok", openings)

    async def fail(
        self, result: str, event: StoredEvent, why: str, openings: int, *, disable: str | None
    ) -> None:
        """Take in one that was not; `disable` is the reason when the receiver wants to be left alone."""
        now = self._clock.steady()  # a step of the wall clock disables nobody
        since = self.state.failing_since
        if since is None:
            since = now
            await self._tolerantly(msgspec.structs.replace(self.state, failing_since=now))
        if disable is None and now - since > self._config.disable_after * SECOND:
            disable = "failing"
        if disable is not None and self.state.disabled_at is None:
            what = "%s: disabled (%s); its deliveries are held, none is lost"
            name = self._config.name
            log.error(what, name, disable, extra=fields(destination=name, held=f"disabled: {disable}"))
            state = msgspec.structs.replace(
                self.state, disabled_at=self._clock.wall(), disabled_reason=disable
            )
            await self._tolerantly(state, self._born("disabled", event, disable))
        await self._record(result, event, why, openings)

    async def _record(self, result: str, event: StoredEvent, why: str, openings: int) -> None:
        change = self.circuit.record(result, self._clock.steady(), openings)
        if change is None:
            return
        told = fields(destination=self._config.name, circuit=change, event_id=event.public_id)
        log.warning("%s: circuit %s: %s", self._config.name, change, why, extra=told)
        self._show()
        type_ = "circuit_opened" if change == "opened" else "recovered"
        await self._tolerantly(self.state, self._born(type_, event, why))

    async def _tolerantly(self, state: DestinationState, tell: Born | None = None) -> None:
        """Change the state; go on with what is in memory while the store cannot write it down."""
        try:
            await self.change(state, tell)
        except StorageError as error:
            name = self._config.name
            told = fields(destination=name)
            log.warning("%s: its state could not be written down: %s", name, error.message, extra=told)

    def _born(self, type_: str, event: StoredEvent, why: str) -> Born | None:
        """Make an operator event, unless a delivery of one is the cause: nothing may loop."""
        if event.source == OPERATOR_EVENTS:
            return None
        name = self._config.name
        url = self._config.url.partition("?")[0]  # a query may hold a secret
        return Born(
            type=f"destination.{type_}",
            subject=name,
            data={"destination": name, "url": url, "reason": why},
        )

    def _show(self) -> None:
        name = self._config.name
        self._metrics.disabled.labels(name).set(self.state.disabled_at is not None)
        self._metrics.circuit.labels(name).set(self.circuit.is_open)


def _decided(before: DestinationState, after: DestinationState) -> list[str]:
    """Say what an operator changed."""
    words = []
    if before.paused != after.paused:
        words.append("paused" if after.paused else "resumed")
    if (before.disabled_at is None) != (after.disabled_at is None):
        words.append("enabled" if after.disabled_at is None else "disabled")
    return words
