"""Refused requests in PostgreSQL."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from relay.model import RefusedRequest
from relay.store.postgres.connection import Connection, Database
from relay.store.refused import MOST_NAMED, head_of, position_of, range_of, request_of, size_of, the_one

ADD_SQL = """
    INSERT INTO refused (public_id, at, source, reason, size, head, body)
    SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::bytea[],
                         $7::bytea[])
"""
PAGE_SQL = """
    SELECT id, head, retried_at, event_id FROM refused WHERE id < $1 {conditions} ORDER BY id DESC LIMIT $2
"""
NAMED_SQL = """
    SELECT head, body, retried_at, event_id FROM refused
     WHERE public_id >= $1 AND public_id < $2 ORDER BY public_id LIMIT $3
"""
RETRIED_SQL = "UPDATE refused SET retried_at = $1 WHERE public_id = $2 AND event_id IS NULL"
PRUNE_SQL = """
    DELETE FROM refused WHERE at < $1 OR id <= (
           SELECT max(id) FROM (SELECT id, sum(size) OVER (ORDER BY id DESC) AS total FROM refused) AS sizes
            WHERE total > $2)
"""


class PostgresRefused:
    """`relay.store.Refused` in PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, requests: Sequence[RefusedRequest]) -> None:
        """See `Refused.add`."""
        rows = []
        for each in requests:
            head = head_of(each)
            rows.append((each.id, each.at, each.source, each.reason, size_of(each, head), head, each.body))
        columns = tuple(map(list, zip(*rows, strict=True)))
        await self._database.writer.call(partial(_run, ADD_SQL, columns))

    async def page(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        source: str | None = None,
        reason: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> tuple[tuple[RefusedRequest, ...], str | None]:
        """See `Refused.page`."""
        filters = {"source =": source, "reason =": reason, "at >=": since, "at <": until}
        given = {text: value for text, value in filters.items() if value is not None}
        conditions = "".join(f"AND {text} ${number} " for number, text in enumerate(given, 3))
        values: list[Any] = [position_of(cursor), limit, *given.values()]
        rows = await self._database.fetch(PAGE_SQL.format(conditions=conditions), *values)
        found = tuple(request_of(head, None, at, event_id) for _, head, at, event_id in rows)
        return found, str(rows[-1][0]) if len(rows) == limit else None

    async def named(self, given: str) -> RefusedRequest:
        """See `Refused.named`."""
        return request_of(
            *the_one(given, await self._database.fetch(NAMED_SQL, *range_of(given), MOST_NAMED))
        )

    async def note_retry(self, id_: str, at: int) -> None:
        """See `Refused.note_retry`."""
        await self._database.writer.call(partial(_run, RETRIED_SQL, (at, id_)))

    async def prune(self, before: int, most_bytes: int) -> int:
        """See `Refused.prune`."""
        done = await self._database.writer.call(partial(_run, PRUNE_SQL, (before, most_bytes)))
        return int(done.rpartition(" ")[2])


async def _run(sql: str, values: Sequence[Any], connection: Connection) -> str:
    return await connection.execute(sql, *values)
