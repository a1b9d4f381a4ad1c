"""Lists for operators: newest first, by keyset, along indexes; looking for what is rare has its bound.

A page of events or deliveries looks at so many candidates, and for so long; then it ends with what it has
found, and its cursor goes on from where it was. So no page takes long whatever it is asked for, and no
read transaction spans more than a step of it.
"""

from collections.abc import Mapping
from typing import Any, get_args

import aiosqlite

from relay.errors import RelayError
from relay.model import DeliveryState, Selection
from relay.store import event_times
from relay.store.database import Database
from relay.store.queries.attempts import FILTERS as OF_TRIES
from relay.store.queries.attempts import tries
from relay.store.queries.budget import Bound
from relay.store.queries.filters import Found, Sieve
from relay.store.queries.page import Page, Place
from relay.store.queries.plan import DELIVERIES, Lead, choose, to_deliveries, to_events, types_of
from relay.store.queries.small import SMALL, records, small

EVENTS_SQL = """
    SELECT e.id AS row, e.public_id AS id, e.source, e.type, substr(e.subject, 1, 256) AS subject,
           e.received_at, e.size,
           EXISTS (SELECT 1 FROM repetitions AS r WHERE r.event_id = e.id) AS duplicate,
           (SELECT json_object({counts}) FROM deliveries AS d WHERE d.event_id = e.id) AS deliveries
      FROM events AS e WHERE e.id IN ({marks})
""".replace(
    "{counts}", ", ".join(f"'{state}', sum(d.state = '{state}')" for state in get_args(DeliveryState))
)
DELIVERIES_SQL = """
    SELECT d.id AS row, d.public_id AS id, v.public_id AS event_id, v.type, d.destination, d.state,
           d.reason, d.attempts, d.next_attempt_at, d.last_status, d.last_error, d.created_at,
           d.finished_at, (SELECT r.public_id FROM deliveries AS r WHERE r.id = d.replay_of) AS replay_of
      FROM deliveries AS d CROSS JOIN events AS v ON v.id = d.event_id WHERE d.id IN ({marks})
"""
ROW_SQL = {
    "events": "SELECT id FROM events WHERE public_id = ?",
    "deliveries": "SELECT id FROM deliveries WHERE public_id = ?",
}
SELECTED = Selection.__struct_fields__
FILTERS: Mapping[str, tuple[str, ...]] = {
    "events": ("id", *SELECTED),
    "deliveries": ("id", "event_id", *SELECTED),
    "attempts": OF_TRIES,
    **{kind: tuple(each.filters) for kind, each in SMALL.items()},
}
"""What each list may be asked for."""


class Listing:
    """The store's verbs that list."""

    _database: Database

    @property
    def _reader(self) -> aiosqlite.Connection:
        return self._database.reader

    async def find(
        self, kind: str, *, limit: int = 50, before: int | None = None, **filters: Any
    ) -> list[dict[str, Any]]:
        """See `Queries.find`."""
        place = None if before is None else Place(before)
        return (await find(self._reader, kind, limit=limit, before=place, filters=filters)).rows

    async def page(self, kind: str, *, limit: int = 50, cursor: str | None = None, **filters: Any) -> Page:
        """See `Queries.page`."""
        place = None if cursor is None else Place.of(cursor)
        return await find(self._reader, kind, limit=limit, before=place, filters=filters)


async def find(
    reader: aiosqlite.Connection,
    kind: str,
    *,
    limit: int,
    before: Place | None,
    filters: Mapping[str, Any],
) -> Page:
    """Return a page of at most `limit` rows before a place; `id` and `event_id` may be row ids as well.

    Raises:
        RelayError: no such list, or it has no such filter.
    """
    if kind not in FILTERS:
        raise RelayError(f"no list of {kind}", hint=f"there are {', '.join(FILTERS)}")
    if strange := set(filters) - set(FILTERS[kind]):
        raise RelayError(
            f"{kind} have no filter {min(strange)!r}", hint=f"there are {', '.join(FILTERS[kind])}"
        )
    asked = {name: value for name, value in filters.items() if value is not None}
    if kind in SMALL:
        return await small(reader, kind, limit=limit, before=before, filters=asked)
    if kind == "attempts":
        if (delivery := asked.get("delivery_id")) is not None:
            asked["delivery_id"] = await _row(reader, "deliveries", delivery)
        return await tries(reader, limit=limit, before=before, filters=asked)
    own = await _row(reader, kind, asked.pop("id", None))
    event = await _row(reader, "events", asked.pop("event_id", None))
    search = Search(reader, Selection(**asked), deliveries=kind == "deliveries", own=own, event=event)
    return await search.page(limit, before)


async def _row(reader: aiosqlite.Connection, kind: str, named: str | int | None) -> int | None:
    """Return the row of that id; 0, which no row has: there is none."""
    if not isinstance(named, str):
        return named
    rows = list(await reader.execute_fetchall(ROW_SQL[kind], (named,)))
    return rows[0][0] if rows else 0


class Search:
    """One page of events or deliveries.

    Deliveries are in their own order; where it is asked for what their events are, in that of those.
    """

    def __init__(
        self,
        reader: aiosqlite.Connection,
        wanted: Selection,
        *,
        deliveries: bool = False,
        own: int | None = None,
        event: int | None = None,
    ) -> None:
        """Take what is wanted, and perhaps the very row or, of deliveries, the event."""
        self._reader = reader
        self._wanted = wanted
        self._deliveries = deliveries
        self._own = own
        self._event = event
        bare = wanted == Selection(destination=wanted.destination, state=wanted.state)
        self._by_event = not deliveries or not (bare or own is not None or event is not None)

    async def page(self, limit: int, before: Place | None) -> Page:
        """Look for at most `limit` rows."""
        place = before or Place(2**63 - 1)
        top, after = (place.key + 1 if place.row else place.key), 0
        if self._wanted.since is not None or self._wanted.until is not None:
            span = await event_times.span(self._reader, self._wanted.since, self._wanted.until)
            if span is None:
                return Page([], None)
            if self._by_event:
                top, after = min(top, span.last + 1), span.first
        types = await types_of(self._reader, self._wanted)
        if types == ():
            return Page([], None)
        sieve = Sieve(self._wanted, types, deliveries=self._deliveries, by_event=self._by_event)
        lead = await choose(self._reader, await self._leads(types), top, after)
        bound, step = Bound(deep=sieve.deep), limit
        found: list[Found] = []
        while True:
            step = bound.step(step)
            ids, floor = await lead.take(self._reader, top, after, step)
            found += await self._sift(sieve, ids, place)
            if len(found) >= limit:
                found = found[:limit]
                return Page(await self._rows(found), str(self._place(found[-1])))
            if floor is None:
                return Page(await self._rows(found), None)
            if bound.reached(len(ids)):
                return Page(await self._rows(found), str(Place(floor)))
            top, step = floor, step * 4

    async def _leads(self, types: tuple[str, ...] | None) -> list[Lead]:
        if self._own is not None:
            return [Lead(ids=(self._own,))]
        if self._event is not None:
            return [Lead(DELIVERIES["event"], [(self._event,)])]
        if self._by_event:
            return await to_events(self._reader, self._wanted, types)
        return await to_deliveries(self._reader, self._wanted)

    async def _sift(self, sieve: Sieve, ids: list[int], before: Place) -> list[Found]:
        """Return those of some candidates that are meant, in the order of the list."""
        if not ids:
            return []
        if sieve.open and not (self._deliveries and self._by_event):
            return [Found(id_, id_) for id_ in ids]
        found = await sieve.sift(self._reader, ids)
        return sorted((each for each in found if self._place(each) < before), key=self._place, reverse=True)

    def _place(self, found: Found) -> Place:
        if self._deliveries and self._by_event:
            return Place(found.event_id, found.row)
        return Place(found.row)

    async def _rows(self, found: list[Found]) -> list[dict[str, Any]]:
        ids = [each.row for each in found]
        if not ids:
            return []
        sql = (DELIVERIES_SQL if self._deliveries else EVENTS_SQL).format(marks=", ".join("?" * len(ids)))
        rows = {row["row"]: row for row in await records(self._reader, sql, ids)}
        return [rows[id_] for id_ in ids if id_ in rows]
