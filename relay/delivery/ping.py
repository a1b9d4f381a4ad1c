"""A ping: one signed request by an operator's wish, through a destination's own client, kept nowhere."""

import asyncio
import hashlib
from typing import Any

import msgspec

from relay.base.clock import Clock
from relay.base.ids import event_id
from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.delivery.http.result import Answer
from relay.delivery.http.timings import Times
from relay.delivery.lane import Lane
from relay.delivery.retry import Verdict
from relay.errors import BusyError
from relay.model import EMPTY, StoredEvent

TYPE = "relay.ping"
MESSAGE = "An operator tests this destination. Nothing has happened, and nothing is to be done."

PATIENCE = 50.0
"""Seconds that a ping takes at most, whatever the destination's timeout: commands wait 60 for an answer."""

SHOWN = 1024
"""Bytes of the receiver's answer that are shown."""


class Pings:
    """Sends pings, one at a time to each destination."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._under_way: set[str] = set()

    async def send(self, lane: Lane) -> dict[str, Any]:
        """Ping a destination, also one that is held, and return what came of it.

        Nothing of it is stored: no event, no attempt; neither the circuit nor a counter notices.

        Raises:
            BusyError: one to that destination is under way.
        """
        if lane.name in self._under_way:
            hint = "wait for its answer, and try again"
            raise BusyError(f"a test of {lane.name!r} is under way already", hint=hint)
        self._under_way.add(lane.name)
        try:
            return await self._send(lane)
        finally:
            self._under_way.discard(lane.name)

    async def _send(self, lane: Lane) -> dict[str, Any]:
        config, held, times = lane.config, lane.held, Times()
        event = _event(config.name, self._clock.wall())
        try:
            async with asyncio.timeout(PATIENCE):
                answer, meaning = await lane.ping(event, times)
        except TimeoutError:
            error = f"no answer within {render_duration(PATIENCE)}, the most that a test waits"
            answer = Answer(result="timeout", error=error, duration_ms=PATIENCE * 1000)
            meaning = Verdict(kind="retry")
        verdict, hint = judge(config, answer, meaning)
        return {
            "destination": config.name,
            "id": event.public_id,
            "type": event.type,
            "ok": meaning.kind == "ok",
            "result": answer.result,
            "status": answer.status,
            "error": answer.error,
            "verdict": verdict,
            "hint": hint,
            "held": held,
            "signatures": len(config.secrets),
            "duration_ms": round(answer.duration_ms, 1),
            "timing_ms": times.steps(tls=config.url.startswith("https:")),
            "answer": answer.body[:SHOWN].decode("utf-8", "replace"),
            "truncated": answer.truncated or len(answer.body) > SHOWN,
        }


def _event(destination: str, now: int) -> StoredEvent:
    body = msgspec.json.encode({"destination": destination, "message": MESSAGE})
    return StoredEvent(
        id=0,
        public_id=event_id(now),
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


def judge(config: DestinationConfig, answer: Answer, meaning: Verdict) -> tuple[str, str]:
    """Say in words what such an answer would mean for a delivery, and what to do about it."""
    match meaning.kind:
        case "ok":
            return "a delivery would be delivered", ""
        case "disable":
            why = "410 says that it is gone" if meaning.reason == "gone" else "its answer asks for that"
            hint = "correct its `url`, or take it out of config.toml"
            return f"a delivery would disable the destination, and be held: {why}", hint
        case "abort":
            is_final = meaning.reason == "final_status"
            why = (
                f"{answer.status} is in its `final_statuses`" if is_final else "the answer says abort-message"
            )
            return f"a delivery would be dead at once: {why}", "ask the receiver why"
        case "hold":
            return "nothing was sent, and deliveries would be held", _unblock(config, answer.error or "")
    if meaning.pause:
        wait = render_duration(meaning.pause)
        verdict = f"a delivery would be tried again, and the whole destination rest for {wait}"
        return verdict, "the receiver asks for it by Retry-After"
    return "a delivery would be tried again, by the schedule", _mend(config, answer)


def _unblock(config: DestinationConfig, why: str) -> str:
    if why.startswith("not asked: "):
        return "raise LimitNOFILE of the service, or close what else holds descriptors or memory"
    if "is the relay itself" in why:
        return "the relay never sends to itself: correct its `url`"
    if why.endswith(" address") and not config.allow_private:
        return f"if it is meant to be there, set `allow_private = true` in [destinations.{config.name}]"
    return "correct its `url`"


def _mend(config: DestinationConfig, answer: Answer) -> str:
    """Say where to look after a failure that would be tried again."""
    if answer.status in (401, 403):
        return (
            "does it know one of the destination's `secrets`? With a request that it captured:"
            f" `relay verify --destination {config.name} --request FILE`"
        )
    if answer.status in (404, 405):
        return f"does its `url` lead to the hook, and does that take {config.method}?"
    return {
        "3xx": "redirects are never followed: set `url` to where it leads",
        "dns": "correct the name in `url`, or this machine's DNS",
        "connect": "does it listen there, and may this machine reach it?",
        "timeout": "is it up, and does it answer before its work? Else raise `timeout`",
        "tls": "a certificate of its own kind needs `ca_file`; does `url` have the certificate's name?",
        "protocol": "does its `url` lead to an HTTP server, and with the right scheme?",
        "format": f"mend the plugin that offers the format {config.format}; the log has the traceback",
    }.get(answer.result, "look into the receiver's log")
