"""Which events, or which deliveries of them: the filter that long work takes, as operators write it."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from relay.clock import Clock, moment
from relay.errors import RelayError
from relay.filters import Patterns
from relay.model import Selection


class Filter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A `Selection` as operators write it."""

    source: str | None = None
    type: str | None = None
    subject: str | None = None
    since: str | None = None
    until: str | None = None
    destination: str | None = None
    state: Literal["pending", "delivered", "dead", "expired", "cancelled"] | None = None

    def selection(self, clock: Clock, *, everything: bool = False) -> Selection:
        """Read times and pattern; with `everything`, a filter that filters nothing means all there is.

        Raises:
            RelayError: one of them is wrong, or nothing is filtered.
        """
        fields = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        if not fields and not everything:
            hint = 'since = "2000-01-01T00:00:00Z" means everything'
            raise RelayError("the filter is empty", hint=f"name at least one of {FIELDS}; {hint}")
        for name in ("since", "until"):
            if name in fields:
                fields[name] = read_field(name, lambda text: moment(text, clock.wall()), fields[name])
        if self.type is not None:
            read_field("type", lambda text: Patterns((text,)), self.type)
        return Selection(**fields)


FIELDS = ", ".join(Filter.__struct_fields__)


def filter_of(query: Mapping[str, str]) -> Filter:
    """Take a filter from the parameters of a question.

    Raises:
        RelayError: a parameter is none of a filter, or of the wrong kind.
    """
    try:
        return msgspec.convert(query, Filter)
    except msgspec.ValidationError as error:
        raise RelayError(f"the filter is wrong: {error}", hint=f"it has {FIELDS}") from None


def read_field(name: str, reader: Any, text: str) -> Any:
    """Read what a field says.

    Raises:
        RelayError: `reader` does not understand it.
    """
    try:
        return reader(text)
    except ValueError as error:
        raise RelayError(f'"{name}": {error}') from None
