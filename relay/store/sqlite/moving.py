"""An SQLite file as source and target of a move to another engine."""

import sqlite3
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from relay.errors import StorageError
from relay.model import Counts
from relay.process.state_dir import StateDir
from relay.store.ledger import counts_of
from relay.store.moving import ATTEMPT, DELIVERY, EVENT, SMALL, Position, Row
from relay.store.sqlite import event_times
from relay.store.sqlite.connection import migrate, open_writer
from relay.store.sqlite.ledger import AUDIT_SQL
from relay.store.sqlite.losses import unfinished_of
from relay.store.sqlite.mark import mark_of
from relay.store.sqlite.read_only import read_only
from relay.store.sqlite.schema import MIGRATIONS
from relay.store.sqlite.transaction import WriterConnection

PAGE = 1000  # rows of a small table in memory at once

STEP_SQL = {
    "events": f"SELECT {', '.join(EVENT)} FROM events WHERE id > ? ORDER BY id LIMIT ?",  # noqa: S608 - constants
    "deliveries": f"""
        SELECT {", ".join(f"d.{name}" for name in DELIVERY[:-1])}, e.size
          FROM deliveries AS d JOIN events AS e ON e.id = d.event_id WHERE d.id > ? ORDER BY d.id LIMIT ?
    """,  # noqa: S608 - constants
    "attempts": f"SELECT {', '.join(ATTEMPT)} FROM attempts WHERE id > ? ORDER BY id LIMIT ?",  # noqa: S608 - constants
}
INSERT_SQL = {
    table: f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - constants
    for table, columns in {"events": EVENT, "deliveries": DELIVERY[:-1], "attempts": ATTEMPT}.items()
}
_RENAMED = {"warned": "told"}


def _columns(table: str) -> str:
    return ", ".join(_RENAMED.get(name, name) for name in SMALL[table])


def _exists(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        StorageError: this user may not read the folder.
    """
    try:
        return path.exists()
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}", hint="run the command as the user of the relay"
        ) from error


class _Side:
    """The common part of source and target."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = f"sqlite:{path}"
        self._file = path
        self._database: sqlite3.Connection

    async def totals(self) -> dict[str, int]:
        """See `Side.totals`."""
        found = {table: self._value(f"SELECT count(*) FROM {table}") for table in (*INSERT_SQL, *SMALL)}  # noqa: S608 - constants
        found |= dict(self._database.execute("SELECT state, count(*) FROM deliveries GROUP BY state"))
        return found | {"bytes": self._value("SELECT coalesce(sum(size), 0) FROM events")}

    async def audit(self) -> dict[str, Counts]:
        """See `Side.audit`."""
        return counts_of(self._database.execute(AUDIT_SQL))

    async def ids(self, table: str) -> "array[int]":
        """See `Side.ids`."""
        return array("q", (id_ for (id_,) in self._database.execute(f"SELECT id FROM {table} ORDER BY id")))  # noqa: S608 - constants

    def _value(self, sql: str) -> Any:
        return self._database.execute(sql).fetchone()[0]


class SqliteSource(_Side):
    """`relay.store.moving.Source` over an SQLite file."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """See `Side.opened`."""
        if not _exists(self.path):
            raise StorageError(
                f"no database at {self.path}", hint="name the file: relay db move sqlite:FILE TO"
            )
        lock = StateDir(self.path.parent)
        lock.take()
        try:
            self._database = sqlite3.connect(read_only(self.path), uri=True, isolation_level=None)
            try:
                version = self._value("PRAGMA user_version")
                if version != len(MIGRATIONS):
                    raise StorageError(
                        f"{self.path} has schema version {version}, this program knows {len(MIGRATIONS)}",
                        hint="start and stop the relay once on this file; it migrates the tables",
                    )
                yield
            finally:
                self._database.close()
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: {error}", hint=f"relay db check {self.path}") from error
        finally:
            lock.release()

    async def step(self, table: str, after: int, count: int, most: int) -> Sequence[Row]:
        """See `Source.step`."""
        found: list[Row] = []
        for row in self._database.execute(STEP_SQL[table], (after, count)):
            found.append(row)
            most -= len(row[-1]) if table == "events" else 0
            if most <= 0:
                break
        return found

    async def rows(self, table: str) -> AsyncIterator[Sequence[Row]]:
        """See `Source.rows`."""
        cursor = self._database.execute(f"SELECT {_columns(table)} FROM {table}")  # noqa: S608 - constants
        while found := cursor.fetchmany(PAGE):
            yield found


class SqliteTarget(_Side):
    """`relay.store.moving.Target` over an SQLite file, which gets its name when it is complete."""

    _writer: WriterConnection

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """See `Side.opened`."""
        for path in (self.path, mark_of(self.path)):
            if _exists(path):
                raise StorageError(f"{path} already exists", hint="move it away, or name another file")
        self._file = unfinished_of(self.path)
        lock = StateDir(self.path.parent)
        lock.take()
        try:
            self._writer = await open_writer(self._file, full=True)
            try:
                await migrate(self._writer, self._file)
                self._database = sqlite3.connect(self._file, isolation_level=None)
                try:
                    yield
                finally:
                    self._database.close()
            finally:
                await self._writer.close()
            if self.is_finished:
                self._file.rename(self.path)
        except sqlite3.Error as error:
            raise StorageError(
                f"{self._file}: {error}", hint="check the disk, then run the command again"
            ) from error
        finally:
            lock.release()

    is_finished = False

    async def position(self) -> Position | None:
        """See `Target.position`."""
        rows = self._database.execute("SELECT value FROM meta WHERE name = 'moving'").fetchall()
        return msgspec.json.decode(rows[0][0], type=Position) if rows else None

    def next_id(self, previous: int, moment: int) -> int:
        """See `Target.next_id`."""
        _ = moment
        return previous + 1

    async def write(self, table: str, rows: Sequence[Row], position: Position) -> None:
        """See `Target.write`."""
        await self._writer.execute("BEGIN IMMEDIATE")
        if table == "deliveries":
            rows = [row[:-1] for row in rows]
        await self._writer.executemany(INSERT_SQL[table], rows)
        if table == "events":
            times: dict[int, tuple[int, int]] = {}
            for row in rows:
                block, at = row[0] >> event_times.SHIFT, row[5]
                first, last = times.get(block, (at, at))
                times[block] = (min(first, at), max(last, at))
            sql = f"INSERT INTO event_times (block, first, last) VALUES (?, ?, ?) {event_times.WIDEN}"  # noqa: S608 - constants
            await self._writer.executemany(sql, [(block, *between) for block, between in times.items()])
        await self._commit(position)

    async def write_all(self, table: str, rows: AsyncIterator[Sequence[Row]], position: Position) -> None:
        """See `Target.write_all`."""
        await self._writer.execute("BEGIN IMMEDIATE")
        await self._writer.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
        marks = ", ".join("?" * len(SMALL[table]))
        async for some in rows:
            sql = f"INSERT INTO {table} ({_columns(table)}) VALUES ({marks})"  # noqa: S608 - constants
            await self._writer.executemany(sql, some)
        await self._commit(position)

    async def _commit(self, position: Position) -> None:
        value = msgspec.json.encode(position).decode()
        await self._writer.execute("REPLACE INTO meta (name, value) VALUES ('moving', ?)", (value,))
        await self._writer.execute("COMMIT")

    async def finish(self) -> None:
        """See `Target.finish`."""
        await self._writer.execute("DELETE FROM meta WHERE name = 'moving'")
        await self._writer.execute("REPLACE INTO meta (name, value) VALUES ('stopped', 'cleanly')")
        self.is_finished = True
