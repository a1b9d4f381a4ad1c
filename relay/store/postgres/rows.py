"""Row ids, public ids and texts as PostgreSQL stores them, and its rows of events.

A row id has 41 bits of milliseconds since `EPOCH`, a counter of 14 bits and the number of the node (8 bits).
So an id is known before the insert, ids follow the order of acceptance, and a day is a range of ids.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from relay.base.clock import SECOND
from relay.model import Delivery, StoredEvent
from relay.store.batch import Sequences
from relay.store.rows import event_of

EPOCH = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp()) * SECOND
"""Microseconds: the time of row id 0."""

NODE_BITS, COUNTER_BITS = 8, 14
STEP = 1 << NODE_BITS
"""Between two ids of a node."""

_TIME_SHIFT = NODE_BITS + COUNTER_BITS
_MILLISECOND = 1000
_NUL = "\\u0000"

CLAIM_COLUMNS = (
    "id, public_id, event_id, destination, attempts, created_at, size, order_key, latest_key, expires_at,"
    " on_dead, replay_of, group_key, slot"
)


class IdSequences(Sequences):
    """Counters of row ids that follow the clock."""

    def __init__(self, highest: Sequence[int], slot: int) -> None:
        """Begin above the highest ids of events, deliveries and attempts; `slot` is the node's number."""
        event, delivery, attempt = ((id_ | STEP - 1) - (STEP - 1) + slot for id_ in highest)
        super().__init__(event, delivery, STEP)
        self.attempt = attempt
        self.slot = slot

    def use(self, slot: int) -> None:
        """Use another number of the node in ids from now on."""
        if slot != self.slot:
            self.event, self.delivery, self.attempt = (
                (id_ | STEP - 1) + 1 + slot for id_ in (self.event, self.delivery, self.attempt)
            )
            self.slot = slot

    def lift(self, wall: int) -> None:
        """Let the next ids have the current time; ids never go back."""
        least = first_id(wall) + self.slot
        self.event = max(self.event, least)
        self.delivery = max(self.delivery, least)
        self.attempt = max(self.attempt, least)

    def next_attempt(self) -> int:
        """Return the row id of a new attempt."""
        self.attempt += STEP
        return self.attempt


def first_id(micros: int) -> int:
    """Return the smallest row id of a moment (microseconds, wall clock).

    >>> first_id(EPOCH + 1_000)
    4194304
    """
    return max((micros - EPOCH) // _MILLISECOND, 0) << _TIME_SHIFT


def micros_of(id_: int) -> int:
    """Return the moment of a row id, in microseconds (wall clock), rounded down to a millisecond."""
    return (id_ >> _TIME_SHIFT) * _MILLISECOND + EPOCH


def uuid_of(public_id: str) -> str:
    """Return the stored form of a public id, such as `evt_018b…`."""
    return public_id[4:]


def public_id(prefix: str, uuid: object) -> str:
    """Return a public id from its stored form."""
    return f"{prefix}{uuid}"


def text(value: str | None) -> str | None:
    r"""Return a text that PostgreSQL can store: with the escape `\u0000` instead of NUL.

    >>> text("a\0b")
    'a\\u0000b'
    """
    return value if value is None or "\0" not in value else value.replace("\0", _NUL)


def stored_event(row: Sequence[Any]) -> StoredEvent:
    """Build an event from a row of `EVENT_COLUMNS`."""
    id_, uuid, *others = row
    return event_of((id_, f"evt_{uuid}", *others))


def delivery_of(row: Sequence[Any]) -> Delivery:
    """Build a delivery, without its event, from a row of `CLAIM_COLUMNS`."""
    (
        id_, uuid, event_id, destination, attempts, created_at, size, order_key, latest_key, expires_at,
        on_dead, replay_of, group_key, slot,
    ) = row  # fmt: skip
    return Delivery(
        id=id_, public_id=f"dlv_{uuid}", event_id=event_id, destination=destination, attempts=attempts,
        created_at=created_at, size=size, order_key=order_key, latest_key=latest_key, expires_at=expires_at,
        on_dead=on_dead, replay_of=replay_of, group_key=group_key, slot=slot,
    )  # fmt: skip
