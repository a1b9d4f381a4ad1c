"""The health of a destination: paused, disabled, resting, failing, and the state of its circuit breaker."""

import logging
from typing import Any, Literal

import msgspec

from relay.base.clock import SECOND, Clock, rfc3339
from relay.config.schema import DestinationConfig
from relay.delivery.circuit_breaker import Change, CircuitBreaker
from relay.errors import RelayError, StorageError
from relay.metrics import Metrics
from relay.model import OPERATOR_SOURCE, PAUSED_IN_CONFIG, DestinationState, GeneratedEvent, StoredEvent
from relay.process.logs import fields
from relay.store import FOREVER, Standing, Store

log = logging.getLogger("relay.delivery")

RESTING = "resting"

ELSEWHERE = "on another node"
"""Why this node holds deliveries whose lane another node owns, or will take."""

DISABLE = "disable"
"""The request by which the owner of a shard asks the keeper of the state to disable the destination."""

NO_STORAGE = "waiting for storage"
"""Why a lane is held while the store fails: an attempt whose outcome is lost would be repeated."""


class DestinationHealth:
    """Decides whether deliveries are held. Changes of its state are stored, logged and sent as events."""

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
        self.circuit = CircuitBreaker(config.circuit, config.concurrency)
        self.rest_until = 0  # steady clock
        self.owned_until = FOREVER if store.nodes.alone else 0  # steady clock; 0: this node does not own it
        # If nodes own shards of the destination, one of them stores its state and reports changes.
        self.is_keeper = True
        self.is_divided = False
        self.opened_by: tuple[str, bool] | None = None  # why the circuit opened, and `Standing.is_quiet`
        self.has_news = False  # whether `standing` may differ from the standing of a working destination
        self._rest_reason = RESTING
        self._stored_hold = PAUSED_IN_CONFIG if config.paused else state.held
        self._config = config
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._open_as_reported(Standing())
        self._set_gauges()

    def limit(self, now: int) -> int:
        """Return the maximum number of attempts in flight at `now` (steady clock); 0: deliveries are held."""
        if self._stored_hold is not None or self.rest_until > now or self.owned_until <= now:
            return 0
        circuit = self.circuit
        if circuit.open_until is None and circuit.ramp is None:  # the usual case, without a call
            return circuit.concurrency
        return circuit.limit(now)

    def held_at(self, now: int) -> str | None:
        """Return why deliveries are held at this time (steady clock), or None if they are not held."""
        if self._stored_hold is not None:
            return self._stored_hold
        if self.owned_until <= now:  # the node could not renew its ownership, or has none
            return NO_STORAGE if self.owned_until else ELSEWHERE
        if self.rest_until > now:
            return self._rest_reason
        if self.circuit.limit(now) == 0:
            return "circuit open"
        return None

    @property
    def held_until(self) -> int | None:
        """Return when the hold ends (steady clock); None: no time is set, or another node owns the lane."""
        if not self.owned_until:
            return None
        if self._stored_hold is not None:
            return self.paused_until
        return max(self.rest_until, self.circuit.open_until or 0)

    @property
    def paused_until(self) -> int | None:
        """Return when the pause ends (steady clock); None: there is no pause, or it has no end."""
        return self.state.paused_until if self.paused_by == "operator" else None

    @property
    def paused_by(self) -> Literal["operator", "config"] | None:
        """Return who paused the destination; config.toml has priority. None: it is not paused."""
        if self._config.paused:
            return "config"
        return "operator" if self.state.paused else None

    def reconfigure(self, config: DestinationConfig) -> None:
        """Apply another config, which may fix past failures: end a requested pause and make a probe due."""
        self._config = config
        self._stored_hold = PAUSED_IN_CONFIG if config.paused else self.state.held
        self.rest_until = 0
        self.circuit.reconfigure(config.circuit, config.concurrency, self._clock.steady())

    def divide(self, *, is_divided: bool, is_keeper: bool) -> None:
        """Set whether the lane has shards, and whether this node keeps the destination's state."""
        if (is_divided, is_keeper) != (self.is_divided, self.is_keeper):
            self.is_divided, self.is_keeper = is_divided, is_keeper
            self._set_gauges()

    def clear_gauges(self) -> None:
        """Set the gauges to 0, for a destination that is no longer in the config."""
        for gauge in (self._metrics.disabled, self._metrics.circuit):
            gauge.labels(self._config.name).set(0)

    async def forget_failures(self) -> None:
        """Restart the measurement of how long the destination has been failing."""
        if self.state.failing_since is not None and self.is_keeper:
            await self._change_if_possible(msgspec.structs.replace(self.state, failing_since=None))

    async def change(self, state: DestinationState, event: GeneratedEvent | None = None) -> None:
        """Apply a state in memory, then store it together with `event`.

        Raises:
            StorageError: the state could not be stored; in memory it is applied.
        """
        self.state = state
        self._stored_hold = PAUSED_IN_CONFIG if self._config.paused else state.held
        self._set_gauges()
        await self._store.deliveries.set_destination(state, event)

    def restore(self, state: DestinationState, standing: Standing | None) -> None:
        """Apply what another node stored and reported, because this node owns the lane from now on.

        If the destination was failing, attempts begin one at a time, and the next failure opens the circuit.
        `standing` is that of the former owner; None: no node has owned the lane yet.
        """
        self.note(state)
        self.circuit.restart(careful=state.failing_since is not None)
        self._open_as_reported(standing)
        self.rest_until, self._rest_reason = 0 if standing is None else standing.rest_until, RESTING
        self.has_news = self.has_news or standing not in (None, Standing())
        self._set_gauges()

    def _open_as_reported(self, standing: Standing | None) -> None:
        """Open the circuit if the previous owner of the lane left it open.

        The stored state has that of the whole destination, and the standing that of a shard.
        """
        reported = self.state.circuit_opened
        self.opened_by = None if reported is None else (reported, False)
        if standing is not None and standing.circuit is not None and (standing.is_quiet or self.is_divided):
            self.opened_by = (standing.circuit, standing.is_quiet)
        elif standing is not None and self.is_divided:
            self.opened_by = None
        if self.opened_by is not None:
            known = standing or Standing()
            probe_at = self._clock.steady() if known.probe_at is None else known.probe_at
            self.circuit.open_again(probe_at, known.probe_wait)

    @property
    def standing(self) -> dict[str, Any]:
        """The state to report to other nodes, as fields of `Standing`."""
        reason, is_quiet = self.opened_by or (None, False)
        return {
            "circuit": reason,
            "is_quiet": is_quiet,
            "probe_at": self.circuit.open_until,
            "probe_wait": self.circuit.wait if self.circuit.is_open else 0,
            "rest_until": self.rest_until if self._rest_reason == RESTING else 0,
        }

    def _report_standing(self) -> None:
        """Let other nodes know soon that the standing has changed."""
        self.has_news = True
        self._store.nodes.report_soon()

    def follow(self, state: DestinationState) -> None:
        """Apply the state that another node keeps, to the shards that this node owns."""
        if self.state.held is not None and state.held is None:
            self.rest_until = 0
            self.circuit.probe_by(self._clock.steady())
        self.note(state)

    def note(self, state: DestinationState) -> None:
        """Keep the state that the owner of the lane has stored, to show it."""
        self.state = state
        self._stored_hold = PAUSED_IN_CONFIG if self._config.paused else state.held

    async def set_by_operator(self, state: DestinationState) -> None:
        """Apply and store an operator's decision. Resuming also ends a rest and makes a probe due."""
        before = self.state
        await self.change(self._resumed(state))
        for action in _actions(before, state):
            name = self._config.name
            log.info("%s: %s by an operator", name, action, extra=fields(destination=name))

    async def end_pause(self) -> None:
        """End a pause whose time has passed; while the store cannot be written, in memory only."""
        name = self._config.name
        state = msgspec.structs.replace(self.state, paused=False, paused_until=None)
        await self._change_if_possible(self._resumed(state))
        log.info("%s: resumed: its pause ended", name, extra=fields(destination=name))

    def _resumed(self, state: DestinationState) -> DestinationState:
        """Return a new state; if it ends the hold, also end a rest, forget failures and make a probe due."""
        if self.state.held is None or state.held is not None:
            return state
        self.rest_until = 0
        self.circuit.probe_by(self._clock.steady())
        return msgspec.structs.replace(state, failing_since=None)

    async def close_circuit(self, reason: str) -> bool:
        """Close an open circuit and end a rest; return False if there was neither."""
        rested = self.rest_until > self._clock.steady()
        self.rest_until = 0
        change = self.circuit.close()
        if change is not None:
            await self._note_change(change, None, reason)
        elif rested:
            name = self._config.name
            log.info("%s: its pause has ended: %s", name, reason, extra=fields(destination=name))
            self._report_standing()
        else:
            return False
        await self.forget_failures()
        return True

    def rest(self, micros: int, reason: str = RESTING) -> None:
        """Hold deliveries for `micros` microseconds from now, unless a longer rest is set already."""
        until = self._clock.steady() + micros
        if until > self.rest_until:
            is_longer = until - self.rest_until >= SECOND  # the next renewal reports a few milliseconds
            self.rest_until, self._rest_reason = until, reason
            if is_longer and reason == RESTING:
                self._report_standing()

    async def succeed(self, event: StoredEvent, openings: int) -> None:
        """Record a successful attempt; see `CircuitBreaker.record` for `openings`."""
        if self.state.failing_since is not None:
            await self.forget_failures()
        circuit = self.circuit
        is_closed = circuit.failures == 0 and circuit.ramp is None and circuit.open_until is None
        if is_closed and self.state.circuit_opened is None:
            return  # a success changes nothing
        await self._record("ok", event, "ok", openings)

    async def fail(
        self, result: str, event: StoredEvent, reason: str, openings: int, *, disable: str | None
    ) -> None:
        """Record a failed attempt; `disable` is the reason to disable the destination, or None."""
        if not self.is_keeper:
            await self._fail_without_keeping(result, event, reason, openings, disable=disable)
            return
        now = self._clock.steady()  # a step of the wall clock disables no destination
        since = self.state.failing_since
        if since is None:
            since = now
            await self._change_if_possible(msgspec.structs.replace(self.state, failing_since=now))
        if disable is None and now - since > self._config.disable_after * SECOND:
            disable = "failing"
        if disable is not None and self.state.disabled_at is None:
            await self.disable(disable, is_quiet=event.source == OPERATOR_SOURCE)
        await self._record(result, event, reason, openings)

    async def disable(self, reason: str, *, is_quiet: bool) -> None:
        """Disable the destination because of a response; with `is_quiet`, without an operator event."""
        name = self._config.name
        log.error(
            "%s: disabled (%s); its deliveries are held until an operator enables it",
            name,
            reason,
            extra=fields(destination=name, held=f"disabled: {reason}"),
        )
        state = msgspec.structs.replace(self.state, disabled_at=self._clock.wall(), disabled_reason=reason)
        await self._change_if_possible(state, self._operator_event("disabled", reason, is_quiet=is_quiet))

    async def _fail_without_keeping(
        self, result: str, event: StoredEvent, reason: str, openings: int, *, disable: str | None
    ) -> None:
        """Record a failed attempt at a shard; another node keeps the state of the destination."""
        if disable is not None and self.state.disabled_at is None:
            self._stored_hold = f"disabled: {disable}"
            name, is_quiet = self._config.name, event.source == OPERATOR_SOURCE
            try:
                await self._store.nodes.ask(name, DISABLE, {"reason": disable, "is_quiet": is_quiet})
            except RelayError as error:  # the next attempt gets the same response, and asks again
                extra = fields(destination=name)
                log.warning("%s: cannot disable the destination: %s", name, error.message, extra=extra)
        await self._record(result, event, reason, openings)

    async def _record(self, result: str, event: StoredEvent, reason: str, openings: int) -> None:
        """Record the result of an attempt in the circuit."""
        change = self.circuit.record(result, self._clock.steady(), openings)
        if change is not None:
            await self._note_change(change, event, reason)
        elif not self.is_divided:  # an earlier report may have failed
            await self.report(self.opened_by)

    async def _note_change(self, change: Change, event: StoredEvent | None, reason: str) -> None:
        """Log that the circuit changed, and report it; `event` is None if an operator closed it.

        If the lane has shards, the keeper of the destination's state reports it.
        """
        event_id = None if event is None else event.public_id
        extra = fields(destination=self._config.name, circuit=change, event_id=event_id)
        log.warning("%s: circuit %s: %s", self._config.name, change, reason, extra=extra)
        is_quiet = event is not None and event.source == OPERATOR_SOURCE
        self.opened_by = (reason, is_quiet) if change == "opened" else None
        self._report_standing()
        self._set_gauges()
        if not self.is_divided:
            await self.report(self.opened_by, reason)

    async def report(self, opened_by: tuple[str, bool] | None, reason: str = "ok") -> None:
        """Send an operator event if the circuit has opened or closed since the latest event.

        `opened_by` is from any shard whose circuit is open; None: all circuits are closed. The state and the
        event are stored together, so a node that takes over the lane does not report the change again. If
        they cannot be stored, the next call reports it.
        """
        reported, opened = self.state.circuit_opened, None
        if opened_by is not None and not opened_by[1]:
            opened = opened_by[0]
        if (reported is None) == (opened is None):
            return
        type_, why = ("recovered", reason) if opened is None else ("circuit_opened", opened)
        try:
            await self.change(
                msgspec.structs.replace(self.state, circuit_opened=opened),
                self._operator_event(type_, why, is_quiet=False),
            )
        except StorageError as error:
            if self.state.circuit_opened == opened:
                self.state = msgspec.structs.replace(self.state, circuit_opened=reported)
            self._warn_unstored(error)

    async def _change_if_possible(self, state: DestinationState, event: GeneratedEvent | None = None) -> None:
        """Apply a state; while the store cannot be written, keep it in memory only."""
        try:
            await self.change(state, event)
        except StorageError as error:
            self._warn_unstored(error)

    def _warn_unstored(self, error: StorageError) -> None:
        name = self._config.name
        extra = fields(destination=name)
        log.warning("%s: cannot store the destination's state: %s", name, error.message, extra=extra)

    def _operator_event(self, type_: str, reason: str, *, is_quiet: bool) -> GeneratedEvent | None:
        """Return an operator event; None if a delivery of an operator event is the cause, to avoid a loop."""
        if is_quiet:
            return None
        name = self._config.name
        url = str(self._config.url).partition("?")[0]  # a query may hold a secret
        return GeneratedEvent(
            type=f"destination.{type_}",
            subject=name,
            data={"destination": name, "url": url, "reason": reason},
        )

    def _set_gauges(self) -> None:
        name = self._config.name
        self._metrics.disabled.labels(name).set(self.is_keeper and self.state.disabled_at is not None)
        is_open = self.state.circuit_opened is not None if self.is_divided else self.circuit.is_open
        self._metrics.circuit.labels(name).set(self.is_keeper and is_open)


def _actions(before: DestinationState, after: DestinationState) -> list[str]:
    """Return the words for an operator's changes."""
    words = []
    if after.paused and (not before.paused or before.paused_until != after.paused_until):
        until = after.paused_until
        words.append("paused" if until is None else f"paused until {rfc3339(until)}")
    elif before.paused and not after.paused:
        words.append("resumed")
    if (before.disabled_at is None) != (after.disabled_at is None):
        words.append("enabled" if after.disabled_at is None else "disabled")
    return words
