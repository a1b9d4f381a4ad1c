"""Why a verified request cannot be taken in at the moment, if so."""

from collections.abc import Mapping

from relay.clock import Clock
from relay.config.secret import Secrets
from relay.errors import DiskFull, Draining, Paused, RateLimited
from relay.incoming import Incoming
from relay.ingest.routes import Mount
from relay.rate import TokenBucket
from relay.units import Rate


class Gate:
    """Open, unless the daemon drains, the disk is full, the source paused or the token too busy."""

    def __init__(self, clock: Clock) -> None:
        self.draining = False
        self.disk_full = False
        self._clock = clock
        self._buckets: dict[tuple[str, Rate, bytes], TokenBucket] = {}

    def check(self, mount: Mount, incoming: Incoming, *, late: bool) -> None:
        """Let a request pass whose sender has been verified; `late`: it began when we were draining.

        Raises:
            Draining: the daemon is stopping.
            DiskFull: less space than `min_free_disk`.
            Paused: an operator paused this source.
            RateLimited: more than the source's `rate_limit` per token.
        """
        if late:
            raise Draining
        if self.disk_full:
            raise DiskFull
        if mount.paused:
            raise Paused
        if mount.config.rate_limit is not None:
            self._limit(mount, incoming)

    def keep(self, mounts: Mapping[str, Mount]) -> None:
        """Forget the buckets of sources that are gone or have another rate now; the others go on."""
        rates = {(name, mount.config.rate_limit) for name, mount in mounts.items()}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if key[:2] in rates}

    def _limit(self, mount: Mount, incoming: Incoming) -> None:
        rate = mount.config.rate_limit
        assert rate is not None  # noqa: S101 - asked only where there is one
        now = self._clock.steady()
        # Only verified tokens get here, so there are as many buckets as tokens, and one without any.
        key = (mount.name, rate, _token(mount, incoming))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(rate, now, burst=rate.count)
        if wait := bucket.take(now):
            raise RateLimited(retry_after=max(1, round(wait + 0.5)))


def _token(mount: Mount, incoming: Incoming) -> bytes:
    """Return the digest of the configured token that was sent, however it was spelt."""
    tokens = getattr(mount.source, "tokens", None)
    return incoming.bearer(tokens).digest if isinstance(tokens, Secrets) and tokens else b""
