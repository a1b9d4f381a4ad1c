"""Which candidates of a list are meant: conditions on their rows first, then what their payloads hold."""

from collections.abc import Sequence
from typing import Any

import aiosqlite
import msgspec

from relay.model import Selection
from relay.routing.conditions import compile_where
from relay.routing.filters import Patterns
from relay.store.queries.payloads import holding

# The unary plus keeps the planner from other indexes than the one that leads to a row.
EVENTS = "SELECT e.id, e.id, e.type, e.size FROM events AS e WHERE e.id IN ({marks}) {conditions}"
DELIVERIES = """
    SELECT d.event_id, d.id, '', 0 FROM deliveries AS d WHERE d.id IN ({marks}) {conditions}
"""
DELIVERIES_OF = """
    SELECT d.event_id, d.id, e.type, e.size
      FROM deliveries AS d CROSS JOIN events AS e ON e.id = d.event_id
     WHERE d.id IN ({marks}) {conditions}
"""
BY_EVENT = """
    SELECT d.event_id, d.id, e.type, e.size
      FROM events AS e CROSS JOIN deliveries AS d ON d.event_id = e.id
     WHERE e.id IN ({marks}) {conditions}
"""
# As everywhere, of the deliveries of an event to a destination the latest counts.
_LATEST = """
    AND EXISTS (SELECT 1 FROM deliveries AS d
                 WHERE d.event_id = e.id {conditions}
                   AND NOT EXISTS (SELECT 1 FROM deliveries AS later
                                    WHERE later.event_id = d.event_id
                                      AND +later.destination = d.destination AND later.id > d.id))
"""
_OF_EVENT = {"source": "+e.source = ?", "subject": "+e.subject = ?"}
_OF_TIME = {"since": "+e.received_at >= ?", "until": "+e.received_at < ?"}
_OF_DELIVERY = {"destination": "+d.destination = ?", "state": "+d.state = ?"}


class Found(msgspec.Struct, frozen=True):
    """One row that is meant."""

    event_id: int
    row: int  # of the list's own table


class Sieve:
    """A selection, compiled for a list of events or deliveries."""

    def __init__(
        self, wanted: Selection, types: Sequence[str] | None, *, deliveries: bool, by_event: bool = True
    ) -> None:
        """Take the types that the selection's pattern comes to, if they are few.

        `by_event`: candidates are events; else they are deliveries.
        """
        self._where = None if wanted.where is None else compile_where(wanted.where)
        self._patterns = Patterns((wanted.type,)) if wanted.type is not None and types is None else None
        of_event = self._conditions(wanted, _OF_EVENT) + self._conditions(wanted, _OF_TIME)
        if types is not None:
            of_event.append((f"+e.type IN ({', '.join('?' * len(types))})", tuple(types)))
        of_delivery = self._conditions(wanted, _OF_DELIVERY)
        conditions = _and(of_event)
        if deliveries:
            joined = bool(of_event or self._where or self._patterns)
            self._sql = BY_EVENT if by_event else DELIVERIES_OF if joined else DELIVERIES
            conditions += _and(of_delivery)
        else:
            self._sql = EVENTS
            conditions += _LATEST.format(conditions=_and(of_delivery)) if of_delivery else ""
        self._text = conditions
        self._values = [value for _, values in (*of_event, *of_delivery) for value in values]
        self.open = not self._text and self._where is None and self._patterns is None
        """Whether everything passes."""

    @property
    def deep(self) -> bool:
        """Whether payloads are looked into."""
        return self._where is not None

    def sql(self, count: int) -> str:
        """Return the statement over so many candidates."""
        return self._sql.format(marks=", ".join("?" * count), conditions=self._text)

    def values(self, ids: Sequence[int]) -> list[Any]:
        """Return what the statement is about."""
        return [*ids, *self._values]

    async def sift(self, reader: aiosqlite.Connection, ids: Sequence[int]) -> list[Found]:
        """Return what is meant, in no order."""
        rows = await reader.execute_fetchall(self.sql(len(ids)), self.values(ids))
        found = [
            (Found(event_id, row), size)
            for event_id, row, type_, size in rows
            if self._patterns is None or self._patterns.matches(type_)
        ]
        if self._where is None:
            return [each for each, _ in found]
        sizes = sorted({each.event_id: size for each, size in found}.items(), reverse=True)
        held = await holding(reader, self._where, sizes)
        return [each for each, _ in found if each.event_id in held]

    @staticmethod
    def _conditions(wanted: Selection, known: dict[str, str]) -> list[tuple[str, tuple[Any, ...]]]:
        return [
            (text, (getattr(wanted, name),))
            for name, text in known.items()
            if getattr(wanted, name) is not None
        ]


def _and(conditions: Sequence[tuple[str, tuple[Any, ...]]]) -> str:
    return "".join(f" AND {text}" for text, _ in conditions)
