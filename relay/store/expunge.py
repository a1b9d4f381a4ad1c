"""Deleting events because an operator says so, whatever their age: what is still owed is cancelled first."""

from collections.abc import AsyncIterator, Sequence
from functools import partial

import aiosqlite

from relay.model import Expunged, Selection
from relay.store import Span
from relay.store.prune import Victim, delete_events, paced, portions
from relay.store.queries.selection import Selecting
from relay.store.wishes import Wishing

AT_ONCE = 500
"""Events of which one step cancels the deliveries."""

_ANY_DEATH = 2**63 - 1  # a delivery that has died keeps no event that is to go

OWED_SQL = "SELECT id FROM deliveries WHERE event_id IN ({marks}) AND state = 'pending'"
COST_SQL = """
    SELECT e.id, 1 + e.size / 4096 + count(d.id) + 2 * coalesce(sum(d.attempts), 0)
      FROM events AS e LEFT JOIN deliveries AS d ON d.event_id = e.id
     WHERE e.id IN ({marks}) GROUP BY e.id
"""


class Expunging(Selecting, Wishing):
    """The store's verbs of deletion."""

    _reader: aiosqlite.Connection

    async def expunge(self, event_ids: Sequence[int]) -> Expunged:
        """See `Store.expunge`."""
        gone, cancelled, left = 0, 0, []
        for at in range(0, len(event_ids), AT_ONCE):
            some = event_ids[at : at + AT_ONCE]
            marks = ", ".join("?" * len(some))
            owed = await self._reader.execute_fetchall(OWED_SQL.format(marks=marks), some)
            if ids := [row[0] for row in owed]:
                cancelled += (await self.cancel(ids)).ended
            costs = await self._reader.execute_fetchall(COST_SQL.format(marks=marks), some)
            victims = [Victim(id_, cost, _ANY_DEATH) for id_, cost in costs]
            for portion in portions(victims):
                gone += await paced(self._writer, partial(delete_events, portion))
            there = f"SELECT id FROM events WHERE id IN ({marks})"  # noqa: S608 - marks only
            left += [row[0] for row in await self._reader.execute_fetchall(there, some)]
        return Expunged(events=gone, cancelled=cancelled, left=tuple(left))

    async def expunge_selected(self, selection: Selection, span: Span) -> AsyncIterator[Expunged]:
        """See `Store.expunge_selected`."""
        async for page in self.select(selection, span):
            yield await self.expunge([chosen.event_id for chosen in page])
