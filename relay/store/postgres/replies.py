"""Replies that did not reach their senders, shared by all nodes: the sender may repeat its request elsewhere.

A node writes such a reply after the fact, so only these rare requests cost a statement. The other nodes keep
the digests of all of them in memory; the node that gets the repetition takes the row, so one repetition
counts once.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from relay.errors import StorageError

log = logging.getLogger("relay.store")

KEPT = 60.0  # seconds
MOST = 10_000
"""Replies that wait to be written, and digests in memory."""

RETRY = 1.0  # seconds until a failed write is tried again

KEEP_SQL = """
    INSERT INTO unheard (digest, event_ids, expires)
    SELECT digest, event_ids, clock_timestamp() + $3::float8 * interval '1 second'
      FROM unnest($1::bytea[], $2::text[]) AS u (digest, event_ids) ORDER BY digest
        ON CONFLICT (digest) DO UPDATE SET event_ids = excluded.event_ids, expires = excluded.expires
"""
FORGET_SQL = "DELETE FROM unheard WHERE expires <= clock_timestamp()"
KNOWN_SQL = f"""
    SELECT digest FROM unheard WHERE expires > clock_timestamp() ORDER BY expires DESC LIMIT {MOST}
"""  # noqa: S608 - a constant
TAKE_SQL = """
    DELETE FROM unheard WHERE digest = $1 RETURNING event_ids, expires > clock_timestamp() AS is_valid
"""

Fetch = Callable[..., Awaitable[Sequence[Any]]]


class Replies:
    """`relay.store.SharedReplies` in a table."""

    def __init__(self, fetch: Fetch, announce: Callable[[], None]) -> None:
        """Take `fetch`, which runs a statement, and `announce`, which lets the other nodes `refresh`."""
        self._fetch = fetch
        self._announce = announce
        self._known: set[bytes] = set()  # digests in the table
        self._waiting: dict[bytes, tuple[float, tuple[str, ...]]] = {}  # until when, ids of the events
        self._written = asyncio.Event()  # set: no write is under way
        self._written.set()
        self._writing: set[bytes] = set()
        self._task: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """See `SharedReplies`."""
        return len(self._known)

    def __contains__(self, digest: bytes) -> bool:
        """See `SharedReplies`."""
        return digest in self._known

    def share(self, digest: bytes, ids: Sequence[str]) -> None:
        """See `SharedReplies`."""
        self._waiting[digest] = time.monotonic() + KEPT, tuple(ids)
        if len(self._waiting) > MOST:
            del self._waiting[next(iter(self._waiting))]
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    async def take(self, digest: bytes) -> tuple[str, ...]:
        """See `SharedReplies`."""
        if digest in self._writing:
            await self._written.wait()
        if digest in self._waiting:
            return self._waiting.pop(digest)[1]
        self._known.discard(digest)
        rows = await self._fetch(TAKE_SQL, digest)
        return tuple(rows[0]["event_ids"].split()) if rows and rows[0]["is_valid"] else ()

    def refresh_soon(self) -> None:
        """Read the digests in the background."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh_once())

    async def refresh(self, fetch: Fetch) -> None:
        """Read the digests with this function."""
        self._known = {row["digest"] for row in await fetch(KNOWN_SQL)}

    async def stop(self) -> None:
        """Write what waits, if possible."""
        for task in (self._task, self._refreshing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        with suppress(StorageError):
            await self._write_waiting()

    async def _refresh_once(self) -> None:
        with suppress(StorageError):  # the next renewal of the leases reads them as well
            await self.refresh(self._fetch)

    async def _write(self) -> None:
        while self._waiting:
            try:
                await self._write_waiting()
            except StorageError as error:
                log.debug("cannot share replies that did not reach their senders: %s", error.message)
                await asyncio.sleep(RETRY)

    async def _write_waiting(self) -> None:
        now = time.monotonic()
        rows = {digest: each for digest, each in self._waiting.items() if each[0] > now}
        self._waiting, self._writing = {}, set(rows)
        if not rows:
            return
        self._written.clear()
        try:
            await self._fetch(FORGET_SQL)
            await self._fetch(KEEP_SQL, list(rows), [" ".join(ids) for _, ids in rows.values()], KEPT)
        except BaseException:
            self._waiting = {**rows, **self._waiting}
            raise
        finally:
            self._writing = set()
            self._written.set()
        self._announce()
