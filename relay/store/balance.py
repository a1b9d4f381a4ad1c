"""The books against the table: per destination, what was created and ended, and what is pending indeed."""

from collections.abc import Iterable
from typing import Any

from relay.store.counts import Counts

# Pending ones are counted in two shares, each of which has its index: no other row is looked at.
COUNTS_SQL = """
    SELECT destination, created, delivered, dead, expired, cancelled,
           (SELECT count(*) FROM deliveries AS d
             WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts = 0)
         + (SELECT count(*) FROM deliveries AS d
             WHERE d.destination = ledger.destination AND d.state = 'pending' AND d.attempts > 0)
      FROM ledger
"""
BOOKS_SQL = """
    SELECT destination, created, delivered, dead, expired, cancelled,
           created - delivered - dead - expired - cancelled
      FROM ledger
"""


def balance(rows: Iterable[Any]) -> dict[str, Counts]:
    """Build the books of each destination from rows of either statement."""
    return {
        name: Counts(
            created=created,
            delivered=delivered,
            dead=dead,
            expired=expired,
            cancelled=cancelled,
            pending=pending,
        )
        for name, created, delivered, dead, expired, cancelled, pending in rows
    }
