"""Selections: the events or deliveries that an operator's filters or ids select, oldest first.

A selection is read in pages, and no read transaction is longer than one page. So a selection that matches
almost nothing among ten million events delays neither other readers nor checkpoints.
"""

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import groupby, pairwise, takewhile
from operator import attrgetter
from typing import Any, Literal

import msgspec

from relay.base.ids import dashed
from relay.config.problems import ambiguous, shown
from relay.errors import RelayError, UnknownError
from relay.model import OPERATOR_SOURCE, Chosen, Named, Selection, Stat
from relay.routing.subscription import Patterns
from relay.store import HOUR, Span
from relay.store.queries.filters import Filter, Match
from relay.store.queries.page import TOP
from relay.store.queries.plan import cheapest, plans_of_events, types_matching
from relay.store.queries.reader import Reader

PAGE = 1000
"""Candidates that one page examines."""

MOST_IDS = 1000
"""Ids that one request may name."""

PENDING_GROUPS = range(3)
"""Groups of a destination's pending deliveries, see `Reader.pending_page`.

Reading them in this order, each in its own order, misses no delivery that moves meanwhile.
"""

_SHORT = re.compile(r"[0-9a-f-]{1,36}")


async def span(reader: Reader, selection: Selection) -> Span:
    """See `relay.store.Queries.span`."""
    newest = await reader.newest("events")
    if selection.since is None and selection.until is None:
        return Span(1, newest)
    found = await reader.span(selection.since, selection.until)
    return Span(1, 0) if found is None else Span(max(1, found.first), min(found.last, newest))


async def select(reader: Reader, selection: Selection, within: Span) -> AsyncIterator[tuple[Chosen, ...]]:
    """See `relay.store.Queries.select`."""
    types = await types_matching(reader, selection)
    if types == ():
        return
    start, end = within.first, within.last + 1
    plan = await cheapest(reader, await plans_of_events(reader, selection, types), end, start)
    deliveries = selection.of_deliveries
    matching = Filter(
        selection,
        types,
        deliveries=deliveries,
        latest=deliveries,
        # Selecting the relay's own events needs their source or type, as everywhere.
        operator_events=deliveries or selection.source is not None or selection.type is not None,
    )
    reached: int | None = start - 1
    while reached is not None:
        ids, reached = await plan.take(reader, end, reached + 1, PAGE, newest_first=False)
        matches = await matching.matches(reader, ids) if ids else []
        if not deliveries:
            matches.sort(key=attrgetter("event_id"))
            yield tuple(Chosen(match.event_id, match.size, match.received_at) for match in matches)
            continue
        matches.sort(key=attrgetter("event_id", "row"))
        yield tuple(_chosen(list(of_event)) for _, of_event in groupby(matches, attrgetter("event_id")))


def _chosen(matches: Sequence[Match]) -> Chosen:
    """Return an event with the destinations of its matching deliveries."""
    destinations = tuple(match.destination for match in matches if match.destination is not None)
    return Chosen(matches[0].event_id, matches[0].size, matches[0].received_at, destinations)


async def pending(reader: Reader, selection: Selection) -> AsyncIterator[tuple[int, ...]]:
    """See `relay.store.Queries.pending`."""
    of_event = msgspec.structs.replace(selection, destination=None, state=None)
    matching = Filter(of_event, await types_matching(reader, of_event), deliveries=True, by_event=False)
    last = await reader.newest("deliveries")
    names = await reader.destinations() if selection.destination is None else [selection.destination]
    for name in names:
        for group in PENDING_GROUPS:
            after: tuple[int | None, int] = (-1, 0)
            while rows := await reader.pending_page(name, group, last, after, PAGE):
                ids = [id_ for id_, _ in rows]
                if not matching.is_open:
                    matches = {match.row for match in await matching.matches(reader, ids)}
                    ids = [id_ for id_ in ids if id_ in matches]
                yield tuple(ids)
                after = (rows[-1][1], rows[-1][0])


async def name_events(reader: Reader, ids: Sequence[str]) -> tuple[Chosen, ...]:
    """See `relay.store.Queries.name_events`."""
    rows = await _by_id(reader, "events", ids)
    return tuple(Chosen(id_, size, received_at) for id_, size, received_at in sorted(set(rows)))


async def name_deliveries(reader: Reader, ids: Sequence[str]) -> tuple[Named, ...]:
    """See `relay.store.Queries.name_deliveries`."""
    rows = await _by_id(reader, "deliveries", ids)
    return tuple(
        Named(id_, state, Chosen(event_id, size, received_at, (destination,)))
        for id_, state, event_id, size, received_at, destination in sorted(set(rows))
    )


async def digits_of(reader: Reader, kind: Literal["events", "deliveries"], ids: Iterable[str]) -> int:
    """See `relay.store.Queries.digits_of`."""
    distinct = sorted(set(ids))
    if not distinct:
        return 0
    found = await reader.neighbours(kind, distinct)
    pairs = [(given, other) for given, *others in found for other in others if other is not None]
    return max((_common(given, other) + 1 for given, other in [*pairs, *pairwise(distinct)]), default=1)


def _common(id_: str, other: str) -> int:
    """Return the number of hex digits that two public ids have in common at their beginnings."""
    pairs = zip(id_.replace("-", ""), other.replace("-", ""), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) - len("evt_")


_NOUNS = {"evt_": ("an event", "events"), "dlv_": ("a delivery", "deliveries")}
"""The kind of object and its group of commands, by the prefix of an id."""


async def _by_id(
    reader: Reader, kind: Literal["events", "deliveries"], ids: Sequence[str]
) -> list[tuple[Any, ...]]:
    """Return the one row of each id."""
    noun, prefix = ("event", "evt_") if kind == "events" else ("delivery", "dlv_")
    if len(ids) > MOST_IDS:
        raise RelayError(f"{len(ids)} ids, at most {MOST_IDS} at once", hint="use a filter instead")
    found = []
    for given in ids:
        short = given.lower().removeprefix(prefix)
        if not _SHORT.fullmatch(short):
            hint = f"they look like {prefix}0190…"
            if (other := _NOUNS.get(short[:4])) is not None:
                hint = f"it is the id of {other[0]}: `relay {other[1]} show {short}`"
            raise RelayError(f"{shown(given)} is not a valid {noun} id", hint=hint)
        rows = await reader.named(kind, dashed(short))
        if not rows:
            raise UnknownError(f"unknown {noun} {shown(given)}", hint=f"`relay {kind} list` lists {kind}")
        if len(rows) > 1:
            raise ambiguous(noun, given, (_candidate(kind, row) for row in rows))
        found.append(tuple(rows[0])[1:])
    return found


def _candidate(kind: Literal["events", "deliveries"], row: Sequence[Any]) -> str:
    """Return an id, and of a delivery its destination."""
    return str(row[0]) if kind == "events" else f"{row[0]} ({row[-1]})"


async def stats(
    reader: Reader, selection: Selection, after: tuple[int, str, str] | None
) -> AsyncIterator[tuple[Stat, ...]]:
    """See `relay.store.Queries.stats`."""
    if selection.of_deliveries or selection.subject is not None or selection.where is not None:
        raise RelayError("counts exist per source, type and hour only", hint="list events instead")
    patterns = None if selection.type is None else Patterns((selection.type,))
    named = selection.source is not None or selection.type is not None
    since = selection.since or 0
    before = after or (TOP.key, "", "")
    while found := await reader.stats(since - since % HOUR, before, PAGE):
        yield tuple(
            stat
            for stat in found
            if (named or stat.source != OPERATOR_SOURCE)
            and selection.source in (None, stat.source)
            and (selection.until is None or stat.hour < selection.until)
            and (patterns is None or patterns.matches(stat.type))
        )
        before = (found[-1].hour, found[-1].source, found[-1].type)
