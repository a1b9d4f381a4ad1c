"""Admission of verified requests: drain, disk, paused sources and rate limits."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, MutableMapping
from contextlib import suppress
from typing import TypeVar

import msgspec

from relay.base.clock import Clock
from relay.base.rate import TokenBucket
from relay.base.units import Rate
from relay.config.secrets import Secrets
from relay.errors import DiskFull, Draining, Paused, PluginFailed, RateLimited, Refusal
from relay.ingest.replies import ask
from relay.ingest.routes import Mount
from relay.model import Heartbeat, WorkerChange
from relay.source import Incoming

K = TypeVar("K", bound=Hashable)

WORKERS = 10
"""Rate limit of all workers of one token together, as a multiple of the source's `rate_limit`."""

MOST_BUCKETS = 16_384
"""Rate buckets of workers. Senders choose worker ids, so the bucket that is unused for longest goes first."""

_LARGEST = 2**63 - 1  # of a database's integers


class Admission:
    """Decides whether the relay takes a request now."""

    def __init__(self, clock: Clock) -> None:
        self.draining = False
        self.disk_full = False
        self.nodes = 1
        """Live nodes of the cluster. Each one takes its share of a rate: a request costs as many tokens."""
        self._clock = clock
        self._buckets: dict[tuple[str, Rate, bytes], TokenBucket] = {}  # by token, for events
        self._fleets: dict[tuple[str, Rate, bytes], TokenBucket] = {}  # by token
        self._workers: OrderedDict[tuple[str, Rate, bytes, str], TokenBucket] = OrderedDict()

    def check(self, mount: Mount, incoming: Incoming, *, late: bool) -> None:
        """Check a request of a verified sender; `late`: it began while the daemon was draining.

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
        """Drop the buckets of removed sources and of changed rates; keep the others."""
        rates = {(name, mount.config.rate_limit) for name, mount in mounts.items()}
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if key[:2] in rates}
        self._fleets = {key: bucket for key, bucket in self._fleets.items() if key[:2] in rates}
        workers = self._workers.items()
        self._workers = OrderedDict((key, bucket) for key, bucket in workers if key[:2] in rates)

    def _limit(self, mount: Mount, incoming: Incoming) -> None:
        rate = mount.config.rate_limit
        assert rate is not None  # noqa: S101 - the caller has checked it
        now = self._clock.steady()
        # Only verified tokens get here: one bucket per configured token, and one for sources without tokens.
        key = (mount.name, rate, _token(mount, incoming))
        change = worker_change_of(mount, incoming)
        if change is not None and change.worker_id:
            wait = self._wait_of_worker((*key, change.worker_id), now)
        else:
            wait = _bucket(self._buckets, key, rate, now, self.nodes).take(now, self.nodes)
        if wait:
            raise RateLimited(retry_after=max(1, round(wait + 0.5)))

    def _wait_of_worker(self, key: tuple[str, Rate, bytes, str], now: int) -> float:
        """Count a worker's request and return the seconds that it must wait.

        Too many requests of one worker use up only its own rate; invented ids use up the rate of their token.
        """
        source, rate, token, _ = key
        nodes = self.nodes
        own = _bucket(self._workers, key, rate, now, nodes)
        self._workers.move_to_end(key)
        if len(self._workers) > MOST_BUCKETS:
            self._workers.popitem(last=False)
        together = Rate(count=WORKERS * rate.count, seconds=rate.seconds)
        fleet = _bucket(self._fleets, (source, rate, token), together, now, nodes)
        return own.wait(now, nodes) or fleet.take(now, nodes) or own.take(now, nodes)


def worker_change_of(mount: Mount, incoming: Incoming) -> WorkerChange | None:
    """Return the worker change in a request that may be refused; see `Source.sign_of_life`."""
    with suppress(Refusal):
        change: WorkerChange | None = ask(mount.source.sign_of_life, incoming)
        return check_change(change) if mount.checks_changes and change is not None else change
    return None


def check_change(change: object) -> WorkerChange:
    """Return a worker change of a plugin with the types that its class declares.

    The registry writes it as JSON. A text where a number belongs would make the row unreadable at the next
    start, and a `msgspec.Raw` could forge fields of the events about the worker.

    Raises:
        PluginFailed: a field has another type, or an integer does not fit into 64 bits.
    """
    try:
        found: WorkerChange = msgspec.convert(msgspec.to_builtins(change), WorkerChange)
    except Exception as error:
        raise PluginFailed from error
    if isinstance(found, Heartbeat) and abs(found.message_count or 0) > _LARGEST:
        raise PluginFailed from OverflowError("message_count does not fit into 64 bits")
    return found


def _bucket(buckets: MutableMapping[K, TokenBucket], key: K, rate: Rate, now: int, price: int) -> TokenBucket:
    bucket = buckets.get(key)
    if bucket is None:
        bucket = buckets[key] = TokenBucket(rate, now, burst=max(rate.count, price))
    return bucket


def _token(mount: Mount, incoming: Incoming) -> bytes:
    """Return the digest of the request's configured token; `b""` if the source has no tokens."""
    tokens = getattr(mount.source, "tokens", None)
    if not isinstance(tokens, Secrets) or not tokens:
        return b""
    # Not `incoming.bearer`, which would count a second use of the token.
    token = incoming.headers.get("Authorization", "").strip().partition(" ")[2].strip()
    credential = tokens.find(token.encode("utf-8", "surrogateescape"))
    return b"" if credential is None else credential.digest
