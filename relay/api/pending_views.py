"""What destinations are owed, as operators see it: their books, since when, and which one stands first.

Beside a destination's name stands why it is `held`. A relay that runs knows that from its lanes; from the
file alone follows what was decided for good, but no circuit, no pause that a receiver asked for, and not
what is in flight.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from relay.api.views import item, unknown
from relay.base.clock import rfc3339
from relay.config.schema import DestinationConfig
from relay.model import Counts, DestinationState
from relay.store import StoredData

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
