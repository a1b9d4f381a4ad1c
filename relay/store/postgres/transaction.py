"""One statement over arrays for all that a batch writes, and the transaction around it.

A batch of events and outcomes is one statement without BEGIN and COMMIT: its parts are common table
expressions, each with a parameter per column. That costs half as much CPU as a statement per table, and one
round trip. A batch that must read what it has written begins a transaction first.

All nodes lock rows of several tables in one order: order keys, `ledger`, idempotency keys. PostgreSQL runs
the parts that no other part reads from the last one to the first, so the part of `ledger` is added last.
Otherwise a commit could hold a key and wait for its row in `ledger`, while a node that takes back room for
`max_pending` holds that row and waits for the key.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import asyncpg

from relay.store.batch import Batch
from relay.store.postgres.connection import BEGIN, SHORT, Connection

SYNC_SQL = "(set_config('synchronous_commit', $1, true) = '')::int::bigint"
"""Each transaction sets its durability, because a pooler forgets the settings of a session."""

CONFIRM_SQL = f"""
    WITH written AS (
         INSERT INTO meta (name, value) VALUES ('probe', '') ON CONFLICT (name) DO UPDATE SET value = '')
    SELECT {SYNC_SQL}
"""  # noqa: S608 - only constants
"""A small synchronous transaction."""


class Part(NamedTuple):
    """Common table expressions whose parameters are numbered from `$1`."""

    sql: str
    result: str = ""  # statement that returns row ids from them; empty: nothing is returned


class Transaction:
    """From the first statement to the commit on the writing connection."""

    def __init__(self, connection: Connection, sync: str) -> None:
        self.connection = connection
        self._sync = sync  # synchronous_commit
        self._parts: list[Part] = []
        self._values: list[Sequence[Any]] = []
        self.has_begun = False  # whether it has several statements
        self.is_committing = False  # whether an error leaves it open if the changes are durable
        self.returned: frozenset[int] = frozenset()  # row ids that the last statement returned
        self.batch: Batch | None = None  # set when it is written
        self.locked: set[tuple[str, str | None]] = set()  # destinations and order keys
        self.reserved: set[tuple[str, str | None]] = set()  # locked keys that no delivery has used yet

    async def begin(self) -> None:
        """Begin the transaction if it has not begun yet."""
        if not self.has_begun:
            await self.connection.execute(f"{BEGIN}; {SHORT}; SET LOCAL synchronous_commit = {self._sync}")
            self.has_begun = True

    async def fetch(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        """Run a statement inside the transaction and return its rows."""
        await self.begin()
        return await self.connection.fetch(sql, *values)

    def add(self, part: Part, *values: Any) -> None:
        """Add a part to the statement that `run` or `commit` runs."""
        self._parts.append(part)
        self._values.append(values)

    async def run(self) -> None:
        """Run the parts added so far inside the transaction."""
        await self.begin()
        await self._run()

    async def commit(self) -> None:
        """Run the rest of the parts, and commit."""
        if not self.has_begun:
            self.is_committing = True
            await self._run()
            return
        await self._run()
        self.is_committing = True
        await self.connection.execute("COMMIT")

    async def _run(self) -> None:
        if not self._parts:
            return
        values: list[Any] = [self._sync]
        for some in self._values:
            values += some
        sql = _text(tuple(self._parts), tuple(map(len, self._values)))
        self._parts, self._values = [], []
        rows = await self.connection.fetch(sql, *values)
        self.returned = frozenset(id_ for (id_,) in rows)


@lru_cache(maxsize=256)
def _text(parts: tuple[Part, ...], counts: tuple[int, ...]) -> str:
    """Return one statement of several parts, with consecutive numbers of their parameters."""
    expressions, results, offset = [], [f"SELECT {SYNC_SQL} AS id"], 1
    for part, count in zip(parts, counts, strict=True):
        expressions.append(_numbered(part.sql, offset))
        if part.result:
            results.append(part.result)
        offset += count
    return f"WITH {', '.join(expressions)} {' UNION ALL '.join(results)}"


def _numbered(sql: str, by: int) -> str:
    """Add a number to the number of each parameter."""
    return re.sub(r"\$(\d+)", lambda found: f"${int(found[1]) + by}", sql)
