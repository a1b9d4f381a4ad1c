"""The ledger in SQLite."""

from relay.model import Backlog, Counts
from relay.store.ledger import MOST_LATER, PendingCounts, counts_of
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


class SqliteLedger(PendingCounts, LedgerReader):
    """`relay.store.Ledger` over SQLite."""

    def __init__(self, database: Database) -> None:
        PendingCounts.__init__(self)
        LedgerReader.__init__(self, database)
