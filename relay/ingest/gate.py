"""Why a verified request cannot be taken in at the moment, if so."""

from relay.clock import Clock
from relay.errors import DiskFull, Draining, Paused, RateLimited
from relay.incoming import Incoming
from relay.ingest.routes import Mount
from relay.rate import TokenBucket


class Gate:
    """Open, unless the daemon drains, the disk is full, the source paused or the token too busy."""

    def __init__(self, clock: Clock) -> None:
        self.draining = False
        self.disk_full = False
        self._clock = clock
        self._buckets: dict[tuple[str, str], TokenBucket] = {}

    def check(self, mount: Mount, incoming: Incoming) -> None:
        """Let a request pass whose sender has been verified.

        Raises:
            Draining: the daemon is stopping.
            DiskFull: less space than `min_free_disk`.
            Paused: an operator paused this source.
            RateLimited: more than the source's `rate_limit` per token.
        """
        if self.draining:
            raise Draining
        if self.disk_full:
            raise DiskFull
        if mount.paused:
            raise Paused
        if mount.config.rate_limit is not None:
            self._limit(mount, incoming)

    def _limit(self, mount: Mount, incoming: Incoming) -> None:
        rate = mount.config.rate_limit
        assert rate is not None  # noqa: S101 - asked only where there is one
        now = self._clock.steady()
        # Only verified tokens get here, so there are as many buckets as tokens.
        key = (mount.name, incoming.headers.get("Authorization", ""))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(rate, now, burst=rate.count)
        if wait := bucket.take(now):
            raise RateLimited(retry_after=max(1, round(wait + 0.5)))
