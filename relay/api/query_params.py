"""Query parameters and filters. Each one is declared once, as a field of a Struct.

The API validates queries by these Structs, the OpenAPI document describes them, and the command line makes
its options from them (`filters_of`). Tests compare the pages of docs/. To add a filter, add a field here and
its condition in the store. This module needs no aiohttp, because `relay --help` reads it.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from relay.base.clock import Clock, moment
from relay.config.problems import guess
from relay.errors import REASONS, RelayError
from relay.model import AttemptResult, DeliveryState, Selection, WorkerStatus
from relay.routing.conditions import compile_conditions
from relay.routing.subscription import Patterns

Q = TypeVar("Q", bound=msgspec.Struct)

STATES: tuple[DeliveryState, ...] = get_args(DeliveryState)
MOST_ROWS = 500
"""Maximum number of rows of one page."""

MOST_PAYLOAD = 2**20
"""Maximum number of bytes of a body that are returned with its event."""

_MOST_DIGITS = 18  # of a number that SQLite can hold
_STATUS_DIGITS = 3
_TRUE, _FALSE = ("1", "true"), ("", "0", "false")


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS and int(text) > 0):
        raise ValueError(f'expected a whole number of 1 or more, got "{text:.40}"')
    return min(int(text), MOST_ROWS)


def _whole(text: str, *, most: int) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:_MOST_DIGITS]) <= most):
        raise ValueError(f'expected a whole number from 1 to {most}, got "{text:.40}"')
    return int(text)


def _flag(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f'expected 0 or 1, got "{text:.40}"')
    return text.lower() in _TRUE


def _status(text: str, _now: int) -> int:
    """Return an HTTP status; 0 if there was no response."""
    if text == "none":
        return 0
    if not (text.isascii() and text.isdigit() and len(text) == _STATUS_DIGITS):
        raise ValueError(f'expected a status such as 503, or none, got "{text:.40}"')
    return int(text)


def _pattern(text: str, _now: int) -> str:
    Patterns((text,))
    return text


def _where(value: Any, _now: int) -> Any:
    conditions = msgspec.json.decode(value) if isinstance(value, str) else value
    compile_conditions(conditions)
    return conditions


def _about(text: str, **extra: Any) -> msgspec.Meta:
    """Describe a parameter.

    Args:
        text: its line in `--help` and in OpenAPI.
        extra: `read` converts the text and the current time to the value for the store; `parse` converts the
            text in a query to the field's value; `hint` is the advice for an invalid value;
            `choices` lists the valid values; `option` is the name of the command line option, or None.
    """
    return msgspec.Meta(description=text, extra=extra)


Source = Annotated[str, _about("Name of the source.")]
Type = Annotated[str, _about('Full event type, or a pattern such as "adorn.*".', read=_pattern)]
Since = Annotated[
    str, _about('Received at this time or later: an age such as "2h", or RFC 3339.', read=moment)
]
Until = Annotated[str, _about('Received before this time: an age such as "2h", or RFC 3339.', read=moment)]
Destination = Annotated[str, _about("Name of the destination.")]
Conditions = Annotated[
    dict[str, Any] | list[dict[str, Any]],
    _about(
        "Conditions on the event, like `where` of a destination.",
        read=_where,
        parse=msgspec.json.decode,
        hint='example: {"data.sale_made": true, "data.total": {"gte": 100}}',
    ),
]


class HistoryQuery(msgspec.Struct, kw_only=True):
    """`GET /api/history`."""

    minutes: Annotated[
        int,
        _about("Minutes until now; above 60, in steps of five minutes.", parse=partial(_whole, most=1440)),
        msgspec.Meta(ge=1, le=1440),
    ] = 60
    periods: Annotated[
        int,
        _about("Number of periods into which the time is divided.", parse=partial(_whole, most=360)),
        msgspec.Meta(ge=1, le=360),
    ] = 60
    source: Annotated[str, _about("Return only this source, and no destinations.")] | None = None
    destination: Annotated[str, _about("Return only this destination, and no sources.")] | None = None
    running: Annotated[
        Literal["0", "1"],
        _about("1: the last period ends now and may be incomplete; 0: all periods are complete."),
    ] = "0"


class DatabaseQuery(msgspec.Struct, kw_only=True):
    """`GET /api/db`."""

    counts: Annotated[
        bool, _about("0: without the number of events, which takes long to count.", parse=_flag)
    ] = True


class NoQuery(msgspec.Struct):
    """An endpoint without parameters."""


class Filter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Selects events, or deliveries by their events. Every field that is set must match."""

    source: Source | None = None
    type: Type | None = None
    subject: Annotated[str, _about("Exact subject of the event.")] | None = None
    since: Since | None = None
    until: Until | None = None
    destination: Destination | None = None
    state: (
        Annotated[DeliveryState, _about("State of the delivery.", hint="omit it for every state")] | None
    ) = None
    where: Conditions | None = None

    def selection(self, clock: Clock, *, everything: bool = False) -> Selection:
        """Return the selection for the store; an empty filter is allowed only with `everything`.

        Raises:
            RelayError: a value is invalid, or the filter is empty.
        """
        given = {name: getattr(self, name) for name in Selection.__struct_fields__}
        fields = read_filters("selection", given, clock.wall())
        if not fields and not everything:
            hint = 'since = "2000-01-01T00:00:00Z" selects everything'
            raise RelayError("the filter is empty", hint=f"set at least one of {FIELDS}; {hint}")
        return Selection(**fields)


FIELDS = ", ".join(Filter.__struct_fields__)


Limit = Annotated[
    int,
    _about("Maximum number of rows.", parse=_limit, hint="example: limit=50"),
    msgspec.Meta(ge=1, le=MOST_ROWS),
]
Cursor = Annotated[str, _about("The `next_cursor` of the previous page.")]
_PAGING = ("limit", "cursor", "answer")
EventId = Annotated[str, _about("Id of the event; any unique prefix works.", option="event")]
DeliveryId = Annotated[str, _about("Id of the delivery; any unique prefix works.", option="delivery")]


class EventsQuery(Filter, kw_only=True):
    """`GET /api/events`."""

    id: Annotated[str, _about("Id; any unique prefix works.", option=None)] | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class EventQuery(msgspec.Struct, kw_only=True):
    """`GET /api/events/{id}`."""

    payload: Annotated[
        int,
        _about(
            "Maximum number of bytes of the body, up to 1,048,576.",
            parse=partial(_whole, most=MOST_PAYLOAD),
            hint="for a whole body of any size: GET /api/events/{id}/body",
        ),
        msgspec.Meta(ge=1, le=MOST_PAYLOAD),
    ] = 16_384


class DeliveriesQuery(EventsQuery, kw_only=True):
    """`GET /api/deliveries`."""

    event_id: EventId | None = None
    replayed: (
        Annotated[
            Literal["yes", "no"],
            _about("no: deliveries that were not sent again; a retry selects only these. yes: the others."),
        ]
        | None
    ) = None


class AttemptsQuery(msgspec.Struct, kw_only=True):
    """`GET /api/attempts`."""

    delivery_id: DeliveryId | None = None
    event_id: EventId | None = None
    destination: Destination | None = None
    result: Annotated[AttemptResult, _about("Result of the attempt.")] | None = None
    status: (
        Annotated[
            str,
            _about("HTTP status of the response; none: no response.", read=_status),
        ]
        | None
    ) = None
    failed: (
        Annotated[
            bool,
            _about(
                "1: only failed attempts, 0: only successful ones.",
                parse=_flag,
                option=None,
                hint="send 1 or 0, or omit it",
            ),
        ]
        | None
    ) = None
    since: (
        Annotated[
            str, _about('Started at this time or later: an age such as "2h", or RFC 3339.', read=moment)
        ]
        | None
    ) = None
    until: (
        Annotated[str, _about('Started before this time: an age such as "2h", or RFC 3339.', read=moment)]
        | None
    ) = None
    limit: Limit = 50
    cursor: Cursor | None = None
    answer: Annotated[bool, _about("0: without the bodies of responses.", parse=_flag)] = True


class WorkersQuery(msgspec.Struct, kw_only=True):
    """`GET /api/workers`."""

    source: Source | None = None
    id: Annotated[str, _about("Id of the worker.", option=None)] | None = None
    status: Annotated[str, _about("Status of the worker.", choices=get_args(WorkerStatus))] | None = None
    version: Annotated[str, _about("Version of the worker.")] | None = None
    environment: Annotated[str, _about("Environment of the worker.")] | None = None
    endpoint: Annotated[str, _about("Endpoint of the worker.", option=None)] | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class NamesQuery(msgspec.Struct, kw_only=True):
    """`GET /api/names`."""

    kind: Annotated[
        Literal["source", "destination", "worker", "job", "event", "delivery", "replay", "type"],
        _about("The kind of name."),
    ]
    prefix: Annotated[str, _about("The prefix of the names.")] = ""
    source: Annotated[str, _about("For workers: name of the source.")] | None = None


class RefusedQuery(msgspec.Struct, kw_only=True):
    """`GET /api/refused`."""

    source: Source | None = None
    reason: Annotated[str, _about("Reason of the refusal.", choices=(*REASONS, "path"))] | None = None
    since: (
        Annotated[
            str, _about('Refused at this time or later: an age such as "2h", or RFC 3339.', read=moment)
        ]
        | None
    ) = None
    until: (
        Annotated[str, _about('Refused before this time: an age such as "2h", or RFC 3339.', read=moment)]
        | None
    ) = None
    limit: Limit = 50
    cursor: Cursor | None = None


class AuditQuery(msgspec.Struct, kw_only=True):
    """`GET /api/audit`."""

    operator: Annotated[str, _about("Name of the operator.")] | None = None
    since: (
        Annotated[str, _about('Made at this time or later: an age such as "2h", or RFC 3339.', read=moment)]
        | None
    ) = None
    until: (
        Annotated[str, _about('Made before this time: an age such as "2h", or RFC 3339.', read=moment)] | None
    ) = None
    limit: Limit = 50
    cursor: Cursor | None = None


class StatsQuery(msgspec.Struct, kw_only=True):
    """`GET /api/stats`."""

    source: Source | None = None
    type: Type | None = None
    since: Since | None = None
    until: Until | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class TypesQuery(msgspec.Struct, kw_only=True):
    """`GET /api/types`."""

    source: Source | None = None
    since: Annotated[
        str, _about('With an event at this time or later: an age such as "2h", or RFC 3339.', read=moment)
    ] = "7d"
    limit: Limit = 50


class TailQuery(msgspec.Struct, kw_only=True):
    """`GET /api/tail`."""

    source: Source | None = None
    destination: Destination | None = None
    type: Type | None = None
    failed: Annotated[Literal["0", "1"], _about("1: only failed attempts.", option=None)] = "0"
    attempts: Annotated[Literal["0", "1"], _about("0: only events.", option=None)] = "1"
    since: (
        Annotated[
            str,
            _about('Begin with stored items since this time: an age such as "2h", or RFC 3339.', read=moment),
        ]
        | None
    ) = None
    payload: Annotated[
        Literal["0", "1"], _about("1: events with the first 16 KiB of their bodies.", option=None)
    ] = "0"
    count: Annotated[
        Literal["0", "1"],
        _about("1: the number of new items, at most once a second, instead of the items.", option=None),
    ] = "0"


class ExportQuery(Filter, kw_only=True):
    """`GET /api/export`."""

    deliveries: Annotated[
        bool, _about("Include deliveries and attempts.", parse=_flag, hint="send 1, or omit it")
    ] = False
    dry_run: Annotated[bool, _about("Only count.", parse=_flag, hint="send 1, or omit it")] = False


class ImportQuery(msgspec.Struct, kw_only=True):
    """`POST /api/import`."""

    deliver: Annotated[
        bool, _about("Create deliveries of new events.", parse=_flag, hint="send 1, or omit it")
    ] = False


LISTS: Mapping[str, type[msgspec.Struct]] = {
    "events": EventsQuery,
    "deliveries": DeliveriesQuery,
    "attempts": AttemptsQuery,
    "workers": WorkersQuery,
    "stats": StatsQuery,
    "refused": RefusedQuery,
    "audit": AuditQuery,
    "tail": TailQuery,
    "selection": Filter,
}
"""The lists and their filters. "selection" is the filter of replays, retries, deletions and exports."""


class ListFilter(msgspec.Struct, frozen=True):
    """One filter, described for the command line, for documents and for reading its value."""

    name: str  # of the query parameter
    help: str  # one sentence
    choices: tuple[str, ...]  # every valid value; (): any text
    option: str | None  # name of the command line's option, without dashes; None: it has no option
    hint: str
    reader: Callable[[Any, int], Any] | None

    def read(self, value: Any, now: int) -> Any:
        """Return the value for the store; `now` is wall clock, the base of ages such as "2h".

        Raises:
            ValueError: the value is invalid.
        """
        if self.choices:
            return one_of(value, self.choices)
        return value if self.reader is None else self.reader(value, now)


@cache
def filters_of(kind: str) -> tuple[ListFilter, ...]:
    """Return the filters of a list of `LISTS`, without the parameters that select no rows."""
    return tuple(each for each in _described(LISTS[kind]) if each.name not in _PAGING)


def _described(kind: type[msgspec.Struct]) -> Iterator[ListFilter]:
    for field in msgspec.structs.fields(kind):
        type_, meta = plain(field.type)
        extra = meta.extra or {}
        yield ListFilter(
            name=field.name,
            help=meta.description or "",
            choices=extra.get("choices", get_args(type_) if get_origin(type_) is Literal else ()),
            option=extra.get("option", field.name),
            hint=extra.get("hint", ""),
            reader=extra.get("read"),
        )


def plain(type_: Any) -> tuple[Any, msgspec.Meta]:
    """Return the type of a parameter without `Annotated` and `| None`, and its description."""
    type_ = without_none(type_)
    if get_origin(type_) is Annotated:
        inner, *metas = get_args(type_)
        return inner, next(meta for meta in metas if meta.description is not None)
    return type_, msgspec.Meta()


def without_none(type_: Any) -> Any:
    """Return X for `X | None`, and any other type unchanged."""
    if get_origin(type_) in (Union, types.UnionType) and type(None) in get_args(type_):
        return get_args(type_)[0]
    return type_


_FILTERS: Mapping[str, Mapping[str, ListFilter]] = {
    kind: {each.name: each for each in filters_of(kind)} for kind in LISTS
}


def read_query(query: Mapping[str, str], kind: type[Q]) -> Q:
    """Return the parameters of a query as a Struct.

    Raises:
        RelayError: a parameter is unknown, missing or has an invalid value.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    if unknown := query.keys() - fields.keys():
        name = min(unknown)
        hint = f"parameters: {', '.join(fields)}" if fields else "this endpoint has no parameters"
        raise RelayError(f'unknown parameter "{name:.40}"{guess(name, fields)}', hint=hint)
    values = {}
    for name, text in query.items():
        hint = (plain(fields[name].type)[1].extra or {}).get("hint", "")
        values[name] = read_field(name, partial(_parse, fields[name]), text, hint)
    for name, field in fields.items():
        if field.required and name not in values:
            raise RelayError(f'the parameter "{name}" is missing', hint=f"parameters: {', '.join(fields)}")
    return kind(**values)


def _parse(field: msgspec.structs.FieldInfo, text: str) -> Any:
    type_, meta = plain(field.type)
    if get_origin(type_) is Literal:
        return one_of(text, get_args(type_))
    parse = (meta.extra or {}).get("parse")
    return text if parse is None else parse(text)


def read_field(name: str, reader: Callable[[Any], Any], value: Any, hint: str = "") -> Any:
    """Return the value of a field.

    Raises:
        RelayError: `reader` rejects it.
    """
    try:
        return reader(value)
    except (ValueError, RecursionError) as error:
        raise RelayError(f'"{name}": {error}', hint=hint) from None


def read_filters(kind: str, filters: Mapping[str, Any], now: int) -> dict[str, Any]:
    """Return the filters that are set, with their values for the store.

    Args:
        kind: the list, one of `LISTS`.
        filters: values by name, None if not set.
        now: wall clock, the base of ages such as "2h".

    Raises:
        RelayError: a filter is unknown or has an invalid value.
    """
    known = _FILTERS[kind]
    if unknown := filters.keys() - known.keys():
        name = min(unknown)
        raise RelayError(f'unknown filter "{name}"{guess(name, known)}', hint=f"filters: {', '.join(known)}")
    return {
        name: read_field(name, partial(known[name].read, now=now), value, known[name].hint)
        for name, value in filters.items()
        if value is not None
    }


def filter_of(query: Mapping[str, Any]) -> Filter:
    """Return a filter from query parameters.

    Raises:
        RelayError: a parameter is unknown or has an invalid value.
    """
    return read_query(query, Filter)


def one_of(text: Any, known: Sequence[str]) -> str:
    """Return a text that is one of the known words.

    Raises:
        ValueError: it is not; the message lists the words.
    """
    if text not in known:
        raise ValueError(
            f'expected {", ".join(known[:-1])} or {known[-1]}, got "{text:.40}"{guess(text, known)}'
        )
    return str(text)
