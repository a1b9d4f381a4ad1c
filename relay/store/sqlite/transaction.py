"""Transactions with few switches to the database's thread, and statements over many rows.

Each switch costs about 100 microseconds, because the threads pass the interpreter's lock: as much as several
rows. So statements without a needed result are queued, and run together with the next statement whose result
is needed or with the COMMIT. A statement over many rows is one step of SQLite; one statement per row would
need a switch for each.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import aiosqlite

Row = tuple[Any, ...]
Statement = tuple[str, Sequence[Any]]

ROWS = 64
"""Rows of one statement. Each number of rows up to this is one cached statement."""

MOST_BYTES = 128 * 1024
"""Bytes of large columns in one statement of many rows.

SQLite's Python module keeps the values last bound to each cached statement: 64 statements of 64 rows of
400 KB would keep 800 MB.
"""


class WriterConnection(aiosqlite.Connection):
    """The writing connection. Runs several statements with one switch to its thread."""

    async def run(self, statements: Sequence[Statement]) -> list[Row]:
        """Run statements in order, up to the first that fails, and return the rows of the last one."""
        rows: list[Row] = await self._execute(_run, self._conn, statements)  # type: ignore[no-untyped-call]  # aiosqlite types only what it documents
        return rows


def _run(connection: sqlite3.Connection, statements: Sequence[Statement]) -> list[Row]:
    rows: list[Row] = []
    for sql, values in statements:
        rows = connection.execute(sql, values).fetchall()
    return rows


class Transaction:
    """From BEGIN to COMMIT on the writing connection."""

    def __init__(self, connection: WriterConnection) -> None:
        self._connection = connection
        self._queue: list[Statement] = [("BEGIN IMMEDIATE", ())]

    def run(self, sql: str, values: Sequence[Any] = ()) -> None:
        """Queue a statement."""
        self._queue.append((sql, values))

    def run_rows(self, sql: str, rows: Sequence[Row]) -> None:
        """Queue a statement over rows, which replace `{values}` in its text."""
        for some in _portions(rows):
            self._queue.append((_text(sql, len(some), len(some[0])), [*chain.from_iterable(some)]))

    def insert(
        self, into: str, columns: str, rows: Sequence[Row], *, verb: str = "INSERT", then: str = ""
    ) -> None:
        """Queue the insertion of rows; `then` is an `ON CONFLICT` clause. A large column must be last."""
        sql = f"{verb} INTO {into} ({columns}) VALUES {{values}} {then}"
        for some in _portions(rows):
            self._queue.append((_text(sql, len(some), len(some[0])), [*chain.from_iterable(some)]))

    async def fetch(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Run the queue and then a statement, and return the statement's rows."""
        queue, self._queue = [*self._queue, (sql, values)], []
        return await self._connection.run(queue)

    async def fetch_rows(self, sql: str, rows: Sequence[Row]) -> list[Row]:
        """Run the queue and then a statement over rows, which replace `{values}` in its text."""
        found: list[Row] = []
        for some in _portions(rows):
            statement = (_text(sql, len(some), len(some[0])), [*chain.from_iterable(some)])
            queue, self._queue = [*self._queue, statement], []
            found += await self._connection.run(queue)
        return found

    async def commit(self) -> None:
        """Run the queue, and commit."""
        queue, self._queue = [*self._queue, ("COMMIT", ())], []
        await self._connection.run(queue)


def _portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Split rows by count and by the bytes of their last column; a row above `MOST_BYTES` is alone."""
    begin = size = 0
    for at, row in enumerate(rows):
        last = row[-1]
        weight = len(last) if isinstance(last, bytes) else 0
        if at - begin == ROWS or (size + weight > MOST_BYTES and at > begin):
            yield rows[begin:at]
            begin, size = at, 0
        size += weight
    if begin < len(rows):
        yield rows[begin:]


@lru_cache(maxsize=4096)
def _text(sql: str, rows: int, columns: int) -> str:
    """Return a statement's text for a number of rows."""
    row = f"({', '.join('?' * columns)})"
    return sql.format(values=", ".join([row] * rows))
