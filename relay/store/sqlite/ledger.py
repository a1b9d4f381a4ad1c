"""The ledger in SQLite."""

from relay.model import Backlog, Counts, Outlook
from relay.store.ledger import MOST_EXPIRING, MOST_KEYS, MOST_LATER, PendingCounts, counts_of
from relay.store.sqlite.database import Database

# Pending deliveries are counted in two groups, each of which has an index: no other row is read.
AUDIT_SQL = """
    SELECT destination, created, delivered, dead, expired, cancelled,
           (SELECT count(*) FROM deliveries AS d
             WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts = 0)
         + (SELECT count(*) FROM deliveries AS d
             WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts > 0) AS pending
      FROM ledger
"""
TOTALS_SQL = """
    SELECT destination, created, delivered, dead, expired, cancelled,
           created - delivered - dead - expired - cancelled AS pending
      FROM ledger
"""

# Reads, for each destination, the two indexes that claims use; sorts nothing.
BACKLOG_SQL = """
    WITH backlog AS (
        SELECT destination,
               (SELECT count(*) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts = 0
                   AND d.next_attempt_at <= :now)
             + (SELECT count(*) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts > 0
                   AND d.next_attempt_at <= :now) AS due,
               (SELECT min(d.id) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts = 0
               ) AS first,
               (SELECT min(d.id) FROM deliveries AS d
                 WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts > 0
               ) AS retry
          FROM ledger
    )
    SELECT b.destination, b.due, d.created_at, d.id
      FROM backlog AS b JOIN deliveries AS d ON d.id = coalesce(min(b.first, b.retry), b.first, b.retry)
"""

# Nearly all of a long backlog is due, or nearly none: reads only the shorter part.
LATER_SQL = """
    SELECT created - delivered - dead - expired - cancelled AS pending,
           (SELECT count(*) FROM (
                SELECT 1 FROM deliveries
                 WHERE destination = :name AND state = 'pending' AND attempts = 0
                   AND next_attempt_at > :now LIMIT :most))
         + (SELECT count(*) FROM (
                SELECT 1 FROM deliveries
                 WHERE destination = :name AND state = 'pending' AND attempts > 0
                   AND next_attempt_at > :now LIMIT :most))
         + (SELECT count(*) FROM (
                SELECT 1 FROM deliveries
                 WHERE destination = :name AND state = 'pending' AND attempts = 0
                   AND next_attempt_at IS NULL LIMIT :most)) AS later
      FROM ledger WHERE destination = :name
"""
DUE_SQL = """
    SELECT (SELECT count(*) FROM deliveries
             WHERE destination = :name AND state = 'pending' AND attempts = 0 AND next_attempt_at <= :now)
         + (SELECT count(*) FROM deliveries
             WHERE destination = :name AND state = 'pending' AND attempts > 0 AND next_attempt_at <= :now)
"""
# The pending deliveries are not in an index by id, so this reads all of them.
OLDEST_SQL = """
    SELECT created_at, id FROM deliveries WHERE id = (
        SELECT min(id) FROM (
            SELECT min(id) AS id FROM deliveries
             WHERE destination = :name AND state = 'pending' AND attempts = 0
            UNION ALL
            SELECT min(id) FROM deliveries
             WHERE destination = :name AND state = 'pending' AND attempts > 0))
"""
OLDEST_FROM_SQL = """
    SELECT created_at, id FROM deliveries
     WHERE destination = :name AND id > 0 AND id >= :start AND state = 'pending' ORDER BY id LIMIT 1
"""

EXPIRES_SQL = """
    SELECT min(CASE WHEN expires_at > 1 THEN expires_at END) FROM (  -- 0, 1: see ENDED_IN_FLIGHT
        SELECT expires_at FROM deliveries WHERE id = :row AND state = 'pending'
        UNION ALL
        SELECT expires_at FROM (
            SELECT destination, expires_at FROM deliveries
             WHERE state = 'pending' AND expires_at IS NOT NULL ORDER BY expires_at LIMIT :most)
         WHERE destination = :name)
"""
KEYS_SQL = """
    SELECT count(*), coalesce(max(pending), 0), coalesce(sum(pending), 0) FROM (
        SELECT count(*) AS pending FROM (
            SELECT order_key FROM deliveries
             WHERE destination = :name AND state = 'pending' AND order_key IS NOT NULL
             ORDER BY order_key LIMIT :most)
         GROUP BY order_key)
"""


class LedgerReader:
    """`relay.store.LedgerReads` over SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def totals(self) -> dict[str, Counts]:
        """See `LedgerReads.totals`."""
        return counts_of(await self._database.reader.execute_fetchall(TOTALS_SQL))

    async def audit(self) -> dict[str, Counts]:
        """See `LedgerReads.audit`."""
        return counts_of(await self._database.counter.execute_fetchall(AUDIT_SQL))

    async def backlog(self, now: int) -> dict[str, Backlog]:
        """See `LedgerReads.backlog`."""
        rows = await self._database.counter.execute_fetchall(BACKLOG_SQL, {"now": now})
        return {name: Backlog(due, oldest, row) for name, due, oldest, row in map(tuple, rows)}

    async def backlog_of(self, name: str, now: int, start: int | None = None) -> Backlog | None:
        """See `LedgerReads.backlog_of`."""
        fetch, values = self._database.counter.execute_fetchall, {"name": name, "now": now}
        for pending, later in map(tuple, await fetch(LATER_SQL, {**values, "most": MOST_LATER})):
            due = pending - later
            if later >= MOST_LATER:
                [[due]] = map(tuple, await fetch(DUE_SQL, values))
            sql = OLDEST_SQL if start is None else OLDEST_FROM_SQL
            for oldest, row in map(tuple, await fetch(sql, {"name": name, "start": start})):
                return Backlog(due, oldest, row)
        return None

    async def outlook_of(self, name: str, row: int) -> Outlook:
        """See `LedgerReads.outlook_of`."""
        fetch = self._database.counter.execute_fetchall
        [[expires]] = map(tuple, await fetch(EXPIRES_SQL, {"name": name, "row": row, "most": MOST_EXPIRING}))
        [[keys, longest, read]] = map(tuple, await fetch(KEYS_SQL, {"name": name, "most": MOST_KEYS}))
        return Outlook(expires, keys, longest, read < MOST_KEYS)


class SqliteLedger(PendingCounts, LedgerReader):
    """`relay.store.Ledger` over SQLite."""

    def __init__(self, database: Database) -> None:
        PendingCounts.__init__(self)
        LedgerReader.__init__(self, database)
