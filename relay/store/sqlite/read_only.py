"""Read-only access to a database file, whether or not its daemon runs."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import aiosqlite

from relay.errors import StorageError
from relay.store import Stop
from relay.store.queries import PagedQueries
from relay.store.sqlite.database import Database
from relay.store.sqlite.ledger import LedgerReader
from relay.store.sqlite.queries import SqliteReader
from relay.store.sqlite.schema import MIGRATIONS

T = TypeVar("T")
_CHECK_EVERY = 10_000  # instructions of SQLite between two checks of `stop`


def read_only(path: Path) -> str:
    """Return the URI that opens a database for reading and creates no file.

    Without a log, the file itself has all data. Then it is opened as immutable, so that SQLite does not
    create a shared memory file, which would belong to the user who typed the command.

    Raises:
        sqlite3.OperationalError: the path is not a file; opening a pipe would wait for ever.
    """
    if path.exists() and not path.is_file():
        raise sqlite3.OperationalError(f"{path} is not a file")
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
    return f"{path.absolute().as_uri()}?{mode}"


@contextmanager
def opened(path: Path, stop: Stop) -> Iterator[sqlite3.Connection]:
    """Open a database for reading; its statements fail once `stop` is set."""
    connection = sqlite3.connect(read_only(path), uri=True, isolation_level=None)
    try:
        connection.set_progress_handler(stop.is_set, _CHECK_EVERY)
        yield connection
    finally:
        connection.close()


async def in_thread(work: Callable[[Stop], T]) -> T:
    """Run work in a thread; if the caller is cancelled, set its `Stop` and wait for its end."""
    stop = Stop()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with suppress(Exception):  # the interrupted work fails; the caller is cancelled anyway
            await task
        raise


class Reading:
    """`relay.store.StoredData` over an SQLite file."""

    def __init__(self, database: Database) -> None:
        self.queries = PagedQueries(SqliteReader(database))
        self.ledger = LedgerReader(database)


@asynccontextmanager
async def reading(path: Path) -> AsyncIterator[Reading]:
    """Open a database for reading, whether or not its daemon runs; leaves no file behind.

    Raises:
        StorageError: the file does not exist, cannot be read, or has tables of another version.
    """
    try:
        async with aiosqlite.connect(_existing(path), uri=True) as reader:
            [(version,)] = await reader.execute_fetchall("PRAGMA user_version")
            if version != len(MIGRATIONS):
                raise StorageError(
                    f"{path} has schema version {version}, this program knows {len(MIGRATIONS)}",
                    hint="use the program that wrote it, or start the relay, which migrates it",
                )
            yield Reading(Database.reading(path, reader))
    except sqlite3.Error as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _existing(path: Path) -> str:
    if not path.exists():
        hint = "it is created when the relay first runs; see `state_dir`"
        raise StorageError(f"no database at {path}", hint=hint)
    return read_only(path)
