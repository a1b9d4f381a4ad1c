"""UUIDv7 (RFC 9562 §5.7) as public ids: `evt_…` for events, `dlv_…` for deliveries.

Written by hand because the standard library has none before 3.14; 48 bits of Unix milliseconds and
74 random bits. Nothing may rely on their order: rows are ordered by their integer `id`.
"""

import os

_BATCH = 512 * 10
_pool = b""
_used = 0


def _random10() -> bytes:
    """Ten random bytes, drawn from the system in batches: one system call per 512 ids."""
    global _pool, _used  # noqa: PLW0603 - the pool is the point
    if _used >= len(_pool):
        _pool, _used = os.urandom(_BATCH), 0
    chunk = _pool[_used : _used + 10]
    _used += 10
    return chunk


def _forget_pool() -> None:
    global _pool  # noqa: PLW0603 - a forked child must not repeat its parent's ids
    _pool = b""


os.register_at_fork(after_in_child=_forget_pool)


def uuid7(micros: int) -> str:
    """Return a hyphenated lower-case UUIDv7 for a moment in microseconds since the epoch."""
    tail = int.from_bytes(_random10(), "big")
    value = (
        ((micros // 1000) & 0xFFFF_FFFF_FFFF) << 80
        | 0x7 << 76
        | (tail >> 62 & 0xFFF) << 64
        | 0b10 << 62
        | (tail & 0x3FFF_FFFF_FFFF_FFFF)
    )
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def event_id(micros: int) -> str:
    """Return a new public id for an event received at that moment."""
    return "evt_" + uuid7(micros)


def delivery_id(micros: int) -> str:
    """Return a new public id for a delivery created at that moment."""
    return "dlv_" + uuid7(micros)
