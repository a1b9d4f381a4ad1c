"""Reads of the store: lists, selections, counts and exports, page by page, each along an index.

`filters` defines each filter, `plan` chooses the index, and `page` bounds the search for one page.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from relay.model import Chosen, DestinationState, Named, Selection, Stat
from relay.store import Page, Span
from relay.store.sqlite.database import Database
from relay.store.sqlite.export import delivery_lines, write_line
from relay.store.sqlite.queries import lists
from relay.store.sqlite.queries import selection as selections
from relay.store.sqlite.queries.page import Cursor, portions
from relay.store.sqlite.rows import STATE_COLUMNS, load_events

STATES_SQL = f"SELECT {STATE_COLUMNS} FROM destinations"  # noqa: S608 - a constant

EXPORT_EVENTS = 100
"""Events that an export loads at once."""

EXPORT_BYTES = 8 * 2**20
"""Bytes of bodies of an export in memory at once, unless one event alone is larger."""


class SqliteQueries:
    """`relay.store.Queries` over SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """See `Queries.find`."""
        cursor = None if before is None else Cursor(before)
        page = await lists.read_page(self._database.reader, kind, limit=limit, cursor=cursor, filters=filters)
        return page.rows

    async def page(self, kind: str, *, limit: int = 50, cursor: str | None = None, **filters: Any) -> Page:
        """See `Queries.page`."""
        before = None if cursor is None else Cursor.read(cursor)
        return await lists.read_page(self._database.reader, kind, limit=limit, cursor=before, filters=filters)

    async def span(self, selection: Selection) -> Span:
        """See `Queries.span`."""
        return await selections.span(self._database.reader, selection)

    def select(self, selection: Selection, span: Span) -> AsyncIterator[tuple[Chosen, ...]]:
        """See `Queries.select`."""
        return selections.select(self._database.reader, selection, span)

    def pending(self, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
        """See `Queries.pending`."""
        return selections.pending(self._database.reader, selection)

    async def name_events(self, ids: Sequence[str]) -> tuple[Chosen, ...]:
        """See `Queries.name_events`."""
        return await selections.name_events(self._database.reader, ids)

    async def name_deliveries(self, ids: Sequence[str]) -> tuple[Named, ...]:
        """See `Queries.name_deliveries`."""
        return await selections.name_deliveries(self._database.reader, ids)

    def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """See `Queries.stats`."""
        return selections.stats(self._database.reader, selection, after)

    async def export(
        self, selection: Selection, span: Span, *, deliveries: bool = False
    ) -> AsyncIterator[bytes]:
        """See `Queries.export`."""
        async for page in self.select(selection, span):
            for portion in portions(page, EXPORT_BYTES, lambda chosen: chosen.size, EXPORT_EVENTS):
                ids = [chosen.event_id for chosen in portion]
                events = await load_events(self._database.reader, ids)
                lines = await delivery_lines(self._database.reader, ids) if deliveries else None
                for id_ in ids:
                    if (event := events.get(id_)) is not None:
                        yield write_line(event, None if lines is None else lines.get(id_, []))

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `Queries.destination_states`."""
        rows = await self._database.reader.execute_fetchall(STATES_SQL)
        found = [dict(zip(DestinationState.__struct_fields__, row, strict=True)) for row in rows]
        return {each["name"]: msgspec.convert(each, DestinationState, strict=False) for each in found}

    async def paused_sources(self) -> frozenset[str]:
        """See `Queries.paused_sources`."""
        rows = await self._database.reader.execute_fetchall("SELECT name FROM sources WHERE paused")
        return frozenset(name for (name,) in rows)
