"""Events, deliveries, attempts and destinations as JSON, for the API and for commands that read the file.

The file of a stopped relay lacks the state that lanes keep in memory: open circuits, pauses requested by
receivers, and deliveries in flight. This module needs no aiohttp, because commands start faster without it.
"""

import asyncio
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from relay.api.query_params import MOST_ROWS, STATES, read_filters
from relay.base.clock import rfc3339
from relay.config.problems import guess
from relay.config.schema import DestinationConfig
from relay.errors import RelayError, UnknownError
from relay.model import (
    OPERATOR_SOURCE,
    PAUSED_IN_CONFIG,
    AttemptResult,
    Backlog,
    Counts,
    DeliveryState,
    DestinationState,
    Outlook,
    Selection,
    Stat,
)
from relay.store import StoredData

ABSENT = "not_in_config"
"""`held` of a destination that is no longer in config.toml: its deliveries wait until it returns."""

PAYLOAD = 16 * 1024
"""Bytes of a body that are shown with an event by default."""

LARGE = 256 * 1024
"""Bytes above which a body's digest is computed in a thread, so that it does not delay the event loop."""

MOST_COUNTS = 50_000
"""Counts per hour, source and type that are read to list the types, the latest first."""

_NOUNS = {"events": "event", "deliveries": "delivery"}
_PLAIN = re.compile(r"[^*?\[!]+")  # no pattern
_CURSOR = re.compile(r"([0-9]{1,18})/([^/]+)/(.+)", re.DOTALL)  # of counts: hour, source, type
_TIMES = ("received_at", "created_at", "finished_at", "next_attempt_at", "started_at")


def about(text: str) -> msgspec.Meta:
    """Return a description for the OpenAPI document."""
    return msgspec.Meta(description=text)


Time = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""A time, RFC 3339."""


class EventView(msgspec.Struct):
    """An event in a list."""

    id: Annotated[str, about("evt_ and a UUIDv7.")]
    source: str
    type: Annotated[str, about("Full type: the source's name, a dot, and the sender's type.")]
    subject: str | None
    received_at: Time
    size: Annotated[int, about("Bytes of the body.")]
    duplicate: Annotated[bool, about("Whether later requests repeated this event.")]
    repetitions: Annotated[int, about("Number of these requests; each was answered with this event's id.")]
    deliveries: Annotated[dict[str, int], about("Number of deliveries by state.")]


class DeliveryView(msgspec.Struct):
    """A delivery in a list."""

    id: Annotated[str, about("dlv_ and a UUIDv7.")]
    event_id: str
    type: str
    destination: str
    state: DeliveryState
    reason: Annotated[str | None, about("Why the delivery ended; null if it is pending or delivered.")]
    attempts: Annotated[int, about("Attempts that count against the schedule.")]
    next_attempt_at: Time | None
    last_status: int | None
    last_error: str | None
    created_at: Time
    finished_at: Time | None
    replay_of: Annotated[str | None, about("Id of the delivery that this one repeats.")]
    replayed_by: Annotated[
        str | None,
        about("Id of the latest later delivery that sends the event to the same destination again."),
    ]
    group_key: Annotated[
        str | None, about("Value of `group_by`: pending deliveries with the same value are sent together.")
    ]


class AttemptView(msgspec.Struct):
    """An attempt of a delivery."""

    delivery_id: str
    event_id: str
    type: str
    destination: str
    started_at: Time
    duration_ms: float
    result: AttemptResult
    status: int | None
    error: str | None
    truncated: bool
    group_id: Annotated[
        str | None, about("Id of the message for several deliveries; null: for this delivery alone.")
    ]
    group_size: Annotated[int | None, about("Number of deliveries of that message.")]
    answer: Annotated[
        str | None, about("The first 16 KiB of the response body; null in a list with `answer=0`.")
    ]


class ReplyView(msgspec.Struct):
    """A reply about an event."""

    received_at: Annotated[Time, about("Receipt of the request; equals the event's for the first request.")]
    status: int
    duration_ms: Annotated[float, about("Time from the request's head until the reply was ready.")]
    heard: Annotated[bool, about("Whether the sender was connected when the reply was sent.")]


class EventShown(EventView):
    """An event with its deliveries."""

    replies: Annotated[
        tuple[ReplyView, ...],
        about(
            "Replies to the first request and to repetitions, oldest first. Each daemon keeps those for at "
            "least its latest 4,096 events in memory. Nodes of a cluster ask each other."
        ),
    ]
    owed: tuple[DeliveryView, ...]
    id_digits: Annotated[int, about("Hex digits by which the ids of these deliveries can be looked up.")]
    content_type: str
    sha256: Annotated[str, about("SHA-256 of the body as received, in hexadecimal digits.")]
    intact: Annotated[bool, about("Whether the body still has this digest. A damaged body is not sent.")]
    payload: Annotated[str, about("The start of the body; invalid UTF-8 is replaced.")]
    payload_truncated: bool


class DeliveryShown(DeliveryView):
    """A delivery with its attempts, the latest first."""

    tries: tuple[AttemptView, ...]


class StatView(msgspec.Struct):
    """Number of events of one source and type within one hour."""

    hour: Time
    source: str
    type: str
    events: int
    duplicates: int
    bytes: int


class TypeView(msgspec.Struct):
    """A type of event that a source has sent."""

    type: Annotated[str, about("Full type.")]
    source: str
    events: Annotated[int, about("Number of its events since `since`.")]
    last_hour: Annotated[Time, about("The hour of its latest event.")]


class DestinationSteered(msgspec.Struct, kw_only=True):
    """Whether a destination is held."""

    name: str
    held: Annotated[str | None, about("Why the destination is held; null if it is not held.")]
    paused_by: Annotated[
        Literal["operator", "config"] | None,
        about("Who paused it: an operator, or `paused = true` in config.toml; null: it is not paused."),
    ]
    paused_until: Annotated[Time | None, about("When an operator's pause ends; null: it has no end.")]
    in_flight: int
    node: Annotated[str | msgspec.UnsetType, about("The node that delivers, if it is another one.")] = (
        msgspec.UNSET
    )


class ShardView(msgspec.Struct):
    """A shard of a destination, and the node that delivers its part."""

    shard: Annotated[int, about("From 0.")]
    node: Annotated[str, about("Empty: no node has it yet.")]
    in_flight: int
    circuit: Literal["open", "closed"]


class DestinationView(DestinationSteered, kw_only=True):
    """A destination with the number of its deliveries by state."""

    url_host: Annotated[str | None, about("Host of its URL; null if it is no longer in config.toml.")]
    last_success: Annotated[Time | None, about("The latest 2xx; null if the store has none.")]
    certificate_expires: Annotated[
        Time | None, about("When its TLS certificate expires, as of the latest connection; null if unknown.")
    ]
    circuit: Annotated[
        Literal["open", "closed"] | None, about("State of its circuit breaker; null if it is not running.")
    ]
    failing_since: Time | None
    disabled_at: Time | None
    held_until: Annotated[
        Time | None, about("When the hold ends, or the circuit lets the next probe through; null if unknown.")
    ]
    oldest_pending: Annotated[
        Time | None,
        about("Creation of its oldest pending delivery, within 15 s; null: none, or another node checks it."),
    ]
    last_error: Annotated[str | None, about("Of the latest failed attempt since the daemon started.")]
    last_error_at: Time | None
    attempts_per_minute: Annotated[float | None, about("Attempts in the last minute; null if unknown.")]
    failed_per_minute: Annotated[float | None, about("Those of them that failed.")]
    created: int
    delivered: int
    dead: int
    expired: int
    cancelled: int
    pending: int
    shards: Annotated[
        tuple[ShardView, ...] | msgspec.UnsetType,
        about("Only of a destination with `shards` in a cluster; up to a second old."),
    ] = msgspec.UNSET


class OrderView(msgspec.Struct):
    """The order keys of a destination with `order_by`: deliveries of one key are sent one after another."""

    keys: Annotated[int, about("Keys with pending deliveries.")]
    longest: Annotated[int, about("Pending deliveries of the key with the most.")]
    is_whole: Annotated[bool, about("false: there are too many to count, so both figures may be too low.")]


class DestinationShown(DestinationView, kw_only=True):
    """A destination with its backlog. One that is no longer in config.toml lacks `events`."""

    events: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    due: Annotated[int, about("Pending deliveries that are due.")]
    oldest: Annotated[DeliveryView | None, about("The oldest pending delivery.")]
    expires_next: Annotated[Time | None, about("When the first pending delivery reaches its `ttl`.")]
    order: Annotated[OrderView | None, about("null: no pending delivery has an order key.")]
    latest: Annotated[DeliveryView | None, about("The latest delivery.")]


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownError:
    """Return the error for an unknown name; it lists the known ones."""
    names = tuple(known)
    hint = f"known: {', '.join(names)}" if names else f"config.toml has no {kind}s"
    return UnknownError(f'unknown {kind} "{name}"{guess(name, names)}', hint=hint)


async def check_names(
    stored: StoredData,
    *,
    source: str | None,
    type_: str | None,
    sources: Collection[str],
    destination: str | None = None,
    destinations: Collection[str] = (),
) -> None:
    """Check the names in a filter; `sources` and `destinations` are those in config.toml.

    An unknown name is probably misspelt, so an empty result would mislead. For a type or a pattern of types,
    only the source is checked.

    Raises:
        UnknownError: a name is neither in config.toml nor in the store.
    """
    if source is not None and not await _is_source(stored, source, sources):
        raise unknown("source", source, sources)
    begin = (type_ or "").partition(".")[0]
    if _PLAIN.fullmatch(begin) and not await _is_source(stored, begin, sources):
        names = tuple(sources)
        advice = guess(begin, names) or "; a full type begins with the name of its source"
        known = f"sources: {', '.join(names)}" if names else "config.toml has no sources"
        raise UnknownError(f'no source has the type "{type_}"{advice}', hint=known)
    if destination is not None and destination not in destinations:
        counts = await stored.ledger.totals()
        if destination not in counts:
            raise unknown("destination", destination, sorted({*destinations, *counts}))


async def _is_source(stored: StoredData, name: str, sources: Collection[str]) -> bool:
    """Return whether a source is in config.toml or has events in the store."""
    if name in sources or name == OPERATOR_SOURCE:
        return True
    # The counts of events outlive the events.
    if await anext(stored.queries.stats(Selection(source=name)), None):
        return True
    return bool(await stored.queries.find("events", source=name, limit=1))


async def list_items(
    stored: StoredData,
    kind: str,
    *,
    limit: int,
    cursor: str | None,
    filters: Mapping[str, Any],
    now: int,
    sources: Collection[str],
    destinations: Collection[str],
    answers: bool = True,
) -> dict[str, Any]:
    """Return one page of a list, newest first, the cursor of the next page, and the digits that ids need.

    A page may have fewer rows than `limit`, even 0, and still have a next page.

    Args:
        stored: the store.
        kind: the list, "events", "deliveries" or "attempts".
        limit: maximum number of rows.
        cursor: the `next_cursor` of the previous page.
        filters: by name, as text.
        now: wall clock, the base of ages such as "2h".
        sources: names in config.toml; they may have no events yet.
        destinations: names in config.toml; they may have no deliveries yet.
        answers: whether attempts have the bodies of their responses.

    Raises:
        UnknownError: a source or the destination is neither in config.toml nor in the store.
        RelayError: a filter is unknown or has an invalid value.
    """
    wanted = read_filters(kind, filters, now)
    await check_names(
        stored,
        source=wanted.get("source"),
        type_=wanted.get("type"),
        destination=wanted.get("destination"),
        sources=sources,
        destinations=destinations,
    )
    for name, noun in (("id", _NOUNS.get(kind)), ("event_id", "event"), ("delivery_id", "delivery")):
        if name in wanted:
            wanted[name] = await _row(stored, noun, wanted[name])
    if "replayed" in wanted:
        wanted["replayed"] = wanted["replayed"] == "yes"
    page = await stored.queries.page(kind, limit=min(limit, MOST_ROWS), cursor=cursor, **wanted)
    rows = page.rows if answers else [{**row, "answer": None} for row in page.rows]
    digits = await stored.queries.digits_of(
        "events" if kind == "events" else "deliveries",
        (row["delivery_id" if kind == "attempts" else "id"] for row in rows),
    )
    items = [view_of(row) for row in rows]
    return {"items": items, "next_cursor": page.cursor, "id_digits": digits}


async def list_stats(
    stored: StoredData,
    selection: Selection,
    *,
    limit: int,
    cursor: str | None,
    sources: Collection[str],
) -> dict[str, Any]:
    """Return one page of event counts per hour, source and type, the latest hour first.

    Raises:
        UnknownError: the source is neither in config.toml (`sources`) nor in the store.
        RelayError: the selection has other filters than source, type and time, or the cursor is invalid.
    """
    await check_names(stored, source=selection.source, type_=selection.type, sources=sources)
    after = None
    if cursor is not None:
        place = _CURSOR.fullmatch(cursor)
        if place is None:
            raise RelayError("invalid cursor", hint="send the next_cursor of the previous page")
        after = (int(place[1]), place[2], place[3])
    found: list[Stat] = []
    async for page in stored.queries.stats(selection, after=after):
        found += page
        if len(found) > limit:
            break
    last = found[limit - 1] if len(found) > limit else None
    return {
        "items": [{**msgspec.structs.asdict(each), "hour": rfc3339(each.hour)} for each in found[:limit]],
        "next_cursor": None if last is None else f"{last.hour}/{last.source}/{last.type}",
    }


async def list_types(
    stored: StoredData, selection: Selection, *, limit: int, sources: Collection[str]
) -> dict[str, Any]:
    """Return the types with the most events; the selection has a source and a time.

    Raises:
        UnknownError: the source is neither in config.toml (`sources`) nor in the store.
    """
    await check_names(stored, source=selection.source, type_=selection.type, sources=sources)
    found: dict[tuple[str, str], TypeView] = {}
    read = 0
    async for page in stored.queries.stats(selection):
        for each in page:
            known = found.setdefault(
                (each.source, each.type), TypeView(each.type, each.source, 0, rfc3339(each.hour))
            )
            known.events += each.events
        read += len(page)
        if read > MOST_COUNTS:
            break
    items = sorted(found.values(), key=lambda each: (-each.events, each.source, each.type))
    return {"items": items[:limit], "next_cursor": None}


async def _row(stored: StoredData, noun: str | None, given: str) -> int:
    """Return the row id for an id or a unique prefix of one."""
    if noun == "event":
        return (await stored.queries.name_events([given]))[0].event_id
    return (await stored.queries.name_deliveries([given]))[0].id


async def show_event(stored: StoredData, given: str, most: int = PAYLOAD) -> dict[str, Any]:
    """Return an event by its id or a unique prefix of it, with its deliveries and the start of its body.

    `most` is the maximum number of bytes of the body. `replies` is empty here; the daemon has them in memory.

    Raises:
        RelayError: no event has this id, or several have this prefix.
    """
    [chosen] = await stored.queries.name_events([given])
    rows = await stored.queries.find("events", limit=1, id=chosen.event_id)
    if not rows:
        raise UnknownError(f'unknown event "{given}"', hint="it has just been deleted")
    deliveries = await stored.queries.find("deliveries", limit=MOST_ROWS, event_id=chosen.event_id)
    owed = [view_of(each) for each in deliveries]
    digits = await stored.queries.digits_of("deliveries", (row["id"] for row in deliveries))
    payload = await _payload(stored, chosen.event_id, most)
    return {**view_of(rows[0]), "replies": [], "owed": owed, "id_digits": digits, **payload}


async def _payload(stored: StoredData, event_id: int, most: int) -> dict[str, Any]:
    """Return the start of an event's body, and whether the whole body matches its digest."""
    event = (await stored.queries.load([event_id])).get(event_id)
    if event is None:
        raise UnknownError("the event has just been deleted")
    body = event.body
    digest = hashlib.sha256(body) if len(body) <= LARGE else await asyncio.to_thread(hashlib.sha256, body)
    return {
        "content_type": event.content_type,
        "sha256": event.sha256.hex(),
        "intact": digest.digest() == event.sha256,
        "payload": body[:most].decode("utf-8", "replace"),
        "payload_truncated": len(body) > most,
    }


async def show_delivery(stored: StoredData, given: str) -> dict[str, Any]:
    """Return a delivery by its id or a unique prefix of it, with its attempts, the latest first.

    Raises:
        RelayError: no delivery has this id, or several have this prefix.
    """
    [named] = await stored.queries.name_deliveries([given])
    rows = await stored.queries.find("deliveries", limit=1, id=named.id)
    if not rows:
        raise UnknownError(f'unknown delivery "{given}"', hint="it has just been deleted")
    attempts = await stored.queries.find("attempts", limit=MOST_ROWS, delivery_id=named.id)
    return {**view_of(rows[0]), "tries": [view_of(each) for each in attempts]}


def view_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a list as JSON.

    Times are RFC 3339, durations are rounded to 0.1 ms as in `relay tail` and the log, bodies are text.
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
        if shown["answer"] is not None:
            shown["answer"] = shown["answer"].decode("utf-8", "replace")
        shown["truncated"] = bool(shown["truncated"])
    return shown


def counted(counts: Counts | None) -> dict[str, int]:
    """Return the number of a destination's deliveries by state."""
    return msgspec.structs.asdict(counts or Counts())


async def backlog_of(
    stored: StoredData, name: str, totals: Mapping[str, Counts], now: int, start: int | None = None
) -> dict[str, Any]:
    """Return a destination's counts, due deliveries, oldest pending and latest delivery.

    `now` and `start` are those of `relay.store.LedgerReads.backlog_of`.
    """
    backlog = await stored.ledger.backlog_of(name, now, start)
    oldest = await stored.queries.find("deliveries", id=backlog.row, limit=1) if backlog else []
    latest = await stored.queries.find("deliveries", destination=name, limit=1)
    outlook = await stored.ledger.outlook_of(name, backlog.row) if backlog else None
    return {
        **counted(totals.get(name)),
        "oldest_pending": rfc3339(backlog.oldest) if backlog else None,
        "due": backlog.due if backlog else 0,
        "oldest": view_of(oldest[0]) if oldest else None,
        "expires_next": rfc3339(outlook.expires_at) if outlook and outlook.expires_at is not None else None,
        "order": _order(outlook) if outlook and outlook.keys else None,
        "latest": view_of(latest[0]) if latest else None,
    }


def _order(outlook: Outlook) -> dict[str, Any]:
    return {"keys": outlook.keys, "longest": outlook.longest, "is_whole": outlook.is_whole}


async def latest_success(stored: StoredData, destination: str, backlog: Backlog | None) -> int | None:
    """Return when the latest delivered delivery of a destination was delivered (wall clock).

    The deliveries before the oldest pending one are read as well, because a long backlog may be longer than
    the range of one page.
    """
    for cursor in (None, None if backlog is None else str(backlog.row)):
        page = await stored.queries.page(
            "deliveries", limit=1, cursor=cursor, destination=destination, state="delivered"
        )
        if page.rows:
            moment: int | None = page.rows[0]["finished_at"]
            return moment
    return None


async def list_destinations(
    stored: StoredData, known: Mapping[str, DestinationConfig], now: int
) -> dict[str, Any]:
    """Return the destinations of a stopped relay: those in config.toml or with pending deliveries."""
    totals, states = await stored.ledger.totals(), await stored.queries.destination_states()
    backlogs = await stored.ledger.backlog(now)
    names = [*known, *(name for name, each in totals.items() if name not in known and each.pending)]
    items = [
        {**await _stored(stored, name, states, known, backlogs.get(name)), **counted(totals.get(name))}
        for name in names
    ]
    return {"items": items, "next_cursor": None}


async def show_destination(
    stored: StoredData, name: str, known: Mapping[str, DestinationConfig], now: int
) -> dict[str, Any]:
    """Return one destination of a stopped relay, with its backlog.

    Raises:
        UnknownError: neither config.toml nor any delivery names it.
    """
    totals, states = await stored.ledger.totals(), await stored.queries.destination_states()
    if name not in known and name not in totals:
        raise unknown("destination", name, known)
    backlog = await stored.ledger.backlog_of(name, now)
    shown = await _stored(stored, name, states, known, backlog)
    if name in known:
        shown["events"] = known[name].events
    return {**shown, **await backlog_of(stored, name, totals, now)}


def pause_of(by: Literal["operator", "config"] | None = None, until: int | None = None) -> dict[str, Any]:
    """Return who paused a destination, and when the pause ends (steady clock)."""
    return {"paused_by": by, "paused_until": None if until is None else rfc3339(until)}


def destination_fields(
    config: DestinationConfig | None,
    *,
    state: DestinationState | None = None,
    circuit: str | None = None,
    held_until: int | None = None,
    oldest_pending: int | None = None,
    last_success: int | None = None,
    last_failure: tuple[int, str] | None = None,
    certificate_expires: int | None = None,
    recent: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """Return the fields of a destination that show whether it works.

    The URL may contain a token, so only its host is shown.

    Args:
        config: None if config.toml lacks it.
        state: as stored; None: it never failed and is not disabled.
        circuit: "open" or "closed"; None if it is not running.
        held_until: end of the hold (steady clock).
        oldest_pending: creation of the oldest pending delivery (wall clock).
        last_success: the latest 2xx (wall clock).
        last_failure: time (wall clock) and error of the latest failed attempt.
        certificate_expires: end of its TLS certificate (wall clock).
        recent: attempts in the last minute, and those that failed.
    """
    failed_at, error = last_failure or (None, None)
    times = {
        "last_success": last_success,
        "certificate_expires": certificate_expires,
        "failing_since": None if state is None else state.failing_since,
        "disabled_at": None if state is None else state.disabled_at,
        "held_until": held_until,
        "oldest_pending": oldest_pending,
        "last_error_at": failed_at,
    }
    return {
        "url_host": None if config is None else urlsplit(config.url.reveal()).hostname,
        "circuit": circuit,
        "last_error": error,
        "attempts_per_minute": recent[0],
        "failed_per_minute": recent[1],
        **{name: None if moment is None else rfc3339(moment) for name, moment in times.items()},
    }


async def _stored(
    stored: StoredData,
    name: str,
    states: Mapping[str, DestinationState],
    known: Mapping[str, DestinationConfig],
    backlog: Backlog | None,
) -> dict[str, Any]:
    """Return a destination of a stopped relay, without its counts."""
    state = states.get(name, DestinationState(name=name))
    fields = {
        "in_flight": None,
        **destination_fields(
            known.get(name),
            state=state,
            last_success=await latest_success(stored, name, backlog),
            oldest_pending=None if backlog is None else backlog.oldest,
        ),
    }
    if name not in known:
        return {"name": name, "held": ABSENT, **pause_of(), **fields}
    if known[name].paused:
        return {"name": name, "held": PAUSED_IN_CONFIG, **pause_of("config"), **fields}
    pause = pause_of("operator", state.paused_until) if state.paused else pause_of()
    return {"name": name, "held": state.held, **pause, **fields}
