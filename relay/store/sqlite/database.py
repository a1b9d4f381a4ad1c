"""The connections and the writer of one SQLite file."""

from pathlib import Path
from typing import Never, cast

import aiosqlite

from relay.errors import StorageUnavailableError
from relay.store.sqlite.transaction import WriterConnection
from relay.store.sqlite.writer import SqliteWriter


class _Closed:
    """Replaces the connections and the writer of a closed database: any use raises the reason."""

    def __init__(self, why: str, hint: str) -> None:
        self._why = why
        self._hint = hint

    def __getattr__(self, _name: str) -> Never:
        raise StorageUnavailableError(f"the store cannot be opened: {self._why}", hint=self._hint)


class Database:
    """Shared by the parts of the store. `writer` is used for changes, `reader` and `counter` for reads."""

    connection: WriterConnection  # the writer's own; nothing else writes
    reader: aiosqlite.Connection
    counter: aiosqlite.Connection  # for long counts, so that no list waits for them
    writer: SqliteWriter

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set_closed("it is not open yet")

    @classmethod
    def reading(cls, path: Path, reader: aiosqlite.Connection) -> "Database":
        """Return a database of which only the reader is open."""
        database = cls(path)
        database.reader = database.counter = reader
        return database

    def set_closed(self, why: str, hint: str = "") -> None:
        """Let every use of a connection raise `StorageUnavailableError` with a reason."""
        closed = _Closed(why, hint)
        self.connection = cast("WriterConnection", closed)
        self.reader = self.counter = cast("aiosqlite.Connection", closed)
        self.writer = cast("SqliteWriter", closed)
