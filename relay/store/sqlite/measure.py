"""Counts and sizes of a database file. The file is only read, so a daemon may be using it."""

import sqlite3
from pathlib import Path

from relay.errors import StorageError
from relay.model import Measured
from relay.store import Stop
from relay.store.sqlite.read_only import opened

SQL = """
    SELECT (SELECT user_version FROM pragma_user_version),
           (SELECT page_count FROM pragma_page_count) * page_size,
           (SELECT freelist_count FROM pragma_freelist_count) * page_size,
           CASE WHEN ? THEN (SELECT count(*) FROM events) END,
           (SELECT min(received_at) FROM events),
           (SELECT max(received_at) FROM events),
           (SELECT coalesce(sum(created - delivered - dead - expired - cancelled), 0) FROM ledger)
      FROM pragma_page_size
"""


def measure(path: Path, stop: Stop, *, counts: bool = True) -> Measured:
    """Return the counts and sizes of a database, with `counts` also the number of events.

    Raises:
        StorageError: it does not exist or cannot be read.
    """
    if not path.exists():
        raise StorageError(f"no database at {path}", hint="it is created when the relay first runs")
    log = path.with_name(f"{path.name}-wal")
    try:
        with opened(path, stop) as connection:
            [row] = connection.execute(SQL, (counts,)).fetchall()
        version, size, free, events, oldest, newest, pending = row
        log_size = log.stat().st_size if log.exists() else 0
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"{path} cannot be read: {error}", hint=f"relay db check {path}") from error
    return Measured(
        path=str(path), engine=f"SQLite {sqlite3.sqlite_version}", version=version, bytes=size, free=free,
        log=log_size, events=events, oldest=oldest, newest=newest, pending=pending,
    )  # fmt: skip
