"""Logins to the dashboard over SQLite."""

from collections.abc import Sequence
from typing import Any

import aiosqlite

from relay.model import Login
from relay.store.sqlite.database import Database

COLUMNS = "digest, name, scope, binding, created_at, seen_at"
ADD_SQL = f"INSERT INTO logins ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
PRUNE_SQL = """
    DELETE FROM logins WHERE seen_at < ? OR digest IN (
        SELECT digest FROM logins ORDER BY seen_at DESC LIMIT -1 OFFSET ?)
"""
FIND_SQL = f"SELECT {COLUMNS} FROM logins WHERE digest = ?"  # noqa: S608 - constants
TAKE_SQL = f"DELETE FROM logins WHERE digest = ? RETURNING {COLUMNS}"  # noqa: S608 - constants


class SqliteLogins:
    """`relay.store.Logins` over SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, login: Login, *, before: int, most: int) -> None:
        """See `Logins.add`."""

        async def insert(connection: aiosqlite.Connection) -> None:
            await connection.execute("BEGIN IMMEDIATE")
            await connection.execute(PRUNE_SQL, (before, most - 1))
            await connection.execute(ADD_SQL, _values(login))
            await connection.execute("COMMIT")

        await self._database.writer.call(insert)

    async def find(self, digest: bytes) -> Login | None:
        """See `Logins.find`."""
        rows = await self._database.reader.execute_fetchall(FIND_SQL, (digest,))
        return _only(list(rows))

    async def take(self, digest: bytes) -> Login | None:
        """See `Logins.take`."""

        async def delete(connection: aiosqlite.Connection) -> Login | None:
            return _only(list(await connection.execute_fetchall(TAKE_SQL, (digest,))))

        return await self._database.writer.call(delete)

    async def note_use(self, digest: bytes, at: int) -> None:
        """See `Logins.note_use`."""

        async def note(connection: aiosqlite.Connection) -> None:
            await connection.execute("UPDATE logins SET seen_at = ? WHERE digest = ?", (at, digest))

        await self._database.writer.call(note)

    async def clear(self) -> int:
        """See `Logins.clear`."""

        async def delete(connection: aiosqlite.Connection) -> int:
            return (await connection.execute("DELETE FROM logins")).rowcount

        return await self._database.writer.call(delete)


def _values(login: Login) -> tuple[Any, ...]:
    return tuple(getattr(login, name) for name in login.__struct_fields__)


def _only(rows: Sequence[Any]) -> Login | None:
    return Login(*rows[0]) if rows else None
