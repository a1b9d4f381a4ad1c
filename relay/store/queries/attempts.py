"""The list of attempts: those of one delivery, or all by the time at which they began, the latest first."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import aiosqlite

from relay.model import Selection
from relay.store.queries.budget import Bound
from relay.store.queries.page import Page, Place
from relay.store.queries.plan import chunks, few
from relay.store.queries.small import records

FILTERS = ("delivery_id", "destination", "result", "since", "until")

ATTEMPTS_SQL = """
    SELECT a.id AS row, d.public_id AS delivery_id, a.started_at, a.duration_ms, a.result, a.status, a.error,
           a.truncated, a.answer
      FROM attempts AS a CROSS JOIN deliveries AS d ON d.id = a.delivery_id WHERE a.id IN ({marks})
"""
OF_DELIVERY_SQL = "SELECT id, id FROM attempts WHERE delivery_id = ? AND id < ? ORDER BY id DESC LIMIT ?"
OF_TIME_SQL = """
    SELECT started_at, id FROM attempts
     WHERE started_at BETWEEN ? AND ? AND (+started_at, id) < (?, ?)
     ORDER BY started_at DESC, id DESC LIMIT ?
"""
OF_DELIVERIES_SQL = "SELECT started_at, id FROM attempts WHERE delivery_id IN ({marks})"
MEANT_SQL = """
    SELECT a.id FROM attempts AS a CROSS JOIN deliveries AS d ON d.id = a.delivery_id
     WHERE a.id IN ({marks}) AND {conditions}
"""
_CONDITIONS = {
    "destination": "+d.destination = ?",
    "result": "+a.result = ?",
    "since": "+a.started_at >= ?",
    "until": "+a.started_at < ?",
}


async def tries(
    reader: aiosqlite.Connection, *, limit: int, before: Place | None, filters: Mapping[str, Any]
) -> Page:
    """Return a page; `delivery_id` is a row id."""
    place = before or Place(2**63 - 1)
    way = await _way(reader, filters)
    sieve = {name: filters[name] for name in _CONDITIONS if name in filters and name not in way.keeps}
    bound, step, found = Bound(), limit, []
    while True:
        step = bound.step(step)
        rows = await way.take(place, step)
        meant = await _meant(reader, [row[1] for row in rows], sieve)
        found += [row for row in rows if row[1] in meant]
        if len(found) >= limit:
            found = found[:limit]
            return Page(await _rows(reader, found), str(Place(*found[-1])))
        if len(rows) < step:
            return Page(await _rows(reader, found), None)
        place = Place(*rows[-1])
        if bound.reached(len(rows)):
            return Page(await _rows(reader, found), str(place))
        step *= 4


class _Way:
    """Where candidates come from, the latest first: key and row id."""

    def __init__(
        self,
        take: Callable[[Place, int], Awaitable[Iterable[Any]]],
        keeps: Sequence[str] = (),
    ) -> None:
        self._take = take
        self.keeps = keeps  # filters that it takes care of

    async def take(self, place: Place, count: int) -> list[tuple[int, int]]:
        return [(row[0], row[1]) for row in await self._take(place, count)]


async def _way(reader: aiosqlite.Connection, filters: Mapping[str, Any]) -> _Way:
    """Return those of a delivery, of the few of a destination, or all of a time."""
    if (delivery := filters.get("delivery_id")) is not None:
        return _Way(
            lambda place, count: reader.execute_fetchall(OF_DELIVERY_SQL, (delivery, place.key, count))
        )
    listed = None
    if "destination" in filters:
        listed = await few(reader, Selection(destination=filters["destination"]))
    if listed is not None:
        ordered: list[tuple[int, int]] = []
        for some in chunks(listed):
            sql = OF_DELIVERIES_SQL.format(marks=", ".join("?" * len(some)))
            ordered += [(row[0], row[1]) for row in await reader.execute_fetchall(sql, some)]
        ordered.sort(reverse=True)

        async def take(place: Place, count: int) -> list[tuple[int, int]]:
            return [row for row in ordered if row < (place.key, place.row)][:count]

        return _Way(take, ["destination"])
    since, until = filters.get("since", 0), filters.get("until", 2**63 - 1)
    return _Way(
        lambda place, count: reader.execute_fetchall(
            OF_TIME_SQL, (since, min(place.key, until - 1), place.key, place.row, count)
        ),
        ["since", "until"],
    )


async def _meant(reader: aiosqlite.Connection, ids: list[int], sieve: Mapping[str, Any]) -> set[int]:
    if not sieve or not ids:
        return set(ids)
    conditions = " AND ".join(_CONDITIONS[name] for name in sieve)
    sql = MEANT_SQL.format(marks=", ".join("?" * len(ids)), conditions=conditions)
    return {row[0] for row in await reader.execute_fetchall(sql, (*ids, *sieve.values()))}


async def _rows(reader: aiosqlite.Connection, found: list[Any]) -> list[dict[str, Any]]:
    ids = [row[1] for row in found]
    if not ids:
        return []
    rows = await records(reader, ATTEMPTS_SQL.format(marks=", ".join("?" * len(ids))), ids)
    known = {row["row"]: row for row in rows}
    return [known[id_] for id_ in ids if id_ in known]
