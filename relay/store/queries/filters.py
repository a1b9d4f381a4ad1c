"""Filters of lists, and the search for the candidates that match a selection.

This is the only table of filters in the store; each engine has the condition of each filter, and
`relay.store.queries.plan` chooses the index.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from relay.model import Selection
from relay.routing.conditions import Conditions as Where
from relay.routing.conditions import compile_conditions
from relay.routing.envelope import EnvelopeView
from relay.routing.subscription import Patterns
from relay.store.queries.page import portions
from relay.store.queries.reader import Conditions, Reader

FILTERS: Mapping[str, Sequence[str]] = {
    "events": ("id", *Selection.__struct_fields__),
    "deliveries": ("id", "event_id", "replayed", *Selection.__struct_fields__),
    "attempts": ("delivery_id", "event_id", "destination", "result", "status", "failed", "since", "until"),
    "worker_metrics": ("source", "worker_id"),
    "worker_commands": ("id", "source", "worker_id", "state"),
}
"""The filters of each list."""

MOST_BODIES = 100
MOST_BYTES = 2**20
"""Events and bytes of bodies whose envelopes are compared at once: a few milliseconds of the event loop."""


class Match(msgspec.Struct, frozen=True, gc=False):
    """A candidate that matches. If its event was not read, `size` and `received_at` are 0."""

    event_id: int
    row: int  # row id in the list's own table
    size: int
    received_at: int
    destination: str | None  # of a delivery


class Filter:
    """A selection, compiled into one check of candidates."""

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
        self._where: Where | None = None if wanted.where is None else compile_conditions(wanted.where)
        self._patterns = Patterns((wanted.type,)) if wanted.type is not None and types is None else None
        selection = msgspec.structs.replace(wanted, type=None, where=None)
        of_event = msgspec.structs.replace(selection, destination=None, state=None)
        needs_event = types is not None or not operator_events or of_event != Selection()
        self._conditions = Conditions(
            selection=selection,
            types=types,
            deliveries=deliveries,
            by_event=by_event,
            latest=latest,
            operator_events=operator_events,
            reads_events=bool(needs_event or self._where or self._patterns),
        )
        self.is_open = not (
            types is not None
            or latest
            or not operator_events
            or selection != Selection()
            or self.reads_bodies
            or self._patterns is not None
        )
        """Whether every candidate matches."""

    @property
    def reads_bodies(self) -> bool:
        """Whether the bodies of candidates are read."""
        return self._where is not None

    async def matches(self, reader: Reader, ids: Sequence[int]) -> list[Match]:
        """Return the matches among the candidates, in any order."""
        found = [
            Match(event_id, row, size, received_at, destination)
            for event_id, row, type_, size, received_at, destination in await reader.matches(
                self._conditions, ids
            )
            if self._patterns is None or self._patterns.matches(type_)
        ]
        if self._where is None or not found:
            return found
        sizes = {match.event_id: match.size for match in found}
        fulfilled = await _fulfilling(reader, self._where, sorted(sizes.items(), reverse=True))
        return [match for match in found if match.event_id in fulfilled]


async def _fulfilling(reader: Reader, where: Where, sizes: Iterable[tuple[int, int]]) -> frozenset[int]:
    """Return the row ids of the events that fulfil conditions, from row ids and sizes of bodies."""
    found: set[int] = set()
    for portion in portions(sizes, MOST_BYTES, lambda item: item[1], MOST_BODIES):
        events = await reader.load_events([id_ for id_, _ in portion])
        found.update(id_ for id_, event in events.items() if where.matches(EnvelopeView(event)))
    return frozenset(found)
