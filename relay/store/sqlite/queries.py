"""The statements of lists, selections and exports over SQLite."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from relay.model import OPERATOR_SOURCE, DeliveryState, DestinationState, Stat, StoredEvent
from relay.store import Span
from relay.store.export import DELIVERY_FIELDS, DeliveryLine, lines_of
from relay.store.queries.reader import MOST_NAMED, Conditions, Path, Row
from relay.store.rows import STATE_COLUMNS, STATS_COLUMNS
from relay.store.sqlite import event_times
from relay.store.sqlite.database import Database
from relay.store.sqlite.rows import load_events, marks

EVENTS_SQL = """
    SELECT e.id AS row, e.public_id AS id, e.source, e.type, substr(e.subject, 1, 256) AS subject,
           e.received_at, e.size,
           r.event_id IS NOT NULL AS duplicate, coalesce(r.requests, 0) AS repetitions,
           (SELECT json_object({counts}) FROM deliveries AS d WHERE d.event_id = e.id) AS deliveries
      FROM events AS e LEFT JOIN repetitions AS r ON r.event_id = e.id WHERE e.id IN ({marks})
""".replace(
    "{counts}", ", ".join(f"'{state}', sum(d.state = '{state}')" for state in get_args(DeliveryState))
)
DELIVERIES_SQL = """
    SELECT d.id AS row, d.public_id AS id, v.public_id AS event_id, v.type, d.destination, d.state,
           d.reason, d.attempts, d.next_attempt_at, d.last_status, d.last_error, d.created_at,
           d.finished_at, (SELECT r.public_id FROM deliveries AS r WHERE r.id = d.replay_of) AS replay_of,
           d.group_key
      FROM deliveries AS d CROSS JOIN events AS v ON v.id = d.event_id WHERE d.id IN ({marks})
"""
LATER_SQL = """
    SELECT d.id, l.public_id, max(l.id)
      FROM deliveries AS d CROSS JOIN deliveries AS l ON l.event_id = d.event_id
     WHERE d.id IN ({marks}) AND +l.destination = d.destination AND l.id > d.id GROUP BY d.id
"""
ATTEMPTS_SQL = """
    SELECT a.id AS row, d.public_id AS delivery_id, v.public_id AS event_id, v.type, d.destination,
           a.started_at, a.duration_ms, a.result, a.status, a.error, a.truncated, a.group_id, a.group_size,
           a.answer
      FROM attempts AS a CROSS JOIN deliveries AS d ON d.id = a.delivery_id
           CROSS JOIN events AS v ON v.id = d.event_id
     WHERE a.id IN ({marks})
"""
"""Rows of each list by row id, under the names that they have in a page."""

ATTEMPTS_OF_DELIVERY_SQL = "SELECT id FROM attempts WHERE delivery_id = ? AND id < ? ORDER BY id DESC LIMIT ?"
ATTEMPTS_BY_TIME_SQL = """
    SELECT started_at, id FROM attempts
     WHERE started_at BETWEEN ? AND ? AND (+started_at, id) < (?, ?)
     ORDER BY started_at DESC, id DESC LIMIT ?
"""
ATTEMPTS_OF_DELIVERIES_SQL = "SELECT started_at, id FROM attempts WHERE delivery_id IN ({marks})"
MATCHING_ATTEMPTS_SQL = """
    SELECT a.id FROM attempts AS a CROSS JOIN deliveries AS d ON d.id = a.delivery_id
     WHERE a.id IN ({marks}) AND {conditions}
"""

# The unary plus keeps the planner from using an index other than the one that leads to a candidate.
OF_EVENT = {
    "source": "+e.source = ?",
    "subject": "+e.subject = ?",
    "since": "+e.received_at >= ?",
    "until": "+e.received_at < ?",
}
OF_DELIVERY = {"destination": "+d.destination = ?", "state": "+d.state = ?"}
OF_ATTEMPT = {
    "destination": "+d.destination = ?",
    "result": "+a.result = ?",
    "status": "coalesce(a.status, 0) = ?",
    "failed": "(a.result <> 'ok') = ?",
    "since": "+a.started_at >= ?",
    "until": "+a.started_at < ?",
}
"""Conditions of filters."""

EVENTS = """
    SELECT e.id, e.id, e.type, e.size, e.received_at, NULL
      FROM events AS e WHERE e.id IN ({marks}) {conditions}
"""
DELIVERIES = """
    SELECT d.event_id, d.id, '', 0, 0, d.destination
      FROM deliveries AS d WHERE d.id IN ({marks}) {conditions}
"""
DELIVERIES_WITH_EVENTS = """
    SELECT d.event_id, d.id, e.type, e.size, e.received_at, d.destination
      FROM deliveries AS d CROSS JOIN events AS e ON e.id = d.event_id
     WHERE d.id IN ({marks}) {conditions}
"""
DELIVERIES_OF_EVENTS = """
    SELECT d.event_id, d.id, e.type, e.size, e.received_at, d.destination
      FROM events AS e CROSS JOIN deliveries AS d ON d.event_id = e.id
     WHERE e.id IN ({marks}) {conditions}
"""
LATEST = """
    NOT EXISTS (SELECT 1 FROM deliveries AS later
                 WHERE later.event_id = d.event_id AND +later.destination = d.destination AND later.id > d.id)
"""
"""Only the latest of an event's deliveries to one destination counts: a repetition replaces older ones."""

HAS_DELIVERY = "EXISTS (SELECT 1 FROM deliveries AS d WHERE d.event_id = e.id {conditions})"

TYPES_SQL = """
    WITH RECURSIVE found (type) AS (
         SELECT min(type) FROM events WHERE type >= :first AND type < :end
         UNION ALL
         SELECT (SELECT min(type) FROM events WHERE type > found.type AND type < :end)
           FROM found WHERE found.type IS NOT NULL LIMIT :most)
    SELECT type FROM found WHERE type IS NOT NULL
"""
DESTINATIONS_SQL = "SELECT destination FROM ledger"
EVENT_IDS_SQL = "SELECT event_id FROM deliveries WHERE id IN ({marks})"

SHORT = {
    "first": "SELECT id FROM deliveries WHERE destination = ? AND state = 'pending' AND attempts = 0 LIMIT ?",
    "retry": "SELECT id FROM deliveries WHERE destination = ? AND state = 'pending' AND attempts > 0 LIMIT ?",
    "destination": "SELECT id FROM deliveries WHERE destination = ? AND id > 0 LIMIT ?",
}
"""Statements that return row ids of deliveries in an order other than the list's."""

_GROUPS = (
    "attempts = 0 AND next_attempt_at IS NULL AND id > :id ORDER BY id",
    "attempts = 0 AND (next_attempt_at, id) > (:due, :id) ORDER BY next_attempt_at, id",
    "attempts > 0 AND (next_attempt_at, id) > (:due, :id) ORDER BY next_attempt_at, id",
)
PENDING_SQL = tuple(
    f"""
    SELECT id, next_attempt_at FROM deliveries
     WHERE destination = :destination AND state = 'pending' AND id <= :last AND {group} LIMIT :page
    """  # noqa: S608 - constants
    for group in _GROUPS
)
STATS_SQL = f"""
    SELECT {STATS_COLUMNS} FROM stats
     WHERE hour >= :since AND (hour, source, type) < (:hour, :source, :type)
     ORDER BY hour DESC, source DESC, type DESC LIMIT :page
"""  # noqa: S608 - constants
NAMED_SQL = {
    "events": f"""
        SELECT public_id, id, size, received_at FROM events
         WHERE public_id BETWEEN ? AND ? ORDER BY public_id LIMIT {MOST_NAMED}
    """,  # noqa: S608 - constants
    "deliveries": f"""
        SELECT d.public_id, d.id, d.state, d.event_id, e.size, e.received_at, d.destination
          FROM deliveries AS d JOIN events AS e ON e.id = d.event_id
         WHERE d.public_id BETWEEN ? AND ? ORDER BY d.public_id LIMIT {MOST_NAMED}
    """,  # noqa: S608 - constants
}
NEIGHBOURS_SQL = {
    kind: f"""
        SELECT given.value, (SELECT max(public_id) FROM {kind} WHERE public_id < given.value),
               (SELECT min(public_id) FROM {kind} WHERE public_id > given.value)
          FROM json_each(?) AS given
    """  # noqa: S608 - constants
    for kind in ("events", "deliveries")
}
EXPORTED_SQL = f"SELECT {DELIVERY_FIELDS} FROM deliveries WHERE event_id IN ({{marks}}) ORDER BY event_id, id"  # noqa: S608 - constants
STATES_SQL = f"SELECT {STATE_COLUMNS} FROM destinations"  # noqa: S608 - a constant
_PREFIXES = {"events": "evt_", "deliveries": "dlv_"}


class IndexPath(msgspec.Struct, frozen=True):
    """Row ids along one index."""

    table: str
    condition: str = ""  # the columns of the index before the row id, one `?` for each value
    key: str = "id"  # column with the row id

    def sql(self, *, newest_first: bool = True) -> str:
        """Return a statement; its `?` are the condition's values, the end, the start and a limit."""
        condition = f"{self.condition} AND " if self.condition else ""
        order = " DESC" if newest_first else ""
        return (
            f"SELECT {self.key} FROM {self.table} WHERE {condition}{self.key} < ? AND {self.key} >= ?"  # noqa: S608 - constants
            f" ORDER BY {self.key}{order} LIMIT ?"
        )


_LOST = "state IN ('dead', 'expired', 'cancelled') AND state = ?"  # the partial indexes demand both parts

EVENT_PATHS = {
    "all": IndexPath("events"),
    "source": IndexPath("events", "source = ?"),
    "type": IndexPath("events", "type = ?"),
    "subject": IndexPath("events", "subject = ?"),
    "state": IndexPath("deliveries", _LOST, "event_id"),
    "destination and state": IndexPath("deliveries", f"destination = ? AND {_LOST}", "event_id"),
}
DELIVERY_PATHS = {
    "all": IndexPath("deliveries"),
    "event_id": IndexPath("deliveries", "event_id = ?"),
    "destination": IndexPath("deliveries", "destination = ? AND id > 0"),  # the index has this condition, too
    "destination and state": IndexPath("deliveries", f"destination = ? AND {_LOST}"),
}
"""Paths to row ids by filters, whose values they take. Each has its index."""


class WorkerList(msgspec.Struct, frozen=True):
    """A list about workers: one statement, sorted by a time."""

    sql: str
    time: str  # column
    conditions: Mapping[str, str]


WORKER_LISTS: Mapping[str, WorkerList] = {
    "worker_metrics": WorkerList(
        """
        SELECT m.at AS row, m.source, m.worker_id, m.at, m.status, m.cpu, m.memory, m.uptime,
               m.message_count, m.sessions
          FROM worker_metrics AS m
        """,
        "m.at",
        {"source": "m.source = ?", "worker_id": "m.worker_id = ?"},
    ),
    "worker_commands": WorkerList(
        """
        SELECT c.created_at AS row, c.public_id AS id, c.source, c.worker_id, c.state, c.created_at,
               c.sent_at, c.expires_at, c.body
          FROM worker_commands AS c
        """,
        "c.created_at",
        {
            "id": "c.public_id = ?",
            "source": "c.source = ?",
            "worker_id": "c.worker_id = ?",
            "state": "c.state = ?",
        },
    ),
}


class SqliteReader:
    """`relay.store.queries.reader.Reader` over SQLite."""

    has_queue = False

    def __init__(self, database: Database) -> None:
        self._database = database

    async def _fetch(self, sql: str, values: Any = ()) -> list[tuple[Any, ...]]:
        return list(map(tuple, await self._database.reader.execute_fetchall(sql, values)))

    async def _named(self, sql: str, values: Any) -> list[dict[str, Any]]:
        """Run a statement and return its rows by the names of their columns."""
        async with self._database.reader.execute(sql, values) as cursor:
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]

    async def candidates(
        self,
        path: Path,
        terms: Sequence[tuple[Any, ...]],
        end: int,
        start: int,
        count: int,
        *,
        newest_first: bool = True,
    ) -> list[list[int]]:
        """See `Reader.candidates`."""
        sql = _path(path).sql(newest_first=newest_first)
        return await self._of_terms(sql, terms, (end, start, count))

    async def candidate(
        self, path: Path, terms: Sequence[tuple[Any, ...]], end: int, start: int, number: int
    ) -> list[int]:
        """See `Reader.candidate`."""
        rows = await self._of_terms(f"{_path(path).sql()} OFFSET ?", terms, (end, start, 1, number - 1))
        return [ids[0] for ids in rows if ids]

    async def _of_terms(
        self, sql: str, terms: Sequence[tuple[Any, ...]], values: tuple[int, ...]
    ) -> list[list[int]]:
        if len(terms) == 1:
            return [[id_ for (id_,) in await self._fetch(sql, (*terms[0], *values))]]
        parts = [f"SELECT {number}, * FROM ({sql})" for number in range(len(terms))]  # noqa: S608 - constants
        bound = [value for term in terms for value in (*term, *values)]
        rows: list[list[int]] = [[] for _ in terms]
        for number, id_ in await self._fetch(" UNION ALL ".join(parts), bound):
            rows[number].append(id_)
        return rows

    async def types_between(self, first: str, end: str, most: int) -> list[str]:
        """See `Reader.types_between`."""
        # The recursion ends with an empty row, which counts as well.
        values = {"first": first, "end": end, "most": most + 2}
        return [type_ for (type_,) in await self._fetch(TYPES_SQL, values)][: most + 1]

    async def destinations(self) -> list[str]:
        """See `Reader.destinations`."""
        return [name for (name,) in await self._fetch(DESTINATIONS_SQL)]

    async def pending_of(self, destination: str, most: int) -> list[int]:
        """See `Reader.pending_of`."""
        found = await self._fetch(SHORT["first"], (destination, most))
        found += await self._fetch(SHORT["retry"], (destination, most - len(found)))
        return [id_ for (id_,) in found]

    async def deliveries_of(self, destination: str, most: int) -> list[int]:
        """See `Reader.deliveries_of`."""
        return [id_ for (id_,) in await self._fetch(SHORT["destination"], (destination, most))]

    async def events_of(self, delivery_ids: Sequence[int]) -> set[int]:
        """See `Reader.events_of`."""
        rows = await self._fetch(EVENT_IDS_SQL.format(marks=marks(delivery_ids)), delivery_ids)
        return {id_ for (id_,) in rows}

    async def span(self, since: int | None, until: int | None) -> Span | None:
        """See `Reader.span`."""
        return await event_times.span(self._database.reader, since, until)

    async def newest(self, kind: Literal["events", "deliveries"]) -> int:
        """See `Reader.newest`."""
        [(newest,)] = await self._fetch(f"SELECT max(id) FROM {kind}")  # noqa: S608 - a constant
        return newest or 0

    async def row_of(self, kind: str, public_id: str) -> int:
        """See `Reader.row_of`."""
        rows = await self._fetch(f"SELECT id FROM {kind} WHERE public_id = ?", (public_id,))  # noqa: S608 - a constant
        return next((id_ for (id_,) in rows), 0)

    async def matches(self, conditions: Conditions, ids: Sequence[int]) -> Iterable[Row]:
        """See `Reader.matches`."""
        sql, values = _matches_sql(conditions)
        rows: Iterable[Any] = await self._database.reader.execute_fetchall(
            sql.replace("{marks}", marks(ids)), [*ids, *values]
        )
        return rows

    async def rows(self, kind: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """See `Reader.rows`."""
        sql = {"events": EVENTS_SQL, "deliveries": DELIVERIES_SQL, "attempts": ATTEMPTS_SQL}[kind]
        return await self._named(sql.format(marks=marks(ids)), ids)

    async def later(self, ids: Sequence[int]) -> dict[int, str]:
        """See `Reader.later`."""
        rows = await self._fetch(LATER_SQL.format(marks=marks(ids)), ids)
        return {id_: public_id for id_, public_id, _ in rows}

    async def attempts_of(self, delivery: int, before: int, count: int) -> list[int]:
        """See `Reader.attempts_of`."""
        return [id_ for (id_,) in await self._fetch(ATTEMPTS_OF_DELIVERY_SQL, (delivery, before, count))]

    async def attempts_between(
        self, since: int, until: int, before: tuple[int, int], count: int
    ) -> list[tuple[int, int]]:
        """See `Reader.attempts_between`."""
        rows = await self._fetch(ATTEMPTS_BY_TIME_SQL, (since, until, *before, count))
        return [(started_at, id_) for started_at, id_ in rows]

    async def attempts_of_all(self, delivery_ids: Sequence[int]) -> list[tuple[int, int]]:
        """See `Reader.attempts_of_all`."""
        sql = ATTEMPTS_OF_DELIVERIES_SQL.format(marks=marks(delivery_ids))
        return [(started_at, id_) for started_at, id_ in await self._fetch(sql, delivery_ids)]

    async def matching_attempts(self, filters: Mapping[str, Any], ids: Sequence[int]) -> set[int]:
        """See `Reader.matching_attempts`."""
        conditions = " AND ".join(OF_ATTEMPT[name] for name in filters)
        sql = MATCHING_ATTEMPTS_SQL.format(marks=marks(ids), conditions=conditions)
        return {id_ for (id_,) in await self._fetch(sql, (*ids, *filters.values()))}

    async def worker_rows(
        self, kind: str, filters: Mapping[str, Any], before: int | None, count: int
    ) -> list[dict[str, Any]]:
        """See `Reader.worker_rows`."""
        known = WORKER_LISTS[kind]
        conditions = [known.conditions[name] for name in filters]
        values = list(filters.values())
        if before is not None:
            conditions.append(f"{known.time} < ?")
            values.append(before)
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        return await self._named(f"{known.sql} {where} ORDER BY {known.time} DESC LIMIT ?", (*values, count))

    async def pending_page(
        self, destination: str, group: int, last: int, after: tuple[int | None, int], count: int
    ) -> list[tuple[int, int | None]]:
        """See `Reader.pending_page`."""
        due, id_ = after
        values = {"destination": destination, "last": last, "due": due, "id": id_, "page": count}
        return [
            (row, next_attempt_at) for row, next_attempt_at in await self._fetch(PENDING_SQL[group], values)
        ]

    async def named(self, kind: Literal["events", "deliveries"], short: str) -> list[tuple[Any, ...]]:
        """See `Reader.named`."""
        start = _PREFIXES[kind] + short
        return await self._fetch(NAMED_SQL[kind], (start, start + "~"))

    async def neighbours(
        self, kind: Literal["events", "deliveries"], ids: Sequence[str]
    ) -> list[tuple[str, str | None, str | None]]:
        """See `Reader.neighbours`."""
        found = await self._fetch(NEIGHBOURS_SQL[kind], (json.dumps(ids),))
        return [(given, before, after) for given, before, after in found]

    async def stats(self, since: int, before: tuple[int, str, str], count: int) -> list[Stat]:
        """See `Reader.stats`."""
        hour, source, type_ = before
        values = {"since": since, "hour": hour, "source": source, "type": type_, "page": count}
        return [Stat(*row) for row in await self._fetch(STATS_SQL, values)]

    async def load_events(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Reader.load_events`."""
        return await load_events(self._database.reader, event_ids)

    async def delivery_lines(self, event_ids: Sequence[int]) -> dict[int, list[DeliveryLine]]:
        """See `Reader.delivery_lines`."""
        return lines_of(await self._fetch(EXPORTED_SQL.format(marks=marks(event_ids)), event_ids))

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `Reader.destination_states`."""
        rows = await self._fetch(STATES_SQL)
        found = [dict(zip(DestinationState.__struct_fields__, row, strict=True)) for row in rows]
        return {each["name"]: msgspec.convert(each, DestinationState, strict=False) for each in found}

    async def paused_sources(self) -> frozenset[str]:
        """See `Reader.paused_sources`."""
        return frozenset(name for (name,) in await self._fetch("SELECT name FROM sources WHERE paused"))


def _path(path: Path) -> IndexPath:
    return (EVENT_PATHS if path.kind == "events" else DELIVERY_PATHS)[path.name]


def _matches_sql(wanted: Conditions) -> tuple[str, list[Any]]:
    """Return the statement of conditions, with `{marks}` for the candidates, and the values after these."""
    of_event, values = _set(wanted, OF_EVENT)
    if wanted.types is not None:
        of_event.append(f"+e.type IN ({marks(wanted.types)})")
        values += wanted.types
    if not wanted.operator_events:
        of_event.append(f"+e.source <> '{OPERATOR_SOURCE}'")
    of_delivery, more = _set(wanted, OF_DELIVERY)
    if not wanted.deliveries:
        sql = EVENTS
        if of_delivery:
            of_event.append(HAS_DELIVERY.replace("{conditions}", _and([*of_delivery, LATEST])))
        of_delivery = []
    elif wanted.by_event:
        sql = DELIVERIES_OF_EVENTS
    else:
        sql = DELIVERIES_WITH_EVENTS if wanted.reads_events else DELIVERIES
    conditions = _and([*of_event, *of_delivery, *([LATEST] if wanted.latest else [])])
    return sql.replace("{conditions}", conditions), [*values, *more]


def _set(wanted: Conditions, known: Mapping[str, str]) -> tuple[list[str], list[Any]]:
    """Return the conditions of the filters that are set, and their values."""
    found = {name: getattr(wanted.selection, name) for name in known}
    given = {name: value for name, value in found.items() if value is not None}
    return [known[name] for name in given], list(given.values())


def _and(conditions: Iterable[str]) -> str:
    return "".join(f" AND {text}" for text in conditions)
