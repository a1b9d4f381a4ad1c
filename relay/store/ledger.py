"""The ledger: for each destination, how many deliveries were created, and how many ended in each state.

created = delivered + dead + expired + cancelled + pending, always. All except `pending` are counted in the
transactions that change them. Pending deliveries are counted in their table, which makes the sum a check.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from relay.model import Counts

MOST_LATER = 10_000
"""Deliveries that are not due yet and are counted instead of the due ones; with more, the due ones are."""

MOST_EXPIRING = 1_000
"""Maximum number of rows, in order of expiry, that are searched for a delivery of one destination."""

MOST_KEYS = 10_000
"""Maximum number of order keys to count; in SQLite, of pending deliveries whose keys are counted."""


def counts_of(rows: Iterable[Any]) -> dict[str, Counts]:
    """Build the counts of each destination from rows of an engine."""
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


class PendingCounts:
    """The pending deliveries of each destination, in memory."""

    def __init__(self) -> None:
        self.pending_counts: Counter[str] = Counter()  # by destination; changes with each commit

    def pending(self) -> dict[str, int]:
        """See `Ledger.pending`."""
        return {name: count for name, count in self.pending_counts.items() if count}
