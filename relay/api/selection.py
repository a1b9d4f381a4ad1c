"""Which events, or which deliveries of them: the filter that long work takes, as operators write it."""

from collections.abc import Mapping
from typing import Any

import msgspec

from relay.api.query_params import read_field, read_filters
from relay.base.clock import Clock
from relay.errors import RelayError
from relay.model import DeliveryState, Selection


class Filter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A `Selection` as operators write it."""

    source: str | None = None
    type: str | None = None
    subject: str | None = None
    since: str | None = None
    until: str | None = None
    destination: str | None = None
    state: DeliveryState | None = None
    where: dict[str, Any] | list[dict[str, Any]] | None = None

    def selection(self, clock: Clock, *, everything: bool = False) -> Selection:
        """Read times, pattern and conditions; with `everything`, a filter of nothing means all there is.

        Raises:
            RelayError: one of them is wrong, or nothing is filtered.
        """
        fields = read_filters(msgspec.structs.asdict(self), clock.wall())
        if not fields and not everything:
            hint = 'since = "2000-01-01T00:00:00Z" means everything'
            raise RelayError("the filter is empty", hint=f"name at least one of {FIELDS}; {hint}")
        return Selection(**fields)


FIELDS = ", ".join(Filter.__struct_fields__)


def filter_of(query: Mapping[str, str]) -> Filter:
    """Take a filter from the parameters of a question; `where` is JSON there.

    Raises:
        RelayError: a parameter is none of a filter, or of the wrong kind.
    """
    fields: dict[str, Any] = dict(query)
    if "where" in fields:
        fields["where"] = read_field("where", msgspec.json.decode, fields["where"])
    try:
        return msgspec.convert(fields, Filter)
    except msgspec.ValidationError as error:
        raise RelayError(f"the filter is wrong: {error}", hint=f"it has {FIELDS}") from None
