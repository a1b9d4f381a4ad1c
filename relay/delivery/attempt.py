"""One attempt at a delivery: render the body, sign, send, and decide the outcome by the response.

This module does not use lanes or windows.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.schema import DestinationConfig
from relay.delivery.http.http_client import HttpClient, OutOfResourcesError
from relay.delivery.http.result import HttpResult, Timing, one_line
from relay.delivery.retry import HOLD, OK, RetryPolicy, Verdict, verdict_of
from relay.errors import RelayError
from relay.formats import Format
from relay.formats.destination import is_shared
from relay.model import Attempt, Delivery, Outcome, StoredEvent, ending_at
from relay.process.logs import RateLimitedLog, fields
from relay.signing import signer_of

log = logging.getLogger("relay.delivery")

BLOCKED_REST = 300 * SECOND
"""How long a destination rests after its address was refused: its config or DNS is wrong."""


_REFUSED_CONTENT = frozenset({400, 413, 422})
"""Statuses with which receivers refuse the content of a request."""


class GroupResult(msgspec.Struct, frozen=True):
    """The result of one attempt at several deliveries."""

    outcomes: list[Outcome]
    verdict: Verdict
    is_split: bool = False  # whether each delivery is sent alone from now on


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """A request that could be sent now, with secrets and signatures masked."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes


class AttemptRunner:
    """Makes attempts at one destination, with one version of its config."""

    def __init__(
        self,
        config: DestinationConfig,
        format_: Format,
        client: HttpClient,
        clock: Clock,
        rand: Callable[[], float],
    ) -> None:
        self._config = config
        self.client = client
        self._clock = clock
        self._rand = rand
        self._url = config.url.reveal()
        self._signer = signer_of(config.signatures, config.secrets, method=config.method, url=self._url)
        self._format = format_
        # Destinations with the same format share the bodies of an event, except those with settings.
        self._body_key = format_.name if is_shared(config) else f"{format_.name} of {config.name}"
        self._log = RateLimitedLog(log, clock)
        self._policy = RetryPolicy.of(config.retry)
        self._headers = {name: value.reveal() for name, value in config.headers.items()}

    async def attempt(self, delivery: Delivery, event: StoredEvent) -> tuple[Outcome, Verdict]:
        """Send an event once and return the outcome; failures of receivers and plugins are outcomes, too.

        Raises:
            OutOfResourcesError: this machine has no descriptor or memory left; nothing was sent.
        """
        started = self._clock.wall()
        response = await self._send(event, started, delivery.rendered)
        attempt = Attempt(
            started_at=started,
            duration_ms=response.duration_ms,
            result=response.result,
            status=response.status,
            error=response.error,
            answer=response.body,
            truncated=response.truncated,
        )
        if response.result == "ok":
            return Outcome(delivery=delivery, attempt=attempt, state="delivered"), OK
        verdict = self._verdict(response)
        return self._outcome(delivery, attempt, verdict), verdict

    async def ping(self, event: StoredEvent, timing: Timing) -> tuple[HttpResult, Verdict]:
        """Send an event that belongs to no delivery; return the result and its meaning for a delivery."""
        try:
            response = await self._send(event, self._clock.wall(), None, timing)
        except OutOfResourcesError as error:
            return HttpResult(result="connect", error=f"not sent: {error}"), HOLD
        return response, OK if response.result == "ok" else self._verdict(response)

    def preview(self, event: StoredEvent) -> Preview:
        """Return the request that an attempt at one event, without a group, would send now.

        Raises:
            RelayError: the format fails.
        """
        format_, config = self._format, self._config
        try:
            body = format_.render(event)
            content_type = format_.content_type or format_.content_type_of(event)
        except Exception as error:
            result = self._not_sent(event, f"the format {format_.name} failed", error)
            raise RelayError(str(result.error), hint="correct the plugin, then reload the relay") from error
        signatures = self._signer.headers(event.public_id, self._clock.wall() // SECOND, body)
        masked = {each.header.lower() for each in config.signatures}
        headers = {
            **{name.lower(): str(value) for name, value in config.headers.items()},
            "content-type": content_type,
            **{
                name.lower(): "<signature>" if name.lower() in masked else value
                for name, value in signatures.items()
            },
        }
        if event.traceparent is not None:
            headers["traceparent"] = event.traceparent
        return Preview(method=config.method, url=str(config.url), headers=headers, body=body)

    async def attempt_group(
        self, deliveries: Sequence[Delivery], events: Sequence[StoredEvent]
    ) -> "GroupResult":
        """Send one message about several events.

        One event can cause a receiver to refuse the message or a format to fail. Such a failure ends no
        delivery: the group is split, and each delivery is sent alone.

        Raises:
            OutOfResourcesError: this machine has no descriptor or memory left; nothing was sent.
        """
        started, group_id = self._clock.wall(), group_id_of(deliveries)
        response = await self._send_group(events, group_id, started)
        attempt = Attempt(
            started_at=started,
            duration_ms=response.duration_ms,
            result=response.result,
            status=response.status,
            error=response.error,
            answer=response.body,
            truncated=response.truncated,
            group_id=group_id,
            group_size=len(deliveries),
        )
        if response.result == "ok":
            ended = [Outcome(delivery=each, attempt=attempt, state="delivered") for each in deliveries]
            return GroupResult(ended, OK)
        verdict = self._verdict(response)
        if verdict.kind == "abort" or response.status in _REFUSED_CONTENT or response.result == "format":
            now = self._clock.steady()
            outcomes = [
                Outcome(delivery=each, attempt=attempt, state="pending", next_attempt_at=now, counts=False)
                for each in deliveries
            ]
            return GroupResult(outcomes, Verdict(kind="retry", pause=verdict.pause), is_split=True)
        like: dict[int, Outcome] = {}  # one wait for all, so that they are due together again
        for each in deliveries:
            if each.attempts not in like:
                like[each.attempts] = self._outcome(each, attempt, verdict)
        outcomes = [msgspec.structs.replace(like[each.attempts], delivery=each) for each in deliveries]
        return GroupResult(outcomes, verdict)

    def failed(self, delivery: Delivery, error: BaseException) -> Outcome:
        """Return the outcome of an attempt that ended with an internal error."""
        text = one_line(f"internal error: {type(error).__name__}: {error}")
        attempt = Attempt(started_at=self._clock.wall(), duration_ms=0.0, result="format", error=text)
        return self._outcome(delivery, attempt, Verdict(kind="retry"))

    def renew(self) -> None:
        """Resolve the destination's name again before the next attempt."""
        self.client.renew()

    async def close(self) -> None:
        """Close all connections."""
        await self.client.close()

    async def _send(
        self,
        event: StoredEvent,
        now: int,
        rendered: dict[str, bytes] | None,
        timing: Timing | None = None,
    ) -> HttpResult:
        """Render, sign and send; deliveries of the same event share the bodies in `rendered`."""
        format_ = self._format
        try:
            body = None if rendered is None else rendered.get(self._body_key)
            if body is None:
                body = format_.render(event)
                if not isinstance(body, bytes):
                    raise TypeError(f"expected bytes, got {type(body).__name__}")  # noqa: TRY301 - a plugin's mistake
                if rendered is not None:
                    rendered[self._body_key] = body
            content_type = format_.content_type
            if content_type is None:
                content_type = format_.content_type_of(event)
        except BaseException as error:  # noqa: BLE001 - a plugin's format may raise anything
            return self._not_sent(event, f"the format {format_.name} failed", error)
        try:
            headers = {
                **self._headers,
                "content-type": content_type,
                **self._signer.headers(event.public_id, now // SECOND, body),
            }
            if event.traceparent is not None:
                headers["traceparent"] = event.traceparent
            return await self.client.send(self._url, headers, body, timing)
        except OutOfResourcesError:
            raise
        except Exception as error:  # noqa: BLE001 - a plugin may return headers that cannot be sent
            return self._not_sent(event, "cannot build the request", error)

    async def _send_group(self, events: Sequence[StoredEvent], group_id: str, now: int) -> HttpResult:
        """Render, sign and send a message about several events."""
        format_ = self._format
        try:
            if format_.group is None:
                raise TypeError("it has one body for each event")  # noqa: TRY301 - it changed with a reload
            body = format_.group(events)
            if not isinstance(body, bytes):
                raise TypeError(f"expected bytes, got {type(body).__name__}")  # noqa: TRY301 - a plugin's mistake
        except BaseException as error:  # noqa: BLE001 - a plugin's format may raise anything
            return self._not_sent(events[0], f"the format {format_.name} cannot group", error)
        content_type = format_.content_type or format_.content_type_of(events[0])
        signatures = self._signer.headers(group_id, now // SECOND, body)
        headers = {**self._headers, "content-type": content_type, **signatures}
        return await self.client.send(self._url, headers, body)

    def _not_sent(self, event: StoredEvent, what: str, error: BaseException) -> HttpResult:
        """Return a failed attempt for a request that cannot be built, such as by a faulty plugin."""
        name = self._config.name
        self._log.error(what, f"{name}: {what}", error, destination=name, event_id=event.public_id)
        text = self._config.url.hide(f"{what}: {type(error).__name__}: {error}".encode("utf-8", "replace"))
        return HttpResult(result="format", error=one_line(text.decode("utf-8", "replace")))

    def _verdict(self, response: HttpResult) -> Verdict:
        return verdict_of(
            response.status,
            response.result,
            response.headers,
            now=self._clock.wall(),
            max_retry_after=self._config.retry.max_retry_after,
            final_statuses=self._config.final_statuses,
        )

    def _outcome(self, delivery: Delivery, attempt: Attempt, verdict: Verdict) -> Outcome:
        """Return the outcome of a failed attempt."""
        match verdict.kind:
            case "abort":
                return Outcome(delivery=delivery, attempt=attempt, state="dead", reason=verdict.reason)
            case "disable" | "hold":
                # The destination failed, not the delivery: it stays pending with its whole schedule.
                rest = BLOCKED_REST if verdict.kind == "hold" else 0
                due = self._clock.steady() + rest
                return Outcome(
                    delivery=delivery, attempt=attempt, state="pending", next_attempt_at=due, counts=False
                )
        delay = self._policy.next_delay(delivery.attempts + 1, verdict.hint, self._rand())
        if delay is None:
            return Outcome(delivery=delivery, attempt=attempt, state="dead", reason="exhausted")
        due = self._clock.steady() + int(delay * SECOND)
        return Outcome(delivery=delivery, attempt=attempt, state="pending", next_attempt_at=due)


def group_id_of(deliveries: Sequence[Delivery]) -> str:
    """Return the id of a message about these deliveries, which its retries keep."""
    ids = " ".join(delivery.public_id for delivery in deliveries)
    return f"grp_{hashlib.sha256(ids.encode()).hexdigest()[:32]}"


def corrupt(delivery: Delivery, event: StoredEvent | None, now: int) -> Outcome | None:
    """Return the end of a delivery whose event was deleted or whose stored body is damaged, else None."""
    if event is not None and hashlib.sha256(event.body).digest() == event.sha256:
        return None
    error = (
        "the event no longer exists" if event is None else "the stored body does not match its SHA-256 digest"
    )
    attempt = Attempt(started_at=now, duration_ms=0.0, result="blocked", error=error)
    return Outcome(delivery=delivery, attempt=attempt, state="dead", reason="corrupt", counts=False)


def overdue(delivery: Delivery, now: int) -> Outcome | None:
    """Return the end of a delivery that has reached its `expires_at` (`now`: steady clock), else None."""
    if delivery.expires_at is None or delivery.expires_at > now:
        return None
    state, reason = ending_at(delivery.expires_at)
    return Outcome(delivery=delivery, attempt=None, state=state, reason=reason, counts=False)


def unspent(outcome: Outcome, retry_at: int | None) -> Outcome:
    """Return the outcome of a failed probe: recorded, but not counted in the delivery's schedule.

    `retry_at` is on the steady clock.
    """
    if outcome.reason in ("aborted", "final_status") or (
        outcome.attempt and outcome.attempt.result == "format"
    ):
        return outcome  # the receiver gave a final response, or nothing was sent
    return msgspec.structs.replace(
        outcome, state="pending", reason=None, next_attempt_at=retry_at, counts=False
    )


def outdated(outcome: Outcome, verdict: Verdict, now: int, *, probing: bool) -> Outcome:
    """Return the outcome of an attempt that began under a previous config.

    The outcome does not describe the destination under the new config. If it was a failed probe, or would
    disable or hold the destination, the delivery is due at once, because the new config may work.
    """
    if verdict.kind in ("disable", "hold"):
        return msgspec.structs.replace(outcome, next_attempt_at=now)
    return unspent(outcome, now) if probing and verdict.kind == "retry" else outcome


def delivery_fields(delivery: Delivery, **more: object) -> dict[str, Mapping[str, object]]:
    """Return the fields of a log line about a delivery; `request_id` is known until the first retry."""
    return fields(
        destination=delivery.destination,
        delivery_id=delivery.public_id,
        event_id=None if delivery.event is None else delivery.event.public_id,
        request_id=delivery.request_id,
        **more,
    )


def log_attempt(outcome: Outcome) -> None:
    """Log a failed attempt at `info`, a successful one at `debug`."""
    attempt, delivery = outcome.attempt, outcome.delivery
    level = logging.DEBUG if attempt is not None and attempt.result == "ok" else logging.INFO
    if attempt is None or not log.isEnabledFor(level):
        return
    number = delivery.attempts + 1
    extra = delivery_fields(
        delivery,
        attempt=number,
        result=attempt.result,
        status=attempt.status,
        duration_ms=round(attempt.duration_ms, 1),
        group_size=attempt.group_size,
    )
    if attempt.result == "ok":
        log.debug("%s: attempt %d succeeded", delivery.destination, number, extra=extra)
    else:
        error = attempt.error or attempt.result
        log.info("%s: attempt %d failed: %s", delivery.destination, number, error, extra=extra)


def log_end(outcome: Outcome) -> None:
    """Log that a delivery ended without being delivered."""
    delivery = outcome.delivery
    attempts = delivery.attempts + outcome.counts
    extra = delivery_fields(delivery, state=outcome.state, reason=outcome.reason, attempts=attempts)
    log.warning("%s: a delivery is %s: %s", delivery.destination, outcome.state, outcome.reason, extra=extra)
