"""The test of a destination: sends one signed request, when an operator asks for it."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from relay.base.clock import Clock
from relay.base.ids import EVENT, new_id
from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.delivery.http.result import HttpResult, Timing
from relay.delivery.lane import Lane
from relay.delivery.retry import Verdict
from relay.errors import BusyError
from relay.model import EMPTY, StoredEvent

TYPE = "relay.ping"
MESSAGE = "An operator is testing this destination. No event occurred, and no action is needed."

MAX_SECONDS = 50.0
"""The longest ping, whatever the destination's timeout: commands wait 60 seconds for a response."""

SHOWN_BYTES = 1024
"""Bytes of the receiver's response that are shown."""


class Pings:
    """Sends pings, one at a time to each destination."""

    def __init__(
        self,
        clock: Clock,
        close_circuit: Callable[[Lane, str], Awaitable[bool]] = lambda lane, why: lane.close_circuit(why),
    ) -> None:
        """Take `close_circuit`, which closes a lane's circuit, on whichever node it runs."""
        self._clock = clock
        self._close_circuit = close_circuit
        self._running: set[str] = set()

    async def send(self, lane: Lane, *, close_circuit: bool = False) -> dict[str, Any]:
        """Ping a destination, even while its deliveries are held, and return the result.

        Nothing is stored, neither an event nor an attempt; the metrics ignore it, and so does the circuit
        breaker, unless `close_circuit` is set: then a success closes the circuit and ends a rest.

        Raises:
            BusyError: a ping of that destination is running.
        """
        if lane.name in self._running:
            hint = "wait for its result, then try again"
            raise BusyError(f"a test of {lane.name!r} is already running", hint=hint)
        self._running.add(lane.name)
        try:
            return await self._send(lane, close_circuit=close_circuit)
        finally:
            self._running.discard(lane.name)

    async def _send(self, lane: Lane, *, close_circuit: bool) -> dict[str, Any]:
        config, timing = lane.config, Timing()
        event = _event(config.name, self._clock.wall())
        try:
            async with asyncio.timeout(MAX_SECONDS):
                response, verdict = await lane.ping(event, timing)
        except TimeoutError:
            error = f"no response within {render_duration(MAX_SECONDS)}, the longest time that a test waits"
            response = HttpResult(result="timeout", error=error, duration_ms=MAX_SECONDS * 1000)
            verdict = Verdict(kind="retry")
        meaning, hint = explain(config, response, verdict)
        closed = False
        # A reload may have changed the URL meanwhile: then the response does not describe the new one.
        if close_circuit and verdict.kind == "ok" and lane.config == config:
            closed = await self._close_circuit(lane, "an operator's test succeeded")
        return {
            "destination": config.name,
            "id": event.public_id,
            "type": event.type,
            "ok": verdict.kind == "ok",
            "result": response.result,
            "status": response.status,
            "error": response.error,
            "verdict": meaning,
            "hint": hint,
            "held": lane.held,
            "circuit_closed": closed,
            "signatures": sum(len(each.secrets or config.secrets) for each in config.signatures),
            "duration_ms": round(response.duration_ms, 1),
            "timing_ms": timing.steps(tls=config.url.reveal().startswith("https:")),
            "answer": response.body[:SHOWN_BYTES].decode("utf-8", "replace"),
            "truncated": response.truncated or len(response.body) > SHOWN_BYTES,
        }


def _event(destination: str, now: int) -> StoredEvent:
    body = msgspec.json.encode({"destination": destination, "message": MESSAGE})
    return StoredEvent(
        id=0,
        public_id=new_id(EVENT, now),
        source=TYPE.partition(".")[0],
        type=TYPE,
        subject=destination,
        received_at=now,
        data=body,
        context=bytes(EMPTY),
        body=body,
        content_type="application/json",
        sha256=hashlib.sha256(body).digest(),
    )


def explain(config: DestinationConfig, response: HttpResult, verdict: Verdict) -> tuple[str, str]:
    """Return the outcome that this response would have for a delivery, and advice for the operator."""
    match verdict.kind:
        case "ok":
            return "would be delivered", ""
        case "disable":
            reason = (
                "410 Gone" if verdict.reason == "gone" else "the response has `webhook-delivery: disable`"
            )
            hint = "correct its `url`, or remove the destination from config.toml"
            return f"would disable the destination and be held: {reason}", hint
        case "abort":
            is_final = verdict.reason == "final_status"
            reason = (
                f"{response.status} is in its `final_statuses`"
                if is_final
                else "the response has `webhook-delivery: abort-message`"
            )
            return f"would be dead at once: {reason}", "look for the cause in the receiver's log"
        case "hold":
            return "would be held; nothing was sent", _hint_for_hold(config, response.error or "")
    if verdict.pause:
        wait = render_duration(verdict.pause)
        return (
            f"would be retried; the whole destination would pause for {wait}",
            "the response has a `Retry-After` header",
        )
    return "would be retried according to the schedule", _hint_for_retry(config, response)


def _hint_for_hold(config: DestinationConfig, error: str) -> str:
    if error.startswith("not sent: "):
        return "raise LimitNOFILE of the service, or free descriptors or memory on this machine"
    if "is the relay itself" in error:
        return "the relay never sends to itself: correct its `url`"
    if error.endswith(" address") and not config.allow_private:
        return f"if the address is right, set `allow_private = true` in [destinations.{config.name}]"
    return "correct its `url`"


def _hint_for_retry(config: DestinationConfig, response: HttpResult) -> str:
    """Return where to look for the cause of a failure that would be retried."""
    if response.status in (401, 403):
        return (
            "check that the receiver knows one of the destination's `secrets`; diagnose a captured request"
            f" with `relay verify --destination {config.name} --request FILE`"
        )
    if response.status in (404, 405):
        return f"check that `url` is the webhook endpoint, and that it accepts {config.method}"
    return {
        "3xx": "redirects are never followed: set `url` to their target",
        "dns": "correct the name in `url`, or fix DNS on this machine",
        "connect": "check that the receiver listens on this address, and that no firewall blocks it",
        "timeout": "check that the receiver is up and responds before it does its work, or raise `timeout`",
        "tls": "check that the certificate has the name in `url`; for a private CA, set `ca_file`",
        "protocol": "check that `url` points to an HTTP server and has the right scheme",
        "format": f"fix the plugin that provides the format {config.format}; the log has the traceback",
    }.get(response.result, "look for the cause in the receiver's log")
