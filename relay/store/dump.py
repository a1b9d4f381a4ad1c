"""Events out of the store and into it: an export as lines of JSON, and back, as often as one likes."""

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from itertools import groupby
from typing import Any

import aiosqlite

from relay.errors import RelayError, StorageUnavailableError
from relay.model import Chosen, Imported, Selection, StoredEvent
from relay.store import Span
from relay.store.batch import Batch, Restored
from relay.store.export import DeliveryLine, moment, read_line, write_line
from relay.store.queries.selection import Selecting
from relay.store.statements import fetch
from relay.store.transaction import Transaction
from relay.store.writer import Job, Writer

MOST_EVENTS = 100  # of one transaction, so that those of senders are not delayed by it
MOST_BYTES = 8 * 2**20  # of bodies in memory at once, unless one event alone is larger

DELIVERIES_SQL = """
    SELECT event_id, public_id, destination, state, reason, attempts, created_at, finished_at, last_status,
           last_error
      FROM deliveries WHERE event_id IN ({marks}) ORDER BY event_id, id
"""


async def restore(batch: Batch, transaction: Transaction) -> None:
    """Take in events that are not there yet."""
    sql = (
        "WITH asked (id) AS (VALUES {values}) SELECT asked.id FROM asked JOIN events ON public_id = asked.id"
    )
    rows = await fetch(transaction, sql, [(each.event.public_id,) for each in batch.restoring])
    there = {row[0] for row in rows}
    for each in batch.restoring:
        each.done = each.event.public_id not in there
        if each.done:
            there.add(each.event.public_id)
            batch.put_back(each)


class Exporting(Selecting):
    """The reading verb."""

    async def export(
        self, selection: Selection, span: Span, *, deliveries: bool = False
    ) -> AsyncIterator[bytes]:
        """See `Store.export`."""
        async for page in self.select(selection, span):
            for some in _portions(page):
                ids = [chosen.event_id for chosen in some]
                events = await self.load(ids)
                told = await _deliveries(self._reader, ids) if deliveries else {}
                for id_ in ids:
                    if (event := events.get(id_)) is not None:
                        yield write_line(event, told.get(id_, []) if deliveries else None)


class Importing:
    """The writing verbs."""

    _writer: Writer

    async def restore(self, events: Sequence[StoredEvent], *, owe: bool = False) -> tuple[bool, ...]:
        """See `Store.restore`."""
        if not self._writer.has_room(sum(len(event.body) for event in events)):
            raise StorageUnavailableError(
                "less than min_free_disk would be free", hint="make room on the disk, and import again"
            )
        restoring = [Restored(event, owe) for event in events]

        def apply_(batch: Batch) -> tuple[bool, ...]:
            batch.restoring += restoring
            return ()

        job = Job(apply_, answer=lambda _batch, _none: tuple(each.done for each in restoring))
        return await self._writer.submit(job)

    async def read_in(self, lines: AsyncIterable[bytes], *, owe: bool = False) -> AsyncIterator[Imported]:
        """See `Store.read_in`."""
        count, new, size = 0, 0, 0
        waiting: list[StoredEvent] = []
        async for line in lines:
            try:
                event = read_line(line)
            except RelayError as error:
                new += sum(await self.restore(waiting, owe=owe))
                raise RelayError(
                    f"line {count + 1}: {error.message}",
                    hint=f"{new} events before it are in; mend it and import the file again, they count once",
                ) from error
            count, size = count + 1, size + len(event.body)
            waiting.append(event)
            if len(waiting) >= MOST_EVENTS or size >= MOST_BYTES:
                new += sum(await self.restore(waiting, owe=owe))
                waiting, size = [], 0
                yield Imported(lines=count, new=new)
        new += sum(await self.restore(waiting, owe=owe))
        yield Imported(lines=count, new=new)


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
