"""A transaction that crosses to the database's thread as seldom as it can.

Each crossing costs about 100 microseconds of two threads handing the interpreter to each other: as
much as several rows. So statements whose rows nobody waits for are queued, and go along with the next
one that somebody does wait for, or with the COMMIT.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import aiosqlite

Values = Sequence[Any]
_TOGETHER = "-- several statements, see relay.store.transaction"


class Statement:
    """One statement with its values, and the rows that it returned once it has run."""

    __slots__ = ("rows", "sql", "values")

    def __init__(self, sql: str, values: Values = ()) -> None:
        self.sql = sql
        self.values = values
        self.rows: list[tuple[Any, ...]] = []


class Database(sqlite3.Connection):
    """SQLite's connection, which takes several statements in one call; aiosqlite forwards the call."""

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        """Run statements one after the other, up to the first that fails."""
        if sql != _TOGETHER:
            return super().executemany(sql, parameters)
        cursor = self.cursor()
        for statement in parameters:
            cursor = self.execute(statement.sql, statement.values)
            statement.rows = cursor.fetchall()
        return cursor


class Transaction:
    """From BEGIN to COMMIT on the writing connection, which must be a `Database`."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        self._queue = [Statement("BEGIN IMMEDIATE")]

    def run(self, sql: str, values: Values = ()) -> None:
        """Have a statement run in its turn."""
        self._queue.append(Statement(sql, values))

    async def fetch(self, sql: str, values: Values = ()) -> list[tuple[Any, ...]]:
        """Run everything that waits and this, and return its rows."""
        statement = Statement(sql, values)
        self._queue.append(statement)
        await self._flush()
        return statement.rows

    async def commit(self) -> None:
        """Run everything that waits, and commit."""
        self._queue.append(Statement("COMMIT"))
        await self._flush()

    async def _flush(self) -> None:
        queue, self._queue = self._queue, []
        await self._connection.executemany(_TOGETHER, queue)
