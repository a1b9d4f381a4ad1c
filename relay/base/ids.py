"""Public ids of events, deliveries, commands, replays and requests: UUIDv7 (RFC 9562 §5.7).

The prefixes are `evt_`, `dlv_`, `cmd_`, `rpl_` and `req_`. Written by hand because the standard library has
no UUIDv7 before Python 3.14. 48 bits of Unix milliseconds, 74 random bits. No code may rely on their order:
rows are ordered by their integer `id`.
"""

import os
import re

_GIVEN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_RANDOM = 10  # bytes of each id: 74 bits are used
_BATCH = 512
_VARIANTS = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}  # its upper bits are 10
_pool: list[str] = []


def _random() -> str:
    """Return ten random bytes in hex; one system call provides the bytes of 512 ids."""
    if not _pool:
        drawn = os.urandom(_BATCH * _RANDOM).hex()
        _pool.extend(drawn[at : at + 2 * _RANDOM] for at in range(0, len(drawn), 2 * _RANDOM))
    return _pool.pop()


# A forked child must not repeat its parent's ids.
os.register_at_fork(after_in_child=_pool.clear)


def uuid7(micros: int) -> str:
    """Return a hyphenated lower-case UUIDv7 for a moment in microseconds since the epoch."""
    time, tail = f"{micros // 1000:012x}", _random()
    variant = _VARIANTS[tail[3]]
    return f"{time[:8]}-{time[8:]}-7{tail[:3]}-{variant}{tail[4:7]}-{tail[7:19]}"


def event_id(micros: int) -> str:
    """Return a new public id for an event received at that moment."""
    return "evt_" + uuid7(micros)


def delivery_id(micros: int) -> str:
    """Return a new public id for a delivery created at that moment."""
    return "dlv_" + uuid7(micros)


def command_id(micros: int) -> str:
    """Return a new public id for a command queued at that moment."""
    return "cmd_" + uuid7(micros)


def replay_id(micros: int) -> str:
    """Return a new public id for a replay begun at that moment."""
    return "rpl_" + uuid7(micros)


def request_id(micros: int) -> str:
    """Return a new id for a request without one."""
    return "req_" + uuid7(micros)


def given_id(header: str | None) -> str | None:
    """Return the sender's `X-Request-Id`; None: absent, or unsuitable for log lines."""
    return header if header is not None and _GIVEN.fullmatch(header) else None
