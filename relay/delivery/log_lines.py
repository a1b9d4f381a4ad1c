"""What the log says of attempts and deliveries, with the ids that link them to the request that began it."""

import logging
from collections import Counter
from collections.abc import Mapping

from relay.model import Delivery, News, Outcome
from relay.process.logs import Sparing, fields

log = logging.getLogger("relay.delivery")


def ids(delivery: Delivery, **more: object) -> dict[str, Mapping[str, object]]:
    """Return the fields of a line about a delivery; `request_id` is known until the first retry."""
    event = delivery.event
    return fields(
        destination=delivery.destination,
        delivery_id=delivery.public_id,
        event_id=None if event is None else event.public_id,
        request_id=delivery.request_id,
        **more,
    )


def tell_attempt(outcome: Outcome) -> None:
    """Say how an attempt went: at `info` that it failed, at `debug` that it did not."""
    attempt, delivery = outcome.attempt, outcome.delivery
    if attempt is None:
        return
    level = logging.DEBUG if attempt.result == "ok" else logging.INFO
    if not log.isEnabledFor(level):
        return
    number = delivery.attempts + 1
    told = ids(
        delivery,
        attempt=number,
        result=attempt.result,
        status=attempt.status,
        duration_ms=round(attempt.duration_ms, 1),
    )
    if attempt.result == "ok":
        log.debug("%s: attempt %d delivered it", delivery.destination, number, extra=told)
    else:
        why = attempt.error or attempt.result
        log.info("%s: attempt %d failed: %s", delivery.destination, number, why, extra=told)


def tell_end(outcome: Outcome) -> None:
    """Say that a delivery has ended without being delivered."""
    delivery, attempts = outcome.delivery, outcome.delivery.attempts + outcome.counts
    told = ids(delivery, state=outcome.state, reason=outcome.reason, attempts=attempts)
    log.warning("%s: a delivery is %s: %s", delivery.destination, outcome.state, outcome.reason, extra=told)


class Untried:
    """Says how many deliveries ended without an attempt: those no lane has a line about."""

    def __init__(self, log_: Sparing) -> None:
        self._log = log_

    def tell(self, news: News) -> None:
        """Say it of one commit; nothing ends so while all is well."""
        if not any(columns["dead"] or columns["expired"] for columns in news.books.values()):
            return
        told = Counter((outcome.delivery.destination, outcome.state) for outcome in news.outcomes)
        for name, columns in news.books.items():
            if (dead := columns["dead"] - told[name, "dead"]) > 0:
                line = f"{name}: {dead} deliveries are dead without an attempt: it is owed too many"
                self._log.warning(f"{name}: dead", line, destination=name, state="dead", count=dead)
            if (expired := columns["expired"] - told[name, "expired"]) > 0:
                line = f"{name}: {expired} deliveries expired without an attempt"
                self._log.info(f"{name}: expired", line, destination=name, state="expired", count=expired)
