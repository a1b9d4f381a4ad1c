"""One attempt: render, sign, send, and say what it means. Knows nothing of queues."""

import hashlib
import logging
from collections.abc import Callable

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.schema import DestinationConfig
from relay.delivery.http.http_client import Client, LackError
from relay.delivery.http.result import Answer, one_line
from relay.delivery.http.timings import Times
from relay.delivery.retry import HOLD, RetryPolicy, Verdict, verdict
from relay.formats import Format
from relay.model import Attempt, Delivery, Outcome, StoredEvent
from relay.process.logs import Sparing
from relay.signing import Signer

log = logging.getLogger("relay.delivery")

BLOCKED_REST = 300 * SECOND
"""How long a destination rests whose address the guard refused: a fault of configuration or of DNS."""


class Sender:
    """Makes attempts at one destination."""

    def __init__(
        self,
        config: DestinationConfig,
        format_: Format,
        client: Client,
        clock: Clock,
        rand: Callable[[], float],
    ) -> None:
        self._config = config
        self._client = client
        self._clock = clock
        self._rand = rand
        self._signer = Signer(config.secrets)
        self._format = format_
        self._log = Sparing(log, clock)
        self._policy = RetryPolicy.of(config.retry)
        self._headers = {name: value.reveal() for name, value in config.headers.items()}

    async def attempt(self, delivery: Delivery, event: StoredEvent) -> tuple[Outcome, Verdict]:
        """Send an event once and judge what came of it; never raises for what a receiver or a plugin does.

        Raises:
            LackError: this machine has run out of descriptors or memory; nothing was sent.
        """
        started = self._clock.wall()
        answer = await self._ask(event, started, delivery.rendered)
        attempt = Attempt(
            started_at=started,
            duration_ms=answer.duration_ms,
            result=answer.result,
            status=answer.status,
            error=answer.error,
            answer=answer.body,
            truncated=answer.truncated,
        )
        meaning = self._meaning(answer)
        return self._judge(delivery, attempt, meaning), meaning

    async def ping(self, event: StoredEvent, times: Times) -> tuple[Answer, Verdict]:
        """Send an event that nobody is owed, and say what the answer would mean for a delivery."""
        try:
            answer = await self._ask(event, self._clock.wall(), None, times)
        except LackError as error:
            return Answer(result="connect", error=f"not asked: {error}"), HOLD
        return answer, self._meaning(answer)

    def failed(self, delivery: Delivery, error: Exception) -> Outcome:
        """Make a failed attempt of an error of the relay's own, so that no delivery meets it for ever."""
        text = one_line(f"the relay failed: {type(error).__name__}: {error}")
        attempt = Attempt(started_at=self._clock.wall(), duration_ms=0.0, result="format", error=text)
        return self._judge(delivery, attempt, Verdict(kind="retry"))

    def renew(self) -> None:
        """Look the destination's name up again before the next attempt."""
        self._client.renew()

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    async def _ask(
        self,
        event: StoredEvent,
        now: int,
        rendered: dict[str, bytes] | None,
        times: Times | None = None,
    ) -> Answer:
        try:
            body, content_type = self._render(event, rendered), self._format.content_type_of(event)
        except BaseException as error:  # noqa: BLE001 - a plugin's format may raise anything
            return self._unmade(event, f"the format {self._format.name} failed", error)
        try:
            headers = {
                **self._headers,
                "content-type": content_type,
                **self._signer.headers(event.public_id, now // SECOND, body),
            }
            if event.traceparent is not None:
                headers["traceparent"] = event.traceparent
            return await self._client.send(self._config.url, headers, body, times)
        except LackError:
            raise
        except Exception as error:  # noqa: BLE001 - what the plugin made may not be sendable
            return self._unmade(event, "the request could not be made", error)

    def _meaning(self, answer: Answer) -> Verdict:
        return verdict(
            answer.status,
            answer.result,
            answer.headers,
            now=self._clock.wall(),
            max_retry_after=self._config.retry.max_retry_after,
            final_statuses=self._config.final_statuses,
        )

    def _render(self, event: StoredEvent, rendered: dict[str, bytes] | None) -> bytes:
        """Return the request body; take it from `rendered`, or add it there for the other destinations."""
        name = self._format.name
        if rendered is not None and name in rendered:
            return rendered[name]
        body = self._format.render(event)
        if not isinstance(body, bytes):
            raise TypeError(f"expected bytes, got {type(body).__name__}")
        if rendered is not None:
            rendered[name] = body
        return body

    def _unmade(self, event: StoredEvent, what: str, error: BaseException) -> Answer:
        """Spend an attempt on a request that could not be made: by the next one the plugin may be mended."""
        name, id_ = self._config.name, event.public_id
        self._log.error(what, f"{name}: {what}", error, destination=name, event_id=id_)
        return Answer(result="format", error=one_line(f"{what}: {type(error).__name__}: {error}"))

    def _judge(self, delivery: Delivery, attempt: Attempt, meaning: Verdict) -> Outcome:
        match meaning.kind:
            case "ok":
                return Outcome(delivery=delivery, attempt=attempt, state="delivered")
            case "abort":
                return Outcome(delivery=delivery, attempt=attempt, state="dead", reason=meaning.reason)
            case "disable" | "hold":
                # Not this delivery's fault: it stays owed and has spent nothing.
                rest = BLOCKED_REST if meaning.kind == "hold" else 0
                due = self._clock.steady() + rest
                return Outcome(
                    delivery=delivery, attempt=attempt, state="pending", next_attempt_at=due, counts=False
                )
        delay = self._policy.next_delay(delivery.attempts + 1, meaning.hint, self._rand())
        if delay is None:
            return Outcome(delivery=delivery, attempt=attempt, state="dead", reason="exhausted")
        due = self._clock.steady() + int(delay * SECOND)
        return Outcome(delivery=delivery, attempt=attempt, state="pending", next_attempt_at=due)


def corrupt(delivery: Delivery, event: StoredEvent | None, now: int) -> Outcome | None:
    """Judge what was read back from the disk: a body that is gone or not what came in is dead."""
    if event is not None and hashlib.sha256(event.body).digest() == event.sha256:
        return None
    why = "the event is gone" if event is None else "the stored body is not the one that came in"
    attempt = Attempt(started_at=now, duration_ms=0.0, result="blocked", error=why)
    return Outcome(delivery=delivery, attempt=attempt, state="dead", reason="corrupt", counts=False)


def unspent(outcome: Outcome, again: int | None) -> Outcome:
    """Keep a failed probe on record, but spend nothing of its delivery's schedule; it is due `again`."""
    if outcome.reason in ("aborted", "final_status") or (
        outcome.attempt and outcome.attempt.result == "format"
    ):
        return outcome  # the receiver has spoken, or was never asked
    return msgspec.structs.replace(outcome, state="pending", reason=None, next_attempt_at=again, counts=False)


def outdated(outcome: Outcome, meaning: Verdict, now: int, *, probing: bool) -> Outcome:
    """Take what came of an attempt under a former config, which says nothing of the destination as it is.

    What was to be held then, or was a failed probe, is due now: with the new one it may go through.
    """
    if meaning.kind in ("disable", "hold"):
        return msgspec.structs.replace(outcome, next_attempt_at=now)
    return unspent(outcome, now) if probing and meaning.kind == "retry" else outcome
