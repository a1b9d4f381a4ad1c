"""The audit trail over SQLite."""

from typing import Any

import aiosqlite

from relay.model import AuditEntry
from relay.store.refused import position_of
from relay.store.sqlite.database import Database

COLUMNS = "at, operator, access, remote, method, path, body, status, request_id, node"
ADD_SQL = f"INSERT INTO audit ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
PRUNE_SQL = "DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?"
PAGE_SQL = """
    SELECT id, {columns} FROM audit WHERE id < ? {conditions} ORDER BY id DESC LIMIT ?
"""


class SqliteAudit:
    """`relay.store.Audit` over SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entry: AuditEntry, most: int) -> None:
        """See `Audit.add`."""
        values = tuple(getattr(entry, name) for name in entry.__struct_fields__)

        async def insert(connection: aiosqlite.Connection) -> None:
            await connection.execute("BEGIN IMMEDIATE")
            await connection.execute(ADD_SQL, values)
            await connection.execute(PRUNE_SQL, (most,))
            await connection.execute("COMMIT")

        await self._database.writer.call(insert)

    async def page(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        operator: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[tuple[AuditEntry, ...], str | None]:
        """See `Audit.page`."""
        filters = {"operator = ?": operator, "at >= ?": since, "at < ?": until}
        given = {text: value for text, value in filters.items() if value is not None}
        sql = PAGE_SQL.format(columns=COLUMNS, conditions="".join(f"AND {text} " for text in given))
        values: list[Any] = [position_of(cursor), *given.values(), limit]
        rows = list(await self._database.reader.execute_fetchall(sql, values))
        found = tuple(AuditEntry(*row[1:]) for row in rows)
        return found, str(rows[-1][0]) if len(rows) == limit else None
