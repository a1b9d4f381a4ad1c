"""Public ids of events, deliveries, commands, replays and requests: UUIDv7 (RFC 9562 §5.7).

Own code, because the standard library has no UUIDv7 before Python 3.14. 48 bits of Unix milliseconds, 74
random bits. No code may rely on their order: rows are ordered by their integer `id`.
"""

import os
import re
from collections.abc import Iterator

EVENT, DELIVERY, COMMAND, REPLAY, REQUEST, REFUSED = "evt_", "dlv_", "cmd_", "rpl_", "req_", "ref_"
"""The prefixes of ids."""

_GIVEN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DIGITS = 32
_RANDOM = 10  # bytes of each id: 74 bits are used
_BATCH = 512
_VARIANTS = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}  # its upper bits are 10
_pool: list[str] = []  # everything after the time


# A forked child must not repeat its parent's ids.
os.register_at_fork(after_in_child=_pool.clear)


def new_id(prefix: str, micros: int) -> str:
    """Return a new id: a prefix, and a lower-case UUIDv7 of a time in microseconds since the epoch.

    The random bytes of 512 ids come from one system call.
    """
    if not _pool:
        _pool.extend(_drawn())
    time = f"{micros // 1000:012x}"
    return f"{prefix}{time[:8]}-{time[8:]}-7{_pool.pop()}"


def _drawn() -> Iterator[str]:
    """Draw the random digits of many ids, with the variant (10 in bits) and the dashes."""
    drawn = os.urandom(_BATCH * _RANDOM).hex()
    for at in range(0, len(drawn), 2 * _RANDOM):
        digits = drawn[at : at + 2 * _RANDOM]
        yield f"{digits[:3]}-{_VARIANTS[digits[3]]}{digits[4:7]}-{digits[7:19]}"


def dashed(digits: str) -> str:
    """Return the start of a UUID with its dashes, which may all be missing.

    >>> dashed("0190aaaabbbb7c"), dashed("0190aaaa-bbbb"), dashed("0190")
    ('0190aaaa-bbbb-7c', '0190aaaa-bbbb', '0190')
    """
    if "-" in digits or len(digits) > _DIGITS:
        return digits
    return "-".join(filter(None, (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])))


def given_id(header: str | None) -> str | None:
    """Return the sender's `X-Request-Id`, or None if it is absent or unsuitable for log lines."""
    return header if header is not None and _GIVEN.fullmatch(header) else None
