"""Filters of lists: defines each filter in SQL, and finds the candidates that match a selection.

This is the only table of filters in the store; `relay.store.sqlite.queries.plan` has the indexes. To add a
filter, add its condition here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import aiosqlite
import msgspec

from relay.model import OPERATOR_SOURCE, Selection
from relay.routing.conditions import Conditions, compile_conditions
from relay.routing.envelope import EnvelopeView
from relay.routing.subscription import Patterns
from relay.store.sqlite.queries.page import portions
from relay.store.sqlite.rows import load_events, marks

# The unary plus keeps the planner from any other index than the one that leads to a candidate.
_OF_EVENT = {
    "source": "+e.source = ?",
    "type": "+e.type IN ({marks})",
    "subject": "+e.subject = ?",
    "since": "+e.received_at >= ?",
    "until": "+e.received_at < ?",
}
_OF_DELIVERY = {"destination": "+d.destination = ?", "state": "+d.state = ?"}
_OF_SELECTION: Mapping[str, str | None] = {**_OF_EVENT, **_OF_DELIVERY, "where": None}

FILTERS: Mapping[str, Mapping[str, str | None]] = {
    "events": {"id": None, **_OF_SELECTION},
    "deliveries": {"id": None, "event_id": None, **_OF_SELECTION},
    "attempts": {
        "delivery_id": None,
        "destination": "+d.destination = ?",
        "result": "+a.result = ?",
        "since": "+a.started_at >= ?",
        "until": "+a.started_at < ?",
    },
    "worker_metrics": {"source": "m.source = ?", "worker_id": "m.worker_id = ?"},
    "worker_commands": {
        "id": "c.public_id = ?",
        "source": "c.source = ?",
        "worker_id": "c.worker_id = ?",
        "state": "c.state = ?",
    },
}
"""The filters of each list and their conditions.

None: not a condition in SQL. `id`, `event_id` and `delivery_id` choose the query plan, and `where` looks into
the event's envelope.
"""

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

MOST_BODIES = 100
MOST_BYTES = 2**20
"""Events and bytes of bodies whose envelopes are compared at once: some milliseconds of the event loop."""


class Match(msgspec.Struct, frozen=True, gc=False):
    """A candidate that matches. Without a join to its event, `size` and `received_at` are 0."""

    event_id: int
    row: int  # row id in the list's own table
    size: int
    received_at: int
    destination: str | None  # of a delivery


class Filter:
    """A selection, compiled into one statement over candidates."""

    def __init__(
        self,
        wanted: Selection,
        types: Sequence[str] | None,
        *,
        deliveries: bool = False,
        by_event: bool = True,
        latest: bool = False,
        operator_events: bool = True,
    ) -> None:
        """Compile a selection.

        Args:
            wanted: the selection.
            types: the stored types that its pattern matches; None: the pattern itself is compared.
            deliveries: matches are deliveries, else events.
            by_event: candidates are row ids of events, else of deliveries.
            latest: only the latest delivery of an event to each destination matches.
            operator_events: the relay's own events match as well.
        """
        self._where: Conditions | None = None if wanted.where is None else compile_conditions(wanted.where)
        self._patterns = Patterns((wanted.type,)) if wanted.type is not None and types is None else None
        of_event, self._values = _conditions(wanted, _OF_EVENT, types)
        if not operator_events:
            of_event.append(f"+e.source <> '{OPERATOR_SOURCE}'")
        of_delivery, values = _conditions(wanted, _OF_DELIVERY)
        self._values += values
        if not deliveries:
            self._sql = EVENTS
            if of_delivery:
                of_event.append(HAS_DELIVERY.format(conditions=_and([*of_delivery, LATEST])))
            of_delivery = []
        elif by_event:
            self._sql = DELIVERIES_OF_EVENTS
        else:
            reads_events = bool(of_event or self._where or self._patterns)
            self._sql = DELIVERIES_WITH_EVENTS if reads_events else DELIVERIES
        self._conditions = _and([*of_event, *of_delivery, *([LATEST] if latest else [])])

    @property
    def is_open(self) -> bool:
        """Whether every candidate matches."""
        return not self._conditions and self._where is None and self._patterns is None

    @property
    def reads_bodies(self) -> bool:
        """Whether the bodies of candidates are read."""
        return self._where is not None

    async def matches(self, reader: aiosqlite.Connection, ids: Sequence[int]) -> list[Match]:
        """Return the matches among the candidates, in any order."""
        sql = self._sql.format(marks=marks(ids), conditions=self._conditions)
        rows = await reader.execute_fetchall(sql, [*ids, *self._values])
        found = [
            Match(event_id, row, size, received_at, destination)
            for event_id, row, type_, size, received_at, destination in rows
            if self._patterns is None or self._patterns.matches(type_)
        ]
        if self._where is None or not found:
            return found
        sizes = {match.event_id: match.size for match in found}
        fulfilled = await _fulfilling(reader, self._where, sorted(sizes.items(), reverse=True))
        return [match for match in found if match.event_id in fulfilled]


def _conditions(
    wanted: Selection, known: Mapping[str, str], types: Sequence[str] | None = None
) -> tuple[list[str], list[Any]]:
    """Return the conditions of the filters that are set, and their values."""
    texts: list[str] = []
    values: list[Any] = []
    for name, text in known.items():
        if name == "type":
            if types is not None:
                texts.append(text.format(marks=marks(types)))
                values += types
        elif (value := getattr(wanted, name)) is not None:
            texts.append(text)
            values.append(value)
    return texts, values


def _and(conditions: Iterable[str]) -> str:
    return "".join(f" AND {text}" for text in conditions)


async def _fulfilling(
    reader: aiosqlite.Connection, where: Conditions, sizes: Iterable[tuple[int, int]]
) -> frozenset[int]:
    """Return the row ids of the events that fulfil conditions, from row ids and sizes of bodies."""
    found: set[int] = set()
    for portion in portions(sizes, MOST_BYTES, lambda item: item[1], MOST_BODIES):
        events = await load_events(reader, [id_ for id_, _ in portion])
        found.update(id_ for id_, event in events.items() if where.matches(EnvelopeView(event)))
    return frozenset(found)
