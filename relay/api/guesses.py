"""Limits for wrong tokens, so that a client cannot guess one.

One-time codes need no limit: they have 128 random bits and are valid for a minute.
"""

import asyncio
import ipaddress
from collections import OrderedDict

from relay.base.clock import Clock
from relay.base.rate import TokenBucket
from relay.base.units import Rate

OF_ADDRESS = Rate(10, 60)
"""Wrong tokens of one client address, or of one network /64 with IPv6."""

OF_ALL = Rate(100, 60)
"""Wrong tokens of all addresses together."""

MOST_ADDRESSES = 1000
"""Addresses that are remembered. The least recently used one is dropped; `OF_ALL` still limits it."""

REPORTS = Rate(1, 60)
"""Refusals that are reported. The limit keeps strangers from filling the audit trail."""

DELAY = 1.0  # seconds until the answer to a wrong Bearer token beyond the limits
MOST_DELAYED = 20
"""Delayed answers at a time. While they all wait, further Bearer tokens are refused without a check."""


class Guesses:
    """The wrong tokens of the last minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        now = clock.steady()
        self._all = TokenBucket(OF_ALL, now, burst=OF_ALL.count)
        self._reports = TokenBucket(REPORTS, now)
        self._addresses: OrderedDict[str, TokenBucket] = OrderedDict()
        self._delayed = 0

    def wait(self, remote: str | None) -> float:
        """Return the seconds until a client may try a token again, 0 if it may do so now."""
        now, bucket = self._clock.steady(), self._addresses.get(_network(remote))
        return max(self._all.wait(now), 0.0 if bucket is None else bucket.wait(now))

    def note(self, remote: str | None) -> None:
        """Count a wrong token."""
        now, key = self._clock.steady(), _network(remote)
        bucket = self._addresses.setdefault(key, TokenBucket(OF_ADDRESS, now, burst=OF_ADDRESS.count))
        self._addresses.move_to_end(key)
        if len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)
        bucket.take(now)
        self._all.take(now)

    def may_report(self) -> bool:
        """Return whether to report a refusal: at most one a minute."""
        return not self._reports.take(self._clock.steady())

    @property
    def is_flooded(self) -> bool:
        """Whether `MOST_DELAYED` answers wait, so further tokens must be refused."""
        return self._delayed >= MOST_DELAYED

    async def delay(self, remote: str | None) -> None:
        """Count a wrong token, and wait if the client has sent too many of them.

        A client with a valid token never waits, even if it shares the address.
        """
        is_slow = bool(self.wait(remote))
        self.note(remote)
        if is_slow:
            self._delayed += 1
            try:
                await asyncio.sleep(DELAY)
            finally:
                self._delayed -= 1


def _network(remote: str | None) -> str:
    """Return the IPv4 address of a client, or its IPv6 network /64, which belongs to one client."""
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return remote or ""
    if address.version == 4:  # noqa: PLR2004 - IPv4
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))
