"""Why a verified request cannot be taken in at the moment, if so."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, MutableMapping
from contextlib import suppress
from typing import TypeVar

from relay.base.clock import Clock
from relay.base.rate import TokenBucket
from relay.base.units import Rate
from relay.config.secrets import Secrets
from relay.errors import DiskFull, Draining, Paused, RateLimited, Refusal
from relay.incoming import Incoming
from relay.ingest.replies import ask
from relay.ingest.routes import Mount
from relay.model import WorkerChange
from relay.source import Source

K = TypeVar("K", bound=Hashable)

WORKERS = 10
"""The limit of all workers of one token together, as a multiple of the source's `rate_limit`."""

MOST_BUCKETS = 16_384
"""Workers whose rate is kept. Senders choose ids, so beyond this the longest silent worker is forgotten."""


class Admission:
    """Open, unless the daemon drains, the disk is full, the source paused or the token too busy."""

    def __init__(self, clock: Clock) -> None:
        self.draining = False
        self.disk_full = False
        self._clock = clock
        self._buckets: dict[tuple[str, Rate, bytes], TokenBucket] = {}  # by token, for events
        self._fleets: dict[tuple[str, Rate, bytes], TokenBucket] = {}  # by token
        self._workers: OrderedDict[tuple[str, Rate, bytes, str], TokenBucket] = OrderedDict()

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
        self._fleets = {key: bucket for key, bucket in self._fleets.items() if key[:2] in rates}
        workers = self._workers.items()
        self._workers = OrderedDict((key, bucket) for key, bucket in workers if key[:2] in rates)

    def _limit(self, mount: Mount, incoming: Incoming) -> None:
        rate = mount.config.rate_limit
        assert rate is not None  # noqa: S101 - asked only where there is one
        now = self._clock.steady()
        # Only verified tokens get here, so there are as many buckets as tokens, and one without any.
        key = (mount.name, rate, _token(mount, incoming))
        change = worker_change_of(mount.source, incoming)
        if change is not None and change.worker_id:
            wait = self._wait_of_worker((*key, change.worker_id), now)
        else:
            wait = _bucket(self._buckets, key, rate, now).take(now)
        if wait:
            raise RateLimited(retry_after=max(1, round(wait + 0.5)))

    def _wait_of_worker(self, key: tuple[str, Rate, bytes, str], now: int) -> float:
        """Count a call of a worker, and return the seconds to wait.

        A storm of one worker uses up that worker's rate only; invented ids use up the rate of their token.
        """
        source, rate, token, _ = key
        own = _bucket(self._workers, key, rate, now)
        self._workers.move_to_end(key)
        if len(self._workers) > MOST_BUCKETS:
            self._workers.popitem(last=False)
        together = Rate(count=WORKERS * rate.count, seconds=rate.seconds)
        fleet = _bucket(self._fleets, (source, rate, token), together, now)
        return own.wait(now) or fleet.take(now) or own.take(now)


def worker_change_of(source: Source, incoming: Incoming) -> WorkerChange | None:
    """Return what a request says of its worker, even if it is refused; see `Source.sign_of_life`."""
    with suppress(Refusal):
        return ask(source.sign_of_life, incoming)  # type: ignore[no-any-return]
    return None


def _bucket(buckets: MutableMapping[K, TokenBucket], key: K, rate: Rate, now: int) -> TokenBucket:
    bucket = buckets.get(key)
    if bucket is None:
        bucket = buckets[key] = TokenBucket(rate, now, burst=rate.count)
    return bucket


def _token(mount: Mount, incoming: Incoming) -> bytes:
    """Return the digest of the configured token that was sent, however it was spelt."""
    tokens = getattr(mount.source, "tokens", None)
    return incoming.bearer(tokens).digest if isinstance(tokens, Secrets) and tokens else b""
