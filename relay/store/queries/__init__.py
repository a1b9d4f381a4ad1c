"""Reads of the store: lists, selections, counts and exports, page by page, each along an index.

An engine provides a `reader.Reader` with its statements. Everything else is the same for every engine:
`filters` checks candidates, `plan` chooses the index, and `page` bounds the search for one page.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal

from relay.model import Chosen, DestinationState, Named, Selection, Stat, StoredEvent
from relay.store import Page, Span
from relay.store.export import write_line
from relay.store.queries import lists
from relay.store.queries import selection as selections
from relay.store.queries.page import Cursor, portions
from relay.store.queries.reader import Reader

EXPORT_EVENTS = 100
"""Events that an export loads at once."""

EXPORT_BYTES = 8 * 2**20
"""Bytes of bodies of an export in memory at once, unless one event alone is larger."""


class PagedQueries:
    """`relay.store.Queries` over the statements of an engine."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """See `Queries.find`."""
        cursor = None if before is None else Cursor(before)
        page = await lists.read_page(self._reader, kind, limit=limit, cursor=cursor, filters=filters)
        return page.rows

    async def page(self, kind: str, *, limit: int = 50, cursor: str | None = None, **filters: Any) -> Page:
        """See `Queries.page`."""
        before = None if cursor is None else Cursor.read(cursor)
        return await lists.read_page(self._reader, kind, limit=limit, cursor=before, filters=filters)

    async def span(self, selection: Selection) -> Span:
        """See `Queries.span`."""
        return await selections.span(self._reader, selection)

    def select(self, selection: Selection, span: Span) -> AsyncIterator[tuple[Chosen, ...]]:
        """See `Queries.select`."""
        return selections.select(self._reader, selection, span)

    def pending(self, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
        """See `Queries.pending`."""
        return selections.pending(self._reader, selection)

    async def name_events(self, ids: Sequence[str]) -> tuple[Chosen, ...]:
        """See `Queries.name_events`."""
        return await selections.name_events(self._reader, ids)

    async def name_deliveries(self, ids: Sequence[str]) -> tuple[Named, ...]:
        """See `Queries.name_deliveries`."""
        return await selections.name_deliveries(self._reader, ids)

    async def digits_of(self, kind: Literal["events", "deliveries"], ids: Iterable[str]) -> int:
        """See `Queries.digits_of`."""
        return await selections.digits_of(self._reader, kind, ids)

    def stats(
        self, selection: Selection, *, after: tuple[int, str, str] | None = None
    ) -> AsyncIterator[tuple[Stat, ...]]:
        """See `Queries.stats`."""
        return selections.stats(self._reader, selection, after)

    async def export(
        self, selection: Selection, span: Span, *, deliveries: bool = False
    ) -> AsyncIterator[bytes]:
        """See `Queries.export`."""
        async for page in self.select(selection, span):
            for portion in portions(page, EXPORT_BYTES, lambda chosen: chosen.size, EXPORT_EVENTS):
                ids = [chosen.event_id for chosen in portion]
                events = await self._reader.load_events(ids)
                lines = await self._reader.delivery_lines(ids) if deliveries else None
                for id_ in ids:
                    if (event := events.get(id_)) is not None:
                        yield write_line(event, None if lines is None else lines.get(id_, []))

    async def load(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Queries.load`."""
        return await self._reader.load_events(event_ids)

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `Queries.destination_states`."""
        return await self._reader.destination_states()

    async def paused_sources(self) -> frozenset[str]:
        """See `Queries.paused_sources`."""
        return await self._reader.paused_sources()
