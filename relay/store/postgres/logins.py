"""Logins to the dashboard in PostgreSQL."""

from collections.abc import Sequence
from typing import Any

from relay.model import Login
from relay.store.postgres.connection import Connection, Database

COLUMNS = "digest, name, scope, binding, created_at, seen_at"
ADD_SQL = f"INSERT INTO logins ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6)"  # noqa: S608 - constants
PRUNE_SQL = """
    DELETE FROM logins WHERE seen_at < $1 OR digest IN (
        SELECT digest FROM logins ORDER BY seen_at DESC OFFSET $2)
"""
FIND_SQL = f"SELECT {COLUMNS} FROM logins WHERE digest = $1"  # noqa: S608 - constants
TAKE_SQL = f"DELETE FROM logins WHERE digest = $1 RETURNING {COLUMNS}"  # noqa: S608 - constants


class PostgresLogins:
    """`relay.store.Logins` in PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, login: Login, *, before: int, most: int) -> None:
        """See `Logins.add`."""

        async def insert(connection: Connection) -> None:
            async with connection.transaction():
                await connection.execute(PRUNE_SQL, before, most - 1)
                await connection.execute(ADD_SQL, *(getattr(login, name) for name in login.__struct_fields__))

        await self._database.writer.call(insert)

    async def find(self, digest: bytes) -> Login | None:
        """See `Logins.find`."""
        return _only(await self._database.fetch(FIND_SQL, digest))

    async def take(self, digest: bytes) -> Login | None:
        """See `Logins.take`."""

        async def delete(connection: Connection) -> Login | None:
            return _only(await connection.fetch(TAKE_SQL, digest))

        return await self._database.writer.call(delete)

    async def note_use(self, digest: bytes, at: int) -> None:
        """See `Logins.note_use`."""

        async def note(connection: Connection) -> None:
            await connection.execute("UPDATE logins SET seen_at = $1 WHERE digest = $2", at, digest)

        await self._database.writer.call(note)

    async def clear(self) -> int:
        """See `Logins.clear`."""

        async def delete(connection: Connection) -> str:
            return await connection.execute("DELETE FROM logins")

        return int((await self._database.writer.call(delete)).rpartition(" ")[2])


def _only(rows: Sequence[Any]) -> Login | None:
    return Login(*rows[0]) if rows else None
