"""The ledger in PostgreSQL: a row per node and destination, read as sums."""

from relay.model import Backlog, Counts, Outlook
from relay.store.batch import LEDGER
from relay.store.ledger import MOST_EXPIRING, MOST_KEYS, MOST_LATER, PendingCounts, counts_of
from relay.store.postgres.connection import Database

_SUMS = ", ".join(f"sum({column})::bigint AS {column}" for column in LEDGER)

TOTALS_SQL = f"""
    SELECT destination, {", ".join(LEDGER)}, created - delivered - dead - expired - cancelled AS pending
      FROM (SELECT destination, {_SUMS} FROM ledger GROUP BY destination) AS l
"""  # noqa: S608 - only constants
AUDIT_SQL = f"""
    SELECT destination, {", ".join(f"coalesce({column}, 0)" for column in LEDGER)}, coalesce(pending, 0)
      FROM (SELECT destination, {_SUMS} FROM ledger GROUP BY destination) AS l
      FULL JOIN (SELECT destination, count(*) AS pending FROM owed GROUP BY destination) AS o
           USING (destination)
"""  # noqa: S608 - only constants
BACKLOG_SQL = """
    SELECT l.destination, due.count, first.created_at, first.id
      FROM (SELECT DISTINCT destination FROM ledger) AS l
      CROSS JOIN LATERAL (
            SELECT (SELECT count(*) FROM owed AS o
                     WHERE o.destination = l.destination AND o.attempts = 0 AND o.next_attempt_at <= $1)
                 + (SELECT count(*) FROM owed AS o
                     WHERE o.destination = l.destination AND o.attempts > 0 AND o.next_attempt_at <= $1)
                   AS count) AS due
      CROSS JOIN LATERAL (
            SELECT o.id, o.created_at FROM owed AS o WHERE o.destination = l.destination
             ORDER BY o.id LIMIT 1) AS first
"""

# As `relay.store.sqlite.ledger.LATER_SQL`: reads only the shorter part of a long backlog.
BACKLOG_OF_SQL = """
    SELECT l.pending, l.later, first.created_at, first.id
      FROM (SELECT sum(created - delivered - dead - expired - cancelled)::bigint AS pending,
                   (SELECT count(*) FROM (
                        SELECT 1 FROM owed
                         WHERE destination = $1 AND attempts = 0 AND next_attempt_at > $2 LIMIT $3) AS a)
                 + (SELECT count(*) FROM (
                        SELECT 1 FROM owed
                         WHERE destination = $1 AND attempts > 0 AND next_attempt_at > $2 LIMIT $3) AS b)
                 + (SELECT count(*) FROM (
                        SELECT 1 FROM owed
                         WHERE destination = $1 AND attempts = 0 AND next_attempt_at IS NULL LIMIT $3) AS c)
                   AS later
              FROM ledger WHERE destination = $1) AS l
      CROSS JOIN LATERAL (
            SELECT id, created_at FROM owed WHERE destination = $1 AND id >= $4 ORDER BY id LIMIT 1) AS first
"""
DUE_SQL = """
    SELECT (SELECT count(*) FROM owed WHERE destination = $1 AND attempts = 0 AND next_attempt_at <= $2)
         + (SELECT count(*) FROM owed WHERE destination = $1 AND attempts > 0 AND next_attempt_at <= $2)
"""

EXPIRES_SQL = """
    SELECT min(CASE WHEN expires_at > 1 THEN expires_at END) FROM (  -- 0, 1: see ENDED_IN_FLIGHT
        SELECT expires_at FROM owed WHERE id = $2
        UNION ALL
        SELECT expires_at FROM (
            SELECT destination, expires_at FROM owed
             WHERE expires_at IS NOT NULL ORDER BY expires_at LIMIT $3) AS next
         WHERE destination = $1) AS found
"""
KEYS_SQL = """
    SELECT count(*), coalesce(max(pending), 0) FROM (
        SELECT pending FROM order_keys WHERE destination = $1 AND pending > 0 LIMIT $2) AS k
"""


class PostgresLedger(PendingCounts):
    """`relay.store.Ledger` over PostgreSQL."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database

    async def totals(self) -> dict[str, Counts]:
        """See `LedgerReads.totals`."""
        return counts_of(await self._database.fetch(TOTALS_SQL))

    async def audit(self) -> dict[str, Counts]:
        """See `LedgerReads.audit`."""
        return counts_of(await self._database.fetch(AUDIT_SQL))

    async def backlog(self, now: int) -> dict[str, Backlog]:
        """See `LedgerReads.backlog`."""
        rows = await self._database.fetch(BACKLOG_SQL, now)
        return {name: Backlog(due, oldest, row) for name, due, oldest, row in rows}

    async def backlog_of(self, name: str, now: int, start: int | None = None) -> Backlog | None:
        """See `LedgerReads.backlog_of`."""
        rows = await self._database.fetch(BACKLOG_OF_SQL, name, now, MOST_LATER, start or 0)
        for pending, later, oldest, row in rows:
            due = pending - later
            if later >= MOST_LATER:
                due = await self._database.value(DUE_SQL, name, now)
            return Backlog(due, oldest, row)
        return None

    async def outlook_of(self, name: str, row: int) -> Outlook:
        """See `LedgerReads.outlook_of`."""
        expires = await self._database.value(EXPIRES_SQL, name, row, MOST_EXPIRING)
        [[keys, longest]] = await self._database.fetch(KEYS_SQL, name, MOST_KEYS)
        return Outlook(expires, keys, longest, keys < MOST_KEYS)
