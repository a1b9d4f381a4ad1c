"""What is counted of one destination's attempts."""

from relay.base.clock import SECOND
from relay.metrics import Metrics
from relay.model import RESULTS, Attempt, Delivery


class Meter:
    """One destination's counters, looked up once: a look-up costs three times what counting does."""

    def __init__(self, metrics: Metrics, destination: str) -> None:
        self._attempts = {result: metrics.attempts.labels(destination, result) for result in RESULTS}
        self._seconds = metrics.attempt_seconds.labels(destination)
        self._latency = metrics.latency.labels(destination)

    def attempted(self, delivery: Delivery, attempt: Attempt) -> None:
        """Count an attempt."""
        self._attempts[attempt.result].inc()
        self._seconds.observe(attempt.duration_ms / 1000, _like(delivery))

    def delivered(self, delivery: Delivery, now: int) -> None:
        """Count how long a delivery took, from its beginning to now (wall clock)."""
        self._latency.observe((now - delivery.created_at) / SECOND, _like(delivery))


def _like(delivery: Delivery) -> dict[str, str] | None:
    """Name the event, as an example to look at."""
    return None if delivery.event is None else {"event_id": delivery.event.public_id}
