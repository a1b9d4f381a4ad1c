"""Returns free space of the database to the disk."""

import aiosqlite

SIZES_SQL = """
    SELECT page_count * page_size, freelist_count * page_size
      FROM pragma_page_count, pragma_page_size, pragma_freelist_count
"""


async def empty_log(connection: aiosqlite.Connection) -> bool:
    """Move the log into the file and empty the log; returns False if a reader prevents it."""
    await connection.execute("PRAGMA busy_timeout = 0")
    try:
        [(busy, _, _)] = await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        await connection.execute("PRAGMA busy_timeout = 5000")
    return not busy
