"""What operators ask for, as they write it: times, types, states, conditions on the payload."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import msgspec

from relay.base.clock import moment
from relay.config.problems import guess
from relay.errors import RelayError
from relay.model import DeliveryState
from relay.routing.filters import Patterns, compile_where

STATES: tuple[str, ...] = get_args(DeliveryState)


def read_field(name: str, reader: Callable[[Any], Any], value: Any) -> Any:
    """Read what a field says.

    Raises:
        RelayError: `reader` does not understand it.
    """
    try:
        return reader(value)
    except (ValueError, RecursionError) as error:
        raise RelayError(f'"{name}": {error}', hint=_HINTS.get(name, "")) from None


def read_filters(filters: Mapping[str, Any], now: int) -> dict[str, Any]:
    """Read those that are given, as fields of a `Selection` have them; `now` is what "2h" ago counts from.

    Raises:
        RelayError: one of them says nothing that there could be.
    """
    readers: Mapping[str, Callable[[Any], Any]] = {
        "since": lambda text: moment(text, now),
        "until": lambda text: moment(text, now),
        "type": _type,
        "state": lambda text: one_of(text, STATES),
        "where": _where,
    }
    return {
        name: read_field(name, readers[name], value) if name in readers else value
        for name, value in filters.items()
        if value is not None
    }


def one_of(text: str, known: Sequence[str]) -> str:
    """Return a word of a closed list.

    Raises:
        ValueError: it is not on it.
    """
    if text not in known:
        raise ValueError(f'there is no "{text:.40}"{guess(text, known)}; there are {", ".join(known)}')
    return text


def _type(text: str) -> str:
    Patterns((text,))
    return text


def _where(value: Any) -> Any:
    """Read conditions, which a query has as JSON."""
    conditions = msgspec.json.decode(value) if isinstance(value, str) else value
    compile_where(conditions)
    return conditions


_HINTS: Mapping[str, str] = {
    "state": "leave it out for all of them",
    "where": 'for example {"data.sale_made": true, "data.total": {"gte": 100}}',
}
