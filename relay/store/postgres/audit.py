"""The audit trail in PostgreSQL."""

from typing import Any

from relay.model import AuditEntry
from relay.store.postgres.connection import Connection, Database
from relay.store.refused import position_of

COLUMNS = "at, operator, access, remote, method, path, body, status, request_id, node"
ADD_SQL = f"INSERT INTO audit ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"  # noqa: S608 - constants
PRUNE_SQL = "DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - $1::bigint"
PAGE_SQL = """
    SELECT id, {columns} FROM audit WHERE id < $1 {conditions} ORDER BY id DESC LIMIT $2
"""


class PostgresAudit:
    """`relay.store.Audit` in PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entry: AuditEntry, most: int) -> None:
        """See `Audit.add`."""

        async def insert(connection: Connection) -> None:
            async with connection.transaction():
                await connection.execute(ADD_SQL, *(getattr(entry, name) for name in entry.__struct_fields__))
                await connection.execute(PRUNE_SQL, most)

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
        filters = {"operator =": operator, "at >=": since, "at <": until}
        given = {text: value for text, value in filters.items() if value is not None}
        conditions = "".join(f"AND {text} ${number} " for number, text in enumerate(given, 3))
        values: list[Any] = [position_of(cursor), limit, *given.values()]
        sql = PAGE_SQL.format(columns=COLUMNS, conditions=conditions)
        rows = await self._database.fetch(sql, *values)
        found = tuple(AuditEntry(*row[1:]) for row in rows)
        return found, str(rows[-1][0]) if len(rows) == limit else None
