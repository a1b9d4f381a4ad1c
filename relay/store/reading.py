"""Reading a database without being its daemon, which may run or not."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiosqlite

from relay.errors import StorageError
from relay.store.database import Database
from relay.store.ledger import LedgerReader
from relay.store.queries.sqlite_queries import SqliteQueries
from relay.store.read_only import read_only
from relay.store.schema import MIGRATIONS


class Reading:
    """`relay.store.StoredData` over an SQLite file."""

    def __init__(self, database: Database) -> None:
        self.queries = SqliteQueries(database)
        self.ledger = LedgerReader(database)


@asynccontextmanager
async def reading(path: Path) -> AsyncIterator[Reading]:
    """Open a database to read from it, leaving no file behind that its daemon could not use.

    Raises:
        StorageError: there is none, or it is of another version.
    """
    try:
        async with aiosqlite.connect(_address(path), uri=True) as reader:
            [(version,)] = await reader.execute_fetchall("PRAGMA user_version")
            if version != len(MIGRATIONS):
                raise StorageError(
                    f"{path} has schema version {version}, this program knows {len(MIGRATIONS)}",
                    hint="use the program that wrote it, or start the relay, which migrates it",
                )
            yield Reading(Database.reading(path, reader))
    except sqlite3.Error as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _address(path: Path) -> str:
    if not path.exists():
        hint = "a relay that never ran has none; see `state_dir`"
        raise StorageError(f"there is no database {path}", hint=hint)
    return read_only(path)
