"""The statements of lists, selections and exports over PostgreSQL.

Tables are partitioned by row ids, which carry the time. A path compares the columns of its index and the row
id as one row, and sorts by all of them. So only that index serves a statement, regardless of the planner's
estimates about the data, and partitions outside of the range of row ids are not read.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from relay.model import OPERATOR_SOURCE, DeliveryState, DestinationState, Selection, Stat, StoredEvent
from relay.store import Span
from relay.store.export import DELIVERY_FIELDS, DeliveryLine, lines_of
from relay.store.postgres.connection import Database
from relay.store.postgres.rows import EPOCH, first_id, stored_event, uuid_of
from relay.store.queries import PagedQueries
from relay.store.queries.reader import MOST_NAMED, Conditions, Path, Row
from relay.store.rows import EVENT_COLUMNS

EARLY = f"received_at > (id >> 22) * 1000 + 1000 + {EPOCH}"
LATE = f"received_at < (id >> 22) * 1000 + {EPOCH} - 60000000"
"""Events whose time of receipt is after that of their row id, or more than a minute before it: imports, and
events from before and after a change of the clock. Both conditions have partial indexes."""

STATES: tuple[str, ...] = get_args(DeliveryState)
SLACK = 60_000_000  # microseconds, as in `LATE`
_DAY = 86_400_000_000  # microseconds
_TIME = len("0190aaaa-bbbb")  # the millisecond of a UUIDv7
MOST_ODD = 2000
"""`EARLY` or `LATE` events whose row ids are compared; with more of them, all row ids are searched."""

DAY = 86_400_000 << 22
"""Difference of two row ids that are a day apart."""


def by_ids(table: str, alias: str, columns: str = "*") -> str:
    """Return a FROM item: the rows of a partitioned table with the ids `$1`, which lie from `$2` to `$3`.

    Each id is looked up in its own partition. `id = ANY($1)` would look for each id in every partition.
    """
    return f"""unnest($1::bigint[]) AS chosen (number)
     CROSS JOIN LATERAL (
           SELECT {columns} FROM {table}
            WHERE id = chosen.number AND id BETWEEN $2 AND $3 OFFSET 0) AS {alias}"""  # noqa: S608 - constants


OF_EVENTS_SQL = f"""
    WITH late AS MATERIALIZED (
        SELECT event_id, id, destination FROM deliveries
         WHERE id - event_id > {DAY} AND event_id BETWEEN $2 AND $3 AND event_id = ANY($1::bigint[])
           AND (SELECT EXISTS (
                SELECT FROM deliveries WHERE id - event_id > {DAY} AND event_id BETWEEN $2 AND $3)))
    SELECT e.id, found.ids, found.names, found.states
      FROM unnest($1::bigint[]) AS e (id)
     CROSS JOIN LATERAL (
           SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS names,
                  array_agg((SELECT x.state FROM ends AS x WHERE x.delivery_id = d.id)) AS states
             FROM (SELECT id, destination FROM deliveries
                    WHERE event_id = e.id AND id >= e.id - {DAY} AND id <= e.id + {DAY}
                    UNION ALL
                   SELECT id, destination FROM late WHERE event_id = e.id) AS d) AS found
     WHERE found.ids IS NOT NULL
"""  # noqa: S608 - constants
"""The deliveries of events. Nearly all are in the partition of their event, or in one beside it.

Replays may be much younger; they have a partial index, which is usually empty. The aggregate keeps the
planner from joining whole partitions, whatever it believes about their size.
"""

EVENTS_SQL = f"""
    SELECT e.id AS row, 'evt_' || e.public_id AS id, e.source, e.type, left(e.subject, 256) AS subject,
           e.received_at, e.size,
           r.requests IS NOT NULL AS duplicate, coalesce(r.requests, 0) AS repetitions
      FROM {by_ids("events", "e", "id, public_id, source, type, subject, received_at, size")}
      LEFT JOIN LATERAL (SELECT requests FROM repetitions WHERE event_id = e.id OFFSET 0) AS r ON true
"""  # noqa: S608 - constants
DELIVERIES_SQL = f"""
    SELECT d.id AS row, 'dlv_' || d.public_id AS id, d.event_id AS event, d.destination,
           coalesce(x.state, 'pending') AS state, x.reason, coalesce(x.attempts, o.attempts, 0) AS attempts,
           o.next_attempt_at, coalesce(x.last_status, o.last_status) AS last_status,
           coalesce(x.last_error, o.last_error) AS last_error, d.created_at, x.finished_at,
           d.replay_of AS replayed,
           CASE WHEN x.state IS NULL THEN o.group_key ELSE d.group_key END AS group_key
      FROM {by_ids("deliveries", "d")}
      LEFT JOIN LATERAL (
           SELECT * FROM ends
            WHERE delivery_id = d.id AND delivery_id BETWEEN $2 AND $3 OFFSET 0) AS x ON true
      LEFT JOIN LATERAL (SELECT * FROM owed WHERE id = d.id OFFSET 0) AS o ON true
"""  # noqa: S608 - constants
ATTEMPTS_SQL = f"""
    SELECT a.id AS row, a.delivery_id AS delivery, a.started_at, a.duration_ms, a.result, a.status, a.error,
           a.truncated, a.group_id, a.group_size, a.answer
      FROM {by_ids("attempts", "a")}
"""  # noqa: S608 - constants
"""Rows of each list by row id."""

LOAD_SQL = f"SELECT {EVENT_COLUMNS} FROM {by_ids('events', 'e')}"  # noqa: S608 - constants
"""Events with their bodies."""

IDS_SQL = {
    "events": f"""
        SELECT e.id, 'evt_' || e.public_id AS public_id, e.type
          FROM {by_ids("events", "e", "id, public_id, type")}
    """,  # noqa: S608 - constants
    "deliveries": f"""
        SELECT d.id, 'dlv_' || d.public_id AS public_id, d.event_id, d.destination
          FROM {by_ids("deliveries", "d", "id, public_id, event_id, destination")}
    """,  # noqa: S608 - constants
}
ATTEMPTS_OF_DELIVERY_SQL = """
    SELECT id FROM attempts
     WHERE (delivery_id, id) < ($1::bigint, $2::bigint) AND (delivery_id, id) >= ($1::bigint, 0)
     ORDER BY delivery_id DESC, id DESC LIMIT $3
"""
NEAR_ATTEMPTS_SQL = f"""
    SELECT a.started_at, a.id FROM unnest($1::bigint[]) AS d (id)
     CROSS JOIN LATERAL (
           SELECT started_at, id FROM attempts
            WHERE delivery_id = d.id AND id >= d.id - {DAY} AND id <= d.id + {2 * DAY} OFFSET 0) AS a
"""  # noqa: S608 - constants
FAR_DELIVERIES_SQL = f"""
    SELECT x.delivery_id FROM unnest($1::bigint[]) AS chosen (number)
     CROSS JOIN LATERAL (
           SELECT delivery_id, finished_at FROM ends
            WHERE delivery_id = chosen.number AND delivery_id BETWEEN $2 AND $3 OFFSET 0) AS x
     WHERE abs(x.finished_at - (x.delivery_id >> 22) * 1000 - {EPOCH}) > 43200000000
"""  # noqa: S608 - constants
PENDING_OF_SQL = """
    SELECT DISTINCT event_id FROM owed
     WHERE event_id = ANY($1::bigint[]) AND ($2::text[] IS NULL OR destination = ANY($2::text[]))
"""
PENDING_AMONG_SQL = "SELECT id FROM owed WHERE id = ANY($1::bigint[]) AND id BETWEEN $2 AND $3"
"""The attempts of most deliveries are in the partition of the delivery, or in one beside it. Those of a
pending delivery, and of one that ended more than half a day after the time in its row id, may be in any."""

ATTEMPTS_BY_TIME_SQL = """
    SELECT started_at, id FROM attempts
     WHERE started_at >= $1 AND (started_at, id) < ($2::bigint, $3::bigint)
     ORDER BY started_at DESC, id DESC LIMIT $4
"""
TYPES_SQL = """
    WITH RECURSIVE found (type, number) AS (
        (SELECT type, 1 FROM events WHERE type >= $1 AND type < $2 ORDER BY type LIMIT 1)
         UNION ALL
         SELECT (SELECT e.type FROM events AS e WHERE e.type > found.type AND e.type < $2
                  ORDER BY e.type LIMIT 1), number + 1
           FROM found WHERE found.type IS NOT NULL AND number < $3::int)
    SELECT type FROM found WHERE type IS NOT NULL
"""
_GROUPS = (
    ("attempts = 0 AND next_attempt_at IS NULL AND id > $4 AND $3::bigint IS NOT DISTINCT FROM $3", "id"),
    ("attempts = 0 AND (next_attempt_at, id) > ($3::bigint, $4::bigint)", "next_attempt_at, id"),
    ("attempts > 0 AND (next_attempt_at, id) > ($3::bigint, $4::bigint)", "next_attempt_at, id"),
)
PENDING_SQL = tuple(
    f"""
    SELECT id, next_attempt_at FROM owed
     WHERE destination = $1 AND id <= $2 AND {group} ORDER BY {order} LIMIT $5
    """  # noqa: S608 - constants
    for group, order in _GROUPS
)
STATS_SQL = """
    SELECT hour, source, type, sum(events)::bigint, sum(duplicates)::bigint, sum(bytes)::bigint FROM stats
     WHERE hour >= $1 AND hour <= $2 AND (hour, source, type) < ($2, $3, $4)
     GROUP BY hour, source, type ORDER BY hour DESC, source DESC, type DESC LIMIT $5
"""
NAMED_SQL = {
    "events": f"""
        SELECT 'evt_' || public_id, id, size, received_at
          FROM events WHERE public_id BETWEEN $1::uuid AND $2::uuid ORDER BY public_id LIMIT {MOST_NAMED}
    """,  # noqa: S608 - constants
    "deliveries": f"""
        SELECT 'dlv_' || d.public_id, d.id,
               coalesce((SELECT x.state FROM ends AS x WHERE x.delivery_id = d.id), 'pending'), d.event_id,
               e.size, e.received_at, d.destination
          FROM (SELECT * FROM deliveries WHERE public_id BETWEEN $1::uuid AND $2::uuid
                 ORDER BY public_id LIMIT {MOST_NAMED}) AS d
          JOIN events AS e ON e.id = d.event_id ORDER BY d.public_id
    """,  # noqa: S608 - constants
}
NEIGHBOURS_SQL = {
    kind: f"""
        SELECT '{prefix}' || given.id,
               '{prefix}' || (SELECT public_id FROM {kind}
                 WHERE public_id BETWEEN given.first AND given.last AND public_id < given.id
                   AND id BETWEEN $4 AND $5 ORDER BY public_id DESC LIMIT 1),
               '{prefix}' || (SELECT public_id FROM {kind}
                 WHERE public_id BETWEEN given.first AND given.last AND public_id > given.id
                   AND id BETWEEN $4 AND $5 ORDER BY public_id LIMIT 1)
          FROM unnest($1::uuid[], $2::uuid[], $3::uuid[]) AS given (id, first, last)
    """  # noqa: S608 - constants
    for kind, prefix in (("events", "evt_"), ("deliveries", "dlv_"))
}
_SHORTEST, _LONGEST = "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"
EXPORTED_SQL = f"""
    SELECT event AS event_id, id AS public_id, {DELIVERY_FIELDS.partition("public_id, ")[2]}
      FROM ({DELIVERIES_SQL}) AS exported
     ORDER BY event, row
"""  # noqa: S608 - constants


class IndexPath(msgspec.Struct, frozen=True):
    """Row ids along one index."""

    table: str
    columns: tuple[str, ...] = ()  # of the index, before the row id
    key: str = "id"  # column with the row id
    only: str = ""  # condition of a partial index
    is_partition_key: bool = True
    type: str = "text"  # of the columns

    def sql(self, *, newest_first: bool = True, offset: bool = False) -> str:
        """Return a statement. Its values are an array for each column, the end, the start and a limit.

        Its rows are the number of a term, from 1, and a row id.
        """
        width = len(self.columns)
        end, start, limit = (f"${width + number}" for number in (1, 2, 3))
        order = "DESC" if newest_first else "ASC"
        names = (*self.columns, self.key)
        bounds = []
        if self.columns:
            values = ", ".join(f"term.v{number}" for number in range(width))
            bounds = [f"({', '.join(names)}) {sign} ({values}, {at}::bigint)"
                      for sign, at in (("<", end), (">=", start))]  # fmt: skip
        if self.is_partition_key:
            bounds += [f"{self.key} < {end}::bigint", f"{self.key} >= {start}::bigint"]
        if self.only:
            bounds.append(self.only)
        ordered = ", ".join(f"{name} {order}" for name in names)
        skipped = f" OFFSET ${width + 4}" if offset else ""
        found = (
            f"SELECT {self.key} AS found FROM {self.table} WHERE {' AND '.join(bounds)}"  # noqa: S608 - constants
            f" ORDER BY {ordered} LIMIT {limit}{skipped}"
        )
        if not self.columns:
            return f"SELECT 1, found FROM ({found}) AS rows"  # noqa: S608 - constants
        arrays = ", ".join(f"${number + 1}::{self.type}[]" for number in range(width))
        given = ", ".join(f"v{number}" for number in range(width))
        return (
            f"SELECT term.number, rows.found FROM unnest({arrays}) WITH ORDINALITY AS term ({given}, number)"  # noqa: S608 - constants
            f" CROSS JOIN LATERAL ({found}) AS rows"
        )


_LOST = "state <> 'delivered'"
EVENT_PATHS = {
    "all": IndexPath("events"),
    "source": IndexPath("events", ("source",)),
    "type": IndexPath("events", ("type",)),
    "subject": IndexPath("events", ("subject",), only="subject IS NOT NULL"),
    "state": IndexPath("ends", ("state",), "event_id", _LOST, is_partition_key=False),
    "destination and state": IndexPath(
        "ends", ("destination", "state"), "event_id", _LOST, is_partition_key=False
    ),
    "pending": IndexPath("owed", key="event_id"),
}
DELIVERY_PATHS = {
    "all": IndexPath("deliveries"),
    "event_id": IndexPath("deliveries", ("event_id",), type="bigint"),
    "destination": IndexPath("deliveries", ("destination",)),
    "destination and state": IndexPath("ends", ("destination", "state"), "delivery_id", _LOST),
    "pending": IndexPath("owed"),
}
"""Paths to row ids by filters, whose values they take. Each has its index."""

OF_EVENT = {"source": "e.source = {}", "subject": "e.subject = {}",
            "since": "e.received_at >= {}", "until": "e.received_at < {}"}  # fmt: skip
OF_ATTEMPT = {"result": "a.result = {}",
              "status": "coalesce(a.status, 0) = {}",
              "failed": "(a.result <> 'ok') = {}::boolean",
              "since": "a.started_at >= {}", "until": "a.started_at < {}"}  # fmt: skip
"""Conditions of filters."""

WORKER_LISTS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "worker_metrics": (
        """
        SELECT m.at AS row, m.source, m.worker_id, m.at, m.status, m.cpu, m.memory, m.uptime,
               m.message_count, m.sessions
          FROM worker_metrics AS m
        """,
        "m.at",
        {"source": "m.source", "worker_id": "m.worker_id"},
    ),
    "worker_commands": (
        """
        SELECT c.created_at AS row, c.public_id AS id, c.source, c.worker_id, c.state, c.created_at,
               c.sent_at, c.expires_at, c.body
          FROM worker_commands AS c
        """,
        "c.created_at",
        {"id": "c.public_id", "source": "c.source", "worker_id": "c.worker_id", "state": "c.state"},
    ),
}
"""Lists about workers: a statement, the time that sorts it, and the columns of filters."""


class PostgresReader:
    """`relay.store.queries.reader.Reader` over PostgreSQL."""

    has_queue = True

    def __init__(self, database: Database) -> None:
        self._database = database

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
        known = _path(path)
        sql = known.sql(newest_first=newest_first)
        found: list[list[int]] = [[] for _ in terms]
        for number, id_ in await self._database.fetch(sql, *_arrays(known, terms), end, start, count):
            found[number - 1].append(id_)
        return found

    async def candidate(
        self, path: Path, terms: Sequence[tuple[Any, ...]], end: int, start: int, number: int
    ) -> list[int]:
        """See `Reader.candidate`."""
        known = _path(path)
        values = (*_arrays(known, terms), end, start, 1, number - 1)
        return [id_ for _, id_ in await self._database.fetch(known.sql(offset=True), *values)]

    async def types_between(self, first: str, end: str, most: int) -> list[str]:
        """See `Reader.types_between`."""
        return [type_ for (type_,) in await self._database.fetch(TYPES_SQL, first, end, most + 1)]

    async def destinations(self) -> list[str]:
        """See `Reader.destinations`."""
        rows = await self._database.fetch("SELECT DISTINCT destination FROM ledger ORDER BY destination")
        return [name for (name,) in rows]

    async def pending_of(self, destination: str, most: int) -> list[int]:
        """See `Reader.pending_of`."""
        found: list[int] = []
        for share in ("attempts = 0", "attempts > 0"):
            sql = f"SELECT id FROM owed WHERE destination = $1 AND {share} LIMIT $2"  # noqa: S608 - constants
            found += [id_ for (id_,) in await self._database.fetch(sql, destination, most - len(found))]
        return found

    async def deliveries_of(self, destination: str, most: int) -> list[int]:
        """See `Reader.deliveries_of`."""
        path = Path("deliveries", "destination")
        [found] = await self.candidates(path, [(destination,)], 2**63 - 1, 0, most)
        return found

    async def events_of(self, delivery_ids: Sequence[int]) -> set[int]:
        """See `Reader.events_of`."""
        sql = f"SELECT d.event_id FROM {by_ids('deliveries', 'd', 'id, event_id')}"  # noqa: S608 - constants
        return {id_ for (id_,) in await self._by_ids(sql, delivery_ids)}

    async def span(self, since: int | None, until: int | None) -> Span | None:
        """See `Reader.span`."""
        first, last = 1, 2**63 - 2
        after, before = -(2**63) if since is None else since, 2**63 - 1 if until is None else until
        if since is not None:
            first = min(first_id(since - 1000), last)
            early = await self._odd(EARLY, after, before)
            first = 1 if early is None else max(1, min([first, *early]))
        if until is not None:
            last = min(first_id(until + SLACK + 1000), last)
            late = await self._odd(LATE, after, before)
            last = 2**63 - 2 if late is None else max([last, *late])
        return Span(first, last)

    async def _odd(self, condition: str, since: int, until: int) -> list[int] | None:
        """Return the row ids of the events in a time range that meet a condition; None: too many."""
        sql = f"""
            SELECT id FROM events WHERE {condition} AND received_at >= $1 AND received_at < $2
             ORDER BY received_at LIMIT {MOST_ODD + 1}
        """  # noqa: S608 - constants
        found = [id_ for (id_,) in await self._database.fetch(sql, since, until)]
        return None if len(found) > MOST_ODD else found

    async def newest(self, kind: Literal["events", "deliveries"]) -> int:
        """See `Reader.newest`."""
        found = await self._database.fetch(f"SELECT id FROM {kind} ORDER BY id DESC LIMIT 1")  # noqa: S608 - a constant
        return next((id_ for (id_,) in found), 0)

    async def row_of(self, kind: str, public_id: str) -> int:
        """See `Reader.row_of`."""
        range_ = _range_of(public_id[4:])
        if range_ is None or range_[0] != range_[1]:
            return 0
        sql = f"SELECT id FROM {kind} WHERE public_id = $1::uuid"  # noqa: S608 - a constant
        return next((id_ for (id_,) in await self._database.fetch(sql, uuid_of(public_id))), 0)

    async def matches(self, conditions: Conditions, ids: Sequence[int]) -> Iterable[Row]:
        """See `Reader.matches`."""
        # Each statement reads one table, because a join would look for each row in every partition.
        selection = conditions.selection
        if conditions.deliveries and not conditions.by_event:
            sql, values = _of_deliveries(selection)
            found = await self._by_ids(sql, ids, *values)
            if not conditions.reads_events:
                return [(event, row, "", 0, 0, destination) for event, row, destination in found]
            events = await self._matching_events(conditions, [event for event, *_ in found])
            return [
                (event, row, *events[event], destination)
                for event, row, destination in found
                if event in events
            ]
        events = await self._matching_events(conditions, ids)
        if not conditions.deliveries and selection.destination is None and selection.state is None:
            return [(id_, id_, *event, None) for id_, event in events.items()]
        if selection.state == "pending":  # a small table shows which events may match
            names = None if selection.destination is None else [selection.destination]
            rows = await self._database.fetch(PENDING_OF_SQL, list(events), names)
            events = {id_: events[id_] for (id_,) in rows}
        latest = conditions.latest or not conditions.deliveries
        matches: list[Row] = []
        for id_, deliveries in (await self._deliveries_of(list(events))).items():
            last = {destination: row for row, destination, _ in deliveries} if latest else {}
            fitting = [
                (id_, row, *events[id_], destination)
                for row, destination, state in deliveries
                if selection.destination in (None, destination)
                and selection.state in (None, state)
                and (not latest or last[destination] == row)
            ]
            if conditions.deliveries:
                matches += fitting
            elif fitting:
                matches.append((id_, id_, *events[id_], None))
        return matches

    async def _matching_events(
        self, conditions: Conditions, ids: Sequence[int]
    ) -> dict[int, tuple[str, int, int]]:
        """Return type, size and time of receipt of the events that fulfil the conditions about events."""
        sql, values = _of_events(conditions)
        rows = await self._by_ids(sql, ids, *values)
        return {id_: (type_, size, received_at) for id_, type_, size, received_at in rows}

    async def _deliveries_of(self, event_ids: Sequence[int]) -> dict[int, list[tuple[int, str, str]]]:
        """Return id, destination and state of each delivery of events, the oldest first."""
        return {
            event: sorted(
                (id_, name, state or "pending") for id_, name, state in zip(ids, names, states, strict=True)
            )
            for event, ids, names, states in await self._by_ids(OF_EVENTS_SQL, event_ids)
        }

    async def rows(self, kind: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """See `Reader.rows`."""
        sql = {"events": EVENTS_SQL, "deliveries": DELIVERIES_SQL, "attempts": ATTEMPTS_SQL}[kind]
        found = [dict(row) for row in await self._by_ids(sql, ids)]
        return await _COMPLETE[kind](self, found)

    async def _events(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the numbers of deliveries by state."""
        deliveries = await self._deliveries_of([row["row"] for row in found])
        for row in found:
            states = [state for _, _, state in deliveries.get(row["row"], ())]
            row["deliveries"] = msgspec.json.encode(
                {state: states.count(state) if states else None for state in STATES}
            )
        return found

    async def _deliveries(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the public ids of events and of replayed deliveries."""
        events = {row[0]: row for row in await self._by_ids(IDS_SQL["events"], [r["event"] for r in found])}
        replayed = [row["replayed"] for row in found if row["replayed"] is not None]
        names = {row[0]: row[1] for row in await self._by_ids(IDS_SQL["deliveries"], replayed)}
        complete = []
        for row in found:
            event, replay = row.pop("event"), row.pop("replayed")
            if event in events:
                _, row["event_id"], row["type"] = events[event]
                complete.append({**row, "replay_of": names.get(replay)})
        return complete

    async def _attempts(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the public ids of deliveries and events."""
        rows = await self._by_ids(IDS_SQL["deliveries"], [row["delivery"] for row in found])
        deliveries = {row["id"]: row for row in rows}
        rows = await self._by_ids(IDS_SQL["events"], [row["event_id"] for row in rows])
        events = {row["id"]: row for row in rows}
        complete = []
        for row in found:
            delivery = deliveries.get(row.pop("delivery"))
            event = None if delivery is None else events.get(delivery["event_id"])
            if delivery is not None and event is not None:
                row["delivery_id"], row["destination"] = delivery["public_id"], delivery["destination"]
                row["event_id"], row["type"] = event["public_id"], event["type"]
                complete.append(row)
        return complete

    async def later(self, ids: Sequence[int]) -> dict[int, str]:
        """See `Reader.later`."""
        given = await self._by_ids(IDS_SQL["deliveries"], ids)
        known = await self._deliveries_of([row["event_id"] for row in given])
        latest = {}
        for row in given:
            others = [id_ for id_, name, _ in known.get(row["event_id"], ()) if name == row["destination"]]
            if others and others[-1] > row["id"]:
                latest[row["id"]] = others[-1]
        names = {row[0]: row[1] for row in await self._by_ids(IDS_SQL["deliveries"], [*latest.values()])}
        return {id_: names[other] for id_, other in latest.items() if other in names}

    async def attempts_of(self, delivery: int, before: int, count: int) -> list[int]:
        """See `Reader.attempts_of`."""
        rows = await self._database.fetch(ATTEMPTS_OF_DELIVERY_SQL, delivery, before, count)
        return [id_ for (id_,) in rows]

    async def attempts_between(
        self, since: int, until: int, before: tuple[int, int], count: int
    ) -> list[tuple[int, int]]:
        """See `Reader.attempts_between`."""
        # One upper bound: with two, a scan could begin at the later one and pass over all rows between them.
        end = min(before, (until, 2**63 - 1))
        rows = await self._database.fetch(ATTEMPTS_BY_TIME_SQL, since, *end, count)
        return [(started_at, id_) for started_at, id_ in rows]

    async def attempts_of_all(self, delivery_ids: Sequence[int]) -> list[tuple[int, int]]:
        """See `Reader.attempts_of_all`."""
        far = {
            id_
            for sql in (FAR_DELIVERIES_SQL, PENDING_AMONG_SQL)
            for (id_,) in await self._by_ids(sql, delivery_ids)
        }
        near = [id_ for id_ in delivery_ids if id_ not in far]
        rows = list(await self._database.fetch(NEAR_ATTEMPTS_SQL, near))
        if far:
            sql = "SELECT started_at, id FROM attempts WHERE delivery_id = ANY($1::bigint[])"
            rows += await self._database.fetch(sql, list(far))
        return [(started_at, id_) for started_at, id_ in rows]

    async def matching_attempts(self, filters: Mapping[str, Any], ids: Sequence[int]) -> set[int]:
        """See `Reader.matching_attempts`."""
        own = {name: value for name, value in filters.items() if name != "destination"}
        conditions = [OF_ATTEMPT[name].format(f"${number}") for number, name in enumerate(own, 4)]
        values = [bool(value) if name == "failed" else value for name, value in own.items()]
        sql = f"SELECT a.id, a.delivery_id FROM {by_ids('attempts', 'a')} {_where(conditions)}"  # noqa: S608 - constants
        found: dict[int, int] = dict(await self._by_ids(sql, ids, *values))
        if "destination" in filters:  # a join would look for each delivery in every partition
            selection = Selection(destination=filters["destination"])
            sql, values = _of_deliveries(selection)
            rows = await self._by_ids(sql, list(set(found.values())), *values)
            fitting = {delivery for _, delivery, _ in rows}
            found = {id_: delivery for id_, delivery in found.items() if delivery in fitting}
        return set(found)

    async def worker_rows(
        self, kind: str, filters: Mapping[str, Any], before: int | None, count: int
    ) -> list[dict[str, Any]]:
        """See `Reader.worker_rows`."""
        sql, time, columns = WORKER_LISTS[kind]
        values = list(filters.values())
        conditions = [f"{columns[name]} = ${number}" for number, name in enumerate(filters, 1)]
        if before is not None:
            values.append(before)
            conditions.append(f"{time} < ${len(values)}")
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        limited = f"{sql} {where} ORDER BY {time} DESC LIMIT ${len(values) + 1}"
        return [dict(row) for row in await self._database.fetch(limited, *values, count)]

    async def pending_page(
        self, destination: str, group: int, last: int, after: tuple[int | None, int], count: int
    ) -> list[tuple[int, int | None]]:
        """See `Reader.pending_page`."""
        rows = await self._database.fetch(PENDING_SQL[group], destination, last, *after, count)
        return [(id_, due) for id_, due in rows]

    async def named(self, kind: Literal["events", "deliveries"], short: str) -> list[tuple[Any, ...]]:
        """See `Reader.named`."""
        range_ = _range_of(short)
        if range_ is None:
            return []
        return list(map(tuple, await self._database.fetch(NAMED_SQL[kind], *range_)))

    async def neighbours(
        self, kind: Literal["events", "deliveries"], ids: Sequence[str]
    ) -> list[tuple[str, str | None, str | None]]:
        """See `Reader.neighbours`. Reads only ids of the same milliseconds, in partitions of that day."""
        uuids = [uuid_of(each) for each in ids]
        firsts, lasts = (
            [each[:_TIME] + filler[_TIME:] for each in uuids] for filler in (_SHORTEST, _LONGEST)
        )
        times = [int(each[:_TIME].replace("-", ""), 16) * 1000 for each in uuids]
        newest = min(first_id(max(times) + _DAY), 2**63 - 1)  # a public id of an import may have any time
        oldest = min(first_id(min(times) - _DAY), newest)
        found = await self._database.fetch(NEIGHBOURS_SQL[kind], uuids, firsts, lasts, oldest, newest)
        return [(given, before, after) for given, before, after in found]

    async def stats(self, since: int, before: tuple[int, str, str], count: int) -> list[Stat]:
        """See `Reader.stats`."""
        return [Stat(*row) for row in await self._database.fetch(STATS_SQL, since, *before, count)]

    async def load_events(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """See `Reader.load_events`."""
        events = map(stored_event, await self._by_ids(LOAD_SQL, event_ids))
        return {event.id: event for event in events}

    async def delivery_lines(self, event_ids: Sequence[int]) -> dict[int, list[DeliveryLine]]:
        """See `Reader.delivery_lines`."""
        deliveries = await self._deliveries_of(event_ids)
        ids = [id_ for of_event in deliveries.values() for id_, _, _ in of_event]
        rows = await self._by_ids(EXPORTED_SQL, ids)
        return lines_of(map(tuple, rows))

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `Reader.destination_states`."""
        columns = ", ".join(DestinationState.__struct_fields__)
        rows = await self._database.fetch(f"SELECT {columns} FROM destinations")  # noqa: S608 - constants
        return {row["name"]: DestinationState(**dict(row)) for row in rows}

    async def paused_sources(self) -> frozenset[str]:
        """See `Reader.paused_sources`."""
        return frozenset(
            name for (name,) in await self._database.fetch("SELECT name FROM sources WHERE paused")
        )

    async def _by_ids(self, sql: str, ids: Sequence[int], *values: Any) -> Sequence[Any]:
        """Run a statement over row ids: its first values are the ids, the lowest and the highest of them."""
        if not ids:
            return ()
        return await self._database.fetch(sql, list(ids), min(ids), max(ids), *values)


_COMPLETE = {
    "events": PostgresReader._events,  # noqa: SLF001 - of the class above
    "deliveries": PostgresReader._deliveries,  # noqa: SLF001
    "attempts": PostgresReader._attempts,  # noqa: SLF001
}


class PostgresQueries(PagedQueries):
    """`relay.store.Queries` over PostgreSQL."""

    def __init__(self, database: Database) -> None:
        super().__init__(PostgresReader(database))


def _path(path: Path) -> IndexPath:
    return (EVENT_PATHS if path.kind == "events" else DELIVERY_PATHS)[path.name]


def _arrays(path: IndexPath, terms: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Return the values of each column of a path, from the values of each term."""
    return [[term[number] for term in terms] for number in range(len(path.columns))]


def _range_of(short: str) -> tuple[str, str] | None:
    """Return the first and the last UUID that begin with a text; None if no UUID can begin with it."""
    filled = short + _SHORTEST[len(short) :]
    if any((given == "-") != (usual == "-") for given, usual in zip(filled, _SHORTEST, strict=False)):
        return None
    return (filled, short + _LONGEST[len(short) :]) if len(filled) == len(_SHORTEST) else None


def _of_events(wanted: Conditions) -> tuple[str, list[Any]]:
    """Return the statement of the conditions about events, and its values after the candidates."""
    known = {name: getattr(wanted.selection, name) for name in OF_EVENT}
    given = {name: value for name, value in known.items() if value is not None}
    conditions = [OF_EVENT[name].format(f"${number}") for number, name in enumerate(given, 4)]
    values = list(given.values())
    if wanted.types is not None:
        values.append(list(wanted.types))
        conditions.append(f"e.type = ANY(${len(values) + 3}::text[])")
    if not wanted.operator_events:
        conditions.append(f"e.source <> '{OPERATOR_SOURCE}'")
    rows = by_ids("events", "e", "id, type, size, received_at, source, subject")
    return f"SELECT e.id, e.type, e.size, e.received_at FROM {rows} {_where(conditions)}", values  # noqa: S608 - constants


def _of_deliveries(selection: Selection) -> tuple[str, list[Any]]:
    """Return the statement of the conditions about deliveries, and its values after the candidates."""
    conditions, values = [], []
    if selection.destination is not None:
        values.append(selection.destination)
        conditions.append(f"d.destination = ${len(values) + 3}")
    if selection.state == "pending":
        conditions.append("(SELECT true FROM owed AS o WHERE o.id = d.id)")
    elif selection.state is not None:
        values.append(selection.state)
        conditions.append(_STATE.format(len(values) + 3))
    rows = by_ids("deliveries", "d", "id, event_id, destination")
    return f"SELECT d.event_id, d.id, d.destination FROM {rows} {_where(conditions)}", values  # noqa: S608 - constants


_STATE = "(SELECT x.state FROM ends AS x WHERE x.delivery_id = d.id) = ${}"


def _where(conditions: Sequence[str]) -> str:
    return f"WHERE {' AND '.join(conditions)}" if conditions else ""
