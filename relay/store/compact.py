"""Giving all free room back to the disk."""

import aiosqlite

from relay.model import Compacted
from relay.store.prune import paced, vacuum_some
from relay.store.writer import Writer

SIZES_SQL = """
    SELECT page_count * page_size, freelist_count * page_size
      FROM pragma_page_count, pragma_page_size, pragma_freelist_count
"""


class Compacting:
    """The store's verb."""

    _reader: aiosqlite.Connection
    _writer: Writer

    async def compact(self) -> Compacted:
        """See `Store.compact`."""
        [(before, _)] = await self._reader.execute_fetchall(SIZES_SQL)
        while await paced(self._writer, vacuum_some):
            pass
        whole = await self._writer.errand(empty_log)
        [(after, _)] = await self._reader.execute_fetchall(SIZES_SQL)
        return Compacted(before=before, after=after, whole=whole)


async def empty_log(connection: aiosqlite.Connection) -> bool:
    """Move the log into the file and empty it; a reader that is in the way is not waited for."""
    await connection.execute("PRAGMA busy_timeout = 0")
    try:
        [(busy, _, _)] = await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        await connection.execute("PRAGMA busy_timeout = 5000")
    return not busy
