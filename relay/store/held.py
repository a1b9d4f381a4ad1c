"""What is held for too long: due all the while, at a destination that takes nothing, and nobody came.

How long a destination has held is remembered in the table `held`, so that a restart does not begin anew.
All of it is on the steady clock, as due times are.
"""

from relay.base.clock import SECOND
from relay.model import Born
from relay.store import OPERATOR_EVENTS
from relay.store.batch import Batch, Look
from relay.store.claims import Holds
from relay.store.transaction import Transaction
from relay.store.transitions import end

AT_ONCE = 500
"""Most deliveries of a kind that one transaction ends for a destination."""

NOTICE = 86_400 * SECOND
"""How long before the first delivery expires the operator is told."""

# What waits behind an earlier one of its key has no due time: there the creation counts. It ends first,
# lest the end of its head should make it due.
WAITING_SQL = """
    SELECT id, destination, order_key FROM (
           SELECT id, destination, order_key, created_at FROM deliveries
            WHERE destination = ? AND state = 'pending' AND attempts = 0 AND next_attempt_at IS NULL
            ORDER BY id LIMIT ?)
     WHERE created_at <= ?
"""
DUE_SQL = """
    SELECT id, destination, order_key FROM deliveries
     WHERE destination = ? AND state = 'pending' AND attempts {share} 0 AND next_attempt_at <= ?
     ORDER BY next_attempt_at, id LIMIT ?
"""
FIRST_SQL = """
    SELECT min(next_attempt_at) FROM deliveries
     WHERE destination = ? AND state = 'pending' AND attempts {share} 0
"""
SHARES = ("=", ">")  # as the partial indexes have it


async def expire_held(batch: Batch, transaction: Transaction, holds: Holds, look: Look) -> None:
    """Note who holds since when, warn a day before the first deliveries expire, and expire them."""
    rows = await transaction.fetch("SELECT destination, since, told FROM held")
    known = {name: (since, bool(told)) for name, since, told in rows}
    for name in known.keys() - look.names:
        transaction.run("DELETE FROM held WHERE destination = ?", (name,))
    for name in look.names - known.keys():
        transaction.run("INSERT INTO held (destination, since) VALUES (?, ?)", (name, batch.steady))
    notice = min(NOTICE, look.kept // 2)
    for name in sorted(look.names & known.keys()):
        since, told = known[name]
        if not told and since <= batch.steady - look.kept + notice:
            await _warn(batch, transaction, name, look.kept, since)
        if since <= batch.steady - look.kept:
            await _expire(batch, transaction, holds, name, batch.steady - look.kept)


async def _warn(batch: Batch, transaction: Transaction, name: str, kept: int, since: int) -> None:
    first = [
        due
        for share in SHARES
        for (due,) in await transaction.fetch(FIRST_SQL.format(share=share), (name,))
        if due is not None
    ]
    notice = min(NOTICE, kept // 2)
    if not first or max(min(first), since) > batch.steady - kept + notice:
        return
    transaction.run("UPDATE held SET told = 1 WHERE destination = ?", (name,))
    expires_in = max(0, max(min(first), since) + kept - batch.steady)
    data = {"destination": name, "expires_in_seconds": expires_in // SECOND, "held": kept // SECOND}
    batch.bear(OPERATOR_EVENTS, Born(type="deliveries.expiring", subject=name, data=data))


async def _expire(batch: Batch, transaction: Transaction, holds: Holds, name: str, before: int) -> None:
    rows = await transaction.fetch(WAITING_SQL, (name, AT_ONCE, before))
    if not rows:
        for share in SHARES:
            rows += await transaction.fetch(DUE_SQL.format(share=share), (name, before, AT_ONCE))
    await end(batch, transaction, holds, rows, ("expired", "held"))
