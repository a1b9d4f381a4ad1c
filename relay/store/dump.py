"""Exports: a selection's events as lines of JSON."""

from collections.abc import AsyncIterator, Sequence
from itertools import groupby
from typing import Any

import aiosqlite

from relay.model import Chosen, Selection
from relay.store import Span
from relay.store.export import DeliveryLine, moment, write_line
from relay.store.queries.selection import Selecting

MOST_EVENTS = 100  # loaded at once
MOST_BYTES = 8 * 2**20  # of bodies in memory at once, unless one event alone is larger

DELIVERIES_SQL = """
    SELECT event_id, public_id, destination, state, reason, attempts, created_at, finished_at, last_status,
           last_error
      FROM deliveries WHERE event_id IN ({marks}) ORDER BY event_id, id
"""


class Exporting(Selecting):
    """The reading verb."""

    async def export(
        self, selection: Selection, span: Span, *, deliveries: bool = False
    ) -> AsyncIterator[bytes]:
        """See `Queries.export`."""
        async for page in self.select(selection, span):
            for some in _portions(page):
                ids = [chosen.event_id for chosen in some]
                events = await self.load(ids)
                told = await _deliveries(self._reader, ids) if deliveries else {}
                for id_ in ids:
                    if (event := events.get(id_)) is not None:
                        yield write_line(event, told.get(id_, []) if deliveries else None)


async def _deliveries(
    reader: aiosqlite.Connection, event_ids: Sequence[int]
) -> dict[int, list[DeliveryLine]]:
    sql = DELIVERIES_SQL.format(marks=", ".join("?" * len(event_ids)))
    rows = await reader.execute_fetchall(sql, event_ids)
    return {id_: [_delivery(row) for row in of] for id_, of in groupby(rows, key=lambda row: row[0])}


def _delivery(row: Sequence[Any]) -> DeliveryLine:
    return DeliveryLine(
        id=row[1], destination=row[2], state=row[3], reason=row[4], attempts=row[5],
        created_at=moment(row[6]), finished_at=None if row[7] is None else moment(row[7]),
        last_status=row[8], last_error=row[9],
    )  # fmt: skip


def _portions(page: Sequence[Chosen]) -> list[list[Chosen]]:
    """Cut into what is loaded at once."""
    found: list[list[Chosen]] = []
    size = MOST_BYTES
    for chosen in page:
        if size + chosen.size > MOST_BYTES or len(found[-1]) >= MOST_EVENTS:
            found.append([])
            size = 0
        found[-1].append(chosen)
        size += chosen.size
    return found
