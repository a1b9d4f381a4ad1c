"""Events, deliveries and attempts as operators see them: the JSON of lists, and of one with its parts."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from relay.api.query_params import MOST_ROWS, STATES, read_filters
from relay.base.clock import rfc3339
from relay.config.problems import guess
from relay.config.schema import DestinationConfig
from relay.errors import RelayError, UnknownError
from relay.model import Counts, DestinationState, Selection, Stat
from relay.store import StoredData

_PLACE = re.compile(r"([0-9]{1,18})/([^/]+)/(.+)", re.DOTALL)  # of a count: hour, source, type
_TIMES = ("received_at", "created_at", "finished_at", "next_attempt_at", "started_at")


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownError:
    """Return the error that there is no such thing, with those that there are."""
    names = tuple(known)
    return UnknownError(
        f"no {kind} {name!r}{guess(name, names)}", hint=f"there are {', '.join(names) or 'none'}"
    )


async def list_items(
    reads: StoredData,
    kind: str,
    *,
    limit: int,
    cursor: str | None,
    filters: Mapping[str, Any],
    now: int,
    destinations: Collection[str] = (),
) -> dict[str, Any]:
    """Return one page, newest first, and the cursor of the next; everything comes as text.

    A page may have fewer rows than asked for, even none, and still a cursor to go on with. `destinations`
    are those of the configuration, which need not have been owed anything yet.

    Raises:
        RelayError: no such list, it has no such filter, or a filter says nothing that there could be.
    """
    wanted = read_filters(filters, now)
    name = wanted.get("destination")
    if name is not None and name not in destinations:
        books = await reads.ledger.totals()
        if name not in books:
            raise unknown("destination", name, sorted({*destinations, *books}))
    for name, noun in (("id", _NOUNS.get(kind)), ("event_id", "event"), ("delivery_id", "delivery")):
        if name in wanted:
            wanted[name] = await _row(reads, noun, wanted[name])
    page = await reads.queries.page(kind, limit=min(limit, MOST_ROWS), cursor=cursor, **wanted)
    return {"items": [item(row) for row in page.rows], "next_cursor": page.cursor}


async def list_stats(
    reads: StoredData, selection: Selection, *, limit: int, cursor: str | None
) -> dict[str, Any]:
    """Return one page of the counts per hour, source and type, the latest first.

    Raises:
        RelayError: the selection is by more than source, type and time, or the cursor is none of this list.
    """
    after = None
    if cursor is not None:
        place = _PLACE.fullmatch(cursor)
        if place is None:
            hint = "send the next_cursor of the page before"
            raise RelayError("the cursor is none of this list", hint=hint)
        after = (int(place[1]), place[2], place[3])
    found: list[Stat] = []
    async for page in reads.queries.stats(selection, after=after):
        found += page
        if len(found) > limit:
            break
    last = found[limit - 1] if len(found) > limit else None
    return {
        "items": [{**msgspec.structs.asdict(each), "hour": rfc3339(each.hour)} for each in found[:limit]],
        "next_cursor": None if last is None else f"{last.hour}/{last.source}/{last.type}",
    }


_NOUNS = {"events": "event", "deliveries": "delivery"}


async def _row(reads: StoredData, noun: str | None, given: str) -> int:
    """Return the row of an id, which may be shortened."""
    if noun == "event":
        return (await reads.queries.name_events([given]))[0].event_id
    return (await reads.queries.name_deliveries([given]))[0].id


async def show_event(reads: StoredData, given: str) -> dict[str, Any]:
    """Return one event by its id, which may be shortened, with all of its deliveries as `owed`.

    Raises:
        RelayError: there is none, or there are several.
    """
    [chosen] = await reads.queries.name_events([given])
    rows = await reads.queries.find("events", limit=1, id=chosen.event_id)
    if not rows:
        raise UnknownError(f"no event {given!r}", hint="it was deleted just now")
    owed = await reads.queries.find("deliveries", limit=MOST_ROWS, event_id=chosen.event_id)
    return {**item(rows[0]), "owed": [item(each) for each in owed]}


async def show_delivery(reads: StoredData, given: str) -> dict[str, Any]:
    """Return one delivery likewise, with the latest of its attempts first.

    Raises:
        RelayError: there is none, or there are several.
    """
    [named] = await reads.queries.name_deliveries([given])
    rows = await reads.queries.find("deliveries", limit=1, id=named.id)
    if not rows:
        raise UnknownError(f"no delivery {given!r}", hint="it was deleted just now")
    tries = await reads.queries.find("attempts", limit=MOST_ROWS, delivery_id=named.id)
    return {**item(rows[0]), "tries": [item(each) for each in tries]}


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a list as JSON has it: times in RFC 3339, an answer as text, deliveries by state.

    What took time is told to a tenth of a millisecond, as `relay tail` and the log tell it.
    """
    shown = {name: value for name, value in row.items() if name != "row"}
    for name in _TIMES:
        if shown.get(name) is not None:
            shown[name] = rfc3339(shown[name])
    if "duration_ms" in shown:
        shown["duration_ms"] = round(shown["duration_ms"], 1)
    if "duplicate" in shown:
        shown["duplicate"] = bool(shown["duplicate"])
        states = msgspec.json.decode(shown["deliveries"])
        shown["deliveries"] = {state: states[state] for state in STATES if states[state]}
    if "answer" in shown:
        shown["answer"] = shown["answer"].decode("utf-8", "replace")
        shown["truncated"] = bool(shown["truncated"])
    return shown


ABSENT = "not_in_config"
"""What holds the deliveries of a destination that is configured no more; its return resumes them."""


def counted(counts: Counts | None) -> dict[str, int]:
    """Return a destination's books as JSON has them."""
    return msgspec.structs.asdict(counts or Counts())


async def owed_to(reads: StoredData, name: str, books: Mapping[str, Counts], now: int) -> dict[str, Any]:
    """Return its books, what is due, its oldest pending delivery and its latest one; `now` is steady."""
    owed = (await reads.ledger.backlog(now)).get(name)
    oldest = await reads.queries.find("deliveries", id=owed.row, limit=1) if owed else []
    latest = await reads.queries.find("deliveries", destination=name, limit=1)
    return {
        **counted(books.get(name)),
        "due": owed.due if owed else 0,
        "oldest": item(oldest[0]) if oldest else None,
        "latest": item(latest[0]) if latest else None,
    }


async def list_destinations(reads: StoredData, known: Mapping[str, DestinationConfig]) -> dict[str, Any]:
    """Return the list of destinations that a stopped relay leaves; `known` are those of the configuration."""
    books, states = await reads.ledger.totals(), await reads.queries.destination_states()
    names = [*known, *(name for name, each in books.items() if name not in known and each.pending)]
    items = [{**_named(name, states, known), **counted(books.get(name))} for name in names]
    return {"items": items, "next_cursor": None}


async def show_destination(
    reads: StoredData, name: str, known: Mapping[str, DestinationConfig], now: int
) -> dict[str, Any]:
    """Return one of them, with what it is owed.

    Raises:
        UnknownError: there is none.
    """
    books, states = await reads.ledger.totals(), await reads.queries.destination_states()
    if name not in known and name not in books:
        raise unknown("destination", name, known)
    told = _named(name, states, known)
    if name in known:
        told |= {"events": known[name].events, **moments(states.get(name, DestinationState(name=name)))}
    return {**told, **await owed_to(reads, name, books, now)}


def moments(state: DestinationState, held_until: int | None = None) -> dict[str, str | None]:
    """Return since when and until when something is the matter with a destination."""
    times = {
        "failing_since": state.failing_since,
        "disabled_at": state.disabled_at,
        "held_until": held_until,
    }
    return {name: None if moment is None else rfc3339(moment) for name, moment in times.items()}


def _named(
    name: str, states: Mapping[str, DestinationState], known: Mapping[str, DestinationConfig]
) -> dict[str, Any]:
    held = (states[name].held if name in states else None) if name in known else ABSENT
    return {"name": name, "held": held, "in_flight": None}
