"""File descriptors: the limit of this process, and the errors when they run out."""

import asyncio
import errno
import logging
import resource
from typing import Any

from relay.base.clock import Clock
from relay.process.logs import RateLimitedLog

log = logging.getLogger("relay")

WANTED = 65_536
"""The soft limit that the relay sets, if the hard limit allows it."""

RESERVE = 384
"""Descriptors kept for deliveries, the database, admin connections and files."""

LACK = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
"""Error numbers for a lack of resources on this machine, in contrast to faults of a peer."""


def raise_limit() -> int:
    """Raise the soft limit of open files up to the hard limit, and return the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return WANTED if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:  # a sandbox may forbid it
        log.warning("cannot raise the limit of open files from %d to %d: %s", soft, most, error)
        return soft
    return most


def connection_cap(limit: int, most: int) -> int:
    """Return the number of sender connections that fit into a limit of open files, at most `most`.

    >>> connection_cap(65_536, 4096), connection_cap(1024, 4096), connection_cap(256, 4096)
    (4096, 640, 128)
    """
    return min(most, max(limit - RESERVE, limit // 2))


def limit_accept_errors(loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
    """Log failed accepts at most once a second, instead of asyncio's traceback for each."""
    limited = RateLimitedLog(log, clock, every=1.0)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in LACK:
            limited.warning("accept", f"cannot accept connections: {error.strerror}")
        elif "_start_serving" not in context.get("message", ""):  # a listener that was closed meanwhile
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
