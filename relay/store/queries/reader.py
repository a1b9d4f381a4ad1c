"""Interface of an engine for lists, selections and exports: short statements, each along an index.

Row ids follow the order of acceptance. Times are microseconds UTC, wall clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from relay.config.problems import MOST_MATCHES
from relay.model import DestinationState, Selection, Stat, StoredEvent
from relay.store import Span
from relay.store.export import DeliveryLine

EventPath = Literal["all", "source", "type", "subject", "state", "destination and state", "pending"]
DeliveryPath = Literal["all", "event_id", "destination", "destination and state", "pending"]


class Path(msgspec.Struct, frozen=True):
    """An index that leads to row ids; its name lists the filters whose values it takes."""

    kind: Literal["events", "deliveries"]
    name: EventPath | DeliveryPath


class Conditions(msgspec.Struct, frozen=True):
    """The conditions that one statement checks for each candidate."""

    selection: Selection  # without `type` and `where`, which are checked afterwards
    types: Sequence[str] | None  # None: any type
    deliveries: bool  # matches are deliveries, else events
    by_event: bool  # candidates are row ids of events, else of deliveries
    latest: bool  # only the latest delivery of an event to each destination matches
    operator_events: bool  # the relay's own events match as well
    reads_events: bool  # the type and the size of the event are needed


Row = tuple[int, int, str, int, int, str | None]
"""A match: event, row id in the list's own table, type, size, time of receipt, destination of a delivery.

If the conditions need no event, type, size and time are empty.
"""


MOST_NAMED = MOST_MATCHES + 1
"""Rows that `Reader.named` returns at most, so that an ambiguous id can be reported with its candidates."""


class Reader(Protocol):
    """Reads of one engine; each statement reads few rows and ends soon."""

    @property
    def has_queue(self) -> bool:
        """Whether pending deliveries have a separate table, which the paths `pending` read."""
        ...

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
        """Return the first `count` row ids of each term, from `start` to before `end`, in order.

        A term has the values that the path takes.
        """
        ...

    async def candidate(
        self, path: Path, terms: Sequence[tuple[Any, ...]], end: int, start: int, number: int
    ) -> list[int]:
        """Return the row id at position `number` of each term, newest first; shorter terms are left out."""
        ...

    async def types_between(self, first: str, end: str, most: int) -> list[str]:
        """Return the stored types from `first` to before `end`; `most` + 1 of them if there are more."""
        ...

    async def destinations(self) -> list[str]:
        """Return the names of all destinations that ever had a delivery."""
        ...

    async def pending_of(self, destination: str, most: int) -> list[int]:
        """Return row ids of a destination's pending deliveries, at most `most`, in any order."""
        ...

    async def deliveries_of(self, destination: str, most: int) -> list[int]:
        """Return row ids of a destination's deliveries, at most `most`, in any order."""
        ...

    async def events_of(self, delivery_ids: Sequence[int]) -> set[int]:
        """Return the row ids of the events of deliveries."""
        ...

    async def span(self, since: int | None, until: int | None) -> Span | None:
        """Return a range of row ids that contains all events of a range of times; None without such events.

        None leaves an end open. `since` is included, `until` is not. The range may be too wide.
        """
        ...

    async def newest(self, kind: Literal["events", "deliveries"]) -> int:
        """Return the highest row id; 0 without rows."""
        ...

    async def row_of(self, kind: str, public_id: str) -> int:
        """Return the row id of an event or a delivery; 0, the id of no row, if it is unknown."""
        ...

    async def matches(self, conditions: Conditions, ids: Sequence[int]) -> Iterable[Row]:
        """Return the candidates that fulfil conditions, in any order."""
        ...

    async def rows(self, kind: str, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of a list that exist, under the names of a page; `row` is the row id."""
        ...

    async def later(self, ids: Sequence[int]) -> dict[int, str]:
        """Return the public id of the latest later delivery of the same event to the same destination.

        By row id of the given deliveries; those without a later one are left out.
        """
        ...

    async def attempts_of(self, delivery: int, before: int, count: int) -> list[int]:
        """Return row ids of a delivery's attempts before one, newest first."""
        ...

    async def attempts_between(
        self, since: int, until: int, before: tuple[int, int], count: int
    ) -> list[tuple[int, int]]:
        """Return start and row id of attempts of a range of times, before a position, latest first.

        Both `since` and `until` are included.
        """
        ...

    async def attempts_of_all(self, delivery_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return start and row id of all attempts of deliveries, in any order."""
        ...

    async def matching_attempts(self, filters: Mapping[str, Any], ids: Sequence[int]) -> set[int]:
        """Return the row ids of the attempts that match filters."""
        ...

    async def worker_rows(
        self, kind: str, filters: Mapping[str, Any], before: int | None, count: int
    ) -> list[dict[str, Any]]:
        """Return rows of `worker_metrics` or `worker_commands` before a time, latest first."""
        ...

    async def pending_page(
        self, destination: str, group: int, last: int, after: tuple[int | None, int], count: int
    ) -> list[tuple[int, int | None]]:
        """Return row id and due time of pending deliveries of one group after a position, in order.

        Group 0 waits behind other deliveries without a due time, in the order of row ids. Group 1 are first
        attempts and group 2 retries, in the order of due times. A delivery moves to later groups only. The
        position is a due time and a row id; rows after `last` are left out.
        """
        ...

    async def named(self, kind: Literal["events", "deliveries"], short: str) -> list[tuple[Any, ...]]:
        """Return up to `MOST_NAMED` rows whose public id, without its prefix, begins with `short`, by id.

        Rows of events are public id, row id, size, time of receipt. Rows of deliveries are public id, row id,
        state, event, size, time of receipt, destination.
        """
        ...

    async def neighbours(
        self, kind: Literal["events", "deliveries"], ids: Sequence[str]
    ) -> list[tuple[str, str | None, str | None]]:
        """Return public ids of one kind, each with the stored ids next to it: the one before, the one after.

        An engine may leave out a neighbour of another millisecond: it differs within the first 12 digits.
        """
        ...

    async def stats(self, since: int, before: tuple[int, str, str], count: int) -> list[Stat]:
        """Return counts of hours from `since` on, before an hour, source and type, latest first."""
        ...

    async def load_events(self, event_ids: Sequence[int]) -> dict[int, StoredEvent]:
        """Read events with their bodies; deleted events are missing."""
        ...

    async def delivery_lines(self, event_ids: Sequence[int]) -> dict[int, list[DeliveryLine]]:
        """Read the deliveries of events for an export; events without deliveries are missing."""
        ...

    async def destination_states(self) -> dict[str, DestinationState]:
        """See `relay.store.Queries.destination_states`."""
        ...

    async def paused_sources(self) -> frozenset[str]:
        """See `relay.store.Queries.paused_sources`."""
        ...
